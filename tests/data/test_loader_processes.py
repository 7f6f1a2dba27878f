"""The loader's worker processes: they die, hang, are killed and are closed, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from reca.config import DataConfig
from reca.data.loader import build_loader
from reca.errors import DataError

MakeJpeg = Callable[..., bytes]
MakeProcessor = Callable[..., Any]


def config(path: Path | None, **changes: Any) -> DataConfig:
    base: dict[str, Any] = {"path": None if path is None else str(path), "images": 4, "workers": 0}
    return DataConfig(**{**base, "tokens": 40, "max_tokens": 50, "max_sample_tokens": 24} | changes)


@dataclass(frozen=True, slots=True)
class Buggy:
    """A processor with a bug."""

    def prepare(self, *_: Any) -> Any:
        return 1 / 0


@dataclass(frozen=True, slots=True)
class Stuck:
    """A processor that leaves its process id and then never answers, or dies."""

    folder: Path
    dies: bool

    def prepare(self, *_: Any) -> Any:
        (self.folder / str(os.getpid())).touch()
        if self.dies:
            os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()


def is_running(process: int) -> bool:
    """Whether a process lives; one that has ended but was not waited for does not."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] not in ("Z", "X")


@pytest.fixture
def marks(tmp_path: Path) -> Iterator[Path]:
    """A folder of process ids; none of them may be running at the end."""
    folder = tmp_path / "processes"
    folder.mkdir()
    yield folder
    started = [int(path.name) for path in folder.iterdir()]
    assert started and not any(is_running(process) for process in started)


def test_a_killed_worker_ends_the_run_with_a_cure(photos: Path, marks: Path) -> None:
    loader = build_loader(config(photos, workers=2), Stuck(marks, dies=True), 0)
    start = time.monotonic()
    with pytest.raises(DataError, match=r"a loader worker was killed .*lower data.workers"):
        next(loader)
    assert time.monotonic() - start < 10


def test_a_hanging_worker_ends_the_run_in_time_and_is_not_left_behind(photos: Path, marks: Path) -> None:
    loader = build_loader(config(photos, workers=2), Stuck(marks, dies=False), 0, timeout_s=1.0)
    start = time.monotonic()
    with pytest.raises(DataError, match="no loader worker answered within 1 s"):
        next(loader)
    assert time.monotonic() - start < 1 + 2


@dataclass(frozen=True, slots=True)
class Marking:
    """A sound processor that leaves its process id."""

    folder: Path
    inner: Any

    def prepare(self, *arguments: Any) -> Any:
        (self.folder / str(os.getpid())).touch()
        return self.inner.prepare(*arguments)

    def collate(self, *arguments: Any) -> Any:
        return self.inner.collate(*arguments)


def test_closing_ends_the_workers_and_may_be_repeated(
    photos: Path, marks: Path, processor: MakeProcessor
) -> None:
    loader = build_loader(config(photos, workers=2), Marking(marks, processor()), 0)
    next(loader)
    started = [int(path.name) for path in marks.iterdir()]
    assert os.getpid() not in started and any(is_running(process) for process in started)
    loader.close()
    loader.close()
    build_loader(config(photos, workers=2), processor(), 0).close()


def test_workers_leave_stop_requests_to_the_training_process(
    photos: Path, marks: Path, processor: MakeProcessor
) -> None:
    loader = build_loader(config(photos, workers=1), Marking(marks, processor()), 0)
    with closing(loader):
        first = next(loader)
        for path in marks.iterdir():
            os.kill(int(path.name), signal.SIGINT)
            os.kill(int(path.name), signal.SIGTERM)
        later = [next(loader) for _ in range(12)]
    assert later[-1].cursor["next_index"] > first.cursor["next_index"] + 24


def test_workers_end_when_the_training_process_dies(
    photos: Path, marks: Path, processor: MakeProcessor
) -> None:
    child = os.fork()
    if child == 0:
        next(build_loader(config(photos, workers=2), Marking(marks, processor()), 0))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    started = [int(path.name) for path in marks.iterdir()]
    deadline = time.monotonic() + 10
    while any(is_running(process) for process in started) and time.monotonic() < deadline:
        os.sched_yield()


def test_tensors_from_workers_hold_no_file_descriptor(photos: Path, processor: MakeProcessor) -> None:
    with closing(build_loader(config(photos, workers=1), processor(), 0)) as loader:
        next(loader)
        before = len(os.listdir("/proc/self/fd"))
        kept = [next(loader) for _ in range(10)]
        assert len(os.listdir("/proc/self/fd")) <= before + 2 * len(kept)
        assert not any(e.pixels.is_shared() for step in kept for b in step.microbatches for e in b.examples)


def test_a_bug_of_the_processor_is_not_a_bad_image(photos: Path, processor: MakeProcessor) -> None:
    for workers in (0, 1):
        loader = build_loader(config(photos, workers=workers), Buggy(), 0)
        with closing(loader), pytest.raises(ZeroDivisionError):
            next(loader)
