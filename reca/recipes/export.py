"""A run's weights as the files that others load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reca.engine.checkpoint import versions
from reca.errors import ConfigError, nearest
from reca.files import publish_dir, write_json
from reca.recipes.api import load_run
from reca.recipes.proof import prove

FORMATS = ("official",)
RECORD = "reca_export.json"


def export(
    run: Path | str, out: Path | str, *, to: str = "official", average: bool = False, verify: bool = False
) -> dict[str, Any]:
    """Write a run's newest intact checkpoint in the official format of its family.

    The files have the dtypes of the starting weights; what belongs beside them (configuration, tokenizer,
    frozen repositories) is copied from there. Folder and MANIFEST.json appear whole or not at all.

    Args:
        run: the run folder.
        out: the folder to write; it must not exist, or be empty.
        to: one of `FORMATS`.
        average: take the average of the weights instead of the weights themselves, which `reca.load` takes.
        verify: reload the files in a fresh process and compare every tensor and a forward pass with the run
            before the folder appears.

    Returns: what is also in `reca_export.json`, with the folder as `out`.
    Raises: ConfigError if an argument is wrong or `out` is taken; CheckpointError if the run has no intact
        checkpoint or the files differ from it; DiskError if they cannot be written.
    """
    run, out = Path(run), Path(out)
    if to not in FORMATS:
        raise ConfigError(f"--to {to!r} is not a format that reca writes; {nearest(to, FORMATS)}")
    with publish_dir(out.absolute(), manifest={"exported": to}) as staging:
        record = _write(run, staging, average=average)
        if verify:
            record["verified"] = prove(run, staging, average=average)
        record = {"format": to, **record, "versions": versions()}
        write_json(staging / RECORD, record)
    return {"out": str(out), **record}


def _write(run: Path, folder: Path, *, average: bool) -> dict[str, Any]:
    """Write the official files and say what they are; the model is freed before anything verifies them."""
    source = load_run(run, device="cpu", average=average, keep_dtypes=True)
    loaded = source.loaded
    loaded.family.save(loaded.model, folder, source=loaded.weights)
    return {
        "model": source.config.model,
        "recipe": source.config.recipe,
        "run": str(run),
        "step": source.step,
        "weights": "average" if average else "trained",
        "keeps_average": source.keeps_average,
        "started_from": source.config.weights,
    }
