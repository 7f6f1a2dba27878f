"""BAGEL's official files in and out.

`ema.safetensors` holds everything but the autoencoder, `ae.safetensors` the FLUX autoencoder. The two
sine-cosine position tables are stored (often in bf16) but computed here; loaders of other projects demand
them, so they are written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from reca.errors import CheckpointError
from reca.files import copy_file, write_json
from reca.models.bagel.config import BagelConfig, LLMConfig, VisionConfig
from reca.models.bagel.model import BagelModel
from reca.models.bagel.vae import vae_slots
from reca.models.checkpoint import Slot, load_slots, read_header, save_slots

WEIGHTS = ("ema.safetensors", "model.safetensors", "model_bf16.safetensors")
AUTOENCODER = "ae.safetensors"
INDEX = "model.safetensors.index.json"
_CONFIGS = ("config.json", "llm_config.json", "vit_config.json")
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "preprocessor_config.json",
)
_SINGLES = {
    "connector.fc1": "connector.fc1",
    "connector.fc2": "connector.fc2",
    "time_embedder.mlp.0": "time_embedder.fc1",
    "time_embedder.mlp.2": "time_embedder.fc2",
    "vae2llm": "vae2llm",
    "llm2vae": "llm2vae",
    "vit_model.vision_model.embeddings.patch_embedding": "vision.patch_embedding",
    "vit_model.vision_model.post_layernorm": "vision.post_norm",
}
_WEIGHTS_ONLY = {
    "language_model.model.embed_tokens": "embed_tokens",
    "language_model.model.norm": "norm",
    "language_model.model.norm_moe_gen": "norm_gen",
    "language_model.lm_head": "lm_head",
    "vit_model.vision_model.embeddings.position_embedding": "vision.position_embedding",
}
_TABLES = {"latent_pos_embed.pos_embed": "latent_positions", "vit_pos_embed.pos_embed": "vision_positions"}


def bagel_slots(config: BagelConfig) -> dict[str, Slot]:
    """Official names of `ema.safetensors` -> places in a `BagelModel`."""
    slots = {
        f"{official}.{kind}": Slot(f"{ours}.{kind}")
        for official, ours in _SINGLES.items()
        for kind in ("weight", "bias")
    }
    slots |= {f"{official}.weight": Slot(f"{ours}.weight") for official, ours in _WEIGHTS_ONLY.items()}
    slots |= {official: Slot(ours, is_computed=True) for official, ours in _TABLES.items()}
    for layer in range(config.llm.num_hidden_layers):
        prefix = f"language_model.model.layers.{layer}"
        slots |= _expert(config.llm, prefix, "", f"layers.{layer}.und")
        slots |= _expert(config.llm, prefix, "_moe_gen", f"layers.{layer}.gen")
    for layer in range(config.vision.num_layers):
        slots |= _vision_layer(config.vision, layer)
    return slots


def autoencoder_slots(config: BagelConfig) -> dict[str, Slot]:
    """Official names of `ae.safetensors` -> places in a `BagelModel`."""
    return vae_slots(config.vae, "vae.autoencoder.")


def _fused(names: tuple[str, ...], sizes: tuple[int, ...], ours: str) -> Iterator[tuple[str, Slot]]:
    """Official tensors that are consecutive rows of one of ours."""
    start = 0
    for name, size in zip(names, sizes, strict=True):
        yield name, Slot(ours, start, start + size)
        start += size


def _expert(config: LLMConfig, prefix: str, suffix: str, ours: str) -> dict[str, Slot]:
    """One parameter set of a decoder layer."""
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp{suffix}"
    rows = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    sizes = tuple(heads * config.head_dim for heads in rows)
    slots = {
        f"{prefix}.input_layernorm{suffix}.weight": Slot(f"{ours}.input_norm.weight"),
        f"{prefix}.post_attention_layernorm{suffix}.weight": Slot(f"{ours}.post_norm.weight"),
        f"{attention}.q_norm{suffix}.weight": Slot(f"{ours}.q_norm.weight"),
        f"{attention}.k_norm{suffix}.weight": Slot(f"{ours}.k_norm.weight"),
        f"{attention}.o_proj{suffix}.weight": Slot(f"{ours}.o.weight"),
        f"{mlp}.down_proj.weight": Slot(f"{ours}.mlp.down.weight"),
    }
    gates = (f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight")
    slots |= dict(_fused(gates, (config.intermediate_size,) * 2, f"{ours}.mlp.gate_up.weight"))
    for kind in ("weight", "bias"):
        names = tuple(f"{attention}.{part}_proj{suffix}.{kind}" for part in "qkv")
        slots |= dict(_fused(names, sizes, f"{ours}.qkv.{kind}"))
    return slots


def _vision_layer(config: VisionConfig, layer: int) -> dict[str, Slot]:
    """One layer of the understanding encoder."""
    prefix, ours = f"vit_model.vision_model.encoder.layers.{layer}", f"vision.layers.{layer}"
    parts = {
        "layer_norm1": "norm1",
        "layer_norm2": "norm2",
        "self_attn.out_proj": "out",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    slots: dict[str, Slot] = {}
    for kind in ("weight", "bias"):
        slots |= {f"{prefix}.{part}.{kind}": Slot(f"{ours}.{mine}.{kind}") for part, mine in parts.items()}
        names = tuple(f"{prefix}.self_attn.{part}_proj.{kind}" for part in "qkv")
        slots |= dict(_fused(names, (config.hidden_size,) * 3, f"{ours}.qkv.{kind}"))
    return slots


def find_weights(path: Path) -> tuple[Path, Path]:
    """The main file and the autoencoder's: `path` is the folder of a release, or the main file inside one.

    Of several main files in a folder `ema.safetensors` is taken, as the official programs do.

    Raises: CheckpointError if either is missing.
    """
    folder = path.parent if path.is_file() else path
    mains = [path] if path.is_file() else [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if not mains:
        raise CheckpointError(
            f"{folder}: expected one of {', '.join(WEIGHTS)}; give the folder of a BAGEL release"
        )
    autoencoder = folder / AUTOENCODER
    if not autoencoder.is_file():
        raise CheckpointError(
            f"{autoencoder} is missing; copy it from BAGEL-7B-MoT, or give the folder of a BAGEL release"
        )
    return mains[0], autoencoder


def load(
    model: BagelModel,
    path: Path,
    device: torch.device,
    dtype: torch.dtype | None = None,
    *,
    trained_dtype: torch.dtype | None = torch.float32,
) -> None:
    """Fill a model from an official folder, tensor by tensor.

    Args:
        model: built under `torch.device("meta")`, or a real one whose weights are replaced.
        path: folder of a release, or one of its main files.
        device: where parameters come to life.
        dtype: of frozen weights except the autoencoder's, which stay fp32; None keeps the file's.
        trained_dtype: of weights that RecA trains; None keeps the file's.

    Raises: CheckpointError if files are missing, differ from the architecture, or state another
    configuration.
    """
    weights, autoencoder = find_weights(path)
    check_configuration(weights.parent, model.config)
    slots = bagel_slots(model.config)
    load_slots(model, slots, weights, device=device, frozen_dtype=dtype, trained_dtype=trained_dtype)
    load_slots(model, autoencoder_slots(model.config), autoencoder, device=device, frozen_dtype=torch.float32)
    for name in _TABLES.values():
        setattr(model, name, getattr(model, name).to(device))


def check_configuration(folder: Path, config: BagelConfig) -> None:
    """Compare the configuration files of a release, where it has them, with the architecture.

    Heads and epsilons do not show in the shapes of tensors. Keys that a file omits are not compared.

    Raises: CheckpointError naming the first key that differs.
    """
    for name, expected in official_configs(config).items():
        path = folder / name
        if name == "config.json" or not path.is_file():
            continue
        try:
            stated = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: not a readable JSON file ({error})") from error
        if not isinstance(stated, dict):
            raise CheckpointError(f"{path}: expected a JSON object, got {stated!r:.50}")
        part: LLMConfig | VisionConfig = config.llm if name == "llm_config.json" else config.vision
        for key in (*asdict(part), "num_hidden_layers"):
            if key in stated and key in expected and stated[key] != expected[key]:
                raise CheckpointError(
                    f"{path}: {key} is {stated[key]}, but the chosen variant has {expected[key]}; "
                    "choose the variant that the weights belong to"
                )


def official_configs(config: BagelConfig) -> dict[str, dict[str, Any]]:
    """File name -> content of the configuration files of a release, under the official keys."""
    llm = {
        **asdict(config.llm),
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "max_position_embeddings": 32_768,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "qk_norm": True,
        "layer_module": "Qwen2MoTDecoderLayer",
        "bos_token_id": config.special.bos_token_id,
        "eos_token_id": config.special.eos_token_id,
    }
    vit = {key: value for key, value in asdict(config.vision).items() if key != "num_layers"} | {
        "model_type": "siglip_vision_model",
        # Official code builds one layer fewer than its file says.
        "num_hidden_layers": config.vision.num_layers + 1,
        "num_channels": 3,
        "hidden_act": "gelu_pytorch_tanh",
        "attention_dropout": 0.0,
    }
    whole = {
        "model_type": "bagel",
        "llm_config": llm,
        "vit_config": vit,
        "vae_config": {**asdict(config.vae), "downsample": config.vae.stride},
        "latent_patch_size": config.latent_patch_size,
        "max_latent_size": config.max_latent_size,
        "vit_max_num_patch_per_side": config.vit_max_num_patch_per_side,
        "connector_act": "gelu_pytorch_tanh",
        "interpolate_pos": False,
        "vit_select_layer": -2,
        "vit_rope": False,
    }
    return {"config.json": whole, "llm_config.json": llm, "vit_config.json": vit}


def save(
    model: BagelModel, folder: Path, *, source: Path | None = None, dtype: torch.dtype | None = None
) -> None:
    """Write an official folder: `ema.safetensors`, `ae.safetensors`, index, configurations and tokenizer.

    Each file appears whole or not at all; wrap the call in `publish_dir` to let the folder appear as one.

    Args:
        folder: written into; made if missing.
        source: the release that the model came from. Its dtypes are kept, so that tensors which did not
            change come back bit for bit, and its configuration and tokenizer files are copied.
        dtype: of the main file, whatever the source; None without a source keeps the model's own.

    Raises: DiskError if a file cannot be written; CheckpointError if `source` cannot be read.
    """
    stored: Mapping[str, torch.dtype] = {}
    if source is not None:
        stored = {name: entry.dtype for name, entry in read_header(find_weights(source)).items()}
        source = source.parent if source.is_file() else source
    folder.mkdir(parents=True, exist_ok=True)
    for file, slots, fixed in (
        (WEIGHTS[0], bagel_slots(model.config), dtype),
        (AUTOENCODER, autoencoder_slots(model.config), None),
    ):
        kept = {name: stored[name] for name in slots if name in stored}
        save_slots(model, slots, folder / file, dtypes=fixed or kept)
    write_json(folder / INDEX, _index(folder / WEIGHTS[0]))
    for name, content in official_configs(model.config).items():
        if source is None or not (source / name).is_file():
            write_json(folder / name, content)
    for name in (*_CONFIGS, *_TOKENIZER):
        if source is not None and (source / name).is_file():
            copy_file(source / name, folder / name)


def _index(weights: Path) -> dict[str, Any]:
    """Which file holds each tensor, as loaders of other projects look it up; the release's has these keys."""
    header = read_header([weights])
    total = sum(math.prod(entry.shape) * entry.dtype.itemsize for entry in header.values())
    return {"metadata": {"total_size": total}, "weight_map": dict.fromkeys(sorted(header), weights.name)}
