"""OpenUni's tokenizer: that of InternVL3's language model."""

from __future__ import annotations

from pathlib import Path

from reca.models.openuni.config import OpenUniConfig
from reca.models.tokenizer import ByteTokenizer, TextTokenizer, read_qwen2_tokenizer


def read_tokenizer(config: OpenUniConfig, folder: Path | None) -> TextTokenizer:
    """The tokenizer of a variant, from the language model's folder of a release, or from the folder itself.

    Raises: CheckpointError if the files are missing, broken, or belong to another model.
    """
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    if folder is not None:
        folder = tokenizer_folder(folder if folder.is_dir() else folder.parent)
    special = {
        "<|im_start|>": config.special.im_start,
        "<|im_end|>": config.special.im_end,
        "<img>": config.special.start_of_image,
        "</img>": config.special.end_of_image,
        "<IMG_CONTEXT>": config.special.image,
    }
    return read_qwen2_tokenizer(
        folder, special, config.llm.vocab_size, cure="use the tokenizer of the same release"
    )


def tokenizer_folder(folder: Path) -> Path:
    """Where a release keeps its tokenizer: the folder itself, else the language model's inside it."""
    candidates = [folder, *sorted(path for path in folder.glob("[iI]ntern[vV][lL]*") if path.is_dir())]
    for candidate in candidates:
        if (candidate / "tokenizer.json").is_file() or (candidate / "vocab.json").is_file():
            return candidate
    return folder
