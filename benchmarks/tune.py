"""Other launch parameters than those of the table, timed on the GPU at hand; proposes, changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from reca.benchmarks.cases.case import Case, make_inputs
from reca.benchmarks.environment import environment
from reca.benchmarks.operators import input_sets, timed
from reca.benchmarks.timing import Timing, measure
from reca.errors import ConfigError
from reca.kernels._launch import TABLE, LaunchConfig, tried_config

_WORTH = 0.97  # a proposal must be at least 3 % quicker: two runs on one machine differ by less
_WARPS = (2, 4, 8, 16)


def tune_cases(
    cases: Sequence[Case],
    device: torch.device,
    dtype: torch.dtype,
    *,
    note: Callable[[str], None] = lambda line: None,
) -> Iterator[dict[str, Any]]:
    """Yield one record per case: the table's time, the best configuration found, and a line for the table.

    Raises: ConfigError off CUDA, where there is nothing to launch.
    """
    if device.type != "cuda":
        raise ConfigError("--tune times Triton kernels, which needs a CUDA device; none was chosen")
    origin = environment()
    for case in cases:
        if case.operator not in TABLE:
            continue
        note(f"{case.operator}: {case.name}")
        timings = _time_all(case, device, dtype)
        table = timings.pop(None)
        best = min((config for config in timings), key=lambda config: timings[config].p50, default=None)
        is_better = best is not None and timings[best].p50 < _WORTH * table.p50
        yield {
            "record": "tuning",
            **origin,
            "operator": case.operator,
            "case": case.name,
            "dtype": str(dtype).removeprefix("torch."),
            "table_ms": table.p50,
            "tried": {f"tile={c.tile} warps={c.warps}": timing.p50 for c, timing in timings.items()},
            "proposal": _entry(best, timings[best], table) if best is not None and is_better else None,
        }


def candidates(operator: str) -> list[LaunchConfig]:
    """Half, equal and double tiles of every entry of the table, with two to sixteen warps."""
    tiles = {int(entry.config.tile * factor) for entry in TABLE[operator] for factor in (0.5, 1, 2)}
    return [LaunchConfig(tile, warps) for tile in sorted(tiles) for warps in _WARPS]


def _time_all(case: Case, device: torch.device, dtype: torch.dtype) -> dict[LaunchConfig | None, Timing]:
    """Forward and backward together, of the table (None) and of every candidate that compiles and runs."""
    sets = input_sets(case, case.full, device, dtype, make_inputs(case, case.full, device, dtype, seed=0))
    mode = "both" if case.gradients else "forward"
    found: dict[LaunchConfig | None, Timing] = {}
    for config in (None, *candidates(case.operator)):
        call = timed(lambda inputs: case.ours(inputs, "fused"), sets, case.gradients, mode)
        try:
            if config is None:
                found[None] = measure({"": call}, device)[""]
            else:
                with tried_config(case.operator, config):
                    found[config] = measure({"": call}, device)[""]
        except Exception:  # out of registers or shared memory: the compiler raises what it likes
            if config is None:
                raise
    return found


def _entry(config: LaunchConfig, timing: Timing, table: Timing) -> str:
    device = torch.cuda.get_device_name(0)
    return (
        f'Entry(ANY_WIDTH, LaunchConfig(tile={config.tile}, warps={config.warps}), "measured: {device}, '
        f'{timing.p50:.4g} ms where the table gave {table.p50:.4g} ms")'
    )
