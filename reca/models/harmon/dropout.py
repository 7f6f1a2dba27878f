"""Dropout whose masks are functions of (seed, step, sample, place): recomputing repeats them bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from reca.kernels import Impl, PhiloxDropout, dropout, dropout_attention
from reca.layers.attention import Segments
from reca.randomness import RandomSource, key_of
from reca.types import TensorStruct


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

    def at(self, place: str) -> PhiloxDropout:
        """The masks of one place in the network."""
        return PhiloxDropout(key_of(self.seed, f"dropout/{place}"), self.step, self.sample_ids)


Dropout = DrawnDropout | GivenMasks


@dataclass(frozen=True, slots=True)
class BlockDropout:
    """The four dropouts of one transformer block in one pass.

    Attributes:
        masks: where they come from.
        attention, projection: rates of attention probabilities, and of the three other places.
        block, number: name of the block, and which of its passes this is.
    """

    masks: Dropout
    attention: float
    projection: float
    block: str
    number: int

    def _place(self, name: str) -> str:
        return f"{self.block}.{name}.{self.number}"

    def rows(self, values: Tensor, place: str, segments: Segments, impl: Impl = "auto") -> Tensor:
        """Packed rows [sum(lengths), width] after dropout."""
        if isinstance(self.masks, DrawnDropout):
            random = self.masks.at(self._place(place))
            return dropout(values, random, segments.cu_query, self.projection, impl=impl)
        keep = [
            self.masks.keep(self._place(place), sample, (rows, values.shape[1]))
            for sample, rows in enumerate(segments.query_lengths)
        ]
        return values * torch.cat(keep) / (1 - self.projection)

    def add(
        self, residual: Tensor, values: Tensor, place: str, segments: Segments, impl: Impl = "auto"
    ) -> Tensor:
        """residual + `rows`, in one pass where both have one dtype."""
        if not isinstance(self.masks, DrawnDropout) or residual.dtype != values.dtype:
            return residual + self.rows(values, place, segments, impl)
        random = self.masks.at(self._place(place))
        return dropout(values, random, segments.cu_query, self.projection, residual=residual, impl=impl)

    def attend(self, qkv: Tensor, segments: Segments, impl: Impl = "auto") -> Tensor:
        """Attention within samples of [rows, 3, heads, dim], with dropout of its probabilities."""
        name, lengths = self._place("attn.attn_drop"), segments.query_lengths
        if isinstance(self.masks, DrawnDropout):
            random = self.masks.at(name)
            return dropout_attention(qkv, random, segments.cu_query, lengths, self.attention, impl=impl)
        parts = []
        for sample, part in enumerate(qkv.split(lengths)):
            q, k, v = part.unbind(1)
            weights = (torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5).softmax(dim=-1)
            keep = self.masks.keep(name, sample, tuple(weights.shape))
            weights = (weights * keep / (1 - self.attention)).to(v.dtype)
            parts.append(torch.einsum("hqk,khd->qhd", weights, v))
        return torch.cat(parts)
