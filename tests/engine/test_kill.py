"""Processes that die while they write: nothing published is lost, and nothing half-written is ever found."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from saver import equal, state_at

from reca.engine.checkpoint import find_latest, load_checkpoint, save_checkpoint
from reca.files import CRASH_POINTS, at_crash_points, sweep_staging


class Saver:
    """The process of `saver.py`: starts jobs, relays what they say, tells how they ended."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("saver.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.said: list[dict[str, Any]] = []

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "saver.py ended"
        return json.loads(line)

    def _ask(self, **request: Any) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        while not isinstance(answer := self._read(), int):
            self.said.append(answer)
        return answer

    def start(self, job: str, **arguments: Any) -> int:
        self.said.clear()
        return self._ask(job=job, **arguments)

    def hear(self) -> dict[str, Any]:
        """The next thing that a child says."""
        return self.said.pop(0) if self.said else self._read()

    def wait(self, pid: int) -> int:
        return self._ask(wait=pid)

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        assert self.wait(pid) in (0, -signal.SIGKILL)

    def run(self, job: str, **arguments: Any) -> int:
        return self.wait(self.start(job, **arguments))


@pytest.fixture(scope="module")
def saver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saver]:
    saver = Saver()
    saver.run("lock", run=str(tmp_path_factory.mktemp("first")))  # answers once torch is imported
    yield saver
    assert saver.process.stdin is not None
    saver.process.stdin.close()
    assert saver.process.wait(timeout=30) == 0


@pytest.fixture
def memory_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: on a disk most deaths would fall into a slow fsync."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as folder:
        yield Path(folder)


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def steps_in(path: Path) -> list[int]:
    """Steps of the complete lines of a JSONL file."""
    text = path.read_bytes() if path.exists() else b""
    return [json.loads(line)["step"] for line in text.splitlines(keepends=True) if line.endswith(b"\n")]


@pytest.mark.slow
@pytest.mark.parametrize(("keep", "kills"), [(1, 150), (2, 150)])
def test_no_kill_at_any_time_loses_a_published_checkpoint(
    saver: Saver, memory_path: Path, keep: int, kills: int
) -> None:
    moments, checkpoints, swept = random.Random(keep), memory_path / "checkpoints", 0
    newest, before = 10, time.monotonic()
    assert saver.run("train", run=str(memory_path), steps=newest, keep=keep) == 0
    one_save = (time.monotonic() - before) / newest
    for _ in range(kills):
        pid = saver.start("train", run=str(memory_path), steps=1000, keep=keep)
        started = saver.hear()
        assert started["resumed"] == newest
        swept += started["swept"]
        time.sleep(moments.uniform(0, 3) * one_save)  # the moment of death is the input of this test
        saver.kill(pid)

        latest = find_latest(checkpoints)
        announced = max(steps_in(memory_path / "published.jsonl"))
        assert latest.path is not None and latest.skipped == ()
        loaded = max((load_checkpoint(path) for path in checkpoints.glob("step-*")), key=lambda s: s.step)
        assert equal(loaded, state_at(loaded.step))
        assert loaded.step >= max(newest, announced)
        newest = loaded.step
        logged = steps_in(memory_path / "metrics.jsonl")
        assert logged == list(range(1, len(logged) + 1)) and len(logged) >= newest
        assert len(list(checkpoints.glob("step-*"))) <= keep + 1
    assert newest > kills / 5 and swept > kills / 20, "so few saves, or saves cut in two, prove nothing"

    assert saver.run("train", run=str(memory_path), steps=1, keep=keep) == 0
    assert hidden(checkpoints) == [] and hidden(memory_path) == [".lock"]
    assert len(list(checkpoints.glob("step-*"))) == keep


def crash_points_of_two_saves(checkpoints: Path, step: int, keep: int) -> list[str]:
    names: list[str] = []
    with at_crash_points(lambda name, path: names.append(name)):
        for _ in range(2):
            save_checkpoint(checkpoints, step, state_at(step), keep=keep)
    return names


