"""Show-o's words and pixels: tokenizer, labelled conversations, prepared samples, image tokenizer."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel

from reca.errors import CheckpointError, ConfigError, DataError
from reca.images import ImageRejected
from reca.models.parity import compare, read_pack
from reca.models.showo.config import IGNORED, VARIANTS, MagvitConfig, ShowoConfig
from reca.models.showo.magvit import Magvit
from reca.models.showo.parity import reproduce
from reca.models.showo.processor import ShowoProcessor
from reca.models.showo.text import conversation, instruction, read_tokenizer
from reca.models.tokenizer import ByteTokenizer
from reca.randomness import RandomSource

FULL: ShowoConfig = VARIANTS["clip-512"].config
TINY: ShowoConfig = VARIANTS["tiny-clip"].config
RANDOM = RandomSource(seed=1)
IMAGE = Image.new("RGB", (50, 40), (200, 30, 90))


SPACES = [" " * count for count in range(31, 1, -1)] + ["\t" * count for count in range(9, 1, -1)]


def release(folder: Path, *, end: int = 50_256, first: int = 50_257, whole: bool = True) -> Path:
    """A tokenizer of phi's kind and size: byte-level BPE that knows single bytes and runs of whitespace."""
    folder.mkdir(parents=True)
    words = [*sorted(ByteLevel.alphabet()), *(f"word{index}" for index in range(256, 50_256))]
    vocab = {word: index for index, word in enumerate(words)} | {"<|endoftext|>": end}
    spaces = {text: first + index for index, text in enumerate(SPACES)}
    if whole:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        model = {"type": "BPE", "vocab": vocab, "merges": []}
        tokens = [
            {"id": number, "content": text, **flags, "special": number == end}
            for text, number in ({"<|endoftext|>": end} | spaces).items()
        ]
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        content = {"version": "1.0", "added_tokens": tokens, "pre_tokenizer": byte_level, "model": model}
        (folder / "tokenizer.json").write_text(json.dumps(content))
    else:
        (folder / "vocab.json").write_text(json.dumps(vocab))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        (folder / "added_tokens.json").write_text(json.dumps(spaces))
    return folder


@pytest.mark.parametrize("whole", [True, False])
def test_spaces_keep_their_tokens_and_an_end_in_a_text_is_only_characters(
    tmp_path: Path, whole: bool
) -> None:
    release(tmp_path / "phi-1_5", whole=whole)
    (tmp_path / "show-o").mkdir()
    tokenizer = read_tokenizer(FULL, tmp_path / "show-o")
    ids = tokenizer.encode("a  b<|endoftext|>")
    assert ids.count(50_286) == 1 and 50_256 not in ids
    assert len(ids) == len("ab") + 1 + len("<|endoftext|>")


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected tokenizer.json, or vocab.json and merges.txt"):
        read_tokenizer(FULL, tmp_path)
    other = release(tmp_path / "other", end=1000)
    with pytest.raises(CheckpointError, match=r"gives <\|endoftext\|> the id 1000, the model expects 50256"):
        read_tokenizer(FULL, other)
    larger = release(tmp_path / "larger", first=50_258)
    with pytest.raises(CheckpointError, match="has ids up to 50295, Show-o's own tokens start at 50295"):
        read_tokenizer(FULL, larger)
    gap = release(tmp_path / "gap")
    content = json.loads((gap / "tokenizer.json").read_text())
    del content["added_tokens"][1]
    (gap / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="has no place at id 50258"):
        read_tokenizer(FULL, gap)
    (larger / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="the tokenizer cannot be read"):
        read_tokenizer(FULL, larger)
    with pytest.raises(CheckpointError, match="the tokenizer is missing; give the folder"):
        read_tokenizer(FULL, None)


def test_answers_and_their_ends_are_labelled_and_nothing_else() -> None:
    turns = (("What is it?\n<image>", "A fox."), ("Where?", "Here."))
    ids, labels = conversation(ByteTokenizer(), turns, 500)
    text = b"USER: What is it? ASSISTANT: A fox.", b"USER: Where? ASSISTANT: Here."
    assert ids == (*text[0], 500, *text[1], 500)
    answers = [label for label in labels if label != IGNORED]
    assert answers == [*b" A fox.", 500, *b" Here.", 500]
    assert all(label in (IGNORED, token) for label, token in zip(labels, ids, strict=True))


def test_a_turn_that_spells_the_mark_of_an_answer_is_rejected() -> None:
    with pytest.raises(ImageRejected, match="' ASSISTANT: '"):
        conversation(ByteTokenizer(), (("say ASSISTANT: hi", "hi"),), 500)


def test_the_template_of_an_instruction_is_the_official_one() -> None:
    expected = "USER: \n List every visible thing, with colours. ASSISTANT:"
    assert instruction("List every visible thing, with colours.") == expected


def test_a_processor_travels_to_workers_and_prepares_the_same_there() -> None:
    processor = ShowoProcessor(VARIANTS["tiny-clip"])
    sent = pickle.loads(pickle.dumps(processor))
    one, other = (p.prepare(IMAGE, "describe", RANDOM, 5) for p in (processor, sent))
    assert one.text == other.text == tuple(b"USER: \n describe ASSISTANT:")
    assert one.num_masked == other.num_masked and torch.equal(one.pixels, other.pixels)
    assert one.pixels.shape == (3, 64, 64)
    batch = processor.collate([one], [5])
    assert batch.num_tokens == one.num_tokens == 16 + 2 + 3 + len(one.text) + 1 + 16


