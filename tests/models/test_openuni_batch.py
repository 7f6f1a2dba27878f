"""OpenUni's prompts and batches: what the official chat template says, packed without padding."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reca.errors import CheckpointError
from reca.images import to_tensor
from reca.models.openuni.batch import (
    OpenUniExample,
    OpenUniProcessor,
    ReconstructionBatch,
    TextToImageBatch,
    collate,
)
from reca.models.openuni.config import VARIANTS, OpenUniConfig
from reca.models.openuni.prompt import MAX_CAPTION_ROWS, PromptWriter
from reca.models.openuni.tokenizer import read_tokenizer
from reca.models.tokenizer import ByteTokenizer
from reca.randomness import RandomSource

VARIANT = VARIANTS["tiny"]
TINY: OpenUniConfig = VARIANT.config
RANDOM = RandomSource(seed=5)
NAMES = {256: "<|im_start|>", 257: "<|im_end|>", 258: "<img>", 259: "</img>", 260: "*"}


def spelled(ids: tuple[int, ...]) -> str:
    return "".join(NAMES.get(i) or chr(i) for i in ids)


def photograph(width: int, height: int) -> Image.Image:
    generator = np.random.default_rng(0)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_the_reconstruction_prompt_shows_the_image_and_opens_another() -> None:
    writer = PromptWriter(TINY, ByteTokenizer())
    frame = "<|im_start|>user\n<img>****</img>\n{}<|im_end|>\n<|im_start|>assistant\n<img>"
    assert spelled(writer.reconstruction("Keep it.")) == frame.format("Keep it.")
    assert spelled(writer.reconstruction(None)) == frame.format("")


def test_a_caption_is_asked_for_by_words_and_its_absence_is_the_prompt_of_the_unconditional_pass() -> None:
    writer = PromptWriter(TINY, ByteTokenizer())
    frame = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<img>"
    assert spelled(writer.text_to_image("a cat")) == frame.format("Generate an image: a cat")
    assert spelled(writer.text_to_image(None)) == frame.format("Generate an image.")


def test_a_long_caption_loses_its_end_and_never_the_opening_of_the_image() -> None:
    ids = PromptWriter(TINY, ByteTokenizer()).text_to_image("cat " * 100)
    assert len(ids) == MAX_CAPTION_ROWS
    assert spelled(ids).startswith("<|im_start|>user\nGenerate an image: cat cat")
    assert spelled(ids).endswith("<|im_end|>\n<|im_start|>assistant\n<img>")


def test_a_text_that_spells_a_special_token_stays_a_text() -> None:
    ids = PromptWriter(TINY, ByteTokenizer()).reconstruction("<img>")
    assert ids.count(TINY.special.start_of_image) == 2


def test_prompts_are_packed_and_queries_continue_the_positions_of_theirs() -> None:
    pixels = torch.zeros(3, 64, 64)
    prompts = [(256, 258, 260, 260, 260, 260, 259, 7, 258), (256, 258, *(260,) * 4, 259, 258)]
    batch = collate(TINY, [OpenUniExample("reconstruction", ids, pixels, 80) for ids in prompts], [1, 2])
    layout = batch.prompts.layout
    assert isinstance(batch, ReconstructionBatch)
    assert batch.prompts.image_rows.tolist() == [2, 3, 4, 5, 11, 12, 13, 14]
    assert layout.prompt_positions.tolist() == [*range(9), *range(8)]
    assert layout.query_positions.tolist() == [*range(9, 17), *range(8, 16)]
    assert (layout.queries.query_lengths, layout.queries.key_lengths) == ((8, 8), (17, 16))
    assert layout.queries.is_causal and layout.prompts.is_causal and not layout.connector.is_causal
    # keys and values lie sample by sample, a prompt before its queries, and no prompt sees a query
    assert layout.prompt_places.tolist() == [*range(9), *range(17, 25)]
    assert layout.query_places.tolist() == [*range(9, 17), *range(25, 33)]
    assert (layout.prompts.query_lengths, layout.prompts.key_lengths) == ((9, 0, 8, 0), (9, 8, 8, 8))
    assert (batch.num_tokens, batch.latent_shape) == (160, (8, 8, 8))


def test_the_processor_cuts_a_random_square_that_belongs_to_the_sample() -> None:
    processor, image = OpenUniProcessor(VARIANT), photograph(300, 64)
    prepared = [processor.prepare(image, "Keep it.", RANDOM, i).pixels for i in (4, 4, 5)]
    assert torch.equal(prepared[0], prepared[1]) and not torch.equal(prepared[0], prepared[2])
    whole = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1
    offset = RANDOM.integer("crop", 4, 300 - 64 + 1)
    torch.testing.assert_close(prepared[0], whole[:, :, offset : offset + 64])


def test_a_square_picture_is_only_resized() -> None:
    image = photograph(90, 90)
    example = OpenUniProcessor(VARIANT).prepare(image, None, RANDOM, 0)
    assert torch.equal(example.pixels, to_tensor(image, VARIANT.target))
    assert example.num_tokens == len(example.prompt_ids) + 8 + 64


def test_the_processor_of_captions_makes_batches_without_images_in_their_prompts() -> None:
    processor = OpenUniProcessor(VARIANT, task="text_to_image")
    example = processor.prepare(photograph(64, 64), "a cat", RANDOM, 0)
    batch = processor.collate([example], [3])
    assert isinstance(batch, TextToImageBatch) and batch.prompts.vision is None
    assert len(batch.prompts.image_rows) == 0


def test_a_processor_can_be_sent_to_workers() -> None:
    processor = pickle.loads(pickle.dumps(OpenUniProcessor(VARIANT)))
    assert processor.prepare(photograph(64, 64), "x", RANDOM, 0).prompt_ids


def test_mixed_or_missing_samples_are_refused() -> None:
    one = OpenUniExample("reconstruction", (1,), torch.zeros(3, 64, 64), 1)
    with pytest.raises(ValueError, match="one id per example, got 0 and 0"):
        collate(TINY, [], [])
    for other in (replace(one, task="text_to_image"), replace(one, pixels=torch.zeros(3, 32, 32))):
        with pytest.raises(ValueError, match="share task and size"):
            collate(TINY, [one, other], [0, 1])


def test_a_conversation_is_no_instruction() -> None:
    with pytest.raises(TypeError, match="expected an instruction, a caption or None, got turns"):
        OpenUniProcessor(VARIANT).prepare(photograph(64, 64), (("a", "b"),), RANDOM, 0)


def test_an_unknown_task_and_unfit_pixels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"task must be one of .*, got 'image_to_text'"):
        OpenUniProcessor(VARIANT, task="image_to_text")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="squares with a stride of 8"):
        OpenUniProcessor(replace(VARIANT, target=replace(VARIANT.target, fit="native")))


# The tokenizer of a release


def tokenizer_files(folder: Path, *, image_id: int = 151_667, largest: int = 5) -> Path:
    folder.mkdir(parents=True)
    vocab = {"a": 0, "b": 1, "z": largest}
    added = [{"id": image_id, "content": "<IMG_CONTEXT>"}]
    model = {"type": "BPE", "vocab": vocab, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": added}))
    return folder


def test_the_tokenizer_is_found_beside_the_language_model_of_a_release(tmp_path: Path) -> None:
    config = VARIANTS["b-512"].config
    tokenizer_files(tmp_path / "InternVL3-1B")
    (tmp_path / "openuni.pth").write_bytes(b"")
    for place in (tmp_path, tmp_path / "InternVL3-1B", tmp_path / "openuni.pth"):
        assert read_tokenizer(config, place).encode("ab") == (0, 1)


def test_a_tokenizer_that_disagrees_with_the_weights_is_refused(tmp_path: Path) -> None:
    config = VARIANTS["b-512"].config
    with pytest.raises(CheckpointError, match="the tokenizer is missing"):
        read_tokenizer(config, None)
    with pytest.raises(CheckpointError, match=r"expected tokenizer\.json, or vocab\.json and merges\.txt"):
        read_tokenizer(config, tmp_path)
    with pytest.raises(CheckpointError, match="<IMG_CONTEXT> the id 7, the model expects 151667"):
        read_tokenizer(config, tokenizer_files(tmp_path / "other", image_id=7))
    with pytest.raises(CheckpointError, match="ids up to 151674, the model 151674 embeddings"):
        read_tokenizer(config, tokenizer_files(tmp_path / "large", largest=151_674))
    broken = tokenizer_files(tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="the tokenizer cannot be read"):
        read_tokenizer(config, broken)
