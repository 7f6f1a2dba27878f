"""Moments in 8 bits: blocks of small floats that share a power of two, rounded up or down at random.

A block is 256 elements. Its scale s is the least power of two with |x| <= 1.875 s for all of them (at least
2^-126; NaN if one is not finite or needs more than 2^125). A code holds |x| / s as a float with 3 bits of
mantissa:

    code = 8 e + f,   |x| / s = (8 + f) 2^(e - 1 - r)  for e > 0,   f 2^-r  for e = 0

    first moment     sign, 4 bits of exponent, r = 17       normal down to 2^-14 s, steps of 2^-17 s below
    second moment    no sign, 5 bits of exponent, r = 33    normal down to 2^-30 s, steps of 2^-33 s below

x becomes one of its two neighbours, each with the probability that makes x the mean (in steps of 2^-16). So
|x' - x| < max(|x| / 8, 2^-r s), E x' = x, and what is representable never moves. Rounding to the nearest
instead would freeze a running average whose changes, (1 - beta) of its distance to the new value, stay below
half a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 256


@dataclass(frozen=True, slots=True)
class MomentFormat:
    """How one of the two moments is coded.

    Attributes:
        shrink: power of two that takes the top of a block to where fp32, cut after 3 bits of mantissa, is its
            code: then the smallest codes are fp32's own denormals.
        sign: bit of the sign, 0 if there is none.
    """

    shrink: float
    sign: int


FIRST = MomentFormat(2.0**-112, 0x80)
SECOND = MomentFormat(2.0**-96, 0)


def decode_moment(codes: Tensor, scales: Tensor, form: MomentFormat) -> Tensor:
    """[count] uint8 and [ceil(count / 256)] fp32 -> [count] fp32, exact."""
    wide = codes.to(torch.int32)
    magnitude = ((wide & (0xFF - form.sign)) << 20).view(torch.float32) / form.shrink
    magnitude = magnitude * scales.repeat_interleave(BLOCK)[: len(codes)]
    return torch.where((wide & form.sign) != 0, -magnitude, magnitude)


def encode_moment(values: Tensor, halves: Tensor, form: MomentFormat) -> tuple[Tensor, Tensor]:
    """[count] fp32 and 16 random bits each -> ([count] uint8, [ceil(count / 256)] fp32)."""
    count = values.shape[0]
    padding = -count % BLOCK
    bits = torch.nn.functional.pad(values.view(torch.int32), (0, padding)).view(-1, BLOCK)
    noise = torch.nn.functional.pad(halves.to(torch.int32), (0, padding)).view(-1, BLOCK)
    magnitude = bits & 0x7FFFFFFF
    largest = magnitude.amax(dim=1).clamp(max=0x7F000000)
    # Above 1.875 a mantissa could round up to 2, which is the next power of two.
    exponent = ((largest + 0xFFFFF) >> 23).clamp(min=1)
    scales = torch.where(exponent <= 252, exponent << 23, 0x7FC00000).to(torch.int32).view(torch.float32)
    inverse = ((254 - exponent.clamp(max=252)) << 23).view(torch.float32)
    shrunk = magnitude.view(torch.float32) * inverse[:, None] * form.shrink
    # Half of the last of the 20 bits that are cut off: the mean is exact, and zero bits never carry.
    codes = ((shrunk.view(torch.int32) + ((noise << 4) | 8)) >> 20) & (0xFF - form.sign)
    codes = codes | ((bits >> 24) & form.sign)
    return codes.flatten()[:count].to(torch.uint8), scales


def moment_bound(beta1: float, beta2: float) -> float:
    """The largest |m| / sqrt(v) that exact moments can have (Cauchy-Schwarz), huge where there is none.

        |m| <= (1 - beta1) / sqrt((1 - beta2) (1 - beta1^2 / beta2)) sqrt(v)

    Rounded moments can pass it, most of all where v has become zero; they are held to it.
    """
    if beta1 * beta1 >= beta2 or beta2 >= 1:
        return 1e30
    return float((1 - beta1) / ((1 - beta2) * (1 - beta1 * beta1 / beta2)) ** 0.5)
