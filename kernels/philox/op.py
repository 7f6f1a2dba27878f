"""Checks, schema, fake and the public function; nothing here has a gradient."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from reca.kernels._checks import check_dtype, check_impl
from reca.kernels._library import Impl, define_op
from reca.kernels._philox import signed_key
from reca.kernels.philox import reference

Distribution = Literal["words", "uniform", "normal"]

_NAME = "philox"
_KINDS = {"words": reference.WORDS, "uniform": reference.UNIFORM, "normal": reference.NORMAL}
_MAX_COUNT, _MAX_STEP, _KEY_BITS = 1 << 34, (1 << 32) - 1, 64


def _cuda(*arguments: Any) -> Tensor:
    from reca.kernels.philox import kernel

    return kernel.forward(*arguments)


def _fake(samples: Tensor, count: int, key: int, step: int, kind: int) -> Tensor:
    dtype = torch.int64 if kind == reference.WORDS else torch.float32
    return samples.new_empty(samples.shape[0], count, dtype=dtype)


_forward = define_op(
    f"{_NAME}(Tensor samples, int count, int key, int step, int kind) -> Tensor out",
    cpu=reference.forward,
    cuda=_cuda,
    fake=_fake,
)


def philox(
    samples: Tensor,
    count: int,
    *,
    key: int,
    step: int = 0,
    distribution: Distribution = "uniform",
    impl: Impl = "auto",
) -> Tensor:
    """Random numbers that are a pure function of (key, step, sample, position), in one launch.

        word_sp    = word p % 4 of Philox 4x32-10 at counter (p // 4, step, low and high word of id s)
        uniform_sp = 2^-31 min(word_sp, 2^32 - 1 - word_sp), rounded to fp32 twice
        normal_sp  = Box-Muller of the uniforms of p and its neighbour

    A sample's numbers depend neither on its neighbours nor on `count`: a shorter draw is a prefix.

    Args:
        samples: [samples] int64, any ids; negative ones are their 64 bits.
        count: numbers per sample, 0 to 2^34.
        key: 64 bits, signed or not; one per purpose.
        step: 0 to 2^32 - 1.
        distribution: "words" are uint32 values in int64, "uniform" is in [0, 1), "normal" standard normal.
        impl: "auto" follows the device; "reference" is plain torch; "fused" is the Triton kernel.

    Returns: [samples, count], fp32, or int64 for words. Words and uniforms are equal on every device bit for
        bit; normals, of at most 5.7, differ by at most 4e-6, as logarithms and cosines do.
    Raises: ValueError for shapes, ranges, names and "fused" off CUDA; TypeError for dtypes.
    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    if samples.dim() != 1:
        got = list(samples.shape)
        raise ValueError(f"{_NAME}: samples must be [samples], got {got}; one id per row of the result")
    check_dtype(_NAME, "samples", samples, (torch.int64,))
    if not 0 <= count <= _MAX_COUNT:
        raise ValueError(f"{_NAME}: count must be 0 to 2^34, got {count}; draw under several purposes")
    if not 0 <= step <= _MAX_STEP:
        raise ValueError(f"{_NAME}: step must be 0 to 2^32 - 1, got {step}; take another key beyond that")
    if not -(1 << (_KEY_BITS - 1)) <= key < 1 << _KEY_BITS:
        raise ValueError(f"{_NAME}: key must have {_KEY_BITS} bits, got {key}; hash what it is made of")
    if distribution not in _KINDS:
        names = ", ".join(get_args(Distribution))
        raise ValueError(f"{_NAME}: distribution must be one of {names}, got {distribution!r}")
    check_impl(_NAME, impl, samples)
    arguments = (samples, count, signed_key(key), step, _KINDS[distribution])
    if impl == "reference":
        return reference.forward(*arguments)
    out: Tensor = _forward(*arguments)
    return out
