"""Every operator at the shapes of real steps. A new operator adds its cases to one of these modules."""

from __future__ import annotations

from reca.benchmarks.cases import (
    attention,
    diffusion,
    draws,
    encoders,
    losses,
    mlps,
    norms,
    optimizer,
    sana,
    skinny,
)
from reca.benchmarks.cases.case import Case as Case

CASES: tuple[Case, ...] = (
    *norms.CASES,
    *losses.CASES,
    *attention.CASES,
    *mlps.CASES,
    *diffusion.CASES,
    *sana.CASES,
    *skinny.CASES,
    *encoders.CASES,
    *draws.CASES,
    *optimizer.CASES,
)
