"""Where images come from: a folder, or WebDataset tar files read in place. Nothing is ever unpacked."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Protocol

from reca.data.tar import Member, read_index
from reca.errors import ConfigError, DataError, nearest
from reca.images import ImageRejected
from reca.types import Text

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
MAX_FILE_BYTES = 512 * 2**20
MAX_TEXT_CHARACTERS = 65_536
PACKAGE_PREFIX = "package:"


class Source(Protocol):
    """Images in a fixed order, with random access."""

    @property
    def ignored(self) -> Mapping[str, int]:
        """Reason -> number of entries that were left out when the source was opened."""
        ...

    def __len__(self) -> int: ...

    def read(self, item: int) -> bytes:
        """The bytes of one image file. Raises ImageRejected if they cannot be had."""
        ...

    def name(self, item: int) -> str:
        """A unique, printable name."""
        ...

    def fingerprint(self) -> str:
        """Hash over names and sizes: equal exactly if the order of samples means the same images."""
        ...


class TextSource(Source, Protocol):
    """Images that bring their own text."""

    def text(self, item: int) -> Text:
        """What the item says about its image. Raises ImageRejected if that cannot be used."""
        ...


def printable(name: str) -> str:
    """`name` with control characters and undecodable bytes escaped, safe for terminals and JSON."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in name)


def is_image_name(name: str) -> bool:
    """Whether a file of this name is meant to be an image; hidden files are not."""
    base = name.rsplit("/", 1)[-1]
    return not base.startswith(".") and base.lower().endswith(EXTENSIONS)


