"""Exponential moving average of the trained tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from reca.engine.weights import Weights, copy_exactly


class Ema:
    """Average of the trained tensors, fp32: average <- average + (1 - decay) (weights - average).

    It starts at the weights themselves; frozen tensors are not copied.

    Args:
        weights: that are averaged.
        decay: what the average keeps of itself at each update.

    Attributes:
        flats: a buffer per group of weights, fp32.
    """

    def __init__(self, weights: Weights, decay: float) -> None:
        self._weights = weights
        self.decay = decay
        self.flats = [group.master().to(torch.float32, copy=True) for group in weights.groups]

    @torch.no_grad()
    def update(self, skipped: Tensor) -> None:
        """Take in the current weights; where `skipped` (bool scalar on the device) is set, change no bit."""
        for index in range(len(self.flats)):
            self.update_group(index, skipped)

    @torch.no_grad()
    def update_group(self, index: int, skipped: Tensor) -> None:
        """`update` for one group of weights."""
        average, master = self.flats[index], self._weights.groups[index].master()
        # `where` rather than a weight of 0, which would turn -0.0 into 0.0.
        moved = torch.lerp(average, master.to(torch.float32), 1.0 - self.decay)
        torch.where(skipped, average, moved, out=average)

    def state(self) -> dict[str, Tensor]:
        """Name -> average."""
        return self._weights.by_name(self.flats)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from `state()`. Raises CheckpointError unless names and shapes agree."""
        copy_exactly("average", self.state(), tensors)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model computes with the averages, fp32, inside; nothing is copied."""
        for name, average in self.state().items():
            self._weights.parameters[name].data = average
        try:
            yield
        finally:
            self._weights.attach()
