"""Conversations about images, in the JSON or JSONL layout of LLaVA's instruction data.

The file comes from strangers: it is never held decoded, an entry is read when its sample is, and whatever is
wrong with one entry rejects that entry by name. No image outside the image folder is ever opened.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from reca.data.sources import printable, read_unlinked, usable_text
from reca.errors import DataError
from reca.images import ImageRejected

MAX_ENTRY_BYTES = 2**20
PLACEHOLDER = "<image>"

# Possessive throughout: a string that never ends, or a run of quotes, costs one pass and no backtracking.
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?'
_ITEM = re.compile(rb"[\[\]{}]|" + _STRING + rb'|[^\s,"\[\]{}]++', re.DOTALL)
_UP_TO_BRACKET = re.compile(rb'(?:[^"\[\]{}]++|' + _STRING + rb")*+[\[\]{}]?", re.DOTALL)
_JSON = json.JSONDecoder()
_WINDOW = 16_384
_START = re.compile(rb"(?:\xef\xbb\xbf)?\s*")


class Conversations:
    """The entries of a file that name an image, in file order; implements `TextSource`.

    An entry is {"image": path, "conversations": [{"from": "human" | "gpt", "value": text}, ...]}; further
    keys are ignored. Turns alternate, beginning with the human, whose first holds `<image>`. Entries without
    an image are ignored and counted.

    Args:
        path: a JSON list of entries, or JSONL with one in each line.
        root: folder that the images lie below; None takes the folder of `path`.

    Raises: DataError if the file or the folder cannot be read, or no entry names an image.
    """

    def __init__(self, path: Path, root: Path | None = None) -> None:
        self.ignored: Counter[str] = Counter()
        self._path = path
        self._root = os.path.realpath(path.parent if root is None else root)
        self._places = array("q")  # offset, length and number of each entry: 24 bytes instead of its text
        if not os.path.isdir(self._root):
            raise DataError(f"{root} is not a folder; give the one that the images of {path.name} lie below")
        try:
            with path.open("rb") as file:
                self._state = _state(file.fileno())
                if not self._state[0]:
                    raise DataError(f"{path} is empty; expected a JSON list, or one JSON object per line")
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from error
        self._digest = hashlib.blake2b(data, digest_size=16).hexdigest()
        self._index(data)
        if not self._places:
            ignored = ", ".join(f"{count} {reason}" for reason, count in self.ignored.items())
            raise DataError(
                f"{path} holds no entry with an image{f'; ignored: {ignored}' if ignored else ''}"
            )

    def _index(self, data: mmap.mmap) -> None:
        """Find every entry, and leave out those without an image."""
        for number, start, end in self._entries(data):
            try:
                entry = _parse(data[start : min(end, start + MAX_ENTRY_BYTES + 1)])
            except ImageRejected:
                entry = {"image": ""}  # rejected by name when it is read
            if entry.get("image") is None:
                self.ignored["entries without an image"] += 1
            else:
                self._places.extend((start, end - start, number))

    def _entries(self, data: mmap.mmap) -> Iterator[tuple[int, int, int]]:
        """(number from 1, start, end) of every line, or of every element of the list."""
        start = _end_of(_START.match(data))
        if data[start : start + 1] == b"[":
            yield from self._elements(data, start + 1)
        elif data[start : start + 1] == b"{":
            yield from _lines(data, start)
        else:
            raise DataError(f"{self._path} must be a JSON list, or hold one JSON object per line")

    def _elements(self, data: mmap.mmap, start: int) -> Iterator[tuple[int, int, int]]:
        number = 1
        while (item := _ITEM.search(data, start)) is not None:
            begin, start = item.span()
            if data[begin] in b"]}":
                if re.compile(rb"\S").search(data, start):
                    self.ignored["text after the end of the list"] += 1
                return
            if data[begin] in b"[{":
                start = _end_of_nested(data, begin)
            yield number, begin, start
            number += 1
        self.ignored["list without an end (the file was cut)"] += 1

    def __len__(self) -> int:
        return len(self._places) // 3

    def read(self, item: int) -> bytes:
        """The bytes of the entry's image file."""
        name = _image_name(self._entry(item))
        path = os.path.realpath(os.path.join(self._root, name))
        shown = printable(name)[:200]
        if os.path.commonpath([self._root, path]) != self._root:
            raise ImageRejected(f"image {shown} leads out of the image folder")
        try:
            return read_unlinked(path)
        except OSError as error:
            raise ImageRejected(f"image {shown} cannot be read: {error.strerror or error}") from error

    def text(self, item: int) -> tuple[tuple[str, str], ...]:
        """The (question, answer) turns of the entry, without the placeholder of the image."""
        return _turns(self._entry(item))

    def name(self, item: int) -> str:
        """`file:number`, counting lines of JSONL and elements of a list from 1."""
        return printable(f"{self._path.name}:{self._places[3 * item + 2]}")

    def fingerprint(self) -> str:
        """Hash over the file."""
        return self._digest

    def _entry(self, item: int) -> dict[str, Any]:
        start, length, _ = self._places[3 * item : 3 * item + 3]
        try:
            with self._path.open("rb") as file:
                if _state(file.fileno()) != self._state:
                    raise DataError(
                        f"{self._path} changed while it was in use; start again with the new file"
                    )
                file.seek(start)
                return _parse(file.read(min(length, MAX_ENTRY_BYTES + 1)))
        except OSError as error:
            raise ImageRejected(f"cannot be read: {error.strerror or error}") from error


