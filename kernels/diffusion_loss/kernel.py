# mypy: disable-error-code="import-untyped, no-untyped-def, no-untyped-call, untyped-decorator"
"""Triton: a program holds whole rows of one noise level; noised rows and Philox noise are formed again."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from reca.kernels._launch import architecture_of, as_rows, ceil_div, launch, launch_config, next_power_of_two
from reca.kernels._triton_random import normal_rows
from reca.kernels.diffusion_loss.reference import NUM_COEFFICIENTS


@triton.jit
def _rows(tokens, ROWS: tl.constexpr):
    """Clean rows and rows of this program: the programs of one noise level, then those of the next."""
    blocks = tl.cdiv(tokens, ROWS)
    token = (tl.program_id(0) % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return token, (tl.program_id(0) // blocks).to(tl.int64) * tokens + token


@triton.jit
def _noise(
    noise_ptr,
    images_ptr,
    samples_ptr,
    rows_ptr,
    step_ptr,
    rows,
    counts,
    inside,
    dim,
    noise_stride,
    num_images,
    key,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    GIVEN: tl.constexpr,
):
    """[ROWS, COLS] fp32, loaded or drawn; NaN for an image out of range."""
    if GIVEN:
        noise_at = noise_ptr + rows[:, None] * noise_stride + tl.arange(0, COLS)
        noise = tl.load(noise_at, mask=inside, other=0.0).to(tl.float32)
    else:
        image = tl.load(images_ptr + rows, mask=counts, other=0)
        known = counts & (image >= 0) & (image < num_images)
        sample = tl.load(samples_ptr + image, mask=known, other=0)
        row = tl.load(rows_ptr + rows, mask=counts, other=0)
        noise = normal_rows(key, tl.load(step_ptr), sample, row, dim, ROWS, COLS)
        noise = tl.where(known[:, None], noise, float("nan"))
    return noise


@triton.jit
def _noised_kernel(
    clean_ptr,
    noise_ptr,
    time_ptr,
    table_ptr,
    images_ptr,
    samples_ptr,
    rows_ptr,
    step_ptr,
    out_ptr,
    tokens,
    dim,
    times,
    clean_stride,
    noise_stride,
    num_images,
    key,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDTH: tl.constexpr,
    GIVEN: tl.constexpr,
):
    token, rows = _rows(tokens, ROWS)
    cols = tl.arange(0, COLS)
    counts = token < tokens
    inside = counts[:, None] & (cols < dim)[None, :]
    time = tl.load(time_ptr + rows, mask=counts, other=0)
    known = counts & (time >= 0) & (time < times)
    signal = tl.load(table_ptr + time * WIDTH, mask=known, other=float("nan"))[:, None]
    level = tl.load(table_ptr + time * WIDTH + 1, mask=known, other=float("nan"))[:, None]
    clean = tl.load(clean_ptr + token[:, None] * clean_stride + cols, mask=inside, other=0.0).to(tl.float32)
    noise = _noise(
        noise_ptr,
        images_ptr,
        samples_ptr,
        rows_ptr,
        step_ptr,
        rows,
        counts,
        inside,
        dim,
        noise_stride,
        num_images,
        key,
        ROWS,
        COLS,
        GIVEN,
    )
    noised = (signal * clean + level * noise).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows[:, None] * dim + cols, noised, mask=inside)


@triton.jit
def _normal_cdf(x):
    """The tanh approximation of the normal distribution function, and x times its derivative."""
    # Beyond 100 both tails are flat and a cube may overflow; not a clamp: that would hide a NaN.
    x = tl.where(x > 100.0, 100.0, tl.where(x < -100.0, -100.0, x))
    cubic = 0.044715 * x * x * x
    bend = 0.7978845608028654 * (x + cubic)
    decay = tl.exp(-2.0 * tl.abs(bend))
    # Through tanh itself, not the sigmoid: tails must vanish where fp32 makes 1 + tanh vanish.
    bent = (1.0 - decay) / (1.0 + decay)
    bent = tl.where(bend < 0.0, -bent, bent)
    density = 0.5 * (1.0 - bent * bent) * (0.7978845608028654 * (x + 3.0 * cubic))
    return 0.5 * (1.0 + bent), density


@triton.jit
def _likelihood(clean, gap, log_variance):
    """Log probability of the bin of 2 / 255 around each value, and its derivative by the log variance."""
    precision = tl.exp(-0.5 * log_variance)
    below, d_below = _normal_cdf(precision * (gap - 0.00392156862745098))
    above, d_above = _normal_cdf(precision * (gap + 0.00392156862745098))
    lowest, highest = clean < -0.999, clean > 0.999
    probability = tl.where(lowest, above, tl.where(highest, 1.0 - below, above - below))
    slope = tl.where(lowest, d_above, tl.where(highest, -d_below, d_above - d_below))
    slope = tl.where(probability < 1e-12, 0.0, slope)
    # Not a maximum: that would hide a NaN.
    probability = tl.where(probability < 1e-12, 1e-12, probability)
    return tl.log(probability), -0.5 * slope / probability


@triton.jit
def _loss_kernel(
    output_ptr,
    clean_ptr,
    noise_ptr,
    time_ptr,
    table_ptr,
    mask_ptr,
    images_ptr,
    samples_ptr,
    rows_ptr,
    step_ptr,
    partial_ptr,
    squared_ptr,
    variational_ptr,
    gradient_ptr,
    tokens,
    dim,
    times,
    output_stride,
    clean_stride,
    noise_stride,
    num_images,
    key,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDTH: tl.constexpr,
    GIVEN: tl.constexpr,
    HAS_MASK: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
):
    token, rows = _rows(tokens, ROWS)
    cols = tl.arange(0, COLS)
    present = token < tokens
    weight = tl.where(present, 1.0, 0.0)
    if HAS_MASK:
        weight = tl.load(mask_ptr + rows, mask=present, other=0.0)
    # Rows that do not count are not even read.
    counts = weight != 0.0
    inside = counts[:, None] & (cols < dim)[None, :]
    clean = tl.load(clean_ptr + token[:, None] * clean_stride + cols, mask=inside, other=0.0).to(tl.float32)
    output_at = output_ptr + rows[:, None] * output_stride + cols
    epsilon = tl.load(output_at, mask=inside, other=0.0).to(tl.float32)
    interpolation = tl.load(output_at + dim, mask=inside, other=0.0).to(tl.float32)
    noise = _noise(
        noise_ptr,
        images_ptr,
        samples_ptr,
        rows_ptr,
        step_ptr,
        rows,
        counts,
        inside,
        dim,
        noise_stride,
        num_images,
        key,
        ROWS,
        COLS,
        GIVEN,
    )
    time = tl.load(time_ptr + rows, mask=counts, other=0)
    known = counts & (time >= 0) & (time < times)
    column_at = table_ptr + time * WIDTH
    signal = tl.load(column_at, mask=known, other=float("nan"))[:, None]
    level = tl.load(column_at + 1, mask=known, other=float("nan"))[:, None]
    inverse_signal = tl.load(column_at + 2, mask=known, other=float("nan"))[:, None]
    inverse_noise = tl.load(column_at + 3, mask=known, other=float("nan"))[:, None]
    at_clean = tl.load(column_at + 4, mask=known, other=float("nan"))[:, None]
    at_noised = tl.load(column_at + 5, mask=known, other=float("nan"))[:, None]
    log_posterior = tl.load(column_at + 6, mask=known, other=float("nan"))[:, None]
    log_beta = tl.load(column_at + 7, mask=known, other=float("nan"))[:, None]
    x_t = signal * clean + level * noise
    mean = at_clean * clean + at_noised * x_t
    other = at_clean * (inverse_signal * x_t - inverse_noise * epsilon) + at_noised * x_t
    fraction = 0.5 * (interpolation + 1.0)
    log_variance = fraction * log_beta + (1.0 - fraction) * log_posterior
    gap = log_posterior - log_variance
    distance = (mean - other) * (mean - other) * tl.exp(-log_variance)
    ratio = tl.exp(gap)
    nats, d_nats = 0.5 * (ratio - 1.0 - gap + distance), 0.5 * (1.0 - ratio - distance)
    # One time in a thousand is the first: most programs skip the likelihood.
    is_first = counts & (time == 0)
    if tl.max(is_first.to(tl.int32), axis=0) > 0:
        likelihood, d_likelihood = _likelihood(clean, clean - other, log_variance)
        nats = tl.where(is_first[:, None], -likelihood, nats)
        d_nats = tl.where(is_first[:, None], -d_likelihood, d_nats)
    error = noise - epsilon
    squared = tl.sum(tl.where(inside, error * error, 0.0), axis=1) / dim
    variational = 1.4426950408889634 * tl.sum(tl.where(inside, nats, 0.0), axis=1) / dim
    tl.store(squared_ptr + rows, squared, mask=present)
    tl.store(variational_ptr + rows, variational, mask=present)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(weight * (squared + variational), axis=0))
    if WITH_GRADIENT:
        share = (weight / dim)[:, None]
        d_interpolation = 0.7213475204444817 * d_nats * (log_beta - log_posterior)
        d_epsilon = tl.where(inside, -2.0 * share * error, 0.0)
        d_interpolation = tl.where(inside, share * d_interpolation, 0.0)
        written = present[:, None] & (cols < dim)[None, :]
        gradient_at = gradient_ptr + rows[:, None] * (2 * dim) + cols
        tl.store(gradient_at, d_epsilon.to(gradient_ptr.dtype.element_ty), mask=written)
        tl.store(gradient_at + dim, d_interpolation.to(gradient_ptr.dtype.element_ty), mask=written)


def _tile(clean: Tensor) -> tuple[int, int, int]:
    """(rows, columns, warps): whole rows, as many as fill the tile."""
    config = launch_config("diffusion_loss", architecture_of(clean), clean.dtype, clean.shape[1])
    # Four columns are one Philox counter.
    columns = max(4, next_power_of_two(clean.shape[1]))
    return max(1, config.tile // columns), columns, config.warps


def _coordinates(
    time: Tensor,
    images: Tensor | None,
    noise: Tensor | None,
    samples: Tensor | None,
    rows: Tensor | None,
    step: Tensor | None,
) -> list[Tensor]:
    """Contiguous (images, samples, rows, step); `time` stands in for what is not given."""
    return [time if t is None else t.contiguous() for t in (images, samples, rows, step)]


def noised(
    clean: Tensor,
    time: Tensor,
    table: Tensor,
    images: Tensor | None,
    noise: Tensor | None,
    samples: Tensor | None,
    rows: Tensor | None,
    step: Tensor | None,
    key: int,
    dtype: torch.dtype,
) -> Tensor:
    """[rows, dim] in `dtype` of clean [tokens, dim]."""
    clean, time = as_rows(clean), time.contiguous()
    (tokens, dim), num_rows = clean.shape, time.shape[0]
    given = clean if noise is None else as_rows(noise)
    tile_rows, columns, warps = _tile(clean)
    out = clean.new_empty(num_rows, dim, dtype=dtype)
    launch(
        _noised_kernel,
        (ceil_div(tokens, tile_rows) * (num_rows // max(tokens, 1)),),
        clean,
        given,
        time,
        table.contiguous(),
        *_coordinates(time, images, noise, samples, rows, step),
        out,
        tokens,
        dim,
        table.shape[0],
        clean.stride(0),
        given.stride(0),
        0 if samples is None else samples.shape[0],
        key,
        warps=warps,
        ROWS=tile_rows,
        COLS=columns,
        WIDTH=NUM_COEFFICIENTS,
        GIVEN=noise is not None,
    )
    return out


def forward(
    output: Tensor,
    clean: Tensor,
    time: Tensor,
    table: Tensor,
    mask: Tensor | None,
    images: Tensor | None,
    noise: Tensor | None,
    samples: Tensor | None,
    rows: Tensor | None,
    step: Tensor | None,
    key: int,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, squared error and variational term [rows] fp32, gradient [rows, 2 dim] like output, or empty."""
    output, clean, time = as_rows(output), as_rows(clean), time.contiguous()
    (tokens, dim), num_rows = clean.shape, time.shape[0]
    given = clean if noise is None else as_rows(noise)
    tile_rows, columns, warps = _tile(clean)
    grid = (ceil_div(tokens, tile_rows) * (num_rows // max(tokens, 1)),)
    partial, squared, variational = (
        output.new_empty(shape, dtype=torch.float32) for shape in (grid, (num_rows,), (num_rows,))
    )
    gradient = output.new_empty(output.shape if with_gradient else (0,))
    launch(
        _loss_kernel,
        grid,
        output,
        clean,
        given,
        time,
        table.contiguous(),
        squared if mask is None else mask.contiguous(),
        *_coordinates(time, images, noise, samples, rows, step),
        partial,
        squared,
        variational,
        gradient,
        tokens,
        dim,
        table.shape[0],
        output.stride(0),
        clean.stride(0),
        given.stride(0),
        0 if samples is None else samples.shape[0],
        key,
        warps=warps,
        ROWS=tile_rows,
        COLS=columns,
        WIDTH=NUM_COEFFICIENTS,
        GIVEN=noise is not None,
        HAS_MASK=mask is not None,
        WITH_GRADIENT=with_gradient,
    )
    return partial.sum(), squared, variational, gradient
