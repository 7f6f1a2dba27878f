"""Sums of gradients over the microbatches of a step, in flat buffers beside the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm

from reca.engine.weights import ALIGNMENT, Group, Weights


class Gradients:
    """One buffer per group of weights; a tensor that a step does not reach has a zero gradient.

    Autograd makes a new gradient for every microbatch. That of a matrix is added to its buffer, and freed, as
    soon as it exists; those of vectors, which are many and small, all at once.

    Args:
        weights: whose gradients.
        dtype: of the sums of matrices that the forward reads in bf16; all others are fp32.

    Attributes:
        flats: a buffer per group.
    """

    def __init__(self, weights: Weights, dtype: torch.dtype = torch.float32) -> None:
        self._weights = weights
        self.flats: list[Tensor] = []
        for group in weights.groups:
            is_wide = group.is_small or group.weight.dtype == torch.float32
            self.flats.append(torch.zeros_like(group.weight, dtype=torch.float32 if is_wide else dtype))
        # They stand in for gradients of tensors that a microbatch does not reach, and fill the gaps.
        small = [group for group in weights.groups if group.is_small]
        longest = max((slot.padded for group in small for slot in group.slots), default=0)
        self._zeros = {group.weight.dtype: group.weight.new_zeros(longest) for group in small}

    def zero(self) -> None:
        """Before the first microbatch of a step."""
        for flat in self.flats:
            flat.zero_()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside, gradients of matrices go into their buffers as the backward pass makes them."""
        handles = []
        for group, flat in zip(self._weights.groups, self.flats, strict=True):
            for slot in () if group.is_small else group.slots:
                register: Any = self._weights.parameters[slot.name].register_post_accumulate_grad_hook
                handles.append(register(_into(slot.view(flat))))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def collect(self) -> None:
        """After the backward pass of a microbatch: add the gradients of vectors."""
        for group, flat in zip(self._weights.groups, self.flats, strict=True):
            if group.is_small:
                gradients = [self._take(slot.name) for slot in group.slots]
                if any(gradient is not None for gradient in gradients):
                    flat.add_(torch.cat([*self._pieces(group, gradients)]))

    def _take(self, name: str) -> Tensor | None:
        parameter = self._weights.parameters[name]
        gradient, parameter.grad = parameter.grad, None
        return gradient

    def _pieces(self, group: Group, gradients: list[Tensor | None]) -> Iterator[Tensor]:
        """What fills the buffer of a group from its start to its end."""
        zeros = self._zeros[group.weight.dtype]
        for slot, gradient in zip(group.slots, gradients, strict=True):
            yield zeros[: slot.numel] if gradient is None else gradient.reshape(-1)
            if slot.padded > slot.numel:
                yield zeros[: slot.padded - slot.numel]

    def by_name(self) -> dict[str, Tensor]:
        """Name -> its part of a buffer, in its shape."""
        return self._weights.by_name(self.flats)

    def norm(self) -> Tensor:
        """Euclidean norm of all gradients, scalar fp32."""
        # Norms of norms: one long sum would lose its small terms.
        blocks = [vector_norm(flat.view(-1, ALIGNMENT), dim=1, dtype=torch.float32) for flat in self.flats]
        norm: Tensor = vector_norm(torch.cat(blocks))
        return norm


def _into(view: Tensor) -> Callable[[Tensor], None]:
    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        view.add_(parameter.grad)
        parameter.grad = None

    return add
