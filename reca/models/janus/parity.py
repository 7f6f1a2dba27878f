"""Parity packs: tensors of transformers' modules in the sequence that training uses.

The model is run as it trains, with hooks. What it stores without padding, or never forms (logits, rows of the
last layer that predict nothing), is put together here from what it did use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reca.errors import ConfigError, nearest
from reca.layers.implementation import set_kernels
from reca.layers.segments import Segments
from reca.models.checkpoint import load_slots
from reca.models.family import Pack, Reproduction
from reca.models.janus.batch import (
    ChatExample,
    GenerationBatch,
    GenerationExample,
    ImageToTextBatch,
    JanusBatch,
    collate_chats,
    collate_generation,
)
from reca.models.janus.checkpoint import native_slots
from reca.models.janus.config import JanusConfig, SpecialTokens
from reca.models.janus.model import JanusModel
from reca.models.janus.sampler import embed_prompts, generate
from reca.models.janus.tokenizer import IMAGE
from reca.models.janus.transformer import Layout
from reca.randomness import RandomSource

_DECODER = ("vq.decoder.", "vq.post_quant_conv.")  # left out of the packs that decode nothing


def load_pack_model(pack: Pack) -> JanusModel:
    """The model of a pack, fp32 on the CPU, with the aligner trained as in the pack."""
    model = JanusModel(JanusConfig.from_official(pack.description["config"], train_aligner=True))
    slots = native_slots(model.config)
    if pack.kind == "vq":
        slots = {name: slot for name, slot in slots.items() if slot.parameter.startswith("vq.")}
    absent = {"generate": (), "i2t": ("vq.",)}.get(pack.kind, _DECODER)
    load_slots(
        model,
        {name: slot for name, slot in slots.items() if not slot.parameter.startswith(absent)},
        pack.folder / "weights.safetensors",
        device=torch.device("cpu"),
        ignored=("model.vqmodel.",) if pack.kind == "i2t" else (),
    )
    set_kernels(model, pack.kernels)
    return model


def pack_special(model: JanusModel) -> SpecialTokens:
    """The special tokens that a pack states."""
    if model.config.special is None:
        raise ConfigError("a Janus-Pro pack must state its special tokens under config.special")
    return model.config.special


def pack_samples(pack: Pack, placeholder: int) -> list[list[int]]:
    """Tokens of each sample without padding, IMAGE where the image is understood."""
    rows = zip(pack.inputs["input_ids"], pack.inputs["attention_mask"], strict=True)
    return [
        [IMAGE if token == placeholder else token for token in ids[mask.bool()].tolist()]
        for ids, mask in rows
    ]


def pack_batch(model: JanusModel, pack: Pack, codes: Tensor | None = None) -> GenerationBatch:
    """The batch of a reconstruction pack; `codes` [images, codes] replaces those of the images."""
    config, special = model.config, pack_special(model)
    hidden = pack.inputs.get("uncond", torch.zeros(len(pack.inputs["input_ids"]), dtype=torch.int64))
    examples = [
        GenerationExample(
            prompt=tuple(ids),
            pixels=pack.inputs["pixel_values"][index],
            num_tokens=len(ids) + config.num_codes - 1,
            is_reconstruction=True,
            is_unconditional=bool(hidden[index]),
            codes=None if codes is None else codes[index],
        )
        for index, ids in enumerate(pack_samples(pack, special.image_placeholder))
    ]
    return collate_generation(config, special.pad, examples, range(len(examples)))


def pack_chats(model: JanusModel, pack: Pack) -> ImageToTextBatch:
    """The batch of an image-to-text pack."""
    special, mask = pack_special(model), pack.inputs["attention_mask"].bool()
    examples = [
        ChatExample(
            ids=tuple(ids),
            labels=tuple(pack.inputs["labels"][index][mask[index]].tolist()),
            pixels=pack.inputs["pixel_values"][index],
        )
        for index, ids in enumerate(pack_samples(pack, special.image_placeholder))
    ]
    return collate_chats(model.config, special.pad, examples, range(len(examples)))


@contextmanager
def record(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Any]]:
    """Results of modules, by the names they are given here."""
    outputs: dict[str, Any] = {}

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(module: nn.Module, arguments: Any, output: Any) -> None:
            outputs[name] = output

        return keep

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def complete_rows(model: JanusModel, hidden: Tensor, layout: Layout) -> dict[str, Tensor]:
    """`llm.*` of all rows; the last layer runs for those that training skips."""
    whole = replace(layout, **_all_tails(layout))
    watched = {f"llm.layer{index}": layer for index, layer in enumerate(model.layers)}
    with torch.no_grad(), record(watched) as outputs:
        model.transform(hidden, whole)
        rows = {name: stream.rows for name, stream in outputs.items()}
        return rows | {"llm.final_norm": model.norm(rows[f"llm.layer{len(model.layers) - 1}"])}


def _all_tails(layout: Layout) -> dict[str, Any]:
    every = Layout.of(layout.lengths, layout.lengths)
    return {"tails": every.tails, "ends": every.ends, "tail_rows": every.tail_rows}


def padded(rows: Tensor, lengths: Sequence[int]) -> Tensor:
    """[samples, longest, ...]: rows with zeros to their left."""
    longest = max(lengths)
    samples = []
    for part in rows.split(list(lengths)):
        filler = part.new_zeros(longest - len(part), *part.shape[1:])
        samples.append(torch.cat([filler, part]))
    return torch.stack(samples)


def _gradients(model: JanusModel) -> dict[str, Tensor]:
    """`grad.` official name -> its rows of our gradient."""
    parameters = dict(model.named_parameters())
    gradients = {}
    for name, slot in native_slots(model.config).items():
        gradient = parameters[slot.parameter].grad
        if gradient is not None:
            gradients[f"grad.{name}"] = slot.rows(gradient)
    return gradients


def _backward(model: JanusModel, batch: JanusBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss of a batch, and all gradients."""
    model.zero_grad()
    draws = model.draw(batch, RandomSource(0))
    loss = model(batch, draws)[batch.term] / draws.counts[batch.term]
    loss.backward()
    return loss.detach(), _gradients(model)


