"""Harmon under RecA: a masked autoencoder's encoder understands an image; tokens are generated one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reca.kernels import Impl, diffusion_loss, diffusion_noise, embedding_projection, masked_token_loss
from reca.layers.implementation import activation_dtype
from reca.layers.norm import RMSNorm
from reca.layers.rotary import rotary_table
from reca.layers.stream import Stream
from reca.models.harmon.batch import (
    Encoding,
    GenerationBatch,
    GenerationDraws,
    Images,
    ImageToTextBatch,
    ImageToTextDraws,
    ReconstructionBatch,
    Sequences,
)
from reca.models.harmon.config import HarmonConfig
from reca.models.harmon.diffusion import NUM_STEPS, Schedule
from reca.models.harmon.dropout import DrawnDropout, Dropout
from reca.models.harmon.flops import minimum_flops
from reca.models.harmon.head import DiffusionHead
from reca.models.harmon.mar import MarDecoder, MarEncoder
from reca.models.harmon.transformer import QwenLayer
from reca.models.harmon.vae import KLVAE
from reca.profiling import span
from reca.randomness import RandomSource
from reca.types import LossTerms


class ScaleGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a factor in its first rows."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: float, rows: int) -> Tensor:
        """Pass `values` through."""
        ctx.factor, ctx.rows = factor, rows
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Scale the gradient."""
        scaled = ctx.factor * gradient[: ctx.rows]
        if ctx.rows < gradient.shape[0]:
            scaled = torch.cat([scaled, gradient[ctx.rows :]])
        return scaled, None, None


