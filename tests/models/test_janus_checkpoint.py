"""Janus-Pro's two official layouts in and out: every name at full size, bits and dtypes, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from reca.errors import CheckpointError
from reca.models.checkpoint import named_tensors, official_shapes
from reca.models.janus import checkpoint
from reca.models.janus.codebook import examine
from reca.models.janus.config import VARIANTS, JanusConfig
from reca.models.janus.model import JanusModel

DATA = Path(__file__).resolve().parents[1] / "data"
CPU = torch.device("cpu")
CONFIG: JanusConfig = VARIANTS["tiny"].config


def on_meta(config: JanusConfig = CONFIG) -> JanusModel:
    with torch.device("meta"):
        return JanusModel(config)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release in transformers' layout, bf16 throughout."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("native")
    checkpoint.save(JanusModel(CONFIG), folder, dtype=torch.bfloat16)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def original(native: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights under the names of the remote-code release, with the tensors that nothing uses."""
    folder = tmp_path_factory.mktemp("original")
    model = JanusModel(CONFIG)
    checkpoint.load(model, native, CPU, trained_dtype=None)
    slots, tensors = checkpoint.original_slots(CONFIG), named_tensors(model)
    content = {n: s.official(tensors[s.parameter].detach()).bfloat16().clone() for n, s in slots.items()}
    content["vision_model.vision_tower.attn_pool.latent"] = torch.randn(1, 1, 48).bfloat16()
    content["gen_vision_model.quantize.codebook_used"] = torch.arange(7.0)
    save_file(content, folder / "model.safetensors")
    text = {"hidden_size": 64, "num_attention_heads": 4, "model_type": "llama"}
    (folder / "config.json").write_text(json.dumps({"language_config": text}))
    return folder


@pytest.mark.parity
@pytest.mark.parametrize("variant", ["pro-1b", "pro-7b"])
def test_all_names_and_shapes_are_those_of_transformers(variant: str) -> None:
    config = VARIANTS[variant].config
    official = json.loads((DATA / "janus_keys.json").read_text())[variant]
    listed: dict[str, tuple[int, ...]] = {}
    for name, (shape, count) in official["params"].items():
        listed |= {name.replace("*", str(index)): tuple(shape) for index in range(count)}
    assert len(listed) == official["tensors"]
    model = on_meta(config)
    assert official_shapes(checkpoint.native_slots(config), named_tensors(model)) == listed
    assert sum(parameter.numel() for parameter in model.parameters()) == official["total"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == official["trained"]


def test_both_layouts_hold_every_tensor_of_the_model() -> None:
    model = on_meta()
    for slots in (checkpoint.native_slots(CONFIG), checkpoint.original_slots(CONFIG)):
        assert {slot.parameter for slot in slots.values()} == set(named_tensors(model))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (
            "model.vision_model.encoder.layers.1.layer_norm1.bias",
            "vision_model.vision_tower.blocks.1.norm1.bias",
        ),
        (
            "model.vision_model.encoder.layers.0.self_attn.projection_layer.weight",
            "vision_model.vision_tower.blocks.0.attn.proj.weight",
        ),
        (
            "model.vqmodel.encoder.down.2.attn.0.q.weight",
            "gen_vision_model.encoder.conv_blocks.2.attn.0.q.weight",
        ),
        (
            "model.vqmodel.encoder.down.0.block.0.conv1.weight",
            "gen_vision_model.encoder.conv_blocks.0.res.0.conv1.weight",
        ),
        (
            "model.vqmodel.encoder.down.1.downsample.conv.bias",
            "gen_vision_model.encoder.conv_blocks.1.downsample.conv.bias",
        ),
        (
            "model.vqmodel.decoder.up.0.upsample.conv.bias",
            "gen_vision_model.decoder.conv_blocks.0.upsample.conv.bias",
        ),
        ("model.vqmodel.decoder.mid.attn_1.k.bias", "gen_vision_model.decoder.mid.1.k.bias"),
        ("model.vqmodel.encoder.mid.block_2.norm1.bias", "gen_vision_model.encoder.mid.2.norm1.bias"),
        ("model.vqmodel.quantize.embedding.weight", "gen_vision_model.quantize.embedding.weight"),
        ("model.generation_embeddings.weight", "gen_embed.weight"),
        ("model.generation_head.proj_out.bias", "gen_head.output_mlp_projector.bias"),
        ("model.aligner.hidden_layers.0.weight", "aligner.layers.2.weight"),
        (
            "model.language_model.layers.1.mlp.up_proj.weight",
            "language_model.model.layers.1.mlp.up_proj.weight",
        ),
        ("lm_head.weight", "language_model.lm_head.weight"),
    ],
)
def test_names_of_both_layouts_mean_the_same_rows(ours: str, theirs: str) -> None:
    assert checkpoint.native_slots(CONFIG)[ours] == checkpoint.original_slots(CONFIG)[theirs]


def test_the_original_layout_fuses_attention_and_adds_an_axis_to_the_positions(original: Path) -> None:
    tensors = tensors_of(original)
    assert tensors["vision_model.vision_tower.blocks.0.attn.qkv.weight"].shape == (3 * 48, 48)
    assert tensors["vision_model.vision_tower.pos_embed"].shape == (1, 16, 48)


