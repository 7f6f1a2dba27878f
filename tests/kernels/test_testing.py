"""The instruments themselves: error budgets that can fail, poison that shows, misalignment that is one."""

from __future__ import annotations

import pytest
import torch

from reca.kernels.testing import (
    assert_within_budget,
    error_ratio,
    make_normal,
    misaligned,
    poisoned_memory,
)


def test_the_budget_passes_what_is_as_wrong_as_plain_torch() -> None:
    exact = make_normal(100, seed=0, dtype=torch.float64)
    rounded = exact.bfloat16()
    assert error_ratio(rounded, rounded, exact) < 1


@pytest.mark.parametrize("units", [4, -4])
def test_the_budget_fails_what_is_a_few_units_in_the_last_place_worse(units: int) -> None:
    exact = make_normal(100, seed=0, dtype=torch.float64)
    plain = exact.bfloat16()
    worse = plain.clone()
    worse[exact.abs().argmax()] *= 1 + units * 2**-8
    with pytest.raises(AssertionError, match=r"^loss: error is .* x that of plain torch, the budget is 2.0"):
        assert_within_budget("loss", worse, plain, exact)


def test_the_budget_fails_nan_and_infinity() -> None:
    exact = torch.ones(3, dtype=torch.float64)
    for wrong in (float("nan"), float("inf")):
        assert error_ratio(torch.tensor([1.0, wrong, 1.0]), torch.ones(3), exact) == float("inf")


def test_an_error_where_the_exact_result_is_zero_is_seen() -> None:
    zeros = torch.zeros(3)
    assert error_ratio(zeros, zeros, zeros.double()) == 0.0
    assert error_ratio(zeros + 1e-30, zeros, zeros.double()) == float("inf")


def test_results_of_different_shapes_or_dtypes_are_not_compared() -> None:
    with pytest.raises(
        ValueError, match=r"^error_ratio: shapes differ: \[1\], \[2\], \[2\]; compare results of"
    ):
        error_ratio(torch.zeros(1), torch.zeros(2), torch.zeros(2))
    with pytest.raises(
        TypeError, match=r"^error_ratio: plain must be torch.float16 like got, got torch.float32"
    ):
        error_ratio(torch.zeros(2).half(), torch.zeros(2), torch.zeros(2))


def test_fresh_memory_is_poisoned_inside_and_as_before_outside() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    with poisoned_memory():
        assert torch.empty(3).isnan().all()
        assert torch.zeros(2).bfloat16().new_empty(3).isnan().all()
        assert torch.empty(2, dtype=torch.int64).eq(torch.iinfo(torch.int64).max).all()
    assert torch.are_deterministic_algorithms_enabled() == before


@pytest.mark.parametrize("shape", [(5,), (4, 3), (2, 3, 5), (0, 4)])
def test_misaligned_keeps_the_values_and_moves_them_off_their_address(shape: tuple[int, ...]) -> None:
    tensor = make_normal(*shape, seed=0)
    moved = misaligned(tensor)
    assert torch.equal(moved, tensor)
    assert moved.storage_offset() == 1
    assert tensor.numel() == 0 or not moved.is_contiguous()