class Bridge(nn.Module):
    """Two linear layers with SiLU between them, from one width to another."""

    def __init__(self, dim: int, hidden: int, out: int) -> None:
        super().__init__()
        self.kernels: Impl = "auto"
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        """Apply both to rows [rows, dim]."""
        # Autocast does not reach into the operator: all operands come in the dtype of the activations.
        dtype = activation_dtype(self.fc1.weight)
        layers = (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        operands = (operand.to(dtype) for operand in (x, *layers))
        return embedding_projection(*operands, activation="silu", impl=self.kernels)


class HarmonModel(nn.Module):
    """The whole model; everything but the autoencoder is trained.

    `class_embedding` belongs to the masked autoencoder's pretraining and is never used; like officially it is
    held and decayed. The embedding of tokens is also the output layer.

    Args:
        config: the architecture.
    """

    def __init__(self, config: HarmonConfig) -> None:
        super().__init__()
        llm, mar = config.llm, config.mar
        dim, width = llm.hidden_size, mar.encoder_embed_dim
        self.config = config
        self.kernels: Impl = "auto"
        self.encoder = MarEncoder(mar)
        self.proj_in = Bridge(width, dim, dim)
        self.embed_tokens = nn.Embedding(llm.vocab_size, dim)
        self.layers = nn.ModuleList(QwenLayer(llm) for _ in range(llm.num_hidden_layers))
        self.norm = RMSNorm(dim, llm.rms_norm_eps)
        self.proj_out = Bridge(dim, dim, width)
        self.decoder = MarDecoder(mar)
        self.diffusion_head = DiffusionHead(mar.vae_embed_dim, width, mar.diffloss_w, mar.diffloss_d)
        self.class_embedding = nn.Embedding(mar.class_num, width)
        self.vae = KLVAE(config.vae, config.vae_scale)
        self.vae.requires_grad_(False)
        # On the CPU even under torch.device("meta"): computed, never loaded.
        with torch.device("cpu"):
            table = Schedule.full().table
        self.register_buffer("schedule_table", table, persistent=False)
        self.schedule_table: Tensor
        for embedding in (self.embed_tokens, self.class_embedding):
            nn.init.normal_(embedding.weight, std=0.02)

    def blocks(self) -> Sequence[nn.Module]:
        """What is sharded, recomputed and compiled."""
        return [*self.encoder.blocks, *self.layers, *self.decoder.blocks, *self.diffusion_head.blocks]

    def decoder_layers(self) -> Sequence[QwenLayer]:
        """The layers of the language model, in order."""
        return list(self.layers)  # type: ignore[arg-type]

    def flops(self, batch: GenerationBatch | ImageToTextBatch) -> int:
        """Least FLOPs of forward + backward of this microbatch; see `minimum_flops`."""
        return minimum_flops(self.config, batch)

    @torch.no_grad()
    def draw(
        self, batch: GenerationBatch | ImageToTextBatch, random: RandomSource
    ) -> GenerationDraws | ImageToTextDraws:
        """Order of tokens, noise levels and noise, all keyed by sample. The mask ratio is the batch's own."""
        ids, mar = batch.sample_ids, self.config.mar
        dropout = DrawnDropout.of(random, ids) if mar.attn_dropout or mar.proj_dropout else None
        if isinstance(batch, ImageToTextBatch):
            labels = torch.full((), batch.labels.shape[0], dtype=torch.float32, device=ids.device)
            return ImageToTextDraws(counts={"image_to_text": labels}, dropout=dropout)
        order = random.uniform("order", ids, batch.images.tokens).argsort(dim=1, stable=True)
        levels, channels = mar.diffusion_batch_mul, mar.vae_embed_dim
        rows = [levels * masked for masked in batch.num_masked]
        # One draw of the longest each: shorter samples take a prefix, which is what they would draw alone.
        uniform = random.uniform("time", ids, max(rows))
        time = uniform.mul(NUM_STEPS).long().clamp(max=NUM_STEPS - 1)
        noise = random.normal("noise", ids, max(rows) * channels).view(len(rows), -1, channels)
        noises = [noise[i, :n].view(levels, -1, channels) for i, n in enumerate(rows)]
        return generation_draws(
            self.config,
            batch,
            order,
            torch.cat([time[i, :n].view(levels, -1) for i, n in enumerate(rows)], dim=1).flatten(),
            torch.cat(noises, dim=1).flatten(0, 1),
            dropout,
        )

    def forward(
        self, batch: GenerationBatch | ImageToTextBatch, draws: GenerationDraws | ImageToTextDraws
    ) -> LossTerms:
        """The term of the batch's task, fp32.

        `reconstruction`, `text_to_image`: diffusion loss, summed over noise levels and masked tokens.
        `image_to_text`: cross entropy, summed over labelled tokens.
        """
        latents = self.encode_target(batch.images)
        if isinstance(batch, ImageToTextBatch):
            assert isinstance(draws, ImageToTextDraws)
            return {"image_to_text": self.caption_loss(batch, latents, draws)}
        assert isinstance(draws, GenerationDraws)
        condition = self.condition(batch, latents, draws)
        with span("loss"):
            clean = latents.flatten(0, 1).index_select(0, draws.masked)
            at = (draws.time, self.schedule_table)
            noised = diffusion_noise(clean, draws.noise, *at, impl=self.kernels)
            output = self.diffusion_head(noised, draws.time, condition)
            loss, _, _ = diffusion_loss(output, clean, draws.noise, *at, impl=self.kernels)
        name = "reconstruction" if isinstance(batch, ReconstructionBatch) else "text_to_image"
        return {name: loss}

    @torch.no_grad()
    def encode_target(self, images: Images) -> Tensor:
        """[images, h * w, channels] fp32: scaled latents."""
        with span("encode_target"):
            return images.values if images.kind == "latents" else self.vae.encode(images.values)

    def understand(
        self,
        latents: Tensor,
        rows: Tensor,
        grid: tuple[int, int],
        encoding: Encoding,
        dropout: Dropout | None,
    ) -> tuple[Tensor, Tensor]:
        """Encode `rows` of [buffers; tokens of all images], in one run whatever they are for.

        Returns: encoded rows [rows, width], and [rows, dim], what the language model is shown of them; where
            an image is understood, the gradient of the latter is scaled.
        """
        with span("understand"):
            encoded = self.encoder(latents, rows, grid, encoding.segments, dropout, encoding.passes)
            shown = self.proj_in(encoded)
            if len(encoding.whole):
                shown = ScaleGradient.apply(shown, self.config.grad_scale, len(encoding.whole))  # type: ignore[no-untyped-call]
            return encoded, shown

    def condition(self, batch: GenerationBatch, latents: Tensor, draws: GenerationDraws) -> Tensor:
        """[masked tokens, width]: what the diffusion head is told about each masked token."""
        grid, encoding = batch.images.grid, batch.encoding
        encoded, shown = self.understand(latents, draws.encoder_rows, grid, encoding, draws.dropout)
        with span("predict"):
            hidden = self.run_llm(batch.sequences, shown)
            visible = encoded[len(encoding.whole) :]
            visible = visible + self.proj_out(hidden).index_select(0, batch.from_llm)
            canvas = self.decoder(visible, draws.canvas_rows, grid, batch.canvas_segments, draws.dropout)
            chosen = canvas.index_select(0, draws.masked_rows)
            return chosen + self.decoder.output_positions(grid).index_select(0, draws.masked_positions)

    def run_llm(self, sequences: Sequences, images: Tensor) -> Tensor:
        """[read rows, dim]: normed hidden states; `images` are embeddings of understanding and generation."""
        llm = self.config.llm
        text = self.embed_tokens(sequences.token_ids).to(images.dtype)
        hidden = torch.cat([text, images]).index_select(0, sequences.rows)
        rotation = rotary_table(sequences.positions, llm.head_dim, llm.rope_theta, hidden.dtype)
        last = len(self.layers) - 1
        stream = Stream(hidden)
        for index, layer in enumerate(self.layers):
            stream = layer(stream, rotation, sequences.segments, sequences.readout if index == last else None)
        normed: Tensor = self.norm(stream.rows)
        return normed

    def caption_loss(self, batch: ImageToTextBatch, latents: Tensor, draws: ImageToTextDraws) -> Tensor:
        """Scalar fp32: cross entropy of the labelled tokens, summed."""
        grid, encoding = batch.images.grid, batch.encoding
        _, seen = self.understand(latents, encoding.whole, grid, encoding, draws.dropout)
        hidden = self.run_llm(batch.sequences, seen)
        with span("loss"):
            weight = self.embed_tokens.weight.to(seen.dtype)
            return masked_token_loss(hidden.to(seen.dtype), weight, batch.labels, impl=self.kernels)


def generation_draws(
    config: HarmonConfig,
    batch: GenerationBatch,
    order: Tensor,
    time: Tensor,
    noise: Tensor,
    dropout: Dropout | None,
) -> GenerationDraws:
    """Rows that follow from the order of tokens; lengths come from the batch, so nothing is read on the host.

    Args:
        order: [images, h * w] int64 permutations; the first `num_masked` of each are masked.
        time, noise: as in `GenerationDraws`.
    """
    tokens, buffers, device = batch.images.tokens, config.mar.buffer_size, order.device
    rank = order.argsort(dim=1)  # place of each position in the order
    is_masked = rank < batch.masked_counts[:, None]
    raster = is_masked.to(torch.int8).argsort(dim=1, stable=True)  # visible, then masked positions
    image = torch.arange(order.shape[0], device=device)[:, None]
    shared = torch.arange(buffers, device=device).expand(order.shape[0], buffers)
    among_all = raster + image * tokens  # [images, tokens]
    encoded = torch.cat([shared, among_all + buffers], dim=1)  # [images, buffers + tokens]
    canvas = torch.cat([shared, raster + buffers], dim=1) + image * (buffers + tokens)

    def visible(rows: Tensor) -> list[Tensor]:
        return [row[: buffers + count] for row, count in zip(rows, batch.num_visible, strict=True)]

    def masked(rows: Tensor) -> Tensor:
        return torch.cat([row[len(row) - count :] for row, count in zip(rows, batch.num_masked, strict=True)])

    counted = torch.full((), noise.shape[0], dtype=torch.float32, device=device)
    name = "reconstruction" if isinstance(batch, ReconstructionBatch) else "text_to_image"
    return GenerationDraws(
        counts={name: counted},
        encoder_rows=torch.cat([batch.encoding.whole, *visible(encoded)]),
        canvas_rows=torch.cat(visible(canvas)),
        masked=masked(among_all),
        masked_positions=masked(raster),
        masked_rows=masked(canvas),
        time=time,
        noise=noise,
        dropout=dropout,
    )