def _codes(model: JanusModel, latents: Tensor) -> dict[str, Tensor]:
    """Codes under both rules, and how far the best score is from the second best."""
    scores = model.vq.scores(latents)
    best = scores.topk(2, dim=-1).values
    rows, table = latents.flatten(2).transpose(1, 2), model.vq.codebook.weight
    native = -(rows.square().sum(-1, keepdim=True) + table.square().sum(-1) - 2 * rows @ table.t())
    best_native = native.topk(2, dim=-1).values
    margins = [(top[..., 0] - top[..., 1]).min() for top in (best, best_native)]
    return {
        "codes": scores.argmax(dim=-1),
        "codes_native": native.argmax(dim=-1),
        "min_margin": torch.stack(margins)[:1],
    }


def reproduce_reconstruction(pack: Pack) -> Reproduction:
    """Kind `recon`: every stage, the loss under both codebook rules, every gradient."""
    model = load_pack_model(pack)
    batch = pack_batch(model, pack)
    loss, gradients = _backward(model, batch)
    pixels, lengths = batch.pixels, batch.layout.lengths
    patches = Segments.of([model.config.vision.num_tokens] * len(pixels))
    with torch.no_grad():
        latents = model.vq.latents(pixels)
        chosen = _codes(model, latents)
        codes = chosen["codes"]
        encoded = model.vision(pixels, patches)
        embedded = model.embed(batch, codes)
        rows = complete_rows(model, embedded, batch.layout)
        logits = model.generation_head(rows["llm.final_norm"][batch.layout.tail_rows])
        logits = logits.unflatten(0, (len(pixels), -1))
        per_token = F.cross_entropy(logits.flatten(0, 1), codes.flatten(), reduction="none").view_as(codes)
        native = pack_batch(model, pack, chosen["codes_native"])
        native_draws = model.draw(native, RandomSource(0))
        native_loss = model(native, native_draws)[native.term] / native_draws.counts[native.term]
    stages = {"inputs_embeds": embedded, "position_ids": batch.layout.positions, **rows}
    return Reproduction(
        {
            "vq.latents": latents,
            "siglip": encoded.unflatten(0, (len(pixels), -1)),
            "understanding_embeddings": model.aligner(encoded).unflatten(0, (len(pixels), -1)),
            **chosen,
            "effective_input_ids": _effective_ids(model, pack, batch),
            **{name: padded(stage, lengths) for name, stage in stages.items()},
            "image_logits": logits,
            "loss_per_token": per_token,
            "loss_per_sample": per_token.mean(dim=1),
            "loss": loss.view(1),
            "loss_native_codes": native_loss.view(1),
            **gradients,
        }
    )


