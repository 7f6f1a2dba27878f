"""Show-o's official files in and out.

A Show-o folder holds `config.json` and `pytorch_model.bin`; image tokenizer, vision tower and the language
model's words are releases of their own, expected in folders of their names inside it or beside it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from reca.errors import CheckpointError
from reca.files import copy_file, write_json
from reca.models.checkpoint import Slot, find_shards, load_slots, read_header, save_slots
from reca.models.showo.config import PhiConfig, ShowoConfig
from reca.models.showo.model import ShowoModel
from reca.models.showo.text import PHI, TOKENIZER_FILES

WEIGHTS = ("pytorch_model.bin", "pytorch_model.safetensors", "model.safetensors")
PICKLED = WEIGHTS[0]
MAGVIT, CLIP = "magvitv2", "clip-vit-large-patch14-336"
_PREFIXED = ("text_model.", "visual_projection.", "text_projection.", "logit_scale")
_UNUSED_CLIP = (*_PREFIXED, "vision_model.embeddings.position_ids")


def showo_slots(config: ShowoConfig) -> dict[str, Slot]:
    """Official names of Show-o's own weights -> places in a `ShowoModel`."""
    slots = {"showo.model.embed_tokens.weight": Slot("embed_tokens.weight")}
    for layer in range(config.phi.num_hidden_layers):
        slots |= _layer(config.phi, f"showo.model.layers.{layer}", f"layers.{layer}")
    pairs = {"showo.model.final_layernorm": "final_layernorm", "showo.lm_head": "lm_head"}
    if config.clip is not None:
        pairs |= {"mm_projector.0": "mm_projector.fc1", "mm_projector.2": "mm_projector.fc2"}
    for official, ours in pairs.items():
        slots |= _affine(official, ours)
    return slots


def _affine(official: str, ours: str) -> dict[str, Slot]:
    return {f"{official}.{kind}": Slot(f"{ours}.{kind}") for kind in ("weight", "bias")}


def _layer(config: PhiConfig, official: str, ours: str) -> dict[str, Slot]:
    """One decoder layer; query, key and value are rows of one matrix here."""
    dim, slots = config.hidden_size, dict[str, Slot]()
    for index, part in enumerate("qkv"):
        for kind in ("weight", "bias"):
            rows = Slot(f"{ours}.qkv.{kind}", index * dim, (index + 1) * dim)
            slots[f"{official}.self_attn.{part}_proj.{kind}"] = rows
    for theirs, mine in (
        ("input_layernorm", "input_layernorm"),
        ("self_attn.dense", "dense"),
        ("self_attn.q_layernorm", "q_layernorm"),
        ("self_attn.k_layernorm", "k_layernorm"),
        ("mlp.fc1", "mlp.fc1"),
        ("mlp.fc2", "mlp.fc2"),
    ):
        slots |= _affine(f"{official}.{theirs}", f"{ours}.{mine}")
    return slots


def magvit_slots(model: torch.nn.Module, prefix: str = "magvit.") -> dict[str, Slot]:
    """Official names of the image tokenizer -> places found under `prefix` in a model."""
    names = (name for name, _ in model.named_parameters() if name.startswith(prefix))
    slots = {name.removeprefix(prefix): Slot(name) for name in names}
    tables = ("quantize.embedding", "quantize.power_vals")
    return slots | {name: Slot(prefix + name, is_computed=True) for name in tables}


def clip_slots(model: torch.nn.Module, prefix: str = "vision.tower.") -> dict[str, Slot]:
    """Official names of CLIP's vision half -> places found under `prefix` in a model."""
    names = (name for name, _ in model.named_parameters() if name.startswith(prefix))
    return {f"vision_model.{name.removeprefix(prefix)}": Slot(name) for name in names}


def find_weights(path: Path) -> Path:
    """The weights of a Show-o folder: one file, or the folder itself if they are in shards.

    Raises: CheckpointError if there are none.
    """
    if path.is_file():
        return path
    for name in WEIGHTS:
        if (path / name).is_file():
            return path / name
    if list(path.glob("*.safetensors.index.json")):
        return path
    raise CheckpointError(
        f"{path}: expected one of {', '.join(WEIGHTS)}; give the folder of a Show-o release"
    )


def find_part(folder: Path, name: str) -> Path:
    """The folder of another release that a Show-o needs, inside its own or beside it.

    Raises: CheckpointError if it is in neither place.
    """
    for place in (folder / name, folder.parent / name):
        if place.is_dir():
            return place
    raise CheckpointError(
        f"{folder / name} is missing; copy the release {name} there, or beside {folder.name}"
    )


def _part_weights(folder: Path, name: str) -> Path:
    part = find_part(folder, name)
    for file in reversed(WEIGHTS):
        if (part / file).is_file():
            return part / file
    raise CheckpointError(f"{part}: expected model.safetensors or pytorch_model.bin; copy the release again")


