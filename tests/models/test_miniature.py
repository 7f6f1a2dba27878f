"""The miniature: what is trained, what a condition changes, and that draws decide everything."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from reca.models import get_variant
from reca.models.miniature.batch import GenerationBatch, LanguageBatch, example
from reca.models.miniature.config import TASKS, VARIANTS
from reca.models.miniature.generator import MASK, CellTokenizer
from reca.models.miniature.model import PARTS, MiniatureModel
from reca.randomness import RandomSource
from reca.world.language import PAD, image_rows, rows_of
from reca.world.render import observe
from reca.world.scenes import NUM_CODES, draw_scenes

KINDS = tuple(VARIANTS)
RANDOM = RandomSource(4, step=1)
IDS = torch.arange(7)
SCENES = draw_scenes(RANDOM, IDS)


@pytest.fixture(scope="module", params=KINDS)
def model(request) -> MiniatureModel:
    torch.manual_seed(0)
    return MiniatureModel(VARIANTS[request.param].config)


def captions(texts: list[str], codes: torch.Tensor = SCENES, dropout: float = 0.0) -> GenerationBatch:
    tokens = rows_of(texts)
    return GenerationBatch(
        sample_ids=IDS[: len(texts)],
        num_images=len(texts),
        num_tokens=tokens.numel(),
        term="text_to_image",
        tokens=tokens,
        codes=codes[: len(texts)],
        dropout=dropout,
    )


def pictures(codes: torch.Tensor = SCENES) -> GenerationBatch:
    batch = captions(["circle"] * len(codes), codes)
    pixels = observe(codes, RANDOM, IDS[: len(codes)])
    return replace(batch, term="reconstruction", tokens=image_rows(len(codes)), pixels=pixels)


def loss(model: MiniatureModel, batch: GenerationBatch) -> torch.Tensor:
    (value,) = model(batch, model.draw(batch, RANDOM)).values()
    return value


@pytest.mark.parametrize("kind", KINDS)
def test_the_sizes_are_those_of_a_miniature(kind):
    family, variant = get_variant(f"miniature/{kind}")
    model = family.build(variant.config)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert 500_000 < total < 600_000
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == set(PARTS)


def test_only_the_generator_is_trained_unless_told_otherwise(model):
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"generator"}
    model.train_only("projector", "trunk")
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"projector", "trunk"}
    model.train_only("generator")


@pytest.mark.parametrize("task", TASKS)
def test_every_task_yields_its_own_term_with_a_count_and_gradients(model, task):
    batch = example(VARIANTS[model.config.generator], task, 3)
    model.train_only("trunk", "generator")
    draws = model.draw(batch, RANDOM)
    terms = model(batch, draws)
    assert set(terms) == set(draws.counts) == {task}
    terms[task].backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert batch.num_tokens > 0 and model.flops(batch) > 0
    model.zero_grad()
    model.train_only("generator")


def test_the_loss_is_a_function_of_batch_and_draws(model):
    batch = pictures()
    assert torch.equal(loss(model, batch), loss(model, batch))
    assert not torch.equal(
        loss(model, batch), model(batch, model.draw(batch, RANDOM.at(2)))["reconstruction"]
    )


def test_gradients_do_not_depend_on_how_a_step_is_cut(model):
    whole = pictures()
    rows = (slice(0, 3), slice(3, 7))
    parts = [
        replace(
            whole,
            sample_ids=whole.sample_ids[r],
            tokens=whole.tokens[r],
            pixels=whole.pixels[r],
            codes=whole.codes[r],
        )
        for r in rows
    ]
    torch.testing.assert_close(loss(model, whole), sum(loss(model, part) for part in parts))


def test_padding_on_the_right_changes_nothing(model):
    short = captions(["red circle", "ring", "two cross"])
    padding = torch.full((3, 4), PAD)
    long = replace(short, tokens=torch.cat([short.tokens, padding], dim=1))
    torch.testing.assert_close(loss(model, short), loss(model, long))


def test_a_dropped_condition_leaves_nothing_of_the_caption(model):
    texts, others = ["red circle", "ring", "two cross"], ["cross", "blue square", "one ring"]
    assert not torch.equal(loss(model, captions(texts)), loss(model, captions(others)))
    torch.testing.assert_close(
        loss(model, captions(texts, dropout=1.0)), loss(model, captions(others, dropout=1.0))
    )


def test_what_is_seen_changes_the_loss_and_a_rotation_hides_it(model):
    batch = pictures()
    dim = model.config.dim
    other = replace(batch, pixels=batch.pixels.roll(1, dims=0))
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(1))).Q
    assert not torch.equal(loss(model, batch), loss(model, other))
    assert not torch.equal(loss(model, batch), loss(model, replace(batch, rotation=rotation)))
    torch.testing.assert_close(loss(model, batch), loss(model, replace(batch, rotation=torch.eye(dim))))


def test_a_frozen_trunk_costs_no_gradient_and_a_trained_one_gets_it(model):
    for parts, reached in ((("generator",), {"generator"}), (("generator", "trunk"), {"generator", "trunk"})):
        model.train_only(*parts)
        loss(model, pictures()).backward()
        assert {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None} == reached
        model.zero_grad()
    model.train_only("generator")


def test_the_masked_loss_counts_hidden_cells_only():
    torch.manual_seed(0)
    model = MiniatureModel(VARIANTS["masked"].config)
    batch = captions(["circle"] * 7)
    draws = model.draw(batch, RANDOM)
    assert int(draws.counts["text_to_image"]) == int(draws.is_masked.sum())
    assert draws.is_masked.any(dim=1).all()
    memory, is_visible = model.read(batch)
    shown = torch.where(draws.is_masked, MASK, batch.codes)
    logits = model.generator(shown, memory, is_visible)
    expected = torch.nn.functional.cross_entropy(
        logits[draws.is_masked], batch.codes[draws.is_masked], reduction="sum"
    )
    torch.testing.assert_close(model(batch, draws)["text_to_image"], expected)


def test_every_number_of_hidden_cells_is_drawn():
    model = MiniatureModel(VARIANTS["masked"].config)
    codes = SCENES[:1].expand(4000, -1)
    batch = replace(captions(["circle"]), sample_ids=torch.arange(4000), codes=codes)
    counts = torch.bincount(model.draw(batch, RANDOM).is_masked.sum(dim=1), minlength=5) / 4000
    torch.testing.assert_close(counts, torch.tensor([0.0, 0.25, 0.25, 0.25, 0.25]), atol=0.03, rtol=0)


def test_latents_of_cells_decode_to_the_code_they_came_from():
    tokenizer = CellTokenizer(18)
    codes = torch.arange(NUM_CODES).view(1, -1)
    latents = tokenizer.encode(codes)
    assert torch.equal(tokenizer.decode(latents), codes)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(tokenizer.decode(latents + 0.05 * noise), codes)
    torch.testing.assert_close(latents.square().mean(), torch.tensor(1.0))


def test_labels_outside_answers_count_nothing():
    torch.manual_seed(0)
    model = MiniatureModel(VARIANTS["masked"].config)
    batch = example(VARIANTS["masked"], "image_to_text", 2)
    assert isinstance(batch, LanguageBatch)
    labels = torch.full_like(batch.labels, -100)
    labels[:, 5] = 9
    draws = model.draw(replace(batch, labels=labels), RANDOM)
    assert int(draws.counts["image_to_text"]) == 2
    hidden, _ = model.trunk(model.embed(batch))
    expected = torch.nn.functional.cross_entropy(
        model.trunk.head(hidden[:, 5]), labels[:, 5], reduction="sum"
    )
    torch.testing.assert_close(model(replace(batch, labels=labels), draws)["image_to_text"], expected)
