"""What one benchmark case is: an operator at a shape of a real step, its plain form and its rivals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from reca.kernels import Impl

Inputs = Mapping[str, Any]
Shape = Mapping[str, int]
Output = Tensor | tuple[Tensor, ...] | None
Provider = Callable[[Inputs], Output]


@dataclass(frozen=True, slots=True)
class Maker:
    """Makes the inputs of a case: random values, never zeros, which some hardware multiplies faster.

    Attributes:
        shape: the sizes of the case.
        device, dtype: where, and the dtype of activations and weights.
        generator: seeded; on `device`.
    """

    shape: Shape
    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator

    def normal(self, *sizes: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal values of standard deviation `scale`."""
        values = torch.randn(sizes, device=self.device, generator=self.generator) * scale
        return values.to(self.dtype if dtype is None else dtype)

    def weight(self, *sizes: int) -> Tensor:
        """A weight matrix whose products keep the scale of their inputs."""
        return self.normal(*sizes, scale=sizes[-1] ** -0.5)

    def integers(self, high: int, *sizes: int) -> Tensor:
        """int64 in [0, high)."""
        return torch.randint(0, high, sizes, device=self.device, generator=self.generator)

    def ones(self, *sizes: int) -> Tensor:
        """fp32 ones."""
        return torch.ones(sizes, device=self.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """An operator at one shape.

    Attributes:
        operator: its name in `reca.kernels.OPERATORS`, or `attention`, which is not ours.
        name: where this shape comes from.
        full: sizes of the real step.
        small: sizes for a CPU, where the clock says nothing about a GPU.
        make: Maker -> named inputs.
        ours: (inputs, impl) -> result through the public function.
        plain: the same in plain torch, as one would write it by hand.
        moved: (sizes, bytes per element of activations) -> bytes that a forward and a backward must at least
            read and write.
        flops: sizes -> least FLOPs of forward and backward; 0 where memory is the bound.
        gradients: inputs that receive a gradient; without any there is no backward.
        rivals: name -> function that imports a library and returns its provider; ImportError or
            AttributeError say that it is not there.
        mutates: inputs that the operator changes in place; they are its results, and it returns nothing.
        is_one_pass: whether the forward forms the gradients too, so that only both together have a ceiling.
        is_exact: whether `plain` in fp64 is what `ours` approximates; False where rounding is random on
            purpose, and then no error ratio is formed.
    """

    operator: str
    name: str
    full: Shape
    small: Shape
    make: Callable[[Maker], Inputs]
    ours: Callable[[Inputs, Impl], Output]
    plain: Provider
    moved: Callable[[Shape, int], tuple[int, int]]
    flops: Callable[[Shape], tuple[int, int]] = lambda shape: (0, 0)
    gradients: tuple[str, ...] = ()
    rivals: Mapping[str, Callable[[], Provider]] = field(default_factory=dict)
    mutates: tuple[str, ...] = ()
    is_one_pass: bool = False
    is_exact: bool = True


def make_inputs(
    case: Case, shape: Shape, device: torch.device, dtype: torch.dtype, seed: int
) -> dict[str, Any]:
    """Inputs of a case, those of `case.gradients` as leaves that require one."""
    generator = torch.Generator(device).manual_seed(seed)
    made = dict(case.make(Maker(shape, device, dtype, generator)))
    for name in case.gradients:
        made[name] = made[name].detach().requires_grad_(True)
    return made


def in_fp64(inputs: Inputs, gradients: tuple[str, ...]) -> dict[str, Any]:
    """The same values with every floating tensor in fp64."""
    wide: dict[str, Any] = {}
    for name, value in inputs.items():
        is_floating = isinstance(value, Tensor) and value.is_floating_point()
        wide[name] = value.detach().double() if is_floating else value
        if name in gradients:
            wide[name].requires_grad_(True)
    return wide
