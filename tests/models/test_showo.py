"""Show-o's training path: parity with the official tensors, the three tasks, and what no cut may change."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reca.errors import ConfigError, DataError
from reca.layers.attention import set_attention_backend
from reca.models.family import Pack
from reca.models.parity import compare, read_pack
from reca.models.showo.batch import (
    ChatExample,
    MaskedExample,
    ShowoBatch,
    collate_chats,
    collate_masked,
)
from reca.models.showo.config import IGNORED, VARIANTS, ShowoConfig
from reca.models.showo.flops import pairs
from reca.models.showo.magvit import Magvit
from reca.models.showo.model import ShowoModel
from reca.models.showo.parity import reproduce
from reca.models.showo.parity_training import attention_mask
from reca.models.showo.sequence import IMAGE, reconstruction, text_to_image
from reca.models.showo.transformer import Layout
from reca.randomness import RandomSource

PACKS = Path(__file__).parents[1] / "data" / "parity" / "showo"
CLIP: ShowoConfig = VARIANTS["tiny-clip"].config
VQ: ShowoConfig = VARIANTS["tiny-vq"].config
TINY = {"clip": CLIP, "vq": VQ}
TASKS = ("reconstruction", "image_to_text", "text_to_image")
RANDOM = RandomSource(seed=3, step=7)


def tiny_model(kind: str) -> ShowoModel:
    torch.manual_seed(0)
    return ShowoModel(TINY[kind])


def examples(config: ShowoConfig, task: str) -> list[Any]:
    """Three samples of different shapes."""
    torch.manual_seed(1)
    side = config.resolution
    if task == "image_to_text":
        size = config.clip.image_size if config.clip else side
        chats: list[tuple[Sequence[int], Sequence[int]]] = [
            ([5, 6, 7, 8], [IGNORED, IGNORED, 7, 8]),
            ([9, 10, 11, 12, 13, 14, 15], [IGNORED, 10, 11, IGNORED, IGNORED, 14, IGNORED]),
            ([9, 3], [IGNORED, 3]),
        ]
        return [
            ChatExample(
                chat=tuple(chat), labels=tuple(labels), pixels=torch.rand(3, size, size) * 2 - 1, num_tokens=9
            )
            for chat, labels in chats
        ]
    return [
        MaskedExample(
            text=tuple(text),
            pixels=torch.rand(3, side, side) * 2 - 1,
            num_masked=count,
            is_reconstruction=task == "reconstruction",
            num_tokens=9,
        )
        for text, count in (([5, 6, 7], 9), ([], 16), ([9], 1))
    ]


def collate(config: ShowoConfig, entries: Sequence[Any], ids: Sequence[int]) -> ShowoBatch:
    if isinstance(entries[0], ChatExample):
        return collate_chats(config, entries, ids)
    return collate_masked(config, entries, ids)


def loss_and_gradients(model: ShowoModel, *batches: ShowoBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed loss of some microbatches and the gradients that they leave behind."""
    model.zero_grad()
    losses = []
    for batch in batches:
        losses.append(model(batch, model.draw(batch, RANDOM))[batch.term])
        losses[-1].backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return torch.stack([loss.detach() for loss in losses]).sum(), found


