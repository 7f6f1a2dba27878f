# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"
"""Triton: one program per group of rows; a row stays in registers between its reduction and its use."""

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
    rows_per_program,
)


@triton.jit
def _forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    summed_ptr,
    normed_ptr,
    rstd_ptr,
    experts_ptr,
    rows_total,
    dim,
    x_stride,
    residual_stride,
    experts_total,
    eps,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_EXPERTS: tl.constexpr,
    ROUNDS_QUOTIENT: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    inside = (rows < rows_total)[:, None] & (cols < dim)[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + cols, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + rows[:, None] * residual_stride + cols, mask=inside, other=0.0)
        summed = (x + residual.to(tl.float32)).to(summed_ptr.dtype.element_ty)
        tl.store(summed_ptr + rows[:, None] * dim + cols, summed, mask=inside)
        # The norm sees what the residual stream holds, so the backward can recompute it from there.
        x = summed.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / dim + eps)
    if HAS_EXPERTS:
        expert = tl.load(experts_ptr + rows, mask=rows < rows_total, other=0)
        known = inside & ((expert >= 0) & (expert < experts_total))[:, None]
        weight_rows = weight_ptr + expert.to(tl.int64)[:, None] * dim
        weight = tl.load(weight_rows + cols, mask=known, other=float("nan")).to(tl.float32)
    else:
        weight = tl.load(weight_ptr + cols, mask=cols < dim, other=0.0).to(tl.float32)[None, :]
    hat = x * rstd[:, None]
    if ROUNDS_QUOTIENT:
        hat = hat.to(normed_ptr.dtype.element_ty).to(tl.float32)
    normed = hat * weight
    tl.store(normed_ptr + rows[:, None] * dim + cols, normed.to(normed_ptr.dtype.element_ty), mask=inside)
    tl.store(rstd_ptr + rows, rstd, mask=rows < rows_total)


