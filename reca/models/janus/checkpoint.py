"""Janus-Pro's official files in and out, in both layouts.

Native: the folder of transformers' own class. Original: the names of the remote-code release, with fused
attention matrices and a few tensors that nothing uses, in either kind of file. A model is written back in
the layout it was read from. `lm_head` is a tensor of its own in all releases, whatever a configuration's
`tie_word_embeddings` says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reca.errors import CheckpointError
from reca.files import copy_file, write_json
from reca.models.checkpoint import Slot, find_shards, load_slots, read_header, read_tensors, save_slots
from reca.models.janus.config import JanusConfig
from reca.models.janus.model import JanusModel
from reca.models.janus.vq import VQModel

WEIGHTS = "model.safetensors"
UNUSED = ("vision_model.vision_tower.attn_pool.", "gen_vision_model.quantize.codebook_used")
"""Tensors of the original layout that no part of the model reads; they are kept when a model is saved."""

_BESIDE = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
# our name -> (native, original)
_MODULES = {
    "aligner.fc1": ("model.aligner.fc1", "aligner.layers.0"),
    "aligner.fc2": ("model.aligner.hidden_layers.0", "aligner.layers.2"),
    "generation_aligner.fc1": ("model.generation_aligner.fc1", "gen_aligner.layers.0"),
    "generation_aligner.fc2": ("model.generation_aligner.hidden_layers.0", "gen_aligner.layers.2"),
    "generation_head.proj_out": ("model.generation_head.proj_out", "gen_head.output_mlp_projector"),
    "generation_head.vision_head": ("model.generation_head.vision_head", "gen_head.vision_head"),
    "vision.patch_embedding": (
        "model.vision_model.embeddings.patch_embedding",
        "vision_model.vision_tower.patch_embed.proj",
    ),
    "vision.post_norm": ("model.vision_model.post_layernorm", "vision_model.vision_tower.norm"),
}
_TABLES = {
    "embed_tokens": ("model.language_model.embed_tokens", "language_model.model.embed_tokens"),
    "norm": ("model.language_model.norm", "language_model.model.norm"),
    "lm_head": ("lm_head", "language_model.lm_head"),
    "generation_embeddings": ("model.generation_embeddings", "gen_embed"),
}
_VISION_PARTS = {
    "norm1": ("layer_norm1", "norm1"),
    "norm2": ("layer_norm2", "norm2"),
    "out": ("self_attn.projection_layer", "attn.proj"),
    "mlp.fc1": ("mlp.fc1", "mlp.fc1"),
    "mlp.fc2": ("mlp.fc2", "mlp.fc2"),
}
_ORIGINAL_VQ = (
    (r"\b(down|up)\.(\d+)\.block\b", r"conv_blocks.\2.res"),
    (r"\b(down|up)\.", "conv_blocks."),
    (r"\bmid\.block_1\b", "mid.0"),
    (r"\bmid\.attn_1\b", "mid.1"),
    (r"\bmid\.block_2\b", "mid.2"),
)


def native_slots(config: JanusConfig) -> dict[str, Slot]:
    """Names of transformers' class -> places in a `JanusModel`."""
    slots = _plain(0) | {f"model.vqmodel.{name}": slot for name, slot in _vq(config)}
    table = "position_embedding.weight"
    slots[f"model.vision_model.embeddings.{table}"] = Slot(f"vision.{table}")
    for layer in range(config.vision.num_hidden_layers):
        prefix, ours = f"model.vision_model.encoder.layers.{layer}", f"vision.layers.{layer}"
        for kind in ("weight", "bias"):
            names = tuple(f"{prefix}.self_attn.{part}_proj.{kind}" for part in "qkv")
            slots |= dict(_fused(names, config.vision.hidden_size, f"{ours}.qkv.{kind}"))
            for mine, theirs in _VISION_PARTS.items():
                slots[f"{prefix}.{theirs[0]}.{kind}"] = Slot(f"{ours}.{mine}.{kind}")
    return slots | _decoder(config, "model.language_model")


