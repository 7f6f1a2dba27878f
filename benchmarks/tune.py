"""Other launch parameters than those of the table, timed on the GPU at hand; proposes, changes nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from reca.benchmarks.calls import input_sets, timed
from reca.benchmarks.cases.case import Case, Inputs, make_inputs
from reca.benchmarks.environment import environment
from reca.benchmarks.gate import OURS, errors, reason, red
from reca.benchmarks.timing import ROUNDS, Timing, measure
from reca.errors import ConfigError
from reca.kernels._launch import TABLE, Asked, LaunchConfig, tried_config

_WORTH = 0.97  # a proposal must be at least 3 % quicker: two runs on one machine differ by less
_WARPS = (2, 4, 8, 16)


def tune_cases(
    cases: Sequence[Case],
    device: torch.device,
    dtype: torch.dtype,
    *,
    rounds: int = ROUNDS,
    minutes: float = math.inf,
    note: Callable[[str], None] = lambda line: None,
) -> Iterator[dict[str, Any]]:
    """Yield one record per case: the table's time, the best configuration found, and a line for the table.

    What has not begun within `minutes` is recorded as not tried. Only a configuration whose results are
    inside the error budget is proposed.

    Raises: ConfigError off CUDA, where there is nothing to launch.
    """
    if device.type != "cuda":
        raise ConfigError("--tune times Triton kernels, which needs a CUDA device; none was chosen")
    origin, deadline = environment(), time.monotonic() + 60 * minutes
    for case in cases:
        if case.operator not in TABLE:
            continue
        base = {"record": "tuning", **origin, "operator": case.operator, "case": case.name}
        base["dtype"] = str(dtype).removeprefix("torch.")
        if time.monotonic() > deadline:
            yield {**base, "why_not": f"not begun within {minutes} minutes"}
            continue
        note(f"{case.operator}: {case.name}")
        try:
            yield {**base, **_Search(case, device, dtype, rounds, deadline).run()}
        except Exception as error:  # the cases after it are tried all the same
            yield {**base, "why_not": reason(error)}


def candidates(operator: str) -> list[LaunchConfig]:
    """Half, equal and double tiles of every entry of the table, with two to sixteen warps."""
    tiles = {int(entry.config.tile * factor) for entry in TABLE[operator] for factor in (0.5, 1, 2)}
    return [LaunchConfig(tile, warps) for tile in sorted(tiles) for warps in _WARPS]


@dataclass(frozen=True, slots=True)
class _Search:
    """One case on one GPU."""

    case: Case
    device: torch.device
    dtype: torch.dtype
    rounds: int
    deadline: float

    def run(self) -> dict[str, Any]:
        """Forward and backward together, of the table and of every candidate that compiles and runs."""
        case = self.case
        first = make_inputs(case, case.full, self.device, self.dtype, seed=0)
        sets = input_sets(case, case.full, self.device, self.dtype, first)
        table = self._time(sets)
        tried: dict[LaunchConfig, Timing] = {}
        left = []
        for config in candidates(case.operator):
            if time.monotonic() > self.deadline:
                left.append(_label(config))
                continue
            try:
                with tried_config(case.operator, config):
                    tried[config] = self._time(sets)
            except Exception:  # out of registers or shared memory: the compiler raises what it likes
                continue
        return {
            "table_ms": table.p50,
            "tried": {_label(config): timing.p50 for config, timing in tried.items()},
            "not_tried": left,
            "proposal": self._propose(first, tried, table),
        }

    def _time(self, sets: Sequence[Inputs]) -> Timing:
        mode = "both" if self.case.gradients else "forward"
        call = timed(lambda inputs: self.case.ours(inputs, "fused"), sets, self.case.gradients, mode)
        return measure({OURS: call}, self.device, rounds=self.rounds)[OURS]

    def _propose(self, inputs: Inputs, tried: dict[LaunchConfig, Timing], table: Timing) -> str | None:
        """The quickest that is worth an entry and right."""
        quicker = [config for config in tried if tried[config].p50 < _WORTH * table.p50]
        for config in sorted(quicker, key=lambda one: tried[one].p50):
            with tried_config(self.case.operator, config) as asked:
                ratios = errors(self.case, {OURS: lambda i: self.case.ours(i, "fused")}, inputs)
            if red(ratios[OURS]) is None:
                return _entry(config, asked, self._measured(tried[config], table))
        return None

    def _measured(self, timing: Timing, table: Timing) -> str:
        device = torch.cuda.get_device_name(self.device)
        return f"{device}, {self.case.name}: {timing.p50:.4g} ms where the table gave {table.p50:.4g} ms"


def _label(config: LaunchConfig) -> str:
    return f"tile={config.tile} warps={config.warps}"


def _entry(config: LaunchConfig, asked: set[Asked], measured: str) -> str:
    """The line as it goes into the table before those that hold for more."""
    architectures = tuple(sorted({architecture for architecture, _, _ in asked}))
    sizes = {dtype.itemsize for _, dtype, _ in asked}
    itemsize = f", itemsize={sizes.pop()}" if len(sizes) == 1 else ""
    width = max(width for _, _, width in asked)
    return (
        f'Entry({width}, LaunchConfig(tile={config.tile}, warps={config.warps}), "measured: {measured}", '
        f"architectures={architectures}{itemsize})"
    )
