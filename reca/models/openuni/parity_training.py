"""Parity packs of the training path: every tensor on the way from a picture to the gradients.

The model is run as it trains, with hooks. What it never forms (a padded sequence, the prompt behind the last
layer) is put together here from what it did use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reca.layers.implementation import set_kernels
from reca.layers.stream import Stream
from reca.models.checkpoint import Slot, load_slots
from reca.models.family import Pack, Reproduction
from reca.models.openuni.batch import (
    OpenUniBatch,
    OpenUniDraws,
    Prompts,
    ReconstructionBatch,
    TextToImageBatch,
)
from reca.models.openuni.config import OpenUniConfig
from reca.models.openuni.model import TIMESTEPS, OpenUniModel
from reca.models.openuni.slots import autoencoder_slots, internvl_slots, trained_slots
from reca.models.openuni.transformer import Layout
from reca.objectives.flow_matching import interpolate

CPU = torch.device("cpu")


def load_pack_model(pack: Pack) -> OpenUniModel:
    """The model of a pack, fp32 on the CPU; parts without weights stay on the meta device, queries are 0."""
    official = pack.description["config"]
    with torch.device("meta"):
        model = OpenUniModel(OpenUniConfig.from_official(official))
    model.sana.requires_grad_(not official.get("freeze_transformer", False))
    slots = internvl_slots(model.config, "lmm.")
    if pack.kind == "internvl":
        model.meta_queries = nn.Parameter(torch.zeros(model.meta_queries.shape))
    else:
        slots |= trained_slots(model) | autoencoder_slots(model, "vae.")
    load_slots(model, slots, pack.folder / "weights.safetensors", device=CPU)
    set_kernels(model, pack.kernels)
    return model


def pack_prompts(pack: Pack) -> list[list[int]]:
    """The prompts of a pack without their padding."""
    rows = zip(pack.inputs["input_ids"], pack.inputs["attention_mask"].bool(), strict=True)
    return [ids[mask].tolist() for ids, mask in rows]


def pack_batch(config: OpenUniConfig, pack: Pack) -> tuple[OpenUniBatch, OpenUniDraws]:
    """The batch and the random decisions of a training pack."""
    inputs = pack.inputs
    is_reconstruction = "pixel_values" in inputs
    kind = ReconstructionBatch if is_reconstruction else TextToImageBatch
    noise = inputs["noise"]
    prompts = Prompts.of(config, pack_prompts(pack))
    batch = kind(
        sample_ids=torch.arange(len(noise)),
        num_images=len(noise),
        num_tokens=len(prompts.token_ids),
        prompts=prompts,
        pixels=inputs.get("pixel_values"),
        latents=inputs.get("image_latents"),
        latent_shape=(noise.shape[1], noise.shape[2], noise.shape[3]),
    )
    term = "reconstruction" if is_reconstruction else "text_to_image"
    draws = OpenUniDraws(
        counts={term: torch.tensor(float(len(noise)))},
        time=(TIMESTEPS - (inputs["u"] * TIMESTEPS).floor()) / TIMESTEPS,
        noise=noise,
        kept=inputs.get("vit_drop_path"),
    )
    return batch, draws


def reproduce_training(pack: Pack) -> Reproduction:
    """Kinds `recon` and `text2image`: loss, every gradient and all stages."""
    model = load_pack_model(pack)
    batch, draws = pack_batch(model.config, pack)
    sana: Any = model.sana
    blocks = sana.transformer_blocks
    watched: dict[str, nn.Module] = {f"layer{i}": layer for i, layer in enumerate(model.layers)}
    watched |= {f"connector.layer{i}": layer for i, layer in enumerate(model.connector.layers)}
    watched |= {f"sana.block{i}": block for i, block in enumerate(blocks)}
    watched |= {"vit_embeds": model.aligner, "query_hidden": model.norm, "prompt_embeds": model.projector}
    watched |= {"sana.patch_embed": sana.patch_embed, "sana.caption": sana.caption_norm}
    watched |= {"sana.block0.attn1": blocks[0].attn1, "sana.block0.attn2": blocks[0].attn2}
    watched |= {"sana.block0.ff": blocks[0].ff, "time": sana.time_embed, "pred": sana}
    watched |= {f"vit.layer{i}": layer for i, layer in enumerate(model.vision.layers)}
    with record(watched) as (inputs, outputs):
        losses = model(batch, draws)
        (term,) = losses
        loss = losses[term] / draws.counts[term]
        caption = outputs["prompt_embeds"]
        caption.retain_grad()
        loss.backward()
    with torch.no_grad():
        clean = model.encode_target(batch)
        pred, target = outputs["pred"][0], draws.noise - clean
        noisy = interpolate(clean.flatten(1), draws.noise.flatten(1), draws.time).view_as(clean)
        num_samples = batch.num_images
        by_sample = {
            name: (rows.rows if isinstance(rows, Stream) else rows).unflatten(0, (num_samples, -1))
            for name, rows in outputs.items()
            if name.startswith("connector.") or name in ("query_hidden", "prompt_embeds")
        }
        return Reproduction(
            {
                **{name: value for name, value in outputs.items() if name.startswith(("vit", "sana."))},
                **by_sample,
                **_streams(model, batch.prompts.layout, pack, inputs, outputs),
                "image_latents": clean,
                "noisy_latents": noisy,
                "target": target,
                "pred": pred,
                "timestep_index": (TIMESTEPS - TIMESTEPS * draws.time).round().long(),
                "timesteps": TIMESTEPS * draws.time,
                "sigmas": draws.time,
                "sana.time_mod": outputs["time"][0],
                "sana.time_emb": outputs["time"][1],
                "loss": loss[None],
                "loss_per_sample": (pred - target).square().flatten(1).mean(dim=1),
                "dgrad.prompt_embeds": _present(caption.grad).unflatten(0, (num_samples, -1)),
                **{f"grad.{name}": value for name, value in gradients(model).items()},
            }
        )


def _present(gradient: Tensor | None) -> Tensor:
    assert gradient is not None, "the loss must reach this tensor"
    return gradient


@contextmanager
def record(modules: Mapping[str, nn.Module]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Arguments and results of modules, by the names they are given here."""
    inputs: dict[str, Any] = {}
    outputs: dict[str, Any] = {}

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(module: nn.Module, arguments: Any, output: Any) -> None:
            inputs[name], outputs[name] = arguments, output

        return keep

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield inputs, outputs
    finally:
        for handle in handles:
            handle.remove()


