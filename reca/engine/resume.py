"""Where a run begins: at step 0, at a checkpoint, or not at all because it is finished."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from reca.engine.checkpoint import CheckpointState, find_latest, load_checkpoint, versions
from reca.engine.identity import changes_on_resume
from reca.engine.journal import CHECKPOINTS, holds_a_run
from reca.errors import CheckpointError, ConfigError
from reca.files import sweep_staging


@dataclass(frozen=True, slots=True)
class Start:
    """Where a session begins: a checkpoint, or None for step 0, and what the record should say about it."""

    checkpoint: CheckpointState | None = None
    notes: list[str] = field(default_factory=list)


def finished_summary(folder: Path, made_of: Mapping[str, Any], steps: int) -> dict[str, Any] | None:
    """The summary of a run that has done its steps; None if steps remain.

    Raises: ConfigError if the finished run is another one.
    """
    path = folder / "summary.json"
    if not path.exists():
        return None
    try:
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        recorded, done = summary["identity"], int(summary["steps"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is not a summary of a run ({error}); remove it to continue the run"
        ) from error
    changes_on_resume(recorded, made_of)
    return summary if done >= steps else None


def choose_start(folder: Path, resume: Literal["auto"] | Path | None, made_of: Mapping[str, Any]) -> Start:
    """Find, verify and compare what the session continues; the lock of the run must be held.

    Raises: ConfigError if the folder holds a run that is not asked for, or a resume would change the run;
        CheckpointError if the checkpoint is damaged.
    """
    if resume is None:
        _refuse_other_run(folder)
        return Start()
    path, notes = _newest(folder) if resume == "auto" else (_chosen(folder, resume), [])
    if path is None:
        return Start()
    saved = load_checkpoint(path, verify=resume != "auto")
    if missing := {"identity", "progress", "updates", "versions"} - saved.meta.keys():
        raise CheckpointError(
            f"{path} lacks {', '.join(sorted(missing))}; it is no checkpoint of this trainer"
        )
    notes += changes_on_resume(saved.meta["identity"], made_of)
    notes += [
        f"{name} is now {now}" for name, now in versions().items() if saved.meta["versions"].get(name) != now
    ]
    steps = made_of["config"]["steps"]
    if saved.step > steps:
        raise ConfigError(
            f"resume: {path.name} has done {saved.step} steps; set steps, now {steps}, to no less"
        )
    return Start(saved, [f"resumed at step {saved.step}: {note}" for note in notes])


def _newest(folder: Path) -> tuple[Path | None, list[str]]:
    sweep_staging(folder / CHECKPOINTS)
    latest = find_latest(folder / CHECKPOINTS)
    if latest.path is None and latest.skipped:
        raise CheckpointError(
            f"{folder}: every checkpoint is damaged ({latest.skipped[0]}); start again with another --run"
        )
    return latest.path, list(latest.skipped)


def _chosen(folder: Path, path: Path) -> Path:
    if not path.is_dir():
        raise ConfigError(f"--resume: {path} is no folder; give .../checkpoints/step-NNNNNNNN or `auto`")
    if path.resolve().parent != (folder / CHECKPOINTS).resolve():
        _refuse_other_run(folder)
        return path
    newest, _ = _newest(folder)
    if newest is not None and newest.name > path.name:
        raise ConfigError(
            f"--resume: {path.name} is older than {newest.name} of the same run, which would be overwritten; "
            "give another --run to branch off, or --resume auto"
        )
    return path


def _refuse_other_run(folder: Path) -> None:
    if holds_a_run(folder):
        raise ConfigError(
            f"{folder} already holds a run; continue it with --resume auto, or give another --run"
        )
