"""OpenUni's official files in and out.

A model is assembled from four places: the .pth of an OpenUni (what is trained), and the hub repositories of
InternVL3, of SANA and of the autoencoder. The .pth of a stage that trained SANA holds it and replaces the
repository's; the text-to-image pretraining did not. A release here is one folder:

    openuni_*.pth     InternVL3-1B/     Sana_600M_512px_diffusers/     dc-ae-f32c32-sana-1.1-diffusers/

with repositories under their own names, SANA's only where the .pth lacks it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from reca.errors import CheckpointError
from reca.files import copy_file, write_json
from reca.models.checkpoint import PICKLED, find_shards, load_slots, read_header, save_slots
from reca.models.openuni.config import OpenUniConfig
from reca.models.openuni.model import OpenUniModel
from reca.models.openuni.slots import (
    Slots,
    autoencoder_slots,
    internvl_slots,
    native_internvl_slots,
    older_name,
    sana_slots,
    trained_slots,
)

WEIGHTS = "openuni.pth"
LANGUAGE_MODEL, SANA, AUTOENCODER = "internvl", "sana", "dc-ae"
_SHARD = "diffusion_pytorch_model.safetensors"
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)


@dataclass(frozen=True, slots=True)
class Release:
    """Where the parts of a model are.

    Attributes:
        trained: the .pth, or the same tensors as safetensors.
        language_model, sana, autoencoder: folders of the repositories' weights; None where there are none.
    """

    trained: Path
    language_model: Path | None
    sana: Path | None
    autoencoder: Path | None


def find_release(path: Path) -> Release:
    """The parts of a release: `path` is its folder, or the .pth inside it.

    Raises: CheckpointError if there is no .pth or more than one, or two folders for one part.
    """
    folder = path.parent if path.is_file() else path
    mains = [path] if path.is_file() else sorted(p for p in folder.glob("*") if p.suffix in PICKLED)
    if len(mains) != 1:
        found = ", ".join(main.name for main in mains) or "none"
        raise CheckpointError(
            f"{folder}: expected one .pth of an OpenUni, found {found}; name the file, or copy it there"
        )
    parts = {name: _part(folder, name) for name in (LANGUAGE_MODEL, SANA, AUTOENCODER)}
    return Release(mains[0], parts[LANGUAGE_MODEL], parts[SANA], parts[AUTOENCODER])


def _part(folder: Path, name: str) -> Path | None:
    """The repository whose name starts with `name`, or its `transformer` folder."""
    found = sorted(p for p in folder.glob("*") if p.is_dir() and p.name.lower().startswith(name))
    if len(found) > 1:
        names = ", ".join(entry.name for entry in found)
        raise CheckpointError(f"{folder}: {names} all hold one part of the model; keep the one that belongs")
    if not found:
        return None
    inner = found[0] / "transformer"
    return inner if name == SANA and inner.is_dir() else found[0]


def load(
    model: OpenUniModel,
    path: Path,
    device: torch.device,
    dtype: torch.dtype | None = None,
    *,
    trained_dtype: torch.dtype | None = torch.float32,
) -> None:
    """Fill a model from a release, tensor by tensor.

    Args:
        model: built under `torch.device("meta")`, or a real one whose weights are replaced.
        path: folder of a release, or the .pth inside it.
        device: where parameters come to life.
        dtype: of frozen weights; None keeps the files'.
        trained_dtype: of weights that RecA trains; None keeps the files'.

    Raises: CheckpointError if parts are missing, differ from the architecture, or state another
    configuration.
    """
    release = find_release(path)
    check_configuration(release, model.config)
    options: dict[str, Any] = {"device": device, "frozen_dtype": dtype, "trained_dtype": trained_dtype}
    with_sana = _holds_sana(release.trained, model)
    if not with_sana:
        folder = _required(release.sana, release, f"{release.trained.name} comes without SANA")
        load_slots(model, sana_slots(model), folder, **options)
    load_slots(model, trained_slots(model, with_sana=with_sana), release.trained, **options)
    folder = _required(release.language_model, release, "the language model is in no .pth")
    load_slots(model, _internvl_slots_of(folder, model.config), folder, **options)
    folder = _required(release.autoencoder, release, "the autoencoder is in no .pth")
    load_slots(model, autoencoder_slots(model), folder, **options)


def _internvl_slots_of(folder: Path, config: OpenUniConfig) -> Slots:
    """The table for the form that a folder's names have: original, transformers 5, or transformers before."""
    names = read_header(find_shards(folder))
    native = native_internvl_slots(config)
    for renamed in (native, {older_name(name): slot for name, slot in native.items()}):
        if next(iter(renamed)) in names:
            return renamed
    return internvl_slots(config)


def _holds_sana(trained: Path, model: OpenUniModel) -> bool:
    """Whether a .pth is of a stage that trained SANA; strangers count as such, to be refused by name."""
    names = read_header([trained])
    others = trained_slots(model, with_sana=False)
    return any(name.startswith("transformer.") for name in names) or names.keys().isdisjoint(others)


def _required(part: Path | None, release: Release, why: str) -> Path:
    if part is None:
        raise CheckpointError(
            f"{release.trained.parent}: {why}; put the folders of InternVL3-*, dc-ae-* and, for a pretrained "
            ".pth, Sana* beside it"
        )
    return part


