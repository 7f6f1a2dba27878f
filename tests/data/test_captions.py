"""Captioned images: pictures and the text files beside them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from reca.data.captions import CaptionFolder
from reca.errors import DataError
from reca.images import ImageRejected

MakeJpeg = Callable[..., bytes]


@pytest.fixture
def folder(tmp_path: Path, make_jpeg: MakeJpeg) -> Path:
    """Three captioned pictures, one of them in a folder below, and one without a caption."""
    path = tmp_path / "captioned"
    (path / "sub").mkdir(parents=True)
    for k, name in enumerate(("a.jpg", "b.tar.png", "bare.jpg", "sub/c.jpeg")):
        (path / name).write_bytes(make_jpeg(k))
    (path / "a.txt").write_text(" A cat.\n")
    (path / "b.tar.txt").write_text("猫 <|endoftext|> \u202e\x07")
    (path / "sub/c.txt").write_text("Two\nlines")
    return path


def test_every_image_comes_with_the_text_beside_it(folder: Path, make_jpeg: MakeJpeg) -> None:
    source = CaptionFolder(folder)
    assert [(source.name(k), source.text(k)) for k in range(len(source))] == [
        ("a.jpg", "A cat."),
        ("b.tar.png", "猫 <|endoftext|> \u202e\x07"),
        ("sub/c.jpeg", "Two\nlines"),
    ]
    assert [source.read(k) for k in range(3)] == [make_jpeg(k) for k in (0, 1, 3)]
    assert source.ignored == {"images without a caption": 1}


def test_a_caption_that_cannot_be_used_rejects_its_image(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    source, caption = CaptionFolder(folder), folder / "a.txt"
    for content, reason in (
        (b" \n", "caption a.txt is empty"),
        (b"caf\xe9", "caption a.txt is not UTF-8 text"),
        (b"x" * 2**20, "a text of 1048576 characters; the limit is 65536"),
    ):
        caption.write_bytes(content)
        with pytest.raises(ImageRejected, match=reason):
            source.text(0)
    caption.unlink()
    with pytest.raises(ImageRejected, match=r"caption a\.txt cannot be read: No such file"):
        source.text(0)
    caption.symlink_to(tmp_path / "secret.txt")
    with pytest.raises(ImageRejected, match=r"caption a\.txt cannot be read: Too many levels of symbolic"):
        CaptionFolder(folder).text(0)
    caption.unlink()
    os.mkfifo(caption)
    with pytest.raises(ImageRejected, match="not a regular file"):
        source.text(0)


def test_the_fingerprint_follows_images_and_captions(folder: Path) -> None:
    before = CaptionFolder(folder).fingerprint()
    assert before == CaptionFolder(folder).fingerprint()
    (folder / "a.txt").write_text("A dog and a cat.")
    longer = CaptionFolder(folder).fingerprint()
    (folder / "bare.txt").write_text("Bare.")
    more = CaptionFolder(folder).fingerprint()
    (folder / "a.jpg").write_bytes(b"")
    assert len({before, longer, more, CaptionFolder(folder).fingerprint()}) == 4


def test_a_folder_without_captioned_images_is_refused(folder: Path, photos: Path) -> None:
    with pytest.raises(DataError, match=r"holds 11 images, but none with a \.txt caption beside it"):
        CaptionFolder(photos)
    with pytest.raises(DataError, match=r"a\.txt is not a folder; give one of images with a \.txt caption"):
        CaptionFolder(folder / "a.txt")
