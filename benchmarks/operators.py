"""Every operator against its rivals: first whether it is right, then how fast, in one run on one machine."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._functorch import config as functorch_config

from reca.benchmarks.calls import graphed, input_sets, per_call, timed
from reca.benchmarks.cases.case import Case, Inputs, Provider, Shape, make_inputs
from reca.benchmarks.ceilings import Ceilings, measure_ceilings
from reca.benchmarks.environment import environment
from reca.benchmarks.gate import COMPILED, OURS, PLAIN, errors, reason, red
from reca.benchmarks.timing import ROUNDS, Timed, Timing, measure

GRAPH = ", graph"
"""Ends the mode of calls that were captured in a CUDA graph, where no launch waits for the host."""
GRAPHED_BELOW_MS = 0.2  # a longer kernel hides its launch


def run_cases(
    cases: Sequence[Case],
    device: torch.device,
    dtype: torch.dtype,
    *,
    full: bool,
    compiled: bool = True,
    rounds: int = ROUNDS,
    minutes: float = math.inf,
    note: Callable[[str], None] = lambda line: None,
) -> Iterator[dict[str, Any]]:
    """Yield the record of the run, then one for each (case, provider, mode).

    Args:
        cases: what to measure.
        device, dtype: where, and the dtype of activations and weights.
        full: the sizes of real steps; otherwise small ones, whose times say nothing about a GPU.
        compiled: also time torch.compile of the plain form, except in cases that begin behind schedule.
        rounds: timed windows per provider and mode.
        minutes: what has not begun by then is reported as not measured.
        note: called with a line before each case.

    A case whose results are outside the error budget yields records without any time, one that fails a record
    that says how; `gate` is then `red` or `broken`. On a GPU short operators are timed as a graph, too.
    """
    started = time.monotonic()
    origin = environment()
    ceilings = measure_ceilings(device, dtype)
    run = f"{origin['time']} {origin['commit']}"
    sizes = "full" if full else "small"
    yield {
        "record": "run",
        "run": run,
        **origin,
        "device": device.type,
        "dtype": _name(dtype),
        "sizes": sizes,
        "copy_gbps": ceilings.copy_gbps,
        "gemm_tflops": ceilings.gemm_tflops,
    }
    for place, case in enumerate(cases):
        shape = case.full if full else case.small
        base = {
            "record": "measurement",
            "run": run,
            "operator": case.operator,
            "case": case.name,
            "device": device.type,
            "dtype": _name(dtype),
            "sizes": sizes,
            "shape": dict(shape),
        }
        spent = (time.monotonic() - started) / 60
        if spent > minutes:
            yield {**base, "provider": OURS, "mode": None, "why_not": f"not begun within {minutes} minutes"}
            continue
        note(f"{case.operator}: {case.name}")
        is_late = spent > minutes * (place + 1) / len(cases)
        job = _Job(case, shape, device, dtype, ceilings, rounds, started + 60 * minutes)
        try:
            # Backward passes are timed over kept graphs, whose buffers compiled code must not reuse.
            with functorch_config.patch(donated_buffer=False):
                for record in job.measure(compiled and not is_late):
                    yield {**base, **record}
            if compiled and is_late:
                yield {**base, "provider": COMPILED, "mode": None, "why_not": "behind schedule"}
        except torch.OutOfMemoryError as error:
            yield {**base, "provider": OURS, "mode": None, "why_not": reason(error)}
        except Exception as error:  # the cases after it are measured all the same
            yield {**base, "provider": OURS, "mode": None, "gate": "broken", "why_not": reason(error)}
        del job
        _release(device)


@dataclass(frozen=True, slots=True)
class _Job:
    """One case on one machine; `deadline` is a monotonic time after which no mode begins."""

    case: Case
    shape: Shape
    device: torch.device
    dtype: torch.dtype
    ceilings: Ceilings
    rounds: int
    deadline: float

    def measure(self, compiled: bool) -> Iterator[dict[str, Any]]:
        """The gate, then every mode of every provider that passes it."""
        case = self.case
        providers, missing = _providers(case, compiled)
        yield from _absent(missing)
        inputs = make_inputs(case, self.shape, self.device, self.dtype, seed=0)
        ratios = errors(case, providers, inputs)
        if (why_not := red(ratios[OURS])) is not None:
            yield {
                "provider": OURS,
                "mode": None,
                "error_ratio": ratios[OURS],
                "gate": "red",
                "why_not": why_not,
            }
            return
        failed = {name: ratio for name, ratio in ratios.items() if isinstance(ratio, str)}
        yield from _absent(failed)
        providers = {name: provider for name, provider in providers.items() if name not in failed}
        sets = input_sets(case, self.shape, self.device, self.dtype, inputs)
        for mode in ("forward", "backward", "both") if case.gradients else ("forward",):
            if time.monotonic() > self.deadline:
                yield {"provider": OURS, "mode": mode, "why_not": "the time was over"}
                return
            ours = math.inf
            for record in self._time(providers, sets, mode, ratios):
                ours = record["ms_p50"] if record["provider"] == OURS and "ms_p50" in record else ours
                yield record
            is_graphed = self.device.type == "cuda" and mode != "backward" and ours < GRAPHED_BELOW_MS
            if is_graphed and time.monotonic() <= self.deadline:
                yield from self._time(providers, sets, mode + GRAPH, ratios)

    def _time(
        self,
        providers: Mapping[str, Provider],
        sets: Sequence[Inputs],
        mode: str,
        ratios: Mapping[str, float | str | None],
    ) -> Iterator[dict[str, Any]]:
        """One mode of all providers in turns; who fails now is left out of it."""
        functions: dict[str, Timed] = {}
        for name, provider in providers.items():
            try:
                call = timed(provider, sets, self.case.gradients, mode.removesuffix(GRAPH))
                functions[name] = graphed(call, len(sets)) if mode.endswith(GRAPH) else call
                functions[name](0)
            except Exception as error:
                functions.pop(name, None)
                if name == OURS:
                    raise
                yield {"provider": name, "mode": mode, "why_not": reason(error)}
        timings, failed = self._measured(functions)
        yield from ({**record, "mode": mode} for record in _absent(failed))
        for name, timing in timings.items():
            own = per_call(timing, len(sets)) if mode.endswith(GRAPH) else timing
            numbers = self._numbers(mode.removesuffix(GRAPH), own)
            yield {"provider": name, "mode": mode, "gate": "green", "error_ratio": ratios[name], **numbers}

    def _measured(self, functions: Mapping[str, Timed]) -> tuple[dict[str, Timing], dict[str, str]]:
        """All in turns; if one fails, each alone, and those that fail with their reasons."""
        try:
            return measure(functions, self.device, rounds=self.rounds), {}
        except Exception:
            timings: dict[str, Timing] = {}
            failed: dict[str, str] = {}
        for name, function in functions.items():
            try:
                timings |= measure({name: function}, self.device, rounds=self.rounds)
            except Exception as error:
                if name == OURS:
                    raise
                failed[name] = reason(error)
        return timings, failed

    def _numbers(self, mode: str, timing: Timing) -> dict[str, Any]:
        moved, flops = self.case.moved(self.shape, self.dtype.itemsize), self.case.flops(self.shape)
        pick = {"forward": slice(0, 1), "backward": slice(1, 2), "both": slice(0, 2)}[mode]
        gbps = sum(moved[pick]) / timing.p50 / 1e6
        tflops = sum(flops[pick]) / timing.p50 / 1e9
        has_ceiling = mode == "both" or not self.case.is_one_pass
        return {
            "ms_p20": timing.p20,
            "ms_p50": timing.p50,
            "ms_p80": timing.p80,
            "rounds": timing.rounds,
            "calls": timing.calls,
            "gbps": gbps,
            "copy_share": gbps / self.ceilings.copy_gbps if has_ceiling else None,
            "tflops": tflops or None,
            "gemm_share": tflops / self.ceilings.gemm_tflops if tflops and has_ceiling else None,
            "peak_extra_bytes": timing.peak_bytes,
        }


def _absent(reasons: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    for name, why_not in reasons.items():
        yield {"provider": name, "mode": None, "why_not": why_not}


def _release(device: torch.device) -> None:
    """Give back what a case held, before the next one allocates."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _providers(case: Case, compiled: bool) -> tuple[dict[str, Provider], dict[str, str]]:
    """What can be timed, and why the rest cannot."""
    found: dict[str, Provider] = {OURS: lambda inputs: case.ours(inputs, "auto"), PLAIN: case.plain}
    missing: dict[str, str] = {}
    if compiled:
        found[COMPILED] = torch.compile(case.plain, fullgraph=True, dynamic=False)
    for name, load in case.rivals.items():
        try:
            found[name] = load()
        except (ImportError, AttributeError) as error:
            missing[name] = f"not installed: {error}"
        except Exception as error:  # a package built for another torch or CUDA may fail in any way
            missing[name] = f"broken: {reason(error)}"
    return found, missing


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
