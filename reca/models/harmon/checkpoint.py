"""Harmon's official files in and out.

A release is one flat state dict of `torch.save`, `harmon_*.pth`, without the autoencoder, and `kl16.ckpt`,
which holds the autoencoder under the key `model`. The Hugging Face form has both in safetensors files, the
autoencoder under `vae.`. The output layer is tied to the embedding of tokens; files may hold it or not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from reca.errors import CheckpointError
from reca.files import copy_file
from reca.models.checkpoint import Slot, find_shards, load_slots, read_header, save_slots
from reca.models.harmon.config import HarmonConfig, LLMConfig
from reca.models.harmon.model import HarmonModel
from reca.models.harmon.vae import vae_slots

AUTOENCODER = "kl16.ckpt"
TIED = "llm.lm_head.weight"
_VAE = "vae."
_PARTS = tuple(
    prefix + part
    for prefix in ("", "vae.")
    for part in ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
)
_EMBEDDING = "llm.model.embed_tokens.weight"
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)
_AFFINE = {
    "mar.z_proj": "encoder.embed",
    "mar.z_proj_ln": "encoder.input_norm",
    "mar.encoder_norm": "encoder.norm",
    "mar.decoder_embed": "decoder.embed",
    "mar.decoder_norm": "decoder.norm",
    "proj_in.0": "proj_in.fc1",
    "proj_in.2": "proj_in.fc2",
    "proj_out.0": "proj_out.fc1",
    "proj_out.2": "proj_out.fc2",
    "mar.diffloss.net.time_embed.mlp.0": "diffusion_head.time_fc1",
    "mar.diffloss.net.time_embed.mlp.2": "diffusion_head.time_fc2",
    "mar.diffloss.net.cond_embed": "diffusion_head.condition",
    "mar.diffloss.net.input_proj": "diffusion_head.input",
    "mar.diffloss.net.final_layer.linear": "diffusion_head.output",
    "mar.diffloss.net.final_layer.adaLN_modulation.1": "diffusion_head.modulation",
}
_SINGLES = {
    _EMBEDDING: "embed_tokens.weight",
    "llm.model.norm.weight": "norm.weight",
    "mar.class_emb.weight": "class_embedding.weight",
    "mar.fake_latent": "encoder.buffer_token",
    "mar.encoder_pos_embed_learned": "encoder.position_table",
    "mar.mask_token": "decoder.mask_token",
    "mar.decoder_pos_embed_learned": "decoder.position_table",
    "mar.diffusion_pos_embed_learned": "decoder.output_table",
}
_BLOCK = {
    "norm1": "norm1",
    "attn.qkv": "qkv",
    "attn.proj": "proj",
    "norm2": "norm2",
    "mlp.fc1": "fc1",
    "mlp.fc2": "fc2",
}
_HEAD_BLOCK = {"in_ln": "norm", "mlp.0": "fc1", "mlp.2": "fc2", "adaLN_modulation.1": "modulation"}


def harmon_slots(config: HarmonConfig) -> dict[str, Slot]:
    """Official names of a `.pth` file -> places in a `HarmonModel`."""
    slots = {official: Slot(ours) for official, ours in _SINGLES.items()}
    slots[TIED] = Slot(_SINGLES[_EMBEDDING], is_tied=True)
    slots |= _affine(_AFFINE)
    for layer in range(config.llm.num_hidden_layers):
        slots |= dict(_decoder_layer(config.llm, f"llm.model.layers.{layer}", f"layers.{layer}"))
    for part, depth in (("encoder", config.mar.encoder_depth), ("decoder", config.mar.decoder_depth)):
        for block in range(depth):
            slots |= _affine(_BLOCK, f"mar.{part}_blocks.{block}.", f"{part}.blocks.{block}.")
    for block in range(config.mar.diffloss_d):
        slots |= _affine(
            _HEAD_BLOCK, f"mar.diffloss.net.res_blocks.{block}.", f"diffusion_head.blocks.{block}."
        )
    return slots


def autoencoder_slots(config: HarmonConfig) -> dict[str, Slot]:
    """Official names of `kl16.ckpt` -> places in a `HarmonModel`."""
    return vae_slots(config.vae, "vae.autoencoder.")


def _affine(names: Mapping[str, str], official: str = "", ours: str = "") -> dict[str, Slot]:
    return {
        f"{official}{theirs}.{kind}": Slot(f"{ours}{mine}.{kind}")
        for theirs, mine in names.items()
        for kind in ("weight", "bias")
    }


def _decoder_layer(config: LLMConfig, prefix: str, ours: str) -> Iterator[tuple[str, Slot]]:
    yield f"{prefix}.input_layernorm.weight", Slot(f"{ours}.input_norm.weight")
    yield f"{prefix}.post_attention_layernorm.weight", Slot(f"{ours}.post_norm.weight")
    yield f"{prefix}.self_attn.o_proj.weight", Slot(f"{ours}.o.weight")
    yield f"{prefix}.mlp.down_proj.weight", Slot(f"{ours}.mlp.down.weight")
    inner = config.intermediate_size
    yield f"{prefix}.mlp.gate_proj.weight", Slot(f"{ours}.mlp.gate_up.weight", 0, inner)
    yield f"{prefix}.mlp.up_proj.weight", Slot(f"{ours}.mlp.gate_up.weight", inner, 2 * inner)
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    for kind in ("weight", "bias"):
        start = 0
        for part, count in zip("qkv", heads, strict=True):
            stop = start + count * config.head_dim
            yield f"{prefix}.self_attn.{part}_proj.{kind}", Slot(f"{ours}.qkv.{kind}", start, stop)
            start = stop


def find_weights(path: Path) -> Path:
    """The main file of a release, or the folder of its shards; `path` is the release's folder or the file.

    Raises: CheckpointError if there are none, or several to choose from.
    """
    if path.is_file():
        return path
    files = sorted(path.glob("*.pth")) if path.is_dir() else []
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise CheckpointError(f"{path} holds several releases ({names}); name one of the files")
    if not files and not any(path.glob("*.safetensors")):
        raise CheckpointError(
            f"{path}: expected harmon_*.pth or *.safetensors; give the folder of a Harmon release"
        )
    return files[0] if files else path


def load(
    model: HarmonModel,
    path: Path,
    device: torch.device,
    dtype: torch.dtype | None = None,
    *,
    trained_dtype: torch.dtype | None = torch.float32,
) -> None:
    """Fill a model from official files, tensor by tensor.

    Args:
        model: built under `torch.device("meta")`, or a real one whose weights are replaced.
        path: folder of a release, or its main file; the autoencoder lies beside it, or within safetensors.
        device: where parameters come to life.
        dtype: of frozen weights; only the autoencoder is frozen, and it stays fp32.
        trained_dtype: of all other weights; None keeps the file's.

    Raises: CheckpointError if files are missing or differ from the architecture.
    """
    main, autoencoder = find_weights(path), autoencoder_slots(model.config)
    load_slots(
        model,
        harmon_slots(model.config),
        main,
        device=device,
        frozen_dtype=dtype,
        trained_dtype=trained_dtype,
        ignored=(_VAE,),
    )
    if any(name.startswith(_VAE) for name in _names(main)):
        slots = {f"{_VAE}{name}": slot for name, slot in autoencoder.items()}
        file = main
    else:
        slots, file = autoencoder, find_autoencoder(main)
    load_slots(
        model,
        slots,
        file,
        device=device,
        frozen_dtype=torch.float32,
        ignored=tuple(name for name in _names(file) if not name.startswith(_PARTS)),
    )
    model.schedule_table = model.schedule_table.to(device)


def find_autoencoder(main: Path) -> Path:
    """`kl16.ckpt` beside the main file. Raises CheckpointError if it is missing."""
    path = (main if main.is_dir() else main.parent) / AUTOENCODER
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; copy it from the wusize/harmon release")
    return path


def _names(path: Path) -> list[str]:
    return list(read_header(find_shards(path)))


def save(
    model: HarmonModel, folder: Path, *, source: Path | None = None, dtype: torch.dtype | None = None
) -> None:
    """Write a release: `harmon_*.pth`, `kl16.ckpt`, and the tokenizer's files of the source.

    Each file appears whole or not at all; wrap the call in `publish_dir` to let the folder appear as one.

    Args:
        folder: written into; made if missing.
        source: the release that the model came from. Its dtypes are kept, so that tensors which did not
            change come back bit for bit.
        dtype: of the main file, whatever the source; None without a source keeps the model's own.

    Raises: DiskError if a file cannot be written; CheckpointError if `source` cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    slots, stored = harmon_slots(model.config), dict[str, torch.dtype]()
    if source is not None:
        header = read_header(find_shards(find_weights(source)))
        stored = {name: entry.dtype for name, entry in header.items() if name in slots}
    if dtype is None and TIED in slots and _EMBEDDING in stored:
        stored[TIED] = stored[_EMBEDDING]
    save_slots(model, slots, folder / f"{model.config.release}.pth", dtypes=dtype or stored)
    save_slots(model, autoencoder_slots(model.config), folder / AUTOENCODER, key="model")
    if source is None:
        return
    parent = source.parent if source.is_file() else source
    for name in TOKENIZER:
        if (parent / name).is_file():
            copy_file(parent / name, folder / name)
