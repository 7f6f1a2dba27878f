"""Parity packs of the training path: loss, every gradient, and the stages on the way, in the official layout.

The model is run as it trains, with hooks. What it stores packed, or leaves out because nothing depends on it
(rows of the last layer, tokens that are not masked), is put together here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reca.kernels import diffusion_loss, diffusion_noise
from reca.layers.implementation import set_kernels
from reca.models.checkpoint import Slot, load_slots
from reca.models.family import Pack, Reproduction
from reca.models.harmon.batch import (
    GenerationBatch,
    GenerationDraws,
    GenerationExample,
    ImageToTextBatch,
    ImageToTextDraws,
    ImageToTextExample,
    collate_generation,
    collate_image_to_text,
)
from reca.models.harmon.checkpoint import harmon_slots
from reca.models.harmon.config import HarmonConfig
from reca.models.harmon.diffusion import Schedule
from reca.models.harmon.head import DiffusionHead
from reca.models.harmon.model import HarmonModel, generation_draws
from reca.types import TensorStruct

_CPU = torch.device("cpu")
IMAGE = -200
_NO_DECAY = "diffloss"


@dataclass(frozen=True, slots=True)
class GivenDropout(TensorStruct):
    """The keep masks of a pack."""

    masks: Mapping[str, Tensor]

    def keep(self, place: str, sample: int, shape: tuple[int, ...]) -> Tensor:
        """The mask of one sample; its shape must be the one asked for."""
        return self.masks[f"keep.mar.{place}"][sample].view(shape).bool()


def load_pack_model(pack: Pack) -> HarmonModel:
    """The model of a pack, fp32 on the CPU, its autoencoder left on the meta device."""
    with torch.device("meta"):
        model = HarmonModel(HarmonConfig.from_official(pack.description["config"]))
    load_slots(model, harmon_slots(model.config), pack.folder / "weights.safetensors", device=_CPU)
    set_kernels(model, pack.kernels)
    return model


def prompt_ids(row: Tensor, mask: Tensor) -> list[int]:
    """Ids of one row without padding; the image's placeholder stays."""
    return [int(i) for i, real in zip(row, mask, strict=True) if real]


def generation_inputs(
    config: HarmonConfig, inputs: Mapping[str, Tensor], kind: str
) -> tuple[GenerationBatch, GenerationDraws]:
    """Batch and random decisions of a pack of images to be generated."""
    latents = inputs["latents"]
    grid = (latents.shape[1], latents.shape[2])
    masked = int(torch.ceil(grid[0] * grid[1] * inputs["mask_rate"]))
    examples = []
    for image, row, mask in zip(latents, inputs["input_ids"], inputs["attention_mask"], strict=True):
        ids = tuple(i for i in prompt_ids(row, mask) if i != IMAGE)
        examples.append(GenerationExample(image.flatten(0, 1), grid, ids, masked, 0))
    batch = collate_generation(
        config, examples, range(len(examples)), with_understanding=kind != "text2image"
    )
    keeps = {name: value for name, value in inputs.items() if name.startswith("keep.")}
    dropout: Any = GivenDropout(keeps) if keeps else None
    draws = generation_draws(config, batch, inputs["orders"], inputs["t"], inputs["noise"], dropout)
    levels = config.mar.diffusion_batch_mul
    chosen = torch.cat([r * batch.num_images * batch.images.tokens + draws.masked for r in range(levels)])
    counts = {name: torch.tensor(float(len(chosen))) for name in draws.counts}
    return batch, replace(draws, counts=counts, time=inputs["t"][chosen], noise=inputs["noise"][chosen])


def image_to_text_inputs(
    config: HarmonConfig, inputs: Mapping[str, Tensor]
) -> tuple[ImageToTextBatch, ImageToTextDraws]:
    """Batch and random decisions of a pack of dialogues."""
    latents = inputs["latents"]
    grid, examples = (latents.shape[1], latents.shape[2]), []
    for image, row, mask, labels in zip(
        latents, inputs["input_ids"], inputs["attention_mask"], inputs["labels"], strict=True
    ):
        ids = prompt_ids(row, mask)
        pairs = [(i, int(label)) for i, label in zip(ids, labels, strict=False) if i != IMAGE]
        examples.append(
            ImageToTextExample(
                image.flatten(0, 1), grid, tuple(i for i, _ in pairs), tuple(label for _, label in pairs), 0
            )
        )
    batch = collate_image_to_text(config, examples, range(len(examples)))
    count = torch.tensor(float(batch.labels.shape[0]))
    return batch, ImageToTextDraws(counts={"image_to_text": count}, dropout=None)


