# mypy: disable-error-code="import-untyped, no-untyped-def, no-untyped-call, untyped-decorator"
"""Triton: one program per group of rows, each whole in registers; the backward forms statistics again."""

from __future__ import annotations

from collections.abc import Sequence

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
    rows_per_program,
)


@triton.jit
def _standardise(x, inside, dim, eps):
    """(hat, rstd [ROWS]) of rows whose padding is zero."""
    mean = tl.sum(x, axis=1) / dim
    centred = tl.where(inside, x - mean[:, None], 0.0)
    # What the rounding of a large sum left over; without it a mean of 1000 costs a digit of the result.
    drift = tl.sum(centred, axis=1) / dim
    centred = tl.where(inside, centred - drift[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / dim + eps)
    return centred * rstd[:, None], rstd


@triton.jit
def _forward_kernel(
    residual_ptr,
    delta_ptr,
    more_ptr,
    weight_ptr,
    bias_ptr,
    summed_ptr,
    normed_ptr,
    rows_total,
    dim,
    residual_stride,
    delta_stride,
    more_stride,
    eps,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DELTAS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    inside = (rows < rows_total)[:, None] & (cols < dim)[None, :]
    x = tl.load(residual_ptr + rows[:, None] * residual_stride + cols, mask=inside, other=0.0)
    x = x.to(tl.float32)
    if DELTAS > 0:
        delta = tl.load(delta_ptr + rows[:, None] * delta_stride + cols, mask=inside, other=0.0)
        delta = delta.to(tl.float32)
        if DELTAS > 1:
            more = tl.load(more_ptr + rows[:, None] * more_stride + cols, mask=inside, other=0.0)
            delta += more.to(tl.float32)
        summed = (x + delta).to(summed_ptr.dtype.element_ty)
        tl.store(summed_ptr + rows[:, None] * dim + cols, summed, mask=inside)
        x = summed.to(tl.float32)
    weight = tl.load(weight_ptr + cols, mask=cols < dim, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=cols < dim, other=0.0).to(tl.float32)
    hat, _ = _standardise(x, inside, dim, eps)
    normed = hat * weight[None, :] + bias[None, :]
    tl.store(normed_ptr + rows[:, None] * dim + cols, normed.to(normed_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    d_normed_ptr,
    more_ptr,
    d_summed_ptr,
    x_ptr,
    weight_ptr,
    dx_ptr,
    d_delta_ptr,
    partial_ptr,
    rows_total,
    dim,
    d_normed_stride,
    more_stride,
    d_summed_stride,
    x_stride,
    eps,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STEPS: tl.constexpr,
    READERS: tl.constexpr,
    HAS_D_SUMMED: tl.constexpr,
    WITH_DX: tl.constexpr,
    WITH_DDELTA: tl.constexpr,
    WITH_DWEIGHT: tl.constexpr,
):
    cols = tl.arange(0, COLS)
    weight = tl.load(weight_ptr + cols, mask=cols < dim, other=0.0).to(tl.float32)
    d_weight, d_bias = tl.zeros([COLS], tl.float32), tl.zeros([COLS], tl.float32)
    for step in range(STEPS):
        rows = (tl.program_id(0).to(tl.int64) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        inside = (rows < rows_total)[:, None] & (cols < dim)[None, :]
        d_out = tl.load(d_normed_ptr + rows[:, None] * d_normed_stride + cols, mask=inside, other=0.0)
        d_out = d_out.to(tl.float32)
        if READERS > 1:
            more = tl.load(more_ptr + rows[:, None] * more_stride + cols, mask=inside, other=0.0)
            d_out += more.to(tl.float32)
        x = tl.load(x_ptr + rows[:, None] * x_stride + cols, mask=inside, other=0.0)
        hat, rstd = _standardise(x.to(tl.float32), inside, dim, eps)
        if WITH_DWEIGHT:
            d_weight += tl.sum(d_out * hat, axis=0)
            d_bias += tl.sum(d_out, axis=0)
        if WITH_DX:
            d_hat = d_out * weight[None, :]
            level = tl.sum(d_hat, axis=1) / dim
            slope = tl.sum(d_hat * hat, axis=1) / dim
            dx = rstd[:, None] * (d_hat - level[:, None] - hat * slope[:, None])
            if HAS_D_SUMMED:
                passed = d_summed_ptr + rows[:, None] * d_summed_stride + cols
                dx += tl.load(passed, mask=inside, other=0.0).to(tl.float32)
            tl.store(dx_ptr + rows[:, None] * dim + cols, dx.to(dx_ptr.dtype.element_ty), mask=inside)
            if WITH_DDELTA:
                d_delta = dx.to(d_delta_ptr.dtype.element_ty)
                tl.store(d_delta_ptr + rows[:, None] * dim + cols, d_delta, mask=inside)
    if WITH_DWEIGHT:
        partial_ptr += tl.program_id(0).to(tl.int64) * 2 * dim
        tl.store(partial_ptr + cols, d_weight, mask=cols < dim)
        tl.store(partial_ptr + dim + cols, d_bias, mask=cols < dim)


def _tile(x: Tensor) -> tuple[int, int, int]:
    """(rows, columns, warps): whole rows, as many as fill the tile."""
    config = launch_config("layer_norm", architecture_of(x), x.dtype, x.shape[1])
    columns = next_power_of_two(x.shape[1])
    return max(1, config.tile // columns), columns, config.warps


def forward(
    residual: Tensor,
    deltas: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(summed [rows, dim] in the dtype of residual, empty without deltas; normed [rows, dim] in `dtype`)."""
    residual, *deltas = (as_rows(rows) for rows in (residual, *deltas))
    (rows_total, dim), (rows, cols, warps) = residual.shape, _tile(residual)
    summed = residual.new_empty(residual.shape if deltas else (0,))
    normed = residual.new_empty(residual.shape, dtype=dtype)
    delta, more = deltas[0] if deltas else residual, deltas[-1] if deltas else residual
    launch(
        _forward_kernel,
        (ceil_div(rows_total, rows),),
        residual,
        delta,
        more,
        weight.contiguous(),
        bias.contiguous(),
        summed,
        normed,
        rows_total,
        dim,
        residual.stride(0),
        delta.stride(0),
        more.stride(0),
        eps,
        warps=warps,
        ROWS=rows,
        COLS=cols,
        DELTAS=len(deltas),
    )
    return summed, normed


def backward(
    d_normed: Sequence[Tensor],
    d_summed: Tensor | None,
    x: Tensor,
    weight: Tensor,
    eps: float,
    with_dx: bool,
    delta_dtype: torch.dtype | None,
    with_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx; dx in `delta_dtype` unless None; [d weight; d bias] fp32); what is not asked for is empty."""
    first, last, x = as_rows(d_normed[0]), as_rows(d_normed[-1]), as_rows(x)
    passed = x if d_summed is None else as_rows(d_summed)
    (rows_total, dim), (rows, cols, warps) = x.shape, _tile(x)
    steps = ceil_div(rows_per_program(rows_total, architecture_of(x)), rows)
    grid = (ceil_div(rows_total, rows * steps),)
    dx = x.new_empty(x.shape if with_dx else (0,))
    with_ddelta = with_dx and delta_dtype is not None
    d_delta = x.new_empty(x.shape if with_ddelta else (0,), dtype=delta_dtype)
    partial = x.new_empty((*grid, 2, dim) if with_dweight else (0,), dtype=torch.float32)
    launch(
        _backward_kernel,
        grid,
        first,
        last,
        passed,
        x,
        weight.contiguous(),
        dx,
        d_delta,
        partial,
        rows_total,
        dim,
        first.stride(0),
        last.stride(0),
        passed.stride(0),
        x.stride(0),
        eps,
        warps=warps,
        ROWS=rows,
        COLS=cols,
        STEPS=steps,
        READERS=len(d_normed),
        HAS_D_SUMMED=d_summed is not None,
        WITH_DX=with_dx,
        WITH_DDELTA=with_ddelta,
        WITH_DWEIGHT=with_dweight,
    )
    return dx, d_delta, partial.sum(dim=0) if with_dweight else partial
