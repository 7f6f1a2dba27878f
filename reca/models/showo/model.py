"""Show-o under RecA: an image's embeddings or coarse codes in, its masked codes out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reca.kernels import Impl, embedding_projection, masked_token_loss
from reca.layers.implementation import activation_dtype
from reca.layers.norm import LayerNorm
from reca.layers.rotary import rotary_table
from reca.models.showo.batch import ImageToTextBatch, MaskedBatch, ReconstructionBatch, ShowoBatch, ShowoDraws
from reca.models.showo.config import ShowoConfig
from reca.models.showo.flops import minimum_flops
from reca.models.showo.magvit import Magvit
from reca.models.showo.transformer import Chosen, DecoderLayer, Layout, Stream
from reca.models.showo.vision import VisionTower, as_clip
from reca.profiling import span
from reca.randomness import RandomSource
from reca.types import LossTerms


class Projector(nn.Module):
    """Two linear layers with the exact GELU between them: vision features -> the language model's width."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, out)
        self.fc2 = nn.Linear(out, out)
        self.kernels: Impl = "auto"

    def forward(self, features: Tensor) -> Tensor:
        """[..., dim] -> [..., out]."""
        rows = embedding_projection(*self._operands(features), activation="gelu", impl=self.kernels)
        return rows.view(*features.shape[:-1], rows.shape[1])

    def place(self, features: Tensor, destination: Tensor, rows: Tensor) -> Tensor:
        """`destination` [rows, out] with the projected features [..., dim] in these of its rows."""
        operands = self._operands(features)
        return embedding_projection(
            *operands, activation="gelu", destination=destination, rows=rows, impl=self.kernels
        )

    def _operands(self, features: Tensor) -> list[Tensor]:
        """Features as rows, weights and biases, all in the dtype of the activations."""
        dtype = activation_dtype(self.fc1.weight)
        layers = (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        return [tensor.to(dtype) for tensor in (features.flatten(0, -2), *layers)]


class ShowoModel(nn.Module):
    """The whole model: everything is trained but the vision tower and the image tokenizer.

    In the CLIP variants embeddings and projector of a reconstruction are constants, as officially: that loss
    trains layers, norms and output layer only, and the projector learns from image to text.

    Args:
        config: the architecture.
    """

    def __init__(self, config: ShowoConfig) -> None:
        super().__init__()
        phi = config.phi
        self.config = config
        self.kernels: Impl = "auto"
        self.embed_tokens = nn.Embedding(config.vocab_size, phi.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(phi) for _ in range(phi.num_hidden_layers))
        self.final_layernorm = LayerNorm(phi.hidden_size, phi.layer_norm_eps)
        self.lm_head = nn.Linear(phi.hidden_size, config.vocab_size)
        self.magvit = Magvit(config.magvit)
        self.vision: VisionTower | None = None
        self.mm_projector: Projector | None = None
        if config.clip is not None:
            self.mm_projector = Projector(config.clip.hidden_size, phi.hidden_size)
            self.vision = VisionTower(config.clip)
        for part in (self.embed_tokens, self.lm_head):
            nn.init.normal_(part.weight, std=0.02)

    def blocks(self) -> Sequence[DecoderLayer]:
        """The units to shard, recompute and compile, in order of execution."""
        return list(self.layers)  # type: ignore[arg-type]

    def flops(self, batch: ShowoBatch) -> int:
        """Least FLOPs of forward + backward; see `reca.models.showo.flops`."""
        return minimum_flops(self.config, batch)

    def draw(self, batch: ShowoBatch, random: RandomSource) -> ShowoDraws:
        """Which codes are masked; how many was drawn while the samples were prepared."""
        ids = batch.sample_ids
        if isinstance(batch, ImageToTextBatch):
            count = torch.full((), len(batch.labels), dtype=torch.float32, device=ids.device)
            return ShowoDraws(counts={batch.term: count}, masked=ids.new_empty(0))
        assert isinstance(batch, MaskedBatch)
        codes = self.config.num_codes
        order = random.uniform(f"{batch.term}/mask", ids, codes).argsort(dim=1)
        rows = order + torch.arange(0, len(ids) * codes, codes, device=ids.device)[:, None]
        masked = [row[:count] for row, count in zip(rows, batch.num_masked, strict=True)]
        total = sum(batch.num_masked) + len(batch.frame_rows)
        counted = torch.full((), total, dtype=torch.float32, device=ids.device)
        return ShowoDraws(counts={batch.term: counted}, masked=torch.cat(masked))

    def forward(self, batch: ShowoBatch, draws: ShowoDraws) -> LossTerms:
        """The batch's own term: cross entropy over the whole vocabulary, summed over predicted tokens."""
        codes = self.target_codes(batch)
        hidden = self.embed(batch, self.token_ids(batch, draws, codes))
        if isinstance(batch, ImageToTextBatch):
            chosen, labels = batch.chosen, batch.labels
        else:
            assert isinstance(batch, MaskedBatch)
            chosen, labels = self.masked_rows(batch, draws, codes)
        with span("predict"):
            hidden = self.transform(hidden, batch.layout, chosen)
            if isinstance(batch, ImageToTextBatch):
                hidden = hidden.index_select(0, batch.predicting)
        with span("loss"):
            weight, bias = self.lm_head.weight, self.lm_head.bias
            dtype = activation_dtype(weight)
            normed = self.final_layernorm(hidden).to(dtype)
            loss = masked_token_loss(normed, weight.to(dtype), labels, bias.to(dtype), impl=self.kernels)
            return {batch.term: loss}

    @torch.no_grad()
    def target_codes(self, batch: ShowoBatch) -> Tensor:
        """[samples, codes] int64 of the images to be generated; empty for image to text."""
        if isinstance(batch, ImageToTextBatch):
            return batch.sample_ids.new_empty(0)
        with span("encode_target"):
            return self.magvit.encode(batch.pixels) if batch.codes is None else batch.codes

    @torch.no_grad()
    def given_codes(self, batch: ShowoBatch) -> Tensor:
        """[samples, codes] int64 of the images that are given (VQ variants)."""
        if batch.given is not None:
            return batch.given
        with span("understand"):
            is_reconstruction = isinstance(batch, ReconstructionBatch)
            return self.magvit.encode(self.shrink(batch.pixels) if is_reconstruction else batch.pixels)

    def shrink(self, pixels: Tensor) -> Tensor:
        """The coarse or blurred image that conditions a reconstruction: bilinear, without antialiasing."""
        size = self.config.resolution
        for side in (size // self.config.down_scale, *((size,) if self.config.resize_back else ())):
            pixels = F.interpolate(pixels, size=(side, side), mode="bilinear", align_corners=False)
        return pixels

    @torch.no_grad()
    def token_ids(self, batch: ShowoBatch, draws: ShowoDraws, codes: Tensor) -> Tensor:
        """[rows] int64: the layout's tokens, the given codes, the codes to be generated and their masks."""
        special, ids = self.config.special, batch.layout.token_ids.clamp(min=0)
        if batch.given_rows.shape[0]:
            given = self.given_codes(batch).flatten() + special.codes
            ids = ids.index_copy(0, batch.given_rows, given)
        if batch.image_rows.shape[0]:
            ids = ids.index_copy(0, batch.image_rows, codes.flatten() + special.codes)
            ids = ids.index_fill(0, batch.image_rows[draws.masked], special.mask)
        return ids

    def embed(self, batch: ShowoBatch, token_ids: Tensor) -> Tensor:
        """[rows, dim]: token embeddings with the vision embeddings in their rows."""
        if self.vision is None:
            embedded: Tensor = self.embed_tokens(token_ids)
            return embedded
        is_constant = isinstance(batch, ReconstructionBatch) and not self.config.train_condition
        with torch.no_grad() if is_constant else nullcontext():
            embedded = self.embed_tokens(token_ids)
            if not batch.vision_rows.shape[0]:
                return embedded
            assert self.mm_projector is not None
            with span("understand"):
                return self.mm_projector.place(self.features(batch), embedded, batch.vision_rows)

    def understand(self, batch: ShowoBatch) -> Tensor:
        """[samples, vision tokens, dim]: what the language model is shown of the images (CLIP variants)."""
        assert self.mm_projector is not None
        with span("understand"):
            output: Tensor = self.mm_projector(self.features(batch))
            return output

    def features(self, batch: ShowoBatch) -> Tensor:
        """[samples, vision tokens, vision dim]: what the vision tower sees of the images (CLIP variants)."""
        assert self.vision is not None
        is_reconstruction = isinstance(batch, ReconstructionBatch)
        seen: Tensor = self.vision(self.clip_pixels(batch.pixels) if is_reconstruction else batch.pixels)
        return seen

    def clip_pixels(self, pixels: Tensor) -> Tensor:
        """Images in [-1, 1] as a reconstruction shows them to the vision tower."""
        assert self.vision is not None
        resized = self.vision.resize(pixels)
        return as_clip(resized) if self.config.clip_mean_std else resized

    def masked_rows(self, batch: MaskedBatch, draws: ShowoDraws, codes: Tensor) -> tuple[Chosen, Tensor]:
        """The rows that predict masked codes (and the image's frame where it counts), and their labels."""
        special = self.config.special
        rows = batch.image_rows[draws.masked].split(batch.num_masked)
        labels = (codes.flatten() + special.codes)[draws.masked].split(batch.num_masked)
        if not batch.frame_rows.shape[0]:
            return Chosen(torch.cat(rows), batch.plan), torch.cat(labels)
        frames = batch.frame_rows.split(2)
        ends = batch.layout.token_ids[batch.frame_rows].split(2)
        return (
            Chosen(torch.cat([part for pair in zip(rows, frames, strict=True) for part in pair]), batch.plan),
            torch.cat([part for pair in zip(labels, ends, strict=True) for part in pair]),
        )

    def transform(self, hidden: Tensor, layout: Layout, chosen: Chosen | None = None) -> Tensor:
        """All layers: [rows, dim] -> [rows, dim], or [chosen rows, dim]; before the last norm."""
        phi = self.config.phi
        rotation = rotary_table(layout.positions, phi.rotary_dim, phi.rope_theta)
        stream = Stream(hidden)
        for index, layer in enumerate(self.layers):
            is_last = index == len(self.layers) - 1
            stream = layer(stream, layout, rotation, chosen if is_last else None)
        return stream.rows
