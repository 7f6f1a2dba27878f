"""The console script: what it offers, what it prints, and how each mistake ends."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from reca import cli
from reca.commands.train import default_folder

COMMANDS = ("train", "sample", "reconstruct", "edit", "export", "verify", "doctor", "report", "data")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def reca(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Call the console script in this process, in an empty folder; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["reca", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        output = capsys.readouterr()
        return int(end.value.code or 0), output.out, output.err

    return call


def test_help_names_every_command_and_imports_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['reca', '--help']\n"
        "from reca.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd="/")
    assert all(command in result.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", [*COMMANDS[:-1], "data check", "data preview"])
def test_the_help_of_every_command_shows_an_example(reca: Run, command: str) -> None:
    code, out, _ = reca(*command.split(), "--help")
    assert code == 0
    assert "Example:" in out


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (("train", "quikstart"), 2, "did you mean 'quickstart'"),
        (("train", "bagel-smoke", "optim.lrr=1"), 2, "did you mean 'optim.lr'"),
        (("train", "bagel-smoke", "model=bagel/tinny"), 2, "did you mean 'tiny'"),
        (("train", "bagel-7b", "--data", "package:photos"), 2, "give --weights FOLDER"),
        (("train", "bagel-7b", "--weights", "random"), 2, "give --data PATH"),
        (("train", "bagel-smoke", "--data", "nowhere"), 3, "nowhere does not exist"),
        (("train", "bagel-smoke", "--data", "."), 3, "holds no images"),
        (("train", "bagel-smoke", "--weights", "nowhere"), 4, "nowhere do not exist"),
        (("train", "bagel-smoke", "--weights", "."), 4, "expected one of ema.safetensors"),
        (("train", "bagel-smoke", "--resume", "nowhere"), 2, "is no folder; give .../checkpoints/step-"),
        (("train", "bagel-smoke", "compute.device=cuda"), 2, "no CUDA device"),
        (("sample", ".", "--prompt", "x"), 2, "--model bagel/7b-mot"),
        (("reconstruct", ".", "no.jpg"), 3, "no.jpg: cannot be read"),
        (("verify", "."), 2, "expected a folder with pack.json"),
        (("report", "."), 2, "is not a run folder"),
        (("data", "check", "nowhere"), 3, "nowhere does not exist"),
    ],
)
def test_a_mistake_ends_with_its_exit_code_and_the_cure(
    reca: Run, arguments: tuple[str, ...], exit_code: int, message: str
) -> None:
    code, out, err = reca(*arguments)
    lines = [line for line in err.splitlines() if not line.startswith("run folder")]
    assert (code, message in err, len(lines) <= 2) == (exit_code, True, True), err
    assert "Traceback" not in err and out == ""


def test_debug_shows_the_traceback(reca: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["reca", "report", ".", "--debug"])
    with pytest.raises(Exception, match="is not a run folder"):
        cli.main()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One short run that several tests look at."""
    from reca.commands.train import train_recipe

    folder = tmp_path_factory.mktemp("runs") / "smoke"
    overrides = ["steps=3", "optim.warmup_steps=0", "data.images=2"]
    return train_recipe("bagel-smoke", overrides, extra={}, run=folder, resume=None, quiet=True)


def test_a_run_folder_holds_what_the_contract_names(finished: dict[str, Any]) -> None:
    folder = Path(finished["run"])
    files = ("config.yaml", "run.json", "metrics.jsonl", "evaluations.jsonl", "summary.json", "report.html")
    assert all((folder / name).is_file() for name in files)
    assert (folder / "checkpoints" / "step-00000003" / "MANIFEST.json").is_file()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    keys = {"loss", "loss/reconstruction", "lr", "grad_norm", "images_per_second", "tokens_per_second", "mfu"}
    assert keys | {"data_wait", "peak_memory_gb"} <= lines[0].keys()
    record = json.loads((folder / "run.json").read_text())
    assert record["recipe"] == "bagel-smoke" and len(record["sessions"]) == 1


def test_a_second_run_in_the_folder_is_refused_and_changes_nothing(
    reca: Run, finished: dict[str, Any]
) -> None:
    folder = Path(finished["run"])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    code, _, err = reca("train", "bagel-smoke", "steps=5", "--run", str(folder))
    assert code == 2 and "--resume auto" in err
    code, _, err = reca("train", "bagel-smoke", "optim.lr=1", "--run", str(folder), "--resume", "auto")
    assert code == 2 and "optim.lr: was 0.002, is now 1.0" in err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_json_is_alone_on_stdout(reca: Run, finished: dict[str, Any]) -> None:
    picture = Path.cwd() / "p.png"
    Image.new("RGB", (48, 32), "blue").save(picture)
    run = finished["run"]
    for arguments in (
        ("reconstruct", run, str(picture), "--steps", "2"),
        ("edit", run, str(picture), "--prompt", "redder", "--steps", "2"),
        ("sample", run, "--prompt", "a bird", "--prompt", "a fish", "--steps", "2", "--size", "32x48"),
    ):
        code, out, _ = reca(*arguments, "--json")
        result = json.loads(out)
        assert code == 0 and all(Path(path).is_file() for path in [*result["images"], result["sheet"]])
    assert Image.open(result["images"][1]).size == (48, 32)
    code, out, _ = reca("data", "check", "package:photos", "--model", "bagel/tiny", "--json")
    assert code == 0 and json.loads(out)["usable"] > 0
    code, out, _ = reca(
        "data", "preview", "package:photos", "--model", "bagel/tiny", "--images", "2", "--json"
    )
    assert code == 0 and Path(json.loads(out)["sheet"]).is_file()
    code, out, _ = reca("doctor", "--json")
    assert code == 0 and "attention" in json.loads(out)


def test_a_malformed_size_is_refused(reca: Run, finished: dict[str, Any]) -> None:
    code, _, err = reca("sample", finished["run"], "--prompt", "x", "--size", "big")
    assert code == 2 and "HEIGHTxWIDTH" in err


def test_the_default_run_folder_is_the_first_free_or_the_newest_to_resume(tmp_path: Path) -> None:
    def make(name: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1}\n')

    assert default_folder("a", is_resumed=False, runs=tmp_path) == tmp_path / "a"
    make("a")
    make("a-b")
    assert default_folder("a", is_resumed=False, runs=tmp_path) == tmp_path / "a-2"
    assert default_folder("a", is_resumed=True, runs=tmp_path) == tmp_path / "a"
    make("a-2")
    assert default_folder("a", is_resumed=False, runs=tmp_path) == tmp_path / "a-3"
    assert default_folder("a", is_resumed=True, runs=tmp_path) == tmp_path / "a-2"
