"""BAGEL's tokenizer: Qwen2.5's, with two tokens around an image."""

from __future__ import annotations

from pathlib import Path

from reca.models.bagel.config import BagelConfig
from reca.models.tokenizer import ByteTokenizer, TextTokenizer, read_qwen2_tokenizer


def read_tokenizer(config: BagelConfig, folder: Path | None) -> TextTokenizer:
    """The tokenizer of a variant, from the files beside its weights.

    Raises: CheckpointError if the files are missing, broken, or belong to another model.
    """
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    special = {
        "<|im_start|>": config.special.bos_token_id,
        "<|im_end|>": config.special.eos_token_id,
        "<|vision_start|>": config.special.start_of_image,
        "<|vision_end|>": config.special.end_of_image,
    }
    return read_qwen2_tokenizer(
        folder, special, config.llm.vocab_size, cure="use the tokenizer of the same release"
    )
