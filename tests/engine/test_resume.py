"""A run that was cut and resumed, again and again, is the run that was never cut."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import ToyLoader, toy_config, toy_job

from reca.config import CheckpointConfig, ComputeConfig, DataConfig, OptimConfig, SampleConfig, TrainConfig
from reca.engine.checkpoint import load_checkpoint, save_checkpoint
from reca.engine.loop import run
from reca.errors import CheckpointError, ConfigError, Preempted


class Killed(BaseException):
    """Stands for SIGKILL: nothing between it and the end of the process may save anything."""


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def outcome(folder: Path) -> tuple[list[Any], list[Any], dict[str, Tensor]]:
    """What must not depend on cuts: logged numbers as hex, evaluations, every bit of the last checkpoint."""
    keys = ("step", "loss", "loss/reconstruction", "lr", "grad_norm")
    metrics = [
        [row["step"], *(row[key].hex() for key in keys[1:])] for row in lines(folder / "metrics.jsonl")
    ]
    evaluations = [[row["step"], row["error"].hex()] for row in lines(folder / "evaluations.jsonl")]
    last = load_checkpoint(max((folder / "checkpoints").iterdir()))
    tensors = {f"{kind}/{name}": t for kind, named in last.tensors().items() for name, t in named.items()}
    counters = last.meta["progress"]
    assert (counters["images"], counters["rejected"]) == (last.step * 6, last.step // 4)
    return metrics, evaluations, tensors


def assert_same(
    got: tuple[Any, Any, dict[str, Tensor]], expected: tuple[Any, Any, dict[str, Tensor]]
) -> None:
    assert got[0] == expected[0]
    assert got[1] == expected[1]
    assert got[2].keys() == expected[2].keys()
    for name, tensor in expected[2].items():
        assert torch.equal(got[2][name].view(torch.int32), tensor.view(torch.int32)), name


def cut_at(step: int, how: str) -> Any:
    """A progress callback that ends the session at `step`: `term` asks for a stop, `kill` just dies."""

    def callback(record: Mapping[str, Any]) -> None:
        if record["step"] == step:
            if how == "kill":
                raise Killed
            os.kill(os.getpid(), signal.SIGTERM)

    return callback


def run_with_cuts(folder: Path, config: TrainConfig, cuts: list[tuple[int, str]]) -> None:
    """One session per cut, each a fresh model and loader, then the rest."""
    for step, how in cuts:
        with pytest.raises((Killed, Preempted)):
            run(toy_job(folder, config, on_progress=cut_at(step, how)), resume="auto")
    summary = run(toy_job(folder, config), resume="auto")
    assert (summary["status"], summary["steps"]) == ("finished", config.steps)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, dict[str, Tensor]]:
    """20 steps without a cut."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("straight")
    run(toy_job(folder))
    torch.set_num_threads(threads)
    return outcome(folder)


def test_forty_steps_cut_three_times_equal_forty_steps_straight(tmp_path: Path) -> None:
    config = toy_config(steps=40)
    run(toy_job(tmp_path / "straight", config))
    run_with_cuts(tmp_path / "cut", config, [(9, "term"), (18, "kill"), (31, "term")])
    assert_same(outcome(tmp_path / "cut"), outcome(tmp_path / "straight"))
    assert [row["step"] for row in lines(tmp_path / "cut" / "metrics.jsonl")] == list(range(1, 41))


@pytest.mark.parametrize("step", range(1, 21))
def test_a_cut_at_any_step_is_invisible_also_the_second_time(
    step: int, tmp_path: Path, straight: tuple[Any, Any, dict[str, Tensor]]
) -> None:
    first, second = ("kill", "term") if step % 2 == 0 else ("term", "kill")
    run_with_cuts(tmp_path, toy_config(), [(step, first), (min(step + 3, 20), second)])
    assert_same(outcome(tmp_path), straight)


@pytest.mark.parametrize("step", [0, 5, 20])
def test_a_stop_during_an_evaluation_repeats_only_the_evaluation(
    step: int, tmp_path: Path, straight: tuple[Any, Any, dict[str, Tensor]]
) -> None:
    for _ in range(2):
        job = toy_job(tmp_path)
        evaluated: list[int] = []

        def evaluate(
            at: int, folder: Path, job: Any = job, seen: list[int] = evaluated
        ) -> Mapping[str, float]:
            seen.append(at)
            if at == step:
                os.kill(os.getpid(), signal.SIGUSR1)
                raise AssertionError("the request must end the evaluation")
            return job.evaluate(at, folder)  # type: ignore[no-any-return]

        with pytest.raises(Preempted, match="SIGUSR1"):
            run(toy_job(tmp_path, model=job.model, evaluate=evaluate), resume="auto")
        assert evaluated[-1] == step
    run(toy_job(tmp_path), resume="auto")
    assert_same(outcome(tmp_path), straight)


