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
def element_words(key, step, first_block, BLOCKS: tl.constexpr):
    """[4 * BLOCKS] int32: 32 random bits per element, from counter `first_block` (int64) on."""
    blocks = first_block + tl.arange(0, BLOCKS)
    low, high = (blocks & 0xFFFFFFFF).to(tl.uint32), (blocks >> 32).to(tl.uint32)
    words = tl.philox(key, low, step.to(tl.uint32) + low * 0, high, low * 0)
    return interleave_words(*words).to(tl.int32, bitcast=True)


@triton.jit
def _normal_pair(u1, u2):
    """Box-Muller as `tl.pair_uniform_to_normal`, whose sine and cosine spill for the sake of huge angles."""
    radius = tl.sqrt(-2.0 * tl.log(tl.maximum(1.0e-7, u1)))
    angle = 6.283185307179586 * u2
    quarter = tl.floor(angle * 0.6366197723675814 + 0.5)
    # pi / 2 in three parts, of which quarter (0 to 4) times the first two are exact.
    x = angle - quarter * 1.5703125 - quarter * 4.837512969970703e-4 - quarter * 7.549789948768648e-8
    z = x * x
    sine = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * x + x
    cosine = ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2) * z * z
    cosine += 1.0 - 0.5 * z
    turned = quarter.to(tl.int32) & 3
    odd = (turned & 1) != 0
    first, second = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    first = tl.where((turned == 1) | (turned == 2), -first, first)
    return radius * first, radius * tl.where(turned >= 2, -second, second)


@triton.jit
def counter_words(key, step, sample, first):
    """Four words of counters (first, step, sample): `first` is uint32 and broadcasts with `sample`, int64."""
    low, high = (sample & 0xFFFFFFFF).to(tl.uint32), ((sample >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = first * 0
    return tl.philox(key, first, step.to(tl.uint32) + zero, low + zero, high + zero)


@triton.jit
def normals_of(w0, w1, w2, w3):
    """Box-Muller: four words -> four standard normals."""
    u0, u1 = tl.uint_to_uniform_float(w0), tl.uint_to_uniform_float(w1)
    u2, u3 = tl.uint_to_uniform_float(w2), tl.uint_to_uniform_float(w3)
    n0, n1 = _normal_pair(u0, u1)
    n2, n3 = _normal_pair(u2, u3)
    return n0, n1, n2, n3


@triton.jit
def normal_rows(key, step, sample, rows, dim, ROWS: tl.constexpr, COLS: tl.constexpr):
    """[ROWS, COLS] fp32 standard normal; `sample` and `rows` are [ROWS] int64, dim % 4 == 0."""
    # A row has dim / 4 counters; those of its padding belong to the next row and are not used.
    blocks = rows[:, None] * (dim // 4) + tl.arange(0, COLS // 4)[None, :]
    first = (blocks & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = counter_words(key, step, sample[:, None], first)
    n0, n1, n2, n3 = normals_of(w0, w1, w2, w3)
    return interleave_words(n0, n1, n2, n3)
