"""Which official tensor lives where: names of the .pth and of the repositories, as data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from reca.models.checkpoint import Slot
from reca.models.openuni.config import OpenUniConfig
from reca.models.openuni.model import OpenUniModel

Slots = dict[str, Slot]


def trained_slots(model: OpenUniModel, *, with_sana: bool = True) -> Slots:
    """Names of the .pth -> places."""
    slots = {"meta_queries": Slot("meta_queries")}
    slots |= {f"projector.{kind}": Slot(f"projector.{kind}") for kind in ("weight", "bias")}
    dim = model.config.connector.hidden_size
    for layer in range(model.config.connector.num_hidden_layers):
        official = ours = f"connector.layers.{layer}"
        parts = {"layer_norm1": "norm1", "layer_norm2": "norm2", "self_attn.out_proj": "out"}
        parts |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
        for kind in ("weight", "bias"):
            slots |= {
                f"{official}.{part}.{kind}": Slot(f"{ours}.{mine}.{kind}") for part, mine in parts.items()
            }
            names = [f"{official}.self_attn.{part}_proj.{kind}" for part in "qkv"]
            slots |= dict(_fused(names, [dim] * 3, f"{ours}.qkv.{kind}"))
    return slots | (sana_slots(model, "transformer.") if with_sana else {})


def sana_slots(model: OpenUniModel, prefix: str = "") -> Slots:
    """Names of SANA's repository, or with the prefix of the .pth, -> places."""
    return {f"{prefix}{name}": Slot(f"sana.{name}") for name, _ in model.sana.named_parameters()}


def autoencoder_slots(model: OpenUniModel, prefix: str = "") -> Slots:
    """Names of the autoencoder's repository -> places."""
    inner = model.vae.autoencoder.named_parameters()
    return {f"{prefix}{name}": Slot(f"vae.autoencoder.{name}") for name, _ in inner}


def internvl_slots(config: OpenUniConfig, prefix: str = "") -> Slots:
    """Names of InternVL3's original repository -> places."""
    llm = "language_model.model"
    slots = {
        "vision_model.embeddings.class_embedding": Slot("vision.class_embedding"),
        "vision_model.embeddings.position_embedding": Slot("vision.position_embedding"),
        f"{llm}.embed_tokens.weight": Slot("embed_tokens.weight"),
        f"{llm}.norm.weight": Slot("norm.weight"),
        "language_model.lm_head.weight": Slot("lm_head.weight"),
    }
    singles = {"vision_model.embeddings.patch_embedding": "vision.patch_embedding", "mlp1.0": "aligner.norm"}
    singles |= {"mlp1.1": "aligner.fc1", "mlp1.3": "aligner.fc2"}
    for layer in range(config.vision.num_hidden_layers):
        official, ours = f"vision_model.encoder.layers.{layer}", f"vision.layers.{layer}"
        parts = {"attn.qkv": "qkv", "attn.proj": "out", "norm1": "norm1", "norm2": "norm2"}
        parts |= {"mlp.fc1": "fc1", "mlp.fc2": "fc2"}
        singles |= {f"{official}.{part}": f"{ours}.{mine}" for part, mine in parts.items()}
        slots |= {f"{official}.ls{branch}": Slot(f"{ours}.scale{branch}") for branch in (1, 2)}
    slots |= _pairs(singles)
    for layer in range(config.llm.num_hidden_layers):
        slots |= _decoder_layer(config, f"{llm}.layers.{layer}", f"layers.{layer}")
    return {prefix + name: slot for name, slot in slots.items()}


def native_internvl_slots(config: OpenUniConfig) -> Slots:
    """Names of InternVL3 in transformers (`InternVLForConditionalGeneration`) -> places."""
    tower, projector, llm = "model.vision_tower", "model.multi_modal_projector", "model.language_model"
    slots = {
        f"{tower}.embeddings.cls_token": Slot("vision.class_embedding"),
        f"{tower}.embeddings.position_embeddings": Slot("vision.position_embedding"),
        f"{llm}.embed_tokens.weight": Slot("embed_tokens.weight"),
        f"{llm}.norm.weight": Slot("norm.weight"),
        "lm_head.weight": Slot("lm_head.weight"),
    }
    singles = {f"{tower}.embeddings.patch_embeddings.projection": "vision.patch_embedding"}
    singles |= {f"{projector}.layer_norm": "aligner.norm", f"{projector}.linear_1": "aligner.fc1"}
    singles |= {f"{projector}.linear_2": "aligner.fc2"}
    for layer in range(config.vision.num_hidden_layers):
        official, ours = f"{tower}.encoder.layer.{layer}", f"vision.layers.{layer}"
        parts = {"attention.projection_layer": "out", "layernorm_before": "norm1", "layernorm_after": "norm2"}
        parts |= {"mlp.fc1": "fc1", "mlp.fc2": "fc2"}
        singles |= {f"{official}.{part}": f"{ours}.{mine}" for part, mine in parts.items()}
        slots |= {f"{official}.lambda_{branch}": Slot(f"{ours}.scale{branch}") for branch in (1, 2)}
        for kind in ("weight", "bias"):
            names = [f"{official}.attention.{part}_proj.{kind}" for part in "qkv"]
            slots |= dict(_fused(names, [config.vision.hidden_size] * 3, f"{ours}.qkv.{kind}"))
    slots |= _pairs(singles)
    for layer in range(config.llm.num_hidden_layers):
        slots |= _decoder_layer(config, f"{llm}.layers.{layer}", f"layers.{layer}")
    return slots


def _pairs(singles: Mapping[str, str]) -> Slots:
    return {
        f"{name}.{kind}": Slot(f"{ours}.{kind}")
        for name, ours in singles.items()
        for kind in ("weight", "bias")
    }


def _fused(names: list[str], sizes: list[int], ours: str) -> Iterator[tuple[str, Slot]]:
    """Official tensors that are consecutive rows of one of ours."""
    start = 0
    for name, size in zip(names, sizes, strict=True):
        yield name, Slot(ours, start, start + size)
        start += size


def _decoder_layer(config: OpenUniConfig, official: str, ours: str) -> Slots:
    llm = config.llm
    slots = {
        f"{official}.input_layernorm.weight": Slot(f"{ours}.input_norm.weight"),
        f"{official}.post_attention_layernorm.weight": Slot(f"{ours}.post_norm.weight"),
        f"{official}.self_attn.o_proj.weight": Slot(f"{ours}.o.weight"),
        f"{official}.mlp.down_proj.weight": Slot(f"{ours}.mlp.down.weight"),
    }
    gates = [f"{official}.mlp.{part}_proj.weight" for part in ("gate", "up")]
    slots |= dict(_fused(gates, [llm.intermediate_size] * 2, f"{ours}.mlp.gate_up.weight"))
    heads = (llm.num_attention_heads, llm.num_key_value_heads, llm.num_key_value_heads)
    for kind in ("weight", "bias"):
        names = [f"{official}.self_attn.{part}_proj.{kind}" for part in "qkv"]
        slots |= dict(_fused(names, [count * llm.head_dim for count in heads], f"{ours}.qkv.{kind}"))
    return slots


def older_name(name: str) -> str:
    """What transformers called a tensor of InternVL3 before version 5."""
    language = name.replace("model.language_model.", "language_model.model.")
    return "language_model.lm_head.weight" if name == "lm_head.weight" else language.removeprefix("model.")
