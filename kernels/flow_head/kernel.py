# mypy: disable-error-code="import-untyped, no-untyped-def, no-untyped-call, untyped-decorator"
"""Triton: one walk over a row gives norm, prediction and loss; so does one walk of the backward."""

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
    multiprocessors,
    next_power_of_two,
)
from reca.kernels._triton_random import normal_rows
from reca.kernels.flow_head.reference import Gradients

_ROWS = 64
# Columns count in the backward: every block of them reads the gradient of the predictions again, from L2.
_BACKWARD_ROWS = 32
_NARROW = 32


@triton.jit
def _forward_kernel(
    hidden_ptr,
    scale_ptr,
    weight_ptr,
    bias_ptr,
    clean_ptr,
    noise_ptr,
    mask_ptr,
    images_ptr,
    samples_ptr,
    rows_ptr,
    step_ptr,
    partial_ptr,
    d_prediction_ptr,
    rstd_ptr,
    mean_ptr,
    tokens,
    width,
    dim,
    hidden_stride,
    clean_stride,
    noise_stride,
    num_images,
    eps,
    key,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DIM: tl.constexpr,
    GIVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)
    present = rows < tokens
    squares = tl.zeros([ROWS], tl.float32)
    projected = tl.zeros([ROWS, DIM], tl.float32)
    for start in range(0, width, COLS):
        cols = start + tl.arange(0, COLS)
        inside = present[:, None] & (cols < width)[None, :]
        hidden = tl.load(hidden_ptr + rows[:, None] * hidden_stride + cols, mask=inside, other=0.0)
        wide = hidden.to(tl.float32)
        squares += tl.sum(wide * wide, axis=1)
        scale = tl.load(scale_ptr + cols, mask=cols < width, other=0.0).to(tl.float32)
        weight_mask = (cols < width)[:, None] & (dims < dim)[None, :]
        weight_at = weight_ptr + dims.to(tl.int64)[None, :] * width + cols[:, None]
        weight = tl.load(weight_at, mask=weight_mask, other=0.0)  # [COLS, DIM]
        scaled = (wide * scale[None, :]).to(hidden_ptr.dtype.element_ty)
        projected += tl.dot(scaled, weight, input_precision="ieee")
    rstd = tl.rsqrt(squares / width + eps)
    projected *= rstd[:, None]
    inside = present[:, None] & (dims < dim)[None, :]
    clean = tl.load(clean_ptr + rows[:, None] * clean_stride + dims, mask=inside, other=0.0)
    if GIVEN:
        noise = tl.load(noise_ptr + rows[:, None] * noise_stride + dims, mask=inside, other=0.0)
        noise = noise.to(tl.float32)
    else:
        image = tl.load(images_ptr + rows, mask=present, other=0)
        known = present & (image >= 0) & (image < num_images)
        sample = tl.load(samples_ptr + image, mask=known, other=0)
        row = tl.load(rows_ptr + rows, mask=present, other=0)
        noise = normal_rows(key, tl.load(step_ptr), sample, row, dim, ROWS, DIM)
        noise = tl.where((known | (rows >= tokens))[:, None], noise, float("nan"))
    error = projected - (noise - clean.to(tl.float32))
    if HAS_BIAS:
        error += tl.load(bias_ptr + dims, mask=dims < dim, other=0.0).to(tl.float32)[None, :]
    error = tl.where(inside, error, 0.0)
    share = tl.load(mask_ptr + rows, mask=present, other=0.0) / dim
    tl.store(partial_ptr + tl.program_id(0), tl.sum(tl.sum(error * error, axis=1) * share, axis=0))
    d_prediction = 2.0 * share[:, None] * error
    tl.store(d_prediction_ptr + rows[:, None] * dim + dims, d_prediction, mask=inside)
    tl.store(rstd_ptr + rows, rstd, mask=present)
    tl.store(mean_ptr + rows, tl.sum(d_prediction * projected, axis=1) / width, mask=present)


