# mypy: disable-error-code="import-untyped, no-untyped-def, no-untyped-call, untyped-decorator"
"""Triton: the heads of query, key or value for one group of rows, forward and backward.

A head is held as three parts (`_triton.py`): the two halves of its rotated pairs, and the rest.
"""

from __future__ import annotations

import triton
import triton.language as tl

from reca.kernels._triton import head_dot, load_head, load_head_weight, store_head
from reca.kernels.qk_norm_rope.places import collected_head, store_copies


@triton.jit
def _parameter(
    pointer,
    expert,
    known,
    HAS_EXPERTS: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    HALF: tl.constexpr,
    TAIL: tl.constexpr,
):
    """The three parts of a weight or bias, [1, ...], or [ROWS, ...] where every row names its expert."""
    if HAS_EXPERTS:
        lines = pointer + expert * (2 * PAIRS + REST)
        first, second, rest = load_head(lines, known, PAIRS, REST, HALF, TAIL)
        first = tl.where(known[:, None], first, float("nan"))
        second = tl.where(known[:, None], second, float("nan"))
        rest = tl.where(known[:, None], rest, float("nan"))
    else:
        first, second, rest = load_head_weight(pointer, PAIRS, REST, HALF, TAIL)
        first = first[None, :]
        second = second[None, :]
        rest = rest[None, :]
    return first, second, rest


@triton.jit
def _mean(first, second, rest, DIM: tl.constexpr, REST: tl.constexpr):
    """[ROWS, 1] mean over the head."""
    total = tl.sum(first, axis=1) + tl.sum(second, axis=1)
    if REST > 0:
        total += tl.sum(rest, axis=1)
    return total[:, None] / DIM


@triton.jit
def _standardise(
    first,
    second,
    rest,
    eps,
    CENTERED: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    HALF: tl.constexpr,
    TAIL: tl.constexpr,
):
    """A head over its root mean square, or its deviation over the standard deviation; and that scale."""
    DIM: tl.constexpr = 2 * PAIRS + REST
    if CENTERED:
        mean = _mean(first, second, rest, DIM, REST)
        # Padding must stay zero, or it would count in the variance.
        in_pairs = (tl.arange(0, HALF) < PAIRS)[None, :]
        first = tl.where(in_pairs, first - mean, 0.0)
        second = tl.where(in_pairs, second - mean, 0.0)
        if REST > 0:
            rest = tl.where((tl.arange(0, TAIL) < REST)[None, :], rest - mean, 0.0)
    square = head_dot(first, second, rest, first, second, rest, REST)
    rstd = tl.rsqrt(square / DIM + eps)[:, None]
    first = first * rstd
    second = second * rstd
    if REST > 0:
        rest = rest * rstd
    return first, second, rest, rstd


