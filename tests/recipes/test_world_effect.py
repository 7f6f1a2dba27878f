"""The effect itself, shortened: RecA from the shipped base teaches pairs that no caption ever named."""

from __future__ import annotations

from pathlib import Path

import pytest

from reca.recipes.api import train
from reca.recipes.resolve import resolve

# Of the 800 steps and 150 x 4 pictures that the recipe takes: enough to see it, few enough for a test.
SHORT = ("steps=240", "world.prompts=60", "world.samples=2", "checkpoint.every=240")


def after(arm: str, folder: Path) -> dict[str, float]:
    scores: dict[str, float] = train(resolve("world", (*SHORT, f"arm={arm}")).config, folder / arm)["after"]
    return scores


@pytest.mark.effect
def test_reca_teaches_unnamed_pairs_and_shuffled_embeddings_do_not(tmp_path: Path):
    control, own, shuffled = (after(arm, tmp_path) for arm in ("captions", "reca_and_captions", "shuffled"))
    gains = {name: own[name] - control[name] for name in ("held_out", "mean")}
    assert gains["held_out"] > 0.15 and gains["mean"] > 0.02, gains
    assert shuffled["held_out"] - control["held_out"] < 0.05
    assert shuffled["mean"] < control["mean"] + 0.01
    # The path that understands is frozen: nothing is forgotten.
    assert own["descriptions_of_pictures"] == control["descriptions_of_pictures"] > 0.95