@triton.jit
def _backward_kernel(
    d_loss_ptr,
    hidden_ptr,
    scale_ptr,
    weight_ptr,
    d_prediction_ptr,
    rstd_ptr,
    mean_ptr,
    d_hidden_ptr,
    products_ptr,
    sums_ptr,
    tokens,
    width,
    dim,
    hidden_stride,
    steps,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DIM: tl.constexpr,
    WITH_DHIDDEN: tl.constexpr,
    WITH_DPARAMETERS: tl.constexpr,
):
    """One read of `steps` blocks of rows serves their own gradient and their share of the parameters'."""
    group = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    dims = tl.arange(0, DIM)
    weight_mask = (dims < dim)[:, None] & (cols < width)[None, :]
    weight_at = dims.to(tl.int64)[:, None] * width + cols[None, :]
    weight = tl.load(weight_ptr + weight_at, mask=weight_mask, other=0.0)  # [DIM, COLS]
    scale = tl.load(scale_ptr + cols, mask=cols < width, other=0.0).to(tl.float32)
    d_loss = tl.load(d_loss_ptr)
    products = tl.zeros([DIM, COLS], tl.float32)
    sums = tl.zeros([DIM], tl.float32)
    # The hint also takes loads that feed no product through shared memory: 50 registers less.
    for step in tl.range(0, steps, num_stages=3):
        rows = (group * steps + step) * ROWS + tl.arange(0, ROWS)
        present = rows < tokens
        inside = present[:, None] & (cols < width)[None, :]
        drawn = present[:, None] & (dims < dim)[None, :]
        d_prediction = tl.load(d_prediction_ptr + rows[:, None] * dim + dims, mask=drawn, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=present, other=0.0)[:, None]
        hidden = tl.load(hidden_ptr + rows[:, None] * hidden_stride + cols, mask=inside, other=0.0)
        if WITH_DHIDDEN:
            d_normed = tl.dot(d_prediction.to(weight_ptr.dtype.element_ty), weight, input_precision="ieee")
            mean = tl.load(mean_ptr + rows, mask=present, other=0.0)[:, None]
            d_hidden = d_normed * scale[None, :] - hidden.to(tl.float32) * (rstd * mean)
            d_hidden *= rstd * d_loss
            d_hidden_at = d_hidden_ptr + rows[:, None] * width + cols
            tl.store(d_hidden_at, d_hidden.to(d_hidden_ptr.dtype.element_ty), mask=inside)
        if WITH_DPARAMETERS:
            factors = (d_prediction * rstd).to(hidden_ptr.dtype.element_ty)
            products = tl.dot(tl.trans(factors), hidden, products, input_precision="ieee")
            if tl.program_id(0) == 0:
                sums += tl.sum(d_prediction, axis=0)
    if WITH_DPARAMETERS:
        tl.store(products_ptr + group * dim * width + weight_at, products, mask=weight_mask)
        once = dims < tl.where(tl.program_id(0) == 0, dim, 0)
        tl.store(sums_ptr + group * dim + dims, sums, mask=once)


@triton.jit
def _parameters_kernel(
    d_loss_ptr,
    products_ptr,
    sums_ptr,
    scale_ptr,
    weight_ptr,
    d_scale_ptr,
    d_weight_ptr,
    d_bias_ptr,
    width,
    dim,
    groups,
    COLS: tl.constexpr,
    DIM: tl.constexpr,
):
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    dims = tl.arange(0, DIM)
    inside = (dims < dim)[:, None] & (cols < width)[None, :]
    at = dims.to(tl.int64)[:, None] * width + cols[None, :]
    products = tl.zeros([DIM, COLS], tl.float32)
    sums = tl.zeros([DIM], tl.float32)
    for group in range(0, groups):
        start = tl.full([], dim, tl.int64) * group
        products += tl.load(products_ptr + start * width + at, mask=inside, other=0.0)
        sums += tl.load(sums_ptr + start + dims, mask=dims < dim, other=0.0)
    d_loss = tl.load(d_loss_ptr)
    products *= d_loss
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + cols, mask=cols < width, other=0.0).to(tl.float32)
    d_weight = products * scale[None, :]
    tl.store(d_weight_ptr + at, d_weight.to(d_weight_ptr.dtype.element_ty), mask=inside)
    d_scale = tl.sum(products * weight, axis=0)
    tl.store(d_scale_ptr + cols, d_scale.to(d_scale_ptr.dtype.element_ty), mask=cols < width)
    d_bias = (sums * d_loss).to(d_bias_ptr.dtype.element_ty)
    tl.store(d_bias_ptr + dims, d_bias, mask=dims < tl.where(tl.program_id(0) == 0, dim, 0))


