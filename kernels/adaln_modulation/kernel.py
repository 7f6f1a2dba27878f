# mypy: disable-error-code="import-untyped, no-untyped-def, no-untyped-call, untyped-decorator"
"""Triton: one program per group of rows; a row stays in registers between its reductions and its use."""

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
    tile_shape,
)


@triton.jit
def _modulate_kernel(
    x_ptr,
    shift_ptr,
    scale_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    mean_ptr,
    rstd_ptr,
    rows_total,
    dim,
    x_stride,
    shift_stride,
    scale_stride,
    eps,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    AFFINE: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    inside = (rows < rows_total)[:, None] & (cols < dim)[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + cols, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=1) / dim
    centred = tl.where(inside, x - mean[:, None], 0.0)
    # What the rounding of a large sum left over; without it a mean of 1000 costs a digit of the result.
    drift = tl.sum(centred, axis=1) / dim
    centred = tl.where(inside, centred - drift[:, None], 0.0)
    mean += drift
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / dim + eps)
    normed = centred * rstd[:, None]
    if AFFINE:
        weight = tl.load(weight_ptr + cols, mask=cols < dim, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + cols, mask=cols < dim, other=0.0).to(tl.float32)
        normed = normed * weight[None, :] + bias[None, :]
    scale = tl.load(scale_ptr + rows[:, None] * scale_stride + cols, mask=inside, other=0.0)
    shift = tl.load(shift_ptr + rows[:, None] * shift_stride + cols, mask=inside, other=0.0)
    out = normed * (1.0 + scale.to(tl.float32)) + shift.to(tl.float32)
    tl.store(out_ptr + rows[:, None] * dim + cols, out.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + rows, mean, mask=rows < rows_total)
    tl.store(rstd_ptr + rows, rstd, mask=rows < rows_total)