@pytest.mark.parametrize("layout", ["native", "original"])
def test_a_release_comes_back_bit_for_bit_though_it_was_trained_in_fp32(
    layout: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    release: Path = request.getfixturevalue(layout)
    model = on_meta()
    checkpoint.load(model, release, CPU, torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in named_tensors(model).items()}
    assert not any(tensor.is_meta for tensor in named_tensors(model).values())
    assert dtypes["lm_head.weight"] == dtypes["vq.encoder.conv_in.weight"] == torch.float32
    assert dtypes["aligner.fc1.weight"] == dtypes["vision.layers.0.qkv.bias"] == torch.bfloat16
    checkpoint.save(model, tmp_path, source=release)
    for path in release.iterdir():
        if path.suffix == ".json":
            assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name
    before, after = tensors_of(release), tensors_of(tmp_path)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name


def test_both_layouts_and_a_pickled_file_give_the_same_model(
    native: Path, original: Path, tmp_path: Path
) -> None:
    halves = sorted(tensors_of(original).items())
    for part, items in enumerate((halves[::2], halves[1::2]), start=1):
        torch.save(dict(items), tmp_path / f"pytorch_model-0000{part}-of-00002.bin")
    models = [on_meta() for _ in range(3)]
    for model, folder in zip(models, (native, original, tmp_path), strict=True):
        checkpoint.load(model, folder, CPU)
    expected, *others = (named_tensors(model) for model in models)
    for tensors in others:
        assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())


def test_the_autoencoder_keeps_every_bit_of_a_file_in_fp32(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = JanusModel(CONFIG)
    checkpoint.save(source, tmp_path)
    model = on_meta()
    checkpoint.load(model, tmp_path, CPU, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(model.vq.parameters(), source.vq.parameters(), strict=True))
    assert model.activation_dtype == torch.bfloat16


@pytest.mark.parity
def test_transformers_reads_what_is_written(tmp_path: Path) -> None:
    from transformers import JanusForConditionalGeneration

    torch.manual_seed(0)
    model = JanusModel(CONFIG)
    checkpoint.save(model, tmp_path)
    official, report = JanusForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert torch.equal(official.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(official.lm_head.weight, official.get_input_embeddings().weight)
    # an embedding that pads is not trained
    assert official.get_input_embeddings().padding_idx == CONFIG.special.pad  # type: ignore[union-attr]


def test_a_trained_change_reaches_the_file_and_nothing_else_does(native: Path, tmp_path: Path) -> None:
    model = on_meta()
    checkpoint.load(model, native, CPU, torch.bfloat16)
    with torch.no_grad():
        model.blocks()[1].mlp.gate_up.weight[: CONFIG.text.intermediate_size] += 1
    checkpoint.save(model, tmp_path, source=native / "model.safetensors")
    before, after = tensors_of(native), tensors_of(tmp_path)
    changed = [name for name, tensor in before.items() if not torch.equal(after[name], tensor)]
    assert changed == ["model.language_model.layers.1.mlp.gate_proj.weight"]


def test_written_configurations_read_back_as_the_same_architecture(native: Path) -> None:
    official = json.loads((native / "config.json").read_text())
    special = {field: getattr(CONFIG.special, field) for field in type(CONFIG.special).__dataclass_fields__}
    assert JanusConfig.from_official(official | {"special": special}) == CONFIG
    assert official["tie_word_embeddings"] is official["text_config"]["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("lm_head.weight"), r"1 missing \(lm_head\.weight\)"),
        (lambda t: t.update(extra=torch.zeros(1)), r"1 unexpected \(extra\)"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(3, 3)}), "another variant of this family"),
        (lambda t: (t.clear(), t.update(other=torch.zeros(1))), "weights of another family"),
    ],
)
def test_tensors_that_do_not_fit_are_listed(
    native: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    tensors = tensors_of(native)
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(on_meta(), tmp_path, CPU)


def test_another_variant_is_recognised_by_its_configuration(native: Path, original: Path) -> None:
    full_size = on_meta(VARIANTS["pro-1b"].config)
    with pytest.raises(CheckpointError, match=r"text_config\.\w+ is \d+, but the chosen variant has"):
        checkpoint.load(full_size, native, CPU)
    with pytest.raises(CheckpointError, match=r"language_config\.\w+ is \d+, but the chosen variant has"):
        checkpoint.load(full_size, original, CPU)


@pytest.mark.parametrize(
    ("content", "message"), [("[]", "expected a JSON object"), ("{", "not a readable JSON")]
)
def test_a_broken_configuration_is_refused(native: Path, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "model.safetensors").write_bytes((native / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(on_meta(), tmp_path, CPU)


def test_the_codebooks_norms_and_the_agreement_of_both_rules_are_noted() -> None:
    torch.manual_seed(0)
    model = JanusModel(CONFIG)
    with torch.no_grad():
        weight = model.vq.codebook.weight
        weight.copy_(2 * weight / weight.norm(dim=1, keepdim=True))
    (note,) = examine(model, VARIANTS["tiny"])
    assert note.startswith("codebook: 128 rows of norm 2 to 2;")
    assert note.endswith("on 100.0% of a photograph's codes")
    with torch.no_grad():
        weight[::2] *= 3
    (note,) = examine(model, VARIANTS["tiny"])
    assert "norm 2 to 6;" in note and "100.0%" not in note


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_codebook_that_means_nothing_is_refused(value: float) -> None:
    model = JanusModel(CONFIG)
    with torch.no_grad():
        model.vq.codebook.weight[5] = value
    with pytest.raises(CheckpointError, match="rows that are zero or not finite; copy the weights again"):
        examine(model, VARIANTS["tiny"])
