"""Dropout whose masks are functions of (seed, step, sample, place): recomputing repeats them bit for bit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from reca.layers.attention import Segments
from reca.randomness import RandomSource
from reca.types import TensorStruct


class Dropout(Protocol):
    """Where keep masks come from."""

    def keep(self, place: str, sample: int, shape: tuple[int, ...], rate: float) -> Tensor:
        """Bool of `shape`: what sample number `sample` of the batch keeps at `place`; `rate` is dropped."""
        ...


@dataclass(frozen=True, slots=True)
class DrawnDropout(TensorStruct):
    """Masks drawn as they are needed, keyed by sample.

    Attributes:
        random: of the step.
        sample_ids: [samples] int64.
    """

    random: RandomSource
    sample_ids: Tensor

    def keep(self, place: str, sample: int, shape: tuple[int, ...], rate: float) -> Tensor:
        """Bool of `shape`: what sample number `sample` of the batch keeps at `place`; `rate` is dropped."""
        sample_id = self.sample_ids[sample : sample + 1]
        return self.random.uniform(f"dropout/{place}", sample_id, math.prod(shape)).view(shape) >= rate


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

    def rows(self, values: Tensor, place: str, lengths: tuple[int, ...]) -> Tensor:
        """Packed rows [sum(lengths), width] after dropout."""
        if not self.projection:
            return values
        name, width = f"{self.block}.{place}.{self.number}", values.shape[1]
        keep = [
            self.masks.keep(name, sample, (rows, width), self.projection)
            for sample, rows in enumerate(lengths)
        ]
        return values * torch.cat(keep) / (1 - self.projection)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
        """Attention of [rows, heads, dim] with dropout of its probabilities, sample by sample."""
        name, parts = f"{self.block}.attn.attn_drop.{self.number}", []
        lengths = segments.query_lengths
        samples = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
        for sample, (q, k, v) in enumerate(samples):
            scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
            weights = scores.softmax(dim=-1)
            keep = self.masks.keep(name, sample, tuple(weights.shape), self.attention)
            weights = (weights * keep / (1 - self.attention)).to(v.dtype)
            parts.append(torch.einsum("hqk,khd->qhd", weights, v))
        return torch.cat(parts)
