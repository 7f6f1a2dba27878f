"""Reproduces the parity packs of the sampler, the autoencoder and the language model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reca.layers.segments import Segments
from reca.models.checkpoint import Slot, load_slots
from reca.models.family import Pack, Reproduction, SampleOptions
from reca.models.openuni.batch import Prompts
from reca.models.openuni.config import autoencoder_from_official
from reca.models.openuni.model import OpenUniModel
from reca.models.openuni.parity_training import CPU, load_pack_model, pack_prompts, padded, record
from reca.models.openuni.sampler import time_grid, trajectory
from reca.models.openuni.sana import DeepCompressionAutoencoder


@torch.no_grad()
def reproduce_sampler(pack: Pack) -> Reproduction:
    """Kind `generate`: query states, captions, and every step of the solver."""
    model, official = load_pack_model(pack), pack.description["config"]
    prompts = Prompts.of(model.config, pack_prompts(pack))
    formed: dict[str, Tensor] = {}
    embeddings = None
    if prompts.vision is not None:
        rows = Segments.of([model.config.vision.num_patches + 1])
        formed["vit_embeds"] = model.aligner(model.vision(pack.inputs["pixel_values_src"], rows))
        # both rows show the one source image
        embeddings = formed["vit_embeds"][0].repeat(prompts.layout.num_samples, 1)
        mask = pack.inputs["attention_mask"]
        formed["inputs_embeds"] = padded(model.embed_prompts(prompts, embeddings), mask)
    with record({"query_hidden": model.norm}) as (_, outputs):
        captions = model.caption(prompts, embeddings)
    options = SampleOptions(
        steps=official["num_steps"] + 1,
        text_guidance=official["cfg_scale"],
        shift=official["test_scheduler"]["flow_shift"],
    )
    steps = list(trajectory(model, captions, pack.inputs["latents"], options))
    return Reproduction(
        {
            **formed,
            "query_hidden": outputs["query_hidden"].view(
                prompts.layout.num_samples, model.config.num_queries, -1
            ),
            "prompt_embeds": captions,
            "timesteps": torch.tensor([float(step.timestep) for step in steps]),
            "sigmas": time_grid(options.steps - 1, options.shift),
            **{f"guided_pred.step{i}": step.velocity for i, step in enumerate(steps)},
            **{f"latents.step{i}": step.latents for i, step in enumerate(steps)},
            "latents": steps[-1].latents,
            "pixels": model.vae.decode(steps[-1].latents),
        }
    )


@torch.no_grad()
def reproduce_autoencoder(pack: Pack) -> Reproduction:
    """Kind `dcae`: latents, pixels, and the stages between."""
    with torch.device("meta"):
        vae = DeepCompressionAutoencoder(autoencoder_from_official(pack.description["config"]["vae"]))
    names = [name for name, _ in vae.autoencoder.named_parameters()]
    slots = {f"vae.{name}": Slot(f"autoencoder.{name}") for name in names}
    load_slots(vae, slots, pack.folder / "weights.safetensors", device=CPU)
    encoder, decoder = vae.autoencoder.encoder, vae.autoencoder.decoder
    watched: dict[str, nn.Module] = {f"enc.stage{i}": stage for i, stage in enumerate(encoder.down_blocks)}
    watched |= {f"dec.stage{i}": stage for i, stage in enumerate(decoder.up_blocks)}
    formed: dict[str, Tensor] = {}
    for name in ("a", "b"):
        with record(watched) as (_, outputs):
            formed[f"latents_{name}"] = vae.encode(pack.inputs[f"pixels_{name}"])
            formed[f"recon_{name}"] = vae.decode(formed[f"latents_{name}"])
        formed |= {f"{name}.{stage}": value for stage, value in outputs.items()}
    return Reproduction(formed)


@torch.no_grad()
def reproduce_internvl(pack: Pack) -> Reproduction:
    """Kind `internvl`: understanding embeddings, logits, loss and greedy tokens of the frozen model."""
    model, pixels = load_pack_model(pack), pack.inputs["pixel_values"]
    sequences = pack_prompts(pack)
    prompts, mask = Prompts.of(model.config, sequences), pack.inputs["attention_mask"]
    assert prompts.vision is not None, "the pack's prompts show images"
    watched = {f"vit.layer{i}": layer for i, layer in enumerate(model.vision.layers)}
    with record(watched) as (_, outputs):
        patches = model.vision(pixels, prompts.vision)
    embeddings = model.aligner(patches)
    streams = _text(model, prompts, embeddings.flatten(0, 1))
    logits = padded(model.lm_head(model.norm(streams[-1])), mask)
    labels = pack.inputs["labels"]
    tokens: list[int] = []
    for _ in range(pack.expected["greedy_tokens"].shape[1]):
        continued = Prompts.of(model.config, [sequences[0] + tokens])
        last = _text(model, continued, embeddings[0])[-1][-1]
        tokens.append(int(model.lm_head(model.norm(last)).argmax()))
    return Reproduction(
        {
            **outputs,
            "vit_input": model.vision.view(pixels),
            "vit.embeddings": model.vision.embed(model.vision.view(pixels)),
            "vit.pixel_shuffled": model.aligner.group(patches),
            "vit_embeds": embeddings,
            **{f"llm.layer{i}": padded(stream, mask) for i, stream in enumerate(streams)},
            "logits": logits,
            "lm_loss": F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())[None],
            "greedy_tokens": torch.tensor([tokens]),
        }
    )


def _text(model: OpenUniModel, prompts: Prompts, embeddings: Tensor) -> list[Tensor]:
    """Prompt rows after each layer; nothing of them depends on the queries that run along."""
    last = model.layers[-1]
    last.is_last = False  # type: ignore[assignment]
    watched = {str(index): layer for index, layer in enumerate(model.layers)}
    with record(watched) as (_, outputs):
        model.query_states(prompts, embeddings)
    last.is_last = True  # type: ignore[assignment]
    return [outputs[name][0].rows for name in watched]
