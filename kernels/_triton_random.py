# mypy: disable-error-code="import-untyped, no-untyped-def, no-untyped-call, untyped-decorator"
"""Pieces of Triton code that kernels share: the random numbers of `_philox`, word for word."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def interleave_words(a, b, c, d):
    """[..., n] four times -> [..., 4 n] in the order a0 b0 c0 d0 a1 ...; registers of one thread."""
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def rounding_words(key, step, first_block, BLOCKS: tl.constexpr):
    """[4 * BLOCKS] int32: 16 random bits per element, from counter `first_block` (int64) on."""
    blocks = first_block + tl.arange(0, BLOCKS)
    low, high = (blocks & 0xFFFFFFFF).to(tl.uint32), (blocks >> 32).to(tl.uint32)
    words = tl.philox(key, low, step.to(tl.uint32) + low * 0, high, low * 0)
    return (interleave_words(*words) & 0xFFFF).to(tl.int32)


@triton.jit
def normal_rows(key, step, sample, rows, dim, ROWS: tl.constexpr, COLS: tl.constexpr):
    """[ROWS, COLS] fp32 standard normal; `sample` and `rows` are [ROWS] int64, dim % 4 == 0."""
    # A row has dim / 4 counters; those of its padding belong to the next row and are not used.
    blocks = rows[:, None] * (dim // 4) + tl.arange(0, COLS // 4)[None, :]
    first = (blocks & 0xFFFFFFFF).to(tl.uint32)
    low, high = (
        (sample & 0xFFFFFFFF).to(tl.uint32)[:, None],
        ((sample >> 32) & 0xFFFFFFFF).to(tl.uint32)[:, None],
    )
    zero = first * 0
    w0, w1, w2, w3 = tl.philox(key, first, step.to(tl.uint32) + zero, low + zero, high + zero)
    u0, u1 = tl.uint_to_uniform_float(w0), tl.uint_to_uniform_float(w1)
    u2, u3 = tl.uint_to_uniform_float(w2), tl.uint_to_uniform_float(w3)
    n0, n1 = tl.pair_uniform_to_normal(u0, u1)
    n2, n3 = tl.pair_uniform_to_normal(u2, u3)
    return interleave_words(n0, n1, n2, n3)
