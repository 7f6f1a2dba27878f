# mypy: disable-error-code="import-untyped, no-untyped-def, no-untyped-call, untyped-decorator"
"""Pieces of Triton code that dropouts share: the decisions of `_dropout`, bit for bit."""

from __future__ import annotations

import triton
import triton.language as tl

from reca.kernels._triton_random import counter_words, interleave_words


@triton.jit
def _folded(words):
    signed = words.to(tl.int32, bitcast=True)
    return signed ^ (signed >> 31)


@triton.jit
def folded_words(key, step, sample, first):
    """[..., 4 n] int32 in [0, 2^31): folded words of counters `first` [..., n] uint32 of samples (int64)."""
    return _folded(interleave_words(*counter_words(key, step, sample, first)))


@triton.jit
def _folded_word(key, step, sample, positions):
    """The folded word of each position (int64) by itself: four times the work, for any alignment."""
    place = (positions & 3).to(tl.int32)
    a, b, c, d = counter_words(key, step, sample, (positions >> 2).to(tl.uint32))
    return _folded(tl.where(place < 2, tl.where(place == 0, a, b), tl.where(place == 2, c, d)))


@triton.jit
def keep_tile(
    key,
    step,
    sample_id,
    head,
    queries,
    first_key,
    length,
    threshold,
    KEYS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """[queries, KEYS] whether a probability is kept: the one of query i and key j is element i length + j."""
    lines = (head * length + queries) * length
    if ALIGNED:
        first = (lines >> 2)[:, None] + (first_key // 4 + tl.arange(0, KEYS // 4))[None, :]
        words = folded_words(key, step, sample_id, first.to(tl.uint32))
    else:
        words = _folded_word(key, step, sample_id, lines[:, None] + (first_key + tl.arange(0, KEYS))[None, :])
    return words >= threshold


@triton.jit
def sample_of(cu_lengths_ptr, rows, num_samples, SAMPLES: tl.constexpr):
    """[ROWS] sample of each packed row; num_samples for rows past the last one."""
    index = tl.arange(0, SAMPLES)
    ends = tl.load(cu_lengths_ptr + 1 + index, mask=index < num_samples, other=0).to(tl.int64)
    passed = (ends[None, :] <= rows[:, None]) & (index < num_samples)[None, :]
    return tl.sum(passed.to(tl.int32), axis=1)
