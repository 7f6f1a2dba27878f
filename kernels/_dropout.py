"""What dropout keeps as a function of coordinates, in plain torch: what kernels regenerate bit for bit."""

from __future__ import annotations

import struct
from bisect import bisect_left
from dataclasses import dataclass

import torch
from torch import Tensor

from reca.kernels._checks import check_dtype, check_shape
from reca.kernels._philox import philox4x32

_WORD = 0xFFFFFFFF
_TO_UNIT = 4.6566127342e-10  # 2^-31, the constant of Triton's uint_to_uniform_float


@dataclass(frozen=True, slots=True)
class PhiloxDropout:
    """What packed samples keep, named by its coordinates instead of stored.

        element p of a sample, in row-major order, is kept if uniform_p >= rate
        uniform_p = word p % 4 of counter (p // 4, step, low and high word of the sample id), in [0, 1)

    Attributes:
        key: 64-bit Philox key, as an unsigned or a signed integer; one per place in a network.
        step: scalar int64 on the device of the rows, so that a captured graph can advance it.
        samples: [samples] int64, their ids.
    """

    key: int
    step: Tensor
    samples: Tensor


def check_dropout(
    operator: str, random: PhiloxDropout, cu_lengths: Tensor, rate: float, max_samples: int
) -> dict[str, Tensor]:
    """The tensors of packed dropout by name. Raises ValueError or TypeError unless they fit each other."""
    if not 0 <= rate < 1:
        raise ValueError(f"{operator}: rate must be in [0, 1), got {rate}; it is the share that is dropped")
    if cu_lengths.dim() != 1 or not 2 <= cu_lengths.shape[0] <= max_samples + 1:
        got = list(cu_lengths.shape)
        raise ValueError(
            f"{operator}: cu_lengths must be [samples + 1] for 1 to {max_samples} samples, got {got}; "
            "0, then the sums of the lengths"
        )
    check_shape(operator, "random.step", random.step, (), "a scalar on the device")
    check_shape(operator, "random.samples", random.samples, (cu_lengths.shape[0] - 1,), "one id per sample")
    check_dtype(operator, "cu_lengths", cu_lengths, (torch.int32, torch.int64))
    tensors = {"random.step": random.step, "random.samples": random.samples}
    for name, tensor in tensors.items():
        check_dtype(operator, name, tensor, (torch.int64,))
    return tensors | {"cu_lengths": cu_lengths}


@torch.compiler.assume_constant_result  # type: ignore[no-untyped-call, untyped-decorator, unused-ignore]
def keep_threshold(rate: float) -> int:
    """The least folded word whose uniform number is at least `rate`, both as fp32."""

    def rounded(value: float) -> float:
        return float(struct.unpack("f", struct.pack("f", value))[0])

    # The product of two fp32 values is exact in fp64, so it is rounded once, as on the device.
    scale = rounded(_TO_UNIT)
    return bisect_left(range(1 << 31), rounded(rate), key=lambda word: rounded(rounded(word) * scale))


def folded_words(key: int, step: Tensor, sample: Tensor, blocks: Tensor) -> Tensor:
    """[..., 4 n] int64 in [0, 2^31): the words of counters `blocks` [..., n], the sign bit folded."""
    low, high = sample & _WORD, (sample >> 32) & _WORD
    drawn = philox4x32(key, blocks, step.expand_as(blocks), low.expand_as(blocks), high.expand_as(blocks))
    words = torch.stack(drawn, dim=-1).flatten(-2)
    return torch.where(words > 0x7FFFFFFF, _WORD - words, words)
