"""The two line files of a run, cut back to the checkpoint that the run continues."""

from __future__ import annotations

from pathlib import Path

from reca.files import JsonLines

CHECKPOINTS = "checkpoints"
FILES = ("metrics.jsonl", "evaluations.jsonl")


class Journal:
    """`metrics.jsonl` and `evaluations.jsonl` of a run folder; steps strictly increase whatever was resumed.

    Args:
        step: last step of the checkpoint; later lines of `metrics` are dropped and will be written again.
        evaluated: last evaluation that the checkpoint knows of; later ones are dropped too.
    """

    def __init__(self, folder: Path, *, step: int, evaluated: int) -> None:
        self.metrics, self.evaluations = (JsonLines(folder / name) for name in FILES)
        self.metrics.truncate_after(step)
        self.evaluations.truncate_after(evaluated)

    def sync(self) -> None:
        """Make every line durable, before a checkpoint that counts on them."""
        self.metrics.sync()
        self.evaluations.sync()

    def close(self) -> None:
        """Close both files; idempotent."""
        self.metrics.close()
        self.evaluations.close()


def holds_a_run(folder: Path) -> bool:
    """Whether a run was begun in `folder`: it logged, evaluated, saved or finished something."""
    traces = [*(folder / name for name in FILES), folder / "summary.json"]
    if any(path.exists() and path.stat().st_size > 0 for path in traces):
        return True
    return any((folder / CHECKPOINTS).glob("step-*"))