def forward(
    hidden: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    clean: Tensor,
    mask: Tensor,
    images: Tensor | None,
    noise: Tensor | None,
    samples: Tensor | None,
    rows: Tensor | None,
    step: Tensor | None,
    key: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, d_prediction [tokens, dim], rstd and mean [tokens], fp32, of hidden [tokens, width]."""
    hidden, clean, weight = as_rows(hidden), as_rows(clean), weight.contiguous()
    (tokens, width), dim = hidden.shape, weight.shape[0]
    config = launch_config("flow_head", architecture_of(hidden), hidden.dtype, width)
    grid = (ceil_div(tokens, _ROWS),)
    partial, d_prediction, rstd, mean = (
        hidden.new_empty(shape, dtype=torch.float32) for shape in (grid, (tokens, dim), (tokens,), (tokens,))
    )
    given = clean if noise is None else as_rows(noise)
    coordinates = [mask if t is None else t.contiguous() for t in (images, samples, rows, step)]
    launch(
        _forward_kernel,
        grid,
        hidden,
        scale.contiguous(),
        weight,
        weight if bias is None else bias.contiguous(),
        clean,
        given,
        mask.contiguous(),
        *coordinates,
        partial,
        d_prediction,
        rstd,
        mean,
        tokens,
        width,
        dim,
        hidden.stride(0),
        clean.stride(0),
        given.stride(0),
        0 if samples is None else samples.shape[0],
        eps,
        key,
        warps=config.warps,
        ROWS=_ROWS,
        COLS=config.tile // _ROWS,
        DIM=max(16, next_power_of_two(dim)),
        GIVEN=noise is not None,
        HAS_BIAS=bias is not None,
    )
    return partial.sum(), d_prediction, rstd, mean


def backward(
    d_loss: Tensor,
    hidden: Tensor,
    scale: Tensor,
    weight: Tensor,
    d_prediction: Tensor,
    rstd: Tensor,
    mean: Tensor,
    with_dhidden: bool,
    with_dparameters: bool,
) -> Gradients:
    """Gradients of hidden, scale, weight and bias in the dtypes of these; empty if not asked for."""
    hidden, weight, scale = as_rows(hidden), weight.contiguous(), scale.contiguous()
    (tokens, width), dim = hidden.shape, weight.shape[0]
    architecture = architecture_of(hidden)
    config = launch_config("flow_head", architecture, hidden.dtype, width)
    cols, padded = config.tile // _BACKWARD_ROWS, max(16, next_power_of_two(dim))
    blocks, columns = ceil_div(tokens, _BACKWARD_ROWS), ceil_div(width, cols)
    # Two programs per multiprocessor: more would write more partial products.
    groups = max(1, 2 * multiprocessors(architecture) // columns)
    steps = ceil_div(blocks, groups)
    grid = (columns, ceil_div(blocks, max(steps, 1)))
    d_hidden = hidden.new_empty(hidden.shape if with_dhidden else (0,))
    parts = grid[1] if with_dparameters else 0
    products, sums = rstd.new_empty(parts, dim, width), rstd.new_empty(parts, dim)
    launch(
        _backward_kernel,
        grid,
        d_loss,
        hidden,
        scale,
        weight,
        d_prediction,
        rstd,
        mean,
        d_hidden,
        products,
        sums,
        tokens,
        width,
        dim,
        hidden.stride(0),
        steps,
        warps=config.warps,
        ROWS=_BACKWARD_ROWS,
        COLS=cols,
        DIM=padded,
        WITH_DHIDDEN=with_dhidden,
        WITH_DPARAMETERS=with_dparameters,
    )
    shapes = ((width,), (dim, width), (dim,)) if with_dparameters else ((0,), (0,), (0,))
    d_scale, d_weight, d_bias = (
        like.new_empty(shape) for like, shape in zip((scale, weight, weight), shapes, strict=True)
    )
    if with_dparameters:
        # Narrow columns: one program for each of 112 pieces of a width of 3,584.
        launch(
            _parameters_kernel,
            (ceil_div(width, _NARROW),),
            d_loss,
            products,
            sums,
            scale,
            weight,
            d_scale,
            d_weight,
            d_bias,
            width,
            dim,
            grid[1],
            warps=config.warps,
            COLS=_NARROW,
            DIM=padded,
        )
    return d_hidden, d_scale, d_weight, d_bias
