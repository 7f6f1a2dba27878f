"""The Python API behind `reca.train` and `reca.load`, and what loads a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from reca.config import ComputeConfig, TrainConfig
from reca.data.loader import Reject
from reca.engine.checkpoint import find_latest, load_checkpoint
from reca.engine.journal import CHECKPOINTS
from reca.engine.loop import run
from reca.engine.weights import copy_exactly, trained_parameters
from reca.errors import CheckpointError, ConfigError
from reca.files import JsonLines
from reca.recipes.assemble import Loaded, assemble, load_model, weights_fingerprint
from reca.recipes.resolve import read_config
from reca.recipes.world.run import starting_model, train_world


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
    if config.world is not None:
        return train_world(config, folder, resume=resume, on_progress=on_progress, on_start=on_start)
    if config.arm is not None:
        raise ConfigError(f"arm={config.arm} would be ignored by {config.recipe}; drop it, or train world")
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
    if not (folder / "config.yaml").is_file():
        if model is None:
            raise ConfigError(
                f"{folder} is not a run folder, so say what its weights are, as in --model bagel/7b-mot"
            )
        return load_model(model, str(folder), ComputeConfig.model_validate({"device": device}))
    if model is not None:
        raise ConfigError(f"--model would be ignored: the run {folder} knows its own; drop it")
    return load_run(folder, device=device).loaded


@dataclass(frozen=True, slots=True)
class LoadedRun:
    """A run's model with the weights of its newest intact checkpoint.

    Attributes:
        config: the run's configuration.
        step: optimizer steps that the checkpoint has done.
        keeps_average: whether the checkpoint also holds an average of the trained weights.
        loaded: the model.
    """

    config: TrainConfig
    step: int
    keeps_average: bool
    loaded: Loaded


def load_run(
    folder: Path, *, device: str = "auto", average: bool = False, keep_dtypes: bool = False
) -> LoadedRun:
    """Load a run's newest intact checkpoint.

    Args:
        folder: the run folder.
        device: auto, cpu or cuda.
        average: take the average of the trained weights instead of the weights themselves.
        keep_dtypes: leave frozen weights in the dtypes of their files; else they are fp32.

    Raises: ConfigError if this is no run or keeps no average; CheckpointError if no checkpoint is intact or
        the starting weights are not those of the run.
    """
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder} is not a run folder: no config.yaml in it; give what `reca train` wrote")
    config = read_config(folder / "config.yaml")
    found = find_latest(folder / CHECKPOINTS)
    if found.path is None:
        damaged = f" ({found.skipped[0]})" if found.skipped else ""
        raise CheckpointError(f"{folder} holds no intact checkpoint{damaged}; train on, or use its weights")
    saved = load_checkpoint(found.path, verify=False)
    if average and not saved.ema:
        raise ConfigError(
            f"{folder} keeps no average of its weights; leave --ema out, or train with optim.ema=0.999"
        )
    compute = ComputeConfig.model_validate({"device": device})
    if config.world is not None:
        loaded = starting_model(config, compute)
    else:
        loaded = load_model(config.model, config.weights, compute, config.seed, keep_dtypes=keep_dtypes)
    started_from = saved.meta["identity"]["fingerprint"]["weights"]
    if weights_fingerprint(loaded.weights) != started_from:
        raise CheckpointError(
            f"the weights in {loaded.weights} are not those that {folder} started from; put those back"
        )
    trained = {name: parameter.detach() for name, parameter in trained_parameters(loaded.model).items()}
    # With optim.weights=bf16 there is no more of them than that.
    source = {
        name: tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        for name, tensor in (saved.ema if average else saved.model).items()
    }
    copy_exactly("weights", trained, source)
    return LoadedRun(config, saved.step, bool(saved.ema), loaded)


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
