"""JSON lines that survive a kill: whole lines, one write each, cut back to the checkpoint on resume."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reca.files.atomic import disk_errors, write_atomic
from reca.files.faults import crash_point


def _finite(value: Any) -> Any:
    """JSON knows no NaN and no infinity: the loss of a skipped step becomes null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


class JsonLines:
    """Append records to a JSONL file. Each line goes out whole at once: a SIGKILL loses nothing appended.

    Raises: DiskError from every method that writes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = self._open()

    def _open(self) -> int:
        return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line; numbers that are not finite become null."""
        line = (json.dumps(_finite(record), ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
        with disk_errors(self.path, len(line)):
            size = os.fstat(self._descriptor).st_size
            try:
                crash_point("append.line", self.path)
                while line:
                    line = line[os.write(self._descriptor, line) :]
            except OSError:
                os.ftruncate(self._descriptor, size)
                raise

    def sync(self) -> None:
        """Make all lines survive a loss of power; called before a checkpoint that counts on them."""
        with disk_errors(self.path):
            os.fsync(self._descriptor)

    def truncate_after(self, step: int) -> int:
        """Drop every line whose `step` is above `step`, and a torn last line; the resumed run rewrites them.

        Returns: number of lines dropped.
        """
        with disk_errors(self.path):
            lines = self.path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if self._belongs(line, step)]
        if len(kept) < len(lines):
            write_atomic(self.path, b"".join(kept))
            self.close()
            with disk_errors(self.path):
                self._descriptor = self._open()
        return len(lines) - len(kept)

    @staticmethod
    def _belongs(line: bytes, step: int) -> bool:
        if not line.endswith(b"\n"):
            return False
        try:
            record = json.loads(line)
        except ValueError:
            return False
        at = record.get("step") if isinstance(record, dict) else None
        return not isinstance(at, int) or at <= step

    def close(self) -> None:
        """Close the file; idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
