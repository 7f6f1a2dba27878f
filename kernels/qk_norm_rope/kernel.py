# mypy: disable-error-code="import-untyped, no-untyped-def, no-untyped-call, untyped-decorator"
"""Triton: one program per group of rows walks over all heads; the angles of its rows stay in registers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
from reca.kernels.qk_norm_rope.heads import backward_heads, forward_heads
from reca.kernels.qk_norm_rope.places import collect_heads, place_of, spread_heads


@triton.jit
def _angles(cos_ptr, sin_ptr, rows, inside, PAIRS: tl.constexpr, HALF: tl.constexpr):
    """cos and sin of each row, [ROWS, HALF] fp32."""
    pairs = tl.arange(0, HALF)
    in_pairs = inside[:, None] & (pairs < PAIRS)[None, :]
    cos = tl.load(cos_ptr + rows[:, None] * PAIRS + pairs, mask=in_pairs, other=0.0)
    sin = tl.load(sin_ptr + rows[:, None] * PAIRS + pairs, mask=in_pairs, other=0.0)
    return cos, sin


@triton.jit
def _experts(experts_ptr, rows, inside, EXPERTS: tl.constexpr, HAS_EXPERTS: tl.constexpr):
    """(expert of each row, whether it exists)."""
    expert = rows * 0
    known = inside
    if HAS_EXPERTS:
        expert = tl.load(experts_ptr + rows, mask=inside, other=-1).to(tl.int64)
        known = inside & (expert >= 0) & (expert < EXPERTS)
    return expert, known


@triton.jit
def _places(
    destinations_ptr, rows, inside, places_total, HAS_DESTINATIONS: tl.constexpr, COPIES: tl.constexpr
):
    """(where keys and values of each row lie first, whether they lie anywhere)."""
    places = rows
    stored = inside
    if HAS_DESTINATIONS:
        places, stored = place_of(destinations_ptr, rows, inside, places_total, 0, COPIES)
    return places, stored


@triton.jit
def _forward_kernel(
    qkv_ptr,
    query_weight_ptr,
    key_weight_ptr,
    query_bias_ptr,
    key_bias_ptr,
    cos_ptr,
    sin_ptr,
    experts_ptr,
    destinations_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    rows_total,
    places_total,
    qkv_stride,
    eps,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    CENTERED: tl.constexpr,
    ROUNDS_QUOTIENT: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    EXPERTS: tl.constexpr,
    HAS_EXPERTS: tl.constexpr,
    HAS_DESTINATIONS: tl.constexpr,
    COPIES: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    HALF: tl.constexpr,
    TAIL: tl.constexpr,
):
    DIM: tl.constexpr = 2 * PAIRS + REST
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < rows_total
    expert, known = _experts(experts_ptr, rows, inside, EXPERTS, HAS_EXPERTS)
    places, stored = _places(destinations_ptr, rows, inside, places_total, HAS_DESTINATIONS, COPIES)
    cos = 1.0
    sin = 0.0
    if HAS_ROPE:
        cos, sin = _angles(cos_ptr, sin_ptr, rows, inside, PAIRS, HALF)
    source = qkv_ptr + rows * qkv_stride
    forward_heads(
        source, query_ptr, query_weight_ptr, query_bias_ptr, cos, sin, expert, known,
        destinations_ptr, rows, inside, rows, inside, rows_total, eps,
        HEADS, HAS_NORM, CENTERED, ROUNDS_QUOTIENT, HAS_ROPE, HAS_EXPERTS, 1, PAIRS, REST, HALF, TAIL,
    )  # fmt: skip
    source += HEADS * DIM
    forward_heads(
        source, key_ptr, key_weight_ptr, key_bias_ptr, cos, sin, expert, known,
        destinations_ptr, rows, inside, places, stored, places_total, eps,
        KV_HEADS, HAS_NORM, CENTERED, ROUNDS_QUOTIENT, HAS_ROPE, HAS_EXPERTS, COPIES, PAIRS, REST, HALF, TAIL,
    )  # fmt: skip
    source += KV_HEADS * DIM
    spread_heads(
        source, value_ptr, destinations_ptr, rows, inside, places, stored, places_total,
        KV_HEADS, COPIES, PAIRS, REST, HALF, TAIL,
    )  # fmt: skip


@triton.jit
def _backward_kernel(
    d_query_ptr,
    d_key_ptr,
    d_value_ptr,
    more_d_query_ptr,
    more_d_key_ptr,
    more_d_value_ptr,
    qkv_ptr,
    query_weight_ptr,
    key_weight_ptr,
    cos_ptr,
    sin_ptr,
    experts_ptr,
    destinations_ptr,
    d_qkv_ptr,
    partial_ptr,
    rows_total,
    places_total,
    query_bound,
    key_bound,
    qkv_stride,
    eps,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    CENTERED: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    EXPERTS: tl.constexpr,
    HAS_EXPERTS: tl.constexpr,
    HAS_DESTINATIONS: tl.constexpr,
    COPIES: tl.constexpr,
    PIECES: tl.constexpr,
    WITH_DQKV: tl.constexpr,
    WITH_DWEIGHT: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    HALF: tl.constexpr,
    TAIL: tl.constexpr,
):
    DIM: tl.constexpr = 2 * PAIRS + REST
    SUMS: tl.constexpr = EXPERTS * DIM * (2 if CENTERED else 1)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < rows_total
    expert, known = _experts(experts_ptr, rows, inside, EXPERTS, HAS_EXPERTS)
    places, stored = _places(destinations_ptr, rows, inside, places_total, HAS_DESTINATIONS, COPIES)
    cos = 1.0
    sin = 0.0
    if HAS_ROPE:
        cos, sin = _angles(cos_ptr, sin_ptr, rows, inside, PAIRS, HALF)
    source = qkv_ptr + rows * qkv_stride
    target = d_qkv_ptr + rows * ((HEADS + 2 * KV_HEADS) * DIM)
    partial = partial_ptr + tl.program_id(0).to(tl.int64) * (2 * SUMS)
    backward_heads(
        d_query_ptr, more_d_query_ptr, source, target, query_weight_ptr, partial, cos, sin, expert, known,
        destinations_ptr, rows, inside, rows, inside, rows_total, query_bound, eps,
        HEADS, HAS_NORM, CENTERED, HAS_ROPE, EXPERTS, HAS_EXPERTS, WITH_DQKV, WITH_DWEIGHT, 1, PIECES, ROWS,
        PAIRS, REST, HALF, TAIL,
    )  # fmt: skip
    source += HEADS * DIM
    target += HEADS * DIM
    partial += SUMS
    backward_heads(
        d_key_ptr, more_d_key_ptr, source, target, key_weight_ptr, partial, cos, sin, expert, known,
        destinations_ptr, rows, inside, places, stored, places_total, key_bound, eps,
        KV_HEADS, HAS_NORM, CENTERED, HAS_ROPE, EXPERTS, HAS_EXPERTS, WITH_DQKV, WITH_DWEIGHT, COPIES, PIECES,
        ROWS, PAIRS, REST, HALF, TAIL,
    )  # fmt: skip
    if WITH_DQKV:
        target += KV_HEADS * DIM
        collect_heads(
            d_value_ptr, more_d_value_ptr, target, destinations_ptr, rows, inside, places, stored,
            places_total, key_bound, KV_HEADS, COPIES, PIECES, PAIRS, REST, HALF, TAIL,
        )  # fmt: skip


def _constants(
    qkv: Tensor,
    dim: int,
    cos: Tensor | None,
    weight: Tensor | None,
    experts: Tensor | None,
    destinations: Tensor | None,
) -> tuple[int, dict[str, Any]]:
    """(rows per program, what the kernels know at compile time)."""
    config = launch_config("qk_norm_rope", architecture_of(qkv), qkv.dtype, dim)
    rows = max(1, config.tile // next_power_of_two(dim))
    pairs = dim // 2 if cos is None else cos.shape[1]
    rest = dim - 2 * pairs
    return rows, {
        "warps": config.warps,
        "ROWS": rows,
        "HAS_NORM": weight is not None,
        "HAS_ROPE": cos is not None,
        "EXPERTS": 1 if experts is None or weight is None else weight.shape[0],
        "HAS_EXPERTS": experts is not None,
        "HAS_DESTINATIONS": destinations is not None,
        "COPIES": 1 if destinations is None or destinations.dim() == 1 else destinations.shape[1],
        "PAIRS": pairs,
        "REST": rest,
        "HALF": next_power_of_two(pairs),
        "TAIL": next_power_of_two(rest),
    }


def _given(stand_in: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """Contiguous pointers; what is absent is never read."""
    return [stand_in if tensor is None else tensor.contiguous() for tensor in tensors]


def forward(
    qkv: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    kv_heads: int,
    eps: float,
    query_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    experts: Tensor | None = None,
    rounds_quotient: bool = False,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """query [rows, heads, dim], key and value [rows, kv_heads, dim], or (keys, values) of `into`."""
    qkv = as_rows(qkv)
    rows_total, dim = qkv.shape[0], qkv.shape[1] // (heads + 2 * kv_heads)
    query = qkv.new_empty(rows_total, heads, dim)
    if into is None:
        key, value = (qkv.new_empty(rows_total, kv_heads, dim) for _ in range(2))
        destinations = None
    else:
        key, value, destinations = into
    rows, constants = _constants(qkv, dim, cos, query_weight, experts, destinations)
    launch(
        _forward_kernel,
        (ceil_div(rows_total, rows),),
        qkv,
        *_given(qkv, query_weight, key_weight, query_bias, key_bias, cos, sin, experts, destinations),
        query,
        key,
        value,
        rows_total,
        key.shape[0],
        qkv.stride(0),
        eps,
        HEADS=heads,
        KV_HEADS=kv_heads,
        CENTERED=query_bias is not None,
        ROUNDS_QUOTIENT=rounds_quotient,
        **constants,
    )
    if into is not None:
        # Autograd must notice buffers that were saved before this write.
        torch.autograd.graph.increment_version((key, value))
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
    query_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    experts: Tensor | None = None,
    destinations: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(d_qkv, d_query_weight, d_key_weight, d_query_bias, d_key_bias); what is not asked for is empty."""
    inputs = (qkv, query_weight, key_weight, cos, sin, heads, kv_heads, eps, with_dqkv, with_dweight)
    d_qkv, summed = backward_of_pieces(
        [d_query], [d_key], [d_value], *inputs, query_bias, experts, destinations
    )
    gradients = [qkv.new_empty(0) for _ in range(4)]
    if with_dweight:
        for i, parameter in enumerate((query_weight, key_weight, query_bias, key_bias)):
            if parameter is not None:
                line = summed[i % 2, i // 2].view(parameter.shape)
                gradients[i] = line.to(parameter.dtype, copy=True)
    return d_qkv, gradients[0], gradients[1], gradients[2], gradients[3]


def backward_of_pieces(
    d_query: Sequence[Tensor],
    d_key: Sequence[Tensor],
    d_value: Sequence[Tensor],
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
    query_bias: Tensor | None,
    experts: Tensor | None,
    destinations: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(d_qkv; [query and key, weights and biases, experts, dim] fp32) of gradients in one or two pieces."""
    qkv = as_rows(qkv)
    rows_total, dim = qkv.shape[0], qkv.shape[1] // (heads + 2 * kv_heads)
    rows, constants = _constants(qkv, dim, cos, query_weight, experts, destinations)
    grid = (ceil_div(rows_total, rows),)
    sums = 1 if query_bias is None else 2  # of weights, of biases
    shape = (*grid, 2, sums, constants["EXPERTS"], dim) if with_dweight else (0,)
    d_qkv = qkv.new_empty(qkv.shape if with_dqkv else (0,))
    partial = qkv.new_empty(shape, dtype=torch.float32)
    pieces = [(part[0], part[-1]) for part in (d_query, d_key, d_value)]
    launch(
        _backward_kernel,
        grid,
        *_given(qkv, *(first for first, _ in pieces)),
        *_given(qkv, *(last for _, last in pieces)),
        qkv,
        *_given(qkv, query_weight, key_weight, cos, sin, experts, destinations),
        d_qkv,
        partial,
        rows_total,
        sum(piece.shape[0] for piece in d_key),
        d_query[0].shape[0],
        d_key[0].shape[0],
        qkv.stride(0),
        eps,
        HEADS=heads,
        KV_HEADS=kv_heads,
        CENTERED=query_bias is not None,
        PIECES=len(d_key),
        WITH_DQKV=with_dqkv,
        WITH_DWEIGHT=with_dweight,
        **constants,
    )
    return d_qkv, partial.sum(dim=0) if with_dweight else partial