def worst_relative(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert got.keys() == expected.keys()
    return max(float((got[n] - e).abs().max() / (e.abs().max() + 1e-3)) for n, e in expected.items())


# The official tensors


@pytest.mark.parity
@pytest.mark.parametrize("case", ["tiny_clip", "t2i", "generate"])
def test_every_tensor_and_gradient_of_the_official_code_is_reproduced(case: str) -> None:
    pack = read_pack(PACKS / case)
    result = compare(pack, reproduce(pack))
    assert result.failures == ()
    assert result.not_formed == {}


def pack_without_tokenizer(monkeypatch: pytest.MonkeyPatch) -> Pack:
    """`tiny_vq`, whose tokenizer's weights are too large to be shipped: its codes are looked up instead."""
    import json

    from safetensors.torch import load_file

    folder = PACKS / "tiny_vq"
    description = json.loads((folder / "pack.json").read_text())
    description["weights"] = {}
    inputs, expected = (load_file(folder / f"{part}.safetensors") for part in ("inputs", "expected"))
    known = [
        (inputs["recon_pixels"], expected["recon.target_codes"]),
        (expected["recon.small_pixels"], expected["recon.given_codes"]),
        (inputs["mmu_pixels"], expected["mmu.codes"]),
        (inputs["t2i_pixels"], expected["t2i.codes"]),
    ]

    def encode(self: Magvit, pixels: Tensor) -> Tensor:
        return next(
            codes for image, codes in known if image.shape == pixels.shape and torch.allclose(image, pixels)
        )

    monkeypatch.setattr(Magvit, "encode", encode)
    return Pack(folder, description, inputs, expected)


@pytest.mark.parity
def test_the_variant_without_clip_is_reproduced_from_its_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    pack = pack_without_tokenizer(monkeypatch)
    assert compare(pack, reproduce(pack)).failures == ()


@pytest.mark.parity
def test_a_pack_of_another_loss_weight_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    pack = pack_without_tokenizer(monkeypatch)
    training = {**pack.description["config"]["training"], "mmu_coeff": 0.5}
    config = {**pack.description["config"], "training": training}
    other = Pack(pack.folder, {**pack.description, "config": config}, pack.inputs, pack.expected)
    failed = {failure.split(":")[0] for failure in compare(other, reproduce(other)).failures}
    assert {"loss_total", "grad.showo.lm_head.weight"} <= failed


def test_a_pack_of_an_unknown_case_is_refused_with_the_cases_there_are() -> None:
    with pytest.raises(ConfigError, match="unknown case of a pack 'tiny_clp'; did you mean 'tiny_clip'"):
        reproduce(Pack(PACKS, {"model": "showo", "case": "tiny_clp"}, {}, {}))


# What is trained by what


def test_a_clip_reconstruction_trains_neither_embeddings_nor_projector_but_conversations_do() -> None:
    model = tiny_model("clip")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    constant = {"embed_tokens.weight"} | {name for name in trained if name.startswith("mm_projector")}
    _, found = loss_and_gradients(model, collate(CLIP, examples(CLIP, TASKS[0]), [1, 2, 3]))
    assert found.keys() == trained - constant
    _, found = loss_and_gradients(model, collate(CLIP, examples(CLIP, TASKS[1]), [1, 2, 3]))
    assert found.keys() == trained


@pytest.mark.parametrize("task", TASKS)
def test_without_clip_every_task_trains_everything(task: str) -> None:
    model = tiny_model("vq")
    _, found = loss_and_gradients(model, collate(VQ, examples(VQ, task), [1, 2, 3]))
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}


# Cuts, orders and arithmetic


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", TINY)
def test_losses_and_gradients_do_not_depend_on_microbatching(kind: str, task: str) -> None:
    model, entries, ids = tiny_model(kind), examples(TINY[kind], task), [11, 4, 900]
    loss, expected = loss_and_gradients(model, collate(TINY[kind], entries, ids))
    single = [collate(TINY[kind], [e], [i]) for e, i in zip(entries, ids, strict=True)]
    parts, got = loss_and_gradients(model, *single)
    torch.testing.assert_close(parts, loss, rtol=1e-5, atol=0)
    assert worst_relative(got, expected) < 1e-4


@pytest.mark.parametrize("task", TASKS)
def test_an_attention_back_end_changes_nothing_but_rounding(task: str) -> None:
    model, batch = tiny_model("clip"), collate(CLIP, examples(CLIP, task), [1, 2, 3])
    loss, expected = loss_and_gradients(model, batch)
    set_attention_backend(model, "reference")
    other, got = loss_and_gradients(model, batch)
    torch.testing.assert_close(other, loss, rtol=1e-5, atol=0)
    assert worst_relative(got, expected) < 1e-4


def test_draws_belong_to_the_sample_and_not_to_its_place() -> None:
    model, entries = tiny_model("clip"), examples(CLIP, TASKS[0])
    draws = model.draw(collate(CLIP, entries, [11, 4, 900]), RANDOM)
    moved = model.draw(collate(CLIP, entries[::-1], [900, 4, 11]), RANDOM)
    parts = [part % CLIP.num_codes for part in draws.masked.split((9, 16, 1))]
    mirrored = [part % CLIP.num_codes for part in moved.masked.split((1, 16, 9))]
    assert all(torch.equal(a, b) for a, b in zip(parts, mirrored[::-1], strict=True))
    assert [len(part.unique()) for part in parts] == [9, 16, 1]
    assert int(draws.counts["reconstruction"]) == 26
    assert not torch.equal(
        model.draw(collate(CLIP, entries, [11, 4, 900]), RANDOM.at(8)).masked, draws.masked
    )


