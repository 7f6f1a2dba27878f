"""Spans: what a profiler sees when they are on, and that they vanish when they are off."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch

from reca.profiling import enable_spans, span, spans_enabled

# `reca.profiling.span` is the class; this is the module it lives in.
SPAN_MODULE = sys.modules[span.__module__]


class RecordingDomain:
    """Stands where the NVTX domain would: remembers pushes and pops."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def push_range(self, attributes: str) -> None:
        self.events.append(f"push {attributes}")

    def pop_range(self) -> None:
        self.events.append("pop")


@pytest.fixture
def domain(monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordingDomain]:
    recording = RecordingDomain()
    monkeypatch.setattr(SPAN_MODULE, "_range", lambda name: (recording, name))
    yield recording
    enable_spans(False)


def test_spans_are_off_until_they_are_turned_on(domain: RecordingDomain) -> None:
    assert not spans_enabled()
    with span("forward"):
        pass
    assert domain.events == []


def test_nested_spans_push_and_pop_in_order(domain: RecordingDomain) -> None:
    enable_spans(True)
    with span("step"), span("forward"):
        pass
    assert domain.events == ["push step", "push forward", "pop", "pop"]


def test_a_span_closes_when_its_body_raises(domain: RecordingDomain) -> None:
    enable_spans(True)
    with pytest.raises(KeyError), span("forward"):
        raise KeyError
    assert domain.events == ["push forward", "pop"]


def test_a_span_that_is_open_while_spans_are_turned_off_still_closes(domain: RecordingDomain) -> None:
    enable_spans(True)
    with span("forward"):
        enable_spans(False)
    assert domain.events == ["push forward", "pop"]


def test_a_decorated_function_keeps_its_name_and_its_result_and_may_recurse(domain: RecordingDomain) -> None:
    @span("countdown")
    def countdown(n: int) -> int:
        return 0 if n == 0 else 1 + countdown(n - 1)

    enable_spans(True)
    assert countdown(2) == 2
    assert countdown.__name__ == "countdown"
    assert domain.events == ["push countdown"] * 3 + ["pop"] * 3


def test_torch_profiler_sees_the_span_by_its_name() -> None:
    enable_spans(True)
    try:
        with torch.profiler.profile() as profiled, span("forward"):
            torch.ones(2)
    finally:
        enable_spans(False)
    assert "forward" in {event.key for event in profiled.key_averages()}


def test_real_nvtx_attributes_are_registered_once_per_name() -> None:
    domain, attributes = SPAN_MODULE._range("forward")
    assert SPAN_MODULE._range("forward")[1] is attributes
    assert SPAN_MODULE._range("backward")[0] is domain


@pytest.mark.parametrize("on", [False, True])
def test_spans_do_not_break_a_compiled_graph(on: bool, domain: RecordingDomain) -> None:
    @span("double")
    def double(x: torch.Tensor) -> torch.Tensor:
        with span("inner"):
            return 2 * x

    enable_spans(on)
    compiled = torch.compile(double, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 2.0))
    assert domain.events == []
