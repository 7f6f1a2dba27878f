# mypy: disable-error-code="import-untyped, no-untyped-def, no-untyped-call, untyped-decorator"
"""Triton: an element per lane; four neighbours share one Philox counter."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from reca.kernels._dropout import keep_threshold
from reca.kernels._launch import (
    architecture_of,
    as_rows,
    ceil_div,
    launch,
    launch_config,
    next_power_of_two,
)
from reca.kernels._triton_dropout import folded_words, sample_of

# Widths are multiples of 256 more often than powers of two: 1,280, 3,072, 5,120.
_COLS = 256


@triton.jit
def _dropout_kernel(
    x_ptr,
    residual_ptr,
    cu_lengths_ptr,
    samples_ptr,
    step_ptr,
    out_ptr,
    rows_total,
    width,
    num_samples,
    x_stride,
    residual_stride,
    key,
    threshold,
    scale,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SAMPLES: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (rows < rows_total)[:, None] & (cols < width)[None, :]
    sample = sample_of(cu_lengths_ptr, rows, num_samples, SAMPLES)
    first = tl.load(cu_lengths_ptr + sample).to(tl.int64)
    held = (sample < num_samples) & (rows >= first)
    sample_id = tl.load(samples_ptr + sample, mask=held, other=0)
    blocks = tl.program_id(1) * (COLS // 4) + tl.arange(0, COLS // 4)
    blocks = (rows - first)[:, None] * (width // 4) + blocks[None, :]
    words = folded_words(key, tl.load(step_ptr), sample_id[:, None], (blocks & 0xFFFFFFFF).to(tl.uint32))
    x = tl.load(x_ptr + rows[:, None] * x_stride + cols, mask=inside, other=0.0).to(tl.float32)
    out = tl.where(words >= threshold, x * scale, 0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + rows[:, None] * residual_stride + cols, mask=inside, other=0.0)
        out += residual.to(tl.float32)
    out = tl.where(held[:, None], out, float("nan"))
    tl.store(out_ptr + rows[:, None] * width + cols, out.to(out_ptr.dtype.element_ty), mask=inside)


def forward(
    x: Tensor,
    residual: Tensor | None,
    cu_lengths: Tensor,
    samples: Tensor,
    step: Tensor,
    key: int,
    rate: float,
) -> Tensor:
    """[rows, width] in the dtype of x [rows, width]."""
    x = as_rows(x)
    added = x if residual is None else as_rows(residual)
    rows_total, width = x.shape
    config = launch_config("dropout", architecture_of(x), x.dtype, width)
    cols = min(_COLS, next_power_of_two(width))
    rows = config.tile // cols
    out = x.new_empty(x.shape)
    launch(
        _dropout_kernel,
        (ceil_div(rows_total, rows), ceil_div(width, cols)),
        x,
        added,
        cu_lengths.contiguous(),
        samples.contiguous(),
        step,
        out,
        rows_total,
        width,
        samples.shape[0],
        x.stride(0),
        added.stride(0),
        key,
        keep_threshold(rate),
        1 / (1 - rate),
        warps=config.warps,
        ROWS=rows,
        COLS=cols,
        SAMPLES=next_power_of_two(samples.shape[0]),
        HAS_RESIDUAL=residual is not None,
    )
    return out
