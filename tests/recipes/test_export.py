"""A run's weights as official files: which weights, what lies beside them, and what stops an export."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from reca.errors import CheckpointError, ConfigError, DiskError
from reca.files import verify_dir
from reca.files.atomic import Sink
from reca.models import get_variant
from reca.recipes import proof
from reca.recipes.api import train
from reca.recipes.export import export
from reca.recipes.resolve import config_yaml, resolve

SHORT = ("steps=2", "optim.warmup_steps=0", "sample.images=0", "data.images=2")


def trained(folder: Path, recipe: str, *overrides: str) -> Path:
    resolved = resolve(recipe, [*SHORT, *overrides])
    train(resolved.config, folder)
    (folder / "config.yaml").write_text(config_yaml(resolved))
    return folder


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Official weights in bf16 with a file that reca does not write itself."""
    family, variant = get_variant("bagel/tiny")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("release")
    family.save(family.build(variant.config), folder, dtype=torch.bfloat16)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def run(release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run that started from the release and keeps an average."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return trained(folder, "bagel-smoke", f"weights={release}", "optim.ema=0.5")


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_files_have_the_dtypes_and_the_company_of_the_starting_weights(
    run: Path, release: Path, tmp_path: Path
) -> None:
    record = export(run, tmp_path / "out")
    before, after = (load_file(folder / "ema.safetensors") for folder in (release, tmp_path / "out"))
    assert {name: tensor.dtype for name, tensor in after.items()} == {n: t.dtype for n, t in before.items()}
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed and all("_moe_gen" in name or not name.startswith("language_model") for name in changed)
    same = {"ae.safetensors", "tokenizer.json", "config.json", "model.safetensors.index.json"}
    assert all((tmp_path / "out" / name).read_bytes() == (release / name).read_bytes() for name in same)
    written = json.loads((tmp_path / "out" / "reca_export.json").read_text())
    assert {**written, "out": str(tmp_path / "out")} == record
    assert (record["step"], record["recipe"], record["weights"]) == (2, "bagel-smoke", "trained")
    assert "reca_export.json" in verify_dir(tmp_path / "out")["files"]


def test_the_average_is_exported_only_where_it_is_asked_for(run: Path, tmp_path: Path) -> None:
    plain, average = tmp_path / "plain", tmp_path / "average"
    export(run, plain)
    assert export(run, average, average=True)["weights"] == "average"
    assert proof.compare(run, plain, average=False)["differences"] == []
    assert proof.compare(run, average, average=True)["differences"] == []
    crossed = proof.compare(run, plain, average=True)["differences"]
    assert any(line.startswith("layers.0.gen.qkv.weight: ") for line in crossed)
    assert any(line.startswith("loss of reconstruction: ") for line in crossed)


def test_one_changed_bit_is_a_difference_with_its_size(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "out")
    path = tmp_path / "out" / "ema.safetensors"
    tensors = load_file(path)
    tensors["llm2vae.bias"][3] += 1
    save_file(tensors, path)
    first, *others = proof.compare(run, tmp_path / "out", average=False)["differences"]
    assert first.startswith(f"llm2vae.bias: 1 of {len(tensors['llm2vae.bias'])} values differ, by at most ")
    assert [line.partition(":")[0] for line in others] == ["loss of reconstruction"]


def test_files_without_their_tokenizer_cannot_be_proven(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", "quickstart", "steps=1")
    export(run, tmp_path / "out")
    assert proof.compare(run, tmp_path / "out", average=False)["differences"] == []
    (tmp_path / "out" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"expected tokenizer\.json"):
        proof.compare(run, tmp_path / "out", average=False)


@pytest.mark.parametrize(
    ("code", "out", "err", "message"),
    [
        (0, {"differences": ["a: 1 of 2", *"bcdefg"]}, "", "from the run: a: 1 of 2; b; c; d; e; and 2 more"),
        (4, {}, "noise\nno tensors\n", r"could not reload the files \(exit 4: no tensors\)"),
        (-9, {}, "", r"\(exit -9: no message\)"),
    ],
)
def test_what_a_fresh_process_finds_wrong_stops_the_export(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, out: Any, err: str, message: str
) -> None:
    result = subprocess.CompletedProcess([], code, json.dumps(out), err)
    monkeypatch.setattr(proof.subprocess, "run", lambda command, **options: result)
    with pytest.raises(CheckpointError, match=f"{message}; nothing was exported"):
        export(run, tmp_path / "out", verify=True)
    assert left_in(tmp_path) == []


def test_a_taken_folder_and_an_unknown_format_are_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists; choose another folder or remove it"):
        export(run, tmp_path)
    with pytest.raises(ConfigError, match=r"'oficial' is not a format .*; did you mean 'official'"):
        export(run, tmp_path / "out", to="oficial")
    assert left_in(tmp_path) == ["mine.txt"]


def test_what_is_no_run_or_keeps_no_average_is_refused(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not a run folder: no config\.yaml"):
        export(tmp_path / "nothing", tmp_path / "out")
    (newest,) = (copied / "checkpoints").iterdir()
    (newest / "ema.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no intact checkpoint \(skipped the damaged checkpoint step-"):
        export(copied, tmp_path / "out")
    shutil.rmtree(newest)
    with pytest.raises(CheckpointError, match="no intact checkpoint; train on"):
        export(copied, tmp_path / "out")
    assert left_in(tmp_path) == ["run"]


def test_an_average_that_was_not_kept_is_not_replaced_by_the_weights(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", "bagel-smoke")
    with pytest.raises(ConfigError, match="keeps no average of its weights; leave --ema out"):
        export(run, tmp_path / "out", average=True)


def test_other_starting_weights_than_the_runs_are_refused(
    copied: Path, release: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(release, tmp_path / "release"))
    tensors = load_file(other / "ema.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, other / "ema.safetensors")
    config = copied / "config.yaml"
    config.write_text(config.read_text().replace(str(release), str(other)))
    with pytest.raises(CheckpointError, match=r"are not those that .* started from; put those back"):
        export(copied, tmp_path / "out")


def test_a_full_disk_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(sink: Sink, chunk: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Sink, "write", full)
    with pytest.raises(DiskError, match=r"ema\.safetensors: No space left on device"):
        export(run, tmp_path / "out")
    assert left_in(tmp_path) == []
