# mypy: disable-error-code="import-untyped, no-untyped-def, no-untyped-call, untyped-decorator"
"""Triton: one program per group of rows walks over all heads; the angles of its rows stay in registers.

A head is held as three parts (`_triton.py`): the two halves of its rotated pairs, and the rest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from reca.kernels._launch import (
    architecture_of,
    as_rows,
    ceil_div,
    launch,
    launch_config,
    next_power_of_two,
)
from reca.kernels._triton import head_dot, load_head, load_head_weight, store_head


@triton.jit
def _angles(cos_ptr, sin_ptr, rows, inside, PAIRS: tl.constexpr, HALF: tl.constexpr):
    """cos and sin of each row, [ROWS, HALF] fp32."""
    pairs = tl.arange(0, HALF)
    in_pairs = inside[:, None] & (pairs < PAIRS)[None, :]
    cos = tl.load(cos_ptr + rows[:, None] * PAIRS + pairs, mask=in_pairs, other=0.0)
    sin = tl.load(sin_ptr + rows[:, None] * PAIRS + pairs, mask=in_pairs, other=0.0)
    return cos, sin


@triton.jit
def _forward_heads(
    source_ptr,
    out_ptr,
    weight_ptr,
    cos,
    sin,
    inside,
    eps,
    HEADS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    HALF: tl.constexpr,
    TAIL: tl.constexpr,
):
    """All heads of query or of key (or of value, without norm and rotation) for one group of rows."""
    DIM: tl.constexpr = 2 * PAIRS + REST
    if HAS_NORM:
        w_first, w_second, w_rest = load_head_weight(weight_ptr, PAIRS, REST, HALF, TAIL)
    for head in range(HEADS):
        first, second, rest = load_head(source_ptr + head * DIM, inside, PAIRS, REST, HALF, TAIL)
        if HAS_NORM:
            square = head_dot(first, second, rest, first, second, rest, REST)
            rstd = tl.rsqrt(square / DIM + eps)[:, None]
            first = first * rstd * w_first[None, :]
            second = second * rstd * w_second[None, :]
            if REST > 0:
                rest = rest * rstd * w_rest[None, :]
        if HAS_ROPE:
            turned = first * cos - second * sin
            second = second * cos + first * sin
            first = turned
        store_head(out_ptr + head * DIM, first, second, rest, inside, PAIRS, REST, HALF, TAIL)


@triton.jit
def _forward_kernel(
    qkv_ptr,
    query_weight_ptr,
    key_weight_ptr,
    cos_ptr,
    sin_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    rows_total,
    qkv_stride,
    eps,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    HALF: tl.constexpr,
    TAIL: tl.constexpr,
):
    DIM: tl.constexpr = 2 * PAIRS + REST
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < rows_total
    cos = 1.0
    sin = 0.0
    if HAS_ROPE:
        cos, sin = _angles(cos_ptr, sin_ptr, rows, inside, PAIRS, HALF)
    source = qkv_ptr + rows * qkv_stride
    out = query_ptr + rows * (HEADS * DIM)
    _forward_heads(
        source, out, query_weight_ptr, cos, sin, inside, eps,
        HEADS, HAS_NORM, HAS_ROPE, PAIRS, REST, HALF, TAIL,
    )  # fmt: skip
    source += HEADS * DIM
    out = key_ptr + rows * (KV_HEADS * DIM)
    _forward_heads(
        source, out, key_weight_ptr, cos, sin, inside, eps,
        KV_HEADS, HAS_NORM, HAS_ROPE, PAIRS, REST, HALF, TAIL,
    )  # fmt: skip
    source += KV_HEADS * DIM
    out = value_ptr + rows * (KV_HEADS * DIM)
    _forward_heads(
        source, out, key_weight_ptr, cos, sin, inside, eps, KV_HEADS, False, False, PAIRS, REST, HALF, TAIL
    )


@triton.jit
def _backward_heads(
    d_out_ptr,
    source_ptr,
    d_source_ptr,
    weight_ptr,
    partial_ptr,
    cos,
    sin,
    inside,
    eps,
    HEADS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    WITH_DQKV: tl.constexpr,
    WITH_DWEIGHT: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    HALF: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Turn the gradient back, then through the norm; the statistics come again from the saved rows."""
    DIM: tl.constexpr = 2 * PAIRS + REST
    if HAS_NORM:
        w_first, w_second, w_rest = load_head_weight(weight_ptr, PAIRS, REST, HALF, TAIL)
    if WITH_DWEIGHT:
        dw_first = tl.zeros([HALF], tl.float32)
        dw_second = tl.zeros([HALF], tl.float32)
        dw_rest = tl.zeros([TAIL], tl.float32)
    for head in range(HEADS):
        d_first, d_second, d_rest = load_head(d_out_ptr + head * DIM, inside, PAIRS, REST, HALF, TAIL)
        if HAS_ROPE:
            turned = d_first * cos + d_second * sin
            d_second = d_second * cos - d_first * sin
            d_first = turned
        if HAS_NORM:
            first, second, rest = load_head(source_ptr + head * DIM, inside, PAIRS, REST, HALF, TAIL)
            square = head_dot(first, second, rest, first, second, rest, REST)
            rstd = tl.rsqrt(square / DIM + eps)[:, None]
            first *= rstd
            second *= rstd
            if REST > 0:
                rest *= rstd
            if WITH_DWEIGHT:
                dw_first += tl.sum(d_first * first, axis=0)
                dw_second += tl.sum(d_second * second, axis=0)
                if REST > 0:
                    dw_rest += tl.sum(d_rest * rest, axis=0)
            d_first *= w_first[None, :]
            d_second *= w_second[None, :]
            if REST > 0:
                d_rest *= w_rest[None, :]
            mean = head_dot(d_first, d_second, d_rest, first, second, rest, REST)[:, None] / DIM
            d_first = rstd * (d_first - first * mean)
            d_second = rstd * (d_second - second * mean)
            if REST > 0:
                d_rest = rstd * (d_rest - rest * mean)
        if WITH_DQKV:
            store_head(d_source_ptr + head * DIM, d_first, d_second, d_rest, inside, PAIRS, REST, HALF, TAIL)
    if WITH_DWEIGHT:
        pairs = tl.arange(0, HALF)
        tl.store(partial_ptr + pairs, dw_first, mask=pairs < PAIRS)
        tl.store(partial_ptr + PAIRS + pairs, dw_second, mask=pairs < PAIRS)
        if REST > 0:
            tail = tl.arange(0, TAIL)
            tl.store(partial_ptr + 2 * PAIRS + tail, dw_rest, mask=tail < REST)


