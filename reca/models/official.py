"""Reading a release's configuration, which is JSON under the official keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reca.errors import CheckpointError


def entry(official: Mapping[str, Any], key: str, where: str) -> Any:
    """The value of a key that must be there. Raises CheckpointError naming the key and `where` it belongs."""
    if key not in official:
        raise CheckpointError(f"{where}: key {key!r} is missing; use the configuration files of the release")
    return official[key]


def pick(cls: type, official: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The entries that a config class has fields for. Raises CheckpointError unless all of them are there."""
    return {name: entry(official, name, where) for name in cls.__dataclass_fields__}  # type: ignore[attr-defined]


def require(official: Mapping[str, Any], key: str, value: Any) -> None:
    """Raise CheckpointError if `key` says anything but the only `value` that is built here."""
    if official.get(key, value) != value:
        raise CheckpointError(
            f"config: {key}={official[key]!r} is not supported; every release has {value!r}"
        )
