"""What a run in the world has learnt: exact scores with standard errors, and a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reca.config import TrainConfig
from reca.errors import CheckpointError
from reca.files import write_json
from reca.models.family import SampleOptions
from reca.models.miniature.model import MiniatureModel
from reca.models.miniature.sampler import describe, generate, given
from reca.randomness import RandomSource
from reca.recipes.world.stream import TEST_IDS
from reca.sheet import contact_sheet, write_png
from reca.world.language import END, PAD, dense_caption, image_rows, rows_of
from reca.world.prompts import CATEGORIES, HELD_OUT, make_prompts
from reca.world.render import observe, picture
from reca.world.scenes import World, colour_of, draw_scenes, shape_of
from reca.world.score import Score, is_right, score, summarise

SCENES_PER_PROMPT = 2
"""Scenes that test reading and reconstruction, for each prompt of a category."""

_SHOWN = {category: 3 if category == HELD_OUT else 1 for category in CATEGORIES}  # prompts on the sheet
_SHOWN_SAMPLES = 3
_CELL = 72  # pixels of a picture on the sheet


@dataclass(frozen=True, slots=True)
class Drawn:
    """Pictures drawn for a category's prompts, and which are right.

    Attributes:
        texts: the prompts.
        codes: [prompts, samples, 4].
        right: [prompts, samples] bool.
    """

    texts: tuple[str, ...]
    codes: Tensor
    right: Tensor


def draw_prompts(
    model: MiniatureModel, world: World, *, seed: int, prompts: int, samples: int, options: SampleOptions
) -> dict[str, Drawn]:
    """Category -> pictures; the same prompts and the same noise for every model of a seed."""
    device = model.trunk.positions.device
    drawn, first = {}, 0
    for category in CATEGORIES:
        asked = make_prompts(world, category, prompts, seed)
        rows = rows_of(asked.texts).repeat_interleave(samples, dim=0).to(device)
        codes = generate(model, given(rows), replace(options, first_index=first)).cpu()
        right = is_right(codes, asked.required.repeat_interleave(samples, dim=0))
        drawn[category] = Drawn(asked.texts, codes.view(prompts, samples, -1), right.view(prompts, samples))
        first += prompts * samples
    return drawn


def flat_scores(scores: Mapping[str, Score]) -> dict[str, float]:
    """Name -> value, and `name/standard_error` -> its standard error."""
    flat: dict[str, float] = {}
    for name, one in scores.items():
        flat |= {name: one.value, f"{name}/standard_error": one.standard_error}
    return flat


def test_scenes(seed: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """[count, 4] codes that nothing is trained on, and their pictures."""
    ids = torch.arange(count) + TEST_IDS
    codes = draw_scenes(RandomSource(seed), ids)
    return codes.to(device), observe(codes, RandomSource(seed), ids).to(device)


def read_cells(model: MiniatureModel, seed: int, count: int) -> Score:
    """Share of cells whose shape and colour the encoder's heads name."""
    codes, pixels = test_scenes(seed, count, model.trunk.positions.device)
    shape, colour = model.encoder.probe(model.encoder(pixels))
    return score((shape == shape_of(codes)) & (colour == colour_of(codes)))


def describe_scenes(model: MiniatureModel, seed: int, count: int, *, is_seen: bool) -> Score:
    """Share of scenes that the trunk describes without a fault, from a picture or from a dense caption."""
    codes, pixels = test_scenes(seed, count, model.trunk.positions.device)
    truth = dense_caption(codes)
    rows = image_rows(len(codes)).to(codes.device) if is_seen else truth
    said = describe(model, given(rows, pixels if is_seen else None))
    # What follows the end does not count; there, said and true are both padding after the cut.
    wanted = torch.zeros_like(said)
    wanted[:, : truth.shape[1] - 1] = truth[:, 1:]
    counts = wanted != PAD
    ends = torch.arange(said.shape[1], device=said.device) == counts.sum(dim=1, keepdim=True)
    return score((((said == wanted) | ~counts) & ((said == END) | ~ends)).all(dim=1)[:, None])


