"""Reads the headers of a tar file, and nothing else: names, offsets and sizes of its plain files.

A parser of its own because the files come from strangers: it never extracts, reads at most `_MAX_NAME_BYTES`
of a header, always moves forward, and turns every damage into a count instead of an exception.

Format: POSIX.1-2001 (ustar, pax) and the GNU long-name extension.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

_BLOCK = 512
_MAX_NAME_BYTES = 65_536
_REGULAR = (b"0", b"\0", b"7")
_LEFT_OUT = {
    b"1": "link",
    b"2": "link",
    b"3": "device",
    b"4": "device",
    b"6": "pipe",
    b"S": "sparse file",
}


@dataclass(frozen=True, slots=True)
class Member:
    """One plain file: its data is `size` bytes at `offset` of the tar file."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Index:
    """The usable members in archive order, and reason -> count of the entries left out."""

    members: tuple[Member, ...]
    ignored: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class _Override:
    """What extension headers say about the member that follows them."""

    name: str | None = None
    size: int | None = None
    trouble: str | None = None


def read_index(path: Path) -> Index:
    """Walk the headers of `path` up to its end, a cut or the first damaged header.

    Raises: OSError if the file cannot be opened or read; never for its content.
    """
    members: list[Member] = []
    ignored: Counter[str] = Counter()
    with path.open("rb") as file:
        end = os.fstat(file.fileno()).st_size
        position, override = 0, _Override()
        while position < end:
            file.seek(position)
            header = file.read(_BLOCK)
            if len(header) == _BLOCK and not any(header):
                break
            size = _size(header)
            if size is None:
                ignored["cut or damaged tar header"] += 1
                break
            kind = header[156:157]
            if kind in (b"x", b"L"):
                _extend(override, kind, file, size)
            elif kind not in (b"g", b"K"):
                size = size if override.size is None else override.size
                reason = _judge(members, header, override, position + _BLOCK, size, end)
                if reason is not None:
                    ignored[reason] += 1
                override = _Override()
            position += _BLOCK + -(-size // _BLOCK) * _BLOCK
    return Index(tuple(members), ignored)


def _size(header: bytes) -> int | None:
    """Bytes of data after a header; None if it is short, has a wrong checksum or an impossible number."""
    if len(header) < _BLOCK:
        return None
    checksum = _number(header[148:156])
    if checksum != sum(header[:148]) + 8 * ord(" ") + sum(header[156:]):
        return None
    size = _number(header[124:136])
    return size if size is not None and size >= 0 else None


def _number(text: bytes) -> int | None:
    """An octal field, or a base-256 one (first bit set)."""
    if text[0] & 0x80:
        return int.from_bytes(text[1:]) if text[0] == 0x80 else None
    try:
        return int(text.split(b"\0", 1)[0].strip() or b"0", 8)
    except ValueError:
        return None


def _decode(name: bytes) -> str:
    return name.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _extend(override: _Override, kind: bytes, file: BinaryIO, size: int) -> None:
    """Read a GNU long name or a pax header into `override`."""
    if size > _MAX_NAME_BYTES:
        override.trouble = "extension header too large"
        return
    data = file.read(size)
    if kind == b"L":
        override.name = _decode(data)
        return
    while data:
        length, _, rest = data.partition(b" ")
        if not length.isdigit() or not len(length) + 2 < int(length) <= len(data):
            override.trouble = "damaged extension header"
            return
        key, _, value = rest[: int(length) - len(length) - 2].partition(b"=")
        if key == b"path":
            override.name = _decode(value)
        elif key == b"size" and value.isdigit():
            override.size = int(value)
        elif key.startswith(b"GNU.sparse"):
            override.trouble = "sparse file"
        data = data[int(length) :]


def _judge(
    members: list[Member], header: bytes, override: _Override, offset: int, size: int, end: int
) -> str | None:
    """Append a usable member; otherwise say why it is left out (None for folders, which are no loss)."""
    kind = header[156:157]
    name = override.name
    if name is None:
        name = _decode(header[:100])
        prefix = _decode(header[345:500]) if header[257:262] == b"ustar" and header[262:263] == b"\0" else ""
        name = f"{prefix}/{name}" if prefix else name
    if kind == b"5" or (kind in _REGULAR and name.endswith("/")):
        return None
    if kind not in _REGULAR:
        return _LEFT_OUT.get(kind, "unknown kind of entry")
    if override.trouble is not None:
        return override.trouble
    if name.startswith("/") or ".." in name.split("/"):
        return "unsafe name"
    if offset + size > end:
        return "cut short"
    members.append(Member(name.removeprefix("./"), offset, size))
    return None
