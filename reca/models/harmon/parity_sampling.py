"""Parity packs of the autoencoder and of the samplers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reca.models.autoencoder import AutoencoderKLConfig
from reca.models.checkpoint import load_slots
from reca.models.family import Pack, Reproduction
from reca.models.harmon.context import Canvas, Prefix, embed_image, read_prefix
from reca.models.harmon.model import HarmonModel
from reca.models.harmon.parity_training import load_pack_model, prompt_ids
from reca.models.harmon.sampler import Plan, Randomness, Step, picture_steps
from reca.models.harmon.vae import KLVAE, vae_slots


@torch.no_grad()
def reproduce_vae(pack: Pack) -> Reproduction:
    """Kind `vae`: moments, latents in the model's layout, and their reconstruction."""
    official: dict[str, Any] = pack.description["config"]
    fields = official["ddconfig"]
    config = AutoencoderKLConfig(
        **{name: fields[name] for name in AutoencoderKLConfig.__dataclass_fields__ if name != "ch_mult"},
        ch_mult=tuple(fields["ch_mult"]),
    )
    with torch.device("meta"):
        vae = KLVAE(config, float(official["vae_scale"]))
    load_slots(vae, vae_slots(config), pack.folder / "weights.safetensors", device=torch.device("cpu"))
    moments = vae.moments(pack.inputs["pixels"])
    grid = (moments.shape[2], moments.shape[3])
    latents = vae.encode(pack.inputs["pixels"])
    return Reproduction(
        {
            "moments": moments,
            "latents": latents.unflatten(1, grid),
            "reconstruction": vae.decode(latents, grid),
        }
    )


@torch.no_grad()
def reproduce_sampler(pack: Pack) -> Reproduction:
    """Kinds `generate` and `generate_recon`: every iteration of every picture."""
    model, inputs = load_pack_model(pack), pack.inputs
    options = pack.description["config"]["generate"]
    plan = Plan(options["num_iter"], options["cfg"], options["cfg_schedule"], options["temperature"])
    grid = (options["image_shape"][0], options["image_shape"][1])
    pictures = [
        list(
            picture_steps(
                Canvas(model, _prefixes(model, pack, image, grid), grid),
                Randomness(inputs["orders"][image], inputs["init_noise"][image], inputs["step_noise"][image]),
                plan,
            )
        )
        for image in range(options["batch"])
    ]
    tokens, seen = grid[0] * grid[1], {}
    if "latents" in inputs:
        embedded = [embed_image(model, latents.flatten(0, 1), grid) for latents in inputs["latents"]]
        seen["z_enc"] = torch.stack(embedded)
    return Reproduction(
        {
            **seen,
            "latents": torch.stack([steps[-1].after.unflatten(0, grid) for steps in pictures]),
            "predicted_in_iteration": _by_iteration(
                [
                    [torch.zeros(tokens, dtype=torch.uint8).index_fill(0, s.predicted, 1) for s in steps]
                    for steps in pictures
                ]
            ),
            "tokens_before_iteration": _by_iteration([[s.before for s in steps] for steps in pictures]),
            "z_iter0": _passes([steps[0] for steps in pictures]),
            "z_iter_last": _passes([steps[-1] for steps in pictures]),
        }
    )


def _prefixes(model: HarmonModel, pack: Pack, image: int, grid: tuple[int, int]) -> list[Prefix]:
    """The conditional and the unconditional prefix of one picture."""
    inputs, batch = pack.inputs, pack.description["config"]["generate"]["batch"]
    masks = inputs["attention_mask"]
    if "latents" not in inputs:
        rows = (image, batch + image)
        return [read_prefix(model, prompt_ids(inputs["input_ids"][row], masks[row])) for row in rows]
    seen = embed_image(model, inputs["latents"][image].flatten(0, 1), grid)
    unconditional = prompt_ids(inputs["uncond_ids"][image], masks[batch + image])
    return [
        read_prefix(model, inputs["input_ids"][image].tolist(), seen),
        read_prefix(model, unconditional),
    ]


def _by_iteration(pictures: list[list[Tensor]]) -> Tensor:
    """[iterations, pictures, ...]."""
    return torch.stack([torch.stack(steps) for steps in pictures], dim=1)


def _passes(steps: list[Step]) -> Tensor:
    """[passes * pictures, ...]: conditional rows of all pictures, then unconditional ones."""
    return torch.stack([step.condition for step in steps], dim=1).flatten(0, 1)
