"""Counter-based random numbers: a pure function of (seed, step, sample, purpose, position).

Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in integer tensor
operations, so
that CPU, GPU, eager and captured code agree bit for bit on the integers, no stream can shift, and a Triton
kernel can regenerate any value from its coordinates (`tl.philox` is the same function, `tl.randn4x` the same
Box-Muller).

    key     = 64-bit hash of (seed, purpose)
    counter = (position // 4, step, sample low 32 bits, sample high 32 bits)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_TO_UNIT = 4.6566127342e-10  # 2^-31, the constant of Triton's uint_to_uniform_float
_SMALLEST = 1.0e-7  # Triton's guard before the logarithm


def key_of(seed: int, purpose: str) -> int:
    """The 64-bit Philox key of a purpose under a seed; distinct purposes give independent streams."""
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def philox(key: int, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10 over int64 tensors that hold uint32 values.

    Args:
        key: 64-bit key; low and high words are the two Philox keys.
        counter: four broadcastable int64 tensors with values below 2^32.

    Returns: four int64 tensors of uint32 values.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key & _MASK, key >> 32
    for _ in range(10):
        # int64 products wrap modulo 2^64, which keeps all 64 bits of an unsigned 32 x 32 product.
        a, b = c0 * _ROUND_A, c2 * _ROUND_B
        c0, c1, c2, c3 = ((b >> 32) & _MASK) ^ c1 ^ k0, b & _MASK, ((a >> 32) & _MASK) ^ c3 ^ k1, a & _MASK
        k0, k1 = (k0 + _KEY_A) & _MASK, (k1 + _KEY_B) & _MASK
    return c0, c1, c2, c3


def _unit(word: Tensor) -> Tensor:
    """uint32 -> fp32 in [0, 1): the sign bit folds, as in Triton."""
    signed = torch.where(word > 0x7FFFFFFF, _MASK - word, word)
    return signed.to(torch.float32) * _TO_UNIT


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

    def _words(self, purpose: str, samples: Tensor, num_blocks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        blocks = torch.arange(num_blocks, dtype=torch.int64, device=samples.device)
        low, high = (samples & _MASK)[:, None], ((samples >> 32) & _MASK)[:, None]
        return philox(
            key_of(self.seed, purpose), (blocks[None, :], torch.full_like(low, self.step), low, high)
        )

    def uniform(self, purpose: str, samples: Tensor, count: int) -> Tensor:
        """[num_samples, count] fp32 in [0, 1). `samples`: [num_samples] int64 sample ids."""
        words = self._words(purpose, samples, (count + 3) // 4)
        return torch.stack([_unit(word) for word in words], dim=-1).flatten(1)[:, :count]

    def normal(self, purpose: str, samples: Tensor, count: int) -> Tensor:
        """[num_samples, count] fp32 standard normal, on the device of `samples` ([num_samples] int64)."""
        u0, u1, u2, u3 = (_unit(word) for word in self._words(purpose, samples, (count + 3) // 4))
        normals: list[Tensor] = []
        for radius_draw, angle_draw in ((u0, u1), (u2, u3)):
            radius = torch.sqrt(-2.0 * torch.log(radius_draw.clamp_min(_SMALLEST)))
            angle = (2.0 * math.pi) * angle_draw
            normals += [radius * torch.cos(angle), radius * torch.sin(angle)]
        return torch.stack(normals, dim=-1).flatten(1)[:, :count]

    def normal_rows(self, purpose: str, samples: Tensor, rows: Sequence[int], dim: int) -> Tensor:
        """[sum(rows), dim] fp32 standard normal for ragged samples: sample i owns `rows[i]` rows."""
        if len(rows) != len(samples):
            raise ValueError(
                f"normal_rows: rows must have one entry per sample, got {len(rows)} for {len(samples)}"
            )
        parts = [self.normal(purpose, samples[i : i + 1], n * dim).view(n, dim) for i, n in enumerate(rows)]
        return torch.cat(parts) if parts else torch.empty(0, dim, device=samples.device)

    def scalar(self, purpose: str, sample: int) -> float:
        """One uniform number in [0, 1) on the host, for decisions of the data path."""
        return float(self.uniform(purpose, torch.tensor([sample]), 1))

    def integer(self, purpose: str, sample: int, bound: int) -> int:
        """One integer in [0, bound) on the host, exactly uniform up to 2^-32."""
        word = self._words(purpose, torch.tensor([sample]), 1)[0]
        return (int(word) * bound) >> 32

    def permutation(self, purpose: str, epoch: int, length: int) -> Tensor:
        """[length] int64: a permutation that is a pure function of (seed, purpose, epoch, length)."""
        words = self._words(purpose, torch.tensor([epoch]), (length + 1) // 2)
        keys = torch.stack([(words[0] << 31) | (words[1] >> 1), (words[2] << 31) | (words[3] >> 1)], dim=-1)
        return torch.argsort(keys.flatten()[:length], stable=True)
