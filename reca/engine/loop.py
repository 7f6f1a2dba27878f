"""The run, top to bottom: restore or start, then load, step, log, save and evaluate until the last step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from reca.config import TrainConfig
from reca.engine.checkpoint import save_checkpoint
from reca.engine.guard import Guard, memory_explained
from reca.engine.identity import identity
from reca.engine.journal import CHECKPOINTS, Journal
from reca.engine.metrics import Meter
from reca.engine.resume import Start, choose_start, finished_summary
from reca.engine.signals import StopNow, StopRequest
from reca.engine.state import TrainState, recomputed, select_device
from reca.engine.step import StepMetrics, autocast, train_step
from reca.errors import Preempted
from reca.files import RunLock, write_json
from reca.profiling import span
from reca.types import Batch, ReconstructionModel, StepLoader


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """All that a run needs; made by the recipes, which know models and data.

    Attributes:
        config: the resolved configuration.
        model: an `nn.Module` that implements `ReconstructionModel`; what is trained has `requires_grad`.
        loader: endless stream of steps; closed by `run`.
        folder: the run folder.
        evaluate: (step, folder for pictures) -> metrics; called without gradients and with averaged weights.
        fingerprint: name -> identity of weights, data and whatever else must not change on a resume.
        on_progress: called with each logged record plus `steps`, `seconds` and `skipped_steps`.
        on_start: called once the folder is locked and the resume agreed: what it writes harms no other run.
        notes: what the record should say of the starting weights.
    """

    config: TrainConfig
    model: nn.Module
    loader: StepLoader
    folder: Path
    evaluate: Callable[[int, Path], Mapping[str, float]]
    fingerprint: Mapping[str, str]
    on_progress: Callable[[Mapping[str, Any]], None]
    on_start: Callable[[], None] = lambda: None
    notes: tuple[str, ...] = ()


def run(job: Job, *, resume: Literal["auto"] | Path | None = None) -> dict[str, Any]:
    """Train to the last step and return the summary, which is also in `summary.json`.

    Args:
        resume: "auto" continues the newest intact checkpoint of the folder, or starts if there is none; a
            path continues that checkpoint; None needs a folder without a run.

    Raises: ConfigError (the folder is taken or holds another run), CheckpointError, NumericError, DiskError,
        MemoryExhausted, Preempted after a requested stop was saved, Interrupted on a second Ctrl-C.
    """
    config = job.config
    try:
        with RunLock(job.folder), StopRequest() as stop, memory_explained(config):
            if config.compute.threads is not None:
                torch.set_num_threads(config.compute.threads)
            device = select_device(config.compute)
            made_of = identity(config, job.fingerprint, device)
            if (
                resume == "auto"
                and (summary := finished_summary(job.folder, made_of, config.steps)) is not None
            ):
                return summary
            start = choose_start(job.folder, resume, made_of)
            job.on_start()
            blocks = cast(ReconstructionModel[Any, Any], job.model).blocks()
            with recomputed(blocks, config.compute.recompute):
                return _Run(job, start, device, made_of, stop).to_the_end()
    finally:
        job.loader.close()


class _Run:
    """One session of a run, from its start or a checkpoint to the end or a requested stop."""

    def __init__(
        self, job: Job, start: Start, device: torch.device, made_of: dict[str, Any], stop: StopRequest
    ) -> None:
        self.job, self.config, self.device, self.made_of, self.stop = job, job.config, device, made_of, stop
        self.state = TrainState.start(job.model, job.config, device)
        if start.checkpoint is None:
            self.state.progress.notes += job.notes
        else:
            self.state.restore(start.checkpoint)
            self.state.progress.notes += start.notes
            job.loader.restore(self.state.progress.cursor or {})
        job.loader.on_wait = stop.check
        self.saved_step = self.state.step
        self.guard = Guard(self.state, job.folder)
        self.journal = Journal(job.folder, step=self.state.step, evaluated=self.state.progress.evaluated)
        self.meter = Meter(device)
        self._clock = time.monotonic() - self.state.progress.seconds

    def to_the_end(self) -> dict[str, Any]:
        """All remaining steps; on a stop request the step in hand is finished and saved first."""
        try:
            self._evaluate_if_due()
            while self.state.step < self.config.steps:
                self._log_if_due(self._step())
                self._save_if_due()
                self._evaluate_if_due()
            return self._finish()
        except StopNow:
            raise Preempted(self._stopped()) from None
        finally:
            self.journal.close()

    def _step(self) -> StepMetrics:
        waiting = time.perf_counter()
        self.stop.check()
        with span("data"):
            batches = next(self.job.loader)
        waited = time.perf_counter() - waiting
        sample_ids = tuple(i for batch in batches.microbatches for i in batch.sample_ids.tolist())
        metrics = train_step(self.state, [self._to_device(batch) for batch in batches.microbatches])
        self.guard.record(sample_ids, metrics)
        self.meter.add(self.job.model, batches.microbatches, waited)
        progress = self.state.progress
        progress.cursor, progress.rejected = batches.cursor, batches.rejected
        progress.images += sum(batch.num_images for batch in batches.microbatches)
        return metrics

    def _to_device(self, batch: Batch) -> Batch:
        if self.device.type == "cpu":
            return batch
        return batch.pin_memory().to(self.device)

    def _log_if_due(self, metrics: StepMetrics) -> None:
        if self.guard.is_due or self.state.step % self.config.log_every == 0:
            self.guard.check()
        if self.state.step % self.config.log_every:
            return
        record = self.meter.line(self.state.step, metrics)
        self.journal.metrics.append(record)
        seconds = time.monotonic() - self._clock
        skipped = self.state.progress.skipped_steps
        self.job.on_progress(
            {**record, "steps": self.config.steps, "seconds": seconds, "skipped_steps": skipped}
        )

    def _save_if_due(self) -> None:
        step = self.state.step
        if step % self.config.checkpoint.every == 0 or step == self.config.steps:
            self._save()

    def _save(self) -> None:
        if self.saved_step == self.state.step:
            return
        self.guard.check()
        self.state.progress.seconds = time.monotonic() - self._clock
        with span("save"):
            self.journal.sync()
            saved = self.state.to_checkpoint(self.made_of)
            save_checkpoint(
                self.job.folder / CHECKPOINTS, self.state.step, saved, keep=self.config.checkpoint.keep
            )
        self.saved_step = self.state.step
        self.meter.restart()

    def _evaluate_if_due(self) -> None:
        """Evaluate before step 1, after every `sample.every` and after the last; once each overall."""
        step, every, progress = self.state.step, self.config.sample.every, self.state.progress
        due = step in (0, self.config.steps) or (every is not None and step % every == 0)
        if not due or progress.evaluated >= step:
            return
        precision = self.config.compute.precision
        # Innermost: a stop may cut the evaluation anywhere, but never the exchange of weights around it.
        with (
            span("evaluate"),
            self.state.averaged(),
            torch.no_grad(),
            autocast(self.device, precision),
            self.stop.disposable(),
        ):
            measured = self.job.evaluate(step, self.job.folder / "samples")
        values = {name: float(value) if math.isfinite(value) else None for name, value in measured.items()}
        self.journal.evaluations.append({"step": step, **values})
        progress.evaluated = step
        progress.before, progress.after = progress.before or values, values
        self.meter.restart()

    def _stopped(self) -> str:
        step, reason = self.state.step, self.stop.reason
        if step == 0:
            return f"stopped by {reason} before step 1, nothing to save yet; --resume auto starts again"
        self._save()
        return (
            f"stopped by {reason} after step {step} of {self.config.steps} and saved; --resume auto continues"
        )

    def _finish(self) -> dict[str, Any]:
        progress = self.state.progress
        notes = list(progress.notes)
        if progress.skipped_steps:
            notes.append(f"{progress.skipped_steps} steps were not finite and changed nothing")
        summary = {
            "status": "finished",
            "steps": self.state.step,
            "before": progress.before,
            "after": progress.after,
            "seconds": time.monotonic() - self._clock,
            "images": progress.images,
            "rejected": progress.rejected,
            "skipped_steps": progress.skipped_steps,
            "notes": notes,
            "checkpoint": f"{CHECKPOINTS}/step-{self.state.step:08d}",
            "identity": self.made_of,
        }
        write_json(self.job.folder / "summary.json", summary)
        return summary