def load(
    model: ShowoModel,
    path: Path,
    device: torch.device,
    dtype: torch.dtype | None = None,
    *,
    trained_dtype: torch.dtype | None = torch.float32,
) -> None:
    """Fill a model from an official folder, tensor by tensor.

    Args:
        model: built under `torch.device("meta")`, or a real one whose weights are replaced.
        path: folder of a release, or its weights.
        device: where parameters come to life.
        dtype: of the vision tower; the image tokenizer stays fp32. None keeps the file's.
        trained_dtype: of all weights of Show-o itself; None keeps the file's.

    Raises: CheckpointError if files are missing, differ from the architecture, or state another
    configuration.
    """
    weights = find_weights(path)
    folder = weights if weights.is_dir() else weights.parent
    check_configuration(folder, model.config)
    load_slots(model, showo_slots(model.config), weights, device=device, trained_dtype=trained_dtype)
    tokenizer = _part_weights(folder, MAGVIT)
    load_slots(model, magvit_slots(model), tokenizer, device=device, frozen_dtype=torch.float32)
    if model.vision is not None:
        tower = _part_weights(folder, CLIP)
        slots = clip_slots(model)
        load_slots(model, slots, tower, device=device, frozen_dtype=dtype, ignored=_UNUSED_CLIP)
    for module in model.modules():  # buffers are computed, not loaded
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def check_configuration(folder: Path, config: ShowoConfig) -> None:
    """Compare `config.json` of a release, where it has one, with the architecture.

    The number of image tokens does not show in the shapes of tensors.

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
    for key, value in _compared(config).items():
        if key in stated and stated[key] != value:
            raise CheckpointError(
                f"{path}: {key} is {stated[key]}, but the chosen variant has {value}; "
                "choose the variant that the weights belong to"
            )


def _compared(config: ShowoConfig) -> dict[str, Any]:
    return {
        "w_clip_vit": config.clip is not None,
        "vocab_size": config.vocab_size,
        "llm_vocab_size": config.special.pad,
        "codebook_size": config.codebook_size,
        "num_vq_tokens": config.num_codes,
    }


def official_config(config: ShowoConfig) -> dict[str, Any]:
    """Content of `config.json` under the official keys."""
    return {
        "_class_name": "Showo",
        **_compared(config),
        "mask_token_id": config.special.mask,
        "num_new_special_tokens": config.special.codes - config.special.pad,
        "llm_model_path": "microsoft/phi-1_5",
        "load_from_showo": True,
    }


def save(
    model: ShowoModel, folder: Path, *, source: Path | None = None, dtype: torch.dtype | None = None
) -> None:
    """Write an official folder: `pytorch_model.bin` for the official programs, and `config.json`.

    The frozen releases that it needs come in folders of their names inside it, so that it can be loaded
    wherever it goes; official programs pass them over. Each file appears whole or not at all; wrap the call
    in `publish_dir` to let the folder appear as one.

    Args:
        folder: written into; made if missing.
        source: the release that the model came from; its dtypes are kept, so that tensors which did not
            change come back bit for bit, and its configuration and the frozen releases are copied.
        dtype: of the weights, whatever the source; None without a source keeps the model's own.

    Raises: DiskError if a file cannot be written; CheckpointError if `source` cannot be read.
    """
    stored: Mapping[str, torch.dtype] = dict(_dtypes(source)) if source is not None else {}
    slots = showo_slots(model.config)
    folder.mkdir(parents=True, exist_ok=True)
    kept = {name: stored[name] for name in slots if name in stored}
    save_slots(model, slots, folder / PICKLED, dtypes=dtype or kept)
    stated = None if source is None else (source if source.is_dir() else source.parent) / "config.json"
    if stated is not None and stated.is_file():
        copy_file(stated, folder / "config.json")
    else:
        write_json(folder / "config.json", official_config(model.config))
    if source is None:
        save_slots(model, magvit_slots(model), folder / MAGVIT / PICKLED)
        if model.vision is not None:
            save_slots(model, clip_slots(model), folder / CLIP / PICKLED)
        return
    source = source if source.is_dir() else source.parent
    for name in (MAGVIT, *((CLIP,) if model.vision is not None else ())):
        file = _part_weights(source, name)
        copy_file(file, folder / name / file.name)
    for place in (source, source / PHI, source.parent / PHI):
        words = [place / name for name in TOKENIZER_FILES if (place / name).is_file()]
        for file in words:
            copy_file(file, folder / PHI / file.name)
        if words:
            return


def _dtypes(source: Path) -> Iterator[tuple[str, torch.dtype]]:
    for name, entry in read_header(find_shards(find_weights(source))).items():
        yield name, entry.dtype