@triton.jit
def _backward_kernel(
    d_query_ptr,
    d_key_ptr,
    d_value_ptr,
    qkv_ptr,
    query_weight_ptr,
    key_weight_ptr,
    cos_ptr,
    sin_ptr,
    d_qkv_ptr,
    partial_ptr,
    rows_total,
    qkv_stride,
    eps,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    WITH_DQKV: tl.constexpr,
    WITH_DWEIGHT: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    HALF: tl.constexpr,
    TAIL: tl.constexpr,
):
    DIM: tl.constexpr = 2 * PAIRS + REST
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < rows_total
    cos = 1.0
    sin = 0.0
    if HAS_ROPE:
        cos, sin = _angles(cos_ptr, sin_ptr, rows, inside, PAIRS, HALF)
    source = qkv_ptr + rows * qkv_stride
    target = d_qkv_ptr + rows * ((HEADS + 2 * KV_HEADS) * DIM)
    partial = partial_ptr + tl.program_id(0).to(tl.int64) * (2 * DIM)
    _backward_heads(
        d_query_ptr + rows * (HEADS * DIM), source, target, query_weight_ptr, partial, cos, sin, inside, eps,
        HEADS, HAS_NORM, HAS_ROPE, WITH_DQKV, WITH_DWEIGHT, PAIRS, REST, HALF, TAIL,
    )  # fmt: skip
    source += HEADS * DIM
    target += HEADS * DIM
    d_key = d_key_ptr + rows * (KV_HEADS * DIM)
    _backward_heads(
        d_key, source, target, key_weight_ptr, partial + DIM, cos, sin, inside, eps,
        KV_HEADS, HAS_NORM, HAS_ROPE, WITH_DQKV, WITH_DWEIGHT, PAIRS, REST, HALF, TAIL,
    )  # fmt: skip
    if WITH_DQKV:
        target += KV_HEADS * DIM
        _forward_heads(
            d_value_ptr + rows * (KV_HEADS * DIM), target, key_weight_ptr, cos, sin, inside, eps,
            KV_HEADS, False, False, PAIRS, REST, HALF, TAIL,
        )  # fmt: skip


