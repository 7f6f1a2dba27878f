"""Parity packs of the training step: losses and gradients of the step as it trains, and all it leaves out.

Each flow runs twice. Once as in training, without padding and with the last layer on the rows that predict;
this gives losses and gradients. Once over the complete official sequence through the same modules, for the
hidden states, logits and masks of every row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reca.layers.implementation import set_kernels
from reca.models.checkpoint import load_slots
from reca.models.family import Pack, Reproduction
from reca.models.showo.batch import (
    ChatExample,
    ImageToTextBatch,
    MaskedBatch,
    MaskedExample,
    ReconstructionBatch,
    ShowoBatch,
    ShowoDraws,
    TextToImageBatch,
    collate_chats,
    collate_masked,
)
from reca.models.showo.checkpoint import clip_slots, magvit_slots, showo_slots
from reca.models.showo.config import IGNORED, MagvitConfig, ShowoConfig
from reca.models.showo.model import ShowoModel
from reca.models.showo.transformer import Layout, Stream

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Flow:
    """One of the three sequences of a pack.

    Attributes:
        name: as the pack's tensors are named; `stack` is the name of what is stacked into one forward.
        batch: as it trains; `complete` has every official row.
        coefficient: weight of its loss.
    """

    name: str
    stack: str
    batch: ShowoBatch
    complete: ShowoBatch
    draws: ShowoDraws
    coefficient: float


def pack_config(pack: Pack, **changes: Any) -> ShowoConfig:
    """The configuration that a pack states; without a tokenizer of its own codes are given."""
    description = pack.description["config"]
    if "magvit" in description:
        changes["magvit"] = MagvitConfig.from_official(description["magvit"])
    else:
        codes = int(description["model"]["showo"]["codebook_size"])
        changes["magvit"] = MagvitConfig(
            (32,) * 5, (1,) * 5, (32,) * 5, (1,) * 5, bits=codes.bit_length() - 1
        )
    if "mmu_system_ids" in pack.inputs:
        changes["system_ids"] = tuple(pack.inputs["mmu_system_ids"][0].tolist())
    return ShowoConfig.from_official(description, **changes)


def load_pack_model(pack: Pack, **changes: Any) -> ShowoModel:
    """The model of a pack, fp32 on the CPU."""
    model = ShowoModel(pack_config(pack, **changes))
    load_slots(model, showo_slots(model.config), pack.folder / "weights.safetensors", device=_CPU)
    if model.vision is not None:
        load_slots(model, clip_slots(model), pack.folder / "weights_clip.safetensors", device=_CPU)
    for name in pack.description["weights"]:
        if "magvit" in name:
            load_slots(model, magvit_slots(model), pack.folder / name, device=_CPU)
    set_kernels(model, pack.kernels)
    return model


def pack_flows(config: ShowoConfig, pack: Pack) -> list[Flow]:
    """The flows that a pack has inputs for, in the official order."""
    flows, training = [], pack.description["config"]["training"]
    for name in ("t2i", "recon"):
        if f"rand.{name}_t" in pack.inputs:
            flows.append(_masked_flow(config, pack, name, training))
    if "mmu_text_ids" in pack.inputs:
        ids, labels = pack.inputs["mmu_text_ids"], pack.inputs["mmu_text_labels"]
        pixels = pack.inputs["mmu_clip_pixels" if config.clip else "mmu_pixels"]
        examples = [
            ChatExample(chat=tuple(i.tolist()), labels=tuple(label.tolist()), pixels=p, num_tokens=len(i))
            for i, label, p in zip(ids, labels, pixels, strict=True)
        ]
        batch, complete = (
            collate_chats(config, examples, range(len(examples)), is_complete=c) for c in (False, True)
        )
        counts = {batch.term: torch.tensor(float(len(batch.labels)))}
        draws = ShowoDraws(counts=counts, masked=ids.new_empty(0))
        flows.append(Flow("mmu", "default", batch, complete, draws, training["mmu_coeff"]))
    return flows


def _masked_flow(config: ShowoConfig, pack: Pack, name: str, training: dict[str, Any]) -> Flow:
    inputs, codes = pack.inputs, config.num_codes
    rate = mask_rate(inputs[f"rand.{name}_t"])
    counts = [max(1, round(float(codes * r))) for r in rate]
    # officially the output of argsort is compared, as if it held ranks
    masks = [
        order.argsort() < count for order, count in zip(inputs[f"rand.{name}_perm"], counts, strict=True)
    ]
    ids, lengths = inputs[f"{name}_text_ids"], inputs[f"{name}_text_len"]
    examples = []
    for index, count in enumerate(counts):
        text, length = (ids, lengths) if ids.ndim == 1 else (ids[index], lengths[index])
        is_dropped = name == "t2i" and inputs["rand.t2i_drop"][index] < training["cond_dropout_prob"]
        pixels = inputs.get(f"{name}_pixels")
        examples.append(
            MaskedExample(
                text=() if is_dropped else tuple(text[:length].tolist()),
                pixels=torch.empty(3, 0, 0) if pixels is None else pixels[index],
                num_masked=count,
                is_reconstruction=name == "recon",
                num_tokens=0,
                codes=inputs[f"{name}_codes"][index] if f"{name}_codes" in inputs else None,
            )
        )
    batch, complete = (
        collate_masked(config, examples, range(len(examples)), is_complete=c) for c in (False, True)
    )
    masked = torch.cat([mask.nonzero().flatten() + index * codes for index, mask in enumerate(masks)])
    total = len(masked) + len(batch.frame_rows)
    draws = ShowoDraws(counts={batch.term: torch.tensor(float(total))}, masked=masked)
    stack = "recon" if name == "recon" else "default"
    return Flow(name, stack, batch, complete, draws, training[f"{name}_coeff"])


def mask_rate(uniform: Tensor) -> Tensor:
    """Share of masked codes: cos(pi / 2 * u)."""
    return torch.cos(uniform * (math.pi * 0.5))


def reproduce_training(pack: Pack) -> Reproduction:
    """Losses, every gradient and all stages of a pack of the training step."""
    model = load_pack_model(pack)
    flows = pack_flows(model.config, pack)
    tensors = _losses(model, flows)
    tensors |= {f"grad.{name}": value for name, value in gradients(model).items()}
    if any(name.startswith("attached.") for name in pack.expected):
        attached = load_pack_model(pack, train_condition=True)
        _losses(attached, flows)
        tensors |= {f"attached.grad.{name}": value for name, value in gradients(attached).items()}
    stacks: dict[str, dict[str, list[Tensor]]] = {}
    for flow in flows:
        if f"rand.{flow.name}_t" in pack.inputs:
            tensors[f"{flow.name}.mask_prob"] = mask_rate(pack.inputs[f"rand.{flow.name}_t"])
        stages = _stages(model, flow)
        tensors |= _views(model, flow)
        for name, value in stages.items():
            stacks.setdefault(flow.stack, {}).setdefault(name, []).append(value)
    for stack, collected in stacks.items():
        tensors |= {f"{stack}.{name}": torch.cat(parts) for name, parts in collected.items()}
    return Reproduction(tensors)


def _losses(model: ShowoModel, flows: Sequence[Flow]) -> dict[str, Tensor]:
    """Losses of all flows, and the gradients of their weighted sum left in the model."""
    model.zero_grad()
    losses = {}
    for flow in flows:
        term = flow.batch.term
        losses[f"loss_{flow.name}"] = model(flow.batch, flow.draws)[term] / flow.draws.counts[term]
    weighted = [flow.coefficient * losses[f"loss_{flow.name}"] for flow in flows if flow.coefficient]
    total = torch.stack(weighted).sum()
    total.backward()
    return losses | {"loss_total": total}


def gradients(model: ShowoModel) -> dict[str, Tensor]:
    """Official name -> its rows of our gradient, where there is one."""
    parameters = dict(model.named_parameters())
    found = {}
    for name, slot in showo_slots(model.config).items():
        gradient = parameters[slot.parameter].grad
        if gradient is not None:
            found[name] = slot.rows(gradient)
    return found


@contextmanager
def record(modules: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Results of modules, by the names they are given here; of a residual stream, its rows."""
    outputs: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def keep(module: nn.Module, arguments: Any, output: Tensor | Stream) -> None:
            outputs[name] = output.rows if isinstance(output, Stream) else output

        return keep

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def official(layout: Layout, rows: Tensor) -> Tensor:
    """[samples, length, ...]: stored rows of a complete batch in the official order."""
    samples, length = samples_of(layout), int(layout.positions.max()) + 1
    out = rows.new_zeros(int(samples.max()) + 1, length, *rows.shape[1:])
    out[samples, layout.positions] = rows
    return out


