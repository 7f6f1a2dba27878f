"""Whole files, or none: temporary file, fsync, rename, fsync of the folder."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from reca.errors import DiskError
from reca.files.faults import crash_point

_OVERLAP = 1 << 20  # bytes from which hashing in a second thread pays for the hand-over
_PIECE = 16 << 20
_CURES = {
    errno.ENOSPC: "free some space or keep fewer checkpoints",
    errno.EDQUOT: "free some of your quota or keep fewer checkpoints",
    errno.EFBIG: "raise the file size limit (ulimit -f)",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.EROFS: "choose a folder on a writable file system",
    errno.EIO: "check the disk; what was published before is intact",
    errno.ENOTDIR: "a part of the path is a file; choose another folder",
    errno.EEXIST: "a part of the path is a file; choose another folder",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """What a manifest says of one file: bytes and the SHA-256 of its content in hexadecimal."""

    size: int
    sha256: str


Stamp: TypeAlias = tuple[int, int, int]
written: ContextVar[dict[Stamp, Entry] | None] = ContextVar("written", default=None)
"""Inside `publish_dir`: what was written through this layer and so needs no reading back to be hashed."""


def stamp(path: Path) -> Stamp:
    """(inode, bytes, nanoseconds of the last change): equal stamps mean the file that was written."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _free_bytes(path: Path) -> str:
    for folder in (path, *path.parents):
        with suppress(OSError):
            return f"{shutil.disk_usage(folder).free:,}"
    return "an unknown number of"


@contextmanager
def disk_errors(path: Path, needed: int = 0) -> Iterator[None]:
    """Turn an OSError of the block into a DiskError that names `path`, the bytes needed and those free."""
    try:
        yield
    except OSError as error:
        cure = _CURES.get(error.errno or 0, "check the path and the disk")
        space = f"needed {needed:,} bytes, {_free_bytes(path)} free"
        raise DiskError(f"cannot write {path}: {error.strerror or error} ({space}); {cure}") from error


def token() -> str:
    """A name part that no other process uses."""
    return f"{os.getpid()}-{secrets.token_hex(4)}"


def claim(descriptor: int) -> bool:
    """Mark an open temporary as in use until its process closes it or dies; False if another holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: the lock of the run folder is the only protection
        return True
    return True


def sync_folder(folder: Path) -> None:
    """Make the names inside `folder` survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Sink:
    """What `open_atomic` yields: takes bytes in order, and hashes them while they are written."""

    def __init__(self, file: BinaryIO, target: Path, hasher: Executor) -> None:
        self.count = 0
        self.digest = hashlib.sha256()
        self._file, self._target, self._hasher = file, target, hasher

    def write(self, chunk: bytes | memoryview) -> int:
        """Append one piece; returns its length."""
        crash_point("write.chunk", self._target)
        if len(chunk) < _OVERLAP:
            self.digest.update(chunk)
            self._file.write(chunk)
        else:
            hashing = self._hasher.submit(self.digest.update, chunk)
            self._file.write(chunk)
            hashing.result()
        self.count += len(chunk)
        return len(chunk)

    def flush(self) -> None:
        """Hand what is buffered to the system."""
        self._file.flush()


@contextmanager
def open_atomic(path: Path, size: int = 0) -> Iterator[Sink]:
    """Yield what writes to `path` by way of a temporary file; if the block raises, nothing changes.

    A symbolic link is followed. The new file's mode is 0666 less the umask; missing parents are made.

    Args:
        path: the file to write.
        size: expected bytes, for the message.

    Raises: DiskError for every failure of the file system.
    """
    with disk_errors(path, size):
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_file():
            raise OSError(errno.EINVAL, "it exists and is not a regular file")
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{token()}.tmp")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            with os.fdopen(descriptor, "wb") as file, ThreadPoolExecutor(1) as hasher:
                claim(descriptor)
                crash_point("write.created", target)
                sink = Sink(file, target, hasher)
                yield sink
                file.flush()
                os.fsync(descriptor)
                crash_point("write.synced", target)
                os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        crash_point("write.renamed", target)
        sync_folder(target.parent)
        if (entries := written.get()) is not None:
            entries[stamp(target)] = Entry(sink.count, sink.digest.hexdigest())


def write_chunks(path: Path, chunks: Iterable[bytes | memoryview], size: int) -> None:
    """Write `chunks` (together `size` bytes) to `path`, whole or not at all, as `open_atomic`."""
    with open_atomic(path, size) as sink:
        for chunk in chunks:
            sink.write(chunk)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's bytes, whole or not at all, 16 MiB at a time. Raises: DiskError."""
    with disk_errors(target), source.open("rb") as file:
        pieces = iter(lambda: file.read(_PIECE), b"")
        write_chunks(target, pieces, source.stat().st_size)


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all. Raises: DiskError."""
    write_chunks(path, [data], len(data))


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path`, whole or not at all. Raises: DiskError."""
    write_atomic(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON; a NaN or infinity in it raises ValueError. Raises: DiskError."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
