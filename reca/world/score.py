"""Exact scores of pictures given as codes, and how sure they are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from reca.randomness import RandomSource
from reca.world.prompts import ANY, HELD_OUT
from reca.world.scenes import MAX_OBJECTS, NUM_CELLS, colour_of, shape_of


def is_right(codes: Tensor, required: Tensor) -> Tensor:
    """Whether each picture shows everything its prompt asks for.

    A picture with more than three objects is wrong whatever it shows: crowding would satisfy many prompts.

    Args:
        codes: [n, 4] int64 pictures.
        required: [n, 3, 4] int64, of `Prompts`.

    Returns: [n] bool.
    """
    shape, colour, place, number = required.unsqueeze(2).unbind(dim=-1)  # each [n, 3, 1]
    cells = torch.arange(NUM_CELLS, device=codes.device)
    matches = (codes > 0)[:, None] & ((shape == ANY) | (shape_of(codes)[:, None] == shape))
    matches &= (colour == ANY) | (colour_of(codes)[:, None] == colour)
    matches &= (place == ANY) | (cells == place)
    found, number = matches.sum(dim=2), number[..., 0]
    is_met = torch.where(number == ANY, found > 0, found == number)
    is_asked = (required != ANY).any(dim=2)
    return (is_met | ~is_asked).all(dim=1) & ((codes > 0).sum(dim=1) <= MAX_OBJECTS)


@dataclass(frozen=True, slots=True)
class Score:
    """A share of right pictures.

    Attributes:
        value: mean over prompts, in [0, 1].
        standard_error: of that mean, prompts being the unit.
    """

    value: float
    standard_error: float


def score(right: Tensor) -> Score:
    """Mean and standard error of [prompts, samples] bool."""
    per_prompt = right.double().mean(dim=1)
    error = per_prompt.std() / math.sqrt(len(per_prompt)) if len(per_prompt) > 1 else torch.zeros(())
    return Score(float(per_prompt.mean()), float(error))


def mean_score(scores: Mapping[str, Score]) -> Score:
    """Mean over categories, which are independent of each other."""
    values = [one.value for one in scores.values()]
    errors = [one.standard_error**2 for one in scores.values()]
    return Score(sum(values) / len(values), math.sqrt(sum(errors)) / len(values))


def summarise(right: Mapping[str, Tensor]) -> dict[str, Score]:
    """Scores of each category ([prompts, samples] bool), `mean` and `mean_without_held_out`."""
    scores = {category: score(rows) for category, rows in right.items()}
    seen = {category: one for category, one in scores.items() if category != HELD_OUT}
    return scores | {"mean": mean_score(scores), "mean_without_held_out": mean_score(seen)}


def paired_bootstrap(
    differences: Mapping[str, Tensor], random: RandomSource, resamples: int = 2000
) -> tuple[float, float]:
    """95 % interval of the mean over categories of paired differences.

    Prompts are drawn again within each category, the same ones for both sides.

    Args:
        differences: category -> [prompts], score of one side minus that of the other on the same prompt.
        random: source of the resampling.
        resamples: how often.

    Returns: 2.5 and 97.5 percent quantiles.
    """
    means = torch.zeros(resamples, dtype=torch.float64)
    for category, rows in differences.items():
        draws = random.uniform(f"bootstrap/{category}", torch.arange(resamples), len(rows))
        means += rows.double()[(draws * len(rows)).long()].mean(dim=1)
    low, high = (
        (means / len(differences)).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    )
    return low, high
