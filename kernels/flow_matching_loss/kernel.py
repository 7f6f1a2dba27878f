# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"
"""Triton: one pass over prediction, clean and noise gives the partial sums of the loss and its gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from reca.kernels._launch import architecture_of, as_rows, ceil_div, launch, launch_config, tile_shape


@triton.jit
def _forward_kernel(
    prediction_ptr,
    clean_ptr,
    noise_ptr,
    mask_ptr,
    partial_ptr,
    gradient_ptr,
    tokens,
    dim,
    prediction_stride,
    clean_stride,
    noise_stride,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    weight = tl.load(mask_ptr + rows, mask=rows < tokens, other=0.0)
    # Rows that do not count are not even read: they cost no bandwidth and may hold infinities.
    inside = (weight != 0)[:, None] & (cols < dim)[None, :]
    prediction = tl.load(prediction_ptr + rows[:, None] * prediction_stride + cols, mask=inside, other=0.0)
    clean = tl.load(clean_ptr + rows[:, None] * clean_stride + cols, mask=inside, other=0.0)
    noise = tl.load(noise_ptr + rows[:, None] * noise_stride + cols, mask=inside, other=0.0)
    error = prediction.to(tl.float32) - (noise.to(tl.float32) - clean.to(tl.float32))  # [ROWS, COLS]
    scale = weight / dim
    partial = tl.sum(tl.sum(error * error, axis=1) * scale, axis=0)
    tl.store(partial_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), partial)
    if WITH_GRADIENT:
        gradient = 2.0 * scale[:, None] * error
        written = (rows < tokens)[:, None] & (cols < dim)[None, :]
        target = gradient_ptr + rows[:, None] * dim + cols
        tl.store(target, gradient.to(gradient_ptr.dtype.element_ty), mask=written)


def forward(
    prediction: Tensor, clean: Tensor, noise: Tensor, mask: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """(loss: scalar fp32, gradient: [tokens, dim] in the dtype of the prediction, or empty)."""
    tokens, dim = prediction.shape
    prediction, clean, noise, mask = as_rows(prediction), as_rows(clean), as_rows(noise), mask.contiguous()
    config = launch_config("flow_matching_loss", architecture_of(prediction), prediction.dtype, dim)
    rows, cols = tile_shape(config.tile, dim)
    grid = (ceil_div(tokens, rows), ceil_div(dim, cols))
    # Partial sums and a second reduction instead of atomics: the same bits on every run.
    partial = prediction.new_empty(grid, dtype=torch.float32)
    gradient = prediction.new_empty(prediction.shape if with_gradient else (0,))
    launch(
        _forward_kernel,
        grid,
        prediction,
        clean,
        noise,
        mask,
        partial,
        gradient,
        tokens,
        dim,
        prediction.stride(0),
        clean.stride(0),
        noise.stride(0),
        warps=config.warps,
        ROWS=rows,
        COLS=cols,
        WITH_GRADIENT=with_gradient,
    )
    return partial.sum(), gradient
