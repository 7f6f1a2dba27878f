"""Requests to stop: what they interrupt, what they wait for, and how the process ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from toy import ToyLoader, toy_config, toy_job

from reca.config import CheckpointConfig, OptimConfig
from reca.engine import loop
from reca.engine.checkpoint import find_latest
from reca.engine.loop import run
from reca.engine.signals import StopNow, StopRequest
from reca.errors import Interrupted, Preempted

TOY = Path(__file__).with_name("toy.py")


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_request_outside_disposable_work_only_sets_the_reason(number: signal.Signals) -> None:
    with StopRequest() as stop:
        send(number)
        assert stop.reason == number.name
        with pytest.raises(StopNow):
            stop.check()


def test_a_request_ends_disposable_work_at_once() -> None:
    with StopRequest() as stop, pytest.raises(StopNow), stop.disposable():
        send(signal.SIGTERM)
        pytest.fail("the work went on")


def test_disposable_work_does_not_begin_after_a_request() -> None:
    with StopRequest() as stop:
        send(signal.SIGTERM)
        with pytest.raises(StopNow), stop.disposable():
            pytest.fail("the work began")


def test_a_handler_of_ordinary_errors_does_not_swallow_the_request() -> None:
    with StopRequest() as stop, pytest.raises(StopNow), stop.disposable():
        try:
            send(signal.SIGTERM)
        except Exception:
            pytest.fail("swallowed")


def test_a_second_interrupt_ends_at_once_but_a_second_term_does_not() -> None:
    with StopRequest():
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        send(signal.SIGINT)
        with pytest.raises(Interrupted, match="second Ctrl-C") as error:
            send(signal.SIGINT)
        assert error.value.exit_code == 130


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    with StopRequest():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == before


def test_in_another_thread_signals_are_left_alone() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def enter() -> None:
        with StopRequest():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_request_in_data_wait_saves_the_last_finished_step(tmp_path: Path) -> None:
    class Slow(ToyLoader):
        def __next__(self) -> Any:
            if self.next == 6:
                send(signal.SIGTERM)
                self.on_wait()
                raise AssertionError("the request must end the wait")
            return super().__next__()

    with pytest.raises(Preempted, match="stopped by SIGTERM after step 6 of 20 and saved"):
        run(toy_job(tmp_path, loader=Slow()))
    assert find_latest(tmp_path / "checkpoints").path == tmp_path / "checkpoints" / "step-00000006"


def test_a_request_during_a_step_finishes_and_logs_that_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = loop.train_step

    def interrupted(state: Any, batches: Any) -> Any:
        if state.step == 6:
            send(signal.SIGINT)
        return inner(state, batches)

    monkeypatch.setattr(loop, "train_step", interrupted)
    with pytest.raises(Preempted, match="stopped by SIGINT after step 7 of 20"):
        run(toy_job(tmp_path))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 7


def test_a_request_during_a_save_publishes_one_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, saved = loop.save_checkpoint, []

    def interrupted(folder: Path, step: int, state: Any, *, keep: int) -> Path:
        saved.append(step)
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        return inner(folder, step, state, keep=keep)

    monkeypatch.setattr(loop, "save_checkpoint", interrupted)
    with pytest.raises(Preempted, match="after step 4 of 20 and saved"):
        run(toy_job(tmp_path))
    assert saved == [4]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]


def test_a_request_before_the_first_step_saves_nothing_and_can_start_again(tmp_path: Path) -> None:
    class Stopping(ToyLoader):
        def __next__(self) -> Any:
            send(signal.SIGTERM)
            return super().__next__()

    with pytest.raises(Preempted, match="before step 1, nothing to save yet; --resume auto starts again"):
        run(toy_job(tmp_path, loader=Stopping()))
    assert find_latest(tmp_path / "checkpoints").path is None
    assert run(toy_job(tmp_path), resume="auto")["status"] == "finished"


def test_a_second_interrupt_leaves_without_saving(tmp_path: Path) -> None:
    def impatient(record: Mapping[str, Any]) -> None:
        if record["step"] == 6:
            send(signal.SIGINT)
            send(signal.SIGINT)

    with pytest.raises(Interrupted):
        run(toy_job(tmp_path, on_progress=impatient))
    latest = find_latest(tmp_path / "checkpoints").path
    assert latest is not None and latest.name == "step-00000004"


def test_a_process_that_is_asked_to_stop_exits_75_and_can_be_resumed(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, str(TOY), str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) == 5:
            break
    process.send_signal(signal.SIGTERM)
    logged, message = process.communicate(timeout=30)
    assert process.returncode == 75, message
    latest = find_latest(tmp_path / "checkpoints").path
    assert latest is not None
    step = int(latest.name.removeprefix("step-"))
    assert step == int(logged.split()[-1]) if logged else step == 5
    assert f"stopped by SIGTERM after step {step} of" in message
    config = toy_config(
        steps=step + 3, optim=OptimConfig(lr=1e-3), checkpoint=CheckpointConfig(every=10_000_000)
    )
    assert run(toy_job(tmp_path, config), resume="auto")["steps"] == step + 3
    steps = [line.split(",")[0] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [f'{{"step": {n}' for n in range(1, step + 4)]
