"""The mixture of transformers, without a mask and without a joint sequence.

Officially every sample is one sequence under a block mask. Here its rows are stored by kind, so that each
expert works on one contiguous tensor:

    understanding    [images of all samples | texts of all samples | markers of all samples]    frozen
    latents          [latents of all samples]                                                   trained

An image is `<start> patches <end>`, a text `<bos> ids <eos>`; the two markers are the tokens around a
sample's latents. What sees what is then plain attention: an image itself, a text its image and (causally)
itself, markers and latents everything of their sample. Nothing trained is ever seen by images and texts, so
they are constant. The markers are not, but no gradient passes through them.

All rows of an image block (latents and markers) share one rotary position p, and rotary attention depends
only on differences. Positions are therefore counted from the block: its rows are not rotated, those of image
and text turn by (j - p).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from reca.kernels import Impl, qk_norm_rope
from reca.layers.attention import Segments, attention
from reca.layers.mlp import SwiGLU
from reca.layers.norm import RMSNorm
from reca.models.bagel.config import LLMConfig
from reca.types import TensorStruct

Rotation = tuple[Tensor, Tensor] | tuple[None, None]
"""Cosines and sines of positions, [rows, head_dim / 2] fp32 each; or none."""
UNROTATED: Rotation = (None, None)
MARKERS = 2  # <start> and <end> around the latents of one image


@dataclass(frozen=True, slots=True)
class Layout(TensorStruct):
    """How many rows of each kind the samples of a microbatch have, and who sees whom.

    Attributes:
        image_lengths: rows of each sample's image, its two special tokens included.
        text_lengths: rows of each sample's text, its two special tokens included; 0 where the text is
            dropped.
        latent_lengths: latent tokens of each sample.
        images: segments of images seeing themselves.
        texts: causal segments of texts over their image and themselves; samples without text have none.
        markers, latents: segments of both over all rows of their sample.
        positions: [understanding rows] int64, rotary positions relative to the sample's image block.
        latent_images, latent_rows: [latent rows] int64, the sample of each latent token, and its row there.
    """

    image_lengths: tuple[int, ...]
    text_lengths: tuple[int, ...]
    latent_lengths: tuple[int, ...]
    images: Segments
    texts: Segments
    markers: Segments
    latents: Segments
    positions: Tensor
    latent_images: Tensor
    latent_rows: Tensor

    @classmethod
    def of(
        cls, image_lengths: Sequence[int], text_lengths: Sequence[int], latent_lengths: Sequence[int]
    ) -> Self:
        """The layout of samples with these lengths, on the CPU."""
        lengths = list(zip(image_lengths, text_lengths, latent_lengths, strict=True))
        visible = [image + text + MARKERS + latents for image, text, latents in lengths]
        with_text = [(text, image + text) for image, text, _ in lengths if text]
        # officially the image has position 0, a text 1, 2, ..., and the block the next one
        images = [torch.full((image,), -1 - text) for image, text, _ in lengths]
        texts = [torch.arange(-text, 0) for _, text, _ in lengths]
        markers = torch.zeros(MARKERS * len(lengths), dtype=torch.int64)
        return cls(
            tuple(image_lengths),
            tuple(text_lengths),
            tuple(latent_lengths),
            images=Segments.of(tuple(image_lengths)),
            texts=Segments.of([q for q, _ in with_text], [k for _, k in with_text], is_causal=True),
            markers=Segments.of([MARKERS] * len(lengths), visible),
            latents=Segments.of(tuple(latent_lengths), visible),
            positions=torch.cat([*images, *texts, markers]),
            latent_images=torch.arange(len(lengths)).repeat_interleave(torch.tensor(latent_lengths)),
            latent_rows=torch.cat([torch.arange(latents) for latents in latent_lengths]),
        )

    @property
    def kinds(self) -> tuple[int, int, int]:
        """Understanding rows of all images, of all texts, of all markers."""
        return sum(self.image_lengths), sum(self.text_lengths), MARKERS * len(self.image_lengths)

    def text_view(self, rows: Tensor) -> Tensor:
        """Rows that texts see, sample by sample: [image, text] for each sample that has a text."""
        pieces = []
        for image, text in zip(*self._split(rows)[:2], strict=True):
            pieces += [image, text] if text.shape[0] else []
        return torch.cat(pieces) if pieces else rows[:0]

    def block_view(self, rows: Tensor, latent_rows: Tensor) -> Tensor:
        """Rows that markers and latents see, sample by sample: [image, text, markers, latents]."""
        samples = zip(*self._split(rows), latent_rows.split(self.latent_lengths), strict=True)
        return torch.cat([piece for sample in samples for piece in sample])

    def _split(self, rows: Tensor) -> tuple[tuple[Tensor, ...], ...]:
        images, texts, markers = rows.split(self.kinds)
        return images.split(self.image_lengths), texts.split(self.text_lengths), markers.split(MARKERS)


class Expert(nn.Module):
    """One of the two parameter sets of a layer: everything except attention itself.

    Weights: qkv rows are [query; key; value] with biases; `o` and the MLP have none.
    """

    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        dim, eps = config.hidden_size, config.rms_norm_eps
        self.head_dim = config.head_dim
        self.heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        self.input_norm = RMSNorm(dim, eps)
        self.qkv = nn.Linear(dim, sum(self.heads) * self.head_dim)
        self.q_norm = RMSNorm(self.head_dim, eps)
        self.k_norm = RMSNorm(self.head_dim, eps)
        self.o = nn.Linear(config.num_attention_heads * self.head_dim, dim, bias=False)
        self.post_norm = RMSNorm(dim, eps)
        self.mlp = SwiGLU(dim, config.intermediate_size)
        self.kernels: Impl = "auto"

    def project(self, hidden: Tensor, rotation: Rotation = UNROTATED) -> tuple[Tensor, Tensor, Tensor]:
        """[rows, dim] -> query [rows, heads, head_dim], key, value [rows, kv_heads, head_dim].

        Query and key are turned by `rotation`, cosines and sines of the rows' positions, if it is given.
        """
        return self._split(self.qkv(self.input_norm(hidden)), rotation, self.heads[0])

    def project_keys(self, hidden: Tensor, rotation: Rotation = UNROTATED) -> tuple[Tensor, Tensor]:
        """Only key and value of `project`."""
        skipped = self.heads[0] * self.head_dim
        normed = self.input_norm(hidden)
        projected = nn.functional.linear(normed, self.qkv.weight[skipped:], self.qkv.bias[skipped:])
        return self._split(projected, rotation, 0)[1:]

    def _split(self, projected: Tensor, rotation: Rotation, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        return qk_norm_rope(
            projected,
            self.q_norm.weight,
            self.k_norm.weight,
            *rotation,
            heads=heads,
            kv_heads=self.heads[1],
            eps=self.q_norm.eps,
            rounds_quotient=True,
            impl=self.kernels,
        )

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Residual stream after attention output [rows, heads, head_dim] and MLP."""
        normed, hidden = self.post_norm.add(self.o(attended.flatten(1)), hidden)
        output: Tensor = hidden + self.mlp(normed)
        return output


