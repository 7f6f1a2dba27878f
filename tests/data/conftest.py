"""Pictures, tar files and a processor small enough to be read at a glance."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from reca.images import ImageRejected
from reca.randomness import RandomSource
from reca.types import Batch


def jpeg(seed: int, width: int = 24, height: int = 16) -> bytes:
    """A small photograph-like JPEG that no other seed gives."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@dataclass(frozen=True, slots=True)
class ToyExample:
    """One prepared picture: which one it is, its prompt, and a tensor that crosses the process border."""

    digest: str
    prompt: str | None
    pixels: Tensor
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyBatch(Batch):
    """Examples as they are."""

    examples: tuple[ToyExample, ...]


@dataclass(frozen=True, slots=True)
class ToyProcessor:
    """One token per 64 pixels; images of a forbidden width are rejected."""

    forbidden_width: int = -1

    def prepare(
        self, image: Image.Image, prompt: str | None, random: RandomSource, sample_id: int
    ) -> ToyExample:
        """Hash the pixels and keep a few."""
        if image.width == self.forbidden_width:
            raise ImageRejected(f"width {image.width} is forbidden")
        data = image.tobytes()
        pixels = torch.frombuffer(bytearray(data[:48]), dtype=torch.uint8)
        return ToyExample(hashlib.sha1(data).hexdigest(), prompt, pixels, image.width * image.height // 64)

    def collate(self, examples: Sequence[ToyExample], sample_ids: Sequence[int]) -> ToyBatch:
        """Keep the examples."""
        return ToyBatch(
            sample_ids=torch.tensor(sample_ids),
            num_images=len(examples),
            num_tokens=sum(example.num_tokens for example in examples),
            examples=tuple(examples),
        )


@pytest.fixture
def processor() -> Callable[..., ToyProcessor]:
    return ToyProcessor


@pytest.fixture
def make_jpeg() -> Callable[..., bytes]:
    return jpeg


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of 11 small pictures of different lengths (4 to 24 tokens)."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for k in range(11):
        (folder / f"{k:02}.jpg").write_bytes(jpeg(k, width=16 + 8 * k, height=16))
    return folder


@pytest.fixture
def write_tar() -> Callable[[Path, Sequence[tuple[str, bytes] | tarfile.TarInfo]], Path]:
    """(path, entries) -> path; an entry is (name, data) or a prepared TarInfo without data."""

    def write(path: Path, entries: Sequence[tuple[str, bytes] | tarfile.TarInfo], **options: Any) -> Path:
        with tarfile.open(path, "w", **options) as archive:
            for entry in entries:
                if isinstance(entry, tarfile.TarInfo):
                    archive.addfile(entry)
                else:
                    info = tarfile.TarInfo(entry[0])
                    info.size = len(entry[1])
                    archive.addfile(info, io.BytesIO(entry[1]))
        return path

    return write