def test_known_codes_give_the_step_that_pixels_give() -> None:
    model, entries = tiny_model("vq"), examples(VQ, TASKS[0])
    pixels = torch.stack([entry.pixels for entry in entries])
    codes, given = model.magvit.encode(pixels), model.magvit.encode(model.shrink(pixels))
    cached = [
        MaskedExample(
            text=e.text,
            pixels=torch.empty(3, 0, 0),
            num_masked=e.num_masked,
            is_reconstruction=True,
            num_tokens=9,
            codes=c,
            given=g,
        )
        for e, c, g in zip(entries, codes, given, strict=True)
    ]
    batches = [collate(VQ, entries, [1, 2, 3]), collate(VQ, cached, [1, 2, 3])]
    expected, got = (model(b, model.draw(b, RANDOM))["reconstruction"] for b in batches)
    assert torch.equal(got, expected)


def test_a_batch_without_any_answer_gives_zero_and_no_gradient_that_is_not_finite() -> None:
    entry = ChatExample(chat=(5, 6), labels=(IGNORED,) * 2, pixels=torch.zeros(3, 56, 56), num_tokens=2)
    model, batch = tiny_model("clip"), collate_chats(CLIP, [entry], [0])
    loss, found = loss_and_gradients(model, batch)
    assert float(loss) == 0 and int(model.draw(batch, RANDOM).counts["image_to_text"]) == 0
    assert all(float(gradient.abs().max()) == 0 for gradient in found.values())


def test_bf16_keeps_loss_and_gradients_in_fp32() -> None:
    model, batch = tiny_model("clip"), collate(CLIP, examples(CLIP, TASKS[1]), [1, 2, 3])
    loss, expected = loss_and_gradients(model, batch)
    assert model.vision is not None
    model.vision.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, got = loss_and_gradients(model, batch)
    assert rounded.dtype == torch.float32
    assert {gradient.dtype for gradient in got.values()} == {torch.float32}
    torch.testing.assert_close(rounded, loss, rtol=2e-2, atol=0)
    flat, flat_expected = (torch.cat([g[n].flatten() for n in sorted(g)]) for g in (got, expected))
    assert torch.cosine_similarity(flat, flat_expected, dim=0) > 0.999


@pytest.mark.slow
def test_every_block_compiles_as_one_graph_with_equal_results() -> None:
    model, batch = tiny_model("clip"), collate(CLIP, examples(CLIP, TASKS[0]), [1, 2, 3])
    loss, expected = loss_and_gradients(model, batch)
    for block in model.blocks():
        block.compile(fullgraph=True, backend="aot_eager")
    compiled, got = loss_and_gradients(model, batch)
    torch.testing.assert_close(compiled, loss, rtol=1e-5, atol=0)
    assert worst_relative(got, expected) < 1e-4


# Sequences


def test_positions_count_the_official_padding_though_no_padding_is_stored() -> None:
    config: ShowoConfig = VARIANTS["clip-512"].config
    blocks = reconstruction(config, (7,) * 16)
    image = next(block for block in blocks if IMAGE in block.ids)
    assert (image.positions[0], image.positions[-1]) == (705, 1728)
    assert sum(block.rows for block in blocks) == 1730 - 107 - 1
    captioned = text_to_image(config, (7,) * 10)
    assert (captioned[0].positions[0], captioned[1].positions[-1]) == (564, 1602)
    vq = reconstruction(VARIANTS["vq-512"].config, (7,) * 16)
    assert (vq[0].positions[0], vq[-1].positions[-1]) == (363, 1665)


def test_a_caption_too_long_is_cut_and_still_ends_with_its_end() -> None:
    words = text_to_image(CLIP, range(1, 400))[0]
    assert words.rows == CLIP.max_text + 1
    assert words.ids[:3] == (CLIP.special.t2i, CLIP.special.sot, 1) and words.ids[-1] == CLIP.special.eot


@pytest.mark.parametrize(("kind", "most"), [("clip", 507), ("vq", 509)])
def test_an_instruction_too_long_is_refused_with_the_most_there_is_room_for(kind: str, most: int) -> None:
    reconstruction(TINY[kind], (7,) * most)
    with pytest.raises(DataError, match=f"has {most + 1} tokens, this variant holds at most {most}"):
        reconstruction(TINY[kind], (7,) * (most + 1))