def _effective_ids(model: JanusModel, pack: Pack, batch: GenerationBatch) -> Tensor:
    """[samples, prompt] int64: the prompts that the batch holds, left-padded."""
    special, stored = pack_special(model), torch.full_like(batch.order, pack_special(model).image_placeholder)
    is_text = batch.order < len(batch.text_ids)
    stored[is_text] = batch.text_ids[batch.order[is_text]]
    width = pack.inputs["input_ids"].shape[1]
    prompts = [rows[: len(rows) - model.config.num_codes + 1] for rows in stored.split(batch.layout.lengths)]
    return torch.stack([F.pad(prompt, (width - len(prompt), 0), value=special.pad) for prompt in prompts])


def reproduce_image_to_text(pack: Pack) -> Reproduction:
    """Kind `i2t`: the loss, every gradient, and the logits of all rows of the untrimmed conversations."""
    model = load_pack_model(pack)
    loss, gradients = _backward(model, pack_chats(model, pack))
    special = pack_special(model)
    # a label behind the end of a conversation keeps all of its rows
    samples = [[*ids, special.eos] for ids in pack_samples(pack, special.image_placeholder)]
    examples = [
        ChatExample(
            ids=tuple(ids),
            labels=(*[-100] * (len(ids) - 1), special.eos),
            pixels=pack.inputs["pixel_values"][index],
        )
        for index, ids in enumerate(samples)
    ]
    whole = collate_chats(model.config, special.pad, examples, range(len(examples)))
    with torch.no_grad():
        embedded = model.embed(whole, model.target_codes(whole))
        rows = complete_rows(model, embedded, whole.layout)
        logits = model.lm_head(rows["llm.final_norm"])
    return Reproduction({"loss": loss.view(1), "logits": padded(logits, whole.layout.lengths), **gradients})


def reproduce_vq(pack: Pack) -> Reproduction:
    """Kind `vq`: the autoencoder's encoder and its codes."""
    model = load_pack_model(pack)
    with torch.no_grad():
        latents = model.vq.latents(pack.inputs["pixel_values"])
        return Reproduction(
            {
                "encoder_out": model.vq.encoder(pack.inputs["pixel_values"]),
                "latents": latents,
                **_codes(model, latents),
            }
        )


def reproduce_generation(pack: Pack) -> Reproduction:
    """Kind `generate`: the likeliest codes under guidance, and their pixels."""
    model = load_pack_model(pack)
    special, grid = pack_special(model), model.config.code_grid
    guidance = float(pack.description["config"]["cfg_scale"])
    results = []
    with torch.no_grad():
        for index, prompt in enumerate(pack_samples(pack, special.image_placeholder)):
            seen = None
            if IMAGE in prompt:
                patches = Segments.of([model.config.vision.num_tokens])
                seen = model.aligner(model.vision(pack.inputs["pixel_values"][index : index + 1], patches))
            prompts = embed_prompts(model, prompt, seen, special.pad, guided=True)
            results.append(generate(model, prompts, guidance, None))
        codes = torch.stack([result.codes for result in results])
        logits = torch.stack([result.logits for result in results])
        best = logits.topk(2, dim=-1).values
        return Reproduction(
            {
                "tokens": codes,
                "guided_logits": logits,
                "min_margin": (best[..., 0] - best[..., 1]).min().view(1),
                "pixels": model.vq.decode(codes, grid, grid),
            }
        )


KINDS: Mapping[str, Callable[[Pack], Reproduction]] = {
    "recon": reproduce_reconstruction,
    "i2t": reproduce_image_to_text,
    "vq": reproduce_vq,
    "generate": reproduce_generation,
}


def reproduce(pack: Pack) -> Reproduction:
    """Run the maths of a parity pack. Raises ConfigError for a kind that this family does not have."""
    if pack.kind not in KINDS:
        raise ConfigError(f"{pack.folder}: unknown kind of pack {pack.kind!r}; {nearest(pack.kind, KINDS)}")
    return KINDS[pack.kind](pack)
