"""`reca bench kernels`: right before fast, rivals in the same run, nothing said over a red gate."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from reca.benchmarks import operators, results, timing
from reca.benchmarks.cases import CASES, Case
from reca.benchmarks.cases.case import make_inputs
from reca.benchmarks.ceilings import measure_ceilings
from reca.benchmarks.gate import COMPILED, OURS, PLAIN
from reca.benchmarks.operators import run_cases
from reca.benchmarks.plot import draw
from reca.benchmarks.tune import candidates, tune_cases
from reca.cli import app
from reca.commands.bench import bench_kernels, choose_cases, render_bench
from reca.errors import ConfigError
from reca.kernels import OPERATORS
from reca.kernels._launch import launch_config, tried_config

CPU = torch.device("cpu")
CEILINGS = measure_ceilings(CPU, torch.float32)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceilings measured once, and no warm-up: no test reads the clock."""
    monkeypatch.setattr(operators, "measure_ceilings", lambda device, dtype: CEILINGS)
    monkeypatch.setattr(timing, "WARM_UP_S", 0.0)


def rows_of(cases: list[Case], **options: Any) -> list[dict[str, Any]]:
    options = {"compiled": False, "rounds": 1, **options}
    return list(run_cases(cases, CPU, torch.float32, full=False, **options))


def case_of(operator: str) -> Case:
    return next(case for case in CASES if case.operator == operator)


def test_every_operator_has_a_case() -> None:
    assert {case.operator for case in CASES} == {*OPERATORS, "attention"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.operator}: {case.name}")
def test_every_case_runs_and_is_right_at_small_size(case: Case) -> None:
    run, *records = rows_of([case])
    assert run["record"] == "run" and run["sizes"] == "small" and run["copy_gbps"] > 0
    ours = [record for record in records if record["provider"] == OURS]
    assert [record["mode"] for record in ours] == (
        ["forward", "backward", "both"] if case.gradients else ["forward"]
    )
    assert all(record["gate"] == "green" and record["ms_p50"] > 0 for record in ours)
    assert {record["provider"] for record in records} >= {OURS, PLAIN}


def test_no_time_is_given_over_a_red_gate() -> None:
    case = case_of("rms_norm")
    wrong = replace(case, ours=lambda inputs, impl: 1.001 * case.ours(inputs, impl))  # type: ignore[operator]
    records = rows_of([wrong])[1:]
    assert not any("ms_p50" in record for record in records)
    [red] = [record for record in records if record["provider"] == OURS]
    assert red["gate"] == "red" and "x that of plain torch, the budget is 2" in red["why_not"]


def test_a_wrong_gradient_is_as_red_as_a_wrong_result() -> None:
    case = case_of("flow_matching_loss")

    def doubled(inputs: Any, impl: Any) -> Any:
        loss = case.ours(inputs, impl)
        return loss + (loss - loss.detach())  # type: ignore[operator, union-attr]

    assert rows_of([replace(case, ours=doubled)])[1]["gate"] == "red"


def test_a_rival_that_is_not_installed_or_fails_is_named_with_its_reason() -> None:
    def missing() -> Any:
        import a_package_that_is_not_there  # type: ignore[import-not-found]  # noqa: F401

    def broken() -> Any:
        def provider(inputs: Any) -> Any:
            raise RuntimeError("no kernel for this device")

        return provider

    case = replace(case_of("flow_matching_loss"), rivals={"absent": missing, "broken": broken})
    reasons = {r["provider"]: r["why_not"] for r in rows_of([case])[1:] if "why_not" in r}
    assert reasons["absent"] == "not installed: No module named 'a_package_that_is_not_there'"
    assert reasons["broken"] == "RuntimeError: no kernel for this device"


def test_what_has_not_begun_in_time_is_recorded_as_not_measured() -> None:
    [_, record] = rows_of([case_of("rms_norm")], minutes=0.0)
    assert record["why_not"] == "not begun within 0.0 minutes" and "ms_p50" not in record


def test_torch_compile_is_a_rival_unless_it_is_left_out() -> None:
    case = case_of("flow_matching_loss")
    compiled = [r for r in rows_of([case], compiled=True)[1:] if r["provider"] == COMPILED]
    assert [record["mode"] for record in compiled] == ["forward", "backward", "both"]


def test_the_command_appends_lines_draws_the_picture_and_prints_json(tmp_path: Path) -> None:
    out, plot = tmp_path / "kernels.jsonl", tmp_path / "kernels.png"
    command = ["bench", "kernels", "--out", str(out), "--plot", str(plot), "--no-compile", "--rounds", "1"]
    command += ["--device", "cpu", "--operator", "flow_matching_loss", "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    lines = results.read(out)
    assert json.loads(result.stdout) == lines and lines[0]["machine"]["cpu"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    bench_kernels(out, operators=["flow_matching_loss"], device="cpu", compiled=False, rounds=1)
    assert len(results.read(out)) == 2 * len(lines)


def test_the_table_for_people_says_that_small_sizes_are_small(capsys: pytest.CaptureFixture[str]) -> None:
    render_bench(rows_of([case_of("flow_matching_loss")]))
    assert "not how fast a GPU is" in capsys.readouterr().out


def test_unknown_names_and_options_that_would_be_ignored_are_errors(tmp_path: Path) -> None:
    out = tmp_path / "x.jsonl"
    with pytest.raises(ConfigError, match=r"unknown operator 'rmsnorm'; .*rms_norm"):
        choose_cases(["rmsnorm"])
    with pytest.raises(ConfigError, match=r"unknown dtype 'bf61'; .*bf16"):
        bench_kernels(out, dtype="bf61")
    with pytest.raises(ConfigError, match="--plot would be ignored by --tune"):
        bench_kernels(out, tune=True, plot=tmp_path / "x.png")
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        list(tune_cases(CASES, CPU, torch.float32))
    with pytest.raises(ConfigError, match="nothing to draw"):
        draw([], out)
    assert not out.exists()


def test_a_tried_configuration_replaces_the_table_only_inside() -> None:
    before = launch_config("rms_norm", 90, torch.bfloat16, 3584)
    other = next(config for config in candidates("rms_norm") if config != before)
    with tried_config("rms_norm", other):
        assert launch_config("rms_norm", 90, torch.bfloat16, 3584) == other
    assert launch_config("rms_norm", 90, torch.bfloat16, 3584) == before


def test_inputs_are_equal_for_equal_seeds_and_different_otherwise() -> None:
    case = case_of("rms_norm")
    first, same, other = (
        make_inputs(case, case.small, CPU, torch.float32, seed=seed)["x"] for seed in (0, 0, 1)
    )
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert first.requires_grad


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_full_sizes_in_bf16_are_right_on_a_gpu() -> None:
    records = list(
        run_cases(CASES, torch.device("cuda"), torch.bfloat16, full=True, compiled=False, rounds=1)
    )
    assert [r for r in records if r.get("gate") == "red"] == []
