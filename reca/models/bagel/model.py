"""BAGEL under RecA: understanding embeddings of an image in, the velocity of its noised latents out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reca.images import patchify
from reca.kernels import Impl, PhiloxNoise, embedding_projection, flow_head, flow_input, runs_fused
from reca.layers.implementation import activation_dtype
from reca.layers.mlp import MLP
from reca.layers.norm import RMSNorm
from reca.layers.position import sincos_position_table
from reca.layers.rotary import rotary_table
from reca.layers.stream import Stream
from reca.layers.timestep import timestep_features
from reca.models.bagel.batch import BagelBatch, BagelDraws, TargetGroup
from reca.models.bagel.config import BagelConfig
from reca.models.bagel.flops import minimum_flops
from reca.models.bagel.transformer import DecoderLayer
from reca.models.bagel.vae import FluxVAE
from reca.models.bagel.vision import VisionEncoder
from reca.objectives.flow_matching import shifted_time
from reca.profiling import span
from reca.randomness import RandomSource, key_of
from reca.types import LossTerms

_TIME_FEATURES = 256


class TimeEmbedder(nn.Module):
    """Time in [0, 1], not scaled by 1000, -> [n, dim]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(_TIME_FEATURES, dim)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, time: Tensor) -> Tensor:
        """Embed [n] times; one row per image is enough, since its tokens share one."""
        features = timestep_features(time, _TIME_FEATURES).to(self.fc1.weight.dtype)
        embedded: Tensor = self.fc2(F.silu(self.fc1(features)))
        return embedded


