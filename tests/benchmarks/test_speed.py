"""CPU-sized cases under pytest-benchmark, each run once unless timing is asked for:

pytest tests/benchmarks/test_speed.py --benchmark-enable [--benchmark-save=NAME]
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from reca.benchmarks.calls import timed
from reca.benchmarks.cases import CASES, Case
from reca.benchmarks.cases.case import Provider, make_inputs
from reca.benchmarks.gate import OURS, PLAIN

CPU = torch.device("cpu")


@pytest.mark.parametrize("provider", [OURS, PLAIN])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.operator}/{case.name}")
def test_results_and_gradients_of_every_case_are_finite(case: Case, provider: str, benchmark: Any) -> None:
    benchmark.group = f"{case.operator}: {case.name}"
    inputs = make_inputs(case, case.small, CPU, torch.float32, seed=0)
    run: Provider = case.plain if provider == PLAIN else lambda given: case.ours(given, "auto")
    mode = "both" if case.gradients else "forward"
    made = benchmark(timed(run, [inputs], case.gradients, mode), 0)
    results = [inputs[name] for name in case.mutates] or ([made] if isinstance(made, Tensor) else made)
    assert results and all(result.isfinite().all() for result in results if result.is_floating_point())
