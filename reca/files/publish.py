"""Folders that appear whole, with a manifest by which every byte can be checked later.

    staging folder -> files -> fsync -> MANIFEST.json -> fsync -> one rename -> fsync of the parent

A process that dies leaves at most hidden folders beside the published ones; `sweep_staging` removes them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from reca.errors import CheckpointError, ConfigError
from reca.files.atomic import Entry, Stamp, claim, disk_errors, stamp, sync_folder, token, write_text, written
from reca.files.faults import crash_point

MANIFEST = "MANIFEST.json"
_FORMAT = 1
_HASHERS = 4
_CURE = "use another checkpoint or copy this one again"
_TOKEN = r"-\d+-[0-9a-f]{8}"
_STAGING = re.compile(rf"\.staging-.+{_TOKEN}")
_REMOVED = re.compile(rf"\.removed-.+{_TOKEN}")
_REPLACED = re.compile(rf"\.replaced-(?P<name>.+){_TOKEN}")
_TEMPORARY = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.tmp")


def _hidden(final: Path, kind: str) -> Path:
    return final.with_name(f".{kind}-{final.name}-{token()}")


def _regular_files(folder: Path) -> dict[str, Path]:
    """Relative name -> path of all files below `folder`; anything else but folders is an error."""
    found = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode):
            found[path.relative_to(folder).as_posix()] = path
        elif not stat.S_ISDIR(mode):
            raise CheckpointError(f"{path} is neither a file nor a folder; only those can be checked")
    return found


def _read_entry(path: Path) -> Entry:
    with path.open("rb") as file:
        return Entry(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def _sync_entry(path: Path) -> Entry:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return _read_entry(path)


def _render(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def _digest(manifest: Mapping[str, Any]) -> str:
    body = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(_render(body).encode("utf-8")).hexdigest()


def _seal(staging: Path, known: Mapping[Stamp, Entry], extra: Mapping[str, Any]) -> None:
    """Write the manifest of everything in `staging` and make all of it durable."""
    files = {
        name: asdict(known.get(stamp(path)) or _sync_entry(path))
        for name, path in _regular_files(staging).items()
    }
    manifest = {**extra, "format": _FORMAT, "files": files}
    write_text(staging / MANIFEST, _render({**manifest, "digest": _digest(manifest)}))
    for folder in (path for path in staging.rglob("*") if path.is_dir()):
        sync_folder(folder)
    sync_folder(staging)


def _is_occupied(final: Path) -> bool:
    if final.is_dir() and not final.is_symlink():
        return any(final.iterdir())
    return final.is_symlink() or final.exists()


@contextmanager
def publish_dir(
    final: Path, *, manifest: Mapping[str, Any] | None = None, replace: bool = False
) -> Iterator[Path]:
    """Yield an empty folder to fill; on a clean exit it becomes `final` in one rename, with MANIFEST.json.

    Nothing appears at `final` if the block raises or the process dies.

    Args:
        final: the folder to publish; missing parents are made.
        manifest: JSON-ready facts to store beside the hashes; `format`, `files` and `digest` are taken.
        replace: swap an existing `final` for the new one; `sweep_staging` undoes a death in between.

    Raises: ConfigError if `final` exists and is not an empty folder; DiskError if the file system refuses.
    """
    if taken := {"format", "files", "digest"} & set(manifest or {}):
        raise ValueError(f"publish_dir: manifest must not set {', '.join(sorted(taken))}")
    staging = _hidden(final, "staging")
    with disk_errors(final):
        occupied = _is_occupied(final)
        if occupied and not replace:
            raise ConfigError(f"{final} exists; choose another folder or remove it")
        final.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
        descriptor = os.open(staging, os.O_RDONLY | os.O_DIRECTORY)
    entries: dict[Stamp, Entry] = {}
    reset = written.set(entries)
    try:
        claim(descriptor)
        with disk_errors(staging):
            crash_point("publish.created", staging)
        yield staging
        with disk_errors(final):
            crash_point("publish.filled", staging)
            _seal(staging, entries, manifest or {})
            crash_point("publish.synced", staging)
            _swap(staging, final, occupied)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    finally:
        written.reset(reset)
        os.close(descriptor)


def _swap(staging: Path, final: Path, occupied: bool) -> None:
    replaced = _hidden(final, "replaced") if occupied else None
    if replaced is not None:
        os.rename(final, replaced)
    try:
        if replaced is not None:
            crash_point("publish.replaced", final)
        os.rename(staging, final)
    except BaseException:
        if replaced is not None:
            os.rename(replaced, final)
        raise
    crash_point("publish.renamed", final)
    sync_folder(final.parent)
    if replaced is not None:
        _delete(replaced)
    crash_point("publish.done", final)


def _delete(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    for entry in sorted(path.iterdir()):
        _delete(entry)
        crash_point("remove.entry", entry)
    path.rmdir()


def remove_dir(path: Path) -> None:
    """Delete a published folder; whatever interrupts it, no half of it keeps its name. Raises: DiskError."""
    with disk_errors(path):
        hidden = _hidden(path, "removed")
        os.rename(path, hidden)
        crash_point("remove.renamed", path)
        _delete(hidden)
        crash_point("remove.done", path)


def _in_use(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return not claim(descriptor)
    finally:
        os.close(descriptor)


def sweep_staging(parent: Path) -> list[str]:
    """Remove what dead writers left in `parent` and undo a replacement that was cut in two.

    Live writers are spared. Call it at the start, holding the lock of the run.

    Returns: names that were removed or put back.
    Raises: DiskError.
    """
    swept = []
    with disk_errors(parent):
        for path in sorted(parent.iterdir()) if parent.is_dir() else []:
            if replaced := _REPLACED.fullmatch(path.name):
                final = path.with_name(replaced["name"])
                if final.exists():
                    _delete(path)
                else:
                    os.rename(path, final)
            elif any(pattern.fullmatch(path.name) for pattern in (_STAGING, _REMOVED, _TEMPORARY)):
                if _in_use(path):
                    continue
                _delete(path)
            else:
                continue
            swept.append(path.name)
    return swept


def _read_manifest(folder: Path) -> tuple[dict[str, Any], dict[str, Entry]]:
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
        manifest = json.loads(text)
        if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
            raise ValueError("unknown format")
        # Bytes, not values: a flipped space or a second key of the same name parses to the same mapping.
        if manifest.get("digest") != _digest(manifest) or _render(manifest).encode("utf-8") != text:
            raise ValueError("it was changed after it was written")
        return manifest, {name: Entry(**entry) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise CheckpointError(f"{path} cannot be trusted: {reason}; {_CURE}") from error


def _first_difference(folder: Path, expected: Mapping[str, Entry]) -> str | None:
    """What is wrong with the files of `folder`, cheapest checks first; None if every byte is as expected."""
    found = {name: file for name, file in _regular_files(folder).items() if name != MANIFEST}
    for name in sorted(expected.keys() ^ found.keys()):
        return f"{folder / name} {'is missing' if name in expected else 'is not in the manifest'}"
    for name, file in found.items():
        if (size := file.stat().st_size) != expected[name].size:
            return f"{file} has {size:,} bytes, its manifest says {expected[name].size:,}"
    with ThreadPoolExecutor(_HASHERS) as pool:
        for (name, file), actual in zip(found.items(), pool.map(_read_entry, found.values()), strict=True):
            if actual != expected[name]:
                return f"{file} differs from its SHA-256 in the manifest"
    return None


def verify_dir(path: Path) -> dict[str, Any]:
    """Check every byte of a published folder against its MANIFEST.json and return the manifest.

    Raises: CheckpointError, naming the first file that is missing, extra, of another size or other content.
    """
    manifest, expected = _read_manifest(path)
    try:
        difference = _first_difference(path, expected)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or path} cannot be read: {error.strerror}; {_CURE}"
        ) from error
    if difference is not None:
        raise CheckpointError(f"{difference}; {_CURE}")
    return manifest
