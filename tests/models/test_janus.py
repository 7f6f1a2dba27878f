"""Janus-Pro's training path: the official tensors, what is trained, and what no cut of a step may change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from reca.errors import CheckpointError, ConfigError
from reca.models.family import Pack
from reca.models.janus import FAMILY
from reca.models.janus.batch import (
    ChatExample,
    GenerationExample,
    ImageToTextBatch,
    JanusBatch,
    collate_chats,
    collate_generation,
)
from reca.models.janus.checkpoint import native_slots
from reca.models.janus.config import IGNORED, VARIANTS, JanusConfig, SpecialTokens, VQConfig
from reca.models.janus.model import JanusModel
from reca.models.janus.parity import load_pack_model, record, reproduce
from reca.models.janus.tokenizer import IMAGE
from reca.models.janus.vq import VQModel
from reca.models.parity import compare, read_pack
from reca.randomness import RandomSource

PACKS = Path(__file__).resolve().parents[1] / "data" / "parity" / "janus"
TINY: JanusConfig = VARIANTS["tiny"].config
assert TINY.special is not None
SPECIAL: SpecialTokens = TINY.special
RANDOM = RandomSource(seed=3, step=7)
SEEN = (IMAGE,) * TINY.vision.num_tokens


def tiny_model(config: JanusConfig = TINY) -> JanusModel:
    torch.manual_seed(0)
    return JanusModel(config)


def pixels(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(3, TINY.image_size, TINY.image_size, generator=generator) * 2 - 1


def image(seed: int, text: Sequence[int], *, hidden: bool = False) -> GenerationExample:
    prompt = (SPECIAL.bos, SPECIAL.boi, *SEEN, SPECIAL.eoi, *text, SPECIAL.boi)
    return GenerationExample(
        prompt=prompt,
        pixels=pixels(seed),
        num_tokens=len(prompt) + TINY.num_codes - 1,
        is_reconstruction=True,
        is_unconditional=hidden,
    )


def chat(seed: int, *turns: tuple[Sequence[int], Sequence[int]]) -> ChatExample:
    """Turns of (question, answer) ids; one more token follows the last answer, which nothing predicts."""
    ids, labels = [SPECIAL.bos, *SEEN], [IGNORED] * (1 + len(SEEN))
    for question, answer in turns:
        ids += [*question, *answer]
        labels += [*[IGNORED] * len(question), *answer]
    return ChatExample(ids=(*ids, 9), labels=(*labels, IGNORED), pixels=pixels(seed))


def examples() -> list[GenerationExample]:
    """Three samples of different lengths; the second is unconditional."""
    return [image(1, [5, 6, 7]), image(2, [8], hidden=True), image(3, [9, 10])]


def images_batch(chosen: Sequence[int] = (0, 1, 2)) -> JanusBatch:
    ids = [11, 4, 900]
    picked = [examples()[index] for index in chosen]
    return collate_generation(TINY, SPECIAL.pad, picked, [ids[index] for index in chosen])


def chats_batch() -> ImageToTextBatch:
    chats = [chat(1, ([5, 6], [7, 8]), ([9], [10])), chat(2, ([5], [6, 7, 8]))]
    return collate_chats(TINY, SPECIAL.pad, chats, [3, 5])


def loss_and_gradients(model: JanusModel, *batches: JanusBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed loss of some microbatches and the gradients that they leave behind."""
    model.zero_grad()
    losses = []
    for batch in batches:
        losses.append(model(batch, model.draw(batch, RANDOM))[batch.term])
        losses[-1].backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return torch.stack([loss.detach() for loss in losses]).sum(), gradients


