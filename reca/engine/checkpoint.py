"""Checkpoints of a run: `checkpoints/step-00001234/`, published whole, verified before use.

    model.safetensors       trained tensors: fp32 masters, or bf16 where a run keeps no more
    ema.safetensors         their average, if one is kept
    optimizer.safetensors   exp_avg/<name>, exp_avg_sq/<name>; with moments in 8 bits their scales, too
    state.json              step and everything that is not a tensor
    MANIFEST.json           step, and bytes and SHA-256 of each file

The newest checkpoint is computed from the names, never stored. A run's history is linear: a save at step n
supersedes every checkpoint above n, which was either damaged or left behind by resuming from an earlier one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reca.errors import CheckpointError, NumericError
from reca.files import publish_dir, read_safetensors, remove_dir, verify_dir, write_json, write_safetensors

_STEP = re.compile(r"step-(\d{8,})")
_STATE = "state.json"


@dataclass(frozen=True, slots=True)
class CheckpointState:
    """Everything a run needs to go on as if it had never stopped.

    Attributes:
        step: optimizer steps done.
        model: trained tensors only, by parameter name.
        optimizer: what `AdamW.state` yields; counters are in `meta`.
        ema: average of the trained tensors; empty when no average is kept.
        meta: JSON-ready: data cursor, counters, seed, config hash, threads, schedule. A save adds `versions`.
    """

    step: int
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    meta: Mapping[str, Any]

    def tensors(self) -> dict[str, Mapping[str, Tensor]]:
        """File stem -> the tensors in that file."""
        return {"model": self.model, "ema": self.ema, "optimizer": self.optimizer}


@dataclass(frozen=True, slots=True)
class Latest:
    """What `find_latest` found.

    Attributes:
        path: the newest checkpoint of which every byte is right; None if there is none.
        skipped: one sentence for each newer one that is damaged, newest first.
    """

    path: Path | None
    skipped: tuple[str, ...]


def versions() -> dict[str, str]:
    """The libraries whose version can change the numbers of a run."""
    found = {"torch": str(torch.__version__)}
    for package in ("reca", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _refuse_non_finite(state: CheckpointState) -> None:
    for stem, tensors in state.tensors().items():
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and tensor.numel():
                # NaN propagates through both ends, and unlike isfinite() this needs no copy on a full device.
                low, high = torch.aminmax(tensor.detach())
                if not math.isfinite(low.item()) or not math.isfinite(high.item()):
                    raise NumericError(
                        f"{stem} tensor {name!r} holds NaN or infinity at step {state.step}; "
                        "nothing was saved, resume from the last checkpoint with a lower optim.lr"
                    )


def save_checkpoint(folder: Path, step: int, state: CheckpointState, *, keep: int) -> Path:
    """Publish `state` as `folder/step-<step>` and keep the newest `keep` checkpoints.

    Until the new one is durable nothing older is touched; afterwards those beyond `keep` are deleted, and all
    above `step`, whose history this one replaces.

    Args:
        folder: the run's `checkpoints` folder; hold the run's lock.
        step: optimizer steps done, equal to `state.step`.
        keep: at least 1.

    Returns: the published folder.
    Raises: NumericError if a tensor is not finite; DiskError if the file system refuses.
    """
    if step != state.step or keep < 1:
        raise ValueError(
            f"save_checkpoint: step={step} must be state.step={state.step} and keep={keep} at least 1"
        )
    _refuse_non_finite(state)
    path = folder / f"step-{step:08d}"
    with publish_dir(path, manifest={"step": step}, replace=True) as staging:
        for stem, tensors in state.tensors().items():
            if tensors:
                write_safetensors(staging / f"{stem}.safetensors", tensors)
        write_json(staging / _STATE, {"step": step, "meta": {**state.meta, "versions": versions()}})
    for surplus in _surplus(folder, step, keep):
        remove_dir(surplus)
    return path


def _published(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of everything with a checkpoint's name, oldest first; other names are not ours."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted((int(match[1]), path) for path in paths if (match := _STEP.fullmatch(path.name)))


def _surplus(folder: Path, saved: int, keep: int) -> Iterator[Path]:
    """What a save at step `saved` makes superfluous: checkpoints above it, and beyond the newest `keep`."""
    published = _published(folder)
    yield from (path for step, path in published if step > saved)
    yield from [path for step, path in published if step <= saved][:-keep]


def _verified_step(path: Path) -> int:
    step = verify_dir(path).get("step")
    match = _STEP.fullmatch(path.name)
    if not isinstance(step, int) or (match and int(match[1]) != step):
        raise CheckpointError(f"{path} holds step {step}, not what its name says; use another checkpoint")
    return step


def find_latest(folder: Path) -> Latest:
    """The newest checkpoint in `folder` that verifies, and why newer ones do not.

    Call `reca.files.sweep_staging(folder)` first: it puts back a checkpoint whose replacement was cut in two.
    """
    skipped = []
    for _, path in reversed(_published(folder)):
        try:
            _verified_step(path)
        except CheckpointError as error:
            skipped.append(f"skipped the damaged checkpoint {path.name}: {error}")
        else:
            return Latest(path, tuple(skipped))
    return Latest(None, tuple(skipped))


def load_checkpoint(path: Path, *, verify: bool = True) -> CheckpointState:
    """Read a checkpoint; tensors are on the CPU, mapped from their files.

    Args:
        path: a `step-...` folder, or a copy of one under any name.
        verify: False only for a path that `find_latest` has just verified, to read it once instead of twice.

    Raises: CheckpointError, naming the file, if a byte is not as it was written or this is no checkpoint.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a checkpoint folder; give one like checkpoints/step-00001000")
    if verify:
        _verified_step(path)
    try:
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        step, meta = int(state["step"]), dict(state["meta"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path / _STATE} is not the state of a run: {error}; use another checkpoint"
        ) from error
    files = {stem: path / f"{stem}.safetensors" for stem in ("model", "ema", "optimizer")}
    tensors = {stem: read_safetensors(file) if file.exists() else {} for stem, file in files.items()}
    return CheckpointState(step, tensors["model"], tensors["optimizer"], tensors["ema"], meta)