@torch.no_grad()
def _stages(model: ShowoModel, flow: Flow) -> dict[str, Tensor]:
    """Embeddings, hidden states and logits of every official row."""
    batch = flow.complete
    ids = model.token_ids(batch, flow.draws, model.target_codes(batch))
    embedded = model.embed(batch, ids)
    with record({f"hidden.{i}": layer for i, layer in enumerate(model.layers)}) as outputs:
        hidden = model.transform(embedded, batch.layout)
    outputs |= {"input_embeddings": embedded, "logits": model.lm_head(model.final_layernorm(hidden))}
    return {name: official(batch.layout, value) for name, value in outputs.items()}


@torch.no_grad()
def _views(model: ShowoModel, flow: Flow) -> dict[str, Tensor]:
    """What the official code would have packed: ids, labels, masks; codes and features of the images."""
    batch, layout, config = flow.complete, flow.complete.layout, model.config
    codes = model.target_codes(batch)
    ids = model.token_ids(batch, flow.draws, codes)
    tensors = {"attn": attention_mask(layout), "labels": labels(model, flow, codes)}
    if batch.vision_rows.shape[0]:
        slots = ids.index_fill(0, batch.vision_rows, IGNORED)
        packed = official(layout, slots)
        without = packed[packed != IGNORED].view(len(packed), -1)
        name = "ids_without_image" if flow.name == "mmu" else "input_ids"
        tensors[name] = without if flow.name == "mmu" else packed
        assert model.vision is not None and model.mm_projector is not None
        with record({"clip_features": model.vision, "und_embeddings": model.mm_projector}) as outputs:
            model.understand(batch)
        tensors |= outputs
        if isinstance(batch, ReconstructionBatch):
            tensors["clip_pixels"] = model.clip_pixels(batch.pixels)
    else:
        tensors["input_ids"] = official(layout, ids)
    if isinstance(batch, MaskedBatch):
        mask = torch.zeros(len(batch.num_masked) * config.num_codes, dtype=torch.uint8)
        tensors["mask"] = mask.index_fill(0, flow.draws.masked, 1).view(len(batch.num_masked), -1)
    if config.clip is None:
        tensors |= _codes(model, flow, codes)
    return {f"{flow.name}.{name}": value for name, value in tensors.items()}


