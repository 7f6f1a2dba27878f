"""Options that several commands share, and how they print. Only typer is imported here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")
]
Source = Annotated[
    str, typer.Argument(metavar="WEIGHTS_OR_RUN", help="Folder of official weights, or a run folder.")
]
Model = Annotated[
    str | None,
    typer.Option("--model", help="family/variant of a weights folder; a run folder knows its own."),
]
Out = Annotated[Path, typer.Option("--out", help="Folder for the PNG files and the contact sheet.")]
Steps = Annotated[int | None, typer.Option("--steps", min=2, help="Points of the sampler's time grid.")]
TextGuidance = Annotated[
    float | None, typer.Option("--text-guidance", min=1, help="Text guidance scale; 1 is off.")
]
ImageGuidance = Annotated[
    float | None, typer.Option("--image-guidance", min=1, help="Image guidance scale; 1 is off.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of the starting noise.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    typer.echo(json.dumps(value, indent=2))
