# mypy: disable-error-code="import-untyped, no-untyped-def, no-untyped-call, untyped-decorator"
"""Pieces of Triton code that kernels share: one attention head per row, in fp32 registers.

A head is held as three parts: the first and the second half of its rotated pairs, and the rest that does not
turn.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_head(
    line_ptr, inside, PAIRS: tl.constexpr, REST: tl.constexpr, HALF: tl.constexpr, TAIL: tl.constexpr
):
    """The three parts in fp32 of one head per row; `rest` is a stand-in where REST is 0."""
    pairs = tl.arange(0, HALF)
    in_pairs = inside[:, None] & (pairs < PAIRS)[None, :]
    first = tl.load(line_ptr[:, None] + pairs, mask=in_pairs, other=0.0).to(tl.float32)
    second = tl.load(line_ptr[:, None] + PAIRS + pairs, mask=in_pairs, other=0.0).to(tl.float32)
    rest = first
    if REST > 0:
        tail = tl.arange(0, TAIL)
        in_rest = inside[:, None] & (tail < REST)[None, :]
        rest = tl.load(line_ptr[:, None] + 2 * PAIRS + tail, mask=in_rest, other=0.0).to(tl.float32)
    return first, second, rest


@triton.jit
def store_head(
    line_ptr,
    first,
    second,
    rest,
    inside,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    HALF: tl.constexpr,
    TAIL: tl.constexpr,
):
    pairs = tl.arange(0, HALF)
    in_pairs = inside[:, None] & (pairs < PAIRS)[None, :]
    tl.store(line_ptr[:, None] + pairs, first.to(line_ptr.dtype.element_ty), mask=in_pairs)
    tl.store(line_ptr[:, None] + PAIRS + pairs, second.to(line_ptr.dtype.element_ty), mask=in_pairs)
    if REST > 0:
        tail = tl.arange(0, TAIL)
        in_rest = inside[:, None] & (tail < REST)[None, :]
        tl.store(line_ptr[:, None] + 2 * PAIRS + tail, rest.to(line_ptr.dtype.element_ty), mask=in_rest)


@triton.jit
def load_head_weight(
    weight_ptr, PAIRS: tl.constexpr, REST: tl.constexpr, HALF: tl.constexpr, TAIL: tl.constexpr
):
    pairs = tl.arange(0, HALF)
    first = tl.load(weight_ptr + pairs, mask=pairs < PAIRS, other=0.0).to(tl.float32)
    second = tl.load(weight_ptr + PAIRS + pairs, mask=pairs < PAIRS, other=0.0).to(tl.float32)
    rest = first
    if REST > 0:
        tail = tl.arange(0, TAIL)
        rest = tl.load(weight_ptr + 2 * PAIRS + tail, mask=tail < REST, other=0.0).to(tl.float32)
    return first, second, rest


@triton.jit
def head_dot(a_first, a_second, a_rest, b_first, b_second, b_rest, REST: tl.constexpr):
    """Sum over the head of a * b, [rows]."""
    total = tl.sum(a_first * b_first, axis=1) + tl.sum(a_second * b_second, axis=1)
    if REST > 0:
        total += tl.sum(a_rest * b_rest, axis=1)
    return total