def _geometry(qkv: Tensor, dim: int, pairs: int) -> tuple[int, int, dict[str, int]]:
    """(rows per program, warps, sizes of the parts)."""
    config = launch_config("qk_norm_rope", architecture_of(qkv), qkv.dtype, dim)
    rows = max(1, config.tile // next_power_of_two(dim))
    rest = dim - 2 * pairs
    parts = {"PAIRS": pairs, "REST": rest, "HALF": next_power_of_two(pairs), "TAIL": next_power_of_two(rest)}
    return rows, config.warps, parts


def forward(
    qkv: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    kv_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """query [rows, heads, dim], key and value [rows, kv_heads, dim], all contiguous."""
    qkv = as_rows(qkv)
    rows_total, dim = qkv.shape[0], qkv.shape[1] // (heads + 2 * kv_heads)
    rows, warps, parts = _geometry(qkv, dim, dim // 2 if cos is None else cos.shape[1])
    query = qkv.new_empty(rows_total, heads, dim)
    key, value = (qkv.new_empty(rows_total, kv_heads, dim) for _ in range(2))
    launch(
        _forward_kernel,
        (ceil_div(rows_total, rows),),
        qkv,
        *(qkv if tensor is None else tensor.contiguous() for tensor in (query_weight, key_weight, cos, sin)),
        query,
        key,
        value,
        rows_total,
        qkv.stride(0),
        eps,
        warps=warps,
        ROWS=rows,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HAS_NORM=query_weight is not None,
        HAS_ROPE=cos is not None,
        **parts,
    )
    return query, key, value


def backward(
    d_query: Tensor,
    d_key: Tensor,
    d_value: Tensor,
    qkv: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    kv_heads: int,
    eps: float,
    with_dqkv: bool,
    with_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_qkv, d_query_weight, d_key_weight); what is not asked for is empty."""
    qkv = as_rows(qkv)
    rows_total, dim = qkv.shape[0], qkv.shape[1] // (heads + 2 * kv_heads)
    rows, warps, parts = _geometry(qkv, dim, dim // 2 if cos is None else cos.shape[1])
    grid = (ceil_div(rows_total, rows),)
    d_qkv = qkv.new_empty(qkv.shape if with_dqkv else (0,))
    partial = qkv.new_empty((*grid, 2, dim) if with_dweight else (0,), dtype=torch.float32)
    launch(
        _backward_kernel,
        grid,
        d_query.contiguous(),
        d_key.contiguous(),
        d_value.contiguous(),
        qkv,
        *(qkv if tensor is None else tensor.contiguous() for tensor in (query_weight, key_weight, cos, sin)),
        d_qkv,
        partial,
        rows_total,
        qkv.stride(0),
        eps,
        warps=warps,
        ROWS=rows,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HAS_NORM=query_weight is not None,
        HAS_ROPE=cos is not None,
        WITH_DQKV=with_dqkv,
        WITH_DWEIGHT=with_dweight,
        **parts,
    )
    if not with_dweight or query_weight is None or key_weight is None:
        return d_qkv, qkv.new_empty(0), qkv.new_empty(0)
    summed = partial.sum(dim=0)
    return d_qkv, summed[0].to(query_weight.dtype, copy=True), summed[1].to(key_weight.dtype, copy=True)
