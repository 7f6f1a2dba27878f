"""The clock: warm-up by time, interleaved rounds, rotated inputs, events on a GPU.

Rivals are timed in turns, A B C A B C ..., so that a drifting clock or temperature meets all of them. Each
call gets the next of several input sets, together larger than the cache, so that none finds its data there.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

WINDOW_MS = 0.5  # a window holds as many calls as take this long: events resolve about half a microsecond
WARM_UP_S = 0.05
ROUNDS = 20

Timed = Callable[[int], object]
"""Called with the number of the input set to use."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Time of one call.

    Attributes:
        p20, p50, p80: quantiles over the rounds, in milliseconds.
        rounds: windows that were timed.
        calls: calls in each window.
        peak_bytes: device memory that one call allocates above what was held before; None off CUDA.
    """

    p20: float
    p50: float
    p80: float
    rounds: int
    calls: int
    peak_bytes: int | None


def measure(
    functions: Mapping[str, Timed], device: torch.device, *, rounds: int = ROUNDS
) -> dict[str, Timing]:
    """Time every function in turns on `device`; compilation and caches are over before the clock starts."""
    peaks = {name: _peak_bytes(function, device) for name, function in functions.items()}
    calls = {name: _calls_of_a_window(function, device) for name, function in functions.items()}
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds):
        for name, function in functions.items():
            samples[name].append(_window(function, calls[name], turn * calls[name], device))
    return {name: _timing(samples[name], calls[name], peaks[name]) for name in functions}


def _timing(samples: list[float], calls: int, peak: int | None) -> Timing:
    low, middle, high = (quantile(samples, q) for q in (0.2, 0.5, 0.8))
    return Timing(low, middle, high, len(samples), calls, peak)


def quantile(samples: list[float], q: float) -> float:
    """Linear interpolation between order statistics; of a single sample that sample."""
    if len(samples) == 1:
        return samples[0]
    if q == 0.5:
        return statistics.median(samples)
    place = q * (len(samples) - 1)
    below = math.floor(place)
    ordered = sorted(samples)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def _window(function: Timed, calls: int, first: int, device: torch.device) -> float:
    """Milliseconds of one call, mean over a window."""
    if device.type != "cuda":
        started = time.perf_counter()
        for call in range(calls):
            function(first + call)
        return (time.perf_counter() - started) * 1e3 / calls
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for call in range(calls):
        function(first + call)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def _calls_of_a_window(function: Timed, device: torch.device) -> int:
    """Warm up for a while and see how many calls fill a window."""
    function(0)
    _synchronize(device)
    started, done = time.perf_counter(), 0
    while done < 2 or time.perf_counter() - started < WARM_UP_S:
        function(done)
        done += 1
        if done % 8 == 0:
            _synchronize(device)  # else the host runs ahead and a slow kernel warms up for minutes
    _synchronize(device)
    each_ms = (time.perf_counter() - started) * 1e3 / done
    return max(1, math.ceil(WINDOW_MS / each_ms))


def _peak_bytes(function: Timed, device: torch.device) -> int | None:
    function(0)
    if device.type != "cuda":
        return None
    _synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function(0)
    _synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
