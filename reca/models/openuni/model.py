"""OpenUni under RecA: a frozen language model's query states in, the velocity of noised latents out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from reca.layers.norm import RMSNorm
from reca.layers.rotary import rotary_table
from reca.layers.stream import Stream
from reca.models.openuni.batch import OpenUniBatch, OpenUniDraws, Prompts, TextToImageBatch
from reca.models.openuni.config import OpenUniConfig
from reca.models.openuni.flops import minimum_flops
from reca.models.openuni.sana import DeepCompressionAutoencoder, build_sana
from reca.models.openuni.transformer import Connector, DecoderLayer
from reca.models.openuni.vision import Aligner, VisionEncoder
from reca.objectives.flow_matching import flow_matching, interpolate, shifted_time
from reca.profiling import span
from reca.randomness import RandomSource
from reca.types import LossTerms

TIMESTEPS = 1000
"""Times of training are multiples of 1 / 1000; SANA counts them in this unit."""


class OpenUniModel(nn.Module):
    """The whole model; understanding encoder, language model and autoencoder stay frozen.

    Trained: `meta_queries`, `connector`, `projector` and `sana`. `lm_head` makes text, which RecA never does;
    it is held so that a saved checkpoint is complete.

    Args:
        config: the architecture.

    Attributes:
        timestep_shift: shift of the training timesteps. 1: the official scheduler is built from a file whose
            key it does not read, so that it trains without the shift of 3 it samples with.
    """

    def __init__(self, config: OpenUniConfig) -> None:
        super().__init__()
        llm = config.llm
        dim = llm.hidden_size
        self.config = config
        self.timestep_shift = 1.0
        self.vision = VisionEncoder(config.vision)
        self.aligner = Aligner(config.vision, dim)
        self.embed_tokens = nn.Embedding(llm.vocab_size, dim)
        self.layers = nn.ModuleList(
            DecoderLayer(llm, is_last=index == llm.num_hidden_layers - 1)
            for index in range(llm.num_hidden_layers)
        )
        self.norm = RMSNorm(dim, llm.rms_norm_eps)
        self.lm_head = nn.Linear(dim, llm.vocab_size, bias=False)
        self.meta_queries = nn.Parameter(torch.randn(config.num_queries, dim) * dim**-0.5)
        self.connector = Connector(config.connector)
        self.projector = nn.Linear(dim, config.sana.caption_channels)
        self.sana = build_sana(config.sana)
        self.vae = DeepCompressionAutoencoder(config.autoencoder)
        self.requires_grad_(False)
        for trained in (self.connector, self.projector, self.sana):
            trained.requires_grad_(True)
        self.meta_queries.requires_grad_(True)

    def blocks(self) -> Sequence[nn.Module]:
        """Layers of the language model, the connector and SANA, in order of execution."""
        return [*self.layers, *self.connector.layers, *self.sana.transformer_blocks]

    def flops(self, batch: OpenUniBatch) -> int:
        """Least FLOPs of forward + backward of this microbatch; see `minimum_flops`."""
        return minimum_flops(self.config, batch)

    def draw(self, batch: OpenUniBatch, random: RandomSource) -> OpenUniDraws:
        """Time and noise of each image; with stochastic depth also which branches its encoder keeps."""
        ids, (channels, height, width) = batch.sample_ids, batch.latent_shape
        index = (random.uniform("time", ids, 1).squeeze(1) * TIMESTEPS).floor()
        term = "text_to_image" if isinstance(batch, TextToImageBatch) else "reconstruction"
        return OpenUniDraws(
            counts={term: torch.full((), batch.num_images, dtype=torch.float32, device=ids.device)},
            time=shifted_time((TIMESTEPS - index) / TIMESTEPS, self.timestep_shift),
            noise=random.normal("noise", ids, channels * height * width).view(-1, channels, height, width),
            kept=self._kept(batch, random),
        )

    def _kept(self, batch: OpenUniBatch, random: RandomSource) -> Tensor | None:
        """0 or 1 / (1 - rate) per layer, branch and image; the rate grows linearly to the last layer."""
        vision = self.config.vision
        if not vision.drop_path_rate or batch.prompts.vision is None:
            return None
        layers, ids = vision.num_hidden_layers, batch.sample_ids
        rate = torch.linspace(0, vision.drop_path_rate, layers, device=ids.device)[:, None, None]
        uniform = random.uniform("drop_path", ids, 2 * layers).T.reshape(layers, 2, -1)
        return (uniform >= rate) / (1 - rate)

    def forward(self, batch: OpenUniBatch, draws: OpenUniDraws) -> LossTerms:
        """One term, named by the task: squared error of the velocity, mean over an image, summed; fp32."""
        clean = self.encode_target(batch)
        embeddings = self.understand(batch, draws)
        noised = interpolate(clean.flatten(1), draws.noise.flatten(1), draws.time).view_as(clean)
        caption = self.caption(batch.prompts, embeddings)
        velocity = self.predict(noised, TIMESTEPS * draws.time, caption)
        with span("loss"):
            loss = flow_matching(velocity.flatten(1), clean.flatten(1), draws.noise.flatten(1))
        return dict.fromkeys(draws.counts, loss)

    @torch.no_grad()
    def encode_target(self, batch: OpenUniBatch) -> Tensor:
        """[images, channels, h, w] fp32: scaled latents of the targets."""
        with span("encode_target"):
            return batch.latents if batch.latents is not None else self.vae.encode(_pixels(batch))

    @torch.no_grad()
    def understand(self, batch: OpenUniBatch, draws: OpenUniDraws) -> Tensor | None:
        """[images * embeddings, dim] of the images in the prompts; None if there are none."""
        if batch.prompts.vision is None or batch.embeddings is not None:
            return batch.embeddings
        with span("understand"):
            encoded: Tensor = self.aligner(self.vision(_pixels(batch), batch.prompts.vision, draws.kept))
            return encoded.flatten(0, 1)

    def caption(self, prompts: Prompts, embeddings: Tensor | None) -> Tensor:
        """[samples, queries, caption_channels]: what SANA is told; gradients reach the queries only."""
        with span("caption"):
            hidden = self.query_states(prompts, embeddings)
            connected = self.connector(hidden, prompts.layout.connector)
            projected: Tensor = self.projector(connected)
            return projected.view(prompts.layout.num_samples, self.config.num_queries, -1)

    def query_states(self, prompts: Prompts, embeddings: Tensor | None) -> Tensor:
        """[query rows, dim]: final states of the queries behind each prompt."""
        llm, layout = self.config.llm, prompts.layout
        rows = self.embed_prompts(prompts, embeddings)
        prompt_rotation, query_rotation = (
            rotary_table(positions, llm.head_dim, llm.rope_theta, rows.dtype)
            for positions in (layout.prompt_positions, layout.query_positions)
        )
        # under autocast the trained queries are fp32 beside frozen activations in bf16
        prompt, query = Stream(rows), Stream(self.meta_queries.to(rows.dtype).repeat(layout.num_samples, 1))
        for layer in self.layers:
            prompt, query = layer(prompt, query, layout, (prompt_rotation, query_rotation))
        states: Tensor = self.norm(query.rows)
        return states

    @torch.no_grad()
    def embed_prompts(self, prompts: Prompts, embeddings: Tensor | None) -> Tensor:
        """[prompt rows, dim]: token embeddings, with those of the images in their places."""
        embedded: Tensor = self.embed_tokens(prompts.token_ids)
        if embeddings is None:
            return embedded
        return embedded.index_copy(0, prompts.image_rows, embeddings.to(embedded.dtype))

    def predict(self, noised: Tensor, timestep: Tensor, caption: Tensor) -> Tensor:
        """Velocity of noised latents.

        Args:
            noised: [images, channels, h, w] fp32.
            timestep: [images] fp32 in (0, 1000]; 1000 is noise.
            caption: [images, queries, caption_channels].

        Returns: [images, channels, h, w] in the dtype of activations.
        """
        with span("predict"):
            output = self.sana(noised, caption, timestep, return_dict=False)
            return cast(Tensor, output[0])


def _pixels(batch: OpenUniBatch) -> Tensor:
    if batch.pixels is None:
        raise ValueError("OpenUniModel: the batch has neither pixels nor what replaces them; give one")
    return batch.pixels