@triton.jit
def _modulate_backward_kernel(
    d_out_ptr,
    x_ptr,
    scale_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    d_scale_ptr,
    partial_ptr,
    rows_total,
    dim,
    d_out_stride,
    x_stride,
    scale_stride,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STEPS: tl.constexpr,
    AFFINE: tl.constexpr,
    WITH_DX: tl.constexpr,
    WITH_DSCALE: tl.constexpr,
    WITH_DAFFINE: tl.constexpr,
):
    cols = tl.arange(0, COLS)
    if AFFINE:
        weight = tl.load(weight_ptr + cols, mask=cols < dim, other=0.0).to(tl.float32)
    d_weight, d_bias = tl.zeros([COLS], tl.float32), tl.zeros([COLS], tl.float32)
    for step in range(STEPS):
        rows = (tl.program_id(0).to(tl.int64) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        inside = (rows < rows_total)[:, None] & (cols < dim)[None, :]
        d_out = tl.load(d_out_ptr + rows[:, None] * d_out_stride + cols, mask=inside, other=0.0)
        x = tl.load(x_ptr + rows[:, None] * x_stride + cols, mask=inside, other=0.0)
        scale = tl.load(scale_ptr + rows[:, None] * scale_stride + cols, mask=inside, other=0.0)
        mean = tl.load(mean_ptr + rows, mask=rows < rows_total, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < rows_total, other=0.0)
        d_out = d_out.to(tl.float32)
        hat = tl.where(inside, (x.to(tl.float32) - mean[:, None]) * rstd[:, None], 0.0)
        d_hat = d_out * (1.0 + scale.to(tl.float32))
        if WITH_DAFFINE:
            d_weight += tl.sum(d_hat * hat, axis=0)
            d_bias += tl.sum(d_hat, axis=0)
        if WITH_DSCALE:
            normed = hat
            if AFFINE:
                bias = tl.load(bias_ptr + cols, mask=cols < dim, other=0.0).to(tl.float32)
                normed = hat * weight[None, :] + bias[None, :]
            d_scale = (d_out * normed).to(d_scale_ptr.dtype.element_ty)
            tl.store(d_scale_ptr + rows[:, None] * dim + cols, d_scale, mask=inside)
        if WITH_DX:
            if AFFINE:
                d_hat *= weight[None, :]
            level = tl.sum(d_hat, axis=1) / dim
            slope = tl.sum(d_hat * hat, axis=1) / dim
            dx = rstd[:, None] * (d_hat - level[:, None] - hat * slope[:, None])
            tl.store(dx_ptr + rows[:, None] * dim + cols, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if WITH_DAFFINE:
        partial_ptr += tl.program_id(0).to(tl.int64) * 2 * dim
        tl.store(partial_ptr + cols, d_weight, mask=cols < dim)
        tl.store(partial_ptr + dim + cols, d_bias, mask=cols < dim)


@triton.jit
def _gate_kernel(
    x_ptr,
    gate_ptr,
    other_ptr,
    out_ptr,
    d_gate_ptr,
    rows_total,
    dim,
    x_stride,
    gate_stride,
    other_stride,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    IS_BACKWARD: tl.constexpr,
    WITH_OUT: tl.constexpr,
    WITH_DGATE: tl.constexpr,
):
    """`other` is the residual, or in the backward the gradient of the output; `out` is then dx."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (rows < rows_total)[:, None] & (cols < dim)[None, :]
    other = tl.load(other_ptr + rows[:, None] * other_stride + cols, mask=inside, other=0.0).to(tl.float32)
    if WITH_OUT:
        gate = tl.load(gate_ptr + rows[:, None] * gate_stride + cols, mask=inside, other=0.0).to(tl.float32)
        if IS_BACKWARD:
            out = other * gate
        else:
            x = tl.load(x_ptr + rows[:, None] * x_stride + cols, mask=inside, other=0.0).to(tl.float32)
            out = other + gate * x
        tl.store(out_ptr + rows[:, None] * dim + cols, out.to(out_ptr.dtype.element_ty), mask=inside)
    if WITH_DGATE:
        x = tl.load(x_ptr + rows[:, None] * x_stride + cols, mask=inside, other=0.0).to(tl.float32)
        d_gate = (other * x).to(d_gate_ptr.dtype.element_ty)
        tl.store(d_gate_ptr + rows[:, None] * dim + cols, d_gate, mask=inside)


def _tile(x: Tensor) -> tuple[int, int, int]:
    """(rows, columns, warps): whole rows, as many as fill the tile."""
    config = launch_config("adaln_modulation", architecture_of(x), x.dtype, x.shape[1])
    columns = next_power_of_two(x.shape[1])
    return max(1, config.tile // columns), columns, config.warps


def forward(
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(out [rows, dim] in the dtype of x; mean and rstd [rows] fp32)."""
    x, shift, scale = as_rows(x), as_rows(shift), as_rows(scale)
    (rows_total, dim), (rows, cols, warps) = x.shape, _tile(x)
    out = x.new_empty(x.shape)
    mean, rstd = (x.new_empty(rows_total, dtype=torch.float32) for _ in range(2))
    launch(
        _modulate_kernel,
        (ceil_div(rows_total, rows),),
        x,
        shift,
        scale,
        *(x if t is None else t.contiguous() for t in (weight, bias)),
        out,
        mean,
        rstd,
        rows_total,
        dim,
        x.stride(0),
        shift.stride(0),
        scale.stride(0),
        eps,
        warps=warps,
        ROWS=rows,
        COLS=cols,
        AFFINE=weight is not None,
    )
    return out, mean, rstd


def backward(
    d_out: Tensor,
    x: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    with_dx: bool,
    with_dscale: bool,
    with_daffine: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, d_scale [rows, dim] in the dtype of x; d_weight, d_bias [dim] fp32); empty if not asked."""
    d_out, x, scale = as_rows(d_out), as_rows(x), as_rows(scale)
    (rows_total, dim), (rows, cols, warps) = x.shape, _tile(x)
    steps = ceil_div(rows_per_program(rows_total, architecture_of(x)), rows)
    grid = (ceil_div(rows_total, rows * steps),)
    dx, d_scale = (x.new_empty(x.shape if wanted else (0,)) for wanted in (with_dx, with_dscale))
    partial = x.new_empty((*grid, 2, dim) if with_daffine else (0, 2, 0), dtype=torch.float32)
    launch(
        _modulate_backward_kernel,
        grid,
        d_out,
        x,
        scale,
        *(x if t is None else t.contiguous() for t in (weight, bias)),
        mean,
        rstd,
        dx,
        d_scale,
        partial,
        rows_total,
        dim,
        d_out.stride(0),
        x.stride(0),
        scale.stride(0),
        warps=warps,
        ROWS=rows,
        COLS=cols,
        STEPS=steps,
        AFFINE=weight is not None,
        WITH_DX=with_dx,
        WITH_DSCALE=with_dscale,
        WITH_DAFFINE=with_daffine,
    )
    d_weight, d_bias = partial.sum(dim=0).unbind()
    return dx, d_scale, d_weight.clone(), d_bias.clone()


def _gate(
    x: Tensor, gate: Tensor, other: Tensor, is_backward: bool, with_out: bool, with_dgate: bool
) -> tuple[Tensor, Tensor]:
    x, gate, other = as_rows(x), as_rows(gate), as_rows(other)
    rows_total, dim = x.shape
    config = launch_config("adaln_modulation", architecture_of(x), x.dtype, dim)
    rows, cols = tile_shape(config.tile, dim)
    out, d_gate = (x.new_empty(x.shape if wanted else (0,)) for wanted in (with_out, with_dgate))
    launch(
        _gate_kernel,
        (ceil_div(rows_total, rows), ceil_div(dim, cols)),
        x,
        gate,
        other,
        out,
        d_gate,
        rows_total,
        dim,
        x.stride(0),
        gate.stride(0),
        other.stride(0),
        warps=config.warps,
        ROWS=rows,
        COLS=cols,
        IS_BACKWARD=is_backward,
        WITH_OUT=with_out,
        WITH_DGATE=with_dgate,
    )
    return out, d_gate


def gate_residual(x: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
    """[rows, dim] in the dtype of x."""
    return _gate(x, gate, residual, False, True, False)[0]


def gate_backward(
    d_out: Tensor, x: Tensor, gate: Tensor, with_dx: bool, with_dgate: bool
) -> tuple[Tensor, Tensor]:
    """(dx, d_gate); what is not asked for is empty."""
    return _gate(x, gate, d_out, True, with_dx, with_dgate)
