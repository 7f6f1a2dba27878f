"""Exponential moving average of the trained tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from reca.engine.optim import copy_exactly


class Ema:
    """Average of the trained tensors, fp32: average <- average + (1 - decay) (weights - average).

    It starts at the weights themselves; frozen tensors are not copied.

    Attributes:
        decay: what the average keeps of itself at each update.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self._parameters = dict(parameters)
        self.decay = decay
        self._averages = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, skipped: Tensor) -> None:
        """Take in the current weights; where `skipped` (bool scalar on the device) is set, change no bit."""
        for name, average in self._averages.items():
            # `where` rather than a weight of 0, which would turn -0.0 into 0.0.
            torch.where(
                skipped, average, torch.lerp(average, self._parameters[name], 1.0 - self.decay), out=average
            )

    def state(self) -> dict[str, Tensor]:
        """Name -> average."""
        return dict(self._averages)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from `state()`. Raises CheckpointError unless names and shapes agree."""
        copy_exactly("average", self._averages, tensors)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model computes with the averages inside; storages are exchanged, nothing is copied."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for name, parameter in self._parameters.items():
            parameter.data, self._averages[name] = self._averages[name], parameter.data
