"""Parity packs: there are none, for nobody else has this model."""

from __future__ import annotations

from reca.errors import ConfigError
from reca.models.family import Pack, Reproduction


def reproduce(pack: Pack) -> Reproduction:
    """Raises ConfigError: no official code exists that the miniature could be compared with."""
    raise ConfigError(
        f"{pack.folder}: the miniature has no official code, so there is nothing to reproduce; "
        "verify packs of another family"
    )