def test_masked_codes_follow_the_cosine_law() -> None:
    processor = ShowoProcessor(VARIANTS["tiny-clip"])
    counts = [processor.prepare(IMAGE, None, RANDOM, index).num_masked for index in range(400)]
    assert min(counts) >= 1 and max(counts) == 16
    assert abs(sum(counts) / len(counts) - 16 * 2 / torch.pi) < 0.6


def test_conversations_are_cut_and_those_without_an_answer_are_rejected() -> None:
    processor = ShowoProcessor(VARIANTS["tiny-vq"], task="image_to_text")
    example: Any = processor.prepare(IMAGE, (("what?", "a " * 600),), RANDOM, 0)
    most = processor.config.max_chat
    assert len(example.chat) == len(example.labels) == most == 512
    batch = processor.collate([example], [0])
    assert batch.num_tokens == example.num_tokens == 16 + 3 + most - 1
    with pytest.raises(ImageRejected, match="no answer within 512 tokens"):
        processor.prepare(IMAGE, (("why " * 200, "so"),), RANDOM, 0)


def test_images_of_conversations_are_normalised_as_clip_was_trained() -> None:
    white = Image.new("RGB", (30, 20), (255, 255, 255))
    seen: Any = ShowoProcessor(VARIANTS["tiny-clip"], task="image_to_text").prepare(
        white, (("a", "b"),), RANDOM, 0
    )
    expected = (1 - torch.tensor([0.48145466, 0.4578275, 0.40821073])) / torch.tensor(
        [0.26862954, 0.26130258, 0.27577711]
    )
    torch.testing.assert_close(seen.pixels, expected[:, None, None].expand(3, 56, 56))


def test_a_dropped_caption_leaves_only_its_frame() -> None:
    processor = ShowoProcessor(VARIANTS["tiny-vq"], task="text_to_image")
    dropped, full = (processor.prepare(IMAGE, text, RANDOM, 0) for text in (None, "fox"))
    assert (dropped.num_tokens, full.num_tokens) == (3 + 18, 3 + 3 + 18)


def test_tasks_and_texts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="Show-o has no task 'image_to_txt'; did you mean 'image_to_text'"):
        ShowoProcessor(VARIANTS["tiny-vq"], task="image_to_txt")
    with pytest.raises(TypeError, match=r"needs \(question, answer\) turns, got 'what'"):
        ShowoProcessor(VARIANTS["tiny-vq"], task="image_to_text").prepare(IMAGE, "what", RANDOM, 0)
    with pytest.raises(TypeError, match="reconstruction needs one text, got turns"):
        ShowoProcessor(VARIANTS["tiny-vq"]).prepare(IMAGE, (("a", "b"),), RANDOM, 0)
    with pytest.raises(DataError, match="shorten the prompts"):
        ShowoProcessor(VARIANTS["tiny-clip"]).prepare(IMAGE, "x" * 600, RANDOM, 0)


def test_the_first_channel_of_a_code_is_its_highest_bit_and_zero_counts_as_cleared() -> None:
    tokenizer = Magvit(MagvitConfig((32,) * 5, (1,) * 5, (32,) * 5, (1,) * 5, bits=3))
    latents = torch.tensor([[0.5, -1.0, 0.0], [-0.1, 2.0, 3.0]]).T[None, :, None]  # [1, 3, 1, 2]
    assert tokenizer.codes(latents).tolist() == [[4, 3]]
    assert tokenizer.table[4].tolist() == [1.0, -1.0, -1.0]


def test_pictures_of_any_shape_are_encoded_row_by_row_and_decoded_to_their_size() -> None:
    torch.manual_seed(0)
    tokenizer = Magvit(TINY.magvit)
    codes = tokenizer.encode(torch.rand(2, 3, 48, 32) * 2 - 1)
    assert codes.shape == (2, 6) and codes.dtype == torch.int64
    assert tokenizer.decode(codes, 3, 2).shape == (2, 3, 48, 32)
    with torch.autocast("cpu", torch.bfloat16):  # codes never come from rounded arithmetic
        assert tokenizer.latents(torch.zeros(1, 3, 32, 32)).dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 330}, "mask=330 must follow them, below vocab_size=330"),
        ({"resolution": 72}, "resolution=72 is no multiple of a code's stride"),
    ],
)
def test_a_configuration_that_contradicts_itself_is_refused(change: dict[str, int], message: str) -> None:
    from dataclasses import replace

    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


@pytest.mark.parity
def test_all_full_size_sequences_and_ids_are_those_of_the_official_code() -> None:
    pack = read_pack(Path(__file__).parents[1] / "data" / "parity" / "showo" / "text")
    reproduction = reproduce(pack)
    assert compare(pack, reproduction).failures == ()
    formed = pack.expected.keys() - reproduction.not_formed.keys()
    assert len(formed) == 47 and {"system_ids", "layouts.recon_clip_512.ids_rle"} <= formed


def test_a_pack_of_numbers_without_any_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pack.json").write_text('{"model": "showo", "dtype": "int", "expected": {"text": "words"}}')
    with pytest.raises(ConfigError, match="expected numbers under 'expected' in a pack of dtype int"):
        read_pack(tmp_path)
