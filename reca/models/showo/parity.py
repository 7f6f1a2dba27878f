"""Which function reproduces which case of the parity packs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from reca.errors import ConfigError, nearest
from reca.models.family import Pack, Reproduction
from reca.models.showo.parity_sampling import reproduce_generation, reproduce_tokenizer
from reca.models.showo.parity_text import reproduce_text
from reca.models.showo.parity_training import reproduce_training

CASES: Mapping[str, Callable[[Pack], Reproduction]] = {
    "tiny_clip": reproduce_training,
    "batch_clip": reproduce_training,
    "t2i": reproduce_training,
    "tiny_vq": reproduce_training,
    "batch_vq_blur": reproduce_training,
    "magvit": reproduce_tokenizer,
    "generate": reproduce_generation,
    "text": reproduce_text,
}


def reproduce(pack: Pack) -> Reproduction:
    """Run the maths of a parity pack. Raises ConfigError for a case that this family does not have."""
    if pack.kind not in CASES:
        raise ConfigError(f"{pack.folder}: unknown case of a pack {pack.kind!r}; {nearest(pack.kind, CASES)}")
    return CASES[pack.kind](pack)