def _codes(model: ShowoModel, flow: Flow, codes: Tensor) -> dict[str, Tensor]:
    """Codes of the images of a VQ variant."""
    batch = flow.complete
    if isinstance(batch, ReconstructionBatch):
        return {
            "given_codes": model.given_codes(batch),
            "target_codes": codes,
            "small_pixels": model.shrink(batch.pixels),
        }
    return {"codes": codes if isinstance(batch, TextToImageBatch) else model.given_codes(batch)}


def labels(model: ShowoModel, flow: Flow, codes: Tensor) -> Tensor:
    """[samples, length] int64: official labels, IGNORED where there is none."""
    batch, layout, special = flow.complete, flow.complete.layout, model.config.special
    packed = official(layout, torch.full_like(layout.token_ids, IGNORED))
    if isinstance(flow.batch, ImageToTextBatch):  # put back from the rows that predict them
        trained, rows = flow.batch.layout, flow.batch.chosen.rows[flow.batch.predicting]
        packed[samples_of(trained)[rows], trained.positions[rows] + 1] = flow.batch.labels
        return packed
    labelled = torch.full_like(layout.token_ids, IGNORED)
    if isinstance(batch, TextToImageBatch) or model.config.clip is not None:
        # officially words are their own labels; no loss reads them
        is_word = (layout.token_ids >= 0) & (layout.token_ids != special.pad)
        labelled = torch.where(is_word, layout.token_ids, labelled)
    masked = flow.draws.masked
    labelled = labelled.index_copy(0, batch.image_rows[masked], (codes.flatten() + special.codes)[masked])
    return official(layout, labelled)


def samples_of(layout: Layout) -> Tensor:
    """[rows] int64: the sample of each stored row."""
    return torch.cat([torch.full((n,), s) for n, (s, _) in zip(layout.lengths, layout.order, strict=True)])


def attention_mask(layout: Layout) -> Tensor:
    """[samples, length, length] uint8 in the official order, from the plan that the layers attend with."""
    num_samples = max(sample for sample, _ in layout.order) + 1
    length = int(layout.positions.max()) + 1
    mask = torch.zeros(num_samples, length, length, dtype=torch.uint8)
    positions, samples = layout.positions.split(layout.lengths), samples_of(layout)
    start = 0
    for view in (layout.plan.full, layout.plan.causal):
        for num_rows, seen in zip(view.segments.query_lengths, view.sees, strict=True):
            queries = layout.positions[start : start + num_rows]
            keys = torch.cat([positions[index] for index in seen])
            rows = torch.ones(num_rows, len(keys), dtype=torch.uint8)
            rows = rows.tril(len(keys) - num_rows) if view.segments.is_causal else rows
            mask[samples[start], queries[:, None], keys] = rows
            start += num_rows
    return mask
