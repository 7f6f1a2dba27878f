"""One picture of a results file: which fraction of the machine's ceiling every operator reaches."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reca.benchmarks.gate import OURS
from reca.errors import ConfigError
from reca.files import write_atomic

_MODES = ("forward", "backward", "both")
_COLOURS = {"forward": "#4c78a8", "backward": "#f58518", "both": "#54a24b"}


def ceiling_share(record: dict[str, Any]) -> float | None:
    """Fraction of cuBLAS or of the copy bandwidth, whichever is nearer; None where neither is a bound."""
    shares = [record[name] for name in ("copy_share", "gemm_share") if record[name] is not None]
    return float(max(shares)) if shares else None


def draw(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a PNG with one group of bars per case, of the last run in `records`.

    Raises: ConfigError if there is nothing to draw; DiskError.
    """
    runs = [record for record in records if record.get("record") == "run"]
    measured = [
        record
        for record in records
        if record.get("provider") == OURS and "ms_p50" in record and record["run"] == runs[-1]["run"]
    ]
    if not measured:
        raise ConfigError("no measurement of reca's operators in the last run; nothing to draw")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(f"{record['operator']}: {record['case']}" for record in measured))
    figure = Figure(figsize=(10, 1.6 + 0.42 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, mode in enumerate(_MODES):
        rows = {
            f"{record['operator']}: {record['case']}": share
            for record in measured
            if record["mode"] == mode and (share := ceiling_share(record)) is not None
        }
        heights = [names.index(name) + 0.26 * (place - 1) for name in rows]
        axes.barh(heights, list(rows.values()), height=0.24, color=_COLOURS[mode], label=mode)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlabel("fraction of copy bandwidth, or of cuBLAS")
    figure.suptitle(_title(runs[-1]), fontsize=9)
    axes.legend(fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    write_atomic(path, picture.getvalue())


def _title(run: dict[str, Any]) -> str:
    machine = run["machine"]
    where = machine.get("gpu") or f"{machine['cpu']} (CPU: says nothing about a GPU)"
    return f"{where}, {run['dtype']}, {run['sizes']} sizes, {run['versions'].get('torch')}, {run['commit']}"