@contextmanager
def record(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, list[tuple[Any, Any]]]]:
    """(arguments, result) of every call of modules, by the names they are given here."""
    calls: dict[str, list[tuple[Any, Any]]] = {name: [] for name in modules}
    handles = [
        module.register_forward_hook(
            lambda _, arguments, output, name=name: calls[name].append((arguments, output))
        )
        for name, module in modules.items()
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _watched(model: HarmonModel) -> dict[str, nn.Module]:
    parts = ("encoder", "proj_in", "decoder", "diffusion_head")
    watched: dict[str, nn.Module] = {name: model.get_submodule(name) for name in parts}
    return watched | {f"layer.{index}": layer for index, layer in enumerate(model.layers)}


def gradients(model: HarmonModel) -> dict[str, Tensor]:
    """`grad.` and official name -> its rows of our gradient, of all that have one."""
    parameters = dict(model.named_parameters())
    slots: dict[str, Slot] = harmon_slots(model.config)
    return {
        f"grad.{name}": slot.rows(grad)
        for name, slot in slots.items()
        if (grad := parameters[slot.parameter].grad) is not None
    }


def _mean(terms: Mapping[str, Tensor], counts: Mapping[str, Tensor]) -> Tensor:
    ((name, total),) = terms.items()
    return total / counts[name]


def reproduce_generation(pack: Pack) -> Reproduction:
    """Kinds `recon`, `recon_dropout`, `text2image`: loss, gradients and all stages."""
    model = load_pack_model(pack)
    batch, draws = generation_inputs(model.config, pack.inputs, pack.description["config"]["kind"])
    with record(_watched(model)) as calls:
        loss = _mean(model(batch, draws), draws.counts)
    loss.backward()
    with torch.no_grad():
        tokens, samples, grid = batch.images.tokens, batch.num_images, batch.images.grid
        (_, canvas) = calls["decoder"][0]
        canvas = canvas.unflatten(0, (samples, -1))
        z = canvas[:, model.config.mar.buffer_size :] + model.decoder.output_positions(grid)
        is_masked = torch.zeros(samples * tokens).index_fill(0, draws.masked, 1).view(samples, tokens)
        tensors = {
            "loss": loss,
            "encoder_out_masked": calls["encoder"][0][1][len(batch.encoding.whole) :].unflatten(
                0, (samples, -1)
            ),
            "encoder_pos_embed": model.encoder.positions(grid)[None],
            "decoder_out": canvas,
            "x_enc": calls["decoder"][0][0][0].unflatten(0, (samples, -1)),
            "mask": is_masked,
            "num_masked": torch.tensor(batch.num_masked[0]),
            "z": z,
            **_understanding(batch, model, calls),
            **_sequences(batch, model, calls),
            **_all_rows(
                model.diffusion_head,
                batch.images.values.flatten(0, 1),
                z.flatten(0, 1),
                pack.inputs["t"],
                pack.inputs["noise"],
            ),
            **gradients(model),
        }
    return Reproduction(tensors)


def reproduce_image_to_text(pack: Pack) -> Reproduction:
    """Kind `image2text`: loss, gradients, logits of labelled rows and all stages."""
    model = load_pack_model(pack)
    batch, draws = image_to_text_inputs(model.config, pack.inputs)
    with record(_watched(model) | {"norm": model.norm}) as calls:
        loss = _mean(model(batch, draws), draws.counts)
    loss.backward()
    with torch.no_grad():
        logits = F.linear(calls["norm"][0][1], model.embed_tokens.weight)
        return Reproduction(
            {
                "loss": loss,
                "logits": logits,
                **_understanding(batch, model, calls),
                **_sequences(batch, model, calls),
                **gradients(model),
            }
        )


def _understanding(
    batch: GenerationBatch | ImageToTextBatch,
    model: HarmonModel,
    calls: Mapping[str, list[tuple[Any, Any]]],
) -> dict[str, Tensor]:
    """The encoder's rows of whole images; officially their embeddings have the buffers last."""
    whole, buffers = len(batch.encoding.whole), model.config.mar.buffer_size
    if not whole:
        return {}
    encoded, embedded = (
        calls[name][0][1][:whole].unflatten(0, (batch.num_images, -1)) for name in ("encoder", "proj_in")
    )
    return {"encoder_out_full": encoded, "z_enc": embedded.roll(-buffers, dims=1)}


def _sequences(
    batch: GenerationBatch | ImageToTextBatch,
    model: HarmonModel,
    calls: Mapping[str, list[tuple[Any, Any]]],
) -> dict[str, Tensor]:
    """The language model's rows, padded as officially: between the prompt and what is generated."""
    sequences = batch.sequences
    lengths = sequences.segments.query_lengths
    tails = [0] * len(lengths)
    if isinstance(batch, GenerationBatch):
        tails = list(sequences.readout.segments.query_lengths)
    prefix = max(length - tail for length, tail in zip(lengths, tails, strict=True))
    index = torch.full((len(lengths), prefix + max(tails)), -1)
    start = 0
    for sample, (length, tail) in enumerate(zip(lengths, tails, strict=True)):
        index[sample, : length - tail] = torch.arange(start, start + length - tail)
        if tail:
            index[sample, -tail:] = torch.arange(start + length - tail, start + length)
        start += length
    mask = index >= 0

    def padded(rows: Tensor) -> Tensor:
        return rows[index.clamp(min=0)] * mask.view(*mask.shape, *[1] * (rows.ndim - 1))

    last = len(model.layers) - 1
    (arguments, _) = calls[f"layer.{last}"][0]
    streams = [calls[f"layer.{i}"][0][1] for i in range(last)]
    streams.append(model.layers[last](*arguments[:3]))  # again, for the rows that training leaves out
    outputs = [stream.rows for stream in streams]
    return {
        "llm_attention_mask": mask.to(torch.uint8),
        "llm_position_ids": padded(sequences.positions).cummax(dim=1).values,
        "llm_inputs_embeds": padded(calls["layer.0"][0][0][0].rows),
        **{f"llm_hidden.{i}": padded(output) for i, output in enumerate(outputs)},
        "llm_last_hidden": padded(model.norm(outputs[-1])),
    }


def _all_rows(
    head: DiffusionHead, clean: Tensor, condition: Tensor, time: Tensor, noise: Tensor
) -> dict[str, Tensor]:
    """The diffusion of every token, masked or not, at every noise level."""
    table = Schedule.full().table
    noised = diffusion_noise(clean, noise, time, table)
    output = head(noised, time, condition)
    _, squared_error, variational = diffusion_loss(output, clean, noise, time, table)
    return {"x_t": noised, "model_output": output, "mse": squared_error, "vb": variational}


def reproduce_diffusion(pack: Pack) -> Reproduction:
    """Kind `diffloss`: the diffusion head alone, with the gradient of its condition."""
    config, inputs = HarmonConfig.from_official(pack.description["config"]).mar, pack.inputs
    parts = nn.ModuleDict(
        {
            "diffusion_head": DiffusionHead(
                config.vae_embed_dim, config.encoder_embed_dim, config.diffloss_w, config.diffloss_d
            )
        }
    )
    whole = HarmonConfig.from_official(pack.description["config"])
    slots = {
        name: slot
        for name, slot in harmon_slots(whole).items()
        if slot.parameter.startswith("diffusion_head.")
    }
    load_slots(parts, slots, pack.folder / "weights.safetensors", device=_CPU)
    set_kernels(parts, pack.kernels)
    head: Any = parts["diffusion_head"]
    condition = inputs["z"].requires_grad_()
    rows = inputs["mask"].nonzero().flatten()
    clean, noise, time = (inputs[name][rows] for name in ("target", "noise", "t"))
    table = Schedule.full().table
    output = head(diffusion_noise(clean, noise, time, table), time, condition[rows])
    loss = diffusion_loss(output, clean, noise, time, table, impl=pack.kernels)[0] / len(rows)
    loss.backward()
    parameters = dict(parts.named_parameters())
    grads = {f"grad.{name}": parameters[slot.parameter].grad for name, slot in slots.items()}
    with torch.no_grad():
        every = _all_rows(head, inputs["target"], condition, inputs["t"], inputs["noise"])
    formed = {"loss": loss, "grad_z": condition.grad, **every, **grads}
    return Reproduction({name: value for name, value in formed.items() if value is not None})


def reproduce_step(pack: Pack) -> Reproduction:
    """Kind `step`: optimizer steps over microbatches of both tasks, with the official parameter groups."""
    model, recipe = load_pack_model(pack), pack.description["config"]["step"]
    slots = harmon_slots(model.config)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    plain = {slot.parameter for name, slot in slots.items() if _NO_DECAY in name}
    groups = [{"params": [], "weight_decay": decay} for decay in (float(recipe["weight_decay"]), 0.0)]
    for name, parameter in trained.items():
        groups[int(parameter.ndim < 2 or name in plain)]["params"].append(parameter)  # type: ignore[attr-defined]
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(groups, betas=tuple(recipe["betas"]), eps=recipe["eps"])
    formed: dict[str, Tensor] = {}
    for step, lr in enumerate(recipe["lr"]):
        optimizer.zero_grad(set_to_none=False)
        for number, kind in enumerate(recipe["micro_batches"]):
            prefix = f"{step}.{number}."
            inputs = {n.removeprefix(prefix): t for n, t in pack.inputs.items() if n.startswith(prefix)}
            made: Any = (
                image_to_text_inputs(model.config, inputs)
                if kind == "image2text"
                else generation_inputs(model.config, inputs, kind)
            )
            loss = _mean(model(*made), made[1].counts)
            (loss / len(recipe["micro_batches"])).backward()
            formed[f"loss.{step}.{number}"] = loss.detach()
        norm = nn.utils.clip_grad_norm_(trained.values(), recipe["max_norm"])
        formed[f"grad_norm.{step}"] = norm
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    parameters = dict(model.named_parameters())
    last = len(recipe["lr"]) - 1
    formed |= {
        f"param.{last}.{n}": slot.rows(parameters[slot.parameter].detach()) for n, slot in slots.items()
    }
    return Reproduction(formed)
