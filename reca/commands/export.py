"""`reca export RUN --out FOLDER`: a run's weights as the files that others load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reca.recipes.export import export


def export_run(run: Path, out: Path, *, to: str, average: bool, verify: bool) -> dict[str, Any]:
    """Export, and list the files. Arguments and errors are those of `reca.recipes.export.export`."""
    result = export(run, out, to=to, average=average, verify=verify)
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return {**result, "files": {path.relative_to(out).as_posix(): path.stat().st_size for path in files}}


def render_export(result: dict[str, Any]) -> str:
    """The same for people: a line for each file, then what was verified."""
    lines = [f"{size:>16,}  {name}" for name, size in result["files"].items()]
    lines.append(
        f"{result['model']} at step {result['step']}, {result['weights']} weights, in {result['out']}"
    )
    if result["keeps_average"] and result["weights"] == "trained":
        lines.append("the run also keeps an average of its weights; --ema exports that")
    if proof := result.get("verified"):
        losses = ", ".join(f"{term} {value:.6f}" for term, value in proof["loss"].items())
        lines.append(f"verified: {proof['tensors']} tensors equal bit for bit after reloading; loss {losses}")
    return "\n".join(lines)
