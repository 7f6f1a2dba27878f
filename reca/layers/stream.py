"""A residual stream between two layers, its last sum not yet formed."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from reca.layers.norm import LayerNorm, RMSNorm


class Stream(NamedTuple):
    """What a pre-norm layer takes and leaves: the sum is left to the norm that reads it, in the same pass.

    Attributes:
        residual: [rows, dim].
        delta: [rows, dim], what the last block adds; None before the first layer.
    """

    residual: Tensor
    delta: Tensor | None = None

    @property
    def rows(self) -> Tensor:
        """[rows, dim]: the sum."""
        return self.residual if self.delta is None else self.residual + self.delta

    def read(self, norm: RMSNorm | LayerNorm) -> tuple[Tensor, Tensor]:
        """(norm of the sum, the sum), both [rows, dim]."""
        if self.delta is None:
            return norm(self.residual), self.residual
        if isinstance(norm, RMSNorm):
            return norm.add(self.delta, self.residual)
        summed, normed = norm.add(self.residual, [self.delta])
        return normed, summed
