"""The miniature's own files: what sees and reads, shared by both kinds of generator, and the generators.

understanding.safetensors     encoder, projector, trunk
masked.safetensors or flow.safetensors
world.json                    format, the world it was taught in, and what is known of it
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from reca.errors import CheckpointError
from reca.files import write_json
from reca.models.checkpoint import Slot, load_slots, named_tensors, save_slots
from reca.models.miniature.model import MiniatureModel

FORMAT = 1
DESCRIPTION = "world.json"
UNDERSTANDING = "understanding"


def slots(model: MiniatureModel) -> dict[str, dict[str, Slot]]:
    """File -> names in it -> places in the model, which are the same."""
    names = named_tensors(model)
    parts = {
        UNDERSTANDING: [name for name in names if not name.startswith("generator.")],
        model.config.generator: [name for name in names if name.startswith("generator.")],
    }
    return {f"{stem}.safetensors": {name: Slot(name) for name in inside} for stem, inside in parts.items()}


def read_description(folder: Path) -> dict[str, Any]:
    """`world.json` of a folder of weights. Raises CheckpointError if it is missing or of another format."""
    path = folder / DESCRIPTION
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        stated = description["format"]
        str(description["world"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: expected the description of a miniature's weights, got {error!r}; give the folder that "
            "holds them"
        ) from error
    if stated != FORMAT:
        raise CheckpointError(
            f"{path}: format {stated!r} is not {FORMAT}, which this reca reads; make the weights again with "
            "`reca train world-encoder` and what follows it"
        )
    return dict(description)


def load(model: MiniatureModel, path: Path, device: torch.device, dtype: torch.dtype | None = None) -> None:
    """Fill a model from its folder, and note in `model.world` which world it was taught in.

    Args:
        model: built under `torch.device("meta")`, or a real one whose weights are replaced.
        path: folder of the weights.
        device: where parameters come to life.
        dtype: of what is not trained; None keeps the file's.

    Raises: CheckpointError if files are missing, broken, or do not fit.
    """
    load_understanding(model, path, device, dtype)
    _fill(model, model.config.generator, path, device, dtype)


def load_understanding(
    model: MiniatureModel, path: Path, device: torch.device, dtype: torch.dtype | None = None
) -> None:
    """The same, but the generator keeps the weights it has; both kinds share what sees and reads."""
    model.world = str(read_description(path)["world"])
    _fill(model, UNDERSTANDING, path, device, dtype)


def _fill(
    model: MiniatureModel, part: str, path: Path, device: torch.device, dtype: torch.dtype | None
) -> None:
    file = f"{part}.safetensors"
    load_slots(model, slots(model)[file], path / file, device=device, frozen_dtype=dtype)


def save(
    model: MiniatureModel, folder: Path, *, source: Path | None = None, facts: Mapping[str, Any] | None = None
) -> None:
    """Write a folder of weights; files of another generator that lie there stay.

    Args:
        folder: written into; made if missing.
        source: where the model came from; its facts are kept.
        facts: what else to state in `world.json`, such as scores, by the name of the variant.

    Raises: DiskError if a file cannot be written; CheckpointError if `source` cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file, inside in slots(model).items():
        save_slots(model, inside, folder / file)
    known = read_description(source) if source is not None else {}
    write_json(folder / DESCRIPTION, {**known, **(facts or {}), "format": FORMAT, "world": model.world})
