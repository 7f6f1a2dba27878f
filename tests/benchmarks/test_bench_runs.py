"""A run of `reca bench kernels` that meets failures, late hours and small memories, and keeps the rest."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from typer.testing import CliRunner

from reca.benchmarks import calls, gate, operators, timing
from reca.benchmarks.calls import input_sets, per_call, timed
from reca.benchmarks.cases import CASES, Case
from reca.benchmarks.cases.case import make_inputs
from reca.benchmarks.ceilings import measure_ceilings
from reca.benchmarks.gate import COMPILED, OURS, PLAIN
from reca.benchmarks.operators import run_cases
from reca.benchmarks.plot import ceiling_share
from reca.cli import app
from reca.commands.bench import render_bench
from reca.layers.attention_backends import BACKENDS
from reca.profiling.launches import LaunchCounter

CPU = torch.device("cpu")
CEILINGS = measure_ceilings(CPU, torch.float32)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceilings measured once, and no warm-up: no test reads the clock."""
    monkeypatch.setattr(operators, "measure_ceilings", lambda device, dtype: CEILINGS)
    monkeypatch.setattr(timing, "WARM_UP_S", 0.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Minutes that the run believes to have passed, changed by the test."""
    now = [0.0]
    monkeypatch.setattr(operators.time, "monotonic", lambda: 60 * now[0])
    return now


def rows_of(cases: list[Case], **options: Any) -> list[dict[str, Any]]:
    options = {"compiled": False, "rounds": 1, **options}
    return list(run_cases(cases, CPU, torch.float32, full=False, **options))[1:]


def case_of(operator: str, name: str = "") -> Case:
    return next(case for case in CASES if case.operator == operator and name in case.name)


FLOW = case_of("flow_matching_loss")


def failing(error: Exception, *, after: int = 0) -> Callable[[Any], Any]:
    """A provider that works so often and then does not."""
    left = [after]

    def provider(inputs: Any, *impl: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise error
        return FLOW.plain(inputs)

    return provider


@pytest.mark.parametrize("after", [1, 2, 3])  # while it is prepared, and in two places of the measurement
def test_a_rival_that_fails_only_when_it_is_timed_is_left_out(after: int) -> None:
    late = failing(RuntimeError("no more memory\nand a long story"), after=after)
    records = rows_of([replace(FLOW, rivals={"late": lambda: late})])
    mine = [record for record in records if record["provider"] == "late"]
    modes = ["forward", "backward", "both"]
    assert [(r["mode"], r.get("why_not")) for r in mine] == [
        (m, "RuntimeError: no more memory") for m in modes
    ]
    assert [r["mode"] for r in records if r["provider"] == OURS and "ms_p50" in r] == modes


def test_a_rival_whose_package_is_broken_is_named_with_the_error() -> None:
    def load() -> Any:
        raise OSError("libcudart.so.11 cannot be opened")

    records = rows_of([replace(FLOW, rivals={"old": load})])
    assert records[0]["why_not"] == "broken: OSError: libcudart.so.11 cannot be opened"
    assert any("ms_p50" in record for record in records)


def test_a_case_that_fails_is_recorded_as_broken_and_the_next_is_measured() -> None:
    broken = replace(FLOW, name="broken", make=failing(RuntimeError("an illegal address")))
    first, *others = rows_of([broken, FLOW])
    assert first["gate"] == "broken" and first["why_not"] == "RuntimeError: an illegal address"
    assert {r["case"] for r in others if r["provider"] == OURS and "ms_p50" in r} == {FLOW.name}


def test_a_case_that_does_not_fit_is_not_measured_but_not_wrong() -> None:
    large = replace(FLOW, make=failing(torch.OutOfMemoryError("tried to allocate 300 GiB")))
    [record] = rows_of([large])
    assert "gate" not in record and "300 GiB" in record["why_not"]


@pytest.mark.parametrize("is_right", [True, False])
def test_a_red_gate_is_the_exit_code(is_right: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = replace(FLOW, ours=lambda i, impl: 1.001 * FLOW.ours(i, impl))  # type: ignore[operator]
    monkeypatch.setattr("reca.commands.bench.CASES", [FLOW if is_right else wrong])
    command = ["bench", "kernels", "--out", str(tmp_path / "k.jsonl"), "--device", "cpu", "--no-compile"]
    result = CliRunner().invoke(app, [*command, "--rounds", "1", "--only", "flow_matching_loss"])
    assert result.exit_code == (0 if is_right else 1), result.output
    assert ("no time is given" in result.output) is not is_right


def test_the_hour_ends_between_modes_and_before_cases(clock: list[float]) -> None:
    def ours(inputs: Any, impl: Any) -> Any:
        clock[0] += 3
        return FLOW.ours(inputs, impl)

    records = rows_of([replace(FLOW, ours=ours), FLOW], minutes=7)
    found = [(r["mode"], r["why_not"]) for r in records if r["provider"] == OURS and "why_not" in r]
    assert found == [("backward", "the time was over"), (None, "not begun within 7 minutes")]


def test_compiled_rivals_are_left_out_of_cases_that_begin_behind_schedule(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)

    def slow(inputs: Any, impl: Any) -> Any:
        clock[0] = 6
        return FLOW.ours(inputs, impl)

    records = rows_of([replace(FLOW, name="slow", ours=slow), *[FLOW] * 3], minutes=10, compiled=True)
    compiled = [r for r in records if r["provider"] == COMPILED]
    assert {r["case"] for r in compiled if "ms_p50" in r} >= {"slow"}
    # after 6 of 10 minutes the second of four is late, the third and fourth are not
    assert [r["why_not"] for r in compiled if "why_not" in r] == ["behind schedule"]


def test_captured_calls_are_counted_one_by_one() -> None:
    whole = timing.Timing(p20=1.0, p50=2.0, p80=4.0, rounds=3, calls=5, peak_bytes=7)
    assert per_call(whole, 2) == timing.Timing(0.5, 1.0, 2.0, rounds=3, calls=10, peak_bytes=None)


def test_inputs_beyond_the_cache_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    first = make_inputs(FLOW, FLOW.small, CPU, torch.float32, seed=0)
    size = sum(value.nbytes for value in first.values() if isinstance(value, Tensor))
    for cache, count in ((size // 2, 1), (size, 2), (100 * size, 16)):
        monkeypatch.setitem(calls._CACHE_BYTES, "cpu", cache)
        assert len(input_sets(FLOW, FLOW.small, CPU, torch.float32, first)) == count


def test_where_the_forward_forms_the_gradients_only_both_together_have_a_ceiling() -> None:
    records = rows_of([case_of("masked_token_loss")])
    shares = {r["mode"]: ceiling_share(r) for r in records if r["provider"] == OURS}
    assert shares["forward"] is None and shares["backward"] is None
    assert shares["both"] is not None and shares["both"] > 0


def test_people_see_who_was_not_timed_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    late = failing(RuntimeError("no kernel here"))
    render_bench(rows_of([replace(FLOW, rivals={"late": lambda: late})]))
    assert "without late (flow_matching_loss): RuntimeError: no kernel here" in capsys.readouterr().out


def test_every_back_end_of_attention_is_a_rival_or_says_why_not() -> None:
    records = rows_of([case_of("attention", "bagel")])
    timed_here = {record["provider"] for record in records if "ms_p50" in record}
    assert timed_here == {OURS, PLAIN, "sdpa"}
    reasons = {r["provider"]: r["why_not"] for r in records if "why_not" in r}
    assert reasons.keys() == BACKENDS.keys() - {"reference", "counted", "sdpa"} | {"cudnn"}
    assert "flash_attn_interface is not installed" in reasons["flash3"]


class EightBit(torch.optim.AdamW):
    """Stands in for a library's optimizer, and remembers how it was made."""

    made: dict[str, Any]

    def __init__(self, parameters: Any, bf16_stochastic_round: bool = False, **settings: Any) -> None:
        super().__init__(parameters, **settings)
        EightBit.made = {"bf16_stochastic_round": bf16_stochastic_round, **settings}


def offer(monkeypatch: pytest.MonkeyPatch, module: str, **contents: Any) -> None:
    """Make `import module` give these names."""
    parts = module.split(".")
    for depth in range(1, len(parts) + 1):
        name = ".".join(parts[:depth])
        if name not in sys.modules:
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name, value in contents.items():
        monkeypatch.setattr(sys.modules[module], name, value, raising=False)


def test_torchao_is_timed_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def quantize(layer: torch.nn.Linear, config: object) -> None:
        assert config == "weights only" and not layer.weight.requires_grad

    offer(monkeypatch, "torchao.optim", AdamW8bit=EightBit)
    offer(
        monkeypatch, "torchao.quantization", Float8WeightOnlyConfig=lambda: "weights only", quantize_=quantize
    )
    fakes = {"to_nf4": lambda w, block, scales: w, "linear_nf4": lambda x, w: x @ w.t()}
    offer(monkeypatch, "torchao.quantization.quantize_.workflows.nf4.nf4_tensor", **fakes)
    cases = [case_of("adamw", "8 bits"), case_of("skinny_linear", "fp8"), case_of("skinny_linear", "NF4")]
    records = [record for record in rows_of(cases) if record["provider"] == "torchao"]
    assert [r["case"] for r in records if r["mode"] == "forward"] == [case.name for case in cases]
    assert all(r["error_ratio"] is None or r["error_ratio"] < 3 for r in records)
    assert EightBit.made["bf16_stochastic_round"] is True and EightBit.made["weight_decay"] > 0


def test_the_norm_of_xformers_is_named_with_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        raise ValueError("Gradients not supported.")

    offer(monkeypatch, "xformers.ops.rmsnorm", rms_norm=rms_norm)
    reasons = {r["provider"]: r.get("why_not") for r in rows_of([case_of("rms_norm", "input norm")])}
    assert reasons["xformers"] == "ValueError: Gradients not supported."


def ratio_without_values(got: Tensor, plain: Tensor, exact: Tensor) -> float:
    """What `error_ratio` holds in memory."""
    exact = exact.double()
    error, honest = (got.double() - exact).abs(), (plain.double() - exact).abs()
    for tensor in (error, honest, exact.abs()):
        tensor.square().mean()
    return 0.0


def bytes_without_values(case: Case) -> int:
    """Most that a case holds: the gate in fp64, or kept graphs of three forms for every set of inputs."""
    forms = {OURS: lambda i: case.ours(i, "auto"), PLAIN: case.plain, COMPILED: case.plain}
    with FakeTensorMode(), LaunchCounter() as counter:
        inputs = make_inputs(case, case.full, CPU, torch.bfloat16, seed=0)
        ratios = gate.errors(case, forms, inputs)
        assert not any(isinstance(ratio, str) for ratio in ratios.values())
        gate_bytes, counter.peak_bytes = counter.peak_bytes, counter.live_bytes
        sets = len(input_sets(case, case.full, CPU, torch.bfloat16, inputs))
        mode = "backward" if case.gradients else "forward"
        functions = [timed(form, [inputs], case.gradients, mode) for form in forms.values()]
        for function in functions:
            function(0)
    return max(gate_bytes, sets * counter.peak_bytes)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.operator}: {c.name}")
def test_full_sizes_fit_a_gpu_of_141_gb(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "error_ratio", ratio_without_values)
    monkeypatch.setitem(calls._CACHE_BYTES, "cpu", calls._CACHE_BYTES["cuda"])
    try:
        held = bytes_without_values(case)
    except (DataDependentOutputException, DynamicOutputShapeException):
        pytest.skip(
            "its inputs or its plain form read values on the host, so they cannot be counted without any"
        )
    assert 0 < held < 130e9
    if case.operator == "gated_mlp" and "alone" in case.name:
        assert held > 30e9  # that the counting sees what it should


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_short_operators_are_timed_as_a_graph_on_a_gpu() -> None:
    records = list(
        run_cases([FLOW], torch.device("cuda"), torch.bfloat16, full=True, compiled=False, rounds=3)
    )
    times = {r["mode"]: r["ms_p50"] for r in records[1:] if r["provider"] == OURS and "ms_p50" in r}
    assert times["both, graph"] < times["both"] and "forward, graph" in times