def _hash(rows: Iterable[tuple[str, int]]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, size in rows:
        digest.update(f"{name}\0{size}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


class ImageFolder:
    """All images below a folder, sorted by their path relative to it. Linked folders are followed once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ignored: Counter[str] = Counter()
        self._files = sorted(self._scan())  # (relative path, bytes)

    def _scan(self) -> list[tuple[str, int]]:
        found: list[tuple[str, int]] = []
        visited: set[str] = set()

        def unreadable(error: OSError) -> None:
            self.ignored["unreadable folder"] += 1

        for folder, subfolders, names in os.walk(self.root, followlinks=True, onerror=unreadable):
            real = os.path.realpath(folder)
            if real in visited:
                subfolders.clear()
                continue
            visited.add(real)
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            for name in filter(is_image_name, names):
                path = os.path.join(folder, name)
                try:
                    status = os.stat(path)
                except OSError:
                    self.ignored["broken link or unreadable"] += 1
                    continue
                if stat.S_ISREG(status.st_mode):
                    found.append((Path(os.path.relpath(path, self.root)).as_posix(), status.st_size))
                else:
                    self.ignored["not a regular file"] += 1
        return found

    def __len__(self) -> int:
        return len(self._files)

    def path(self, item: int) -> Path:
        """Where the image lies."""
        return self.root / self._files[item][0]

    def read(self, item: int) -> bytes:
        """The file's bytes."""
        try:
            with self.path(item).open("rb") as file:
                return _read_bounded(file.read, os.fstat(file.fileno()).st_size)
        except OSError as error:
            raise ImageRejected(f"cannot be read: {error.strerror or error}") from error

    def name(self, item: int) -> str:
        """Path relative to the folder."""
        return printable(self._files[item][0])

    def fingerprint(self) -> str:
        """Hash over relative paths and sizes."""
        return _hash(self._files)


def read_unlinked(path: str | Path) -> bytes:
    """The bytes of a plain file that is no link itself, for paths that strangers have named.

    Raises: ImageRejected if it is a link, no plain file or too large; OSError if it cannot be read.
    """
    # Not blocking: opening a pipe would wait for its writer for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ImageRejected("not a regular file")
        with open(descriptor, "rb", closefd=False) as file:
            return _read_bounded(file.read, status.st_size)
    finally:
        os.close(descriptor)


def usable_text(text: str) -> str:
    """The same text. Raises ImageRejected if it is too long, or no tokenizer can read it."""
    if len(text) > MAX_TEXT_CHARACTERS:
        raise ImageRejected(f"a text of {len(text)} characters; the limit is {MAX_TEXT_CHARACTERS}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ImageRejected(f"a text holds half a character ({text[error.start]!r})") from error
    return text


def _read_bounded(read: Callable[[int], bytes], size: int) -> bytes:
    if size > MAX_FILE_BYTES:
        raise ImageRejected(f"{size} bytes exceed the {MAX_FILE_BYTES} bytes that one image file may have")
    return read(size)


@dataclass(frozen=True, slots=True)
class _Shard:
    path: Path
    name: str
    size: int
    modified_ns: int


class TarSource:
    """Images inside tar files, by an index of offsets that is made once from the headers.

    Entries that are not plain files (links, devices, pipes, sparse files) or whose names are absolute or
    climb out with `..` are ignored and counted, as is whatever follows a damaged header or a cut.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.ignored: Counter[str] = Counter()
        self._shards: list[_Shard] = []
        self._members: list[tuple[int, Member]] = []
        self._names: list[str] = []
        repeats: Counter[str] = Counter()
        common = Path(os.path.commonpath([path.parent for path in paths]))
        for path in paths:
            try:
                index = read_index(path)
                status = path.stat()
            except OSError as error:
                raise DataError(f"cannot read {path}: {error.strerror or error}") from error
            self.ignored.update(index.ignored)
            shard = _Shard(path, path.relative_to(common).as_posix(), status.st_size, status.st_mtime_ns)
            for member in index.members:
                if not is_image_name(member.name):
                    self.ignored["not an image"] += 1
                    continue
                name = f"{shard.name}/{member.name}"
                repeats[name] += 1
                self._names.append(name if repeats[name] == 1 else f"{name}#{repeats[name]}")
                self._members.append((len(self._shards), member))
            self._shards.append(shard)

    def __len__(self) -> int:
        return len(self._members)

    def read(self, item: int) -> bytes:
        """The member's bytes. Raises DataError if its tar file is no longer the one that was indexed."""
        number, member = self._members[item]
        shard = self._shards[number]
        try:
            with shard.path.open("rb") as file:
                status = os.fstat(file.fileno())
                if (status.st_size, status.st_mtime_ns) != (shard.size, shard.modified_ns):
                    raise DataError(
                        f"{shard.path} changed while it was in use; start again with the new file"
                    )
                file.seek(member.offset)
                return _read_bounded(file.read, member.size)
        except OSError as error:
            raise ImageRejected(f"cannot be read: {error.strerror or error}") from error

    def name(self, item: int) -> str:
        """`shard.tar/member`; a repeated member name gets `#2`, `#3` ..."""
        return printable(self._names[item])

    def fingerprint(self) -> str:
        """Hash over member names and sizes."""
        return _hash(
            (name, member.size) for name, (_, member) in zip(self._names, self._members, strict=True)
        )


class Subset:
    """Some items of another source, in its order."""

    def __init__(self, source: Source, items: Sequence[int]) -> None:
        self._source = source
        self._items = tuple(items)

    @property
    def ignored(self) -> Mapping[str, int]:
        """What the whole source ignored."""
        return self._source.ignored

    def __len__(self) -> int:
        return len(self._items)

    def read(self, item: int) -> bytes:
        """The bytes of one image file."""
        return self._source.read(self._items[item])

    def name(self, item: int) -> str:
        """The name in the whole source."""
        return self._source.name(self._items[item])

    def fingerprint(self) -> str:
        """Hash over the whole source and the choice."""
        return _hash([(self._source.fingerprint(), len(self._source)), *(("", item) for item in self._items)])


def split_source(source: Source, held_out: Sequence[str]) -> tuple[Source, Source]:
    """(items to train on, items held out for evaluation), the latter in the order of `held_out`.

    Raises: DataError for a name that is not there, or if nothing is left to train on.
    """
    if not held_out:
        return source, Subset(source, ())
    place = {source.name(item): item for item in range(len(source))}
    for name in held_out:
        if name not in place:
            raise DataError(f"held-out image {name!r} is not in the data; {nearest(name, place)}")
    chosen = [place[name] for name in held_out]
    rest = sorted(set(range(len(source))) - set(chosen))
    if not rest:
        raise DataError(f"all {len(source)} images are held out; leave some to train on")
    return Subset(source, rest), Subset(source, chosen)


def open_source(path: str | Path | None) -> Source:
    """The images at `path`: a folder of images, a folder of tar files, one tar file, or `package:NAME`.

    Raises: ConfigError without a path; DataError if there is nothing usable there, with the cure.
    """
    if path is None:
        raise ConfigError("no training images: give --data PATH (a folder of images or of tar files)")
    if str(path).startswith(PACKAGE_PREFIX):
        path = _packaged(str(path).removeprefix(PACKAGE_PREFIX))
    path = Path(path)
    if not path.exists():
        raise DataError(
            f"{path} does not exist; expected a folder of images, a folder of tar files or a tar file"
        )
    if path.is_file():
        if path.suffix.lower() != ".tar":
            raise DataError(
                f"{path} is not a folder or an uncompressed .tar; give the folder, or unpack .tar.gz to .tar"
            )
        source: Source = TarSource([path])
        found = f"{path} holds"
    else:
        tars = sorted(p for p in path.rglob("*.tar") if p.is_file() and not p.name.startswith("."))
        source = ImageFolder(path)
        if tars and len(source):
            raise DataError(
                f"{path} holds {len(source)} images beside {len(tars)} tar files; give a folder of one kind"
            )
        if tars:
            source = TarSource(tars)
        found = f"{path} holds {len(tars)} tar files with" if tars else f"{path} holds"
    if not len(source):
        ignored = ", ".join(f"{count} {reason}" for reason, count in source.ignored.items())
        raise DataError(
            f"{found} no images ({', '.join(EXTENSIONS)}){f'; ignored: {ignored}' if ignored else ''}"
        )
    return source


def _packaged(name: str) -> Path:
    """The folder of images NAME that ships with reca."""
    assets = Path(str(resources.files("reca.assets")))
    folders = [folder for folder in assets.iterdir() if folder.is_dir()]
    known = [f.name for f in folders if any(is_image_name(image.name) for image in f.iterdir())]
    if name not in known:
        raise DataError(f"reca ships no images named {name!r}; {nearest(name, known)}")
    return assets / name