def worst_relative(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert got.keys() == expected.keys()
    return max(float((got[n] - e).abs().max() / e.abs().max()) for n, e in expected.items())


# The official tensors


@pytest.mark.parity
@pytest.mark.parametrize("case", ["batch", "i2t"])
def test_every_tensor_and_gradient_of_the_official_modules_is_reproduced(case: str) -> None:
    pack = read_pack(PACKS / case)
    result = compare(pack, FAMILY.reproduce(pack))
    assert result.failures == ()
    assert result.not_formed == {}


@pytest.mark.parity
def test_a_pack_of_another_architecture_fails() -> None:
    pack = read_pack(PACKS / "batch")
    config = pack.description["config"]
    text = {**config["text_config"], "rope_parameters": {"rope_type": "default", "rope_theta": 2e4}}
    other = Pack(
        pack.folder,
        {**pack.description, "config": config | {"text_config": text}},
        pack.inputs,
        pack.expected,
    )
    failed = {failure.split(":")[0] for failure in compare(other, reproduce(other)).failures}
    assert {"loss", "image_logits", "llm.layer0", "grad.model.aligner.fc1.weight"} <= failed
    assert not {"codes", "siglip", "inputs_embeds", "position_ids"} & failed


def test_a_pack_of_an_unknown_kind_is_refused_with_the_kinds_there_are() -> None:
    with pytest.raises(ConfigError, match="unknown kind of pack 'recom'; did you mean 'recon'"):
        reproduce(Pack(PACKS, {"model": "janus", "kind": "recom"}, {}, {}))


@pytest.mark.parity
def test_codes_follow_the_cosine_where_transformers_takes_the_nearest_row() -> None:
    from transformers import JanusVQVAE, JanusVQVAEConfig

    config = VQConfig(
        num_embeddings=48, latent_channels=16, base_channels=32, channel_multiplier=(1, 2), num_res_blocks=1
    )
    torch.manual_seed(0)
    official = JanusVQVAE(
        JanusVQVAEConfig(
            num_embeddings=48,
            latent_channels=16,
            base_channels=32,
            channel_multiplier=[1, 2],
            num_res_blocks=1,
            num_patches=8,
        )
    ).eval()
    ours = VQModel(config)
    tensors = official.state_dict()
    renamed = {name.replace("quantize.embedding.", "codebook."): value for name, value in tensors.items()}
    ours.load_state_dict(renamed)
    batch = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        official.quantize.embedding.weight.mul_(torch.rand(48, 1) + 0.5)
        ours.codebook.weight.copy_(official.quantize.embedding.weight)
        torch.testing.assert_close(ours.encoder(batch), official.encoder(batch), rtol=1e-4, atol=1e-5)
        nearest = official.encode(batch).image_tokens.view(2, -1)
        assert not torch.equal(ours.encode(batch), nearest)
        for table in (official.quantize.embedding.weight, ours.codebook.weight):
            table.copy_(torch.nn.functional.normalize(table, dim=-1))
        codes = official.encode(batch).image_tokens.view(2, -1)
        assert torch.equal(ours.encode(batch), codes)
        decoded = official.decode(codes)
        torch.testing.assert_close(ours.decode(codes, 8, 8), decoded, rtol=1e-4, atol=1e-5)


def test_what_has_an_official_gradient_is_trained_and_nothing_else() -> None:
    packs = [read_pack(PACKS / case) for case in ("batch", "i2t")]
    official = {n.removeprefix("grad.") for pack in packs for n in pack.expected if n.startswith("grad.")}
    model = load_pack_model(packs[0])  # the packs train the aligner as well
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {n for n, slot in native_slots(model.config).items() if slot.parameter in trained} == official


@pytest.mark.parametrize(("variant", "trained"), [("pro-1b", 1_694_769_152), ("pro-7b", 7_011_221_504)])
def test_the_full_models_train_as_many_parameters_as_the_definition_says(variant: str, trained: int) -> None:
    with torch.device("meta"):
        model = JanusModel(VARIANTS[variant].config)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [("text_config", "num_key_value_heads", 2), ("vision_config", "use_qk_norm", True)],
)
def test_a_configuration_that_no_release_has_is_refused(part: str, key: str, value: object) -> None:
    official = read_pack(PACKS / "i2t").description["config"]
    with pytest.raises(CheckpointError, match=f"{part}: {key}={value} is not supported"):
        JanusConfig.from_official(official | {part: official[part] | {key: value}})
    less = {name: entry for name, entry in official[part].items() if name != "hidden_size"}
    with pytest.raises(CheckpointError, match=f"{part}: key 'hidden_size' is missing"):
        JanusConfig.from_official(official | {part: less})


