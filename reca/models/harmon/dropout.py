"""Dropout whose masks are functions of (seed, step, sample, place): recomputing repeats them bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from reca.kernels import Impl, PhiloxDropout, dropout, dropout_attention
from reca.layers.segments import Segments
from reca.randomness import RandomSource, key_of
from reca.types import TensorStruct

UNDERSTANDING, VISIBLE = 0, 1
"""Passes of a stack of blocks over the same samples: masks of the one say nothing of the other's."""


class GivenMasks(Protocol):
    """Keep masks that were drawn elsewhere."""

    def keep(self, place: str, sample: int, shape: tuple[int, ...]) -> Tensor:
        """Bool of `shape`: what sample number `sample` of the batch keeps at `place`."""
        ...


@dataclass(frozen=True, slots=True)
class DrawnDropout(TensorStruct):
    """The coordinates of masks, which operators draw where they need them, keyed by sample.

    Attributes:
        seed: of the run.
        step: scalar int64, the step.
        sample_ids: [samples] int64.
    """

    seed: int
    step: Tensor
    sample_ids: Tensor

    @classmethod
    def of(cls, random: RandomSource, sample_ids: Tensor) -> Self:
        """The masks of these samples in the step of `random`."""
        step = torch.full((), random.step, dtype=torch.int64, device=sample_ids.device)
        return cls(random.seed, step, sample_ids)

    def over(self, passes: tuple[int, ...]) -> Self:
        """Of segments that are all samples, once for each pass: ids count from 0, so the others are free."""
        if passes == (UNDERSTANDING,):
            return self
        parts = [self.sample_ids if number == UNDERSTANDING else ~self.sample_ids for number in passes]
        return replace(self, sample_ids=torch.cat(parts))

    def at(self, place: str) -> PhiloxDropout:
        """The masks of one place in the network."""
        return PhiloxDropout(key_of(self.seed, f"dropout/{place}"), self.step, self.sample_ids)


Dropout = DrawnDropout | GivenMasks


@dataclass(frozen=True, slots=True)
class BlockDropout:
    """The four dropouts of one transformer block.

    Attributes:
        masks: where they come from; drawn ones have an id for every segment.
        attention, projection: rates of attention probabilities, and of the three other places.
        block: its name.
        passes: segments are all samples, once for each of these.
    """

    masks: Dropout
    attention: float
    projection: float
    block: str
    passes: tuple[int, ...] = (UNDERSTANDING,)

    def _given(self, name: str, segment: int, segments: Segments, shape: tuple[int, ...]) -> Tensor:
        assert not isinstance(self.masks, DrawnDropout)
        number, sample = divmod(segment, len(segments.query_lengths) // len(self.passes))
        return self.masks.keep(f"{self.block}.{name}.{self.passes[number]}", sample, shape)

    def rows(self, values: Tensor, place: str, segments: Segments, impl: Impl = "auto") -> Tensor:
        """Packed rows [sum(lengths), width] after dropout."""
        if isinstance(self.masks, DrawnDropout):
            random = self.masks.at(f"{self.block}.{place}")
            return dropout(values, random, segments.cu_query, self.projection, impl=impl)
        keep = [
            self._given(place, segment, segments, (rows, values.shape[1]))
            for segment, rows in enumerate(segments.query_lengths)
        ]
        return values * torch.cat(keep) / (1 - self.projection)

    def attend(self, qkv: Tensor, segments: Segments, impl: Impl = "auto") -> Tensor:
        """Attention within samples of [rows, 3, heads, dim], with dropout of its probabilities."""
        name, lengths = "attn.attn_drop", segments.query_lengths
        if isinstance(self.masks, DrawnDropout):
            random = self.masks.at(f"{self.block}.{name}")
            return dropout_attention(qkv, random, segments.cu_query, lengths, self.attention, impl=impl)
        parts = []
        for segment, part in enumerate(qkv.split(lengths)):
            q, k, v = part.unbind(1)
            weights = (torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5).softmax(dim=-1)
            keep = self._given(name, segment, segments, tuple(weights.shape))
            weights = (weights * keep / (1 - self.attention)).to(v.dtype)
            parts.append(torch.einsum("hqk,khd->qhd", weights, v))
        return torch.cat(parts)
