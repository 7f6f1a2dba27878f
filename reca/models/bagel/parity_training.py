"""Parity packs of the training path: the official packer's view and every tensor on the way to the gradients.

The model is run as it trains, with hooks. What it stores in another order or never forms (one packed
sequence, a dense mask, position ids that start at the image) is put together here from what it did use.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reca.images import patchify
from reca.layers.implementation import set_kernels
from reca.layers.mlp import MLP
from reca.layers.position import sincos_position_table
from reca.layers.rotary import apply_rotary, rotary_table
from reca.layers.segments import Segments
from reca.models.bagel.batch import (
    BagelBatch,
    BagelDraws,
    BagelExample,
    TargetGroup,
    collate,
    grid_positions,
)
from reca.models.bagel.checkpoint import autoencoder_slots, bagel_slots
from reca.models.bagel.config import BagelConfig, LLMConfig, VisionConfig
from reca.models.bagel.model import BagelModel
from reca.models.bagel.transformer import MARKERS, Layout
from reca.models.bagel.vae import VAEConfig
from reca.models.bagel.vision import VisionEncoder
from reca.models.checkpoint import Slot, load_slots
from reca.models.family import Pack, Reproduction
from reca.objectives.flow_matching import interpolate, shifted_time

CAUSAL, FULL, NOISE = 0, 1, 2  # official names of how a split sees itself


def load_pack_model(pack: Pack) -> BagelModel:
    """The model of a pack, fp32 on the CPU."""
    model = BagelModel(BagelConfig.from_official(pack.description["config"]))
    load_slots(
        model, bagel_slots(model.config), pack.folder / "weights.safetensors", device=torch.device("cpu")
    )
    if (pack.folder / "ae.safetensors").is_file():
        slots = autoencoder_slots(model.config)
        load_slots(model, slots, pack.folder / "ae.safetensors", device=torch.device("cpu"))
    set_kernels(model, pack.kernels)
    return model


def pack_batch(config: BagelConfig, pack: Pack, shift: float) -> tuple[BagelBatch, BagelDraws]:
    """The batch and the random decisions of a training pack."""
    inputs = pack.inputs
    num_images = len(inputs["timestep_normal"])
    targets, posterior, grids = _targets(config, inputs, num_images)
    examples = []
    for index in range(num_images):
        pixels, patch = inputs[f"vit_image.{index}"], config.vision.patch_size
        ids = None if inputs["text_dropped"][index] else tuple(inputs[f"text_ids.{index}"].tolist())
        grid = pixels.shape[1] // patch, pixels.shape[2] // patch
        examples.append(BagelExample(patchify(pixels, patch), grid, ids, targets.values[index], grids[index]))
    batch = collate(config, examples, range(num_images), targets=[targets])
    draws = BagelDraws(
        counts={"reconstruction": torch.tensor(float(sum(batch.layout.latent_lengths)))},
        time=shifted_time(torch.sigmoid(inputs["timestep_normal"]), shift),
        noise=inputs["noise"],
        posterior=(posterior,),
    )
    return batch, draws


def _targets(
    config: BagelConfig, inputs: Mapping[str, Tensor], num_images: int
) -> tuple[TargetGroup, Tensor, list[tuple[int, int]]]:
    """Targets in one group as the official code has them, posterior noise, grids of latent tokens."""
    images = tuple(range(num_images))
    if "padded_latent" in inputs:
        grids = [(int(rows), int(columns)) for rows, columns in inputs["latent_grid"]]
        return TargetGroup("latents", images, inputs["padded_latent"]), torch.empty(0), grids
    pixels = [inputs[f"vae_image.{index}"] for index in images]
    height, width = (max(image.shape[axis] for image in pixels) for axis in (1, 2))
    padded = torch.stack(
        [F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in pixels]
    )
    stride = config.latent_stride
    grids = [(image.shape[1] // stride, image.shape[2] // stride) for image in pixels]
    return TargetGroup("pixels", images, padded), inputs["posterior_noise"], grids


def reproduce_training(pack: Pack) -> Reproduction:
    """Kind `train`: loss, every gradient and all stages; `shiftS.*` are the same with timestep shift S."""
    model = load_pack_model(pack)
    official = pack.description["config"]
    tensors = _train(model, pack, float(official.get("timestep_shift", 1.0)))
    for prefix, shift in sorted(set(re.findall(r"\b(shift([\d.]*\d)\.)", " ".join(pack.expected)))):
        tensors |= {prefix + name: value for name, value in _train(model, pack, float(shift)).items()}
    return Reproduction(tensors)


def _train(model: BagelModel, pack: Pack, shift: float) -> dict[str, Tensor]:
    batch, draws = pack_batch(model.config, pack, shift)
    layout = batch.layout
    model.zero_grad()
    watched: dict[str, nn.Module] = {f"layer.{i}": layer for i, layer in enumerate(model.layers)}
    watched |= {f"vit.layer.{i}": layer for i, layer in enumerate(model.vision.layers)}
    watched |= {"vit.last_hidden_state": model.vision, "timestep_embedding": model.time_embedder}
    with record(watched) as (inputs, outputs):
        loss = model(batch, draws)["reconstruction"] / draws.counts["reconstruction"]
    loss.backward()
    gradients = {name: value for name, value in _gradients(model).items() if value is not None}
    squares = [
        parameter.grad.square().sum() for parameter in model.parameters() if parameter.grad is not None
    ]
    with torch.no_grad():
        clean = model.encode_target(batch, draws)
        velocity = model.llm2vae(model.norm_gen(outputs[f"layer.{len(model.layers) - 1}"][1].rows))
        noise = pack.inputs["noise"]
        return {
            **packed_view(batch, pack),
            "attention_mask": attention_mask(layout),
            "padded_latent": model.latents(batch.targets[0], draws.posterior[0]),
            "timesteps": draws.time[layout.latent_images],
            "latent_tokens": clean,
            "noised_tokens": interpolate(clean, noise, draws.time[layout.latent_images]),
            "target": noise - clean,
            "timestep_embedding": outputs["timestep_embedding"][layout.latent_images],
            "vit.embeddings": model.vision.embed(batch.patches, batch.patch_positions),
            **{name: value.rows for name, value in outputs.items() if name.startswith("vit.layer.")},
            "vit.last_hidden_state": outputs["vit.last_hidden_state"],
            "connector": model.connector(outputs["vit.last_hidden_state"]),
            **_streams(model, layout, inputs, outputs),
            **_prefix(model, layout, inputs),
            "velocity": velocity,
            "mse_per_token": (velocity - (noise - clean)).square().mean(dim=1),
            "loss": loss,
            "grad_norm": torch.stack(squares).sum().sqrt(),
            **{f"grad.{name}": value for name, value in gradients.items()},
        }


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


def _gradients(model: BagelModel) -> dict[str, Tensor | None]:
    """Official name -> its rows of our gradient."""
    parameters = dict(model.named_parameters())
    slots: dict[str, Slot] = {
        name: slot for name, slot in bagel_slots(model.config).items() if slot.parameter in parameters
    }
    gradients = {name: parameters[slot.parameter].grad for name, slot in slots.items()}
    return {name: None if grad is None else slots[name].rows(grad) for name, grad in gradients.items()}


def packed_order(layout: Layout) -> Tensor:
    """[tokens] int64: rows of [understanding; latents] in the order of the official packed sequence."""
    rows, start = list[Tensor](), list[int]()
    for count in (*layout.kinds, sum(layout.latent_lengths)):
        start.append(start[-1] + rows[-1].shape[0] if rows else 0)
        rows.append(torch.arange(start[-1], start[-1] + count))
    images, texts, latents = (
        part.split(lengths)
        for part, lengths in zip(
            (rows[0], rows[1], rows[3]),
            (layout.image_lengths, layout.text_lengths, layout.latent_lengths),
            strict=True,
        )
    )
    samples = zip(images, texts, rows[2].split(MARKERS), latents, strict=True)
    return torch.cat([torch.cat([i, t, m[:1], latent, m[1:]]) for i, t, m, latent in samples])


def packed_view(batch: BagelBatch, pack: Pack) -> dict[str, Tensor]:
    """What the official packer would have made of a batch: `packed.*`."""
    layout, order = batch.layout, packed_order(batch.layout)
    num_understanding = sum(layout.kinds)
    is_latent = order >= num_understanding
    is_patch = torch.isin(order, batch.patch_rows)
    is_text = ~is_latent & ~is_patch
    splits, modes, samples, ids = list[int](), list[int](), list[int](), list[Tensor]()
    for image, text, latents in zip(
        layout.image_lengths, layout.text_lengths, layout.latent_lengths, strict=True
    ):
        block = latents + MARKERS
        splits += [image, text, block] if text else [image, block]
        modes += [FULL, CAUSAL, NOISE] if text else [FULL, NOISE]
        samples.append(image + text + block)
        ids.append(torch.full((samples[-1],), text + 1))  # what the relative positions were counted from
    padding = int(pack.description["config"]["max_num_tokens"]) - sum(samples)
    pad = [padding] if padding > 0 else []
    relative = torch.cat([layout.positions, torch.zeros(sum(layout.latent_lengths), dtype=torch.int64)])
    normal = torch.cat(
        [
            n.expand(length)
            for n, length in zip(pack.inputs["timestep_normal"].split(1), layout.latent_lengths, strict=True)
        ]
    )
    tensors = {
        "text_ids": batch.token_ids[order[is_text]],
        "text_indexes": is_text.nonzero().flatten(),
        "position_ids": relative[order] + torch.cat(ids),
        "vit_position_ids": batch.patch_positions,
        "vit_token_indexes": is_patch.nonzero().flatten(),
        "latent_position_ids": batch.latent_positions,
        "vae_token_indexes": is_latent.nonzero().flatten(),
        "mse_loss_indexes": is_latent.nonzero().flatten(),
        "timesteps": normal,
        "vit_tokens": batch.patches,
        "vit_token_seqlens": torch.tensor(batch.patch_images.query_lengths),
        "sample_lens": torch.tensor(samples + pad),
        "split_lens": torch.tensor(splits + pad),
        "attn_modes": torch.tensor(modes + [CAUSAL] * len(pad)),
        "latent_shapes": torch.tensor(batch.latent_grids),
    }
    return {f"packed.{name}": value for name, value in tensors.items()}


def attention_mask(layout: Layout) -> Tensor:
    """[tokens, tokens] uint8 over the packed sequence, from the segments that the layers attend with."""
    num_understanding, num_latents = sum(layout.kinds), sum(layout.latent_lengths)
    rows = torch.arange(num_understanding)
    latents = torch.arange(num_understanding, num_understanding + num_latents)
    images, texts, markers = rows.split(layout.kinds)
    placed = torch.cat([rows, latents])[torch.cat([layout.places, layout.latent_places]).argsort()]
    mask = torch.zeros(num_understanding + num_latents, num_understanding + num_latents, dtype=torch.uint8)
    for queries, segments in (
        (images, layout.images),
        (texts, layout.texts),
        (markers, layout.markers),
        (latents, layout.latents),
    ):
        keys = placed.split(segments.key_lengths)
        for q, k in zip(queries.split(segments.query_lengths), keys, strict=True):
            seen = torch.ones(len(q), len(k), dtype=torch.uint8)
            mask[q[:, None], k] = seen.tril(len(k) - len(q)) if segments.is_causal else seen
    order = packed_order(layout)
    return mask[order][:, order]


def _streams(
    model: BagelModel, layout: Layout, inputs: Mapping[str, Any], outputs: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Residual streams in packed order; the last layer runs again for the rows that training skips."""
    order = packed_order(layout)
    last = len(model.layers) - 1
    layer = model.blocks()[last]
    layer.is_last = False
    outputs = {**outputs, f"layer.{last}": layer(*inputs[f"layer.{last}"])}
    layer.is_last = True
    rows = {
        name: [stream.rows for stream in outputs[name]] for name in (f"layer.{i}" for i in range(last + 1))
    }
    streams = {f"hidden.{i}": torch.cat(rows[f"layer.{i}"])[order] for i in range(last + 1)}
    streams["packed_sequence"] = torch.cat([stream.rows for stream in inputs["layer.0"][:2]])[order]
    understanding, latents = rows[f"layer.{last}"]
    streams["last_hidden_state"] = torch.cat([model.norm(understanding), model.norm_gen(latents)])[order]
    return streams