def test_a_stop_after_an_evaluation_does_not_repeat_it(
    tmp_path: Path, straight: tuple[Any, Any, dict[str, Tensor]]
) -> None:
    class Stopping(ToyLoader):
        def __next__(self) -> Any:
            if self.next == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__next__()

    with pytest.raises(Preempted, match="after step 5 of 20"):
        run(toy_job(tmp_path, loader=Stopping()))
    run(toy_job(tmp_path), resume="auto")
    assert_same(outcome(tmp_path), straight)


def test_logging_less_often_leaves_no_gap_and_no_duplicate(tmp_path: Path) -> None:
    config = toy_config(log_every=3, checkpoint=CheckpointConfig(every=4))
    run_with_cuts(tmp_path, config, [(6, "kill"), (9, "term"), (15, "kill")])
    assert [row["step"] for row in lines(tmp_path / "metrics.jsonl")] == [3, 6, 9, 12, 15, 18]
    assert [row["step"] for row in lines(tmp_path / "evaluations.jsonl")] == [0, 5, 10, 15, 20]


def test_a_finished_run_returns_its_summary_at_once(tmp_path: Path) -> None:
    first = run(toy_job(tmp_path))
    job = toy_job(tmp_path)
    assert run(job, resume="auto") == first
    assert job.loader.next == 0 and job.loader.closed  # type: ignore[attr-defined]


def test_a_finished_run_can_be_extended(tmp_path: Path) -> None:
    config = toy_config(optim=OptimConfig(lr=1e-2, ema=0.9))
    run(toy_job(tmp_path / "a", config))
    longer = config.model_copy(update={"steps": 24})
    summary = run(toy_job(tmp_path / "a", longer), resume="auto")
    run(toy_job(tmp_path / "b", longer))
    assert summary["steps"] == 24
    assert summary["notes"] == ["resumed at step 20: steps changed from 20 to 24"]
    weights, expected = outcome(tmp_path / "a")[2], outcome(tmp_path / "b")[2]
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def interrupted(folder: Path, config: TrainConfig | None = None, step: int = 9) -> None:
    with pytest.raises(Preempted):
        run(toy_job(folder, config, on_progress=cut_at(step, "term")))


def test_allowed_changes_are_noted_in_the_record(tmp_path: Path) -> None:
    interrupted(tmp_path)
    config = toy_config(
        log_every=2,
        checkpoint=CheckpointConfig(every=7),
        data=DataConfig(path="elsewhere", images=6, micro_images=4),
    )
    notes = run(toy_job(tmp_path, config), resume="auto")["notes"]
    assert notes == [
        "resumed at step 9: checkpoint.every changed from 4 to 7",
        "resumed at step 9: data.path changed from 'toy' to 'elsewhere'",
        "resumed at step 9: data.workers changed from 0 to 2",
        "resumed at step 9: log_every changed from 1 to 2",
    ]


def test_changes_of_the_run_itself_are_refused_with_a_diff(tmp_path: Path) -> None:
    interrupted(tmp_path)
    before = outcome(tmp_path)
    config = toy_config(seed=12, loss_weights={"reconstruction": 0.5})
    job = toy_job(tmp_path, config, fingerprint={"weights": "sha256:9", "data": "sha256:2", "code": "x"})
    with pytest.raises(ConfigError) as error:
        run(job, resume="auto")
    assert str(error.value).splitlines()[1:] == [
        "  code: was '(absent)', is now 'x'",
        "  loss_weights.reconstruction: was 1.0, is now 0.5",
        "  seed: was 11, is now 12",
        "  weights: was 'sha256:1', is now 'sha256:9'",
    ]
    assert_same(outcome(tmp_path), before)


def test_the_cut_into_microbatches_may_change_only_where_gradients_do_not_depend_on_it(
    tmp_path: Path,
) -> None:
    interrupted(tmp_path, toy_config(normalize="microbatch"))
    config = toy_config(
        normalize="microbatch", data=DataConfig(path="toy", images=6, micro_images=2, workers=0)
    )
    with pytest.raises(ConfigError, match=r"data\.micro_images: was 4, is now 2"):
        run(toy_job(tmp_path, config), resume="auto")


def test_a_finished_run_refuses_another_configuration_too(tmp_path: Path) -> None:
    run(toy_job(tmp_path))
    with pytest.raises(ConfigError, match="seed: was 11, is now 12"):
        run(toy_job(tmp_path, toy_config(seed=12)), resume="auto")


