"""Every operator against its rivals: first whether it is right, then how fast, in one run on one machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

from reca.benchmarks.cases.case import Case, Inputs, Output, Provider, Shape, in_fp64, make_inputs
from reca.benchmarks.ceilings import Ceilings, measure_ceilings
from reca.benchmarks.environment import environment
from reca.benchmarks.timing import ROUNDS, Timed, Timing, measure
from reca.kernels.testing import BUDGET, error_ratio

OURS, PLAIN, COMPILED = "reca", "torch", "torch.compile"
_CACHE_BYTES = {"cuda": 1 << 28, "cpu": 1 << 25}  # several times the last-level cache
_MOST_SETS = 16
_MOST_INPUT_BYTES = 16e9


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
        compiled: also time torch.compile of the plain form.
        rounds: timed windows per provider and mode.
        minutes: cases that have not begun by then are reported as not measured.
        note: called with a line before each case.

    A case whose results are outside the error budget yields records without any time.
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
    for case in cases:
        base = {
            "record": "measurement",
            "run": run,
            "operator": case.operator,
            "case": case.name,
            "device": device.type,
            "dtype": _name(dtype),
            "sizes": sizes,
            "shape": dict(case.full if full else case.small),
        }
        if time.monotonic() - started > 60 * minutes:
            yield {**base, "provider": OURS, "mode": None, "why_not": f"not begun within {minutes} minutes"}
            continue
        note(f"{case.operator}: {case.name}")
        # Backward passes are timed over kept graphs, whose buffers compiled code must not take for its own.
        with functorch_config.patch(donated_buffer=False):
            for record in _measure_case(case, base["shape"], device, dtype, ceilings, compiled, rounds):
                yield {**base, **record}


def _measure_case(
    case: Case,
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    ceilings: Ceilings,
    compiled: bool,
    rounds: int,
) -> Iterator[dict[str, Any]]:
    providers, missing = _providers(case, compiled)
    for name, reason in missing.items():
        yield {"provider": name, "mode": None, "why_not": reason}
    inputs = make_inputs(case, shape, device, dtype, seed=0)
    ratios = _errors(case, providers, inputs)
    gate = ratios[OURS]
    if isinstance(gate, str) or (gate is not None and gate > BUDGET):
        yield {"provider": OURS, "mode": None, "error_ratio": gate, "gate": "red", "why_not": _red(gate)}
        return
    for name in [name for name, ratio in ratios.items() if isinstance(ratio, str)]:
        yield {"provider": name, "mode": None, "why_not": ratios[name]}
        del providers[name]
    sets = input_sets(case, shape, device, dtype, inputs)
    for mode in ("forward", "backward", "both") if case.gradients else ("forward",):
        functions = {
            name: timed(provider, sets, case.gradients, mode) for name, provider in providers.items()
        }
        for name, timing in measure(functions, device, rounds=rounds).items():
            yield {
                "provider": name,
                "mode": mode,
                "gate": "green",
                "error_ratio": ratios[name],
                **_numbers(case, shape, dtype, mode, timing, ceilings),
            }


def _red(gate: float | str) -> str:
    if isinstance(gate, str):
        return gate
    return f"error is {gate:.3g} x that of plain torch, the budget is {BUDGET}: no time is given"


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
    return found, missing


def _errors(case: Case, providers: Mapping[str, Provider], inputs: Inputs) -> dict[str, float | str | None]:
    """Provider -> its worst error ratio over outputs and gradients; a string says why it could not run."""
    plain = _results(case, case.plain, inputs)
    exact = _results(case, case.plain, in_fp64(inputs, case.gradients)) if case.is_exact else None
    ratios: dict[str, float | str | None] = {}
    for name, provider in providers.items():
        try:
            got = plain if name == PLAIN else _results(case, provider, inputs)
        except Exception as error:  # a rival may refuse a shape, a dtype or a device in any way
            ratios[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
            continue
        if exact is None:
            ratios[name] = None
            continue
        triples = zip(got, plain, exact, strict=True)
        ratios[name] = max(error_ratio(g, p.to(g.dtype), e) for g, p, e in triples)
    return ratios


def _results(case: Case, provider: Provider, inputs: Inputs) -> list[Tensor]:
    """Outputs, then gradients of sum(output * fixed weights); of an operator in place what it changed."""
    if case.mutates:
        copies = {**inputs, **{name: inputs[name].clone() for name in case.mutates}}
        provider(copies)
        return [copies[name] for name in case.mutates]
    outputs = _tuple(provider(inputs))
    results = [output.detach() for output in outputs]
    if case.gradients:
        flowing = [output for output in outputs if output.requires_grad]
        leaves = [inputs[name] for name in case.gradients]
        results += torch.autograd.grad(flowing, leaves, _upstream(flowing))
    return results


def _upstream(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Fixed gradients of the outputs: ones for a scalar, else standard normal values rounded alike."""
    upstream = []
    for number, output in enumerate(outputs):
        generator = torch.Generator(output.device).manual_seed(1000 + number)
        values = torch.randn(output.shape, device=output.device, generator=generator)
        dtype = torch.bfloat16 if output.dtype != torch.float32 else torch.float32
        upstream.append(torch.ones_like(output) if output.dim() == 0 else values.to(dtype).to(output.dtype))
    return upstream


