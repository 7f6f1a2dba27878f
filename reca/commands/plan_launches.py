"""`reca plan --launches`: kernels and operand bytes in plain torch and with operators, side by side."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from reca.recipes.plan.launches import (
    OFFICIAL,
    Compared,
    PartLaunches,
    add_up,
    same_samples,
    whole_step,
)

MOST_FAMILIES = 12


def launches_record(model: str, parts: list[PartLaunches]) -> dict[str, Any]:
    """The JSON document; bytes in 1e9."""
    official = OFFICIAL.get(model)
    return {
        "parts": [
            {
                "name": part.name,
                "samples": part.samples,
                "times": part.times,
                **_pair(part.total),
                "families": [{"family": name, **_pair(share)} for name, share in part.families.items()],
            }
            for part in parts
        ],
        "step": _pair(whole_step(parts)),
        "official": None
        if official is None
        else {
            "work": official.work,
            "launches": official.launches,
            "gb": official.gigabytes,
            "gb_of": official.of,
            "source": official.source,
            "ours_for_the_same_samples": _pair(same_samples(parts, official)),
        },
    }


def render_launches(model: str, parts: list[PartLaunches], console: Console | None = None) -> None:
    """The same as tables on stdout, with the twelve families of each part that launch most."""
    console = Console(highlight=False, soft_wrap=True) if console is None else console
    table = _table()
    for part in parts:
        table.add_row(_title(part), *_cells(part.total))
    table.add_row("whole step", *_cells(whole_step(parts)))
    official = OFFICIAL.get(model)
    if official is not None:
        table.add_row("samples of the official work", *_cells(same_samples(parts, official)))
    console.print("kernel launches and operand bytes, in plain torch and with operators:")
    console.print(table)
    if official is not None:
        console.print(
            f"official code, {official.work}: {official.launches:,} launches, {official.gigabytes:,g} GB "
            f"({official.of}); {official.source}"
        )
    for part in parts:
        families = _table()
        shares = [*part.families.items()]
        for name, share in shares[:MOST_FAMILIES]:
            families.add_row(name, *_cells(share))
        if others := shares[MOST_FAMILIES:]:
            families.add_row("all others", *_cells(add_up([share for _, share in others])))
        console.print(f"{_title(part)}, by operator:")
        console.print(families)


def _table() -> Table:
    table = Table(box=None)
    table.add_column("", no_wrap=True)
    for column in ("reference", "auto", "GB reference", "GB auto"):
        table.add_column(column, justify="right")
    return table


def _title(part: PartLaunches) -> str:
    return part.name if not part.samples else f"{part.name} of {part.samples}, {part.times} a step"


def _cells(compared: Compared) -> tuple[str, ...]:
    works = (compared.reference, compared.auto)
    return *(f"{work.launches:,}" for work in works), *(f"{work.bytes / 1e9:,.1f}" for work in works)


def _pair(compared: Compared) -> dict[str, Any]:
    works = {"reference": compared.reference, "auto": compared.auto}
    return {name: {"launches": work.launches, "gb": work.bytes / 1e9} for name, work in works.items()}
