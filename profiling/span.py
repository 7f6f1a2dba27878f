"""Named ranges of a step for Nsight (NVTX, domain "reca") and torch.profiler; nothing at all while off."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

_DOMAIN = "reca"
_enabled = False


def enable_spans(on: bool) -> None:
    """Turn every span of the process on or off. Spans that are open keep the state they were opened with."""
    global _enabled
    _enabled = on


def spans_enabled() -> bool:
    """Whether spans opened now are recorded."""
    return _enabled


@functools.cache
def _range(name: str) -> tuple[Any, Any]:
    """(domain, event attributes) of a name; its string is registered once, so a range copies nothing."""
    # torch.cuda.nvtx raises on CPU builds of torch; this package does not.
    import nvtx  # type: ignore[import-untyped]

    domain = nvtx.get_domain(_DOMAIN)
    return domain, domain.get_event_attributes(message=name)


class span:
    """A named range, as context manager or decorator.

    On: an NVTX range and a `torch.profiler.record_function` of the same name. Off, or while torch.compile
    traces: one test of a flag. One instance is one range at a time; a decorator opens a new one per call, so
    recursion is safe.
    """

    __slots__ = ("_domain", "_record", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self._domain: Any = None
        self._record: Any = None

    def __enter__(self) -> None:
        # Inside a traced region a range would break the graph, and Inductor would not keep its place anyway.
        if not _enabled or torch.compiler.is_compiling():
            return
        self._domain, attributes = _range(self.name)
        self._domain.push_range(attributes)
        self._record = torch.profiler.record_function(self.name)
        self._record.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._record is None:
            return
        record, domain = self._record, self._domain
        self._record = self._domain = None
        record.__exit__(kind, error, trace)
        domain.pop_range()

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """`function` inside a span of this name; the switch is looked up at each call."""

        @functools.wraps(function)
        def spanned(*args: P.args, **kwargs: P.kwargs) -> R:
            with span(self.name):
                return function(*args, **kwargs)

        return spanned
