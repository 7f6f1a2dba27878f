"""Every family's smoke recipe from end to end: it learns, draws, is exported, and goes on from its export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops

from reca.commands.sample import reconstruct_images, sample_prompts
from reca.commands.train import train_recipe
from reca.data.sources import open_source
from reca.recipes import get_recipe
from reca.recipes.export import export
from reca.recipes.proof import compare

SMOKES = (
    "bagel-smoke",
    "showo-clip-smoke",
    "showo-vq-smoke",
    "harmon-smoke",
    "openuni-smoke",
    "janus-smoke",
)
# of the last quarter's mean loss over the first's; without learning none of the six falls below 0.89
LEARNT = 0.85
OPTIONS: dict[str, Any] = {"steps": 2, "text_guidance": 1.0, "image_guidance": 1.0, "seed": 3}


def train(recipe: str, run: Path, *overrides: str, **extra: str) -> Path:
    train_recipe(recipe, overrides, extra=extra, run=run, resume=None, quiet=True)
    return run


def remaining(run: Path) -> float:
    """Mean loss of the last quarter of the steps over that of the first."""
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    quarter = len(losses) // 4
    return float(sum(losses[-quarter:]) / sum(losses[:quarter]))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: three photographs."""
    folder, source = tmp_path_factory.mktemp("photos"), open_source("package:photos")
    for item in range(3):
        (folder / source.name(item)).write_bytes(source.read(item))
    return folder


def reconstructed(weights: Path, photos: Path, out: Path, model: str | None) -> Image.Image:
    paths = sorted(photos.iterdir())[:1]
    result = reconstruct_images(str(weights), paths, "x", model=model, out=out, options=OPTIONS, device="cpu")
    return Image.open(result["images"][0])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", SMOKES)
def test_a_smoke_run_learns_draws_and_goes_on_from_its_own_export(
    recipe: str, photos: Path, tmp_path: Path
) -> None:
    run, official, model = tmp_path / "run", tmp_path / "official", get_recipe(recipe)().model
    train(recipe, run)
    assert remaining(run) < LEARNT
    drawn = sample_prompts(
        str(run), ["a bird"], model=None, out=tmp_path / "drawn", size=None, options=OPTIONS, device="cpu"
    )
    assert Image.open(drawn["images"][0]).getbbox() is not None
    export(run, official)
    assert compare(run, official, average=False)["differences"] == []
    pictures = [
        reconstructed(run, photos, tmp_path / "a", None),
        reconstructed(official, photos, tmp_path / "b", model),
    ]
    assert ImageChops.difference(*pictures).getbbox() is None
    shutil.rmtree(run)
    short = ("steps=1", "optim.warmup_steps=0", "sample.images=0", "data.images=2")
    again = train(recipe, run, *short, weights=str(official), **{"data.path": str(photos)})
    assert json.loads((again / "summary.json").read_text())["status"] == "finished"


def test_what_counts_as_learning_is_not_reached_by_a_run_that_does_not_learn(tmp_path: Path) -> None:
    assert remaining(train("openuni-smoke", tmp_path, "optim.lr=1e-12", "sample.images=0")) > LEARNT


@pytest.mark.slow
@pytest.mark.parametrize("recipe", SMOKES)
def test_a_run_in_few_bits_draws_while_it_trains_and_after(recipe: str, photos: Path, tmp_path: Path) -> None:
    few = ("compute.precision=bf16", "optim.weights=bf16", "optim.gradients=bf16", "optim.moments=8bit")
    short = ("steps=1", "optim.warmup_steps=0", "sample.images=1", "sample.steps=2", "data.images=2")
    run = train(recipe, tmp_path / "run", *few, *short)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["before"].keys() == summary["after"].keys() and summary["before"]
    assert reconstructed(run, photos, tmp_path / "a", None).getbbox() is not None
