"""Clock and records of the benchmarks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from reca.benchmarks import results, timing
from reca.benchmarks.environment import environment
from reca.errors import ConfigError


def record(provider: str, low: float, middle: float, high: float) -> dict[str, object]:
    fields = {"operator": "op", "case": "c", "mode": "both", "dtype": "bfloat16", "device": "cuda"}
    return {**fields, "provider": provider, "ms_p20": low, "ms_p50": middle, "ms_p80": high}


def test_quantiles_are_those_of_linear_interpolation() -> None:
    samples = [5.0, 1.0, 3.0, 2.0, 4.0]
    assert timing.quantile(samples, 0.5) == 3.0
    assert timing.quantile(samples, 0.2) == pytest.approx(1.8)
    assert timing.quantile(samples, 0.8) == pytest.approx(4.2)
    assert timing.quantile([7.0], 0.8) == 7.0


def test_rivals_are_timed_in_turns_with_the_next_inputs_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "WARM_UP_S", 0.0)
    monkeypatch.setattr(timing, "_calls_of_a_window", lambda function, device: 2)
    monkeypatch.setattr(timing, "_peak_bytes", lambda function, device: None)
    called: list[tuple[str, int]] = []
    functions = {name: (lambda turn, name=name: called.append((name, turn))) for name in ("a", "b")}
    found = timing.measure(functions, torch.device("cpu"), rounds=2)
    first = [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    assert called == [*first, ("a", 2), ("a", 3), ("b", 2), ("b", 3)]
    assert (found["a"].rounds, found["a"].calls, found["a"].peak_bytes) == (2, 2, None)


def test_a_window_holds_many_calls_of_a_quick_function_and_one_of_a_slow_one() -> None:
    def slow(turn: int) -> None:
        torch.randn(400, 400) @ torch.randn(400, 400)

    found = timing.measure({"quick": lambda turn: None, "slow": slow}, torch.device("cpu"), rounds=1)
    assert found["quick"].calls > 100 > found["slow"].calls
    assert found["slow"].p50 > found["quick"].p50


def test_two_files_are_compared_by_medians_and_only_apart_spreads_count_as_changed() -> None:
    before = [record("reca", 1.0, 1.1, 1.2), record("torch", 2.0, 2.1, 2.2), record("gone", 1.0, 1.0, 1.0)]
    after = [record("reca", 1.3, 1.32, 1.4), record("torch", 1.9, 2.0, 2.1), {"record": "run"}]
    rows = results.compare(before, after)
    assert [(row["provider"], row["changed"]) for row in rows] == [("reca", True), ("torch", False)]
    assert rows[0]["ratio"] == pytest.approx(1.2)


def test_a_file_that_holds_no_records_is_named_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with pytest.raises(ConfigError, match="cannot be read"):
        results.read(path)
    path.write_text('{"a": 1}\nnonsense\n')
    with pytest.raises(ConfigError, match=r"r\.jsonl:2 is not JSON"):
        results.read(path)
    path.write_text("3\n")
    with pytest.raises(ConfigError, match=r"r\.jsonl:1 is not a record"):
        results.read(path)


def test_records_are_appended_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "r.jsonl"
    results.append(path, [{"a": 1}])
    results.append(path, [{"a": float("nan")}])
    assert results.read(path) == [{"a": 1}, {"a": None}]


def test_a_record_says_where_it_comes_from() -> None:
    origin = environment()
    assert origin["machine"]["cpu"]
    assert torch.__version__.startswith(origin["versions"]["torch"].split("+")[0])
    assert set(origin) == {"time", "command", "commit", "machine", "versions"}
