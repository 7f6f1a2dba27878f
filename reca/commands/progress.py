"""What `reca train` shows while it runs: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

_PLAIN_SECONDS = 5.0  # between plain lines: a log file of a long run stays readable


class Progress:
    """Shows step, loss, s/step, images/s, data wait, memory and the time left."""

    def __init__(self, folder: Path, steps: int, *, quiet: bool) -> None:
        self._folder, self._steps, self._quiet = folder, steps, quiet
        self._console = Console(stderr=True)
        self._live: Live | None = None
        self._last_plain = -_PLAIN_SECONDS
        self._first: tuple[int, float] | None = None

    def __enter__(self) -> Self:
        if not self._quiet:
            self._console.print(f"run folder: {self._folder}", highlight=False)
            if self._console.is_terminal:
                self._live = Live(Text("starting"), console=self._console, refresh_per_second=4)
                self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, record: Mapping[str, Any]) -> None:
        """Show one logged record."""
        if self._quiet:
            return
        now = time.monotonic()
        line = self.line(record, now)
        if self._live is not None:
            self._live.update(Text(line))
        elif now - self._last_plain >= _PLAIN_SECONDS or record["step"] == self._steps:
            self._last_plain = now
            self._console.print(line, highlight=False, soft_wrap=True)

    def line(self, record: Mapping[str, Any], now: float) -> str:
        """The progress line of a record logged at `now`, in seconds of a monotonic clock."""
        step = int(record["step"])
        first_step, began = self._first = self._first or (step, now)
        parts = [f"step {step}/{self._steps}", f"loss {_shown(record['loss'])}"]
        if step > first_step:
            pace = (now - began) / (step - first_step)
            parts.append(f"{pace:.2f} s/step")
        parts += [f"{record['images_per_second']:.1f} images/s", f"data wait {record['data_wait']:.0%}"]
        parts.append(f"{record['peak_memory_gb']:.1f} GB")
        if record.get("skipped_steps"):
            parts.append(f"{record['skipped_steps']} skipped")
        if step > first_step:
            parts.append(f"{_duration(pace * (self._steps - step))} left")
        return "  ".join(parts)

    def finish(self, summary: Mapping[str, Any], report: Path) -> None:
        """The closing lines: what changed, and where everything is."""
        for name, before in summary["before"].items():
            after = summary["after"].get(name)
            if "/" not in name and isinstance(before, float) and isinstance(after, float):
                self._console.print(f"{name}: {before:.4g} -> {after:.4g}", highlight=False)
        for note in summary["notes"]:
            self._console.print(f"note: {note}", highlight=False)
        seconds = _duration(summary["seconds"])
        self._console.print(
            f"{summary['steps']} steps, {summary['images']} images in {seconds}", highlight=False
        )
        self._console.print(f"report: {report}", highlight=False, soft_wrap=True)


def _shown(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "not finite"


def _duration(seconds: float) -> str:
    """Seconds as 42s, 3m07s or 2h15m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    return (
        f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    )
