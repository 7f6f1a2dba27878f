"""Reproduces the parity packs of the autoencoder and of the sampler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from reca.errors import ConfigError
from reca.images import patchify, to_image
from reca.layers.implementation import set_kernels
from reca.models.bagel.checkpoint import bagel_slots
from reca.models.bagel.config import BagelConfig
from reca.models.bagel.context import Context, latent_grid, with_image, with_latents, with_text
from reca.models.bagel.model import BagelModel
from reca.models.bagel.sampler import Conditions, Step, time_grid, trajectory
from reca.models.bagel.vae import FluxVAE, VAEConfig, vae_slots
from reca.models.checkpoint import load_slots
from reca.models.family import Pack, Reproduction, SampleOptions

_CPU = torch.device("cpu")


@torch.no_grad()
def reproduce_vae(pack: Pack) -> Reproduction:
    """Encode, sample, decode; and what zero padding in a batch does to the moments."""
    official: Mapping[str, Any] = pack.description["config"]
    fields = {name: official["vae_config"][name] for name in VAEConfig.__dataclass_fields__}
    config = VAEConfig(**{**fields, "ch_mult": tuple(fields["ch_mult"])})
    with torch.device("meta"):
        vae = FluxVAE(config)
    load_slots(vae, vae_slots(config), pack.folder / "weights.safetensors", device=_CPU)
    inputs, formed = pack.inputs, dict[str, Tensor]()
    encoder, decoder = vae.autoencoder.encoder, vae.autoencoder.decoder
    hooks = [
        encoder.mid_block.register_forward_pre_hook(_keep_input(formed, "encoder.before_mid")),
        encoder.mid_block.register_forward_hook(_keep_output(formed, "encoder.after_mid")),
        decoder.mid_block.register_forward_hook(_keep_output(formed, "decoder.after_mid")),
    ]
    formed["moments"] = vae.moments(inputs["image"])
    formed["latent"] = vae.sample(formed["moments"], inputs["posterior_noise"])
    formed["reconstruction"] = vae.decode(formed["latent"])
    for hook in hooks:
        hook.remove()
    formed["latent_tokens"] = patchify(formed["latent"][0], official["latent_patch_size"])
    formed["reconstruction_uint8"] = torch.from_numpy(np.array(to_image(formed["reconstruction"][0])))
    formed["padded_moments"] = vae.moments(inputs["padded_images"])
    for index, (height, width) in enumerate(inputs["padded_sizes"].tolist()):
        image = inputs["padded_images"][index : index + 1, :, :height, :width]
        formed[f"single_moments.{index}"] = vae.moments(image)
    return Reproduction(formed)


def _keep_input(formed: dict[str, Tensor], name: str) -> Any:
    def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        formed[name] = arguments[0]

    return hook


def _keep_output(formed: dict[str, Tensor], name: str) -> Any:
    def hook(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        formed[name] = output

    return hook


@torch.no_grad()
def reproduce_sampler(pack: Pack) -> Reproduction:
    """Every run of the pack: contexts, latents and guided velocity of each step, raw ones of the first."""
    model = _load_model(pack)
    formed: dict[str, Tensor] = {}
    not_formed: dict[str, str] = {}
    for run in pack.description["runs"]:
        conditions = _conditions(model, pack.inputs, run["image"])
        options = SampleOptions(
            steps=run["num_timesteps"],
            text_guidance=run["cfg_text_scale"],
            image_guidance=run["cfg_img_scale"],
            guidance_interval=tuple(run["cfg_interval"]),
            renorm=run["cfg_renorm_type"],
            renorm_min=run["cfg_renorm_min"],
            shift=run["timestep_shift"],
        )
        height, width = (side // model.config.latent_stride for side in run["image_shape"])
        grid = latent_grid(model, height, width)
        steps = list(trajectory(model, conditions, pack.inputs["init_noise"], grid, options))
        tensors = _context_tensors(model, conditions) | _step_tensors(steps)
        tensors["timesteps"] = time_grid(options.steps, options.shift)
        formed |= {f"{run['name']}.{name}": tensor for name, tensor in tensors.items()}
        calls = f"{run['name']}.forward_calls"
        if calls in pack.expected and int(pack.expected[calls]) != int(formed[calls]):
            not_formed[calls] = (
                f"{int(formed.pop(calls))} passes give the same velocities; the others repeat one"
            )
    return Reproduction(formed, not_formed)


def _load_model(pack: Pack) -> BagelModel:
    """The pack's transformer; it comes without autoencoder, which stays on the meta device."""
    with torch.device("meta"):
        model = BagelModel(BagelConfig.from_official(pack.description["config"]))
    load_slots(model, bagel_slots(model.config), pack.folder / "weights.safetensors", device=_CPU)
    set_kernels(model, pack.kernels)
    return model


def _conditions(model: BagelModel, inputs: Mapping[str, Tensor], images: str) -> Conditions:
    """The contexts of a run that is given `none`, `vit` or `vae+vit`."""
    if images not in ("none", "vit", "vae+vit"):
        raise ConfigError(f"sampler pack: image must be 'none', 'vit' or 'vae+vit', got {images!r}")
    text_ids, empty = inputs["text_ids"].tolist(), Context.empty(model)
    text = with_text(model, empty, text_ids)
    if images == "none":
        return Conditions(text, empty)
    seen = with_latents(model, empty, inputs["cond_latent"][0]) if images == "vae+vit" else empty
    seen = with_image(model, seen, inputs["vit_image"])
    return Conditions(with_text(model, seen, text_ids), seen, text)


def _context_tensors(model: BagelModel, conditions: Conditions) -> dict[str, Tensor]:
    full = conditions.full
    contexts = (full, conditions.without_text, conditions.without_image or full)
    return {
        "rope": torch.tensor([context.next_position for context in contexts]),
        "kv_len": torch.tensor([context.length for context in contexts]),
        "context_k": torch.stack(full.rotated(model, 0)),
        "context_v": torch.stack(full.values),
    }


def _step_tensors(steps: list[Step]) -> dict[str, Tensor]:
    first = {
        "step0.v_cond": steps[0].full,
        "step0.v_text": steps[0].without_text,
        "step0.v_img": steps[0].without_image,
    }
    return {
        "x": torch.stack([*(step.before for step in steps), steps[-1].after]),
        "v": torch.stack([step.velocity for step in steps]),
        "latent": steps[-1].after,
        "forward_calls": torch.tensor(sum(step.num_passes for step in steps)),
        **{name: velocity for name, velocity in first.items() if velocity is not None},
    }
