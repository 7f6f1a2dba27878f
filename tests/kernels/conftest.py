"""Kernel tests run the Triton code on the GPU where there is one, through Triton's interpreter elsewhere."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from reca.kernels.testing import poisoned_memory as poisoned

settings.register_profile("kernels", max_examples=12, deadline=None, derandomize=True, database=None)
settings.load_profile("kernels")


@pytest.fixture(scope="module", autouse=True)
def poison() -> Iterator[None]:
    """Every kernel test runs on poisoned memory."""
    with poisoned():
        yield


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