class BagelModel(nn.Module):
    """The whole model; only what generates latents is trained.

    Trained: the generation expert of every layer, `norm_gen`, `vae2llm`, `llm2vae` and `time_embedder`.
    `norm` and `lm_head` make text, which RecA never does; they are held so that a saved checkpoint is
    complete.

    Args:
        config: the architecture.

    Attributes:
        timestep_shift: shift of the training timesteps; RecA's is 1.
    """

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        llm = config.llm
        dim = llm.hidden_size
        self.config = config
        self.timestep_shift = 1.0
        self.kernels: Impl = "auto"
        self.vision = VisionEncoder(config.vision)
        self.connector = MLP(config.vision.hidden_size, dim, dim)
        self.embed_tokens = nn.Embedding(llm.vocab_size, dim)
        self.layers = nn.ModuleList(
            DecoderLayer(llm, is_last=index == llm.num_hidden_layers - 1)
            for index in range(llm.num_hidden_layers)
        )
        self.norm = RMSNorm(dim, llm.rms_norm_eps)
        self.norm_gen = RMSNorm(dim, llm.rms_norm_eps)
        self.lm_head = nn.Linear(dim, llm.vocab_size, bias=False)
        self.time_embedder = TimeEmbedder(dim)
        self.vae2llm = nn.Linear(config.latent_dim, dim)
        self.llm2vae = nn.Linear(dim, config.latent_dim)
        self.vae = FluxVAE(config.vae)
        # On the CPU even under torch.device("meta"): they are computed, never loaded.
        with torch.device("cpu"):
            vision_table = sincos_position_table(dim, config.vit_max_num_patch_per_side)
            latent_table = sincos_position_table(dim, config.max_latent_size)
        self.register_buffer("vision_positions", vision_table, persistent=False)
        self.register_buffer("latent_positions", latent_table, persistent=False)
        self.vision_positions: Tensor
        self.latent_positions: Tensor
        nn.init.zeros_(self.llm2vae.weight)
        nn.init.zeros_(self.llm2vae.bias)
        self.requires_grad_(False)
        for trained in self.trained_modules():
            trained.requires_grad_(True)

    def trained_modules(self) -> list[nn.Module]:
        """What RecA changes."""
        experts: list[nn.Module] = [layer.gen for layer in self.blocks()]
        return [*experts, self.norm_gen, self.vae2llm, self.llm2vae, self.time_embedder]

    def blocks(self) -> Sequence[DecoderLayer]:
        """The decoder layers, in order of execution."""
        return list(self.layers)  # type: ignore[arg-type]

    def flops(self, batch: BagelBatch) -> int:
        """Least FLOPs of forward + backward of this microbatch; see `minimum_flops`."""
        return minimum_flops(self.config, batch.layout)

    @torch.no_grad()
    def draw(self, batch: BagelBatch, random: RandomSource) -> BagelDraws:
        """One time per image, noise per latent token, posterior noise per latent; all keyed by sample."""
        layout, ids = batch.layout, batch.sample_ids
        normal = random.normal("time", ids, 1).squeeze(1)
        tokens = torch.full((), sum(layout.latent_lengths), dtype=torch.float32, device=ids.device)
        return BagelDraws(
            counts={"reconstruction": tokens},
            time=shifted_time(torch.sigmoid(normal), self.timestep_shift),
            noise=self._noise(batch, random),
            posterior=tuple(self._posterior(group, ids, random) for group in batch.targets),
        )

    def _noise(self, batch: BagelBatch, random: RandomSource) -> Tensor | PhiloxNoise:
        """Noise of the latent tokens; where kernels regenerate it, only the coordinates of its numbers."""
        ids, layout = batch.sample_ids, batch.layout
        if not runs_fused(self.kernels, ids.device):
            return random.normal_rows("noise", ids, layout.latent_lengths, self.config.latent_dim)
        step = torch.full((), random.step, dtype=torch.int64, device=ids.device)
        return PhiloxNoise(key_of(random.seed, "noise"), step, ids, layout.latent_rows)

    def _posterior(self, group: TargetGroup, sample_ids: Tensor, random: RandomSource) -> Tensor:
        if group.kind == "latents":
            return sample_ids.new_empty(0, dtype=torch.float32)
        stride = self.config.vae.stride if group.kind == "pixels" else 1
        height, width = group.values.shape[-2] // stride, group.values.shape[-1] // stride
        channels = self.config.vae.z_channels
        ids = sample_ids
        if group.images != tuple(range(len(sample_ids))):
            ids = torch.stack([sample_ids[index] for index in group.images])
        return random.normal("posterior", ids, channels * height * width).view(-1, channels, height, width)

    def forward(self, batch: BagelBatch, draws: BagelDraws) -> LossTerms:
        """`reconstruction`: squared error of the velocity, mean over channels, summed over tokens; fp32."""
        clean = self.encode_target(batch, draws)
        understanding = self.understand(batch)
        with span("predict"):
            latents = self.embed_latents(batch, clean, draws)
            latents = self.transform(batch, understanding, latents)
        with span("loss"):
            return {"reconstruction": self.velocity_loss(batch, latents, clean, draws)}

    @torch.no_grad()
    def understand(self, batch: BagelBatch) -> Tensor:
        """[understanding rows, dim]: what the frozen half of the sequence puts into the transformer."""
        with span("understand"):
            encoded = self.vision(batch.patches, batch.patch_positions, batch.patch_images)
            dtype = activation_dtype(self.connector.fc1.weight)
            projected = embedding_projection(
                encoded.to(dtype),
                *(parameter.to(dtype) for parameter in self.connector.parameters()),
                activation="gelu_tanh",
                position=self.vision_positions,
                position_ids=batch.patch_positions,
                impl=self.kernels,
            )
            embedded: Tensor = self.embed_tokens(batch.token_ids)
            # Not as `destination`: what finds each row's token is eight launches, this is one over 256 rows.
            return embedded.index_copy_(0, batch.patch_rows, projected.to(embedded.dtype))

    @torch.no_grad()
    def encode_target(self, batch: BagelBatch, draws: BagelDraws) -> Tensor:
        """[latent rows, latent_dim] fp32: clean latent tokens, image by image."""
        patch = self.config.latent_patch_size
        tokens: dict[int, Tensor] = {}
        with span("encode_target"):
            for group, noise in zip(batch.targets, draws.posterior, strict=True):
                latents = self.latents(group, noise)
                for index, latent in zip(group.images, latents, strict=True):
                    rows, columns = batch.latent_grids[index]
                    tokens[index] = patchify(latent[:, : rows * patch, : columns * patch], patch)
            return torch.cat([tokens[index] for index in range(batch.num_images)])

    def latents(self, group: TargetGroup, noise: Tensor) -> Tensor:
        """[images, z, height, width] fp32: scaled latents of a group, the posterior sampled with `noise`."""
        if group.kind == "latents":
            return group.values
        moments = group.values
        if group.kind == "pixels":
            moments = self.vae.moments(moments.to(next(self.vae.parameters()).dtype))
        return self.vae.sample(moments.to(torch.float32), noise)

    def embed_latents(self, batch: BagelBatch, clean: Tensor, draws: BagelDraws) -> Tensor:
        """[latent rows, dim]: projected noised latents, time of their image, position."""
        dtype = activation_dtype(self.vae2llm.weight)
        return flow_input(
            clean,
            draws.noise,
            draws.time,
            batch.layout.latent_images,
            self.vae2llm.weight.to(dtype),
            self.vae2llm.bias.to(dtype),
            time_embedding=self.time_embedder(draws.time).to(dtype),
            position=self.latent_positions,
            position_ids=batch.latent_positions,
            impl=self.kernels,
        )

    def transform(self, batch: BagelBatch, understanding: Tensor, latents: Tensor) -> Tensor:
        """[latent rows, dim]: the latents' residual stream after all layers.

        Args:
            batch: gives rows and positions.
            understanding: [understanding rows, dim] of `understand`.
            latents: [latent rows, dim] of `embed_latents`.
        """
        llm = self.config.llm
        rotation = rotary_table(batch.layout.positions, llm.head_dim, llm.rope_theta, understanding.dtype)
        streams = Stream(understanding), Stream(latents)
        for layer in self.layers:
            streams = layer(*streams, batch.layout, rotation)
        return streams[1].rows

    def velocity_loss(self, batch: BagelBatch, latents: Tensor, clean: Tensor, draws: BagelDraws) -> Tensor:
        """Scalar fp32: squared error of the velocity of the latents' final states, summed over tokens."""
        norm, output, dtype = self.norm_gen, self.llm2vae, latents.dtype
        return flow_head(
            latents,
            norm.weight,
            output.weight.to(dtype),
            output.bias.to(dtype),
            clean,
            draws.noise,
            torch.ones(latents.shape[0], dtype=torch.float32, device=latents.device),
            eps=norm.eps,
            images=batch.layout.latent_images,
            impl=self.kernels,
        )
