"""Show-o's sampler: codes that are filled in, passes that are spared, pictures that ignore their batch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from reca.errors import ConfigError
from reca.models.family import SampleOptions
from reca.models.showo.batch import MaskedExample, collate_masked
from reca.models.showo.config import VARIANTS
from reca.models.showo.model import ShowoModel
from reca.models.showo.sampler import UNKNOWN, Canvas, ShowoSampler, fill
from reca.randomness import RandomSource

KINDS = ("tiny-clip", "tiny-vq")
OPTIONS = SampleOptions(steps=4, text_guidance=3.0, image_guidance=1.5)


def sampler(kind: str) -> ShowoSampler:
    torch.manual_seed(0)
    return ShowoSampler(ShowoModel(VARIANTS[kind].config), VARIANTS[kind])


def photo(seed: int, width: int = 50, height: int = 40) -> Image.Image:
    """Blocks of colour: noise would look the same to a small encoder."""
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 20, width // 25, 3), dtype=np.uint8)
    pixels = blocks.repeat(20, axis=0).repeat(25, axis=1)
    return Image.fromarray(pixels)


def canvas(model: ShowoModel, text: tuple[int, ...]) -> Canvas:
    example = MaskedExample(
        text=text,
        pixels=torch.empty(3, 0, 0),
        num_masked=model.config.num_codes,
        is_reconstruction=False,
        num_tokens=0,
    )
    return Canvas(model, collate_masked(model.config, [example], [0]))


def draws(step: int) -> tuple[Tensor, Tensor]:
    source, sample = RandomSource(5, step), torch.tensor([0])
    return 1e-6 + source.uniform("e", sample, 16 * 64).view(16, 64), source.uniform("u", sample, 16)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_depends_on_its_prompt_its_number_and_the_seed_only(kind: str) -> None:
    painter = sampler(kind)
    together = painter.text_to_image(["a fox", "a bench"], (64, 64), OPTIONS)
    alone = painter.text_to_image(["a bench"], (64, 64), replace(OPTIONS, first_index=1))
    assert together[0].size == (64, 64)
    assert together[1].tobytes() == alone[0].tobytes()
    others = (replace(OPTIONS, first_index=2), replace(OPTIONS, first_index=1, seed=1))
    for options in others:
        assert painter.text_to_image(["a bench"], (64, 64), options)[0].tobytes() != alone[0].tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_reconstructions_have_the_size_of_training_and_depend_on_the_image(kind: str) -> None:
    painter = sampler(kind)
    first, second = painter.reconstruct([photo(1), photo(2)], ["describe", "describe"], OPTIONS)
    again = painter.reconstruct([photo(2)], ["describe"], replace(OPTIONS, first_index=1))
    assert first.size == (64, 64)
    assert second.tobytes() == again[0].tobytes()
    other = painter.reconstruct([photo(3)], ["describe"], replace(OPTIONS, first_index=1))
    assert other[0].tobytes() != second.tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_understanding_is_one_vector_for_each_image(kind: str) -> None:
    painter = sampler(kind)
    vectors = painter.understand([photo(1), photo(2)])
    assert vectors.shape == (2, 64) and vectors.dtype == torch.float32
    torch.testing.assert_close(painter.understand([photo(2)])[0], vectors[1])
    assert not torch.allclose(vectors[0], vectors[1])
    assert painter.understand([]).shape == (0, 64)


def test_known_codes_stay_and_the_rest_is_known_after_the_last_step() -> None:
    painter = sampler("tiny-vq")
    known = torch.full((16,), UNKNOWN)
    known[:5] = torch.tensor([3, 63, 0, 7, 9])
    with torch.no_grad():
        full, without = canvas(painter.model, (1, 2)), canvas(painter.model, ())
        steps = list(fill(full, without, known, steps=5, guidance=2.0, draws=draws))
    assert all(torch.equal(step.sampled[:5], known[:5]) for step in steps)
    assert int(steps[-1].sampled.min()) >= 0 and int(steps[-1].sampled.max()) < 64
    # floor(16 cos(pi / 2 ratio)), but always fewer than before
    assert [int(step.masked.sum()) for step in steps] == [10, 9, 8, 4, 1]


def test_a_guidance_of_one_spares_the_pass_that_it_would_ignore(monkeypatch: pytest.MonkeyPatch) -> None:
    painter, calls = sampler("tiny-vq"), list[int]()
    logits = Canvas.logits

    def counted(self: Canvas, codes: Tensor) -> Tensor:
        calls.append(len(codes))
        return logits(self, codes)

    monkeypatch.setattr(Canvas, "logits", counted)
    painter.text_to_image(["a fox"], (64, 64), OPTIONS)
    assert len(calls) == 2 * OPTIONS.steps
    calls.clear()
    painter.text_to_image(["a fox"], (64, 64), replace(OPTIONS, text_guidance=1.0))
    assert len(calls) == OPTIONS.steps


def test_guidance_moves_the_logits_away_from_those_without_the_condition() -> None:
    painter = sampler("tiny-vq")
    unknown = torch.full((16,), UNKNOWN)
    with torch.no_grad():
        full, without = canvas(painter.model, (1, 2, 3)), canvas(painter.model, ())
        step = next(iter(fill(full, without, unknown, steps=2, guidance=3.0, draws=draws)))
    assert step.without is not None
    expected = (step.without + 3 * (step.full - step.without)).softmax(dim=-1)
    torch.testing.assert_close(step.probabilities, expected)
    assert not torch.allclose(expected, step.full.softmax(dim=-1))


def test_what_the_family_cannot_do_is_said() -> None:
    painter = sampler("tiny-vq")
    with pytest.raises(ConfigError, match="Show-o cannot edit: it was never trained"):
        painter.edit([photo(1)], ["make it red"], OPTIONS)
    with pytest.raises(ConfigError, match="picture of 64x96: this variant makes 64x64 pixels only"):
        painter.text_to_image(["a fox"], (64, 96), OPTIONS)