@triton.jit
def _backward_kernel(
    d_normed_ptr,
    d_summed_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    partial_ptr,
    experts_ptr,
    rows_total,
    dim,
    d_normed_stride,
    d_summed_stride,
    x_stride,
    experts_total,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STEPS: tl.constexpr,
    HAS_D_SUMMED: tl.constexpr,
    WITH_DX: tl.constexpr,
    WITH_DWEIGHT: tl.constexpr,
    HAS_EXPERTS: tl.constexpr,
):
    """A second axis of the grid, if any, is the expert: its programs touch its own rows only."""
    cols = tl.arange(0, COLS)
    if HAS_EXPERTS:
        weight_ptr += tl.program_id(1).to(tl.int64) * dim
        partial_ptr += tl.program_id(1).to(tl.int64) * dim
    weight = tl.load(weight_ptr + cols, mask=cols < dim, other=0.0).to(tl.float32)
    d_weight = tl.zeros([COLS], tl.float32)
    for step in range(STEPS):
        rows = (tl.program_id(0).to(tl.int64) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        mine = rows < rows_total
        if HAS_EXPERTS:
            expert = tl.load(experts_ptr + rows, mask=mine, other=-1)
            chosen = expert == tl.program_id(1)
            # A row that names no expert is written too, as NaN, by the first one.
            writer = tl.where((expert >= 0) & (expert < experts_total), expert, 0)
            mine = mine & (writer == tl.program_id(1))
        inside = mine[:, None] & (cols < dim)[None, :]
        d_normed = tl.load(d_normed_ptr + rows[:, None] * d_normed_stride + cols, mask=inside, other=0.0)
        x = tl.load(x_ptr + rows[:, None] * x_stride + cols, mask=inside, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=mine, other=0.0)
        d_normed = d_normed.to(tl.float32)
        hat = x.to(tl.float32) * rstd[:, None]
        if WITH_DWEIGHT:
            contribution = d_normed * hat
            if HAS_EXPERTS:
                contribution = tl.where(chosen[:, None], contribution, 0.0)
            d_weight += tl.sum(contribution, axis=0)
        if WITH_DX:
            d_hat = d_normed * weight[None, :]
            mean = tl.sum(d_hat * hat, axis=1) / dim
            dx = rstd[:, None] * (d_hat - hat * mean[:, None])
            if HAS_D_SUMMED:
                d_summed_rows = d_summed_ptr + rows[:, None] * d_summed_stride
                dx += tl.load(d_summed_rows + cols, mask=inside, other=0.0).to(tl.float32)
            if HAS_EXPERTS:
                dx = tl.where(chosen[:, None], dx, float("nan"))
            tl.store(dx_ptr + rows[:, None] * dim + cols, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if WITH_DWEIGHT:
        partial_rows = tl.program_id(0).to(tl.int64)
        if HAS_EXPERTS:
            partial_rows *= experts_total
        tl.store(partial_ptr + partial_rows * dim + cols, d_weight, mask=cols < dim)


def _tile(x: Tensor) -> tuple[int, int, int]:
    """(rows, columns, warps): whole rows, as many as fill the tile."""
    config = launch_config("rms_norm", architecture_of(x), x.dtype, x.shape[1])
    columns = next_power_of_two(x.shape[1])
    return max(1, config.tile // columns), columns, config.warps


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    experts: Tensor | None = None,
    rounds_quotient: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(summed [rows, dim], empty without residual; normed [rows, dim]; rstd [rows] fp32) of x [rows, dim]."""
    x, weight = as_rows(x), weight.contiguous()
    rows_total, dim = x.shape
    residual = None if residual is None else as_rows(residual)
    rows, cols, warps = _tile(x)
    summed = x.new_empty((0,) if residual is None else x.shape)
    normed = x.new_empty(x.shape)
    rstd = x.new_empty(rows_total, dtype=torch.float32)
    launch(
        _forward_kernel,
        (ceil_div(rows_total, rows),),
        x,
        x if residual is None else residual,
        weight,
        summed,
        normed,
        rstd,
        x if experts is None else experts.contiguous(),
        rows_total,
        dim,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        weight.shape[0],
        eps,
        warps=warps,
        ROWS=rows,
        COLS=cols,
        HAS_RESIDUAL=residual is not None,
        HAS_EXPERTS=experts is not None,
        ROUNDS_QUOTIENT=rounds_quotient,
    )
    return summed, normed, rstd


def backward(
    d_normed: Tensor,
    d_summed: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    with_dx: bool,
    with_dweight: bool,
    experts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(dx [rows, dim], dweight shaped like weight); what is not asked for is empty."""
    d_normed, x, weight = as_rows(d_normed), as_rows(x), weight.contiguous()
    d_summed = None if d_summed is None else as_rows(d_summed)
    rows_total, dim = x.shape
    rows, cols, warps = _tile(x)
    steps = ceil_div(rows_per_program(rows_total, architecture_of(x)), rows)
    grid = (ceil_div(rows_total, rows * steps),)
    dx = x.new_empty(x.shape if with_dx else (0,))
    partial = x.new_empty((*grid, *weight.shape) if with_dweight else (0,), dtype=torch.float32)
    launch(
        _backward_kernel,
        grid if experts is None else (*grid, weight.shape[0]),
        d_normed,
        d_normed if d_summed is None else d_summed,
        x,
        weight,
        rstd,
        dx,
        partial,
        x if experts is None else experts.contiguous(),
        rows_total,
        dim,
        d_normed.stride(0),
        0 if d_summed is None else d_summed.stride(0),
        x.stride(0),
        weight.shape[0],
        warps=warps,
        ROWS=rows,
        COLS=cols,
        STEPS=steps,
        HAS_D_SUMMED=d_summed is not None,
        WITH_DX=with_dx,
        WITH_DWEIGHT=with_dweight,
        HAS_EXPERTS=experts is not None,
    )
    return dx, partial.sum(dim=0).to(weight.dtype) if with_dweight else weight.new_empty(0)
