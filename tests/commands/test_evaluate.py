"""`reca evaluate`: scores of shipped weights and of runs, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reca.commands.evaluate import evaluate, render
from reca.commands.train import train_recipe
from reca.errors import ConfigError

SMALL = ("world.prompts=6", "world.samples=2", "steps=2", "optim.warmup_steps=0", "world.images=8")


def test_the_shipped_bases_score_as_their_description_says():
    folder = Path(__file__).parents[2] / "reca" / "assets" / "world"
    stated = json.loads((folder / "world.json").read_text())
    for model, recipe in (("miniature/masked", "world-base"), ("miniature/flow", "world-flow-base")):
        result = evaluate("package:world", "world", model=model, seed=None, prompts=60, device="cpu")
        assert result["model"] == model and result["seed"] == stated[recipe]["seed"] == 0
        for name in ("mean", "mean_without_held_out", "descriptions_of_pictures"):
            # 60 prompts of each category instead of 150: three standard errors of the smaller sample.
            error = 3 * result["scores"][f"{name}/standard_error"]
            assert abs(result["scores"][name] - stated[recipe]["scores"][name]) < error, (model, name)


def test_a_run_is_scored_as_it_scored_itself(tmp_path: Path):
    summary = train_recipe("world", list(SMALL), extra={}, run=tmp_path / "run", resume=None, quiet=True)
    result = evaluate(str(tmp_path / "run"), "world", model=None, seed=None, prompts=None, device="cpu")
    for name, value in result["scores"].items():
        assert value == pytest.approx(summary["after"][name]), name
    lines = render(result).splitlines()
    assert lines[0] == "suite world, miniature/masked, seed 0"
    assert any(line.split()[0] == "held_out" and "+-" in line for line in lines)
    report = (tmp_path / "run" / "report.html").read_text()
    assert "mean_without_held_out" in report and "data:image/png" in report


def test_an_unknown_suite_names_the_ones_there_are():
    with pytest.raises(ConfigError, match="unknown suite 'geneval'; known: world"):
        evaluate("package:world", "geneval", model=None, seed=None, prompts=None, device="cpu")


def test_another_family_cannot_be_scored_in_the_world():
    with pytest.raises(ConfigError, match="scores the family miniature, got bagel"):
        evaluate("package:quickstart", "world", model="bagel/quickstart", seed=None, prompts=2, device="cpu")
