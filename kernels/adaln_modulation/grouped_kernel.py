# mypy: disable-error-code="import-untyped, no-untyped-def, no-untyped-call, untyped-decorator"
"""Triton: a modulation that all rows of a group share; no program crosses the border of a group."""

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
def _forward_kernel(
    residual_ptr,
    delta_ptr,
    shift_ptr,
    scale_ptr,
    summed_ptr,
    out_ptr,
    mean_ptr,
    rstd_ptr,
    chunks,
    group_rows,
    dim,
    residual_stride,
    delta_stride,
    shift_stride,
    scale_stride,
    eps,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    HAS_DELTA: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64) // chunks
    own = (tl.program_id(0) % chunks) * ROWS + tl.arange(0, ROWS)
    rows, cols = group * group_rows + own, tl.arange(0, COLS)
    held = own < group_rows
    inside = held[:, None] & (cols < dim)[None, :]
    x = tl.load(residual_ptr + rows[:, None] * residual_stride + cols, mask=inside, other=0.0).to(tl.float32)
    if HAS_DELTA:
        x += tl.load(delta_ptr + rows[:, None] * delta_stride + cols, mask=inside, other=0.0).to(tl.float32)
        stream = x.to(summed_ptr.dtype.element_ty)
        tl.store(summed_ptr + rows[:, None] * dim + cols, stream, mask=inside)
        x = stream.to(tl.float32)
    mean = tl.sum(x, axis=1) / dim
    centred = tl.where(inside, x - mean[:, None], 0.0)
    # What the rounding of a large sum left over; without it a mean of 1000 costs a digit of the result.
    drift = tl.sum(centred, axis=1) / dim
    centred = tl.where(inside, centred - drift[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / dim + eps)
    scale = tl.load(scale_ptr + group * scale_stride + cols, mask=cols < dim, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + group * shift_stride + cols, mask=cols < dim, other=0.0).to(tl.float32)
    out = centred * rstd[:, None] * (1.0 + scale)[None, :] + shift[None, :]
    tl.store(out_ptr + rows[:, None] * dim + cols, out.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + rows, mean + drift, mask=held)
    tl.store(rstd_ptr + rows, rstd, mask=held)


@triton.jit
def _backward_kernel(
    d_out_ptr,
    d_summed_ptr,
    summed_ptr,
    scale_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    d_delta_ptr,
    partial_ptr,
    chunks,
    group_rows,
    dim,
    d_out_stride,
    d_summed_stride,
    summed_stride,
    scale_stride,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STEPS: tl.constexpr,
    HAS_DSUMMED: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    WITH_DX: tl.constexpr,
    WITH_DMODULATION: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    group = program // chunks
    cols = tl.arange(0, COLS)
    scale = tl.load(scale_ptr + group * scale_stride + cols, mask=cols < dim, other=0.0).to(tl.float32)
    d_shift, d_scale = tl.zeros([COLS], tl.float32), tl.zeros([COLS], tl.float32)
    for step in range(STEPS):
        own = ((program % chunks) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        rows, held = group * group_rows + own, own < group_rows
        inside = held[:, None] & (cols < dim)[None, :]
        d_out = tl.load(d_out_ptr + rows[:, None] * d_out_stride + cols, mask=inside, other=0.0)
        x = tl.load(summed_ptr + rows[:, None] * summed_stride + cols, mask=inside, other=0.0)
        mean = tl.load(mean_ptr + rows, mask=held, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=held, other=0.0)
        d_out = d_out.to(tl.float32)
        hat = tl.where(inside, (x.to(tl.float32) - mean[:, None]) * rstd[:, None], 0.0)
        if WITH_DMODULATION:
            d_shift += tl.sum(d_out, axis=0)
            d_scale += tl.sum(d_out * hat, axis=0)
        if WITH_DX:
            d_hat = d_out * (1.0 + scale)[None, :]
            level = tl.sum(d_hat, axis=1) / dim
            slope = tl.sum(d_hat * hat, axis=1) / dim
            dx = rstd[:, None] * (d_hat - level[:, None] - hat * slope[:, None])
            if HAS_DSUMMED:
                past = tl.load(d_summed_ptr + rows[:, None] * d_summed_stride + cols, mask=inside, other=0.0)
                dx += past.to(tl.float32)
            tl.store(dx_ptr + rows[:, None] * dim + cols, dx.to(dx_ptr.dtype.element_ty), mask=inside)
            if HAS_DELTA:
                d_delta = dx.to(d_delta_ptr.dtype.element_ty)
                tl.store(d_delta_ptr + rows[:, None] * dim + cols, d_delta, mask=inside)
    if WITH_DMODULATION:
        partial_ptr += program * 2 * dim
        tl.store(partial_ptr + cols, d_shift, mask=cols < dim)
        tl.store(partial_ptr + dim + cols, d_scale, mask=cols < dim)


@triton.jit
def _gate_kernel(
    x_ptr,
    gate_ptr,
    other_ptr,
    out_ptr,
    partial_ptr,
    chunks,
    group_rows,
    dim,
    x_stride,
    gate_stride,
    other_stride,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STEPS: tl.constexpr,
    IS_BACKWARD: tl.constexpr,
):
    """`other` is the residual, or in the backward the gradient of the output; `out` is then dx."""
    program = tl.program_id(0).to(tl.int64)
    group = program // chunks
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    gate = tl.load(gate_ptr + group * gate_stride + cols, mask=cols < dim, other=0.0).to(tl.float32)
    d_gate = tl.zeros([COLS], tl.float32)
    for step in range(STEPS):
        own = ((program % chunks) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        rows, inside = group * group_rows + own, (own < group_rows)[:, None] & (cols < dim)[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_stride + cols, mask=inside, other=0.0).to(tl.float32)
        other = tl.load(other_ptr + rows[:, None] * other_stride + cols, mask=inside, other=0.0)
        other = other.to(tl.float32)
        if IS_BACKWARD:
            out = other * gate[None, :]
            d_gate += tl.sum(other * x, axis=0)
        else:
            out = other + gate[None, :] * x
        tl.store(out_ptr + rows[:, None] * dim + cols, out.to(out_ptr.dtype.element_ty), mask=inside)
    if IS_BACKWARD:
        tl.store(partial_ptr + program * dim + cols, d_gate, mask=cols < dim)


def _steps(rows_total: int, group_rows: int, rows: int, architecture: int) -> tuple[int, int]:
    """(tiles below one another in a program, programs per group) of a kernel that sums over rows."""
    most = max(1, ceil_div(group_rows, rows))
    steps = min(ceil_div(rows_per_program(rows_total, architecture), rows), most)
    return steps, ceil_div(group_rows, rows * steps)


def forward(
    residual: Tensor, delta: Tensor | None, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(summed, empty without a delta; out in `dtype`; mean and rstd [rows] fp32)."""
    residual, shift, scale = as_rows(residual), as_rows(shift), as_rows(scale)
    added = residual if delta is None else as_rows(delta)
    (rows_total, dim), groups = residual.shape, shift.shape[0]
    config = launch_config("adaln_modulation", architecture_of(residual), residual.dtype, dim)
    cols = next_power_of_two(dim)
    rows, group_rows = max(1, config.tile // cols), rows_total // max(groups, 1)
    chunks = ceil_div(group_rows, rows)
    out = residual.new_empty(residual.shape, dtype=dtype)
    summed = residual.new_empty((0,) if delta is None else residual.shape)
    mean, rstd = (residual.new_empty(rows_total, dtype=torch.float32) for _ in range(2))
    launch(
        _forward_kernel,
        (groups * chunks,),
        residual,
        added,
        shift,
        scale,
        out if delta is None else summed,
        out,
        mean,
        rstd,
        chunks,
        group_rows,
        dim,
        residual.stride(0),
        added.stride(0),
        shift.stride(0),
        scale.stride(0),
        eps,
        warps=config.warps,
        ROWS=rows,
        COLS=cols,
        HAS_DELTA=delta is not None,
    )
    return summed, out, mean, rstd


def backward(
    d_out: Tensor,
    d_summed: Tensor | None,
    summed: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    delta_dtype: torch.dtype | None,
    with_dx: bool,
    with_dmodulation: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx like summed, d_delta [rows, dim], sums [groups, 2, dim] fp32); empty if not asked."""
    d_out, summed, scale = as_rows(d_out), as_rows(summed), as_rows(scale)
    past = d_out if d_summed is None else as_rows(d_summed)
    (rows_total, dim), groups, architecture = summed.shape, scale.shape[0], architecture_of(summed)
    config = launch_config("adaln_modulation", architecture, summed.dtype, dim)
    cols = next_power_of_two(dim)
    rows, group_rows = max(1, config.tile // cols), rows_total // max(groups, 1)
    steps, chunks = _steps(rows_total, group_rows, rows, architecture)
    dx = summed.new_empty(summed.shape if with_dx else (0,))
    has_delta = with_dx and delta_dtype is not None
    d_delta = summed.new_empty(summed.shape if has_delta else (0,), dtype=delta_dtype)
    shape = (groups, chunks, 2, dim) if with_dmodulation else (0, 1, 2, 0)
    partial = summed.new_empty(shape, dtype=torch.float32)
    launch(
        _backward_kernel,
        (groups * chunks,),
        d_out,
        past,
        summed,
        scale,
        mean,
        rstd,
        dx,
        d_delta,
        partial,
        chunks,
        group_rows,
        dim,
        d_out.stride(0),
        past.stride(0),
        summed.stride(0),
        scale.stride(0),
        warps=config.warps,
        ROWS=rows,
        COLS=cols,
        STEPS=steps,
        HAS_DSUMMED=d_summed is not None,
        HAS_DELTA=has_delta,
        WITH_DX=with_dx,
        WITH_DMODULATION=with_dmodulation,
    )
    return dx, d_delta, partial.sum(dim=1)


def _gate(
    x: Tensor, gate: Tensor, other: Tensor, dtype: torch.dtype, is_backward: bool
) -> tuple[Tensor, Tensor]:
    x, gate, other = as_rows(x), as_rows(gate), as_rows(other)
    (rows_total, dim), groups, architecture = x.shape, gate.shape[0], architecture_of(x)
    config = launch_config("adaln_modulation", architecture, x.dtype, dim)
    rows, cols = tile_shape(config.tile, min(dim, 512))
    group_rows = rows_total // max(groups, 1)
    steps, chunks = 1, ceil_div(group_rows, rows)
    if is_backward:
        steps, chunks = _steps(rows_total * ceil_div(dim, cols), group_rows, rows, architecture)
    out = x.new_empty(x.shape, dtype=dtype)
    partial = x.new_empty((groups, chunks, dim) if is_backward else (0, 1, dim), dtype=torch.float32)
    launch(
        _gate_kernel,
        (groups * chunks, ceil_div(dim, cols)),
        x,
        gate,
        other,
        out,
        partial,
        chunks,
        group_rows,
        dim,
        x.stride(0),
        gate.stride(0),
        other.stride(0),
        warps=config.warps,
        ROWS=rows,
        COLS=cols,
        STEPS=steps,
        IS_BACKWARD=is_backward,
    )
    return out, partial


def gate_residual(x: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
    """[rows, dim] in the dtype of the residual."""
    return _gate(x, gate, residual, residual.dtype, False)[0]


def gate_backward(d_out: Tensor, x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """(dx like x, d_gate [groups, dim] fp32)."""
    dx, partial = _gate(x, gate, d_out, x.dtype, True)
    return dx, partial.sum(dim=1)
