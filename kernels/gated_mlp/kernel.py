# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"
"""Triton: an element of gate and its element of up per lane; the backward recomputes the product."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from reca.kernels._launch import architecture_of, as_rows, ceil_div, launch, launch_config, tile_shape


@triton.jit
def _forward_kernel(
    gate_up_ptr, product_ptr, rows_total, inner, gate_up_stride, ROWS: tl.constexpr, COLS: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (rows < rows_total)[:, None] & (cols < inner)[None, :]
    gate_ptr = gate_up_ptr + rows[:, None] * gate_up_stride + cols
    gate = tl.load(gate_ptr, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + inner, mask=inside, other=0.0).to(tl.float32)
    product = gate * tl.sigmoid(gate) * up
    tl.store(
        product_ptr + rows[:, None] * inner + cols, product.to(product_ptr.dtype.element_ty), mask=inside
    )


@triton.jit
def _backward_kernel(
    d_product_ptr,
    gate_up_ptr,
    d_gate_up_ptr,
    product_ptr,
    rows_total,
    inner,
    d_product_stride,
    gate_up_stride,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WITH_PRODUCT: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (rows < rows_total)[:, None] & (cols < inner)[None, :]
    gate_ptr = gate_up_ptr + rows[:, None] * gate_up_stride + cols
    gate = tl.load(gate_ptr, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + inner, mask=inside, other=0.0).to(tl.float32)
    d_product_rows = d_product_ptr + rows[:, None] * d_product_stride
    d_product = tl.load(d_product_rows + cols, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    d_gate = d_product * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    d_gate_ptr = d_gate_up_ptr + rows[:, None] * (2 * inner) + cols
    tl.store(d_gate_ptr, d_gate.to(d_gate_up_ptr.dtype.element_ty), mask=inside)
    tl.store(d_gate_ptr + inner, (d_product * silu).to(d_gate_up_ptr.dtype.element_ty), mask=inside)
    if WITH_PRODUCT:
        product = (silu * up).to(product_ptr.dtype.element_ty)
        tl.store(product_ptr + rows[:, None] * inner + cols, product, mask=inside)


def _geometry(gate_up: Tensor) -> tuple[tuple[int, int], int, int, int]:
    """(grid, rows, columns, warps) over the [rows, inner] product."""
    inner = gate_up.shape[1] // 2
    config = launch_config("gated_mlp", architecture_of(gate_up), gate_up.dtype, inner)
    rows, cols = tile_shape(config.tile, inner)
    return (ceil_div(gate_up.shape[0], rows), ceil_div(inner, cols)), rows, cols, config.warps


def forward(gate_up: Tensor) -> Tensor:
    """product [rows, inner] of gate_up [rows, 2 * inner]."""
    gate_up = as_rows(gate_up)
    grid, rows, cols, warps = _geometry(gate_up)
    rows_total, inner = gate_up.shape[0], gate_up.shape[1] // 2
    product = gate_up.new_empty(rows_total, inner)
    launch(
        _forward_kernel,
        grid,
        gate_up,
        product,
        rows_total,
        inner,
        gate_up.stride(0),
        warps=warps,
        ROWS=rows,
        COLS=cols,
    )
    return product


def backward(d_product: Tensor, gate_up: Tensor, with_product: bool) -> tuple[Tensor, Tensor]:
    """(d_gate_up [rows, 2 * inner]; the product again, or empty if not asked for)."""
    d_product, gate_up = as_rows(d_product), as_rows(gate_up)
    grid, rows, cols, warps = _geometry(gate_up)
    d_gate_up = gate_up.new_empty(gate_up.shape)
    product = gate_up.new_empty(d_product.shape if with_product else (0,))
    launch(
        _backward_kernel,
        grid,
        d_product,
        gate_up,
        d_gate_up,
        product,
        *d_product.shape,
        d_product.stride(0),
        gate_up.stride(0),
        warps=warps,
        ROWS=rows,
        COLS=cols,
        WITH_PRODUCT=with_product,
    )
    return d_gate_up, product
