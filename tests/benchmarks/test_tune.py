"""`reca bench kernels --tune`: what it proposes, and what it never would."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from reca.benchmarks import tune
from reca.benchmarks.cases import CASES
from reca.benchmarks.timing import Timing
from reca.benchmarks.tune import _Search, tune_cases
from reca.commands.bench import render_bench
from reca.kernels import interpreted_kernels
from reca.kernels._launch import Entry, LaunchConfig, launch_config

CASE = next(case for case in CASES if case.operator == "flow_matching_loss")
SMALL = replace(CASE, full=CASE.small)
SLOW, QUICK, QUICKEST = (LaunchConfig(tile, 4) for tile in (256, 512, 1024))
MS = {None: 1.0, SLOW: 0.99, QUICK: 0.8, QUICKEST: 0.5}


@pytest.fixture(autouse=True)
def timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three candidates with known times, launched by the interpreter."""

    def time(self: _Search, sets: Any) -> Timing:
        config = launch_config(CASE.operator, 0, torch.float32, 16)
        ms = MS.get(config, MS[None])
        return Timing(ms, ms, ms, 1, 1, None)

    monkeypatch.setattr(_Search, "_time", time)
    monkeypatch.setattr(tune, "candidates", lambda operator: [SLOW, QUICK, QUICKEST])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")


def search(deadline: float = float("inf"), case: Any = SMALL) -> dict[str, Any]:
    with interpreted_kernels():
        return _Search(case, torch.device("cpu"), torch.float32, 1, deadline).run()


def test_the_quickest_is_proposed_as_a_line_for_the_table() -> None:
    record = search()
    assert record["table_ms"] == 1.0 and record["not_tried"] == []
    assert record["tried"] == {"tile=256 warps=4": 0.99, "tile=512 warps=4": 0.8, "tile=1024 warps=4": 0.5}
    entry = eval(record["proposal"], {"Entry": Entry, "LaunchConfig": LaunchConfig})
    assert entry.config == QUICKEST
    assert (entry.max_width, entry.architectures, entry.itemsize) == (16, (0,), 4)
    assert entry.reason == f"measured: a GPU, {CASE.name}: 0.5 ms where the table gave 1 ms"


def test_a_configuration_that_is_wrong_is_never_proposed() -> None:
    def ours(inputs: Any, impl: Any) -> Any:
        loss: Any = SMALL.ours(inputs, impl)
        return 1.1 * loss if launch_config(CASE.operator, 0, torch.float32, 16) == QUICKEST else loss

    assert "tile=512" in search(case=replace(SMALL, ours=ours))["proposal"]


def test_nothing_is_proposed_for_a_gain_that_two_runs_differ_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "candidates", lambda operator: [SLOW])
    assert search()["proposal"] is None


def test_what_there_was_no_time_for_is_named() -> None:
    record = search(deadline=0.0)
    assert record["tried"] == {} and len(record["not_tried"]) == 3


class Gpu:
    """A device by its type alone."""

    type = "cuda"


def test_cases_after_the_last_minute_or_a_failure_are_recorded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: _Search) -> dict[str, Any]:
        raise RuntimeError("out of resource")

    monkeypatch.setattr(_Search, "run", fail)
    device: Any = Gpu()
    [failed] = tune_cases([CASE], device, torch.float32)
    [late] = tune_cases([CASE], device, torch.float32, minutes=-1.0)
    assert failed["why_not"] == "RuntimeError: out of resource"
    assert late["why_not"] == "not begun within -1.0 minutes"
    render_bench([failed, late])
    assert "out of resource" in capsys.readouterr().out
