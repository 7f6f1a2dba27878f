"""The order of samples: an endless stream in which every pass over the data is a new permutation."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from reca.randomness import RandomSource


@dataclass(slots=True)
class SampleOrder:
    """Global sample index -> item of the source: a pure function of (seed, length, purpose, index).

    Attributes:
        seed: seed of the run.
        length: number of items of the source.
        purpose: names the permutations; streams with different purposes are shuffled independently.
    """

    seed: int
    length: int
    purpose: str = "order"
    _epoch: int = field(default=-1, repr=False)
    _permutation: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.length <= 0:
            raise ValueError(f"SampleOrder: length must be positive, got {self.length}")

    def place(self, index: int) -> tuple[int, int]:
        """(epoch, item) of a global sample index."""
        if index < 0:
            raise ValueError(f"SampleOrder: index must not be negative, got {index}")
        epoch, offset = divmod(index, self.length)
        if self._permutation is None or epoch != self._epoch:
            self._permutation = RandomSource(self.seed).permutation(self.purpose, epoch, self.length)
            self._epoch = epoch
        return epoch, int(self._permutation[offset])