@pytest.mark.parametrize("keep", [1, 2])
def test_death_at_every_crash_point_of_save_replace_and_prune_is_survived(
    saver: Saver, memory_path: Path, keep: int
) -> None:
    before = memory_path / "before"
    for step in (1, 2):
        save_checkpoint(before, step, state_at(step), keep=keep)
    shutil.copytree(before, memory_path / "dry")
    names = crash_points_of_two_saves(memory_path / "dry", 3, keep)
    assert set(names) == set(CRASH_POINTS) - {"append.line"}

    first_done = names.index("publish.renamed")
    for moment, name in enumerate(names):
        checkpoints = memory_path / f"{moment}-{name}"
        shutil.copytree(before, checkpoints)
        arguments = {"checkpoints": str(checkpoints), "step": 3, "keep": keep, "moment": moment}
        assert saver.run("save_and_die", **arguments) == -signal.SIGKILL

        for path in checkpoints.glob("step-*"):
            load_checkpoint(path)
        sweep_staging(checkpoints)
        assert hidden(checkpoints) == []
        latest = find_latest(checkpoints)
        expected = 3 if moment >= first_done else 2
        assert latest.path is not None and latest.path.name == f"step-{expected:08d}" and latest.skipped == ()
        assert equal(load_checkpoint(latest.path), state_at(expected))
        save_checkpoint(checkpoints, 3, state_at(3), keep=keep)
        steps = [f"step-{step:08d}" for step in range(4 - keep, 4)]
        assert sorted(path.name for path in checkpoints.iterdir()) == steps


def test_the_second_run_in_a_folder_ends_at_once_and_names_the_first(saver: Saver, tmp_path: Path) -> None:
    first = saver.start("hold", run=str(tmp_path))
    saver.hear()
    before = time.monotonic()
    assert saver.run("lock", run=str(tmp_path)) == 2
    assert time.monotonic() - before < 5
    assert f"in use by process {first} on " in saver.hear()["error"]
    os.kill(first, 0)  # the first one is still there

    saver.kill(first)
    assert saver.run("lock", run=str(tmp_path)) == 0


def test_a_worker_that_outlives_a_killed_run_does_not_hold_its_folder(saver: Saver, tmp_path: Path) -> None:
    first = saver.start("hold", run=str(tmp_path), with_worker=True)
    worker = saver.hear()["holding"]
    assert saver.run("lock", run=str(tmp_path)) == 2
    saver.kill(first)
    try:
        assert saver.run("lock", run=str(tmp_path)) == 0
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_file_that_may_not_grow_ends_with_exit_code_7_and_publishes_nothing(
    saver: Saver, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path, 1, state_at(1), keep=2)
    assert saver.run("save_with_limit", checkpoints=str(tmp_path), step=2, limit=20_000) == 7
    message = saver.hear()["error"]
    assert "model.safetensors" in message and "needed 37,0" in message and "ulimit -f" in message
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert saver.run("save_with_limit", checkpoints=str(tmp_path), step=2, limit=200_000) == 0


def test_a_folder_without_write_permission_ends_with_exit_code_7(saver: Saver) -> None:
    with tempfile.TemporaryDirectory() as folder:  # not below tmp_path, which other users may not enter
        Path(folder).chmod(0o555)
        assert saver.run("save_without_rights", checkpoints=f"{folder}/checkpoints") == 7
        message = saver.hear()["error"]
        assert f"{folder}/checkpoints" in message and "choose a folder that you may write to" in message
        assert list(Path(folder).iterdir()) == []


def test_writing_a_large_tensor_does_not_hold_it_twice(saver: Saver, tmp_path: Path) -> None:
    size = 192 << 20
    assert saver.run("write_large", path=str(tmp_path / "weight.safetensors"), size=size) == 0
    assert saver.hear()["grown"] < size / 2