@triton.jit
def forward_heads(
    source_ptr,
    out_ptr,
    weight_ptr,
    bias_ptr,
    cos,
    sin,
    expert,
    known,
    destinations_ptr,
    rows,
    inside,
    places,
    writable,
    total,
    eps,
    HEADS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    CENTERED: tl.constexpr,
    ROUNDS_QUOTIENT: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    HAS_EXPERTS: tl.constexpr,
    COPIES: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    HALF: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Norm and rotation of all heads of query or of key."""
    DIM: tl.constexpr = 2 * PAIRS + REST
    if HAS_NORM:
        w_first, w_second, w_rest = _parameter(
            weight_ptr, expert, known, HAS_EXPERTS, PAIRS, REST, HALF, TAIL
        )
    if CENTERED:
        b_first, b_second, b_rest = _parameter(bias_ptr, expert, known, HAS_EXPERTS, PAIRS, REST, HALF, TAIL)
    for head in range(HEADS):
        first, second, rest = load_head(source_ptr + head * DIM, inside, PAIRS, REST, HALF, TAIL)
        if HAS_NORM:
            first, second, rest, _ = _standardise(first, second, rest, eps, CENTERED, PAIRS, REST, HALF, TAIL)
            if ROUNDS_QUOTIENT:
                first = first.to(out_ptr.dtype.element_ty).to(tl.float32)
                second = second.to(out_ptr.dtype.element_ty).to(tl.float32)
                rest = rest.to(out_ptr.dtype.element_ty).to(tl.float32)
            first = first * w_first
            second = second * w_second
            if REST > 0:
                rest = rest * w_rest
        if CENTERED:
            first += b_first
            second += b_second
            if REST > 0:
                rest += b_rest
        if HAS_ROPE:
            turned = first * cos - second * sin
            second = second * cos + first * sin
            first = turned
        store_copies(
            out_ptr, destinations_ptr, first, second, rest, rows, inside, places, writable, total,
            head * DIM, HEADS * DIM, COPIES, PAIRS, REST, HALF, TAIL,
        )  # fmt: skip


@triton.jit
def _store_sums(
    pointer,
    first,
    second,
    rest,
    expert,
    EXPERTS: tl.constexpr,
    HAS_EXPERTS: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    HALF: tl.constexpr,
    TAIL: tl.constexpr,
):
    """[EXPERTS, DIM]: what the rows of each expert sum to."""
    pairs = tl.arange(0, HALF)
    tail = tl.arange(0, TAIL)
    for e in tl.static_range(EXPERTS):
        line = pointer + e * (2 * PAIRS + REST)
        own = expert[:, None] == e
        part = tl.where(own, first, 0.0) if HAS_EXPERTS else first
        tl.store(line + pairs, tl.sum(part, axis=0), mask=pairs < PAIRS)
        part = tl.where(own, second, 0.0) if HAS_EXPERTS else second
        tl.store(line + PAIRS + pairs, tl.sum(part, axis=0), mask=pairs < PAIRS)
        if REST > 0:
            part = tl.where(own, rest, 0.0) if HAS_EXPERTS else rest
            tl.store(line + 2 * PAIRS + tail, tl.sum(part, axis=0), mask=tail < REST)


@triton.jit
def backward_heads(
    d_out_ptr,
    d_other_ptr,
    source_ptr,
    d_source_ptr,
    weight_ptr,
    partial_ptr,
    cos,
    sin,
    expert,
    known,
    destinations_ptr,
    rows,
    inside,
    places,
    stored,
    total,
    bound,
    eps,
    HEADS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    CENTERED: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    EXPERTS: tl.constexpr,
    HAS_EXPERTS: tl.constexpr,
    WITH_DQKV: tl.constexpr,
    WITH_DWEIGHT: tl.constexpr,
    COPIES: tl.constexpr,
    PIECES: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    HALF: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Turn the gradient back, then through the norm; the statistics come again from the saved rows."""
    DIM: tl.constexpr = 2 * PAIRS + REST
    if HAS_NORM:
        w_first, w_second, w_rest = _parameter(
            weight_ptr, expert, known, HAS_EXPERTS, PAIRS, REST, HALF, TAIL
        )
    # Sums stay spread over rows until the last head: one reduction across threads instead of one per head.
    dw_first = tl.zeros([ROWS, HALF], tl.float32)
    dw_second = tl.zeros([ROWS, HALF], tl.float32)
    dw_rest = tl.zeros([ROWS, TAIL], tl.float32)
    db_first = tl.zeros([ROWS, HALF], tl.float32)
    db_second = tl.zeros([ROWS, HALF], tl.float32)
    db_rest = tl.zeros([ROWS, TAIL], tl.float32)
    for head in range(HEADS):
        d_first, d_second, d_rest = collected_head(
            d_out_ptr, d_other_ptr, destinations_ptr, rows, inside, places, stored, total, bound,
            head * DIM, HEADS * DIM, COPIES, PIECES, PAIRS, REST, HALF, TAIL,
        )  # fmt: skip
        if HAS_ROPE:
            turned = d_first * cos + d_second * sin
            d_second = d_second * cos - d_first * sin
            d_first = turned
        if HAS_NORM:
            first, second, rest = load_head(source_ptr + head * DIM, inside, PAIRS, REST, HALF, TAIL)
            first, second, rest, rstd = _standardise(
                first, second, rest, eps, CENTERED, PAIRS, REST, HALF, TAIL
            )
            if WITH_DWEIGHT:
                dw_first += d_first * first
                dw_second += d_second * second
                if REST > 0:
                    dw_rest += d_rest * rest
                if CENTERED:
                    db_first += d_first
                    db_second += d_second
                    if REST > 0:
                        db_rest += d_rest
            d_first *= w_first
            d_second *= w_second
            if REST > 0:
                d_rest *= w_rest
            along = head_dot(d_first, d_second, d_rest, first, second, rest, REST)[:, None] / DIM
            mean = 0.0
            if CENTERED:
                mean = _mean(d_first, d_second, d_rest, DIM, REST)
            d_first = rstd * (d_first - first * along - mean)
            d_second = rstd * (d_second - second * along - mean)
            if REST > 0:
                d_rest = rstd * (d_rest - rest * along - mean)
        if WITH_DQKV:
            store_head(d_source_ptr + head * DIM, d_first, d_second, d_rest, inside, PAIRS, REST, HALF, TAIL)
    if WITH_DWEIGHT:
        _store_sums(
            partial_ptr, dw_first, dw_second, dw_rest, expert,
            EXPERTS, HAS_EXPERTS, PAIRS, REST, HALF, TAIL,
        )  # fmt: skip
        if CENTERED:
            partial_ptr += EXPERTS * DIM
            _store_sums(
                partial_ptr, db_first, db_second, db_rest, expert,
                EXPERTS, HAS_EXPERTS, PAIRS, REST, HALF, TAIL,
            )  # fmt: skip
