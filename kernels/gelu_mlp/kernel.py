# mypy: disable-error-code="import-untyped, no-untyped-def, no-untyped-call, untyped-decorator"
"""Triton: tiles of rows and columns; the backward walks down its columns and sums them in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from reca.kernels._launch import as_rows, column_tiles, launch


@triton.jit
def _normal_below(x):
    """The normal distribution at x, to the precision of fp32 and within 2e-5 of its lower tail down to -6.

    The library's erf takes 40 instructions per element; by arithmetic an H200 has time for 28 while it moves
    4 bytes. Here log2 Phi(-|x|) is a polynomial, a minimax fit to -6 that falls on beyond; a test holds both.
    """
    depth = tl.abs(x)
    power = -2.88461132e-08 * depth + 8.57985426e-07
    power = power * depth - 1.09283458e-05
    power = power * depth + 7.59509623e-05
    power = power * depth - 0.000276641253
    power = power * depth - 9.33875147e-06
    power = power * depth + 0.00696212699
    power = power * depth - 0.0524539343
    power = power * depth - 0.459216007
    power = power * depth - 1.15110483
    tail = tl.exp2(power * depth - 0.99999999)
    return tl.where(x < 0.0, tail, 1.0 - tail)


@triton.jit
def _sigmoid(z):
    """(s, s (1 - s)) of s = 1 / (1 + 2^-z), without overflow and without the cancellation of 1 - s."""
    below = tl.exp2(-tl.abs(z))
    share = 1.0 / (1.0 + below)
    return tl.where(z < 0.0, below * share, share), below * share * share


@triton.jit
def _share_and_slope(pre, ACTIVATION: tl.constexpr):
    """activation = pre * share, and its derivative; sigmoids are powers of two, the ln 2 in their factors."""
    if ACTIVATION == "gelu":
        share = _normal_below(pre)
        slope = share + pre * (0.3989422804014327 * tl.exp2(-0.7213475204444817 * (pre * pre)))
    elif ACTIVATION == "gelu_tanh":
        square = pre * pre
        share, spread = _sigmoid(pre * (2.302208198144325 + 0.10294323958002349 * square))
        slope = share + pre * spread * (1.5957691216057308 + 0.21406444881780078 * square)
    elif ACTIVATION == "gelu_sigmoid":
        share, spread = _sigmoid(2.4554669595930155 * pre)
        slope = share + pre * spread * 1.702
    else:
        share, spread = _sigmoid(1.4426950408889634 * pre)
        slope = share + pre * spread
    return share, slope


@triton.jit
def _forward_kernel(
    x_ptr,
    bias_ptr,
    out_ptr,
    rows_total,
    width,
    x_stride,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (rows < rows_total)[:, None] & (cols < width)[None, :]
    bias = tl.load(bias_ptr + cols, mask=cols < width, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + rows[:, None] * x_stride + cols, mask=inside, other=0.0)
    pre = x.to(tl.float32) + bias[None, :]
    share, _ = _share_and_slope(pre, ACTIVATION)
    tl.store(out_ptr + rows[:, None] * width + cols, (pre * share).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    d_out_ptr,
    x_ptr,
    bias_ptr,
    dx_ptr,
    out_ptr,
    partial_ptr,
    rows_total,
    width,
    d_out_stride,
    x_stride,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STEPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WITH_OUT: tl.constexpr,
    WITH_DBIAS: tl.constexpr,
):
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    bias = tl.load(bias_ptr + cols, mask=cols < width, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, COLS], tl.float32)
    for step in range(STEPS):
        rows = (tl.program_id(0).to(tl.int64) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        inside = (rows < rows_total)[:, None] & (cols < width)[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_stride + cols, mask=inside, other=0.0)
        d_out = tl.load(d_out_ptr + rows[:, None] * d_out_stride + cols, mask=inside, other=0.0)
        pre = x.to(tl.float32) + bias[None, :]
        share, slope = _share_and_slope(pre, ACTIVATION)
        dx = d_out.to(tl.float32) * slope
        tl.store(dx_ptr + rows[:, None] * width + cols, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if WITH_OUT:
            out = (pre * share).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + rows[:, None] * width + cols, out, mask=inside)
        if WITH_DBIAS:
            total += dx
    if WITH_DBIAS:
        partial_ptr += tl.program_id(0).to(tl.int64) * width
        tl.store(partial_ptr + cols, tl.sum(total, axis=0), mask=cols < width)


def forward(x: Tensor, bias: Tensor, activation: str) -> Tensor:
    """[rows, width] in the dtype of x [rows, width]."""
    x = as_rows(x)
    grid, rows, cols, _, warps = column_tiles("gelu_mlp", x, reduces=False)
    out = x.new_empty(x.shape)
    launch(
        _forward_kernel,
        grid,
        x,
        bias.contiguous(),
        out,
        *x.shape,
        x.stride(0),
        warps=warps,
        ROWS=rows,
        COLS=cols,
        ACTIVATION=activation,
    )
    return out


def backward(
    d_out: Tensor, x: Tensor, bias: Tensor, activation: str, with_out: bool, with_dbias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx [rows, width]; the activation again; d_bias [width]); what is not asked for is empty."""
    d_out, x = as_rows(d_out), as_rows(x)
    grid, rows, cols, steps, warps = column_tiles("gelu_mlp", x, reduces=with_dbias)
    dx, out = x.new_empty(x.shape), x.new_empty(x.shape if with_out else (0,))
    partial = x.new_empty((grid[0], x.shape[1]) if with_dbias else (0, 0), dtype=torch.float32)
    launch(
        _backward_kernel,
        grid,
        d_out,
        x,
        bias.contiguous(),
        dx,
        out,
        partial,
        *x.shape,
        d_out.stride(0),
        x.stride(0),
        warps=warps,
        ROWS=rows,
        COLS=cols,
        STEPS=steps,
        ACTIVATION=activation,
        WITH_OUT=with_out,
        WITH_DBIAS=with_dbias,
    )
    return dx, out, partial.sum(dim=0).to(bias.dtype)
