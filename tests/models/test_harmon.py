"""Harmon's training path: parity with the official tensors, three tasks, what no cut of a step may change."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from reca.errors import CheckpointError, ConfigError
from reca.layers.attention import set_attention_backend
from reca.models.family import Pack
from reca.models.harmon.batch import (
    GenerationBatch,
    GenerationDraws,
    GenerationExample,
    ImageToTextBatch,
    ImageToTextExample,
    ReconstructionBatch,
    TextToImageBatch,
    collate_generation,
    collate_image_to_text,
)
from reca.models.harmon.checkpoint import harmon_slots
from reca.models.harmon.config import VARIANTS, HarmonConfig
from reca.models.harmon.mar import resized_positions
from reca.models.harmon.model import HarmonModel
from reca.models.harmon.parity import reproduce
from reca.models.harmon.parity_training import record
from reca.models.harmon.processor import HarmonProcessor
from reca.models.parity import compare, read_pack
from reca.randomness import RandomSource

PACKS = Path(__file__).parents[1] / "data" / "parity" / "harmon"
VARIANT = VARIANTS["tiny"]
TINY: HarmonConfig = VARIANT.config
PLAIN = dataclasses.replace(TINY, mar=dataclasses.replace(TINY.mar, attn_dropout=0.0, proj_dropout=0.0))
RANDOM = RandomSource(seed=3, step=7)
IDS = [11, 4, 900]
TEXTS: dict[str, list[Any]] = {
    "reconstruction": ["describe", None, "what is to be seen in it?"],
    "text_to_image": ["a cat", None, "a dog on grass"],
    "image_to_text": [[("what?", "a cat"), ("and?", "a dog")], [("<image>\nwhy", "because")], [("a", "b")]],
}


def tiny_model(config: HarmonConfig = PLAIN) -> HarmonModel:
    """A tiny model without zero weights, so that everything trained has a gradient."""
    torch.manual_seed(0)
    model = HarmonModel(config)
    for module in (model.diffusion_head.output, model.diffusion_head.modulation):
        torch.nn.init.normal_(module.weight, std=0.1)
    for block in model.diffusion_head.blocks:
        torch.nn.init.normal_(block.modulation.weight, std=0.1)
    return model


def photographs() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    sizes = [(48, 64), (40, 40), (64, 33)]
    return [Image.fromarray(generator.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sizes]


def examples(task: str) -> tuple[HarmonProcessor, list[Any]]:
    processor = HarmonProcessor(VARIANT, task=task)
    samples = zip(photographs(), TEXTS[task], IDS, strict=True)
    return processor, [processor.prepare(image, text, RANDOM, i) for image, text, i in samples]


def tiny_batch(task: str = "reconstruction", chosen: Sequence[int] = (0, 1, 2)) -> Any:
    processor, prepared = examples(task)
    return processor.collate([prepared[i] for i in chosen], [IDS[i] for i in chosen])


def loss_and_gradients(model: HarmonModel, *batches: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed loss of some microbatches and the gradients that they leave behind."""
    model.zero_grad()
    losses = []
    for batch in batches:
        (loss,) = model(batch, model.draw(batch, RANDOM)).values()
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def visible_tokens(draws: GenerationDraws, batch: GenerationBatch, buffers: int) -> Tensor:
    """[visible tokens], index into the tokens of all images: the encoder's rows that are no buffer."""
    own = draws.encoder_rows[len(batch.encoding.whole) :] - buffers
    return own[own >= 0]


