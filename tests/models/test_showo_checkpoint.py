"""Show-o's releases in and out: every name at full size, bits and dtypes, and what is refused."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reca.errors import CheckpointError
from reca.models.checkpoint import load_slots, named_tensors, official_shapes, save_slots
from reca.models.parity import read_pack
from reca.models.showo import checkpoint
from reca.models.showo.config import VARIANTS, ShowoConfig
from reca.models.showo.model import ShowoModel
from reca.models.showo.parity_training import pack_config

DATA = Path(__file__).resolve().parents[1] / "data"
PACK = DATA / "parity" / "showo" / "tiny_clip"
KEYS = json.loads((DATA / "showo_keys.json").read_text())
CPU = torch.device("cpu")
CONFIG: ShowoConfig = VARIANTS["tiny-clip"].config


def on_meta(config: ShowoConfig = CONFIG) -> ShowoModel:
    with torch.device("meta"):
        return ShowoModel(config)


def listed(name: str) -> dict[str, tuple[int, ...]]:
    return {
        key.replace("*", str(index)): tuple(shape)
        for key, (shape, count) in KEYS[name]["tensors"].items()
        for index in range(count)
    }


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Official folders: Show-o, the image tokenizer inside it, CLIP beside it, both halves."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("releases")
    model, folder = ShowoModel(CONFIG), root / "show-o"
    checkpoint.save(model, folder)
    shutil.rmtree(folder / checkpoint.CLIP)
    clip = root / checkpoint.CLIP
    clip.mkdir()
    slots = checkpoint.clip_slots(model)
    tensors = {name: slot.official(named_tensors(model)[slot.parameter]) for name, slot in slots.items()}
    torch.save({**tensors, "text_model.final_layer_norm.bias": torch.ones(3)}, clip / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize(
    ("variant", "name"),
    [
        ("clip-256", "show-o-w-clip-vit"),
        ("clip-512", "show-o-w-clip-vit"),
        ("vq-256", "show-o"),
        ("vq-512", "show-o"),
        ("vq-512-blur", "show-o"),
    ],
)
def test_all_names_shapes_and_counts_are_those_of_the_release(variant: str, name: str) -> None:
    model = on_meta(VARIANTS[variant].config)
    tensors, parts = named_tensors(model), [checkpoint.showo_slots(model.config)]
    assert official_shapes(parts[0], tensors) == listed(name)
    parts.append(checkpoint.magvit_slots(model))
    assert official_shapes(parts[1], tensors) == listed("magvitv2")
    assert sum(p.numel() for p in model.magvit.parameters()) == KEYS["magvitv2"]["total_params"]
    if model.vision is not None:
        parts.append(checkpoint.clip_slots(model))
        assert official_shapes(parts[2], tensors) == listed("clip-vit-large-patch14-336")
    placed = {slot.parameter for slots in parts for slot in slots.values()}
    assert placed | {"vision.tower.embeddings.position_ids"} >= set(tensors)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == KEYS[name]["trained_params"]


@pytest.mark.parity
@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_an_official_file_comes_back_bit_for_bit_in_either_format(tmp_path: Path, suffix: str) -> None:
    config = pack_config(read_pack(PACK))
    model, slots = on_meta(config), checkpoint.showo_slots(config)
    load_slots(model, slots, PACK / "weights.safetensors", device=CPU)
    path = tmp_path / f"pytorch_model.{suffix}"
    save_slots(model, slots, path)
    official = load_file(PACK / "weights.safetensors")
    written = load_file(path) if suffix == "safetensors" else torch.load(path, weights_only=True)
    assert written.keys() == official.keys()
    assert [name for name, tensor in official.items() if not torch.equal(written[name], tensor)] == []


def test_a_release_comes_back_bit_for_bit_and_its_frozen_parts_are_found(
    release: Path, tmp_path: Path
) -> None:
    model = on_meta()
    checkpoint.load(model, release, CPU, torch.bfloat16)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert dtypes["layers.0.qkv.weight"] == dtypes["magvit.encoder.conv_in.weight"] == torch.float32
    assert dtypes["vision.tower.pre_layrnorm.weight"] == torch.bfloat16
    assert not any(tensor.is_meta for tensor in named_tensors(model).values())
    (release / "vocab.json").write_text("{}")
    checkpoint.save(model, tmp_path, source=release)
    for name in ("pytorch_model.bin", "config.json", "magvitv2/pytorch_model.bin"):
        assert (tmp_path / name).read_bytes() == (release / name).read_bytes()
    clip = f"{checkpoint.CLIP}/pytorch_model.bin"
    assert (tmp_path / clip).read_bytes() == (release.parent / clip).read_bytes()
    assert (tmp_path / "phi-1_5" / "vocab.json").read_text() == "{}"


@pytest.mark.parametrize("variant", ["tiny-clip", "tiny-vq"])
def test_what_was_written_without_a_source_can_be_loaded_alone(variant: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model, copy = ShowoModel(VARIANTS[variant].config), on_meta(VARIANTS[variant].config)
    checkpoint.save(model, tmp_path)
    checkpoint.load(copy, tmp_path, CPU, torch.float32)
    written, loaded = named_tensors(model), named_tensors(copy)
    assert [name for name, tensor in written.items() if not torch.equal(loaded[name], tensor)] == []


def test_a_trained_change_reaches_the_file_and_nothing_else_does(release: Path, tmp_path: Path) -> None:
    model = on_meta()
    checkpoint.load(model, release, CPU)
    with torch.no_grad():
        model.blocks()[1].qkv.weight[CONFIG.phi.hidden_size : 2 * CONFIG.phi.hidden_size] += 1
    checkpoint.save(model, tmp_path, source=release)
    before, after = (torch.load(f / "pytorch_model.bin", weights_only=True) for f in (release, tmp_path))
    changed = [name for name, tensor in before.items() if not torch.equal(after[name], tensor)]
    assert changed == ["showo.model.layers.1.self_attn.k_proj.weight"]


def test_weights_of_the_other_kind_are_refused_by_their_configuration_and_by_their_names(
    release: Path,
) -> None:
    with pytest.raises(CheckpointError, match="w_clip_vit is True, but the chosen variant has False"):
        checkpoint.load(on_meta(VARIANTS["tiny-vq"].config), release, CPU)
    slots = checkpoint.showo_slots(VARIANTS["tiny-vq"].config)
    with pytest.raises(CheckpointError, match=r"4 unexpected.*mm_projector"):
        load_slots(on_meta(VARIANTS["tiny-vq"].config), slots, release / "pytorch_model.bin", device=CPU)


def test_a_missing_part_is_named_with_the_place_where_it_belongs(release: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected one of pytorch_model\.bin"):
        checkpoint.load(on_meta(), tmp_path, CPU)
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "pytorch_model.bin").write_bytes((release / "pytorch_model.bin").read_bytes())
    with pytest.raises(CheckpointError, match="copy the release magvitv2 there, or beside copy"):
        checkpoint.load(on_meta(), copy, CPU)


def test_a_missing_and_a_misshapen_tensor_are_named(release: Path, tmp_path: Path) -> None:
    content = torch.load(release / "pytorch_model.bin", weights_only=True)
    content["showo.lm_head.bias"] = content["showo.lm_head.bias"][1:].clone()
    del content["showo.model.final_layernorm.bias"]
    torch.save(content, tmp_path / "pytorch_model.bin")
    slots = checkpoint.showo_slots(CONFIG)
    with pytest.raises(
        CheckpointError, match=r"1 missing .*final_layernorm.bias.* 1 misshapen .*lm_head.bias"
    ):
        load_slots(on_meta(), slots, tmp_path / "pytorch_model.bin", device=CPU)


class Payload:
    """What a hostile file would run."""

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return print, ("run",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"showo.lm_head.bias": Payload()}, path)
    with pytest.raises(CheckpointError, match="not a readable file of tensors"):
        load_slots(on_meta(), checkpoint.showo_slots(CONFIG), path, device=CPU)
    path.write_bytes(pickle.dumps([1, 2], protocol=2))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        load_slots(on_meta(), checkpoint.showo_slots(CONFIG), path, device=CPU)
    assert "run" not in capsys.readouterr().out
