"""Counter-based random numbers: a pure function of (seed, step, sample, purpose, position).

Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), so that CPU and GPU
agree bit for bit on the integers, no stream can shift, and a kernel can regenerate any value from its
coordinates. Every draw is one call of the operator `reca.kernels.philox`, and one launch on a GPU.

    key     = 64-bit hash of (seed, purpose)
    counter = (position // 4, step, sample low 32 bits, sample high 32 bits)
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reca.kernels import philox, philox4x32, uniform_of

_WORD = 0xFFFFFFFF


def key_of(seed: int, purpose: str) -> int:
    """The 64-bit Philox key of a purpose under a seed; distinct purposes give independent streams."""
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


@dataclass(frozen=True, slots=True)
class RandomSource:
    """Random numbers of one training step (or of data preparation, at step 0).

    Every method is pure: equal arguments give equal numbers on every call, process and world size.
    """

    seed: int
    step: int = 0

    def at(self, step: int) -> RandomSource:
        """The source of another step."""
        return RandomSource(self.seed, step)

    def uniform(self, purpose: str, samples: Tensor, count: int) -> Tensor:
        """[num_samples, count] fp32 in [0, 1). `samples`: [num_samples] int64 sample ids."""
        return philox(samples, count, key=key_of(self.seed, purpose), step=self.step)

    def normal(self, purpose: str, samples: Tensor, count: int) -> Tensor:
        """[num_samples, count] fp32 standard normal, on the device of `samples` ([num_samples] int64)."""
        key = key_of(self.seed, purpose)
        return philox(samples, count, key=key, step=self.step, distribution="normal")

    def normal_rows(self, purpose: str, samples: Tensor, rows: Sequence[int], dim: int) -> Tensor:
        """[sum(rows), dim] fp32 standard normal for ragged samples: sample i owns `rows[i]` rows."""
        if len(rows) != len(samples):
            raise ValueError(
                f"normal_rows: rows must have one entry per sample, got {len(rows)} for {len(samples)}"
            )
        if not rows:
            return torch.empty(0, dim, device=samples.device)
        # One draw of the longest: shorter samples take a prefix, which is what they would draw alone.
        drawn = self.normal(purpose, samples, max(rows) * dim)
        if len(set(rows)) == 1:
            return drawn.view(-1, dim)
        return torch.cat([values[: n * dim].view(n, dim) for values, n in zip(drawn, rows, strict=True)])

    def scalar(self, purpose: str, sample: int) -> float:
        """One uniform number in [0, 1) on the host, for decisions of the data path."""
        return float(uniform_of(torch.tensor(self._word(purpose, sample))))

    def integer(self, purpose: str, sample: int, bound: int) -> int:
        """One integer in [0, bound) on the host, exactly uniform up to 2^-32."""
        return (self._word(purpose, sample) * bound) >> 32

    def _word(self, purpose: str, sample: int) -> int:
        # In integers: a hundred tensor operations for one word took 0.3 ms.
        key = key_of(self.seed, purpose)
        return philox4x32(key, 0, self.step, sample & _WORD, (sample >> 32) & _WORD)[0]

    def permutation(self, purpose: str, epoch: int, length: int) -> Tensor:
        """[length] int64: a permutation that is a pure function of (seed, purpose, epoch, length)."""
        key = key_of(self.seed, purpose)
        words = philox(torch.tensor([epoch]), 2 * length, key=key, step=self.step, distribution="words")
        high, low = words.view(-1, 2).unbind(1)
        return torch.argsort((high << 31) | (low >> 1), stable=True)
