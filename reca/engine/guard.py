"""What ends a run early, told so that it can be cured: numbers that are not finite, and exhausted memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reca.config import TrainConfig
from reca.engine.state import TrainState
from reca.engine.step import StepMetrics
from reca.errors import MemoryExhausted, NumericError
from reca.files import write_json

_MAX_IDS = 8


@dataclass(frozen=True, slots=True)
class _Step:
    step: int
    sample_ids: tuple[int, ...]
    values: Tensor  # [3] fp32 on the device: skipped, loss, grad_norm


@dataclass(slots=True)
class Guard:
    """Counts steps that were not finite: skipped on the device, looked at by the host now and then.

    Attributes:
        state: its counters hold the streak, so that a resume goes on counting.
        folder: the run folder; `crash.json` is written there before the run is given up.
    """

    state: TrainState
    folder: Path
    _unread: list[_Step] = field(default_factory=list)
    _streak: list[dict[str, Any]] = field(default_factory=list)

    def record(self, sample_ids: tuple[int, ...], metrics: StepMetrics) -> None:
        """Remember the step just done, without reading it. `sample_ids` are those of all its microbatches."""
        values = torch.stack([metrics.skipped.to(torch.float32), metrics.loss, metrics.grad_norm])
        self._unread.append(_Step(self.state.step, sample_ids, values))

    @property
    def is_due(self) -> bool:
        """Whether so many steps are unread that a hopeless streak could be among them."""
        return len(self._unread) >= self.state.config.optim.max_bad_steps

    def check(self) -> None:
        """Read the steps recorded since the last look, in one transfer.

        Raises: NumericError after `optim.max_bad_steps` skipped steps in a row; `crash.json` tells more.
        """
        if not self._unread:
            return
        rows = torch.stack([step.values for step in self._unread]).tolist()
        steps, self._unread = self._unread, []
        progress, limit = self.state.progress, self.state.config.optim.max_bad_steps
        for step, (skipped, loss, grad_norm) in zip(steps, rows, strict=True):
            if not skipped:
                progress.bad_in_a_row = 0
                self._streak.clear()
                continue
            progress.bad_in_a_row += 1
            progress.skipped_steps += 1
            self._streak.append(
                {
                    "step": step.step,
                    "loss": str(loss),
                    "grad_norm": str(grad_norm),
                    "sample_ids": list(step.sample_ids),
                }
            )
            if progress.bad_in_a_row >= limit:
                self._give_up()

    def _give_up(self) -> None:
        gradients = self.state.optimizer.gradients.by_name()
        norms = {name: float(gradient.norm()) for name, gradient in gradients.items()}
        not_finite = [name for name, norm in norms.items() if not math.isfinite(norm)]
        path = self.folder / "crash.json"
        write_json(
            path,
            {
                "steps": self._streak,
                "gradients_not_finite": not_finite,
                "config": self.state.config.model_dump(mode="json"),
            },
        )
        last = self._streak[-1]
        raise NumericError(
            f"{self.state.progress.bad_in_a_row} steps in a row were not finite and were skipped, the last "
            f"at step {last['step']} (loss {last['loss']}, gradient norm {last['grad_norm']}, "
            f"{_shown(last['sample_ids'])}). Lower optim.lr or look at these samples with "
            f"`reca data preview`; all are listed in {path}. "
            "The last good checkpoint is kept: --resume auto continues there"
        )


def _shown(ids: list[int]) -> str:
    more = f" and {len(ids) - _MAX_IDS} more" if len(ids) > _MAX_IDS else ""
    return "samples " + ", ".join(str(i) for i in ids[:_MAX_IDS]) + more


@contextmanager
def memory_explained(config: TrainConfig) -> Iterator[None]:
    """Turn exhausted device or host memory into MemoryExhausted with three options that fit the run."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryExhausted(_memory_message("device", config)) from error
    except MemoryError as error:
        raise MemoryExhausted(_memory_message("host", config)) from error
    except RuntimeError as error:
        # The CPU allocator of torch raises a plain RuntimeError.
        if "DefaultCPUAllocator" not in str(error):
            raise
        raise MemoryExhausted(_memory_message("host", config)) from error


def _memory_message(place: str, config: TrainConfig) -> str:
    micro = config.data.micro_images or config.data.images
    options = [
        (micro > 1, f"data.micro_images={micro // 2} (same gradients, more passes)"),
        (not config.compute.recompute, "compute.recompute=true (about a third more time)"),
        (config.compute.precision == "fp32", "compute.precision=bf16 (half the activations)"),
        (config.optim.ema is not None, "optim.ema=null (one copy of the trained weights less)"),
        (config.optim.moments == "fp32", "optim.moments=8bit in a new run (a quarter of AdamW's moments)"),
        (True, f"data.max_sample_tokens={config.data.max_sample_tokens // 2} (rejects longer samples)"),
        (place == "host" and config.data.workers > 0, f"data.workers={config.data.workers // 2}"),
        (True, "a device with more memory (`reca plan` names those that fit)"),
        (True, f"data.images={max(config.data.images // 2, 1)} (another batch size)"),
    ]
    chosen = [text for applies, text in options if applies][:3]
    return (
        f"out of {place} memory; try {chosen[0]}, or {chosen[1]}, or {chosen[2]}. The last checkpoint is kept"
    )