# Who sees and who learns


def test_the_loss_of_a_code_depends_on_earlier_codes_only() -> None:
    model, batch = tiny_model(), images_batch([0])
    codes = model.target_codes(batch)

    def hidden(changed: Tensor) -> Tensor:
        with torch.no_grad():
            return model.transform(model.embed(batch, changed), batch.layout).rows

    other = codes.clone()
    other[0, 10] = (other[0, 10] + 1) % TINY.vq.num_embeddings
    different = (hidden(codes) != hidden(other)).any(dim=1)
    assert not different[:11].any() and different[11:].all()
    assert len(different) == TINY.num_codes


def test_the_last_code_is_a_target_but_never_an_input() -> None:
    model, batch = tiny_model(), images_batch([0])
    codes = model.target_codes(batch)
    other = codes.clone()
    other[0, -1] = (other[0, -1] + 1) % TINY.vq.num_embeddings
    with torch.no_grad():
        assert torch.equal(model.embed(batch, codes), model.embed(batch, other))
        losses = [
            model(replace(batch, codes=c), model.draw(batch, RANDOM))["reconstruction"]
            for c in (codes, other)
        ]
    assert losses[0] != losses[1]


def test_unconditional_samples_know_neither_text_nor_image_and_are_not_encoded() -> None:
    model = tiny_model()
    batch = images_batch()
    assert batch.seen == (0, 2)
    codes = model.target_codes(batch)[1:2]
    losses = []
    for changed in (image(2, [8], hidden=True), image(5, [77], hidden=True)):
        one = collate_generation(TINY, SPECIAL.pad, [replace(changed, codes=codes[0])], [4])
        assert one.seen == () and one.layout.lengths == (len(changed.prompt) + TINY.num_codes - 1,)
        losses.append(model(one, model.draw(one, RANDOM))["reconstruction"])
    assert losses[0] == losses[1]


def test_the_pad_token_is_seen_but_never_trained() -> None:
    _, gradients = loss_and_gradients(tiny_model(), images_batch())
    table = gradients["embed_tokens.weight"]
    assert table[SPECIAL.pad].abs().max() == 0
    assert table[SPECIAL.bos].abs().max() > 0
    used = {SPECIAL.bos, SPECIAL.boi, SPECIAL.eoi, 5, 6, 7, 9, 10}
    assert set(table.abs().amax(dim=1).nonzero().flatten().tolist()) == used


def test_only_answers_are_predicted_and_only_their_rows_reach_the_head() -> None:
    model, batch = tiny_model(), chats_batch()
    # what follows the last answer is dropped, and so is the answer's last token: it predicts nothing
    assert batch.layout.lengths == (1 + len(SEEN) + 5, 1 + len(SEEN) + 3)
    assert batch.layout.tails == (4, 3)
    assert batch.labels.tolist() == [7, 8, 10, 6, 7, 8]
    assert batch.predicting.tolist() == [0, 1, 3, 4, 5, 6]
    assert model.draw(batch, RANDOM).counts["image_to_text"] == 6
    with record({"norm": model.norm}) as outputs:
        loss_and_gradients(model, batch)
    assert outputs["norm"].shape == (6, TINY.text.hidden_size)


def test_a_conversation_without_answers_adds_nothing() -> None:
    model = tiny_model()
    silent = ChatExample(ids=(1, *SEEN, 2), labels=(IGNORED,) * (2 + len(SEEN)), pixels=pixels(4))
    spoken = chat(1, ([5, 6], [7, 8]))
    alone, both = (
        collate_chats(TINY, SPECIAL.pad, chats, range(len(chats))) for chats in ([spoken], [silent, spoken])
    )
    assert both.layout.lengths[0] == 0 and both.seen == (1,)
    expected, gradients = loss_and_gradients(model, alone)
    loss, got = loss_and_gradients(model, both)
    assert torch.equal(loss, expected) and worst_relative(got, gradients) == 0
    nothing = collate_chats(TINY, SPECIAL.pad, [silent], [0])
    loss, zeros = loss_and_gradients(model, nothing)
    assert loss == 0 and all(gradient.abs().max() == 0 for gradient in zeros.values())
    assert model.draw(nothing, RANDOM).counts["image_to_text"] == 0


