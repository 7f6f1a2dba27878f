# mypy: disable-error-code="import-untyped, no-untyped-def, no-untyped-call, untyped-decorator"
"""Triton: forward over rows of the sequence, each written once; backward over tokens, which it gathers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from reca.kernels._launch import as_rows, column_tiles, launch


@triton.jit
def _place_kernel(
    out_ptr,
    projected_ptr,
    bias_ptr,
    position_ptr,
    position_ids_ptr,
    destination_ptr,
    source_ptr,
    rows_total,
    tokens,
    width,
    projected_stride,
    destination_stride,
    num_positions,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    HAS_POSITION: tl.constexpr,
    HAS_DESTINATION: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (rows < rows_total)[:, None] & (cols < width)[None, :]
    token = rows
    if HAS_DESTINATION:
        token = tl.load(source_ptr + rows, mask=rows < rows_total, other=-1).to(tl.int64)
    known = (token >= 0) & (token < tokens) & (rows < rows_total)
    present = known[:, None] & (cols < width)[None, :]
    projected_at = projected_ptr + token[:, None] * projected_stride + cols
    out = tl.load(projected_at, mask=present, other=float("nan")).to(tl.float32)
    out += tl.load(bias_ptr + cols, mask=cols < width, other=0.0).to(tl.float32)[None, :]
    if HAS_POSITION:
        place = tl.load(position_ids_ptr + token, mask=known, other=-1)
        placed = known & (place >= 0) & (place < num_positions)
        position_at = position_ptr + place[:, None] * width + cols
        position_mask = placed[:, None] & (cols < width)[None, :]
        out += tl.load(position_at, mask=position_mask, other=float("nan")).to(tl.float32)
    if HAS_DESTINATION:
        others = inside & (token < 0)[:, None]
        destination_at = destination_ptr + rows[:, None] * destination_stride + cols
        destination = tl.load(destination_at, mask=others, other=0.0).to(tl.float32)
        out = tl.where(others, destination, out)
    tl.store(out_ptr + rows[:, None] * width + cols, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gather_kernel(
    d_out_ptr,
    rows_ptr,
    source_ptr,
    d_projected_ptr,
    partial_ptr,
    tokens,
    width,
    rows_total,
    d_out_stride,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STEPS: tl.constexpr,
    WITH_DBIAS: tl.constexpr,
):
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    total = tl.zeros([ROWS, COLS], tl.float32)
    for step in range(STEPS):
        token = (tl.program_id(0).to(tl.int64) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        row = tl.load(rows_ptr + token, mask=token < tokens, other=-1)
        found = tl.load(source_ptr + row, mask=(row >= 0) & (row < rows_total), other=-1)
        present = (found == token)[:, None] & (cols < width)[None, :]
        d_out = tl.load(d_out_ptr + row[:, None] * d_out_stride + cols, mask=present, other=0.0)
        inside = (token < tokens)[:, None] & (cols < width)[None, :]
        d_projected = d_out.to(tl.float32)
        d_projected_at = d_projected_ptr + token[:, None] * width + cols
        tl.store(d_projected_at, d_projected.to(d_projected_ptr.dtype.element_ty), mask=inside)
        if WITH_DBIAS:
            total += d_projected
    if WITH_DBIAS:
        partial_ptr += tl.program_id(0).to(tl.int64) * width
        tl.store(partial_ptr + cols, tl.sum(total, axis=0), mask=cols < width)


def place(
    projected: Tensor,
    bias: Tensor,
    position: Tensor | None,
    position_ids: Tensor | None,
    destination: Tensor | None,
    source: Tensor | None,
) -> Tensor:
    """[rows, width] in the dtype of the destination, or [tokens, width] in that of `projected`."""
    projected = as_rows(projected)
    under = projected if destination is None else as_rows(destination)
    out = under.new_empty(under.shape)
    grid, rows, cols, _, warps = column_tiles("embedding_projection", under, reduces=False)
    launch(
        _place_kernel,
        grid,
        out,
        projected,
        bias.contiguous(),
        bias if position is None else position.contiguous(),
        bias if position_ids is None else position_ids.contiguous(),
        under,
        bias if source is None else source,
        under.shape[0],
        *projected.shape,
        projected.stride(0),
        under.stride(0),
        0 if position is None else position.shape[0],
        warps=warps,
        ROWS=rows,
        COLS=cols,
        HAS_POSITION=position is not None,
        HAS_DESTINATION=destination is not None,
    )
    return out


def place_backward(
    d_out: Tensor, bias: Tensor, rows: Tensor, source: Tensor, with_dbias: bool
) -> tuple[Tensor, Tensor]:
    """(d_projected [tokens, width] in the dtype of the bias; d_bias [width], empty if not asked for)."""
    d_out, rows = as_rows(d_out), rows.contiguous()
    d_projected = bias.new_empty(rows.shape[0], d_out.shape[1])
    grid, tile_rows, cols, steps, warps = column_tiles(
        "embedding_projection", d_projected, reduces=with_dbias
    )
    shape = (grid[0], d_out.shape[1]) if with_dbias else (0, 0)
    partial = bias.new_empty(shape, dtype=torch.float32)
    launch(
        _gather_kernel,
        grid,
        d_out,
        rows,
        source,
        d_projected,
        partial,
        *d_projected.shape,
        d_out.shape[0],
        d_out.stride(0),
        warps=warps,
        ROWS=tile_rows,
        COLS=cols,
        STEPS=steps,
        WITH_DBIAS=with_dbias,
    )
    return d_projected, partial.sum(dim=0).to(bias.dtype)
