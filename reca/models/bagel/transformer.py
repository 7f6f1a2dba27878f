"""The mixture of transformers, without a mask and without a joint sequence.

Officially every sample is one sequence under a block mask. Here its rows are stored by kind, so that each
expert works on one contiguous tensor:

    understanding    [images of all samples | texts of all samples | markers of all samples]    frozen
    latents          [latents of all samples]                                                   trained

An image is `<start> patches <end>`, a text `<bos> ids <eos>`; the two markers are the tokens around a
sample's latents. What sees what is then plain attention: an image itself, a text its image and (causally)
itself, markers and latents everything of their sample. Nothing trained is ever seen by images and texts, so
they are constant. The markers are not, but no gradient passes through them.

Keys and values of both experts are written where attention reads them, sample by sample:

    places           [image, text, markers, latents] of the first sample, of the second, ...

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
from reca.layers.attention import attention
from reca.layers.mlp import SwiGLU
from reca.layers.norm import RMSNorm
from reca.layers.segments import Segments
from reca.layers.stream import Stream
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
        images: segments of images seeing themselves. All segments count keys in the order of places, where
            an empty segment of queries skips what its predecessor does not see.
        texts: causal segments of texts over their image and themselves.
        markers, latents: segments of both over all rows of their sample.
        positions: [understanding rows] int64, rotary positions relative to the sample's image block.
        places, latent_places: [understanding rows] and [latent rows] int64, where their keys and values lie.
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
    places: Tensor
    latent_places: Tensor
    latent_images: Tensor
    latent_rows: Tensor

    @classmethod
    def of(
        cls, image_lengths: Sequence[int], text_lengths: Sequence[int], latent_lengths: Sequence[int]
    ) -> Self:
        """The layout of samples with these lengths, on the CPU."""
        lengths = list(zip(image_lengths, text_lengths, latent_lengths, strict=True))
        visible = [image + text + MARKERS + latents for image, text, latents in lengths]
        parts = [part for image, text, latents in lengths for part in (image, text, MARKERS, latents)]
        blocks = torch.arange(sum(visible)).split(parts)
        # officially the image has position 0, a text 1, 2, ..., and the block the next one
        images = [torch.full((image,), -1 - text) for image, text, _ in lengths]
        texts = [torch.arange(-text, 0) for _, text, _ in lengths]
        markers = torch.zeros(MARKERS * len(lengths), dtype=torch.int64)
        return cls(
            tuple(image_lengths),
            tuple(text_lengths),
            tuple(latent_lengths),
            images=_first_keys(image_lengths, image_lengths, visible),
            texts=_first_keys(text_lengths, [i + t for i, t, _ in lengths], visible, is_causal=True),
            markers=Segments.of([MARKERS] * len(lengths), visible),
            latents=Segments.of(tuple(latent_lengths), visible),
            positions=torch.cat([*images, *texts, markers]),
            places=torch.cat([*blocks[0::4], *blocks[1::4], *blocks[2::4]]),
            latent_places=torch.cat(blocks[3::4]),
            latent_images=torch.arange(len(lengths)).repeat_interleave(torch.tensor(latent_lengths)),
            latent_rows=torch.cat([torch.arange(latents) for latents in latent_lengths]),
        )

    @property
    def kinds(self) -> tuple[int, int, int]:
        """Understanding rows of all images, of all texts, of all markers."""
        return sum(self.image_lengths), sum(self.text_lengths), MARKERS * len(self.image_lengths)


def _first_keys(
    queries: Sequence[int], keys: Sequence[int], visible: Sequence[int], *, is_causal: bool = False
) -> Segments:
    """Segments over the first keys of each sample; nobody sees the rest of its places."""
    rows = zip(queries, keys, visible, strict=True)
    pairs = [pair for query, key, total in rows for pair in ((query, key), (0, total - key))]
    return Segments.of([query for query, _ in pairs], [key for _, key in pairs], is_causal=is_causal)


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
        return self.split(self.qkv(self.input_norm(hidden)), rotation)

    def project_keys(self, normed: Tensor) -> Tensor:
        """[rows, 2 * kv_heads * head_dim]: the part of `qkv` that makes keys and values."""
        skipped = self.heads[0] * self.head_dim
        return nn.functional.linear(normed, self.qkv.weight[skipped:], self.qkv.bias[skipped:])

    def split(
        self,
        projected: Tensor,
        rotation: Rotation = UNROTATED,
        *,
        into: tuple[Tensor, Tensor, Tensor] | None = None,
        has_query: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of projected rows, normalised and turned; see `qk_norm_rope`."""
        return qk_norm_rope(
            projected,
            self.q_norm.weight,
            self.k_norm.weight,
            *rotation,
            heads=self.heads[0] if has_query else 0,
            kv_heads=self.heads[1],
            eps=self.q_norm.eps,
            rounds_quotient=True,
            into=into,
            impl=self.kernels,
        )

    def leave(self, hidden: Tensor, attended: Tensor) -> Stream:
        """The stream after attention output [rows, heads, head_dim] and MLP."""
        normed, hidden = self.post_norm.add(self.o(attended.flatten(1)), hidden)
        return Stream(hidden, self.mlp(normed))

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """[rows, dim]: `leave`, summed."""
        return self.leave(hidden, attended).rows


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
        self, understanding: Stream, latents: Stream, layout: Layout, rotation: tuple[Tensor, Tensor]
    ) -> tuple[Stream, Stream]:
        """Advance both residual streams.

        Args:
            understanding: of [understanding rows, dim]; no gradient passes through it.
            latents: of [latent rows, dim].
            layout: rows of each sample.
            rotation: cosines and sines of `layout.positions`.

        Returns: both streams after the layer.
        """
        with torch.no_grad():
            und_normed, und_hidden = understanding.read(self.und.input_norm)
            und_query, keys, values = self._place_understanding(und_normed, layout, rotation)
        # Not one norm and one rotation for both experts: rows of one tensor would cost the gradients of the
        # latents a zero fill and a copy in every layer, 90 MB at 4,096 rows, and save two launches.
        normed, hidden = latents.read(self.gen.input_norm)
        query, keys, values = self.gen.split(self.gen.qkv(normed), into=(keys, values, layout.latent_places))
        attended = attention(query, keys, values, layout.latents, backend=self.attention_backend)
        latents = self.gen.leave(hidden, attended)
        # last, so that recomputing this layer stops before it: the backward pass needs nothing of it
        if not self.is_last:
            with torch.no_grad():
                attended = self._attend(und_query, keys, values, layout)
                understanding = self.und.leave(und_hidden, attended)
        return understanding, latents

    def _place_understanding(
        self, normed: Tensor, layout: Layout, rotation: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query, and keys and values of all places, of which the latents' are still empty."""
        # The markers are the only rows that trained weights change, two per image. They share their products
        # with image and text: alone (`skinny_linear`) they would read every frozen matrix once more.
        expert = self.und
        projected = expert.project_keys(normed) if self.is_last else expert.qkv(normed)
        shape = (layout.latents.key_rows, expert.heads[1], expert.head_dim)
        keys, values = projected.new_empty(shape), projected.new_empty(shape)
        return expert.split(
            projected, rotation, into=(keys, values, layout.places), has_query=not self.is_last
        )

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, layout: Layout) -> Tensor:
        """Attention of the understanding rows over keys and values of all places."""
        kinds = zip(query.split(layout.kinds), (layout.images, layout.texts, layout.markers), strict=True)
        backend = self.attention_backend
        return torch.cat([attention(rows, keys, values, seen, backend=backend) for rows, seen in kinds])
