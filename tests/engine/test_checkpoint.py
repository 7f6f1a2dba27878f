"""Checkpoints come back bit for bit; damaged ones are never used, and the last good one is never deleted."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from saver import equal, state_at

from reca.engine.checkpoint import find_latest, load_checkpoint, save_checkpoint, versions
from reca.errors import CheckpointError, DiskError, NumericError
from reca.files import MANIFEST, at_crash_points, publish_dir, write_text

SMALL = 3  # side of the weight: random offsets then hit headers and JSON as often as the payload


def saved(folder: Path, *steps: int, keep: int = 9, size: int = SMALL) -> list[Path]:
    return [save_checkpoint(folder, step, state_at(step, size), keep=keep) for step in steps]


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def step_names(*steps: int) -> list[str]:
    return [f"step-{step:08d}" for step in steps]


def test_a_checkpoint_comes_back_bit_for_bit_with_the_versions_that_made_it(tmp_path: Path) -> None:
    path = saved(tmp_path, 1234)[0]
    loaded = load_checkpoint(path)
    assert equal(loaded, state_at(1234, SMALL)) and loaded.meta["versions"] == versions()
    assert versions()["torch"] == torch.__version__ and versions().keys() == {"torch", "reca", "triton"}
    files = ["ema.safetensors", "model.safetensors", "optimizer.safetensors", "state.json"]
    assert path.name == "step-00001234" and names(path) == [MANIFEST, *files]


def test_a_state_without_average_and_moments_has_no_files_for_them(tmp_path: Path) -> None:
    state = replace(state_at(1), ema={}, optimizer={})
    path = save_checkpoint(tmp_path, 1, state, keep=1)
    assert equal(load_checkpoint(path), state)
    assert names(path) == [MANIFEST, "model.safetensors", "state.json"]


def test_equal_states_give_equal_files(tmp_path: Path) -> None:
    first, second = saved(tmp_path / "a", 5)[0], saved(tmp_path / "b", 5)[0]
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names(first))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["model", "optimizer", "ema"])
def test_a_value_that_is_not_finite_is_never_published(tmp_path: Path, part: str, value: float) -> None:
    saved(tmp_path, 1)
    state = state_at(2)
    poisoned = {name: tensor.clone() for name, tensor in getattr(state, part).items()}
    name = next(iter(poisoned))
    poisoned[name].view(-1)[-1] = value
    with pytest.raises(NumericError, match=rf"^{part} tensor '{name}' holds NaN or infinity at step 2"):
        save_checkpoint(tmp_path, 2, replace(state, **{part: poisoned}), keep=1)
    assert names(tmp_path) == step_names(1)


def test_step_and_keep_must_make_sense(tmp_path: Path) -> None:
    for step, keep in ((2, 1), (1, 0)):
        with pytest.raises(ValueError, match="save_checkpoint: step="):
            save_checkpoint(tmp_path, step, state_at(1), keep=keep)
    assert names(tmp_path) == []


# Which one is the newest, and what is kept


def test_the_newest_is_found_by_number_among_names_that_are_not_ours(tmp_path: Path) -> None:
    saved(tmp_path, 9, 10, 100_000_000)
    for name in ("step-5", "step-00000011.bak", "latest", "step-abc", ".staging-step-00000012-1-0123abcd"):
        (tmp_path / name).mkdir()
    latest = find_latest(tmp_path)
    assert latest.path == tmp_path / "step-100000000" and latest.skipped == ()


def test_a_run_that_saved_nothing_has_no_newest(tmp_path: Path) -> None:
    assert find_latest(tmp_path / "absent").path is None
    (tmp_path / "step-00000001").mkdir()
    latest = find_latest(tmp_path)
    assert latest.path is None and len(latest.skipped) == 1 and MANIFEST in latest.skipped[0]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(tmp_path: Path, keep: int) -> None:
    for step in range(1, 6):
        saved(tmp_path, step, keep=keep)
        assert names(tmp_path) == step_names(*range(max(1, step - keep + 1), step + 1))


def test_a_damaged_newest_falls_back_and_is_superseded_by_the_next_save(tmp_path: Path) -> None:
    saved(tmp_path, 10, 20, 30)
    for step in (20, 30):
        (tmp_path / f"step-000000{step}" / "state.json").write_text("{}")
    latest = find_latest(tmp_path)
    assert latest.path == tmp_path / "step-00000010"
    assert [note[:45] for note in latest.skipped] == [
        f"skipped the damaged checkpoint {name}:" for name in step_names(30, 20)
    ]
    saved(tmp_path, 15, keep=1)
    assert names(tmp_path) == step_names(15) and find_latest(tmp_path).skipped == ()


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    path = saved(tmp_path, 10)[0]
    (path / "model.safetensors").unlink()
    saved(tmp_path, 10)
    assert equal(load_checkpoint(path), state_at(10, SMALL)) and names(tmp_path) == step_names(10)


# Damage


def test_every_flipped_byte_is_detected_before_a_tensor_is_used(tmp_path: Path) -> None:
    _, path = saved(tmp_path, 1, 2)
    files = sorted(path.iterdir())
    offsets = [(file, offset) for file in files for offset in range(file.stat().st_size)]
    chosen = random.Random(4).sample(offsets, 200)
    assert {file for file, _ in chosen} == set(files)
    caught = 0
    for number, (file, offset) in enumerate(chosen):
        data = file.read_bytes()
        file.write_bytes(data[:offset] + bytes([data[offset] ^ (1 << number % 8)]) + data[offset + 1 :])
        with pytest.raises(CheckpointError, match=file.name) as error:
            load_checkpoint(path)
        latest = find_latest(tmp_path)
        assert latest.path == tmp_path / "step-00000001"
        assert "step-00000002" in latest.skipped[0] and error.value.exit_code == 4
        file.write_bytes(data)
        caught += 1
    assert caught == 200 and equal(load_checkpoint(path), state_at(2, SMALL))


def edit_manifest(path: Path, edit: Callable[[dict], None]) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    edit(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def cut(path: Path, size: int) -> None:
    os.truncate(path, size)


def same_size(path: Path) -> None:
    path.write_bytes(b"\0" * path.stat().st_size)


def forget(name: str) -> Callable[[Path, Path], None]:
    def damage(path: Path, other: Path) -> None:
        edit_manifest(path, lambda manifest: manifest["files"].pop(name))
        (path / name).unlink()

    return damage


DAMAGE: dict[str, tuple[str, Callable[[Path, Path], object]]] = {
    "a file cut short": (
        r"model\.safetensors has 40 bytes, its manifest says",
        lambda path, other: cut(path / "model.safetensors", 40),
    ),
    "an empty file": ("ema.safetensors", lambda path, other: cut(path / "ema.safetensors", 0)),
    "a file of zeros": (
        "optimizer.safetensors",
        lambda path, other: same_size(path / "optimizer.safetensors"),
    ),
    "a missing file": ("ema.safetensors", lambda path, other: (path / "ema.safetensors").unlink()),
    "an extra file": ("extra.bin", lambda path, other: (path / "extra.bin").write_bytes(b"x")),
    "a file of another step": (
        "model.safetensors",
        lambda path, other: shutil.copy(other / "model.safetensors", path / "model.safetensors"),
    ),
    "a manifest of another step": (
        "differs|bytes",
        lambda path, other: shutil.copy(other / MANIFEST, path / MANIFEST),
    ),
    "a folder of another step": (
        "holds step 1, not what its name says",
        lambda path, other: (shutil.rmtree(path), shutil.copytree(other, path)),
    ),
    "a missing manifest": (MANIFEST, lambda path, other: (path / MANIFEST).unlink()),
    "an empty manifest": (MANIFEST, lambda path, other: cut(path / MANIFEST, 0)),
    "a manifest with another step": (
        f"{MANIFEST} cannot be trusted: it was changed",
        lambda path, other: edit_manifest(path, lambda manifest: manifest.update(step=7)),
    ),
    "a manifest that forgets a file": (
        f"{MANIFEST} cannot be trusted: it was changed",
        forget("ema.safetensors"),
    ),
    "a manifest of the future": (
        f"{MANIFEST} cannot be trusted: unknown format",
        lambda path, other: edit_manifest(path, lambda manifest: manifest.update(format=2)),
    ),
    "a file that is a folder": (
        "state.json",
        lambda path, other: ((path / "state.json").unlink(), (path / "state.json").mkdir()),
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_refused_with_the_file_named(tmp_path: Path, name: str) -> None:
    other, path = saved(tmp_path, 1, 2)
    message, damage = DAMAGE[name]
    damage(path, other)
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint(path)
    assert str(path) in str(error.value)
    assert find_latest(tmp_path).path == other


def test_the_unharmed_pair_of_the_damage_tests_is_accepted(tmp_path: Path) -> None:
    other, path = saved(tmp_path, 1, 2)
    assert (load_checkpoint(other).step, load_checkpoint(path).step) == (1, 2)
    assert find_latest(tmp_path).path == path


def test_what_is_no_checkpoint_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"absent is not a checkpoint folder; give one like checkpoints/step-"
    ):
        load_checkpoint(tmp_path / "absent")
    with publish_dir(tmp_path / "export") as staging:
        write_text(staging / "config.json", "{}")
    with pytest.raises(CheckpointError, match="export holds step None"):
        load_checkpoint(tmp_path / "export")
    with publish_dir(tmp_path / "other", manifest={"step": 1}) as staging:
        write_text(staging / "state.json", "[]")
    with pytest.raises(CheckpointError, match=r"state\.json is not the state of a run"):
        load_checkpoint(tmp_path / "other")


def test_a_copy_under_another_name_loads(tmp_path: Path) -> None:
    path = saved(tmp_path, 3)[0]
    shutil.copytree(path, tmp_path / "best")
    assert equal(load_checkpoint(tmp_path / "best"), state_at(3, SMALL))


# Failures of the disk


@pytest.mark.parametrize("keep", [1, 2])
def test_an_error_at_every_crash_point_of_a_save_loses_nothing(tmp_path: Path, keep: int) -> None:
    base = tmp_path / "base"
    saved(base, 1, 2, keep=keep)
    shutil.copytree(base, tmp_path / "dry")
    points: list[str] = []
    with at_crash_points(lambda name, path: points.append(name)):
        saved(tmp_path / "dry", 3, keep=keep)
    assert points.count("write.chunk") >= 10 and len(points) >= 20

    for moment, name in enumerate(points):
        checkpoints = tmp_path / f"{moment}-{name}"
        shutil.copytree(base, checkpoints)
        code = (errno.ENOSPC, errno.EIO, errno.EDQUOT)[moment % 3]
        countdown = iter(range(moment, -1, -1))

        def hook(name: str, path: Path, code: int = code, countdown: object = countdown) -> None:
            if next(countdown, -1) == 0:
                raise OSError(code, os.strerror(code))

        with at_crash_points(hook), pytest.raises(DiskError) as error:
            saved(checkpoints, 3, keep=keep)
        assert error.value.exit_code == 7
        assert re.search(
            rf"cannot write {checkpoints}.* \(needed [\d,]+ bytes, [\d,]+ free\); ", str(error.value)
        )
        latest = find_latest(checkpoints)
        published = moment >= points.index("publish.renamed")
        assert latest.skipped == () and latest.path == checkpoints / f"step-0000000{3 if published else 2}"
        if not published:
            assert names(checkpoints) == names(base)
        saved(checkpoints, 3, keep=keep)
        assert find_latest(checkpoints).path == checkpoints / "step-00000003"


# Unusual folders


@pytest.mark.parametrize("name", ["two words", "größer als 数据", "quote's", "-dash", "a" * 200])
def test_any_folder_name_works(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path / name / "checkpoints", 1)[0]
    assert find_latest(tmp_path / name / "checkpoints").path == path
    assert equal(load_checkpoint(path), state_at(1, SMALL))


def test_a_run_folder_may_be_a_link_to_another_file_system(tmp_path: Path) -> None:
    memory = Path("/dev/shm")
    target = memory / f"reca-{os.getpid()}" if os.access(memory, os.W_OK) else tmp_path / "target"
    target.mkdir()
    try:
        (tmp_path / "run").symlink_to(target)
        for step in (1, 2):
            saved(tmp_path / "run" / "checkpoints", step, keep=1)
        assert (tmp_path / "run").is_symlink() and names(target / "checkpoints") == step_names(2)
        assert equal(load_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000002"), state_at(2, SMALL))
    finally:
        shutil.rmtree(target)