def test_another_number_of_threads_is_noted_as_not_bitwise(tmp_path: Path) -> None:
    interrupted(tmp_path, toy_config(compute=ComputeConfig(threads=1)))
    summary = run(toy_job(tmp_path, toy_config(compute=ComputeConfig(threads=2))), resume="auto")
    assert summary["notes"] == [
        "resumed at step 9: compute.threads changed from 1 to 2",
        "resumed at step 9: threads changed from 1 to 2: the continuation is not bitwise the one of an "
        "uninterrupted run",
    ]


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path: Path) -> None:
    interrupted(tmp_path)
    with pytest.raises(
        ConfigError, match="already holds a run; continue it with --resume auto, or give another --run"
    ):
        run(toy_job(tmp_path))


def test_resume_auto_in_an_empty_folder_starts(tmp_path: Path) -> None:
    assert run(toy_job(tmp_path / "new"), resume="auto")["steps"] == 20


def test_a_checkpoint_of_another_folder_can_be_branched_off(
    tmp_path: Path, straight: tuple[Any, Any, dict[str, Tensor]]
) -> None:
    interrupted(tmp_path / "a")
    source = tmp_path / "a" / "checkpoints" / "step-00000009"
    summary = run(toy_job(tmp_path / "b"), resume=source)
    metrics, _, tensors = outcome(tmp_path / "b")
    assert (metrics, summary["before"]["error"].hex()) == (straight[0][9:], straight[1][0][1])
    assert all(torch.equal(tensors[name], tensor) for name, tensor in straight[2].items())


def test_an_explicit_path_must_be_a_checkpoint_and_the_newest_of_its_run(tmp_path: Path) -> None:
    interrupted(tmp_path)
    checkpoints = tmp_path / "checkpoints"
    with pytest.raises(ConfigError, match="step-00000008 is older than step-00000009 of the same run"):
        run(toy_job(tmp_path), resume=checkpoints / "step-00000008")
    with pytest.raises(ConfigError, match="is no folder; give"):
        run(toy_job(tmp_path), resume=checkpoints / "step-00000077")
    assert run(toy_job(tmp_path), resume=checkpoints / "step-00000009")["steps"] == 20


def flip_a_byte(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_damaged_newest_checkpoint_is_passed_over_and_noted(
    tmp_path: Path, straight: tuple[Any, Any, dict[str, Tensor]]
) -> None:
    interrupted(tmp_path)
    flip_a_byte(tmp_path / "checkpoints" / "step-00000009")
    notes = run(toy_job(tmp_path), resume="auto")["notes"]
    assert len(notes) == 1 and notes[0].startswith(
        "resumed at step 8: skipped the damaged checkpoint step-00000009"
    )
    assert_same(outcome(tmp_path), straight)


def test_a_run_with_nothing_but_damaged_checkpoints_does_not_start_over(tmp_path: Path) -> None:
    interrupted(tmp_path, step=3)
    flip_a_byte(tmp_path / "checkpoints" / "step-00000003")
    with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
        run(toy_job(tmp_path), resume="auto")


def test_fewer_steps_than_are_done_is_refused(tmp_path: Path) -> None:
    interrupted(tmp_path)
    with pytest.raises(ConfigError, match="step-00000009 has done 9 steps; set steps, now 8, to no less"):
        run(toy_job(tmp_path, toy_config(steps=8)), resume="auto")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda meta: meta.pop("identity"), "lacks identity"),
        (lambda meta: meta["progress"].pop("cursor"), "counters must be"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path, spoil: Any, message: str) -> None:
    interrupted(tmp_path)
    saved = load_checkpoint(tmp_path / "checkpoints" / "step-00000009")
    meta = dict(saved.meta)
    spoil(meta)
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000008")
    tensors = {name: t.clone() for name, t in saved.model.items()}
    optimizer = {name: t.clone() for name, t in saved.optimizer.items()}
    ema = {name: t.clone() for name, t in saved.ema.items()}
    save_checkpoint(tmp_path / "checkpoints", 9, type(saved)(9, tensors, optimizer, ema, meta), keep=1)
    with pytest.raises(CheckpointError, match=message):
        run(toy_job(tmp_path), resume="auto")


def test_a_summary_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"summary\.json is not a summary of a run"):
        run(toy_job(tmp_path), resume="auto")


def test_the_loader_continues_at_the_cursor_of_the_checkpoint(tmp_path: Path) -> None:
    interrupted(tmp_path)
    seen: list[int] = []

    class Watched(ToyLoader):
        def restore(self, cursor: Mapping[str, Any]) -> None:
            seen.append(cursor["next"])
            super().restore(cursor)

    run(toy_job(tmp_path, toy_config(sample=SampleConfig(every=5)), loader=Watched()), resume="auto")
    assert seen == [9]