def _tuple(output: Output) -> tuple[Tensor, ...]:
    assert output is not None, "an operator that changes its inputs has no gradients"
    return output if isinstance(output, tuple) else (output,)


def input_sets(
    case: Case, shape: Shape, device: torch.device, dtype: torch.dtype, first: Inputs
) -> list[Inputs]:
    """Copies of the inputs that together exceed the cache."""
    size = sum(value.nbytes for value in first.values() if isinstance(value, Tensor))
    wanted = math.ceil(2 * _CACHE_BYTES[device.type] / max(size, 1))
    count = max(2, min(wanted, _MOST_SETS, int(_MOST_INPUT_BYTES / max(size, 1))))
    return [first, *(make_inputs(case, shape, device, dtype, seed=seed) for seed in range(1, count))]


def timed(provider: Provider, sets: Sequence[Inputs], gradients: tuple[str, ...], mode: str) -> Timed:
    """A call of `measure`: forward alone, backward alone over kept graphs, or both."""

    def forward(turn: int) -> object:
        return provider(sets[turn % len(sets)])

    def both(turn: int) -> object:
        inputs = sets[turn % len(sets)]
        outputs = [output for output in _tuple(provider(inputs)) if output.requires_grad]
        return torch.autograd.grad(outputs, [inputs[name] for name in gradients], upstream[turn % len(sets)])

    if mode == "forward":
        return forward
    prepared = []
    upstream = []
    for inputs in sets:
        outputs = [output for output in _tuple(provider(inputs)) if output.requires_grad]
        upstream.append(_upstream(outputs))
        if mode == "backward":
            prepared.append(outputs)

    def backward(turn: int) -> object:
        place = turn % len(sets)
        leaves = [sets[place][name] for name in gradients]
        return torch.autograd.grad(prepared[place], leaves, upstream[place], retain_graph=True)

    return both if mode == "both" else backward


def _numbers(
    case: Case, shape: Shape, dtype: torch.dtype, mode: str, timing: Timing, ceilings: Ceilings
) -> dict[str, Any]:
    moved, flops = case.moved(shape, dtype.itemsize), case.flops(shape)
    pick = {"forward": slice(0, 1), "backward": slice(1, 2), "both": slice(0, 2)}[mode]
    gbps = sum(moved[pick]) / timing.p50 / 1e6
    tflops = sum(flops[pick]) / timing.p50 / 1e9
    return {
        "ms_p20": timing.p20,
        "ms_p50": timing.p50,
        "ms_p80": timing.p80,
        "rounds": timing.rounds,
        "calls": timing.calls,
        "gbps": gbps,
        "copy_share": gbps / ceilings.copy_gbps,
        "tflops": tflops or None,
        "gemm_share": tflops / ceilings.gemm_tflops if tflops else None,
        "peak_extra_bytes": timing.peak_bytes,
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
