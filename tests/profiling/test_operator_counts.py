"""Kernels that an operator is counted with, against those that its launcher starts under the interpreter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from reca.benchmarks.cases import CASES, Case
from reca.benchmarks.cases.case import make_inputs
from reca.kernels import interpreted_kernels, masked_token_loss, qk_norm_rope
from reca.kernels._library import LAUNCHERS
from reca.kernels.masked_token_loss.op import chunk_rows
from reca.profiling.launches import LaunchCounter, _kernels


class Comparison(TorchDispatchMode):
    """Runs operators by their launchers; keeps (operator, kernels counted, kernels started) of each call."""

    def __init__(self, starts: list[str]) -> None:
        super().__init__()
        self.starts = starts
        self.calls: list[tuple[str, int, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace != "reca":
            return func(*args, **(kwargs or {}))
        counted, before = _kernels(func, args, None), len(self.starts)
        with LaunchCounter() as around:
            out = LAUNCHERS[func._schema.name.removeprefix("reca::")](*args)
        self.calls.append((func._schema.name, counted, len(self.starts) - before + around.kernels))
        return out


@pytest.fixture
def comparison(monkeypatch: pytest.MonkeyPatch) -> Iterator[Comparison]:
    """Inside, Triton code is interpreted and its launches are noted; what the interpreter copies is not."""
    from triton.runtime import interpreter

    starts: list[str] = []
    run = interpreter.GridExecutor.__call__

    def noted(self: Any, *arguments: Any, **constants: Any) -> None:
        starts.append(self.fn.__name__)
        with _disable_current_modes():
            run(self, *arguments, **constants)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", noted)
    with interpreted_kernels(), Comparison(starts) as mode:
        yield mode


def run_case(case: Case) -> None:
    inputs = make_inputs(case, case.small, torch.device("cpu"), torch.float32, seed=0)
    outputs: Any = case.ours(inputs, "fused")
    if case.gradients:
        flowing = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o.requires_grad]
        upstream = [torch.ones_like(output) for output in flowing]
        torch.autograd.grad(flowing, [inputs[name] for name in case.gradients], upstream)


def run_in_place() -> None:
    """What no case calls: heads written into rows that are there already."""
    qkv, turn, weight = torch.ones(5, 4 * 8), torch.ones(5, 4), torch.ones(8)
    into = (torch.zeros(7, 1, 8), torch.zeros(7, 1, 8), torch.arange(5))
    qk_norm_rope(qkv, weight, weight, turn, turn, heads=2, kv_heads=1, eps=1e-6, into=into, impl="fused")


def test_every_operator_is_counted_as_the_kernels_that_its_launcher_starts(comparison: Comparison) -> None:
    for case in CASES:
        run_case(case)
    run_in_place()
    assert [call for call in comparison.calls if call[1] != call[2]] == []
    seen = {name.removeprefix("reca::") for name, _, _ in comparison.calls}
    assert seen == set(LAUNCHERS), "an operator that no case calls; add one to benchmarks/cases"


def test_the_token_loss_launches_more_where_it_walks_its_rows_in_more_chunks() -> None:
    def kernels(rows: int) -> int:
        with FakeTensorMode(), LaunchCounter() as counter:
            hidden, weight = torch.empty(rows, 16, requires_grad=True), torch.empty(vocab, 16)
            masked_token_loss(hidden, weight, torch.zeros(rows, dtype=torch.int64), impl="auto")
        return sum(launch.kernels for launch in counter.launches if "token_loss" in launch.operator)

    vocab, rows = 100_000, 20_000
    chunks = -(-rows // chunk_rows(rows, vocab, itemsize=4))
    assert chunks > 2
    # each with a product, its loss and the product of its gradient
    assert kernels(rows) == kernels(16) + 3 * (chunks - 1)


def test_without_triton_an_operator_counts_as_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with FakeTensorMode(), LaunchCounter() as counter:
        masked_token_loss(torch.ones(7, 24), torch.ones(9, 24), torch.zeros(7, dtype=torch.int64))
    assert [launch.kernels for launch in counter.launches if launch.operator.startswith("reca")] == [1]