def worst_relative(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest error of a gradient, relative to the largest entry of its tensor."""
    assert got.keys() == expected.keys()
    largest = max(float(e.abs().max()) for e in expected.values())
    # key biases without rotary have an exactly zero gradient: only rounding
    return max(
        float((got[n] - e).abs().max() / max(float(e.abs().max()), 1e-6 * largest))
        for n, e in expected.items()
    )


# The official tensors


@pytest.mark.parity
@pytest.mark.parametrize("case", ["tiny_huge", "image2text", "diffloss", "generate_recon", "vae"])
def test_every_tensor_and_gradient_of_the_official_code_is_reproduced(case: str) -> None:
    pack = read_pack(PACKS / case)
    reproduction = reproduce(pack)
    assert compare(pack, reproduction).failures == ()
    assert reproduction.not_formed == {}


@pytest.mark.parity
@pytest.mark.parametrize("case", ["tiny_huge", "image2text"])
def test_a_pack_of_another_gradient_scale_fails_in_the_encoder_alone(case: str) -> None:
    pack = read_pack(PACKS / case)
    config = {**pack.description["config"], "grad_scale": 0.2}
    other = Pack(pack.folder, {**pack.description, "config": config}, pack.inputs, pack.expected)
    failed = {failure.split(":")[0] for failure in compare(other, reproduce(other)).failures}
    assert {"grad.proj_in.0.weight", "grad.mar.z_proj.weight"} <= failed
    assert not {"loss", "grad.llm.model.layers.1.mlp.up_proj.weight"} & failed


def test_a_pack_of_an_unknown_kind_is_refused_with_the_kinds_there_are() -> None:
    with pytest.raises(ConfigError, match="unknown kind of pack 'recom'; did you mean 'recon'"):
        reproduce(Pack(PACKS, {"model": "harmon", "config": {"kind": "recom"}}, {}, {}))


def test_an_official_configuration_that_cannot_be_honoured_is_refused() -> None:
    official = read_pack(PACKS / "tiny_huge").description["config"]
    assert HarmonConfig.from_official(official).mar.buffer_size == 4
    with pytest.raises(CheckpointError, match="tie_word_embeddings=False is not supported"):
        HarmonConfig.from_official({**official, "llm": {**official["llm"], "tie_word_embeddings": False}})
    with pytest.raises(CheckpointError, match="mar: key 'buffer_size' is missing"):
        mar = {key: value for key, value in official["mar"].items() if key != "buffer_size"}
        HarmonConfig.from_official({**official, "mar": mar})


# Sequences and masks


def test_the_type_of_a_batch_is_its_task_and_names_its_loss() -> None:
    model = tiny_model()
    kinds = {
        "reconstruction": ReconstructionBatch,
        "text_to_image": TextToImageBatch,
        "image_to_text": ImageToTextBatch,
    }
    for task, kind in kinds.items():
        batch = tiny_batch(task)
        draws = model.draw(batch, RANDOM)
        assert type(batch) is kind
        assert set(model(batch, draws)) == set(draws.counts) == {task}


def test_masked_and_visible_tokens_partition_every_image_in_raster_order() -> None:
    model, batch = tiny_model(), tiny_batch()
    draws = model.draw(batch, RANDOM)
    buffers = model.config.mar.buffer_size
    visible = visible_tokens(draws, batch, buffers)
    assert sorted(torch.cat([visible, draws.masked]).tolist()) == list(range(3 * 64))
    for rows, lengths in ((visible, batch.num_visible), (draws.masked, batch.num_masked)):
        for index, part in enumerate(rows.split(lengths)):
            assert (part // 64 == index).all() and (part.diff() > 0).all()
    # in the decoder's canvases each image has its buffers before its tokens
    assert torch.equal(draws.masked_rows - draws.masked, (draws.masked // 64 + 1) * buffers)
    assert int(draws.counts["reconstruction"]) == 4 * sum(batch.num_masked) == len(draws.time)
    assert int(draws.time.min()) >= 0 and int(draws.time.max()) <= 999
    assert min(batch.num_masked) >= math.ceil(0.7 * 64)


def test_all_tokens_may_be_masked() -> None:
    example = GenerationExample(torch.randn(64, 16), (8, 8), (5, 6, 7, 8, 9, 3, 1), 64, 0)
    batch = collate_generation(TINY, [example], [1], with_understanding=True)
    _, grads = loss_and_gradients(tiny_model(), batch)
    assert all(torch.isfinite(gradient).all() for gradient in grads.values())


def test_a_later_token_changes_no_earlier_row_of_the_language_model() -> None:
    model, batch = tiny_model(), tiny_batch("image_to_text")
    changed = dataclasses.replace(batch.sequences, token_ids=batch.sequences.token_ids.clone())
    changed.token_ids[-1] += 1

    def rows(sequences: Any) -> Tensor:
        with record({"layer": model.layers[1]}) as calls, torch.no_grad():
            model(dataclasses.replace(batch, sequences=sequences), model.draw(batch, RANDOM))
        return calls["layer"][0][1].rows

    same = (rows(batch.sequences) == rows(changed)).all(dim=1)
    assert same[:-1].all() and not same[-1]


def test_a_dialogue_without_labels_is_a_defined_zero() -> None:
    example = ImageToTextExample(torch.randn(64, 16), (8, 8), (5,) * 9, (-100,) * 9, 0)
    batch = collate_image_to_text(TINY, [example, example], [1, 2])
    model = tiny_model()
    draws = model.draw(batch, RANDOM)
    (loss,) = model(batch, draws).values()
    loss.backward()
    assert float(loss.detach()) == 0 and float(draws.counts["image_to_text"]) == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_position_tables_are_resized_without_their_buffers() -> None:
    table = torch.randn(1, 4 + 16, 6)
    same = resized_positions(table, 4, 4, (4, 4))
    assert torch.equal(same, table[0])
    doubled = resized_positions(table, 4, 4, (8, 8))
    assert torch.equal(doubled[:4], table[0, :4]) and doubled.shape == (68, 6)
    # a corner lies outside of the centres of the old cells: bilinear interpolation repeats the edge
    torch.testing.assert_close(doubled[4], table[0, 4])
    torch.testing.assert_close(doubled[5], 0.75 * table[0, 4] + 0.25 * table[0, 5])


# Cuts, orders and arithmetic


@pytest.mark.parametrize("task", TEXTS)
@pytest.mark.parametrize("config", [PLAIN, TINY], ids=["plain", "dropout"])
def test_losses_and_gradients_do_not_depend_on_microbatching(task: str, config: HarmonConfig) -> None:
    model = tiny_model(config)
    loss, expected = loss_and_gradients(model, tiny_batch(task))
    parts, got = loss_and_gradients(model, tiny_batch(task, [2]), tiny_batch(task, [0, 1]))
    torch.testing.assert_close(parts, loss, rtol=1e-5, atol=0)
    assert worst_relative(got, expected) < 1e-4


def test_draws_are_pure_and_belong_to_the_sample_not_to_its_place() -> None:
    model, batch = tiny_model(), tiny_batch()
    draws, again = model.draw(batch, RANDOM), model.draw(batch, RANDOM)
    assert torch.equal(draws.noise, again.noise) and torch.equal(draws.encoder_rows, again.encoder_rows)
    moved = tiny_batch(chosen=[2, 0, 1])
    other = model.draw(moved, RANDOM)
    masked = draws.masked_positions.split(batch.num_masked)
    assert torch.equal(other.masked_positions, torch.cat([masked[2], masked[0], masked[1]]))
    noise = draws.noise.view(4, -1, 16).split(batch.num_masked, dim=1)
    assert torch.equal(other.noise.view(4, -1, 16), torch.cat([noise[2], noise[0], noise[1]], dim=1))
    assert not torch.equal(model.draw(batch, RANDOM.at(8)).noise, draws.noise)
    assert not torch.equal(model.draw(batch, RANDOM.at(8)).encoder_rows, draws.encoder_rows)


def test_recomputing_a_block_repeats_its_dropout() -> None:
    model, batch = tiny_model(TINY), tiny_batch()
    _, expected = loss_and_gradients(model, batch)
    for block in model.blocks():
        forward = block.forward
        block.forward = lambda *args, _forward=forward: checkpoint(_forward, *args, use_reentrant=False)
    _, got = loss_and_gradients(model, batch)
    assert worst_relative(got, expected) == 0


def test_latents_from_a_cache_give_the_step_that_pixels_give() -> None:
    model, batch = tiny_model(), tiny_batch()
    images = dataclasses.replace(batch.images, kind="latents", values=model.encode_target(batch.images))
    cached = dataclasses.replace(batch, images=images)
    expected, got = (model(b, model.draw(b, RANDOM))["reconstruction"] for b in (batch, cached))
    assert torch.equal(got, expected)


def test_an_attention_back_end_changes_nothing_but_rounding() -> None:
    model, batch = tiny_model(), tiny_batch()
    loss, expected = loss_and_gradients(model, batch)
    set_attention_backend(model, "reference")
    other, got = loss_and_gradients(model, batch)
    torch.testing.assert_close(other, loss, rtol=1e-5, atol=0)
    assert worst_relative(got, expected) < 1e-4


@pytest.mark.parametrize("task", TEXTS)
def test_bf16_stays_close_to_fp32_and_keeps_loss_and_gradients_in_fp32(task: str) -> None:
    model, batch = tiny_model(), tiny_batch(task)
    loss, expected = loss_and_gradients(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, got = loss_and_gradients(model, batch)
    assert rounded.dtype == torch.float32
    assert {gradient.dtype for gradient in got.values()} == {torch.float32}
    torch.testing.assert_close(rounded, loss, rtol=3e-2, atol=0)
    head = "diffusion_head"  # one row at the last noise level may hold most of the variance's gradient
    names = sorted(name for name in got if not name.startswith(head))
    flat, flat_expected = (torch.cat([g[n].flatten() for n in names]) for g in (got, expected))
    assert torch.cosine_similarity(flat, flat_expected, dim=0) > 0.98


def test_all_but_the_autoencoder_is_trained_and_the_class_embedding_never_reached() -> None:
    model = tiny_model()
    _, grads = loss_and_gradients(model, tiny_batch(), tiny_batch("image_to_text"))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad} == {"vae"}
    assert trained - grads.keys() == {"class_embedding.weight"}


@pytest.mark.slow
def test_every_block_compiles_as_one_graph_with_equal_results() -> None:
    model, batch = tiny_model(), tiny_batch()
    loss, expected = loss_and_gradients(model, batch)
    for block in model.blocks():
        block.compile(fullgraph=True, backend="aot_eager")
    compiled, got = loss_and_gradients(model, batch)
    torch.testing.assert_close(compiled, loss, rtol=1e-5, atol=0)
    assert worst_relative(got, expected) < 1e-4


# Full size, without memory


def full_batch(config: HarmonConfig, task: str) -> GenerationBatch | ImageToTextBatch:
    """Two samples of the published lengths: 29 ids of prompt, 136 visible tokens; 253 ids of dialogue."""
    latents, grid = torch.zeros(1024, 16), (32, 32)
    if task == "image_to_text":
        dialogue = ImageToTextExample(latents, grid, (7,) * 253, (-100,) * 103 + (7,) * 150, 0)
        return collate_image_to_text(config, [dialogue] * 2, [0, 1])
    example = GenerationExample(latents, grid, (7,) * 29, 888, 0)
    return collate_generation(config, [example] * 2, [0, 1], with_understanding=True)


@pytest.mark.parametrize(
    ("name", "task", "published"),
    [
        ("1.5b", "reconstruction", 20.3e12),
        ("1.5b", "image_to_text", 14.1e12),
        ("0.5b", "reconstruction", 5.3e12),
    ],
)
def test_the_least_flops_of_a_sample_are_those_of_the_published_analysis(
    name: str, task: str, published: float
) -> None:
    with torch.device("meta"):
        model = HarmonModel(VARIANTS[name].config)
    assert model.flops(full_batch(model.config, task)) / 2 == pytest.approx(published, rel=0.02)


def test_the_recipes_decay_what_the_official_groups_decay() -> None:
    from reca.recipes.harmon import harmon_05b

    optim = harmon_05b().optim
    with torch.device("meta"):
        model = HarmonModel(VARIANTS["0.5b"].config)
    decayed = sum(
        p.numel()
        for name, p in model.named_parameters()
        if p.requires_grad and p.ndim > 1 and not any(part in name for part in optim.no_decay)
    )
    assert decayed == 668_872_192 and not optim.decay_vectors
    assert len(harmon_slots(model.config)) == 663
