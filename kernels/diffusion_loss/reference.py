"""The mathematics in plain torch, forward and explicit gradient; fp32 inside, fp64 for fp64 outputs.

A row i of time t = time_i belongs to the clean row i mod tokens; the columns of the table's row t are
(signal, noise, 1 / signal, noise / signal, clean, noised, log_posterior, log_beta).

noised       = signal x_0 + noise e
mean         = clean x_0 + noised x_t
other        = clean (x_t / signal - (noise / signal) epsilon) + noised x_t
log_variance = f log_beta + (1 - f) log_posterior,           f = (v + 1) / 2
gap          = log_posterior - log_variance
divergence   = (exp(gap) - 1 - gap + (mean - other)^2 exp(-log_variance)) / 2
likelihood   = log(Phi((x_0 - other + 1 / 255) / s) - Phi((x_0 - other - 1 / 255) / s))
               with s^2 = exp(log_variance) and half-lines beyond +-0.999
variational  = (divergence or, at t = 0, -likelihood) / ln 2
loss         = sum_i mask_i mean_c ((e - epsilon)^2 + variational)

The variational term sees epsilon without its gradient:
d_epsilon = 2 mask / dim (epsilon - e)
d_v       = mask / (dim ln 2) (log_beta - log_posterior) / 2 d_log_variance
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reca.kernels._checks import compute_dtype

NUM_COEFFICIENTS = 8
_SMALLEST = 1e-12
_BIN = 1 / 255
_EDGE = 0.999
_FLAT = 100.0  # standard deviations; both tails are flat long before, and a cube may overflow long after
_ROOT, _CUBIC = math.sqrt(2 / math.pi), 0.044715

Saved = tuple[Tensor, Tensor, Tensor, Tensor]
"""(loss, squared_error, variational, gradient)"""


def coefficients(table: Tensor, time: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The columns of the table at each row's time, [rows, 1] each; NaN for a time that it has not."""
    inside = (time >= 0) & (time < table.shape[0])
    rows = table.to(dtype).index_select(0, time.clamp(0, table.shape[0] - 1))
    return list(torch.where(inside[:, None], rows, torch.nan).chunk(NUM_COEFFICIENTS, dim=1))


def repeated(clean: Tensor, rows: int) -> Tensor:
    """[rows, dim]: row i is the clean row i mod tokens."""
    return clean.repeat(rows // max(clean.shape[0], 1), 1)


def noised(clean: Tensor, noise: Tensor, time: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """[rows, dim] in `dtype`: signal * clean + noise coefficient * noise."""
    wide = compute_dtype(clean)
    signal, level = coefficients(table, time, wide)[:2]
    return (signal * repeated(clean, len(time)).to(wide) + level * noise.to(wide)).to(dtype)


def forward(
    output: Tensor, clean: Tensor, noise: Tensor, time: Tensor, table: Tensor, mask: Tensor | None
) -> Saved:
    """Loss (scalar), squared error and variational term [rows], d loss / d output in the dtype of output."""
    dtype, dim = compute_dtype(output), noise.shape[1]
    weight = (torch.ones_like(time) if mask is None else mask).to(dtype)[:, None]
    counts = weight != 0
    # A row that does not count may hold anything: infinities, times and images out of range.
    clean, noise, output_rows = (
        torch.where(counts, rows.to(dtype), 0) for rows in (repeated(clean, len(time)), noise, output)
    )
    time = torch.where(counts[:, 0], time, 0)
    epsilon, interpolation = output_rows.chunk(2, dim=1)
    columns = coefficients(table, time, dtype)
    signal, level, inverse_signal, inverse_noise, at_clean, at_noised, log_posterior, log_beta = columns
    x_t = signal * clean + level * noise
    mean = at_clean * clean + at_noised * x_t
    other = at_clean * (inverse_signal * x_t - inverse_noise * epsilon.detach()) + at_noised * x_t
    fraction = (interpolation + 1) / 2
    log_variance = fraction * log_beta + (1 - fraction) * log_posterior
    divergence, d_divergence = _gaussian_kl(mean - other, log_posterior - log_variance, log_variance)
    is_first = (time == 0)[:, None]
    # Far tails overflow in the likelihood; rows that do not use it see the mean as exact.
    gap = torch.where(is_first, clean - other, 0)
    likelihood, d_likelihood = _log_likelihood(clean, gap, log_variance)
    variational = torch.where(is_first, -likelihood, divergence) / math.log(2)
    d_log_variance = torch.where(is_first, -d_likelihood, d_divergence) / math.log(2)
    d_interpolation = d_log_variance * (log_beta - log_posterior) / 2
    rows = ((noise - epsilon).square().mean(dim=1), variational.mean(dim=1))
    squared_error, variational = (torch.where(counts[:, 0], row, 0) for row in rows)
    gradient = torch.cat([2 * (epsilon - noise), d_interpolation], dim=1) * (weight / dim)
    loss = (weight[:, 0] * (squared_error + variational)).sum()
    return loss, squared_error, variational, gradient.to(output.dtype)


def _gaussian_kl(difference: Tensor, gap: Tensor, log_variance: Tensor) -> tuple[Tensor, Tensor]:
    """KL of two diagonal Gaussians per entry in nats, and its derivative by the second's log variance."""
    distance, ratio = difference.square() * torch.exp(-log_variance), gap.exp()
    return 0.5 * (ratio - 1 - gap + distance), 0.5 * (1 - ratio - distance)


def _log_likelihood(values: Tensor, gap: Tensor, log_variance: Tensor) -> tuple[Tensor, Tensor]:
    """Log probability of the bin of 2 / 255 around each value, and its derivative by the log variance.

    The outermost bins are half-lines; `gap` is value - mean. Where a probability is clamped nothing passes.
    """
    precision = torch.exp(-0.5 * log_variance)
    below, d_below = _normal_cdf(precision * (gap - _BIN))
    above, d_above = _normal_cdf(precision * (gap + _BIN))
    lowest, highest = values < -_EDGE, values > _EDGE
    probability = torch.where(lowest, above, torch.where(highest, 1 - below, above - below))
    slope = torch.where(lowest, d_above, torch.where(highest, -d_below, d_above - d_below))
    slope = torch.where(probability >= _SMALLEST, slope, 0)
    probability = probability.clamp(min=_SMALLEST)
    return probability.log(), -0.5 * slope / probability


def _normal_cdf(x: Tensor) -> tuple[Tensor, Tensor]:
    """The tanh approximation of the normal distribution function, and x times its derivative."""
    x = x.clamp(-_FLAT, _FLAT)
    bent = torch.tanh(_ROOT * (x + _CUBIC * x**3))
    density = 0.5 * (1 - bent.square()) * _ROOT * (x + 3 * _CUBIC * x**3)
    return 0.5 * (1 + bent), density
