"""What the study of the RecA effect found: differences to the control with paired intervals, and the figure.

python -m reca.benchmarks.effect_figure --out results
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reca.benchmarks.effect import BASE, RESULTS, read_lines
from reca.errors import DataError
from reca.files import write_atomic, write_json
from reca.randomness import RandomSource
from reca.world.prompts import CATEGORIES, HELD_OUT
from reca.world.score import paired_bootstrap

CONTROL = "captions"
SUMMARY, FIGURE = "summary.json", "effect.png"
_LABELS = {
    BASE: "base, before",
    "captions": "sparse captions (control)",
    "reca_and_captions": "RecA + captions",
    "shuffled": "... embeddings of another picture",
    "rotated": "... embeddings rotated",
    "copy": "... codes instead of embeddings",
    "pure": "RecA alone",
    "dense": "dense captions (upper bound)",
}
_SEEN = tuple(category for category in CATEGORIES if category != HELD_OUT)
_PARTS: Mapping[str, Sequence[str]] = {
    "mean": CATEGORIES,
    "mean_without_held_out": _SEEN,
    HELD_OUT: (HELD_OUT,),
}
_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Difference:
    """An arm minus the control, in points, on the same prompts and noise.

    Attributes:
        value: mean over seeds.
        interval: 95 %, seeds and prompts drawn again.
        by_seed: of each seed: its value and its own interval, prompts drawn again.
    """

    value: float
    interval: tuple[float, float]
    by_seed: tuple[tuple[float, float, float], ...]


def difference(
    lines: Sequence[Mapping[str, Any]], kind: str, arm: str, part: str, control: str = CONTROL
) -> Difference:
    """Arm minus control over the seeds that have both. Raises DataError if there is none."""
    found = {(line["seed"], line["arm"]): line for line in lines if line["kind"] == kind}
    seeds = sorted(seed for seed, name in found if name == arm and (seed, control) in found)
    if not seeds:
        raise DataError(
            f"no seed has both {arm} and {control} of {kind}; run `python -m reca.benchmarks.effect`"
        )
    pairs = [(_shares(found[seed, arm]), _shares(found[seed, control])) for seed in seeds]
    categories = _PARTS[part]
    rows = [{c: 100 * (one[c] - other[c]) for c in categories} for one, other in pairs]
    values = [float(torch.stack([row[c].mean() for c in categories]).mean()) for row in rows]
    by_seed = [
        (value, *paired_bootstrap(row, RandomSource(seed), _RESAMPLES))
        for seed, value, row in zip(seeds, values, rows, strict=True)
    ]
    return Difference(sum(values) / len(values), _over_seeds(rows), tuple(by_seed))


def _shares(line: Mapping[str, Any]) -> dict[str, Tensor]:
    return {
        c: torch.tensor(right, dtype=torch.float64) / line["samples"] for c, right in line["right"].items()
    }


def _over_seeds(rows: Sequence[Mapping[str, Tensor]]) -> tuple[float, float]:
    """95 % interval of the mean over seeds; seeds, and prompts within them, are drawn again."""
    random, numbers = RandomSource(0), torch.arange(_RESAMPLES)
    chosen = (random.uniform("seeds", numbers, len(rows)) * len(rows)).long()
    means = []
    for seed, row in enumerate(rows):
        parts = []
        for category, values in row.items():
            draws = (random.uniform(f"{seed}/{category}", numbers, len(values)) * len(values)).long()
            parts.append(values[draws].mean(dim=1))
        means.append(torch.stack(parts).mean(dim=0))
    drawn = torch.stack(means, dim=1).gather(1, chosen).mean(dim=1)
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def summarise(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """kind -> arm -> mean scores over seeds, and differences to the control where there is one."""
    found: dict[str, Any] = {}
    for kind in sorted({line["kind"] for line in lines}):
        arms = {line["arm"] for line in lines if line["kind"] == kind}
        found[kind] = {arm: _summary(lines, kind, arm, has_control=CONTROL in arms) for arm in sorted(arms)}
    return found


def _summary(lines: Sequence[Mapping[str, Any]], kind: str, arm: str, *, has_control: bool) -> dict[str, Any]:
    mine = [line for line in lines if (line["kind"], line["arm"]) == (kind, arm)]
    names = [name for name in mine[0]["scores"] if "/" not in name and name in mine[-1]["scores"]]
    result: dict[str, Any] = {
        "seeds": sorted(line["seed"] for line in mine),
        "scores": {n: round(sum(line["scores"][n] for line in mine) / len(mine), 4) for n in names},
    }
    if has_control and arm != CONTROL:
        result["minus_control"] = {
            part: {
                "points": round(one.value, 2),
                "interval": [round(end, 2) for end in one.interval],
                "by_seed": [[round(number, 2) for number in seed] for seed in one.by_seed],
            }
            for part in _PARTS
            for one in [difference(lines, kind, arm, part)]
        }
    return result


def draw(lines: Sequence[Mapping[str, Any]]) -> bytes:
    """PNG: for each kind the held-out pairs, and the difference of the mean to the control, arm by arm."""
    from matplotlib.figure import Figure

    kinds = [kind for kind in ("masked", "flow") if any(line["kind"] == kind for line in lines)]
    figure = Figure(figsize=(11, 3.6 * len(kinds)), layout="constrained")
    axes = figure.subplots(len(kinds), 2, squeeze=False, sharey="row")
    for row, kind in zip(axes, kinds, strict=True):
        present = {line["arm"] for line in lines if line["kind"] == kind}
        arms = [arm for arm in reversed(_LABELS) if arm in present]
        _held_out(row[0], lines, kind, arms)
        _gains(row[1], lines, kind, arms)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _colour(arm: str) -> str:
    return {"reca_and_captions": "tab:red", "pure": "tab:orange", CONTROL: "tab:gray", BASE: "lightgray"}.get(
        arm, "tab:blue" if arm != "dense" else "tab:green"
    )


def _held_out(axis: Any, lines: Sequence[Mapping[str, Any]], kind: str, arms: Sequence[str]) -> None:
    for height, arm in enumerate(arms):
        mine = [line for line in lines if (line["kind"], line["arm"]) == (kind, arm)]
        shares = [100 * line["scores"][HELD_OUT] for line in mine]
        axis.barh(height, sum(shares) / len(shares), color=_colour(arm), height=0.7)
        axis.plot(shares, [height] * len(shares), "k.", markersize=4)
    axis.set_yticks(range(len(arms)), [_LABELS[arm] for arm in arms])
    axis.set_xlim(0, 100)
    axis.set_title(f"{kind}: colour-shape pairs that no caption named, % right", loc="left", fontsize=10)
    axis.grid(axis="x", alpha=0.3)


def _gains(axis: Any, lines: Sequence[Mapping[str, Any]], kind: str, arms: Sequence[str]) -> None:
    for height, arm in enumerate(arms):
        if arm == CONTROL:
            continue
        for part, shift, marker in (("mean", 0.15, "o"), ("mean_without_held_out", -0.15, "s")):
            one = difference(lines, kind, arm, part)
            low, high = one.interval
            axis.errorbar(
                one.value,
                height + shift,
                xerr=[[one.value - low], [high - one.value]],
                fmt=marker,
                markerfacecolor=_colour(arm) if part == "mean" else "white",
                color=_colour(arm),
                capsize=3,
                label={"mean": "all 8 categories", "mean_without_held_out": "without the held-out pairs"}[
                    part
                ]
                if arm == "reca_and_captions"
                else None,
            )
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_title("points over the control, 95 % interval", loc="left", fontsize=10)
    axis.legend(fontsize=8, loc="upper right")
    axis.grid(axis="x", alpha=0.3)


def main() -> None:
    """Write `summary.json` and `effect.png` beside the lines of a study."""
    parser = argparse.ArgumentParser(description="Summarise the study of the RecA effect, and draw it.")
    parser.add_argument("--out", type=Path, required=True, help=f"folder that holds {RESULTS}")
    out = parser.parse_args().out
    lines = read_lines(out)
    if not lines:
        raise DataError(f"{out / RESULTS} holds no line; run `python -m reca.benchmarks.effect --out {out}`")
    write_json(out / SUMMARY, summarise(lines))
    write_atomic(out / FIGURE, draw(lines))


if __name__ == "__main__":
    main()
