"""Which function reproduces which kind of parity pack, and the kind that needs no model: preprocessing."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from reca.errors import ConfigError, nearest
from reca.images import ImageSpec, resize, resized_size, to_rgb, to_tensor
from reca.models.bagel.parity_sampling import reproduce_sampler, reproduce_vae
from reca.models.bagel.parity_training import reproduce_siglip, reproduce_training
from reca.models.family import Pack, Reproduction


def reproduce_preprocess(pack: Pack) -> Reproduction:
    """Kind `preprocess`: pixels of both encoders in training and sampling, and a table of sizes."""
    config = pack.description["config"]
    specs = {
        name: ImageSpec(
            max_size=entry["max_image_size"],
            min_size=entry["min_image_size"],
            stride=entry["image_stride"],
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            max_pixels=config["max_pixels"],
        )
        for name, entry in config.items()
        if isinstance(entry, dict)
    }
    tensors: dict[str, Tensor] = {}
    for name in (name for name in pack.inputs if name.startswith("image_uint8.")):
        index = name.split(".")[1]
        image = to_rgb(Image.fromarray(pack.inputs[name].numpy()))
        resized = resize(image, specs["small_vae"])  # sampling resizes once more from here
        tensors |= {
            f"rgb.{index}": torch.from_numpy(np.array(image)),
            f"vae.{index}": to_tensor(image, specs["small_vae"]),
            f"vit.{index}": to_tensor(image, specs["small_vit"]),
            f"infer_vae.{index}": to_tensor(resized, specs["small_vae"]),
            f"infer_vit.{index}": to_tensor(resized, specs["small_vit_infer"]),
        }
    sources = [(int(width), int(height)) for width, height in pack.inputs["source_sizes_wh"]]
    for name, spec in specs.items():
        tensors[f"sizes.{name}"] = torch.tensor(
            [resized_size(width, height, spec) for width, height in sources]
        )
    return Reproduction(tensors)


KINDS: Mapping[str, Callable[[Pack], Reproduction]] = {
    "train": reproduce_training,
    "siglip": reproduce_siglip,
    "vae": reproduce_vae,
    "sampler": reproduce_sampler,
    "preprocess": reproduce_preprocess,
}


def reproduce(pack: Pack) -> Reproduction:
    """Run the maths of a parity pack. Raises ConfigError for a kind that this family does not have."""
    if pack.kind not in KINDS:
        raise ConfigError(f"{pack.folder}: unknown kind of pack {pack.kind!r}; {nearest(pack.kind, KINDS)}")
    return KINDS[pack.kind](pack)
