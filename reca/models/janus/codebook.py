"""What a release's image codebook does to the training targets, found before training."""

from __future__ import annotations

from importlib import resources

import torch

from reca.errors import CheckpointError
from reca.images import load_image, resize, to_tensor
from reca.models.family import Variant
from reca.models.janus.model import JanusModel

_PHOTO = "aitzgorri.jpg"
_MAX_PIXELS = 64_000_000


@torch.no_grad()
def examine(model: JanusModel, variant: Variant) -> tuple[str, ...]:
    """One note: norms of the codebook's rows, and how far the two published rules for codes agree.

    The release chooses the row of the largest cosine, transformers' `encode` the nearest row. They agree if
    all rows have one norm; where they do not, codes made by the other rule are no targets of this model.

    Raises: CheckpointError if a row is zero or not finite: no code would mean anything.
    """
    norms = model.vq.codebook.weight.float().norm(dim=1)
    low, high = norms.aminmax()
    if not torch.isfinite(norms).all() or low == 0:
        raise CheckpointError(
            "the image codebook holds rows that are zero or not finite; copy the weights again"
        )
    photo = (resources.files("reca.assets") / "photos" / _PHOTO).read_bytes()
    spec = variant.target
    pixels = to_tensor(resize(load_image(photo, max_pixels=_MAX_PIXELS), spec), spec)[None].to(norms.device)
    latents = model.vq.latents(pixels)
    nearest = torch.cdist(latents.flatten(2).transpose(1, 2), model.vq.codebook.weight.float()).argmin(dim=-1)
    agreement = (nearest == model.vq.encode(pixels)).float().mean()
    return (
        f"codebook: {len(norms):,} rows of norm {low:.4g} to {high:.4g}; transformers' own encode agrees "
        f"with the release's rule, which makes the targets here, on {agreement:.1%} of a photograph's codes",
    )