def test_the_aligner_is_trained_on_demand_only() -> None:
    _, frozen = loss_and_gradients(tiny_model(), images_batch())
    _, trained = loss_and_gradients(tiny_model(replace(TINY, train_aligner=True)), images_batch())
    assert trained.keys() - frozen.keys() == {
        f"aligner.{layer}.{kind}" for layer in ("fc1", "fc2") for kind in ("weight", "bias")
    }
    assert worst_relative({n: g for n, g in trained.items() if n in frozen}, frozen) == 0


# Cuts, orders and arithmetic


def test_losses_and_gradients_do_not_depend_on_microbatching_or_order() -> None:
    model = tiny_model()
    loss, expected = loss_and_gradients(model, images_batch())
    for cuts in ([(0,), (1,), (2,)], [(2, 0), (1,)]):
        parts, got = loss_and_gradients(model, *(images_batch(cut) for cut in cuts))
        torch.testing.assert_close(parts, loss, rtol=1e-6, atol=0)
        assert worst_relative(got, expected) < 1e-5


def test_cached_codes_give_the_step_that_pixels_give() -> None:
    model, batch = tiny_model(), images_batch()
    codes = model.target_codes(batch)
    cached = collate_generation(
        TINY,
        SPECIAL.pad,
        [replace(e, codes=c) for e, c in zip(examples(), codes, strict=True)],
        [11, 4, 900],
    )
    with record({"encoder": model.vq.encoder}) as outputs:
        loss, _ = loss_and_gradients(model, cached)
    assert outputs == {}
    assert torch.equal(loss, loss_and_gradients(model, batch)[0])


def test_bf16_stays_close_to_fp32_and_keeps_codes_loss_and_gradients_exact() -> None:
    model = tiny_model()
    batches = images_batch(), chats_batch()
    codes, (loss, expected) = model.target_codes(batches[0]), loss_and_gradients(model, *batches)
    for part in (model.vision, model.aligner):
        part.to(torch.bfloat16)
    with record({"layer": model.layers[0]}) as outputs, torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.target_codes(batches[0]), codes)
        rounded, got = loss_and_gradients(model, *batches)
    assert outputs["layer"].rows.dtype == torch.bfloat16
    assert rounded.dtype == torch.float32
    assert {gradient.dtype for gradient in got.values()} == {torch.float32}
    torch.testing.assert_close(rounded, loss, rtol=2e-2, atol=0)
    flat, flat_expected = (torch.cat([g[n].flatten() for n in sorted(g)]) for g in (got, expected))
    assert torch.cosine_similarity(flat, flat_expected, dim=0) > 0.999


def test_recomputed_layers_give_the_same_gradients() -> None:
    model, batch = tiny_model(), images_batch()
    _, expected = loss_and_gradients(model, batch)
    for layer in model.blocks():
        forward = layer.forward
        layer.forward = lambda *args, _forward=forward: checkpoint(_forward, *args, use_reentrant=False)  # type: ignore[method-assign]
    _, got = loss_and_gradients(model, batch)
    assert worst_relative(got, expected) == 0


@pytest.mark.slow
def test_every_block_compiles_as_one_graph_with_equal_results() -> None:
    model, batch = tiny_model(), images_batch()
    loss, expected = loss_and_gradients(model, batch)
    for block in model.blocks():
        block.compile(fullgraph=True, backend="aot_eager")
    compiled, got = loss_and_gradients(model, batch)
    torch.testing.assert_close(compiled, loss, rtol=1e-6, atol=0)
    assert worst_relative(got, expected) < 1e-5