def original_slots(config: JanusConfig) -> dict[str, Slot]:
    """Names of the remote-code release -> places in a `JanusModel`."""
    slots, vision = _plain(1), config.vision
    for name, slot in _vq(config):
        for pattern, replacement in _ORIGINAL_VQ:
            name = re.sub(pattern, replacement, name)
        slots[f"gen_vision_model.{name}"] = slot
    tower = "vision_model.vision_tower"
    shape = (1, vision.num_tokens, vision.hidden_size)
    slots[f"{tower}.pos_embed"] = Slot("vision.position_embedding.weight", shape=shape)
    for layer in range(vision.num_hidden_layers):
        prefix, ours = f"{tower}.blocks.{layer}", f"vision.layers.{layer}"
        for kind in ("weight", "bias"):
            slots[f"{prefix}.attn.qkv.{kind}"] = Slot(f"{ours}.qkv.{kind}")
            for mine, theirs in _VISION_PARTS.items():
                slots[f"{prefix}.{theirs[1]}.{kind}"] = Slot(f"{ours}.{mine}.{kind}")
    return slots | _decoder(config, "language_model.model")


def _plain(layout: int) -> dict[str, Slot]:
    slots = {
        f"{names[layout]}.{kind}": Slot(f"{ours}.{kind}")
        for ours, names in _MODULES.items()
        for kind in ("weight", "bias")
    }
    return slots | {f"{names[layout]}.weight": Slot(f"{ours}.weight") for ours, names in _TABLES.items()}


def _vq(config: JanusConfig) -> Iterator[tuple[str, Slot]]:
    """Native names inside the autoencoder, which are ours except for the codebook's."""
    with torch.device("meta"):
        names = list(VQModel(config.vq).state_dict())
    for name in names:
        yield name.replace("codebook.", "quantize.embedding."), Slot(f"vq.{name}")


def _decoder(config: JanusConfig, prefix: str) -> dict[str, Slot]:
    """Layers of the language model; both layouts name their tensors alike."""
    slots: dict[str, Slot] = {}
    for layer in range(config.text.num_hidden_layers):
        theirs, ours = f"{prefix}.layers.{layer}", f"layers.{layer}"
        slots |= {
            f"{theirs}.input_layernorm.weight": Slot(f"{ours}.input_norm.weight"),
            f"{theirs}.post_attention_layernorm.weight": Slot(f"{ours}.post_norm.weight"),
            f"{theirs}.self_attn.o_proj.weight": Slot(f"{ours}.o.weight"),
            f"{theirs}.mlp.down_proj.weight": Slot(f"{ours}.mlp.down.weight"),
        }
        names = tuple(f"{theirs}.self_attn.{part}_proj.weight" for part in "qkv")
        slots |= dict(_fused(names, config.text.hidden_size, f"{ours}.qkv.weight"))
        gates = (f"{theirs}.mlp.gate_proj.weight", f"{theirs}.mlp.up_proj.weight")
        slots |= dict(_fused(gates, config.text.intermediate_size, f"{ours}.mlp.gate_up.weight"))
    return slots


def _fused(names: tuple[str, ...], size: int, ours: str) -> Iterator[tuple[str, Slot]]:
    """Official tensors that are consecutive rows of one of ours."""
    for index, name in enumerate(names):
        yield name, Slot(ours, index * size, (index + 1) * size)


def _layout(config: JanusConfig, names: Iterable[str]) -> dict[str, Slot]:
    """The slots of the layout that a file's names belong to."""
    is_original = any(name.startswith(("gen_vision_model.", "language_model.model.")) for name in names)
    return original_slots(config) if is_original else native_slots(config)


