"""`reca verify PACK...`: run parity packs against the official tensors they hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from reca.errors import ConfigError
from reca.kernels import Impl, interpreted_kernels, triton_interprets
from reca.models import get_family
from reca.models.parity import Deviation, PackResult, compare, is_pack, read_pack

_SHOWN_FAILURES = 5


def find_packs(paths: Sequence[Path]) -> list[Path]:
    """Pack folders among `paths` and inside them, in order. Raises ConfigError for a path that holds none."""
    packs: list[Path] = []
    for path in paths:
        found = [path] if is_pack(path) else sorted(file.parent for file in path.rglob("pack.json"))
        if not found:
            raise ConfigError(
                f"{path}: neither a parity pack nor a folder of packs; expected a folder with pack.json"
            )
        packs += [pack for pack in found if pack not in packs]
    return packs


def verify(paths: Sequence[Path], kernels: Impl = "auto") -> list[PackResult]:
    """Reproduce every pack with its family, on the CPU, and compare.

    Args:
        paths: pack folders, or folders that contain pack folders at any depth.
        kernels: implementation of the operators; `fused` runs the Triton code under Triton's interpreter.

    Raises: ConfigError or CheckpointError if a pack cannot be read or names an unknown family, or `fused` is
        asked for while Triton does not interpret.
    """
    packs = [replace(read_pack(folder), kernels=kernels) for folder in find_packs(paths)]
    with _interpreted() if kernels == "fused" else nullcontext():
        return [compare(pack, get_family(pack.description["model"]).reproduce(pack)) for pack in packs]


def _interpreted() -> AbstractContextManager[None]:
    if not triton_interprets():
        raise ConfigError(
            "packs are reproduced on the CPU, where kernels=fused needs Triton's interpreter; "
            "start with TRITON_INTERPRET=1, or use kernels=auto"
        )
    return interpreted_kernels()


def render(results: Sequence[PackResult]) -> str:
    """One line per pack (failures indented below it) and the closing count."""
    lines: list[str] = []
    for result in results:
        status = "passed" if result.passed else "FAILED"
        worst = result.worst
        summary = (
            f"worst {worst.name}: error {worst.error:.2e}, tolerance {worst.tolerance:.2e}"
            if worst
            else "nothing compared"
        )
        skipped = f"; {len(result.not_formed)} not formed" if result.not_formed else ""
        lines.append(f"{status}  {result.pack}  {summary}{skipped}")
        lines += [f"        {failure}" for failure in result.failures[:_SHOWN_FAILURES]]
        if len(result.failures) > _SHOWN_FAILURES:
            lines.append(f"        and {len(result.failures) - _SHOWN_FAILURES} more")
    passed = sum(result.passed for result in results)
    return "\n".join([*lines, f"{passed} passed, {len(results) - passed} failed"])


def _record(deviation: Deviation) -> dict[str, Any]:
    error = deviation.error if math.isfinite(deviation.error) else None
    return {"name": deviation.name, "error": error, "tolerance": deviation.tolerance}


def records(results: Sequence[PackResult]) -> list[dict[str, Any]]:
    """The same as JSON-ready records: {pack, passed, worst: {name, error, tolerance}, failures, not_formed}.

    `error` is null where it is not finite: JSON has no infinity.
    """
    return [
        {
            "pack": str(result.pack),
            "passed": result.passed,
            "worst": result.worst and _record(result.worst),
            "failures": list(result.failures),
            "not_formed": dict(result.not_formed),
        }
        for result in results
    ]
