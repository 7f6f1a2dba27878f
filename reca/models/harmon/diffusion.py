"""Per-token diffusion with learned variance: schedules, and one ancestral step.

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