def load(
    model: JanusModel,
    path: Path,
    device: torch.device,
    dtype: torch.dtype | None = None,
    *,
    trained_dtype: torch.dtype | None = torch.float32,
) -> None:
    """Fill a model from an official folder of either layout, tensor by tensor.

    Args:
        model: built under `torch.device("meta")`, or a real one whose weights are replaced.
        path: folder of a release, or its only weight file.
        device: where parameters come to life.
        dtype: of frozen weights except the autoencoder's, which are fp32 (a code flips under rounding); None
            keeps the file's.
        trained_dtype: of weights that are trained; None keeps the file's.

    Raises: CheckpointError if files are missing, differ from the architecture, or state another
    configuration.
    """
    check_configuration(path if path.is_dir() else path.parent, model.config)
    slots = _layout(model.config, read_header(find_shards(path)))
    load_slots(model, slots, path, device=device, trained_dtype=trained_dtype, ignored=UNUSED)
    for name, parameter in model.named_parameters():
        if name.startswith("vq."):
            parameter.data = parameter.data.to(torch.float32)
        elif dtype is not None and not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def check_configuration(folder: Path, config: JanusConfig) -> None:
    """Compare a release's `config.json`, where it has one, with the architecture.

    Heads and epsilons do not show in the shapes of tensors. Keys that the file omits are not compared.

    Raises: CheckpointError naming the first key that differs.
    """
    path = folder / "config.json"
    if not path.is_file():
        return
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable JSON file ({error})") from error
    if not isinstance(stated, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {stated!r:.50}")
    expected = official_config(config)
    for part, ours in (
        ("text_config", "text_config"),
        ("language_config", "text_config"),  # the original layout
        ("vision_config", "vision_config"),
        ("vq_config", "vq_config"),
    ):
        given = stated.get(part)
        if not isinstance(given, dict):
            continue
        for key, value in expected[ours].items():
            if key in _COMPARED and given.get(key, value) != value:
                raise CheckpointError(
                    f"{path}: {part}.{key} is {given[key]}, but the chosen variant has {value}; "
                    "choose the variant that the weights belong to"
                )


_COMPARED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "rms_norm_eps",
    "layer_norm_eps",
    "image_size",
    "patch_size",
    "num_embeddings",
    "embed_dim",
)


def official_config(config: JanusConfig) -> dict[str, Any]:
    """Content of `config.json` in the native layout."""
    dim, special = config.text.hidden_size, config.special
    text = {key: value for key, value in asdict(config.text).items() if key != "rope_theta"} | {
        "model_type": "llama",
        "num_key_value_heads": config.text.num_attention_heads,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.text.rope_theta},
        "max_position_embeddings": 16_384,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    }
    vision = asdict(config.vision) | {
        "model_type": "janus_vision_model",
        "hidden_act": "gelu",
        "attention_bias": True,
        "use_qk_norm": False,
        "projection_dim": dim,
        "depth": 2,
        "num_image_tokens": config.vision.num_tokens,
    }
    vq = asdict(config.vq) | {
        "model_type": "janus_vqgan",
        "channel_multiplier": list(config.vq.channel_multiplier),
        "double_latent": False,
        "num_patches": config.code_grid,
        "projection_dim": dim,
        "image_token_embed_dim": dim,
        "num_hidden_layers": 2,
        "hidden_act": "gelu",
    }
    whole: dict[str, Any] = {
        "architectures": ["JanusForConditionalGeneration"],
        "model_type": "janus",
        "tie_word_embeddings": False,
    }
    if special is not None:
        text |= {f"{name}_token_id": getattr(special, name) for name in ("bos", "eos", "pad")}
        whole["image_token_id"] = special.image_placeholder
    return whole | {"text_config": text, "vision_config": vision, "vq_config": vq}


def save(
    model: JanusModel, folder: Path, *, source: Path | None = None, dtype: torch.dtype | None = None
) -> None:
    """Write an official folder: `model.safetensors`, configuration and tokenizer files.

    Each file appears whole or not at all; wrap the call in `publish_dir` to let the folder appear as one.

    Args:
        folder: written into; made if missing.
        source: the release that the model came from. Its layout and dtypes are kept, so that tensors which
            did not change come back bit for bit, and the files beside its weights are copied. None writes
            the native layout.
        dtype: of all floating tensors, whatever the source; None without a source keeps the model's own.

    Raises: DiskError if a file cannot be written; CheckpointError if `source` cannot be read.
    """
    slots, kept, unused = native_slots(model.config), dict[str, torch.dtype](), dict[str, Tensor]()
    if source is not None:
        shards = find_shards(source)
        header = read_header(shards)
        slots = _layout(model.config, header)
        kept = {name: header[name].dtype for name in slots if name in header}
        unused = read_tensors(header, [name for name in header if name.startswith(UNUSED)])
        source = source.parent if source.is_file() else source
    folder.mkdir(parents=True, exist_ok=True)
    save_slots(model, slots, folder / WEIGHTS, dtypes=dtype or kept, extra=unused)
    for name in _BESIDE:
        if source is not None and (source / name).is_file():
            copy_file(source / name, folder / name)
        elif name == "config.json":
            write_json(folder / name, official_config(model.config))
