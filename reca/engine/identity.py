"""What a run is made of, and whether a resume is still the same run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from reca.config import TrainConfig
from reca.errors import ConfigError

_STREAMS = ("data", "image_to_text", "text_to_image")
CHANGEABLE = frozenset(
    {
        "steps",
        "log_every",
        "sample.every",
        "checkpoint.every",
        "checkpoint.keep",
        "optim.max_bad_steps",
        "compute.attention",
        "compute.device",
        "compute.recompute",
        "compute.threads",
        "data.workers",
        *(f"{stream}.micro_images" for stream in _STREAMS),
        # Places may change between machines; what lies there is compared by its fingerprint.
        *(f"{stream}.path" for stream in _STREAMS),
        "data.prompts",
        "image_to_text.root",
        "weights",
    }
)
"""Configuration keys that a resume may change; every change is noted in the run's record."""

_ABSENT = "(absent)"


def identity(config: TrainConfig, fingerprint: Mapping[str, str], device: torch.device) -> dict[str, Any]:
    """JSON-ready record of a run: flat configuration, fingerprints, device type and number of CPU threads."""
    return {
        "config": flatten(config.model_dump(mode="json")),
        "fingerprint": dict(fingerprint),
        "device": device.type,
        "threads": torch.get_num_threads(),
    }


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def changes_on_resume(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Notes about what a resume changes.

    Args:
        recorded, current: two values of `identity`, from the checkpoint and of now.

    Returns: one line per allowed change, and warnings where the result can no longer be bitwise the same.
    Raises: ConfigError with a diff if the model, the data or a key that is not in CHANGEABLE differs.
    """
    config = _differences(recorded["config"], current["config"])
    fingerprint = _differences(recorded["fingerprint"], current["fingerprint"])
    changeable = CHANGEABLE
    if recorded["config"]["normalize"] == "microbatch":
        # Here the cut into microbatches is part of the objective.
        changeable -= {f"{stream}.micro_images" for stream in _STREAMS}
    refused = {key: pair for key, pair in config.items() if key not in changeable} | fingerprint
    if refused:
        raise ConfigError(
            "resume: the checkpoint belongs to another run; undo these changes or start with another --run\n"
            + "\n".join(
                f"  {key}: was {was!r}, is now {now!r}" for key, (was, now) in sorted(refused.items())
            )
        )
    notes = [f"{key} changed from {was!r} to {now!r}" for key, (was, now) in sorted(config.items())]
    for key in ("threads", "device"):
        if recorded[key] != current[key]:
            notes.append(
                f"{key} changed from {recorded[key]} to {current[key]}: "
                "the continuation is not bitwise the one of an uninterrupted run"
            )
    return notes


def _differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    keys = was.keys() | now.keys()
    return {
        key: (was.get(key, _ABSENT), now.get(key, _ABSENT))
        for key in keys
        if was.get(key, _ABSENT) != now.get(key, _ABSENT)
    }
