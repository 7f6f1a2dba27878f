"""What is timed: forward, backward or both of a provider over rotating inputs, called or as a graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from reca.benchmarks.cases.case import Case, Inputs, Provider, Shape, make_inputs
from reca.benchmarks.gate import as_tuple, upstream
from reca.benchmarks.timing import Timed, Timing

_CACHE_BYTES = {"cuda": 1 << 28, "cpu": 1 << 25}  # several times the last-level cache
_MOST_SETS = 16


def input_sets(
    case: Case, shape: Shape, device: torch.device, dtype: torch.dtype, first: Inputs
) -> list[Inputs]:
    """As many copies of the inputs as together exceed the cache; one where it does so alone."""
    size = sum(value.nbytes for value in first.values() if isinstance(value, Tensor))
    count = min(math.ceil(2 * _CACHE_BYTES[device.type] / max(size, 1)), _MOST_SETS)
    return [first, *(make_inputs(case, shape, device, dtype, seed=seed) for seed in range(1, count))]


def timed(provider: Provider, sets: Sequence[Inputs], gradients: tuple[str, ...], mode: str) -> Timed:
    """A call of `measure`: forward alone, backward alone over kept graphs, or both."""

    def forward(turn: int) -> object:
        return provider(sets[turn % len(sets)])

    def both(turn: int) -> object:
        inputs = sets[turn % len(sets)]
        outputs = [output for output in as_tuple(provider(inputs)) if output.requires_grad]
        return torch.autograd.grad(outputs, [inputs[name] for name in gradients], flowing[turn % len(sets)])

    if mode == "forward":
        return forward
    prepared = []
    flowing = []
    for inputs in sets:
        outputs = [output for output in as_tuple(provider(inputs)) if output.requires_grad]
        flowing.append(upstream(outputs))
        if mode == "backward":
            prepared.append(outputs)

    def backward(turn: int) -> object:
        place = turn % len(sets)
        leaves = [sets[place][name] for name in gradients]
        return torch.autograd.grad(prepared[place], leaves, flowing[place], retain_graph=True)

    return both if mode == "both" else backward


def graphed(function: Timed, calls: int) -> Timed:
    """`calls` calls on successive inputs captured as one CUDA graph; a call of the result replays all."""
    current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
    aside.wait_stream(current)
    with torch.cuda.stream(aside):  # libraries make their workspaces outside of the capture
        for turn in range(calls):
            function(turn)
    current.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [function(turn) for turn in range(calls)]  # else all calls would write to the same memory

    def replay(turn: int) -> object:
        graph.replay()
        return kept

    return replay


def per_call(timing: Timing, calls: int) -> Timing:
    """The timing of one of `calls` captured calls."""
    p20, p50, p80 = (value / calls for value in (timing.p20, timing.p50, timing.p80))
    return replace(timing, p20=p20, p50=p50, p80=p80, calls=timing.calls * calls, peak_bytes=None)
