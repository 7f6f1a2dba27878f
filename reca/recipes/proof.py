"""Proof that exported files are the run: both loaded in a fresh process, compared bit by bit, and run once.

As a program, `python -P -m reca.recipes.proof RUN FOLDER [--ema]` prints what `compare` returns as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reca.config import DataConfig
from reca.data.prompts import load_prompts
from reca.data.sources import PACKAGE_PREFIX, open_source
from reca.errors import CheckpointError, RecaError
from reca.images import load_image
from reca.models.checkpoint import named_tensors
from reca.randomness import RandomSource
from reca.recipes.api import load_run
from reca.recipes.assemble import Loaded

_LISTED = 5


def prove(run: Path, folder: Path, *, average: bool) -> dict[str, Any]:
    """What `compare` returns, found by a new Python process.

    Raises: CheckpointError if the files cannot be reloaded or differ from the run.
    """
    command = [sys.executable, "-P", "-m", __name__, str(run), str(folder), *(["--ema"] if average else [])]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise CheckpointError(
            f"--verify: a fresh process could not reload the files (exit {result.returncode}: {last}); "
            "nothing was exported"
        )
    proof: dict[str, Any] = json.loads(result.stdout)
    if differences := proof["differences"]:
        more = len(differences) - _LISTED
        listed = "; ".join(differences[:_LISTED]) + (f"; and {more} more" if more > 0 else "")
        raise CheckpointError(f"--verify: the files differ from the run: {listed}; nothing was exported")
    return proof


def compare(run: Path, folder: Path, *, average: bool) -> dict[str, Any]:
    """Compare official files with the run that they were written from.

    The run's tensors are rounded to the dtypes of the files; then every bit must agree, and so must the
    losses of one photograph in fp32, whose tokens and pixels each side prepares with its own files. It costs
    host memory for the model in fp32 and the files once more.

    Returns: `tensors` (how many were compared), `loss` (term -> the run's mean) and `differences`, one line
        for each; empty when nothing differs.
    Raises: RecaErrors of what cannot be loaded.
    """
    source = load_run(run, device="cpu", average=average, keep_dtypes=True)
    ours = source.loaded
    theirs = _reload(ours, folder)
    expected, found = named_tensors(ours.model), named_tensors(theirs.model)
    differences = []
    for name, tensor in expected.items():
        tensor.data = tensor.data.to(found[name].dtype)
        if line := _difference(tensor.detach(), found[name].detach()):
            differences.append(f"{name}: {line}")
    losses = [_losses(loaded) for loaded in (ours, theirs)]
    differences += [
        f"loss of {term}: {value!r}, reloaded {losses[1][term]!r}"
        for term, value in losses[0].items()
        if losses[1][term] != value
    ]
    return {"tensors": len(expected), "loss": losses[0], "differences": differences}


def _reload(ours: Loaded, folder: Path) -> Loaded:
    """The same model from official files, every tensor in the dtype of its file."""
    with torch.device("meta"):
        model: nn.Module = ours.family.build(ours.variant.config)
    ours.family.load(model, folder, torch.device("cpu"), None, trained_dtype=None)
    return Loaded(ours.family, ours.variant, model, folder)


def _difference(expected: Tensor, found: Tensor) -> str:
    """What differs between two tensors of one shape and dtype; empty if no bit does."""
    bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (expected, found)]
    if torch.equal(*bits):
        return ""
    largest = (expected.double() - found.double()).abs().max().item()
    return f"{int((expected != found).sum())} of {found.numel()} values differ, by at most {largest:.3g}"


@torch.no_grad()
def _losses(loaded: Loaded) -> dict[str, float]:
    """Term -> mean loss of reconstructing one shipped photograph, in fp32."""
    random = RandomSource(0, step=1)
    image = load_image(open_source(f"{PACKAGE_PREFIX}photos").read(0), max_pixels=DataConfig().max_pixels)
    processor = loaded.family.processor(loaded.variant, loaded.weights)
    batch = processor.collate([processor.prepare(image, load_prompts(None)[0], random, 0)], [0])
    model: Any = loaded.model.float()
    draws = model.draw(batch, random)
    return {name: float(total / draws.counts[name]) for name, total in model(batch, draws).items()}


def main(arguments: Sequence[str]) -> int:
    """Compare RUN with FOLDER and print the outcome; returns the exit code."""
    run, folder, *flags = arguments
    try:
        print(json.dumps(compare(Path(run), Path(folder), average="--ema" in flags)))
    except RecaError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
