"""The parity pack of words: ids of tokens and texts, labelled conversations, full-size sequences."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from reca.errors import CheckpointError
from reca.models.family import Pack, Reproduction
from reca.models.showo.config import IGNORED, VARIANTS, ShowoConfig
from reca.models.showo.parity_training import official
from reca.models.showo.sequence import (
    GIVEN,
    IMAGE,
    VISION,
    Block,
    image_to_text,
    reconstruction,
    text_to_image,
)
from reca.models.showo.text import conversation, read_tokenizer
from reca.models.showo.transformer import Layout
from reca.models.tokenizer import TextTokenizer

_FULL: ShowoConfig = VARIANTS["clip-512"].config
_NAMES = {
    "soi": "<|soi|>",
    "eoi": "<|eoi|>",
    "t2i": "<|t2i|>",
    "mmu": "<|mmu|>",
    "sot": "<|sot|>",
    "eot": "<|eot|>",
    "pad": "<|pad|>",
}
_UNUSED = ("<|sov|>", "<|eov|>", "<|t2v|>", "<|v2v|>", "<|lvg|>")
_LAYOUTS = {
    "clip_512": "clip-512",
    "clip_256": "clip-256",
    "vq_512": "vq-512",
    "vq_blur_512": "vq-512-blur",
}


def reproduce_text(pack: Pack) -> Reproduction:
    """Case `text`. What only the released vocabulary can tell is formed if its files lie beside the pack."""
    stated: Mapping[str, Any] = pack.description["expected"]
    special = _FULL.special
    tensors = {
        "len_tokenizer": torch.tensor(special.codes),
        "system_ids": torch.tensor(_FULL.system_ids),
        **{f"special.{name}": torch.tensor(getattr(special, field)) for field, name in _NAMES.items()},
    }
    missing = {f"special.{name}": "no sequence of RecA holds this token" for name in _UNUSED}
    try:
        tensors |= _words(read_tokenizer(_FULL, pack.folder), stated)
    except CheckpointError:
        reason = "the vocabulary of microsoft/phi-1_5 does not lie beside the pack"
        missing |= {name: reason for name in pack.expected if name.startswith(("strings.", "chat."))}
    chats = [(chat["ids"], chat["labels"]) for chat in stated["chat"]]
    for variant, name in (("clip-512", "collate_1024"), ("clip-256", "collate_256")):
        tensors |= _collated(VARIANTS[variant].config, name, chats)
    caption, prompt = (stated["strings"][index]["ids"] for index in (0, 1))
    for suffix, variant in _LAYOUTS.items():
        config: ShowoConfig = VARIANTS[variant].config
        tensors |= _sequences(config, suffix, caption, prompt)
    for variant, size in (("clip-512", 512), ("clip-256", 256)):
        config = VARIANTS[variant].config
        for words, name in ((caption, "cond"), ([], "uncond")):
            blocks = text_to_image(config, words, length=config.generation_text, is_complete=True)
            packed = _packed(config, blocks)
            tensors |= {
                f"layouts.gen_{size}.length": torch.tensor(len(packed)),
                f"layouts.gen_{size}.{name}_rle": _runs(packed),
            }
    return Reproduction(tensors, missing)


def _words(tokenizer: TextTokenizer, stated: Mapping[str, Any]) -> dict[str, Tensor]:
    """Texts and conversations through the released tokenizer."""
    tensors = {}
    for index, entry in enumerate(stated["strings"]):
        tensors[f"strings.{index}.ids"] = torch.tensor(tokenizer.encode(entry["text"]))
    for index, entry in enumerate(stated["chat"]):
        said = [turn["value"] for turn in entry["conversation"]]
        turns = list(zip(said[::2], said[1::2], strict=True))
        ids, labels = conversation(tokenizer, turns, _FULL.special.eot)
        tensors |= {f"chat.{index}.ids": torch.tensor(ids), f"chat.{index}.labels": torch.tensor(labels)}
    return tensors


def _collated(config: ShowoConfig, name: str, chats: list[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
    """Conversations padded to their place in the sequence."""
    tensors = {f"{name}.shape": torch.tensor([len(chats), config.max_chat])}
    for index, (ids, labels) in enumerate(chats):
        padded = image_to_text(config, ids, is_complete=True)[-1].ids[1:]
        ignored = [*labels, *[IGNORED] * (config.max_chat - len(labels))]
        tensors |= {f"{name}.ids_rle.{index}": _runs(padded), f"{name}.labels_rle.{index}": _runs(ignored)}
    return tensors


def _sequences(config: ShowoConfig, suffix: str, caption: list[int], prompt: list[int]) -> dict[str, Tensor]:
    """Both image sequences of a variant, complete."""
    recon = _packed(config, reconstruction(config, prompt, is_complete=True))
    captioned = _packed(config, text_to_image(config, caption, is_complete=True))
    unlabelled = (config.special.pad, config.special.mask)
    tensors = {
        f"layouts.recon_{suffix}.length": torch.tensor(len(recon)),
        f"layouts.recon_{suffix}.ids_rle": _runs(recon),
        f"layouts.t2i_{suffix}.length": torch.tensor(len(captioned)),
        f"layouts.t2i_{suffix}.ids_rle": _runs(captioned),
        f"layouts.t2i_{suffix}.labels_rle": _runs(IGNORED if i in unlabelled else i for i in captioned),
    }
    if config.clip is None:
        tensors[f"layouts.recon_{suffix}.labels_rle"] = _runs([IGNORED] * len(recon))
    return tensors


def _packed(config: ShowoConfig, blocks: tuple[Block, ...]) -> list[int]:
    """Ids in the official order, every code masked and every given code the first."""
    layout = Layout.of([blocks])
    stands = {IMAGE: config.special.mask, GIVEN: config.special.codes, VISION: IGNORED}
    return [stands.get(int(token), int(token)) for token in official(layout, layout.token_ids)[0]]


def _runs(values: Iterable[int]) -> Tensor:
    """[runs, 2] int64: (value, run length)."""
    return torch.tensor(list(_lengths(values)))


def _lengths(values: Iterable[int]) -> Iterator[tuple[int, int]]:
    for value, run in itertools.groupby(values):
        yield value, sum(1 for _ in run)
