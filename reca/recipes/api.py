"""The Python API behind `reca.train` and `reca.load`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from reca.config import ComputeConfig, TrainConfig
from reca.data.loader import Reject
from reca.engine.checkpoint import find_latest, load_checkpoint
from reca.engine.journal import CHECKPOINTS
from reca.engine.loop import run
from reca.engine.optim import copy_exactly, trained_parameters
from reca.errors import CheckpointError, ConfigError
from reca.files import JsonLines
from reca.recipes.assemble import Loaded, assemble, load_model
from reca.recipes.resolve import read_config


def train(
    config: TrainConfig,
    folder: Path | str,
    *,
    resume: Literal["auto"] | Path | None = None,
    on_progress: Callable[[Mapping[str, Any]], None] = lambda record: None,
    on_start: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Run a configuration to its end in a run folder and return the summary.

    Args:
        config: e.g. `reca.recipes.get_recipe("quickstart")()`, changed with `model_copy(update=...)`.
        folder: the run folder; made if missing.
        resume: "auto" continues the newest intact checkpoint; a path continues that one; None starts.
        on_progress: called with each logged record.
        on_start: called once the run folder is this run's, before the first step.

    Raises: RecaError of the kinds in `reca.errors`.
    """
    folder = Path(folder)
    rejects = _RejectLog(folder / "rejected.jsonl")
    job = assemble(config, folder, on_progress=on_progress, on_reject=rejects, on_start=on_start)
    return run(job, resume=resume)


def load(source: Path | str, model: str | None = None, *, device: str = "auto") -> Loaded:
    """Load a run's newest checkpoint, or a folder of official weights.

    Args:
        source: a run folder, or a folder of official weights.
        model: `family/variant` of official weights; a run knows its own.
        device: auto, cpu or cuda.

    Raises: ConfigError, CheckpointError.
    """
    folder = Path(source)
    compute = ComputeConfig.model_validate({"device": device})
    if not (folder / "config.yaml").is_file():
        if model is None:
            raise ConfigError(
                f"{folder} is not a run folder, so say what its weights are, as in --model bagel/7b-mot"
            )
        return load_model(model, str(folder), compute)
    if model is not None:
        raise ConfigError(f"--model would be ignored: the run {folder} knows its own; drop it")
    config = read_config(folder / "config.yaml")
    loaded = load_model(config.model, config.weights, compute, config.seed)
    found = find_latest(folder / CHECKPOINTS).path
    if found is None:
        raise CheckpointError(f"{folder} holds no intact checkpoint; train on, or use its weights")
    trained = {name: parameter.detach() for name, parameter in trained_parameters(loaded.model).items()}
    copy_exactly("weights", trained, load_checkpoint(found, verify=False).model)
    return loaded


class _RejectLog:
    """`rejected.jsonl`: every image left out, once, whatever was resumed. Made at the first reject."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: set[str] | None = None

    def __call__(self, reject: Reject) -> None:
        if self._known is None:
            lines = self._path.read_text("utf-8").splitlines() if self._path.exists() else []
            self._known = {json.loads(line)["name"] for line in lines}
        if reject.name not in self._known:
            self._known.add(reject.name)
            log = JsonLines(self._path)
            log.append({"name": reject.name, "reason": reject.reason})
            log.close()
