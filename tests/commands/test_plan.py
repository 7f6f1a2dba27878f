"""`reca plan`: its keys, its table, and how mistakes end."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from reca import cli

Run = Callable[..., tuple[int, str, str]]
KEYS = {
    "gpu",
    "gpu_hours",
    "images_per_second",
    "peak_memory_gb",
    "fits",
    "min_tflop_per_image",
    "executed_tflop_per_image",
    "trained_parameters",
    "basis",
}


@pytest.fixture
def reca(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Call the console script in this process, in an empty folder; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["reca", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        output = capsys.readouterr()
        return int(end.value.code or 0), output.out, output.err

    return call


def test_the_document_has_the_keys_of_the_contract_and_stdout_nothing_else(reca: Run) -> None:
    code, out, err = reca(
        "plan", "janus-smoke", "--gpu", "rtx-4090", "steps=7", "optim.warmup_steps=0", "--json"
    )
    document = json.loads(out)
    assert code == 0 and document.keys() >= KEYS
    assert document["gpu"] == "rtx-4090" and document["steps"] == 7 and document["fits"] is True
    assert document["basis"].startswith("predicted")
    assert document["gpu_hours"] == pytest.approx(7 * document["seconds_per_step"] / 3600)
    assert document["images_per_second"] == pytest.approx(4 / document["seconds_per_step"])
    assert document["launches_per_step"] > 2 * document["microbatches"][0]["launches"]
    assert "counting reconstruction" in err


def test_people_get_a_table_that_calls_the_time_predicted(reca: Run) -> None:
    code, out, _ = reca("plan", "janus-smoke", "--gpu", "h200")
    assert code == 0
    lines = out.splitlines()
    assert all("PREDICTED" in line for line in lines if "second" in line and "predicted" not in line)
    assert any("trained weights" in line for line in lines)
    assert "It fits." in lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("janus-smoke", "--gpu", "h20"), "unknown GPU 'h20'; did you mean 'h200'"),
        (("bagle-7b", "--gpu", "h200"), "unknown recipe 'bagle-7b'; did you mean 'bagel-7b'"),
        (("janus-smoke", "--gpu", "h200", "--gpus", "2"), "`reca train` runs on one GPU so far"),
        (("janus-smoke", "--gpu", "h200", "steps=0"), "steps"),
    ],
)
def test_mistakes_end_with_2_and_their_cure(reca: Run, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = reca("plan", *arguments)
    assert code == 2 and out == ""
    assert message in err


def test_what_is_too_large_is_said_with_what_would_help(reca: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from reca.profiling.roofline import DEVICES, Device

    small = Device(1.0, 100, 10, 1.0)
    monkeypatch.setattr("reca.recipes.plan.DEVICES", {**DEVICES, "h200": small})
    code, out, _ = reca("plan", "janus-smoke", "--gpu", "h200")
    assert code == 0
    assert "It does NOT fit." in out
    assert "no option of this version makes it fit" in out
