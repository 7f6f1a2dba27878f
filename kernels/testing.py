"""What tests and benchmarks of kernels share: error budgets, inputs, poisoned memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

BUDGET = 2.0


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, uninitialised memory is NaN (the largest value for integers), so what is not written shows."""
    previous = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(previous[0], warn_only=previous[1])
        settings.fill_uninitialized_memory = fill


def _rms(tensor: Tensor) -> Tensor:
    return tensor.square().mean().sqrt()


def error_ratio(got: Tensor, plain: Tensor, exact: Tensor) -> float:
    """Error of a kernel over the error that plain torch makes at the same dtype, both against fp64.

        ratio = max over (rms, max) of |got - exact| / (|plain - exact| + u |exact|)

    u is half a unit in the last place of the dtype of `got` plus one unit of fp32: no result is stored more
    accurately than the first, no exponential is computed more accurately than the second. So a plain result
    that happens to be exact does not make every other one wrong.

    Args:
        got: the kernel's result.
        plain: the same in plain torch at that dtype.
        exact: the same in fp64 from the same (rounded) inputs.
    """
    if got.shape != exact.shape or plain.shape != exact.shape:
        raise ValueError(
            f"error_ratio: shapes differ: {list(got.shape)}, {list(plain.shape)}, {list(exact.shape)}; "
            "compare results of the same inputs"
        )
    if got.dtype != plain.dtype:
        raise TypeError(f"error_ratio: plain must be {got.dtype} like got, got {plain.dtype}; use one dtype")
    if exact.numel() == 0:
        return 0.0
    exact = exact.double()
    error, honest = (got.double() - exact).abs(), (plain.double() - exact).abs()
    unit = torch.finfo(got.dtype).eps / 2 + torch.finfo(torch.float32).eps
    ratios = []
    for norm in (_rms, torch.max):
        numerator, denominator = norm(error), norm(honest) + unit * norm(exact.abs())
        ratios.append(0.0 if float(numerator) == 0.0 else float(numerator / denominator))
    # NaN compares false with everything; it must not pass as a small ratio.
    return float("inf") if any(ratio != ratio for ratio in ratios) else max(ratios)


def assert_within_budget(
    name: str, got: Tensor, plain: Tensor, exact: Tensor, budget: float = BUDGET
) -> None:
    """AssertionError unless `got` is at most `budget` times as wrong as plain torch at that dtype."""
    ratio = error_ratio(got, plain, exact)
    assert ratio <= budget, f"{name}: error is {ratio:.3g} x that of plain torch, the budget is {budget}"


def make_normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """Standard normal values, equal on every device; drawn in fp32, then rounded."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(device)


def misaligned(tensor: Tensor) -> Tensor:
    """The same values one element past an aligned address, with a row stride larger than the row."""
    rows = tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() > 1 else tensor.reshape(-1, 1)
    store = torch.zeros(rows.shape[0], rows.shape[1] + 3, dtype=tensor.dtype, device=tensor.device)
    view = store[:, 1 : 1 + rows.shape[1]]
    view.copy_(rows.detach())
    return view.view_as(tensor) if tensor.dim() > 2 else view if tensor.dim() == 2 else view[:, 0]
