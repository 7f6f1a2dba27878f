# mypy: disable-error-code="import-untyped, no-untyped-def, no-untyped-call, untyped-decorator"
"""Triton: a program noises some rows once, in registers, and walks over all columns of the projection."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from reca.kernels._launch import architecture_of, as_rows, ceil_div, launch, launch_config, next_power_of_two
from reca.kernels._triton_random import normal_rows
from reca.kernels.flow_input.reference import features_width

_ROWS = 64


@triton.jit
def _noised_rows(
    clean_ptr,
    noise_ptr,
    time_ptr,
    samples_ptr,
    rows_ptr,
    step_ptr,
    rows,
    image,
    tokens,
    dim,
    clean_stride,
    noise_stride,
    num_images,
    key,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    GIVEN: tl.constexpr,
):
    """[ROWS, DIM] fp32; NaN for an image out of range, 0 past the width."""
    cols = tl.arange(0, DIM)
    known = (rows < tokens) & (image >= 0) & (image < num_images)
    inside = (rows < tokens)[:, None] & (cols < dim)[None, :]
    clean = tl.load(clean_ptr + rows[:, None] * clean_stride + cols, mask=inside, other=0.0).to(tl.float32)
    if GIVEN:
        noise = tl.load(noise_ptr + rows[:, None] * noise_stride + cols, mask=inside, other=0.0)
        noise = noise.to(tl.float32)
    else:
        sample = tl.load(samples_ptr + image, mask=known, other=0)
        row = tl.load(rows_ptr + rows, mask=rows < tokens, other=0)
        noise = normal_rows(key, tl.load(step_ptr), sample, row, dim, ROWS, DIM)
    time = tl.load(time_ptr + image, mask=known, other=float("nan"))[:, None]
    return tl.where(inside, (1.0 - time) * clean + time * noise, 0.0)


@triton.jit
def _embed_kernel(
    clean_ptr,
    noise_ptr,
    time_ptr,
    images_ptr,
    samples_ptr,
    rows_ptr,
    step_ptr,
    weight_ptr,
    bias_ptr,
    time_embedding_ptr,
    position_ptr,
    position_ids_ptr,
    out_ptr,
    tokens,
    dim,
    width,
    clean_stride,
    noise_stride,
    num_images,
    num_positions,
    key,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    COLS: tl.constexpr,
    GIVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TIME: tl.constexpr,
    HAS_POSITION: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)
    image = tl.load(images_ptr + rows, mask=rows < tokens, other=0)
    noised = _noised_rows(
        clean_ptr,
        noise_ptr,
        time_ptr,
        samples_ptr,
        rows_ptr,
        step_ptr,
        rows,
        image,
        tokens,
        dim,
        clean_stride,
        noise_stride,
        num_images,
        key,
        ROWS,
        DIM,
        GIVEN,
    )
    noised = noised.to(weight_ptr.dtype.element_ty)
    known = (image >= 0) & (image < num_images)
    if HAS_POSITION:
        place = tl.load(position_ids_ptr + rows, mask=rows < tokens, other=0)
        placed = (place >= 0) & (place < num_positions)
    for start in range(0, width, COLS):
        cols = start + tl.arange(0, COLS)
        inside = (rows < tokens)[:, None] & (cols < width)[None, :]
        # [DIM, COLS] straight from the weight's rows: the transpose is only in the addresses.
        weight_mask = (dims < dim)[:, None] & (cols < width)[None, :]
        weight_at = weight_ptr + cols.to(tl.int64)[None, :] * dim + dims[:, None]
        weight = tl.load(weight_at, mask=weight_mask, other=0.0)
        out = tl.dot(noised, weight, input_precision="ieee")  # [ROWS, COLS]
        if HAS_BIAS:
            out += tl.load(bias_ptr + cols, mask=cols < width, other=0.0).to(tl.float32)[None, :]
        if HAS_TIME:
            time_at = time_embedding_ptr + image[:, None] * width + cols
            out += tl.load(time_at, mask=inside & known[:, None], other=0.0).to(tl.float32)
        if HAS_POSITION:
            position_at = position_ptr + place[:, None] * width + cols
            position = tl.load(position_at, mask=inside & placed[:, None], other=float("nan"))
            out += position.to(tl.float32)
        tl.store(out_ptr + rows[:, None] * width + cols, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _features_kernel(
    clean_ptr,
    noise_ptr,
    time_ptr,
    images_ptr,
    samples_ptr,
    rows_ptr,
    step_ptr,
    out_ptr,
    tokens,
    dim,
    width,
    clean_stride,
    noise_stride,
    num_images,
    key,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    REST: tl.constexpr,
    GIVEN: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)
    image = tl.load(images_ptr + rows, mask=rows < tokens, other=0)
    noised = _noised_rows(
        clean_ptr,
        noise_ptr,
        time_ptr,
        samples_ptr,
        rows_ptr,
        step_ptr,
        rows,
        image,
        tokens,
        dim,
        clean_stride,
        noise_stride,
        num_images,
        key,
        ROWS,
        DIM,
        GIVEN,
    )
    inside = (rows < tokens)[:, None] & (dims < dim)[None, :]
    line_ptr = out_ptr + rows[:, None] * width
    tl.store(line_ptr + dims, noised.to(out_ptr.dtype.element_ty), mask=inside)
    rest = tl.arange(0, REST)
    one = (rest == 0)[None, :] | (image[:, None] + 1 == rest[None, :])
    one = one & (rest <= num_images)[None, :]
    in_rest = (rows < tokens)[:, None] & (dim + rest < width)[None, :]
    tl.store(line_ptr + dim + rest, one.to(out_ptr.dtype.element_ty), mask=in_rest)


def _pointers(
    clean: Tensor,
    time: Tensor,
    images: Tensor,
    noise: Tensor | None,
    samples: Tensor | None,
    rows: Tensor | None,
    step: Tensor | None,
) -> tuple[Tensor, ...]:
    """Contiguous arguments of `_noised_rows`; `images` stands in for what is not given."""
    others = [images if t is None else t.contiguous() for t in (samples, rows, step)]
    given = clean if noise is None else as_rows(noise)
    return as_rows(clean), given, time.contiguous(), images.contiguous(), *others


def forward(
    clean: Tensor,
    time: Tensor,
    images: Tensor,
    noise: Tensor | None,
    samples: Tensor | None,
    rows: Tensor | None,
    step: Tensor | None,
    key: int,
    weight: Tensor,
    bias: Tensor | None,
    time_embedding: Tensor | None,
    position: Tensor | None,
    position_ids: Tensor | None,
) -> Tensor:
    """[tokens, width] in the dtype of the weight [width, dim]."""
    pointers = _pointers(clean, time, images, noise, samples, rows, step)
    weight, (tokens, dim), width = weight.contiguous(), clean.shape, weight.shape[0]
    out = weight.new_empty(tokens, width)
    config = launch_config("flow_input", architecture_of(clean), weight.dtype, width)
    tables = [weight if t is None else t.contiguous() for t in (bias, time_embedding, position)]
    launch(
        _embed_kernel,
        (ceil_div(tokens, _ROWS),),
        *pointers,
        weight,
        *tables,
        images if position_ids is None else position_ids.contiguous(),
        out,
        tokens,
        dim,
        width,
        pointers[0].stride(0),
        pointers[1].stride(0),
        time.shape[0],
        0 if position is None else position.shape[0],
        key,
        warps=config.warps,
        ROWS=_ROWS,
        DIM=max(16, next_power_of_two(dim)),
        COLS=config.tile // _ROWS,
        GIVEN=noise is not None,
        HAS_BIAS=bias is not None,
        HAS_TIME=time_embedding is not None,
        HAS_POSITION=position is not None,
    )
    return out


def features(
    clean: Tensor,
    time: Tensor,
    images: Tensor,
    noise: Tensor | None,
    samples: Tensor | None,
    rows: Tensor | None,
    step: Tensor | None,
    key: int,
    dtype: torch.dtype,
) -> Tensor:
    """[tokens, features_width] in `dtype`: noised latents, a one, the image of the token as a unit vector."""
    pointers = _pointers(clean, time, images, noise, samples, rows, step)
    (tokens, dim), num_images = clean.shape, time.shape[0]
    width = features_width(dim, num_images)
    out = clean.new_empty(tokens, width, dtype=dtype)
    config = launch_config("flow_input", architecture_of(clean), dtype, width)
    launch(
        _features_kernel,
        (ceil_div(tokens, _ROWS),),
        *pointers,
        out,
        tokens,
        dim,
        width,
        pointers[0].stride(0),
        pointers[1].stride(0),
        num_images,
        key,
        warps=config.warps,
        ROWS=_ROWS,
        DIM=max(16, next_power_of_two(dim)),
        REST=next_power_of_two(width - dim),
        GIVEN=noise is not None,
    )
    return out
