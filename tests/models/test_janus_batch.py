"""Janus-Pro's samples and templates: what is read, cut into tokens, cropped, stored and refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from reca.errors import CheckpointError, ConfigError
from reca.images import ImageRejected, to_tensor
from reca.models.family import Variant
from reca.models.janus.batch import (
    CODE,
    ChatExample,
    GenerationExample,
    ImageToTextBatch,
    JanusProcessor,
    ReconstructionBatch,
    TextToImageBatch,
    collate_chats,
    collate_generation,
    hide,
    letterbox,
    random_square,
)
from reca.models.janus.config import IGNORED, VARIANTS, JanusConfig, SpecialTokens, TextConfig, VQConfig
from reca.models.janus.tokenizer import IMAGE, SYSTEM_PROMPT, JanusTokenizer, read_tokenizer
from reca.randomness import RandomSource

TINY: Variant = VARIANTS["tiny"]
CONFIG: JanusConfig = TINY.config
RANDOM = RandomSource(seed=2)
SPECIAL_TEXTS = {
    "bos": "<｜begin▁of▁sentence｜>",  # noqa: RUF001
    "eos": "<｜end▁of▁sentence｜>",  # noqa: RUF001
    "pad": "<｜▁pad▁｜>",  # noqa: RUF001
    "image_placeholder": "<image_placeholder>",
    "boi": "<begin_of_image>",
    "eoi": "<end_of_image>",
}
ROLES = ("<|User|>", "<|Assistant|>")


def photograph(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def official_tokenizer(*, with_roles: bool = True) -> Tokenizer:
    """Bytes, a few merges, and the release's added tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)}
    for merged in ("Ċ" + "Ċ", "Ġ" + "a", ":" + "Ċ"):
        vocabulary[merged] = len(vocabulary)
    tokenizer = Tokenizer(BPE(vocabulary, [("Ċ", "Ċ"), ("Ġ", "a"), (":", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    added = [*SPECIAL_TEXTS.values(), *(ROLES if with_roles else ())]
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in added])
    return tokenizer


@pytest.fixture
def release(tmp_path: Path) -> Path:
    official_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def file_config() -> JanusConfig:
    """The tiny architecture with a tokenizer of its own."""
    return replace(CONFIG, special=None, text=replace(CONFIG.text, vocab_size=300))


def processor(task: str = "reconstruction") -> JanusProcessor:
    return JanusProcessor(TINY, task=task)


# Templates


@pytest.mark.parametrize("with_roles", [True, False])
def test_templates_are_cut_into_tokens_as_the_release_does(tmp_path: Path, with_roles: bool) -> None:
    official = official_tokenizer(with_roles=with_roles)
    official.save(str(tmp_path / "tokenizer.json"))
    ours = read_tokenizer(file_config(), tmp_path)
    bos, eos, boi, eoi = (SPECIAL_TEXTS[name] for name in ("bos", "eos", "boi", "eoi"))
    picture = f"{boi}{SPECIAL_TEXTS['image_placeholder'] * CONFIG.vision.num_tokens}{eoi}"
    expected = {
        ours.reconstruction(" Repeat\nit. "): f"{bos}<|User|>: {picture}\nRepeat\nit.\n\n<|Assistant|>:{boi}",
        ours.text_to_image("a cat"): f"{bos}<|User|>: a cat\n\n<|Assistant|>:{boi}",
        ours.conversation([("Who?", "a cat"), ("And?", "no")])[0]: (
            f"{bos}{SYSTEM_PROMPT}\n\n<|User|>: {picture}\nWho?\n\n<|Assistant|>: a cat{eos}"
            f"<|User|>: And?\n\n<|Assistant|>: no{eos}"
        ),
    }
    for got, text in expected.items():
        ids = official.encode(text, add_special_tokens=False).ids
        assert [ours.special.image_placeholder if i == IMAGE else i for i in got] == ids


def test_only_answers_and_their_ends_are_labelled() -> None:
    tokenizer = read_tokenizer(CONFIG, None)
    ids, labels = tokenizer.conversation([("Who?", " me "), ("And?", "you")])
    said = [token for token in labels if token != IGNORED]
    eos = tokenizer.special.eos
    assert said == [*b" me", eos, *b" you", eos]
    assert all(label in (token, IGNORED) for token, label in zip(ids, labels, strict=True))


def test_a_prompt_never_becomes_a_special_token(release: Path) -> None:
    tokenizer = read_tokenizer(file_config(), release)
    ids = tokenizer.text_to_image(f"a {SPECIAL_TEXTS['boi']} {ROLES[1]}")
    assert ids.count(tokenizer.special.boi) == 1 and ids.count(tokenizer.roles[ROLES[1]]) == 1


def test_special_tokens_are_found_by_name(release: Path) -> None:
    special = read_tokenizer(file_config(), release).special
    official = official_tokenizer()
    assert special == SpecialTokens(**{n: official.token_to_id(t) for n, t in SPECIAL_TEXTS.items()})


def edited(change: Callable[[dict[str, Any]], Any]) -> str:
    description = json.loads(official_tokenizer().to_str())
    change(description)
    return json.dumps(description)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not a readable JSON file"),
        ("[1]", "expected a JSON object"),
        ("{}", "no vocabulary"),
        (edited(lambda d: d["added_tokens"].pop(3)), "the tokenizer lacks <image_placeholder>; use"),
        (edited(lambda d: d["added_tokens"][0].update(id=300)), "ids up to 300, the model 300 embeddings"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        read_tokenizer(file_config(), tmp_path)


def test_weights_without_a_folder_have_no_tokenizer() -> None:
    with pytest.raises(CheckpointError, match="the tokenizer is missing"):
        read_tokenizer(file_config(), None)


@pytest.mark.parametrize(
    "stated",
    [{"image_token_id": 7}, {"text_config": {"pad_token_id": 7}}, {"text_config": {"eos_token_id": 7}}],
)
def test_a_tokenizer_that_disagrees_with_the_weights_is_refused(
    release: Path, stated: dict[str, object]
) -> None:
    (release / "config.json").write_text(json.dumps(stated))
    with pytest.raises(CheckpointError, match=r"the id \d+, config\.json 7; use the tokenizer"):
        read_tokenizer(file_config(), release / "model.safetensors")


def test_stated_ids_that_agree_or_are_absent_are_fine(release: Path) -> None:
    special = read_tokenizer(file_config(), release).special
    stated = {"image_token_id": special.image_placeholder, "text_config": {"pad_token_id": None}}
    (release / "config.json").write_text(json.dumps(stated))
    assert isinstance(read_tokenizer(file_config(), release), JanusTokenizer)


# Samples


def test_a_reconstruction_is_a_random_square_and_its_prompt() -> None:
    example = processor().prepare(photograph(70, 40), "Repeat.", RANDOM, 9)
    assert isinstance(example, GenerationExample)
    left = RANDOM.integer("crop/left", 9, 31)
    square = photograph(70, 40).crop((left, 0, left + 40, 40))
    assert torch.equal(example.pixels, to_tensor(square, TINY.target))
    assert example.prompt == processor().tokenizer.reconstruction("Repeat.")
    assert example.num_tokens == len(example.prompt) + CONFIG.num_codes - 1
    assert example.is_reconstruction and not example.is_unconditional


def test_crops_reach_both_ends_and_belong_to_the_sample() -> None:
    wide = Image.fromarray(np.arange(12, dtype=np.uint8)[None, :, None].repeat(10, 0).repeat(3, 2))
    lefts = {random_square(wide, RANDOM, sample).getpixel((0, 0))[0] for sample in range(40)}  # type: ignore[index]
    assert lefts == {0, 1, 2}
    assert random_square(wide, RANDOM, 3).tobytes() == random_square(wide, RANDOM, 3).tobytes()


def test_a_dropped_instruction_hides_image_and_text_behind_pads() -> None:
    example = processor().prepare(photograph(40, 40), None, RANDOM, 1)
    batch = processor().collate([example], [1])  # type: ignore[list-item]
    special = processor().tokenizer.special
    assert isinstance(batch, ReconstructionBatch) and batch.seen == ()
    assert batch.text_ids[0] == special.bos and batch.text_ids[-1] == special.boi
    assert set(batch.text_ids[1:-1].tolist()) == {special.pad} and len(batch.text_ids) == len(example.prompt)  # type: ignore[union-attr]
    assert hide((1, 2, 3, 4), 0) == (1, 0, 0, 4)


def test_a_caption_has_no_image_to_understand() -> None:
    made = processor("text_to_image")
    examples = [made.prepare(photograph(40, 40), text, RANDOM, 1) for text in ("a cat", None)]
    batch = made.collate(examples, [1, 2])  # type: ignore[arg-type]
    assert isinstance(batch, TextToImageBatch) and batch.seen == ()
    assert examples[0].is_unconditional is False and examples[1].is_unconditional is True  # type: ignore[union-attr]


def test_a_conversation_sees_the_whole_image() -> None:
    made = processor("image_to_text")
    example = made.prepare(photograph(64, 32), (("Who?", "me"),), RANDOM, 1)
    assert isinstance(example, ChatExample)
    grey = (127 / 255 - 0.5) / 0.5
    assert torch.allclose(example.pixels[:, :8], torch.tensor(grey), atol=1e-6)
    assert torch.allclose(example.pixels[:, 24:], torch.tensor(grey), atol=1e-6)
    assert example.pixels[:, 8:24].std() > 0.2
    batch = made.collate([example], [1])
    assert isinstance(batch, ImageToTextBatch) and batch.seen == (0,)
    assert batch.num_tokens == example.num_tokens == len(example.ids) - 1


def test_letterboxing_pads_the_short_side_evenly_and_never_crops() -> None:
    tall = letterbox(photograph(10, 40), 32)
    assert tall.size == (32, 32)
    assert [tall.getpixel((x, 5)) == (127, 127, 127) for x in (0, 11, 12, 19, 20, 31)] == [1, 1, 0, 0, 1, 1]
    assert letterbox(photograph(1000, 1), 32).size == (32, 32)


def test_rows_are_stored_by_kind_and_ordered_by_sample() -> None:
    size = CONFIG.num_codes
    seen = CONFIG.vision.num_tokens
    examples = [
        GenerationExample(
            prompt=(1, *(IMAGE,) * seen, first, 3),
            pixels=torch.zeros(3, 32, 32),
            num_tokens=0,
            is_reconstruction=True,
        )
        for first in (7, 8)
    ]
    batch = collate_generation(CONFIG, 0, examples, [5, 6])
    assert batch.text_ids.tolist() == [1, 7, 3, 1, 8, 3]
    stored = [*batch.text_ids.tolist(), *[IMAGE] * 2 * seen, *[CODE] * 2 * (size - 1)]
    rows = [stored[index] for index in batch.order]
    one = [1, *[IMAGE] * seen, 7, 3, *[CODE] * (size - 1)]
    assert rows == [*one, *(8 if row == 7 else row for row in one)]
    assert sorted(batch.order.tolist()) == list(range(len(rows)))
    assert batch.layout.positions.tolist() == [*range(len(one))] * 2
    assert batch.layout.tail_rows.tolist() == [
        *range(len(one) - size, len(one)),
        *range(2 * len(one) - size, 2 * len(one)),
    ]


def test_processors_travel_to_workers(release: Path) -> None:
    variant = replace(TINY, config=file_config())
    made = JanusProcessor(variant, release)
    copy = pickle.loads(pickle.dumps(made))
    one, other = (p.prepare(photograph(50, 40), "a cat", RANDOM, 4) for p in (made, copy))
    assert one.prompt == other.prompt and torch.equal(one.pixels, other.pixels)


# What is refused


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(ConfigError, match="no task 'reconstruct'; did you mean 'reconstruction'"):
        JanusProcessor(TINY, task="reconstruct")


def test_pixels_of_another_size_are_refused() -> None:
    other = replace(TINY, target=replace(TINY.target, max_size=64, min_size=64))
    with pytest.raises(ValueError, match="target must be squares of 32 pixels"):
        JanusProcessor(other)


@pytest.mark.parametrize("text", [None, "a caption", ()])
def test_a_sample_without_conversation_is_rejected(text: Any) -> None:
    with pytest.raises(ImageRejected, match="it has no conversation"):
        processor("image_to_text").prepare(photograph(40, 40), text, RANDOM, 0)


def test_turns_where_one_text_is_wanted_are_refused() -> None:
    with pytest.raises(TypeError, match="reconstruction takes one text, got tuple"):
        processor().prepare(photograph(40, 40), (("a", "b"),), RANDOM, 0)


def test_collating_refuses_what_is_no_microbatch() -> None:
    recon = processor().prepare(photograph(40, 40), "a", RANDOM, 0)
    caption = processor("text_to_image").prepare(photograph(40, 40), "a", RANDOM, 0)
    said = processor("image_to_text").prepare(photograph(40, 40), (("a", "b"),), RANDOM, 0)
    for wrong, ids, message in (
        ([recon, caption], [0, 1], "got reconstruction and text to image together"),
        ([recon, said], [0, 1], "got conversations and images together"),
        ([recon], [0, 1], "expected one id per example, got 1 and 2"),
        ([], [], "expected one id per example, got 0 and 0"),
    ):
        with pytest.raises(ValueError, match=message):
            processor().collate(wrong, ids)  # type: ignore[arg-type]
    answered = ChatExample(ids=(5, 6), labels=(5, 6), pixels=torch.zeros(3, 32, 32))
    with pytest.raises(ValueError, match="its first label must be ignored"):
        collate_chats(CONFIG, 0, [answered], [0])


def test_architectures_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="must give an even width to each of 5 heads"):
        TextConfig(64, 100, 2, 5, 10)
    with pytest.raises(ValueError, match="base_channels=48 must be a multiple of 32 groups"):
        VQConfig(base_channels=48)