def gradients(model: OpenUniModel) -> dict[str, Tensor]:
    """Official name -> its rows of our gradient, where there is one."""
    parameters = dict(model.named_parameters())
    slots: dict[str, Slot] = trained_slots(model)
    grads = {name: parameters[slot.parameter].grad for name, slot in slots.items()}
    return {name: slots[name].rows(grad) for name, grad in grads.items() if grad is not None}


def _streams(
    model: OpenUniModel, layout: Layout, pack: Pack, inputs: Mapping[str, Any], outputs: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The language model's padded sequence; the last layer runs again for the rows that training skips."""
    last = len(model.layers) - 1
    layer: Any = model.layers[last]
    layer.is_last = False
    outputs = {**outputs, f"layer{last}": layer(*inputs[f"layer{last}"])}
    layer.is_last = True
    mask = F.pad(pack.inputs["attention_mask"], (0, model.config.num_queries), value=1)
    joined = [_join(layout, *(stream.rows for stream in outputs[f"layer{i}"])) for i in range(last + 1)]
    embedded = padded(_join(layout, *(stream.rows for stream in inputs["layer0"][:2])), mask)
    pads = F.pad(model.embed_tokens(pack.inputs["input_ids"]), (0, 0, 0, model.config.num_queries))
    return {
        **{f"llm.layer{i}": padded(rows, mask) for i, rows in enumerate(joined)},
        "llm.final_norm": padded(model.norm(joined[-1]), mask),
        "inputs_embeds": torch.where(mask.bool()[..., None], embedded, pads),
        "position_ids": padded(_join(layout, layout.prompt_positions, layout.query_positions), mask)
        + _pad_positions(mask),
        "full_attention_mask": mask,
    }


def _join(layout: Layout, prompts: Tensor, queries: Tensor) -> Tensor:
    """[prompt rows, ...], [query rows, ...] -> both, sample by sample."""
    places = torch.cat([layout.prompt_places, layout.query_places])
    return torch.cat([prompts, queries])[places.argsort()]


def padded(rows: Tensor, mask: Tensor) -> Tensor:
    """[rows, ...] -> [samples, longest, ...] with zeros where `mask` is 0."""
    out = rows.new_zeros(*mask.shape, *rows.shape[1:])
    out[mask.bool()] = rows
    return out


def _pad_positions(mask: Tensor) -> Tensor:
    """Officially a pad has the position of the last row before it."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0) * (1 - mask)