class DecoderLayer(nn.Module):
    """One layer of both experts with joint attention.

    Args:
        config: the shape of both experts.
        is_last: of the understanding rows only keys and values are needed; they leave the layer as they came.
    """

    def __init__(self, config: LLMConfig, *, is_last: bool) -> None:
        super().__init__()
        self.is_last = is_last
        self.attention_backend = "auto"
        self.und = Expert(config)
        self.gen = Expert(config)

    def forward(
        self, understanding: Tensor, latents: Tensor, layout: Layout, rotation: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Advance both residual streams.

        Args:
            understanding: [understanding rows, dim]; no gradient passes through it.
            latents: [latent rows, dim].
            layout: rows of each sample.
            rotation: cosines and sines of `layout.positions`.

        Returns: both streams after the layer.
        """
        with torch.no_grad():
            und_query, und_key, und_value = self._project_understanding(understanding, rotation)
        query, key, value = self.gen.project(latents)
        keys, values = layout.block_view(und_key, key), layout.block_view(und_value, value)
        attended = attention(query, keys, values, layout.latents, backend=self.attention_backend)
        latents = self.gen.finish(latents, attended)
        # last, so that recomputing this layer stops before it: the backward pass needs nothing of it
        if und_query is not None:
            with torch.no_grad():
                attended = self._attend(und_query, und_key, und_value, keys, values, layout)
                understanding = self.und.finish(understanding, attended)
        return understanding, latents

    def _project_understanding(
        self, understanding: Tensor, rotation: tuple[Tensor, Tensor]
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        if self.is_last:
            return None, *self.und.project_keys(understanding, rotation)
        return self.und.project(understanding, rotation)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, layout: Layout
    ) -> Tensor:
        """Attention of the understanding rows; `keys`, `values` are what markers see."""
        images, texts, markers = query.split(layout.kinds)
        rows, backend = images.shape[0], self.attention_backend
        seen_by_text = layout.text_view(key), layout.text_view(value)
        return torch.cat(
            [
                attention(images, key[:rows], value[:rows], layout.images, backend=backend),
                attention(texts, *seen_by_text, layout.texts, backend=backend),
                attention(markers, keys, values, layout.markers, backend=backend),
            ]
        )
