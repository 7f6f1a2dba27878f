"""`reca train`: resolve the configuration, choose the run folder, run, show progress, write the report."""

from __future__ import annotations

import json
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from reca.commands.progress import Progress
from reca.commands.report import write_report
from reca.engine.checkpoint import versions
from reca.engine.journal import holds_a_run
from reca.errors import ConfigError
from reca.files import write_json, write_text
from reca.recipes.api import train
from reca.recipes.resolve import Resolved, config_yaml, resolve

RUNS = Path("runs")


def train_recipe(
    recipe: str,
    overrides: Sequence[str],
    *,
    extra: Mapping[str, Any],
    run: Path | None,
    resume: str | None,
    quiet: bool,
) -> dict[str, Any]:
    """Train a recipe and return its summary, with the paths of the run folder and its report.

    Args:
        recipe: name, or YAML file.
        overrides: `key=value` strings.
        extra: dotted key -> value from options.
        run: run folder; None takes `runs/RECIPE`, numbered where that holds a run already; to resume, the
            newest of them.
        resume: None, "auto" or a checkpoint's path.
        quiet: print nothing.

    Raises: RecaError of the kinds in `reca.errors`.
    """
    resolved = resolve(recipe, overrides, extra)
    folder = run if run is not None else default_folder(resolved.config.recipe, is_resumed=resume is not None)
    if resume is None and holds_a_run(folder):
        raise ConfigError(
            f"{folder} already holds a run; continue it with --resume auto, or choose another --run"
        )
    start: Literal["auto"] | Path | None = resume if resume in (None, "auto") else Path(resume)  # type: ignore[assignment]
    with Progress(folder, resolved.config.steps, quiet=quiet) as progress:
        summary = train(
            resolved.config,
            folder,
            resume=start,
            on_progress=progress.update,
            on_start=lambda: write_record(folder, resolved),
        )
    report = write_report(folder)
    if not quiet:
        progress.finish(summary, report)
    return {**summary, "run": str(folder), "report": str(report)}


def default_folder(recipe: str, *, is_resumed: bool, runs: Path = RUNS) -> Path:
    """`runs/RECIPE`, `runs/RECIPE-2`, ...: the newest that holds a run to resume, else the first free one."""
    numbers = [1]
    for path in runs.glob(f"{recipe}*") if runs.is_dir() else ():
        match = re.fullmatch(re.escape(recipe) + r"(?:-(\d+))?", path.name)
        if match and holds_a_run(path):
            numbers.append(int(match[1] or 1) + (0 if is_resumed else 1))
    number = max(numbers)
    return runs / (recipe if number == 1 else f"{recipe}-{number}")


def write_record(folder: Path, resolved: Resolved) -> None:
    """Write `config.yaml` and `run.json`; each session that resumes a run adds its line to `sessions`."""
    path = folder / "run.json"
    sessions = _sessions(path)
    write_text(folder / "config.yaml", config_yaml(resolved))
    write_json(
        path,
        {
            "recipe": resolved.config.recipe,
            "model": resolved.config.model,
            "machine": machine(),
            "versions": {"python": sys.version.split()[0], **versions()},
            "sessions": [*sessions, session()],
        },
    )


def _sessions(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        return list(json.loads(path.read_text("utf-8"))["sessions"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not the record of a run; choose another --run") from error


def session() -> dict[str, Any]:
    """When and how this process was started, and the commit of the code if it is a checkout."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(["reca", *sys.argv[1:]]),
        "commit": commit(),
    }


def commit() -> str | None:
    """The commit that reca's own code is at; None outside a checkout."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    result = subprocess.run(
        ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout.strip() or None


def machine() -> dict[str, Any]:
    """What the run's numbers depend on."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"platform": platform.platform(), "cpu_threads": torch.get_num_threads(), "gpus": gpus}
