"""`reca bench kernels`: every operator at the shapes of real steps against its rivals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from reca.benchmarks import results
from reca.benchmarks.cases import CASES, Case
from reca.benchmarks.gate import OURS
from reca.benchmarks.operators import run_cases
from reca.benchmarks.plot import ceiling_share, draw
from reca.benchmarks.tune import tune_cases
from reca.config import ComputeConfig
from reca.engine.state import select_device
from reca.errors import ConfigError, nearest

_FILE_WIDTH = 180  # characters of the table where no terminal says how many
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def bench_kernels(
    out: Path,
    *,
    operators: Sequence[str] = (),
    device: str = "auto",
    dtype: str | None = None,
    compiled: bool = True,
    minutes: float = 7.0,
    rounds: int = 20,
    tune: bool = False,
    plot: Path | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Measure, append the records to `out` as they come, draw the picture, and return the records.

    Args:
        out: JSON lines file; further runs are appended.
        operators: names of `reca.kernels.OPERATORS`, or `attention`; empty means all.
        device: auto, cpu or cuda. On a CPU the sizes are small and every record says so.
        dtype: bf16, fp16 or fp32; None takes bf16 on a GPU and fp32 on a CPU.
        compiled: also time torch.compile of the plain form.
        minutes: what has not begun by then is recorded as not measured.
        rounds: timed windows per provider and mode.
        tune: time other launch parameters instead, and propose entries of the launch table.
        plot: PNG of the fraction of the ceiling that each operator reaches.
        note: called with a line before each case.

    Raises: ConfigError for unknown names, or tuning without a GPU; DiskError.
    """
    cases = choose_cases(operators)
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}; {nearest(dtype, DTYPES)}")
    if tune and plot is not None:
        raise ConfigError("--plot would be ignored by --tune; drop one of them")
    place = select_device(ComputeConfig.model_validate({"device": device}))
    is_gpu = place.type == "cuda"
    precision = DTYPES[dtype if dtype is not None else "bf16" if is_gpu else "fp32"]
    records: Iterable[dict[str, Any]]
    if tune:
        records = tune_cases(cases, place, precision, rounds=rounds, minutes=minutes, note=note)
    else:
        records = run_cases(
            cases,
            place,
            precision,
            full=is_gpu,
            compiled=compiled,
            rounds=rounds,
            minutes=minutes,
            note=note,
        )
    kept = []
    for record in records:
        results.append(out, [record])  # one by one: a run that is cut keeps what it has measured
        kept.append(record)
    if plot is not None:
        draw(kept, plot)
    return kept


def choose_cases(operators: Sequence[str]) -> list[Case]:
    """The cases of these operators, in the order of the table. Raises ConfigError for an unknown name."""
    known = sorted({case.operator for case in CASES})
    for name in operators:
        if name not in known:
            raise ConfigError(f"unknown operator {name!r}; {nearest(name, known)}")
    return [case for case in CASES if not operators or case.operator in operators]


def render_bench(records: Sequence[dict[str, Any]], console: Console | None = None) -> None:
    """Print one table for people: medians of every provider, and reca's fraction of the ceiling."""
    if console is None:
        console = Console()
        if not console.is_terminal:
            console.width = _FILE_WIDTH
    for run in (record for record in records if record.get("record") == "run"):
        machine = run["machine"]
        if run["sizes"] == "small":
            console.print("Small sizes on a CPU: that everything runs and is right, not how fast a GPU is.")
        console.print(
            f"{machine.get('gpu') or machine['cpu']}, {run['dtype']}: copy {run['copy_gbps']:.0f} GB/s, "
            f"product {run['gemm_tflops']:.2f} TFLOP/s"
        )
    table = Table("operator", "case", "mode", "ms", "of ceiling", "error", "rivals (ms)", box=None)
    for record in records:
        if record.get("provider") == OURS and "ms_p50" in record:
            table.add_row(
                record["operator"],
                record["case"],
                record["mode"],
                f"{record['ms_p50']:.4f}",
                "-" if (share := ceiling_share(record)) is None else f"{share:.0%}",
                "-" if record["error_ratio"] is None else f"{record['error_ratio']:.2f}",
                _rivals(records, record),
            )
        elif record.get("provider") == OURS and "why_not" in record:
            table.add_row(record["operator"], record["case"], "-", "-", "-", "-", str(record["why_not"]))
        elif record.get("record") == "tuning":
            time = f"{record['table_ms']:.4f}" if "table_ms" in record else "-"
            proposal = record.get("why_not") or record["proposal"] or "the table's entry stands"
            table.add_row(record["operator"], record["case"], "-", time, "", "", proposal)
    console.print(table)
    for line in _absent(records):
        console.print(line, highlight=False, soft_wrap=True)


def is_failed(records: Sequence[dict[str, Any]]) -> bool:
    """Whether some operator was outside the error budget, or failed."""
    return any(record.get("gate") in ("red", "broken") for record in records)


def _absent(records: Sequence[dict[str, Any]]) -> list[str]:
    """Rivals that were not timed and why, each reason once with the operators that it holds for."""
    found: dict[tuple[str, str], list[str]] = {}
    for record in records:
        if record.get("provider") not in (None, OURS) and "why_not" in record:
            operators = found.setdefault((record["provider"], record["why_not"]), [])
            if record["operator"] not in operators:
                operators.append(record["operator"])
    return [f"without {name} ({', '.join(for_these)}): {why}" for (name, why), for_these in found.items()]


def _rivals(records: Sequence[dict[str, Any]], ours: dict[str, Any]) -> str:
    same = [
        record
        for record in records
        if record.get("provider") not in (None, OURS)
        and all(record.get(name) == ours[name] for name in ("run", "operator", "case", "mode"))
    ]
    timed = [record for record in same if "ms_p50" in record]
    return ", ".join(f"{record['provider']} {record['ms_p50']:.4f}" for record in timed)


def compare_files(before: Path, after: Path) -> list[dict[str, Any]]:
    """Rows of two results files side by side; see `reca.benchmarks.results.compare`."""
    return results.compare(results.read(before), results.read(after))
