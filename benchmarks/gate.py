"""Whether a form of an operator is right: its results and gradients beside plain torch's, against fp64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from reca.benchmarks.cases.case import Case, Inputs, Output, Provider, in_fp64
from reca.kernels.testing import BUDGET, error_ratio

OURS, PLAIN, COMPILED = "reca", "torch", "torch.compile"


def errors(case: Case, providers: Mapping[str, Provider], inputs: Inputs) -> dict[str, float | str | None]:
    """Provider -> its worst error ratio over outputs and gradients; a string says why it could not run."""
    plain = _results(case, case.plain, inputs)
    exact = _results(case, case.plain, in_fp64(inputs, case.gradients)) if case.is_exact else None
    ratios: dict[str, float | str | None] = {}
    for name, provider in providers.items():
        try:
            got = plain if name == PLAIN else _results(case, provider, inputs)
        except Exception as error:  # a rival may refuse a shape, a dtype or a device in any way
            ratios[name] = reason(error)
            continue
        if exact is None:
            ratios[name] = None
            continue
        triples = zip(got, plain, exact, strict=True)
        ratios[name] = max(error_ratio(g, p.to(g.dtype), e) for g, p, e in triples)
    return ratios


def red(gate: float | str | None) -> str | None:
    """Why no time may be given; None if the results are right."""
    if isinstance(gate, str):
        return gate
    if gate is None or gate <= BUDGET:
        return None
    return f"error is {gate:.3g} x that of plain torch, the budget is {BUDGET}: no time is given"


def reason(error: Exception) -> str:
    """An error in one line of at most 200 characters."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def _results(case: Case, provider: Provider, inputs: Inputs) -> list[Tensor]:
    """Outputs, then gradients of sum(output * fixed weights); of an operator in place what it changed."""
    if case.mutates:
        copies = {**inputs, **{name: inputs[name].clone() for name in case.mutates}}
        provider(copies)
        return [copies[name] for name in case.mutates]
    outputs = as_tuple(provider(inputs))
    results = [output.detach() for output in outputs]
    if case.gradients:
        flowing = [output for output in outputs if output.requires_grad]
        leaves = [inputs[name] for name in case.gradients]
        results += torch.autograd.grad(flowing, leaves, upstream(flowing))
    return results


def upstream(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Fixed gradients of the outputs: ones for a scalar, else standard normal values rounded alike."""
    made = []
    for number, output in enumerate(outputs):
        generator = torch.Generator(output.device).manual_seed(1000 + number)
        values = torch.randn(output.shape, device=output.device, generator=generator)
        dtype = torch.bfloat16 if output.dtype != torch.float32 else torch.float32
        made.append(torch.ones_like(output) if output.dim() == 0 else values.to(dtype).to(output.dtype))
    return made


def as_tuple(output: Output) -> tuple[Tensor, ...]:
    """The results of an operator that has some."""
    assert output is not None, "an operator that changes its inputs has no gradients"
    return output if isinstance(output, tuple) else (output,)
