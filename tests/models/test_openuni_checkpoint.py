"""OpenUni's releases in and out: every name at full size, bits and dtypes, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reca.errors import CheckpointError
from reca.models.checkpoint import load_slots, named_tensors, official_shapes, save_slots
from reca.models.openuni import checkpoint, slots
from reca.models.openuni.config import VARIANTS, OpenUniConfig
from reca.models.openuni.model import OpenUniModel

DATA = Path(__file__).resolve().parents[1] / "data"
PACK = DATA / "parity" / "openuni" / "generate_recon"
KEYS: Mapping[str, Any] = json.loads((DATA / "openuni_keys.json").read_text())
CPU = torch.device("cpu")
CONFIG: OpenUniConfig = VARIANTS["tiny"].config
VAE, SHARD = "dc-ae-f32c32", "diffusion_pytorch_model.safetensors"


def on_meta(config: OpenUniConfig = CONFIG) -> OpenUniModel:
    with torch.device("meta"):
        return OpenUniModel(config)


def listed(folded: Mapping[str, tuple[list[int], int]]) -> dict[str, tuple[int, ...]]:
    return {
        name.replace("*", str(i)): tuple(shape)
        for name, (shape, count) in folded.items()
        for i in range(count)
    }


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders as they are published: fp16 .pth, bf16 language model, fp32 autoencoder."""
    torch.manual_seed(0)
    folder, model = tmp_path_factory.mktemp("release"), OpenUniModel(CONFIG)
    checkpoint.save(model, folder, dtype=torch.float16)
    (folder / checkpoint.WEIGHTS).rename(folder / "openuni_tiny.pth")
    (folder / checkpoint.AUTOENCODER).rename(folder / VAE)
    (folder / checkpoint.LANGUAGE_MODEL).rename(folder / "InternVL3-tiny")
    places = slots.internvl_slots(CONFIG)
    save_slots(model, places, folder / "InternVL3-tiny" / "model.safetensors", dtypes=torch.bfloat16)
    (folder / "InternVL3-tiny" / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def copied(release: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(release, tmp_path / "copy"))


@pytest.fixture
def pretrained(copied: Path) -> Path:
    """A release of the stage that trained without SANA, whose weights lie in their own repository."""
    tensors = torch.load(copied / "openuni_tiny.pth", weights_only=True)
    sana = {name: tensors.pop(name) for name in [*tensors] if name.startswith("transformer.")}
    torch.save({"state_dict": tensors}, copied / "openuni_tiny.pth")
    folder = copied / "Sana_tiny_diffusers" / "transformer"
    folder.mkdir(parents=True)
    save_file({name.removeprefix("transformer."): t.float() for name, t in sana.items()}, folder / SHARD)
    return copied


def loaded(path: Path) -> OpenUniModel:
    model = on_meta()
    checkpoint.load(model, path, CPU, torch.bfloat16)
    return model


# Names


@pytest.mark.parametrize("variant", ["b-512", "l-512", "l-1024"])
def test_all_names_shapes_and_counts_are_those_of_the_release(variant: str) -> None:
    model, keys = on_meta(VARIANTS[variant].config), KEYS[variant]
    tensors, counts = named_tensors(model), keys["counts"]
    trained = slots.trained_slots(model)
    internvl, vae = slots.internvl_slots(model.config), slots.autoencoder_slots(model)
    assert official_shapes(trained, tensors) == listed(keys["params"])
    assert official_shapes(internvl, tensors) == listed(KEYS[keys["lmm_repo"]])
    assert official_shapes(vae, tensors) == listed(KEYS["vae"])
    assert {slot.parameter for slot in (*trained.values(), *internvl.values(), *vae.values())} == set(tensors)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    taught = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {slot.parameter for slot in trained.values()} == set(taught)
    assert sum(sizes.values()) == counts["total"]
    assert sum(sizes[name] for name in taught) == counts["trained_reca"]
    assert len(trained) == counts["trained_tensors_reca"]


def test_the_names_of_transformers_fill_the_same_places() -> None:
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    llm, vision = CONFIG.llm, CONFIG.vision
    config = InternVLConfig(
        vision_config={
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_hidden_layers": vision.num_hidden_layers,
            "num_attention_heads": vision.num_attention_heads,
            "image_size": [vision.image_size] * 2,
            "patch_size": [vision.patch_size] * 2,
            "attention_bias": True,
            "use_absolute_position_embeddings": True,
        },
        text_config={
            "model_type": "qwen2",
            "hidden_size": llm.hidden_size,
            "intermediate_size": llm.intermediate_size,
            "num_hidden_layers": llm.num_hidden_layers,
            "num_attention_heads": llm.num_attention_heads,
            "num_key_value_heads": llm.num_key_value_heads,
            "vocab_size": llm.vocab_size,
        },
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        native: nn.Module = InternVLForConditionalGeneration(config)
    model = on_meta()
    places = slots.native_internvl_slots(CONFIG)
    expected = {name: tuple(parameter.shape) for name, parameter in native.named_parameters()}
    assert official_shapes(places, named_tensors(model)) == expected
    original = slots.internvl_slots(CONFIG)
    assert {slot.parameter for slot in places.values()} == {slot.parameter for slot in original.values()}


@pytest.mark.parametrize("is_older", [False, True])
def test_a_language_model_saved_by_transformers_loads_to_the_same_bits(copied: Path, is_older: bool) -> None:
    model, folder = loaded(copied), copied / "InternVL3-tiny"
    save_slots(model, slots.native_internvl_slots(CONFIG), folder / "model.safetensors")
    tensors = load_file(folder / "model.safetensors")
    if is_older:
        moves = {"model.language_model.": "language_model.model.", "model.vision_tower.": "vision_tower."}
        moves |= {
            "model.multi_modal_projector.": "multi_modal_projector.",
            "lm_head": "language_model.lm_head",
        }
        for new, old in moves.items():
            tensors = {
                old + name.removeprefix(new) if name.startswith(new) else name: tensor
                for name, tensor in tensors.items()
            }
        save_file(tensors, folder / "model.safetensors")
    config = {"model_type": "internvl", "text_config": {"num_attention_heads": 4}}
    (folder / "config.json").write_text(json.dumps(config | {"vision_config": {"image_size": [56, 56]}}))
    assert same(model, loaded(copied)) == []
    (folder / "config.json").write_text(json.dumps(config | {"vision_config": {"image_size": [28, 28]}}))
    with pytest.raises(CheckpointError, match=r"image_size is \[28, 28\], but the chosen variant has"):
        loaded(copied)


def same(model: OpenUniModel, other: OpenUniModel) -> list[str]:
    """Names of tensors that differ."""
    others: Mapping[str, Tensor] = named_tensors(other)
    return [name for name, tensor in named_tensors(model).items() if not torch.equal(tensor, others[name])]


# Bits


@pytest.mark.parity
def test_an_official_file_comes_back_bit_for_bit(tmp_path: Path) -> None:
    config = OpenUniConfig.from_official(json.loads((PACK / "pack.json").read_text())["config"])
    model = on_meta(config)
    places = slots.internvl_slots(config, "lmm.") | slots.trained_slots(model)
    places |= slots.autoencoder_slots(model, "vae.")
    load_slots(model, places, PACK / "weights.safetensors", device=CPU)
    save_slots(model, places, tmp_path / "weights.safetensors")
    official, written = load_file(PACK / "weights.safetensors"), load_file(tmp_path / "weights.safetensors")
    assert written.keys() == official.keys()
    assert [name for name, tensor in official.items() if not torch.equal(written[name], tensor)] == []


def test_a_release_comes_back_bit_for_bit_though_it_was_trained_in_fp32(
    release: Path, tmp_path: Path
) -> None:
    model = loaded(release)
    dtypes = {name: tensor.dtype for name, tensor in named_tensors(model).items()}
    assert dtypes["meta_queries"] == dtypes["sana.proj_out.weight"] == torch.float32
    assert dtypes["layers.0.qkv.weight"] == dtypes["vision.class_embedding"] == torch.bfloat16
    checkpoint.save(model, tmp_path / "out", source=release)
    for path in (path for path in release.rglob("*") if path.is_file() and path.suffix != ".pth"):
        assert (tmp_path / "out" / path.relative_to(release)).read_bytes() == path.read_bytes(), path.name
    before = torch.load(release / "openuni_tiny.pth", weights_only=True)
    after = torch.load(tmp_path / "out" / checkpoint.WEIGHTS, weights_only=True)
    assert before.keys() == after.keys()
    assert {tensor.dtype for tensor in after.values()} == {torch.float16}
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert same(loaded(tmp_path / "out"), model) == []


def test_a_trained_change_reaches_the_file_and_nothing_else_does(release: Path, tmp_path: Path) -> None:
    model = loaded(release)
    with torch.no_grad():
        width = CONFIG.connector.hidden_size
        model.connector.layers[1].qkv.weight[width : 2 * width] += 1  # type: ignore[index, operator]
    checkpoint.save(model, tmp_path, source=release / "openuni_tiny.pth")
    before = torch.load(release / "openuni_tiny.pth", weights_only=True)
    after = torch.load(tmp_path / checkpoint.WEIGHTS, weights_only=True)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["connector.layers.1.self_attn.k_proj.weight"]


def test_a_pretrained_release_takes_sana_from_its_repository_and_is_saved_with_it(
    pretrained: Path, release: Path, tmp_path: Path
) -> None:
    model = loaded(pretrained)
    assert same(model, loaded(release)) == []
    checkpoint.save(model, tmp_path / "out", source=pretrained)
    written = torch.load(tmp_path / "out" / checkpoint.WEIGHTS, weights_only=True)
    assert written.keys() == slots.trained_slots(model).keys()
    assert {tensor.dtype for tensor in written.values()} == {torch.float16}
    assert same(loaded(tmp_path / "out"), model) == []


# What is refused


def test_missing_parts_are_named(pretrained: Path) -> None:
    shutil.rmtree(pretrained / "Sana_tiny_diffusers")
    with pytest.raises(CheckpointError, match=r"openuni_tiny\.pth comes without SANA; put the folders of"):
        loaded(pretrained)


@pytest.mark.parametrize("part, name", [("InternVL3-tiny", "language model"), (VAE, "autoencoder")])
def test_missing_frozen_parts_are_named(copied: Path, part: str, name: str) -> None:
    shutil.rmtree(copied / part)
    with pytest.raises(CheckpointError, match=f"the {name} is in no .pth"):
        loaded(copied)


def test_none_and_several_of_a_kind_are_refused(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"expected one \.pth of an OpenUni, found none"):
        loaded(tmp_path / "empty")
    (copied / "other.pth").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"found openuni_tiny\.pth, other\.pth"):
        loaded(copied)
    (copied / "InternVL3-2B").mkdir()
    with pytest.raises(CheckpointError, match="InternVL3-2B, InternVL3-tiny all hold one part"):
        loaded(copied / "openuni_tiny.pth")


def test_missing_unexpected_and_misshapen_tensors_are_listed(copied: Path) -> None:
    path = copied / "openuni_tiny.pth"
    tensors = torch.load(path, weights_only=True)
    bias = tensors.pop("projector.bias")
    torch.save(tensors, path)
    with pytest.raises(CheckpointError, match=r"1 missing \(projector\.bias\)"):
        loaded(copied)
    torch.save(tensors | {"projector.bias": bias, "module.extra": bias}, path)
    with pytest.raises(CheckpointError, match=r"1 unexpected \(module\.extra\)"):
        loaded(copied)
    torch.save(tensors | {"projector.bias": bias[1:]}, path)
    with pytest.raises(CheckpointError, match=r"projector\.bias: expected \[40\], got \[39\]"):
        loaded(copied)


def test_a_file_that_would_run_code_is_refused(copied: Path) -> None:
    torch.save({"meta_queries": Path("x")}, copied / "openuni_tiny.pth")
    with pytest.raises(CheckpointError, match="not a readable file of tensors"):
        loaded(copied)


def test_another_variant_is_recognised_with_and_without_its_configuration(
    release: Path, copied: Path
) -> None:
    full_size = on_meta(VARIANTS["b-512"].config)
    with pytest.raises(CheckpointError, match="hidden_size is 48, but the chosen variant has 896"):
        checkpoint.load(full_size, release, CPU)
    for path in copied.rglob("config.json"):
        path.unlink()
    with pytest.raises(CheckpointError, match="variant that the file belongs to"):
        checkpoint.load(full_size, copied, CPU)


def test_a_configuration_that_shapes_cannot_show_is_compared(copied: Path) -> None:
    path = copied / "InternVL3-tiny" / "config.json"
    stated = json.loads(path.read_text())
    stated["llm_config"]["num_attention_heads"] = 8
    path.write_text(json.dumps(stated))
    with pytest.raises(CheckpointError, match="num_attention_heads is 8, but the chosen variant has 4"):
        loaded(copied)
    del stated["llm_config"]["num_attention_heads"]
    path.write_text(json.dumps(stated))
    loaded(copied)
    path.write_text("[]")
    with pytest.raises(CheckpointError, match="expected a JSON object"):
        loaded(copied)
    path.write_text("{")
    with pytest.raises(CheckpointError, match="not a readable JSON file"):
        loaded(copied)


def test_an_architecture_that_cannot_be_honoured_is_refused() -> None:
    official = json.loads((PACK / "pack.json").read_text())["config"]
    with pytest.raises(CheckpointError, match="proj_type='proj_enc' is not supported"):
        OpenUniConfig.from_official(official | {"proj_type": "proj_enc"})
    with pytest.raises(CheckpointError, match="key 'lmm' is missing"):
        OpenUniConfig.from_official({})
    tied = official["lmm"]["llm_config"] | {"tie_word_embeddings": True}
    with pytest.raises(CheckpointError, match="tie_word_embeddings=True is not supported"):
        OpenUniConfig.from_official(official | {"lmm": official["lmm"] | {"llm_config": tied}})