def _state(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns


def _end_of(match: re.Match[bytes] | None) -> int:
    assert match is not None  # the pattern matches the empty text too
    return match.end()


def _end_of_nested(data: mmap.mmap, start: int) -> int:
    """Where the object or list that begins at `start` ends; the end of the file if it never does."""
    with suppress(ValueError, RecursionError):
        # Latin-1 makes bytes characters, and json's scanner is four times as fast as counting brackets.
        return start + _JSON.raw_decode(data[start : start + _WINDOW].decode("latin-1"))[1]
    depth, end = 0, start
    while True:
        begin, end = end, _end_of(_UP_TO_BRACKET.match(data, end))
        bracket = data[end - 1 : end]
        if end == begin or bracket not in (b"[", b"{", b"]", b"}"):
            return len(data)
        depth += 1 if bracket in b"[{" else -1
        if depth == 0:
            return end


def _lines(data: mmap.mmap, start: int) -> Iterator[tuple[int, int, int]]:
    number = 1 + data[:start].count(b"\n")
    while start < len(data):
        end = data.find(b"\n", start)
        end = len(data) if end < 0 else end
        if end - start > MAX_ENTRY_BYTES or data[start:end].strip():
            yield number, start, end
        number, start = number + 1, end + 1


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON number")


def _parse(raw: bytes) -> dict[str, Any]:
    """One entry. Raises ImageRejected unless it is a JSON object of bearable length."""
    if len(raw) > MAX_ENTRY_BYTES:
        raise ImageRejected(f"the entry is longer than {MAX_ENTRY_BYTES} bytes")
    try:
        entry = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ImageRejected(f"the entry is not UTF-8 text: {error.reason}") from error
    except RecursionError as error:
        raise ImageRejected("the entry is nested too deeply") from error
    except ValueError as error:
        raise ImageRejected(f"the entry is not valid JSON: {str(error)[:200]}") from error
    if not isinstance(entry, dict):
        raise ImageRejected(f"the entry must be an object, got {type(entry).__name__}")
    return entry


def _image_name(entry: dict[str, Any]) -> str:
    """The image's path below the image folder, as the entry spells it."""
    name = entry.get("image")
    if not isinstance(name, str) or not name:
        raise ImageRejected(f"`image` must be the path of one image, got {str(name)[:100]!r}")
    usable_text(name)
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ImageRejected(f"image {printable(name)[:200]} must be a path below the image folder")
    return name


def _turns(entry: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    turns = entry.get("conversations")
    if not isinstance(turns, list) or not turns or len(turns) % 2:
        raise ImageRejected("`conversations` must be a list of questions, each followed by its answer")
    texts: list[str] = []
    for number, turn in enumerate(turns):
        speaker = ("human", "gpt")[number % 2]
        if not isinstance(turn, dict) or turn.get("from") != speaker:
            raise ImageRejected(f"turn {number + 1} of the conversation must be from {speaker!r}")
        if not isinstance(turn.get("value"), str):
            raise ImageRejected(f"turn {number + 1} of the conversation has no text")
        texts.append(turn["value"])
    usable_text("".join(texts))
    count = sum(text.count(PLACEHOLDER) for text in texts)
    if count != 1 or PLACEHOLDER not in texts[0]:
        raise ImageRejected(
            f"the first question, and no other text, must hold {PLACEHOLDER} once; found {count}"
        )
    texts[0] = texts[0].replace(PLACEHOLDER, "").strip()  # with the newline that parts it from the question
    return tuple(zip(texts[::2], texts[1::2], strict=True))
