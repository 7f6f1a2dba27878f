"""Numbers that are not finite and exhausted memory: what is skipped, when the run ends, what it says."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import ToyBatch, ToyLoader, ToyModel, toy_config, toy_job

from reca.config import CheckpointConfig, ComputeConfig, DataConfig, OptimConfig
from reca.engine.checkpoint import find_latest
from reca.engine.guard import memory_explained
from reca.engine.loop import run
from reca.errors import MemoryExhausted, NumericError, Preempted

Spoil = Callable[[int, ToyBatch], ToyBatch]


def nan_at(*steps: int) -> Spoil:
    def spoil(step: int, batch: ToyBatch) -> ToyBatch:
        return replace(batch, clean=batch.clean * float("nan")) if step in steps else batch

    return spoil


def spoiled(folder: Path, *steps: int, **changes: Any) -> Any:
    config = toy_config(**{"optim": OptimConfig(lr=1e-2, max_bad_steps=5), **changes})
    return toy_job(folder, config, loader=ToyLoader(spoil=nan_at(*steps)))


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("log_every", [1, 1000])
def test_five_bad_steps_in_a_row_end_the_run_with_the_last_good_checkpoint(
    tmp_path: Path, log_every: int
) -> None:
    saves = CheckpointConfig(every=9)
    job = spoiled(tmp_path, *range(10, 21), log_every=log_every, checkpoint=saves)
    with pytest.raises(
        NumericError, match=r"5 steps in a row .* step 14 .*samples 78, 79.*last good checkpoint"
    ) as error:
        run(job)
    assert error.value.exit_code == 5
    assert job.loader.next == 14
    assert find_latest(tmp_path / "checkpoints").path == tmp_path / "checkpoints" / "step-00000009"
    crash = json.loads((tmp_path / "crash.json").read_text())
    assert [step["step"] for step in crash["steps"]] == [10, 11, 12, 13, 14]
    assert crash["steps"][0]["sample_ids"] == list(range(54, 60))
    assert "head.weight" in crash["gradients_not_finite"]
    assert crash["config"]["optim"]["max_bad_steps"] == 5


def test_long_lists_of_samples_are_cut_short_in_the_message(tmp_path: Path) -> None:
    job = spoiled(tmp_path, *range(1, 21))
    with pytest.raises(NumericError, match=r"samples 44, 45, 46, 47, 48, 49, 50, 51 and 3 more"):
        run(replace(job, loader=ToyLoader(images=11, spoil=nan_at(*range(1, 21)))))


def test_bad_steps_with_a_good_one_between_do_not_end_the_run(tmp_path: Path) -> None:
    summary = run(spoiled(tmp_path, 3, 4, 5, 6, 8, 9, 10, 11))
    assert (summary["status"], summary["skipped_steps"]) == ("finished", 8)
    assert summary["notes"] == ["8 steps were not finite and changed nothing"]


def test_a_skipped_step_is_logged_without_numbers_and_leaves_the_weights(tmp_path: Path) -> None:
    seen: list[Mapping[str, Any]] = []
    job = spoiled(tmp_path, 3, optim=OptimConfig(lr=1e-2, warmup_steps=10))
    run(replace(job, on_progress=seen.append))
    logged = rows(tmp_path)
    assert [row["step"] for row in logged] == list(range(1, 21))
    assert logged[2]["loss"] is None and logged[2]["grad_norm"] is None
    # The schedule did not move: step 4 has the learning rate that step 3 would have used.
    assert logged[3]["lr"] == logged[2]["lr"] == pytest.approx(2e-3)
    assert [record["skipped_steps"] for record in seen[1:4]] == [0, 1, 1]


def test_bad_steps_that_nobody_looked_at_yet_survive_a_resume(tmp_path: Path) -> None:
    class Stopping(ToyLoader):
        def __next__(self) -> Any:
            if self.next == 11:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__next__()

    # Steps 9 and 10 are read because five are unread, step 11 only because the run is saved.
    job = spoiled(tmp_path, *range(9, 14), log_every=1000, checkpoint=CheckpointConfig(every=1000))
    with pytest.raises(Preempted):
        run(replace(job, loader=Stopping(spoil=nan_at(*range(9, 14)))))
    with pytest.raises(NumericError, match=r"5 steps in a row .* step 13"):
        run(replace(job, model=ToyModel(), loader=ToyLoader(spoil=nan_at(*range(9, 14)))), resume="auto")


@pytest.mark.parametrize(
    ("error", "place"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "device"),
        (MemoryError(), "host"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "host"),
    ],
)
def test_exhausted_memory_names_three_options(error: Exception, place: str) -> None:
    config = toy_config(data=DataConfig(images=8))
    with pytest.raises(MemoryExhausted) as raised, memory_explained(config):
        raise error
    assert raised.value.exit_code == 6
    assert str(raised.value) == (
        f"out of {place} memory; try data.micro_images=4 (same gradients, more passes), "
        "or compute.recompute=true (about a third more time), "
        "or compute.precision=bf16 (half the activations). The last checkpoint is kept"
    )


def test_options_that_are_in_use_already_are_not_offered() -> None:
    config = toy_config(
        data=DataConfig(images=8, micro_images=1),
        compute=ComputeConfig(precision="bf16", recompute=True),
        optim=OptimConfig(),
    )
    with pytest.raises(MemoryExhausted) as raised, memory_explained(config):
        raise torch.OutOfMemoryError
    assert "micro_images" not in str(raised.value) and "recompute" not in str(raised.value)
    assert str(raised.value).count(", or ") == 2


def test_other_errors_pass_unchanged() -> None:
    with pytest.raises(RuntimeError, match="shapes"), memory_explained(toy_config()):
        raise RuntimeError("shapes")


def test_memory_can_be_saved_on_resume_and_the_run_goes_on(tmp_path: Path) -> None:
    class Full(ToyLoader):
        def __next__(self) -> Any:
            if self.next == 9:
                raise MemoryError
            return super().__next__()

    config = toy_config(data=DataConfig(path="toy", images=6, workers=0))
    with pytest.raises(MemoryExhausted):
        run(toy_job(tmp_path, config, loader=Full(micro=6)))
    lean = toy_config(
        data=DataConfig(path="toy", images=6, workers=0, micro_images=3),
        compute=ComputeConfig(recompute=True),
    )
    summary = run(toy_job(tmp_path, lean, loader=ToyLoader(micro=3)), resume="auto")
    assert summary["notes"] == [
        "resumed at step 8: compute.recompute changed from False to True",
        "resumed at step 8: data.micro_images changed from None to 3",
    ]
