"""`reca export`: what it prints, and that a fresh process really reloads what was written."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from reca import cli
from reca.commands.train import train_recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    overrides = ["steps=1", "optim.warmup_steps=0", "sample.images=0", "data.images=2", "optim.ema=0.9"]
    train_recipe("janus-smoke", overrides, extra={}, run=folder, resume=None, quiet=True)
    return folder


def reca(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["reca", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_verify_reloads_in_a_fresh_process_before_anything_appears(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert reca(monkeypatch, "export", str(run), "--out", str(out), "--verify", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["verified"]["differences"] == [] and result["verified"]["tensors"] > 200
    assert result["verified"]["loss"]["reconstruction"] > 0
    assert result["files"]["model.safetensors"] == (out / "model.safetensors").stat().st_size
    assert json.loads((out / "reca_export.json").read_text())["verified"] == result["verified"]


def test_people_see_the_files_and_whether_there_is_an_average(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reca(monkeypatch, "export", str(run), "--out", str(tmp_path / "out")) == 0
    text = capsys.readouterr().out
    assert "  model.safetensors\n" in text and "janus/tiny at step 1, trained weights" in text
    assert "--ema exports that" in text and "verified" not in text
    assert reca(monkeypatch, "export", str(run), "--out", str(tmp_path / "ema"), "--ema") == 0
    assert "average weights" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--out", "new", "--to", "nothing"), 2, "known: official"),
        (("--out", "."), 2, "exists; choose another folder"),
    ],
)
def test_a_mistake_ends_with_its_exit_code(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert reca(monkeypatch, "export", str(run), *arguments) == code
    assert message in capsys.readouterr().err
