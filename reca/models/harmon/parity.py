"""Which function reproduces which kind of parity pack."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from reca.errors import ConfigError, nearest
from reca.models.family import Pack, Reproduction
from reca.models.harmon.parity_sampling import reproduce_sampler, reproduce_vae
from reca.models.harmon.parity_training import (
    reproduce_diffusion,
    reproduce_generation,
    reproduce_image_to_text,
    reproduce_step,
)

KINDS: Mapping[str, Callable[[Pack], Reproduction]] = {
    "recon": reproduce_generation,
    "recon_dropout": reproduce_generation,
    "text2image": reproduce_generation,
    "image2text": reproduce_image_to_text,
    "diffloss": reproduce_diffusion,
    "step": reproduce_step,
    "vae": reproduce_vae,
    "generate": reproduce_sampler,
    "generate_recon": reproduce_sampler,
}


def pack_kind(pack: Pack) -> str:
    """What a pack exercises; Harmon's packs say so in their configuration."""
    return str(pack.description.get("config", {}).get("kind", pack.kind))


def reproduce(pack: Pack) -> Reproduction:
    """Run the maths of a parity pack. Raises ConfigError for a kind that this family does not have."""
    kind = pack_kind(pack)
    if kind not in KINDS:
        raise ConfigError(f"{pack.folder}: unknown kind of pack {kind!r}; {nearest(kind, KINDS)}")
    return KINDS[kind](pack)