def check_configuration(release: Release, config: OpenUniConfig) -> None:
    """Compare the configuration files of a release, where it has them, with the architecture.

    Heads and epsilons do not show in the shapes of tensors. Keys that a file omits are not compared.

    Raises: CheckpointError naming the first key that differs.
    """
    for folder, expected in _official_configs(release, config):
        path = folder / "config.json"
        if not path.is_file():
            continue
        try:
            stated = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: not a readable JSON file ({error})") from error
        if not isinstance(stated, dict):
            raise CheckpointError(f"{path}: expected a JSON object, got {stated!r:.50}")
        # transformers writes its own configuration file beside its own names
        is_native = "text_config" in stated
        _compare(path, stated, _native_config(config) if is_native else expected)


def _compare(path: Path, stated: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for key, value in expected.items():
        inner = stated.get(key)
        if isinstance(value, Mapping) and isinstance(inner, Mapping):
            _compare(path, inner, value)
        elif key in stated and json.loads(json.dumps(value)) != inner:
            raise CheckpointError(
                f"{path}: {key} is {inner}, but the chosen variant has {value}; "
                "choose the variant that the weights belong to"
            )


def _official_configs(release: Release, config: OpenUniConfig) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    configs = official_configs(config)
    parts = {LANGUAGE_MODEL: release.language_model, SANA: release.sana, AUTOENCODER: release.autoencoder}
    for name, folder in parts.items():
        if folder is not None:
            yield folder, configs[name]


def official_configs(config: OpenUniConfig) -> dict[str, dict[str, Any]]:
    """Part -> content of the `config.json` in its repository, under the official keys."""
    llm: dict[str, Any] = {**asdict(config.llm), "hidden_act": "silu", "tie_word_embeddings": False}
    vision = _without(asdict(config.vision), "drop_path_rate")  # a choice of training, not of the weights
    vision |= {"qkv_bias": True, "qk_normalization": False, "norm_type": "layer_norm", "hidden_act": "gelu"}
    return {
        LANGUAGE_MODEL: {
            "model_type": "internvl_chat",
            "llm_config": llm,
            "vision_config": vision,
            "select_layer": -1,
            "downsample_ratio": 0.5,
            "ps_version": "v2",
        },
        SANA: {
            "_class_name": "SanaTransformer2DModel",
            **_without(config.sana.arguments(), "sample_size"),  # names a default picture, shapes nothing
        },
        AUTOENCODER: {"_class_name": "AutoencoderDC", **config.autoencoder.arguments()},
    }


def _native_config(config: OpenUniConfig) -> dict[str, Any]:
    """What the `config.json` of transformers says of the same architecture."""
    vision = _without(asdict(config.vision), "drop_path_rate")
    vision |= {key: [vision[key]] * 2 for key in ("image_size", "patch_size")}
    return {"text_config": _without(asdict(config.llm), "rope_theta"), "vision_config": vision}


def _without(mapping: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in mapping.items() if name != key}


def save(
    model: OpenUniModel, folder: Path, *, source: Path | None = None, dtype: torch.dtype | None = None
) -> None:
    """Write a release: the .pth with everything that is trained, and the frozen repositories beside it.

    Each file appears whole or not at all; wrap the call in `publish_dir` to let the folder appear as one.

    Args:
        folder: written into; made if missing.
        source: the release that the model came from. Its frozen files are copied, and its dtypes are kept, so
            that tensors which did not change come back bit for bit.
        dtype: of the .pth, whatever the source; None without a source keeps the model's own.

    Raises: DiskError if a file cannot be written; CheckpointError if `source` cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    slots = trained_slots(model)
    if source is None:
        save_slots(model, slots, folder / WEIGHTS, dtypes=dtype)
        parts = {LANGUAGE_MODEL: internvl_slots(model.config), AUTOENCODER: autoencoder_slots(model)}
        for name, part in parts.items():
            shard = "model.safetensors" if name == LANGUAGE_MODEL else _SHARD
            (folder / name).mkdir(exist_ok=True)
            save_slots(model, part, folder / name / shard)
            write_json(folder / name / "config.json", official_configs(model.config)[name])
        return
    release = find_release(source)
    stored = read_header([release.trained])
    # one dtype fills a .pth; SANA may join it here for the first time
    common = stored["meta_queries"].dtype if "meta_queries" in stored else None
    kept = {name: stored[name].dtype if name in stored else common for name in slots}
    dtypes = dtype or {name: entry for name, entry in kept.items() if entry is not None}
    save_slots(model, slots, folder / WEIGHTS, dtypes=dtypes)
    for frozen in (release.language_model, release.autoencoder):
        if frozen is not None:
            _copy(frozen, folder / frozen.name)


def _copy(source: Path, folder: Path) -> None:
    """The weights, configuration and tokenizer of a frozen repository, byte for byte."""
    folder.mkdir(exist_ok=True)
    names = {path.name for path in find_shards(source)} | {"config.json", *_TOKENIZER}
    names |= {path.name for path in source.glob("*.index.json")}
    for name in sorted(names):
        if (source / name).is_file():
            copy_file(source / name, folder / name)
