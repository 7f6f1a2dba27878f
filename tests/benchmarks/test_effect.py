"""The study of the RecA effect: what is left to do, going on after a cut, and its summary and figure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from reca.benchmarks import effect
from reca.benchmarks.effect import BASE, Study, missing, parse_seeds, read_lines, run_study
from reca.benchmarks.effect_figure import difference, draw, summarise
from reca.config import TrainConfig
from reca.errors import ConfigError, DataError
from reca.files import write_json
from reca.recipes.world.evaluation import scores_path
from reca.world.prompts import CATEGORIES, HELD_OUT


class FakeTrain:
    """Stands for training: leaves scores, counts its calls, and is killed at one of them."""

    def __init__(self, killed_at: int | None = None) -> None:
        self.configs: list[TrainConfig] = []
        self.killed_at = killed_at

    def __call__(self, config: TrainConfig, folder: Path, resume: str) -> dict[str, Any]:
        if len(self.configs) == self.killed_at:
            raise KeyboardInterrupt
        self.configs.append(config)
        scores = {category: {"right": [1, 2], "samples": 4, "shown": []} for category in CATEGORIES}
        write_json(scores_path(folder / "samples", config.steps), scores)
        return {"steps": config.steps, "after": {"mean": 0.5}}


def study(folder: Path) -> Study:
    return Study(folder / "out", folder / "runs", (0, 3), ("masked",), ("captions", "shuffled"))


def test_every_seed_and_kind_begins_with_its_base(tmp_path: Path):
    assert list(missing(study(tmp_path))) == [
        (seed, "masked", arm) for seed in (0, 3) for arm in (BASE, "captions", "shuffled")
    ]


def test_a_study_cut_short_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cut = FakeTrain(killed_at=6 + 2)  # three stages of two seeds, then base and one arm of the first
    monkeypatch.setattr(effect, "train", cut)
    with pytest.raises(KeyboardInterrupt):
        run_study(study(tmp_path))
    done = [(line["seed"], line["arm"]) for line in read_lines(tmp_path / "out")]
    assert done == [(0, BASE), (0, "captions")]
    with (tmp_path / "out" / effect.RESULTS).open("a") as file:
        file.write('{"seed": 0, "arm": "shuf')  # torn by the same kill
    again = FakeTrain()
    monkeypatch.setattr(effect, "train", again)
    run_study(study(tmp_path))
    assert list(missing(study(tmp_path))) == []
    lines = read_lines(tmp_path / "out")
    assert len(lines) == len({(line["seed"], line["kind"], line["arm"]) for line in lines}) == 6
    arms = [(config.seed, config.arm) for config in again.configs if config.arm]
    assert arms == [(0, "shuffled"), (3, "captions"), (3, "shuffled")]
    run_study(study(tmp_path))
    assert len(again.configs) == len(arms) + 2 * 3 + 2  # nothing more was run


def test_every_line_says_where_it_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(effect, "train", FakeTrain())
    run_study(study(tmp_path))
    for line in read_lines(tmp_path / "out"):
        assert set(line) >= {"seed", "kind", "arm", "steps", "cpu_seconds", "machine", "versions", "commit"}
        assert line["right"][HELD_OUT] == [1, 2] and line["samples"] == 4


def test_each_seed_trains_from_its_own_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    runs = FakeTrain()
    monkeypatch.setattr(effect, "train", runs)
    run_study(study(tmp_path))
    for config in runs.configs:
        if config.recipe != "world-encoder":
            assert f"seed-{config.seed}/" in str(config.weights)
    assert {config.steps for config in runs.configs if config.arm} == {800}


@pytest.mark.parametrize(("text", "seeds"), [("0-4", (0, 1, 2, 3, 4)), ("0,2,5", (0, 2, 5)), ("7", (7,))])
def test_seeds_are_ranges_or_lists(text, seeds):
    assert parse_seeds(text) == seeds


def test_other_seeds_are_refused():
    with pytest.raises(ConfigError, match="--seeds must look like 0-4 or 0,2,5, got 'a-b'"):
        parse_seeds("a-b")


def line(seed: int, arm: str, gain: float) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    right = {}
    for category in CATEGORIES:
        chance = 0.5 + (gain if category == HELD_OUT else 0.0)
        right[category] = (
            torch.binomial(torch.full((80,), 4.0), torch.full((80,), chance), generator=generator)
            .int()
            .tolist()
        )
    shares = {category: sum(rows) / 320 for category, rows in right.items()}
    return {"seed": seed, "kind": "masked", "arm": arm, "samples": 4, "right": right, "scores": shares}


LINES = [
    line(seed, arm, gain)
    for seed in range(4)
    for arm, gain in (("captions", 0.0), ("shuffled", 0.0), ("reca_and_captions", 0.4))
]


def test_a_difference_is_paired_by_seed_and_its_interval_holds_the_truth():
    held_out = difference(LINES, "masked", "reca_and_captions", HELD_OUT)
    mean = difference(LINES, "masked", "reca_and_captions", "mean")
    assert len(held_out.by_seed) == 4
    assert held_out.interval[0] < 40 < held_out.interval[1] and abs(held_out.value - 40) < 5
    assert abs(mean.value - 5) < 1.5 and mean.interval[0] > 0
    rest = difference(LINES, "masked", "reca_and_captions", "mean_without_held_out")
    assert rest.interval[0] < 0 < rest.interval[1]


def test_the_same_numbers_under_both_names_differ_by_nothing():
    same = [one | {"arm": "copy"} for one in LINES if one["arm"] == "captions"]
    nothing = difference(LINES + same, "masked", "copy", "mean")
    assert nothing.value == 0 and nothing.interval == (0, 0)


def test_a_difference_needs_a_seed_with_both():
    with pytest.raises(DataError, match="no seed has both dense and captions of masked"):
        difference(LINES, "masked", "dense", "mean")


def test_summary_and_figure_are_made_of_the_lines():
    found = summarise(LINES)
    assert json.loads(json.dumps(found)) == found
    assert found["masked"]["captions"]["seeds"] == [0, 1, 2, 3]
    assert (
        "minus_control" in found["masked"]["shuffled"] and "minus_control" not in found["masked"]["captions"]
    )
    assert draw(LINES).startswith(b"\x89PNG")
