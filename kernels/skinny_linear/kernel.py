# mypy: disable-error-code="import-untyped, no-untyped-def, no-untyped-call, untyped-decorator"
"""Triton: weights stream once through tensor cores that the few rows leave idle; a second stage adds splits.

Both directions read the same tiles: outputs by inputs for the product, the other way for the gradient of x.
"""

from __future__ import annotations

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
    multiprocessors,
    next_power_of_two,
)
from reca.kernels.skinny_linear.reference import NF4_BLOCK, Fp8Weight, Nf4Weight

_OUTS = 64
# Blocks of 64 weights per step and row: 64 bytes, two sectors.
_BLOCKS = 2
# From sm_89 on the hardware converts e4m3; before, and in the interpreter, integer arithmetic does.
_FP8_SINCE = 89


@triton.jit
def _x_tile(x_ptr, reds, red_total, red_stride, rows_total, x_stride, ROWS: tl.constexpr):
    """[reduced, ROWS] of x: the columns that `reds` counts, `red_stride` apart; 0 outside."""
    rows = tl.arange(0, ROWS)
    inside = (reds < red_total)[:, None] & (rows < rows_total)[None, :]
    at = x_ptr + rows.to(tl.int64)[None, :] * x_stride + reds[:, None] * red_stride
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def _finish(
    out_ptr, bias_ptr, sums, outs, outs_total, rows_total, ROWS: tl.constexpr, HAS_BIAS: tl.constexpr
):
    """Store [outs, ROWS] sums as [rows, outs] of this split."""
    rows = tl.arange(0, ROWS)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + outs, mask=outs < outs_total, other=0.0).to(tl.float32)
        sums += bias[:, None]
    rows_of_split = tl.program_id(1).to(tl.int64) * rows_total + rows
    inside = (outs < outs_total)[:, None] & (rows < rows_total)[None, :]
    at = out_ptr + rows_of_split[None, :] * outs_total + outs[:, None]
    tl.store(at, sums.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _product_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    rows_total,
    outs_total,
    reds_total,
    x_stride,
    out_stride,
    red_stride,
    steps,
    ROWS: tl.constexpr,
    OUTS: tl.constexpr,
    REDS: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_FP8: tl.constexpr,
    CONVERTS_FP8: tl.constexpr,
    IS_TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    outs = tl.program_id(0).to(tl.int64) * OUTS + tl.arange(0, OUTS)
    sums = tl.zeros([OUTS, ROWS], tl.float32)
    for step in range(0, steps):
        reds = (tl.program_id(1).to(tl.int64) * steps + step) * REDS + tl.arange(0, REDS)
        inside = (outs < outs_total)[:, None] & (reds < reds_total)[None, :]
        weight_at = weight_ptr + outs[:, None] * out_stride + reds[None, :] * red_stride
        weight = tl.load(weight_at, mask=inside, other=0)
        x = _x_tile(x_ptr, reds, reds_total, 1, rows_total, x_stride, ROWS)
        if IS_FP8:
            if CONVERTS_FP8:
                weight = weight.to(tl.float8e4nv, bitcast=True).to(tl.float16)
            else:
                # Sign, exponent and mantissa in their fp16 places: the value / 256, subnormals included.
                bits = weight.to(tl.uint16)
                weight = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
            weight = weight.to(tl.float32).to(x_ptr.dtype.element_ty)
            if IS_TRANSPOSED:
                scale = tl.load(scale_ptr + reds, mask=reds < reds_total, other=0.0)
                x = (x.to(tl.float32) * scale[:, None]).to(x_ptr.dtype.element_ty)
        sums = tl.dot(weight, x, sums, input_precision=PRECISION)
    if IS_FP8:
        if not CONVERTS_FP8:
            sums *= 256.0
        if not IS_TRANSPOSED:
            sums *= tl.load(scale_ptr + outs, mask=outs < outs_total, other=0.0)[:, None]
    _finish(out_ptr, bias_ptr, sums, outs, outs_total, rows_total, ROWS, HAS_BIAS)


@triton.jit
def _nf4_tile(
    packed_ptr,
    absmax_ptr,
    table_ptr,
    nested_absmax_ptr,
    nested_table_ptr,
    offset_ptr,
    outs,
    outs_total,
    first_block,
    blocks_total,
    OUTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    IS_NESTED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Even and odd weights of BLOCKS blocks of 64 inputs, [OUTS, 32 * BLOCKS] each; 0 outside."""
    blocks = first_block + tl.arange(0, BLOCKS)
    inside = (outs < outs_total)[:, None] & (blocks < blocks_total)[None, :]
    at = outs[:, None] * blocks_total + blocks[None, :]
    if IS_NESTED:
        code = tl.load(absmax_ptr + at, mask=inside, other=0).to(tl.int32)
        largest = tl.load(nested_absmax_ptr + at // 256, mask=inside, other=0.0)
        scale = tl.load(nested_table_ptr + code) * largest + tl.load(offset_ptr)
    else:
        scale = tl.load(absmax_ptr + at, mask=inside, other=0.0)
    pairs = tl.arange(0, 32 * BLOCKS)
    inside = (outs < outs_total)[:, None] & (first_block * 32 + pairs < blocks_total * 32)[None, :]
    codes_at = packed_ptr + (outs[:, None] * blocks_total + first_block) * 32 + pairs[None, :]
    codes = tl.load(codes_at, mask=inside, other=0).to(tl.int32)
    wide = tl.reshape(tl.broadcast_to(scale[:, :, None], [OUTS, BLOCKS, 32]), [OUTS, 32 * BLOCKS])
    even = tl.load(table_ptr + (codes >> 4)) * wide
    odd = tl.load(table_ptr + (codes & 15)) * wide
    return even.to(DTYPE), odd.to(DTYPE)


@triton.jit
def _nf4_kernel(
    x_ptr,
    packed_ptr,
    absmax_ptr,
    table_ptr,
    nested_absmax_ptr,
    nested_table_ptr,
    offset_ptr,
    bias_ptr,
    out_ptr,
    rows_total,
    outs_total,
    blocks_total,
    x_stride,
    steps,
    ROWS: tl.constexpr,
    OUTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_NESTED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    outs = tl.program_id(0).to(tl.int64) * OUTS + tl.arange(0, OUTS)
    sums = tl.zeros([OUTS, ROWS], tl.float32)
    for step in range(0, steps):
        block = (tl.program_id(1).to(tl.int64) * steps + step) * BLOCKS
        even, odd = _nf4_tile(
            packed_ptr,
            absmax_ptr,
            table_ptr,
            nested_absmax_ptr,
            nested_table_ptr,
            offset_ptr,
            outs,
            outs_total,
            block,
            blocks_total,
            OUTS,
            BLOCKS,
            IS_NESTED,
            x_ptr.dtype.element_ty,
        )
        pairs = block * 32 + tl.arange(0, 32 * BLOCKS)
        x = _x_tile(x_ptr, pairs, blocks_total * 32, 2, rows_total, x_stride, ROWS)
        sums = tl.dot(even, x, sums, input_precision=PRECISION)
        x = _x_tile(x_ptr + 1, pairs, blocks_total * 32, 2, rows_total, x_stride, ROWS)
        sums = tl.dot(odd, x, sums, input_precision=PRECISION)
    _finish(out_ptr, bias_ptr, sums, outs, outs_total, rows_total, ROWS, HAS_BIAS)


@triton.jit
def _nf4_transposed_kernel(
    x_ptr,
    packed_ptr,
    absmax_ptr,
    table_ptr,
    nested_absmax_ptr,
    nested_table_ptr,
    offset_ptr,
    out_ptr,
    rows_total,
    outs_total,
    blocks_total,
    x_stride,
    steps,
    ROWS: tl.constexpr,
    OUTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_NESTED: tl.constexpr,
):
    """Here `outs` of the weight are reduced, and its inputs are the columns of the result."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS
    even_sums = tl.zeros([32 * BLOCKS, ROWS], tl.float32)
    odd_sums = tl.zeros([32 * BLOCKS, ROWS], tl.float32)
    for step in range(0, steps):
        outs = (tl.program_id(1).to(tl.int64) * steps + step) * OUTS + tl.arange(0, OUTS)
        even, odd = _nf4_tile(
            packed_ptr,
            absmax_ptr,
            table_ptr,
            nested_absmax_ptr,
            nested_table_ptr,
            offset_ptr,
            outs,
            outs_total,
            block,
            blocks_total,
            OUTS,
            BLOCKS,
            IS_NESTED,
            x_ptr.dtype.element_ty,
        )
        x = _x_tile(x_ptr, outs, outs_total, 1, rows_total, x_stride, ROWS)
        even_sums = tl.dot(tl.trans(even), x, even_sums, input_precision=PRECISION)
        odd_sums = tl.dot(tl.trans(odd), x, odd_sums, input_precision=PRECISION)
    sums = tl.reshape(tl.permute(tl.join(even_sums, odd_sums), [0, 2, 1]), [64 * BLOCKS, ROWS])
    cols = block * 64 + tl.arange(0, 64 * BLOCKS)
    _finish(out_ptr, out_ptr, sums, cols, blocks_total * 64, rows_total, ROWS, False)


@triton.jit
def _combine_kernel(
    partial_ptr, bias_ptr, out_ptr, size, width, splits, COLS: tl.constexpr, HAS_BIAS: tl.constexpr
):
    """Sum of the splits, in their order."""
    at = tl.program_id(0).to(tl.int64) * COLS + tl.arange(0, COLS)
    total = tl.zeros([COLS], tl.float32)
    for _ in range(0, splits):
        total += tl.load(partial_ptr + at, mask=at < size, other=0.0)
        partial_ptr += size
    if HAS_BIAS:
        total += tl.load(bias_ptr + at % width, mask=at < size, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=at < size)


def _split(blocks: int, steps: int, architecture: int) -> tuple[int, int]:
    """(splits, steps of each): about two programs per multiprocessor, none without a step."""
    programs = 2 * multiprocessors(architecture)
    steps_each = max(1, ceil_div(steps, max(1, programs // max(blocks, 1))))
    return max(1, ceil_div(steps, steps_each)), steps_each


def _combine(partial: Tensor, bias: Tensor | None, out: Tensor) -> None:
    config = launch_config("skinny_linear", architecture_of(out), out.dtype, out.shape[1])
    # Eight columns per thread: one 128-bit store of 16-bit results.
    cols = 8 * 32 * config.warps
    launch(
        _combine_kernel,
        (ceil_div(out.numel(), cols),),
        partial,
        partial if bias is None else bias.contiguous(),
        out,
        out.numel(),
        out.shape[1],
        partial.shape[0],
        warps=config.warps,
        COLS=cols,
        HAS_BIAS=bias is not None,
    )


def _launch_plain(
    grid: tuple[int, int],
    x: Tensor,
    weight: Tensor | Fp8Weight,
    bias: Tensor | None,
    out: Tensor,
    transposed: bool,
    options: dict[str, Any],
) -> None:
    matrix = (weight.values if isinstance(weight, Fp8Weight) else weight).contiguous()
    launch(
        _product_kernel,
        grid,
        x,
        matrix.view(torch.uint8) if isinstance(weight, Fp8Weight) else matrix,
        weight.scale.contiguous() if isinstance(weight, Fp8Weight) else x,
        x if bias is None else bias.contiguous(),
        out,
        x.shape[0],
        *(matrix.shape[::-1] if transposed else matrix.shape),
        x.stride(0),
        *(matrix.stride()[::-1] if transposed else matrix.stride()),
        options.pop("steps"),
        IS_FP8=isinstance(weight, Fp8Weight),
        CONVERTS_FP8=architecture_of(x) >= _FP8_SINCE,
        IS_TRANSPOSED=transposed,
        HAS_BIAS=bias is not None,
        **options,
    )


def _launch_nf4(
    grid: tuple[int, int],
    x: Tensor,
    weight: Nf4Weight,
    bias: Tensor | None,
    out: Tensor,
    transposed: bool,
    options: dict[str, Any],
) -> None:
    parts = [x if part is None else part.contiguous() for part in weight]
    num_outs, half_ins = weight.packed.shape
    sizes = (x.shape[0], num_outs, half_ins // 32, x.stride(0), options.pop("steps"))
    options |= {"BLOCKS": _BLOCKS, "IS_NESTED": weight.nested_absmax is not None}
    if transposed:
        launch(_nf4_transposed_kernel, grid, x, *parts, out, *sizes, **options)
    else:
        added = x if bias is None else bias.contiguous()
        launch(_nf4_kernel, grid, x, *parts, added, out, *sizes, HAS_BIAS=bias is not None, **options)


def product(
    x: Tensor, weight: Tensor | Fp8Weight | Nf4Weight, bias: Tensor | None, transposed: bool
) -> Tensor:
    """[rows, out], or [rows, in] if transposed, in the dtype of x [rows, in], or [rows, out]."""
    x, architecture = as_rows(x), architecture_of(x)
    is_nf4 = isinstance(weight, Nf4Weight)
    matrix = weight if isinstance(weight, Tensor) else weight[0]
    shape = (matrix.shape[0], matrix.shape[1] * (2 if is_nf4 else 1))
    width, reduced = shape[::-1] if transposed else shape
    config = launch_config("skinny_linear", architecture, x.dtype, reduced)
    tile = (_OUTS, NF4_BLOCK * _BLOCKS) if is_nf4 else (_OUTS, max(16, config.tile // _OUTS))
    outs, reds = tile[::-1] if transposed and is_nf4 else tile
    blocks = ceil_div(width, outs)
    splits, steps = _split(blocks, ceil_div(reduced, reds), architecture)
    out = x.new_empty(x.shape[0], width)
    partial = out if splits == 1 else x.new_empty(splits, *out.shape, dtype=torch.float32)
    grid, added = (blocks if len(x) else 0, splits), bias if splits == 1 else None
    options = {
        "steps": steps,
        "warps": config.warps,
        "ROWS": max(16, next_power_of_two(len(x))),
        "OUTS": _OUTS,
        # A choice for fp32 only, of which every bit counts.
        "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32",
    }
    if isinstance(weight, Nf4Weight):
        _launch_nf4(grid, x, weight, added, partial, transposed, options)
    else:
        _launch_plain(grid, x, weight, added, partial, transposed, options | {"REDS": reds})
    if splits > 1:
        _combine(partial, bias, out)
    return out
