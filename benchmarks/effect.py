"""The study of the RecA effect: every arm, both kinds of generator, several seeds, one line for each.

    python -m reca.benchmarks.effect --out results --runs runs/effect --seeds 0-4 --jobs 2

Each seed has its own encoder, trunk and bases. A finished (seed, kind, arm) is a line of `results.jsonl`; a
study that was cut short goes on where it stopped, also inside a run.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from reca.commands.train import commit, machine
from reca.config import TrainConfig
from reca.engine.checkpoint import versions
from reca.errors import ConfigError
from reca.files import JsonLines, remove_dir
from reca.recipes import get_recipe
from reca.recipes.api import train
from reca.recipes.world.arms import ARMS
from reca.recipes.world.evaluation import read_scores
from reca.recipes.world.run import WEIGHTS

RESULTS = "results.jsonl"
BASES = {"masked": "world-base", "flow": "world-flow-base"}
POST_TRAINING = {"masked": "world", "flow": "world-flow"}
UNDERSTANDING = ("world-encoder", "world-language", "world-alignment")
MAIN_ARMS = ("captions", "reca_and_captions", "shuffled", "rotated", "dense", "pure", "copy")
COST_ARMS = ("trunk", "trunk_and_text", "one_instruction", "many_instructions", "high_rate")
"""What the guide warns of, each beside what it recommends."""
BASE = "base"
"""Name of the line that holds the scores before post-training."""


@dataclass(frozen=True, slots=True)
class Study:
    """What is run, and where.

    Attributes:
        out: folder of `results.jsonl`.
        runs: folder of the run folders.
        seeds: every seed has its own encoder, trunk and bases.
        kinds: `masked`, `flow`.
        arms: names of `reca.recipes.world.arms.ARMS`.
        steps: steps of each stage, by recipe, where they are not the recipe's; for tests.
    """

    out: Path
    runs: Path
    seeds: tuple[int, ...]
    kinds: tuple[str, ...] = tuple(BASES)
    arms: tuple[str, ...] = MAIN_ARMS
    steps: Mapping[str, int] | None = None

    def config(self, recipe: str, seed: int, weights: Path | None) -> TrainConfig:
        """A recipe's configuration with this seed, from these weights."""
        config = get_recipe(recipe)()
        update: dict[str, Any] = {"seed": seed}
        if weights is not None:
            update["weights"] = str(weights)
        assert config.world is not None
        if self.steps is not None and recipe in self.steps:
            update["steps"] = self.steps[recipe]
        if recipe in BASES.values():
            # How flat a base is stands in its line; no seed may be left out for it.
            update["world"] = config.world.model_copy(update={"gate": None})
        return config.model_copy(update=update)


def read_lines(out: Path) -> list[dict[str, Any]]:
    """The finished lines of a study; a torn last one is left out."""
    path = out / RESULTS
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


def missing(study: Study) -> Iterator[tuple[int, str, str]]:
    """(seed, kind, arm) without a line; the base of a seed and kind comes first."""
    done = {(line["seed"], line["kind"], line["arm"]) for line in read_lines(study.out)}
    for seed in study.seeds:
        for kind in study.kinds:
            yield from ((seed, kind, arm) for arm in (BASE, *study.arms) if (seed, kind, arm) not in done)


def make_understanding(study: Study, seed: int) -> Path:
    """Weights of the seed's encoder, trunk and projector."""
    weights: Path | None = None
    for recipe in UNDERSTANDING:
        folder = study.runs / f"seed-{seed}" / recipe
        train(study.config(recipe, seed, weights), folder, resume="auto")
        weights = folder / WEIGHTS
    assert weights is not None
    return weights


def run_kind(study: Study, seed: int, kind: str) -> None:
    """Base and arms of one seed and kind, one line after the other."""
    todo = [arm for other, its_kind, arm in missing(study) if (other, its_kind) == (seed, kind)]
    if not todo:
        return
    understanding = study.runs / f"seed-{seed}" / UNDERSTANDING[-1] / WEIGHTS
    base = study.runs / f"seed-{seed}" / BASES[kind]
    started, summary = time.process_time(), dict[str, Any]()
    if BASE in todo or not (base / WEIGHTS).exists():
        summary = train(study.config(BASES[kind], seed, understanding), base, resume="auto")
    log = JsonLines(study.out / RESULTS)
    try:
        for arm in todo:
            folder = base
            if arm != BASE:
                folder = study.runs / f"seed-{seed}" / f"{kind}-{arm}"
                started = time.process_time()
                config = study.config(POST_TRAINING[kind], seed, base / WEIGHTS)
                summary = train(config.model_copy(update={"arm": arm}), folder, resume="auto")
            log.append(_line(seed, kind, arm, folder, summary, time.process_time() - started))
            if arm != BASE:
                remove_dir(folder)
    finally:
        log.close()


def _line(
    seed: int, kind: str, arm: str, folder: Path, summary: Mapping[str, Any], cpu_seconds: float
) -> dict[str, Any]:
    scores = read_scores(folder / "samples", summary["steps"])
    return {
        "seed": seed,
        "kind": kind,
        "arm": arm,
        "steps": summary["steps"],
        "cpu_seconds": round(cpu_seconds, 1),
        "scores": {name: round(value, 4) for name, value in summary["after"].items()},
        "samples": next(iter(scores.values()))["samples"],
        "right": {category: one["right"] for category, one in scores.items()},
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
    }


def run_study(study: Study, jobs: int = 1) -> None:
    """Run what is missing, `jobs` processes at a time."""
    log = JsonLines(study.out / RESULTS)
    log.truncate_after(0)  # lines hold no step: only a torn one is dropped
    log.close()
    seeds = sorted({seed for seed, _, _ in missing(study)})
    pairs = sorted({(seed, kind) for seed, kind, _ in missing(study)})
    if jobs == 1:
        for seed in seeds:
            make_understanding(study, seed)
        for seed, kind in pairs:
            run_kind(study, seed, kind)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        list(pool.map(make_understanding, [study] * len(seeds), seeds))
        list(pool.map(run_kind, [study] * len(pairs), *zip(*pairs, strict=True)))


def parse_seeds(text: str) -> tuple[int, ...]:
    """ "0-4" or "0,2,5". Raises ConfigError."""
    try:
        first, dash, last = text.partition("-")
        return tuple(range(int(first), int(last) + 1)) if dash else tuple(map(int, text.split(",")))
    except ValueError as error:
        raise ConfigError(f"--seeds must look like 0-4 or 0,2,5, got {text!r}") from error


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study from the command line."""
    parser = argparse.ArgumentParser(description="Run the study of the RecA effect in the miniature world.")
    parser.add_argument("--out", type=Path, required=True, help=f"folder of {RESULTS}")
    parser.add_argument("--runs", type=Path, default=Path("runs/effect"), help="folder of the run folders")
    parser.add_argument("--seeds", default="0-4", help="such as 0-4 or 0,2,5")
    parser.add_argument("--kinds", default=",".join(BASES), help="masked, flow")
    parser.add_argument("--arms", default=",".join(MAIN_ARMS), help=", ".join(ARMS))
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    given = parser.parse_args(arguments)
    study = Study(
        given.out,
        given.runs,
        parse_seeds(given.seeds),
        tuple(given.kinds.split(",")),
        tuple(given.arms.split(",")),
    )
    run_study(study, given.jobs)


if __name__ == "__main__":
    main()