def reconstruct_scenes(model: MiniatureModel, seed: int, count: int, options: SampleOptions) -> Score:
    """Share of scenes that are drawn again without a fault from their own embeddings, without guidance."""
    codes, pixels = test_scenes(seed, count, model.trunk.positions.device)
    rows = image_rows(len(codes)).to(codes.device)
    again = generate(model, given(rows, pixels), replace(options, text_guidance=1.0))
    return score((again == codes).all(dim=1)[:, None])


@dataclass(frozen=True, slots=True)
class WorldEvaluation:
    """Called by the engine as `evaluate(step, folder)`; deterministic, and equal for a resumed run.

    Attributes:
        model: what is evaluated.
        config: of the run.
        options: how pictures are sampled.
    """

    model: MiniatureModel
    config: TrainConfig
    options: SampleOptions

    def __call__(self, step: int, folder: Path) -> dict[str, float]:
        """Scores of the stage; generators also leave `scores-N.json` and the sheet `step-N.png` behind."""
        world, seed = self.config.world, self.config.seed
        assert world is not None
        count = SCENES_PER_PROMPT * world.prompts
        if world.stage == "encoder":
            return flat_scores({"cells": read_cells(self.model, seed, count)})
        scores = {"descriptions_of_captions": describe_scenes(self.model, seed, count, is_seen=False)}
        if world.stage == "language":
            return flat_scores(scores)
        scores["descriptions_of_pictures"] = describe_scenes(self.model, seed, count, is_seen=True)
        if world.stage == "alignment":
            return flat_scores(scores)
        drawn = draw_prompts(
            self.model,
            World.of(world.held_out),
            seed=seed,
            prompts=world.prompts,
            samples=world.samples,
            options=self.options,
        )
        _write_scores(folder, step, drawn)
        _write_sheet(folder, step)
        scores |= {"reconstruction": reconstruct_scenes(self.model, seed, count, self.options)}
        scores = summarise({category: one.right for category, one in drawn.items()}) | scores
        return flat_scores(scores) | self._gain(step, folder, scores["mean"])

    def _gain(self, step: int, folder: Path, now: Score) -> dict[str, float]:
        """How much the mean rose over the last quarter, if both ends were scored."""
        earlier = self.config.steps * 3 // 4
        if step != self.config.steps or not scores_path(folder, earlier).exists():
            return {}
        record = read_scores(folder, earlier)
        shares = [sum(one["right"]) / (len(one["right"]) * one["samples"]) for one in record.values()]
        return {"gain_of_last_quarter": now.value - sum(shares) / len(shares)}


def scores_path(folder: Path, step: int) -> Path:
    """Where an evaluation leaves what it scored, in the run's folder of samples."""
    return folder / f"scores-{step:08d}.json"


def _write_scores(folder: Path, step: int, drawn: Mapping[str, Drawn]) -> None:
    record = {
        category: {
            "right": one.right.sum(dim=1).tolist(),
            "samples": one.right.shape[1],
            "shown": [
                {"prompt": text, "codes": codes[:_SHOWN_SAMPLES].tolist()}
                for text, codes in list(dict(zip(one.texts, one.codes, strict=True)).items())[
                    : _SHOWN[category]
                ]
            ],
        }
        for category, one in drawn.items()
    }
    write_json(scores_path(folder, step), record)


def read_scores(folder: Path, step: int) -> dict[str, Any]:
    """What an evaluation left. Raises CheckpointError if it is gone."""
    path = scores_path(folder, step)
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: the scores of step {step} cannot be read ({error}); run again"
        ) from error


def _write_sheet(folder: Path, step: int) -> None:
    """The same prompts and the same noise, before the first step and now."""
    steps = (0, step) if step else (0,)
    records = [read_scores(folder, one) for one in steps]
    rows, captions = [], []
    for category in CATEGORIES:
        for shown in zip(*(record[category]["shown"] for record in records), strict=True):
            rows.append([picture(torch.tensor(codes)) for one in shown for codes in one["codes"]])
            captions.append(f"{category}: {shown[0]['prompt']}")
    titles = [title for one in steps for title in (f"step {one}", *[""] * (len(rows[0]) // len(steps) - 1))]
    write_png(
        folder / f"step-{step:08d}.png", contact_sheet(rows, columns=titles, captions=captions, cell=_CELL)
    )
