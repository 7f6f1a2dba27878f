"""A folder of images with their captions beside them."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from pathlib import Path

from reca.data.sources import ImageFolder, printable, read_unlinked, usable_text
from reca.errors import DataError
from reca.images import ImageRejected


class CaptionFolder:
    """All images below a folder that have a caption, a .txt file of the same name; implements `TextSource`.

    Images without one are ignored and counted. A caption that is a link is rejected: it would lead whoever
    links it into the training data.

    Raises: DataError if there is no such folder, or no image with a caption in it.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise DataError(f"{root} is not a folder; give one of images with a .txt caption beside each")
        self._images = ImageFolder(root)
        self.ignored: Counter[str] = Counter(self._images.ignored)
        self._items: list[int] = []
        digest = hashlib.blake2b(self._images.fingerprint().encode(), digest_size=16)
        for item in range(len(self._images)):
            try:
                size = os.lstat(self._caption(item)).st_size
            except OSError:
                self.ignored["images without a caption"] += 1
                continue
            self._items.append(item)
            digest.update(f"{item}\0{size}\n".encode())
        self._digest = digest.hexdigest()
        if not self._items:
            raise DataError(
                f"{root} holds {len(self._images)} images, but none with a .txt caption beside it"
            )

    def _caption(self, item: int) -> Path:
        return self._images.path(item).with_suffix(".txt")

    def __len__(self) -> int:
        return len(self._items)

    def read(self, item: int) -> bytes:
        """The bytes of one image file."""
        return self._images.read(self._items[item])

    def text(self, item: int) -> str:
        """The caption, without surrounding white space."""
        path = self._caption(self._items[item])
        try:
            caption = usable_text(read_unlinked(path).decode("utf-8").strip())
        except OSError as error:
            raise ImageRejected(
                f"caption {printable(path.name)} cannot be read: {error.strerror or error}"
            ) from error
        except UnicodeDecodeError as error:
            raise ImageRejected(
                f"caption {printable(path.name)} is not UTF-8 text: {error.reason}"
            ) from error
        if not caption:
            raise ImageRejected(f"caption {printable(path.name)} is empty")
        return caption

    def name(self, item: int) -> str:
        """Path of the image relative to the folder."""
        return self._images.name(self._items[item])

    def fingerprint(self) -> str:
        """Hash over relative paths and sizes of the images, and sizes of their captions."""
        return self._digest
