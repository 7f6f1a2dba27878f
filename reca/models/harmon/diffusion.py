"""Per-token diffusion with learned variance: schedules, the training loss, and one ancestral step.

The variance is learned as an interpolation v in [-1, 1] between the logarithms of the smallest and the
largest sensible one, through a variational term that is held apart from the noise prediction.

Source: arXiv 2102.09672 (schedule, variance), arXiv 2406.11838 (per-token diffusion).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from reca.types import TensorStruct

NUM_STEPS = 1000
_MAX_BETA = 0.999
_OFFSET = 0.008
_SMALLEST = 1e-12
_BIN = 1 / 255
_EDGE = 0.999


@dataclass(frozen=True, slots=True)
class Schedule(TensorStruct):
    """Coefficients of a diffusion of S steps, computed in fp64.

    Attributes:
        times: [S] int64, the times 0..999 that the network is told, ascending.
        table: [S, 8] fp32, the columns of `at`.
    """

    times: Tensor
    table: Tensor

    @classmethod
    def full(cls) -> Self:
        """All 1000 steps: beta_i = min(1 - a((i + 1) / 1000) / a(i / 1000), 0.999), a a squared cosine."""

        def signal(u: float) -> float:
            return math.cos((u + _OFFSET) / (1 + _OFFSET) * math.pi / 2) ** 2

        betas = [
            min(1 - signal((i + 1) / NUM_STEPS) / signal(i / NUM_STEPS), _MAX_BETA) for i in range(NUM_STEPS)
        ]
        return cls._of(torch.tensor(betas, dtype=torch.float64), torch.arange(NUM_STEPS))

    @classmethod
    def respaced(cls, steps: int) -> Self:
        """`steps` of the 1000 times, both ends among them; betas follow from the kept signal levels.

        Raises: ValueError for fewer than 2 or more than 1000 steps.
        """
        if not 2 <= steps <= NUM_STEPS:
            raise ValueError(f"Schedule.respaced: steps must be in 2..{NUM_STEPS}, got {steps}")
        full = cls.full()
        times = torch.tensor([round(k * (NUM_STEPS - 1) / (steps - 1)) for k in range(steps)])
        signal = full.signal_levels()[times]
        before = torch.cat([torch.ones(1, dtype=torch.float64), signal[:-1]])
        return cls._of(1 - signal / before, times)

    @staticmethod
    def signal_levels() -> Tensor:
        """[1000] fp64: products of 1 - beta of the full schedule."""
        steps = torch.arange(NUM_STEPS + 1, dtype=torch.float64) / NUM_STEPS
        signal = torch.cos((steps + _OFFSET) / (1 + _OFFSET) * math.pi / 2) ** 2
        return torch.cumprod(1 - (1 - signal[1:] / signal[:-1]).clamp(max=_MAX_BETA), dim=0)

    @classmethod
    def _of(cls, betas: Tensor, times: Tensor) -> Self:
        signal = torch.cumprod(1 - betas, dim=0)
        before = torch.cat([torch.ones(1, dtype=torch.float64), signal[:-1]])
        variance = betas * (1 - before) / (1 - signal)
        # the first posterior is a point; its logarithm is taken from the next
        log_variance = torch.cat([variance[1:2], variance[1:]]).log()
        columns = (
            signal.sqrt(),
            (1 - signal).sqrt(),
            (1 / signal).sqrt(),
            (1 / signal - 1).sqrt(),
            betas * before.sqrt() / (1 - signal),
            (1 - before) * (1 - betas).sqrt() / (1 - signal),
            log_variance,
            betas.log(),
        )
        return cls(times, torch.stack(columns, dim=1).to(torch.float32))

    def at(self, index: Tensor) -> Coefficients:
        """Coefficients of steps `index` [n] int64, each [n, 1] fp32."""
        return Coefficients(*self.table.index_select(0, index).split(1, dim=1))


@dataclass(frozen=True, slots=True)
class Coefficients:
    """Of one step per row.

    Attributes:
        signal, noise: x_t = signal * x_0 + noise * e.
        inverse_signal, inverse_noise: x_0 = inverse_signal * x_t - inverse_noise * e.
        clean, noised: mean of the posterior of x_(t-1) = clean * x_0 + noised * x_t.
        log_posterior, log_beta: the smallest and the largest log variance.
    """

    signal: Tensor
    noise: Tensor
    inverse_signal: Tensor
    inverse_noise: Tensor
    clean: Tensor
    noised: Tensor
    log_posterior: Tensor
    log_beta: Tensor

    def mean(self, clean: Tensor, noised: Tensor) -> Tensor:
        """Posterior mean of x_(t-1) given x_0 and x_t."""
        return self.clean * clean + self.noised * noised

    def predicted_mean(self, noised: Tensor, epsilon: Tensor) -> Tensor:
        """Posterior mean of x_(t-1) given x_t and predicted noise; x_0 is not clipped."""
        return self.mean(self.inverse_signal * noised - self.inverse_noise * epsilon, noised)

    def log_variance(self, interpolation: Tensor) -> Tensor:
        """Predicted log variance; `interpolation` is v, about -1 (smallest) to 1 (largest)."""
        fraction = (interpolation + 1) / 2
        return fraction * self.log_beta + (1 - fraction) * self.log_posterior


@dataclass(frozen=True, slots=True)
class DiffusionLoss:
    """Per row: squared error of the noise, and the variational term in bits; means over channels.

    Attributes:
        squared_error, variational: [rows] fp32.
    """

    squared_error: Tensor
    variational: Tensor

    @property
    def total(self) -> Tensor:
        """Scalar fp32: the sum of both over all rows."""
        return self.squared_error.sum() + self.variational.sum()


def diffusion_loss(
    output: Tensor, clean: Tensor, noised: Tensor, noise: Tensor, time: Tensor, schedule: Schedule
) -> DiffusionLoss:
    """Loss of a noise prediction with learned variance.

        squared_error = mean_c (e - epsilon)^2
        variational   = KL(q(x_(t-1) | x_t, x_0) || p(x_(t-1) | x_t)) / ln 2        for t > 0
                        -log2 p(x_0 | x_1), discretised to bins of 1 / 255         for t = 0

    The variational term sees the noise prediction without its gradient: it trains only the variance.

    Args:
        output: [rows, 2 * channels], noise prediction and variance interpolation; receives the gradient.
        clean, noised, noise: [rows, channels] fp32.
        time: [rows] int64 in 0..999.
        schedule: the full one.
    """
    epsilon, interpolation = output.to(torch.float32).chunk(2, dim=1)
    at = schedule.at(time)
    mean = at.predicted_mean(noised, epsilon.detach())
    log_variance = at.log_variance(interpolation)
    divergence = _gaussian_kl(at.mean(clean, noised), at.log_posterior, mean, log_variance)
    is_first = (time == 0)[:, None]
    # Far tails overflow in the likelihood; rows that do not use it see the mean as exact.
    likelihood = _discretised_log_likelihood(clean, torch.where(is_first, mean, clean), 0.5 * log_variance)
    variational = torch.where(is_first, -likelihood, divergence).mean(dim=1) / math.log(2)
    return DiffusionLoss((noise - epsilon).square().mean(dim=1), variational)


def _gaussian_kl(mean: Tensor, log_variance: Tensor, other: Tensor, other_log_variance: Tensor) -> Tensor:
    """KL of two diagonal Gaussians per entry, in nats."""
    gap = log_variance - other_log_variance
    return 0.5 * (gap.exp() - 1 - gap + (mean - other).square() * torch.exp(-other_log_variance))


def _discretised_log_likelihood(values: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log probability of the bin of 2 / 255 around each value; the outermost bins are half-lines."""
    precision = torch.exp(-log_scale)
    below = _normal_cdf(precision * (values - mean - _BIN))
    above = _normal_cdf(precision * (values - mean + _BIN))
    inner = (above - below).clamp(min=_SMALLEST).log()
    lowest, highest = above.clamp(min=_SMALLEST).log(), (1 - below).clamp(min=_SMALLEST).log()
    return torch.where(values < -_EDGE, lowest, torch.where(values > _EDGE, highest, inner))


def _normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation of the normal distribution function."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
