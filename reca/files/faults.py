"""Named moments of every write and removal, so that tests can die or fail at each of them.

Production code never sets a hook: a moment then costs one comparison with None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

CRASH_POINTS = (
    "write.created",
    "write.chunk",
    "write.synced",
    "write.renamed",
    "append.line",
    "publish.created",
    "publish.filled",
    "publish.synced",
    "publish.replaced",
    "publish.renamed",
    "publish.done",
    "remove.renamed",
    "remove.entry",
    "remove.done",
)
"""In the order of a save: `write.chunk` is just before a write, every other one just after what it names."""

Hook: TypeAlias = Callable[[str, Path], None]

_hook: Hook | None = None


def crash_point(name: str, path: Path) -> None:
    """Tell the hook, if there is one, that `path` is at the moment `name`; what it raises passes through."""
    if _hook is not None:
        if name not in CRASH_POINTS:
            raise ValueError(f"crash_point: {name!r} is not listed in CRASH_POINTS")
        _hook(name, path)


@contextmanager
def at_crash_points(hook: Hook) -> Iterator[None]:
    """Within this block `hook(name, path)` is called at every crash point of this process; for tests."""
    global _hook
    before, _hook = _hook, hook
    try:
        yield
    finally:
        _hook = before