def test_full_blocks_stand_kind_by_kind_and_causal_ones_follow_sample_by_sample() -> None:
    layout = Layout.of([reconstruction(CLIP, (5, 6)), reconstruction(CLIP, (5,))])
    assert layout.order == ((0, 0), (1, 0), (0, 3), (1, 3), (0, 1), (0, 2), (1, 1), (1, 2))
    assert layout.plan.full.segments.query_rows == 2 * (16 + 16)


def test_a_causal_block_that_continues_another_one_shares_its_segment() -> None:
    causal = Layout.of([reconstruction(CLIP, (5, 6)), reconstruction(CLIP, (5,))]).plan.causal
    assert causal.segments.query_lengths == (2 + 6, 2 + 5)
    assert causal.segments.key_lengths == (16 + 2 + 6, 16 + 2 + 5)
    apart = Layout.of([reconstruction(TINY["vq"], (5, 6))]).plan.causal  # the image stands between them
    assert apart.segments.query_lengths == (1, 4)


def test_each_row_lies_where_every_segment_that_sees_it_reads_it() -> None:
    layout = Layout.of([reconstruction(CLIP, (5, 6)), reconstruction(CLIP, (5,))])
    blocks = torch.arange(len(layout.positions)).split(layout.lengths)
    pieces = [blocks[index] for view in layout.plan.views for index in view.pieces]
    read = torch.cat(pieces)  # stored row at each place
    places = layout.plan.places
    assert places.shape == (len(layout.positions), 3)
    rows = torch.arange(len(places))[:, None].expand_as(places)[places >= 0]
    assert torch.equal(rows, read[places[places >= 0]])
    assert torch.equal(places[places >= 0].sort().values, torch.arange(sum(layout.plan.key_rows)))


def test_tasks_do_not_mix_in_a_microbatch() -> None:
    mixed = [examples(CLIP, TASKS[0])[0], examples(CLIP, TASKS[2])[0]]
    with pytest.raises(ValueError, match="a microbatch has one task"):
        collate_masked(CLIP, mixed, [0, 1])
    with pytest.raises(ValueError, match="expected one id per example, got 2 and 1"):
        collate_masked(CLIP, mixed, [0])
    entry = ChatExample(chat=(5, 6), labels=(5, 6), pixels=torch.zeros(3, 56, 56), num_tokens=2)
    with pytest.raises(ValueError, match="its first label must be ignored"):
        collate_chats(CLIP, [entry], [0])


# Full size, without memory


def full_batch(variant: str, task: str, num_samples: int) -> ShowoBatch:
    """Samples of mean size: 652 of 1024 codes masked, 30 words, 200 words of chat with 140 of answers."""
    config: ShowoConfig = VARIANTS[variant].config
    given = None if config.clip else torch.zeros(config.num_given, dtype=torch.int64)
    if task == "image_to_text":
        side = config.clip.image_size if config.clip else config.resolution
        given = None if config.clip else torch.zeros(config.num_codes, dtype=torch.int64)
        chat = ChatExample(
            chat=(7,) * 200,
            labels=(IGNORED,) * 60 + (5,) * 140,
            pixels=torch.zeros(3, side, side),
            num_tokens=0,
            given=given,
        )
        return collate_chats(config, [chat] * num_samples, range(num_samples))
    entry = MaskedExample(
        text=(7,) * 30,
        pixels=torch.zeros(3, config.resolution, config.resolution),
        num_masked=652 * config.num_codes // 1024,
        is_reconstruction=task == "reconstruction",
        num_tokens=0,
        codes=torch.zeros(config.num_codes, dtype=torch.int64),
        given=given,
    )
    return collate_masked(config, [entry] * num_samples, range(num_samples))


@pytest.mark.parametrize("task", TASKS)
def test_the_pairs_that_are_counted_are_those_that_the_masks_show(task: str) -> None:
    layout = collate(CLIP, examples(CLIP, task), [1, 2, 3]).layout
    assert pairs(layout.plan) == int(attention_mask(layout).sum())


def test_the_least_flops_of_a_full_size_step_are_those_of_the_published_analysis() -> None:
    with torch.device("meta"):
        model = ShowoModel(VARIANTS["clip-512"].config)
    least = sum(model.flops(full_batch("clip-512", task, 2)) for task in TASKS[:2])
    assert abs(least / 41.3e12 - 1) < 0.03
