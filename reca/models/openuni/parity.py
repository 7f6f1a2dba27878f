"""Which function reproduces which kind of parity pack."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from reca.errors import ConfigError, nearest
from reca.models.family import Pack, Reproduction
from reca.models.openuni.parity_sampling import reproduce_autoencoder, reproduce_internvl, reproduce_sampler
from reca.models.openuni.parity_training import reproduce_training

KINDS: Mapping[str, Callable[[Pack], Reproduction]] = {
    "recon": reproduce_training,
    "text2image": reproduce_training,
    "generate": reproduce_sampler,
    "dcae": reproduce_autoencoder,
    "internvl": reproduce_internvl,
}


def reproduce(pack: Pack) -> Reproduction:
    """Run the maths of a parity pack. Raises ConfigError for a kind that this family does not have."""
    if pack.kind not in KINDS:
        raise ConfigError(f"{pack.folder}: unknown kind of pack {pack.kind!r}; {nearest(pack.kind, KINDS)}")
    return KINDS[pack.kind](pack)
