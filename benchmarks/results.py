"""Records of measurements: JSON lines in, JSON lines out, and two files side by side."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from reca.errors import ConfigError
from reca.files import JsonLines

KEYS = ("operator", "case", "provider", "mode", "dtype", "device")


def append(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append records to a JSON lines file, each as one whole line. Raises DiskError."""
    lines = JsonLines(path)
    try:
        for record in records:
            lines.append(record)
    finally:
        lines.close()


def read(path: Path) -> list[dict[str, Any]]:
    """All records of a file. Raises ConfigError naming the first line that is none."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); give a file of `reca bench --out`") from error
    records = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path}:{number} is not JSON; give a file of `reca bench --out`") from error
        if not isinstance(record, dict):
            raise ConfigError(f"{path}:{number} is not a record; give a file of `reca bench --out`")
        records.append(record)
    return records


def key(record: Mapping[str, Any]) -> tuple[str, ...]:
    """What two records must share to be compared."""
    return tuple(str(record.get(name)) for name in KEYS)


def compare(before: Iterable[Mapping[str, Any]], after: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of both runs with the ratio of their medians, slowest first.

    A row counts as changed only where the two spreads (p20 to p80) do not touch. Of records with one key the
    last counts.
    """
    old = {key(record): record for record in before if "ms_p50" in record}
    rows = []
    for identity, record in {key(record): record for record in after if "ms_p50" in record}.items():
        if (other := old.get(identity)) is None:
            continue
        apart = record["ms_p20"] > other["ms_p80"] or record["ms_p80"] < other["ms_p20"]
        rows.append(
            dict(zip(KEYS, identity, strict=True))
            | {
                "before_ms": other["ms_p50"],
                "after_ms": record["ms_p50"],
                "ratio": record["ms_p50"] / other["ms_p50"],
                "changed": apart,
            }
        )
    return sorted(rows, key=lambda row: -float(row["ratio"]))