def _prefix(model: BagelModel, layout: Layout, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """`prefix_k.i.l` and `prefix_v.i.l` of image and text; keys are turned to the official positions."""
    llm, tensors = model.config.llm, {}
    for index, layer in enumerate(model.blocks()):
        understanding, _, _, rotation = inputs[f"layer.{index}"]
        _, key, value = layer.und.project(understanding.rows)
        key = apply_rotary(key, *rotation)
        images, texts, _ = (
            part.split(kind) for part, kind in zip(*_kinds(layout, torch.arange(len(key))), strict=True)
        )
        for sample, (image, text) in enumerate(zip(images, texts, strict=True)):
            rows = torch.cat([image, text])
            turn = rotary_table(torch.full((len(rows),), len(text) + 1), llm.head_dim, llm.rope_theta)
            tensors[f"prefix_k.{sample}.{index}"] = apply_rotary(key[rows], *turn)
            tensors[f"prefix_v.{sample}.{index}"] = value[rows]
    return tensors


def _kinds(layout: Layout, rows: Tensor) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    return rows.split(layout.kinds), (layout.image_lengths, layout.text_lengths, MARKERS)


def reproduce_siglip(pack: Pack) -> Reproduction:
    """Kind `siglip`: the understanding encoder, its connector and the position table."""
    official = pack.description["config"]
    config = VisionConfig.from_official(official["vit_config"])
    dim, edge = int(official["llm_config"]["hidden_size"]), int(official["vit_max_num_patch_per_side"])
    encoder, connector = VisionEncoder(config), MLP(config.hidden_size, dim, dim)
    parts = nn.ModuleDict({"vision": encoder, "connector": connector})
    parts.register_buffer("vision_positions", sincos_position_table(dim, edge))
    # a language model without layers, to name the tensors of the other parts
    whole = BagelConfig(LLMConfig(dim, 1, 0, 1, 1, 1), config, VAEConfig(), vit_max_num_patch_per_side=edge)
    mine = ("vision.", "connector.", "vision_positions")
    slots = {name: slot for name, slot in bagel_slots(whole).items() if slot.parameter.startswith(mine)}
    load_slots(parts, slots, pack.folder / "weights.safetensors", device=torch.device("cpu"))
    table = parts.get_buffer("vision_positions")
    images = [pack.inputs[name] for name in sorted(pack.inputs, key=lambda name: int(name.split(".")[1]))]
    patches = torch.cat([patchify(image, config.patch_size) for image in images])
    grids = [(image.shape[1] // config.patch_size, image.shape[2] // config.patch_size) for image in images]
    positions = torch.cat([grid_positions(*grid, edge) for grid in grids])
    lengths = [rows * columns for rows, columns in grids]
    layers = {f"layer.{i}": layer for i, layer in enumerate(encoder.layers)}
    with torch.no_grad(), record(layers) as (_, outputs):
        encoded = encoder(patches, positions, Segments.of(lengths))
        connected = connector(encoded)
    return Reproduction(
        {
            "patches": patches,
            "position_ids": positions,
            "seqlens": torch.tensor(lengths),
            "embeddings": encoder.embed(patches, positions),
            **{name: stream.rows for name, stream in outputs.items()},
            "last_hidden_state": encoded,
            "connector": connected,
            "und_embeddings": connected + table[positions],
        }
    )
