"""The one table of families. Importing this package imports none of them."""

from __future__ import annotations

import importlib

from reca.errors import ConfigError, nearest
from reca.models.family import Family, Variant

FAMILIES = {
    "bagel": "reca.models.bagel",
    "harmon": "reca.models.harmon",
    "janus": "reca.models.janus",
    "miniature": "reca.models.miniature",
    "openuni": "reca.models.openuni",
    "showo": "reca.models.showo",
}


def get_family(name: str) -> Family:
    """Import a family on demand. Raises ConfigError for an unknown name, with its nearest neighbour."""
    if name not in FAMILIES:
        raise ConfigError(f"unknown model family {name!r}; {nearest(name, FAMILIES)}")
    family: Family = importlib.import_module(FAMILIES[name]).FAMILY
    return family


def get_variant(name: str) -> tuple[Family, Variant]:
    """Split `family/variant` and look both up. Raises ConfigError naming the nearest valid one."""
    family_name, _, variant_name = name.partition("/")
    family = get_family(family_name)
    if variant_name not in family.variants:
        raise ConfigError(
            f"unknown variant {variant_name!r} of {family_name!r}; {nearest(variant_name, family.variants)}"
        )
    return family, family.variants[variant_name]
