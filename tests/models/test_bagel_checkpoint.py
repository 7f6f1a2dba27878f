"""BAGEL's release in and out: every name at full size, bits and dtypes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from reca.errors import CheckpointError
from reca.models.bagel import checkpoint
from reca.models.bagel.config import VARIANTS, BagelConfig
from reca.models.bagel.model import BagelModel
from reca.models.checkpoint import load_slots, named_tensors, official_shapes, save_slots

DATA = Path(__file__).resolve().parents[1] / "data"
PACK = DATA / "parity" / "bagel" / "edit"
CPU = torch.device("cpu")
CONFIG: BagelConfig = VARIANTS["tiny"].config


def on_meta(config: BagelConfig = CONFIG) -> BagelModel:
    with torch.device("meta"):
        return BagelModel(config)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An official folder in the release's dtypes: bf16, with an fp32 autoencoder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("release")
    model = BagelModel(CONFIG)
    torch.nn.init.normal_(model.llm2vae.weight)
    checkpoint.save(model, folder, dtype=torch.bfloat16)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def copy_of(release: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in release.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_all_names_and_shapes_are_those_of_the_release() -> None:
    config = VARIANTS["7b-mot"].config
    tensors = named_tensors(on_meta(config))
    listed: dict[str, tuple[int, ...]] = {}
    for name, (shape, count) in json.loads((DATA / "bagel_keys.json").read_text())["ema.safetensors"].items():
        listed |= {name.replace("*", str(i)): tuple(shape) for i in range(count)}
    assert len(listed) == 1223
    slots = checkpoint.bagel_slots(config)
    assert official_shapes(slots, tensors) == listed
    placed = {slot.parameter for slot in (slots | checkpoint.autoencoder_slots(config)).values()}
    assert placed == set(tensors)


@pytest.mark.parity
def test_an_official_file_comes_back_bit_for_bit_with_both_position_tables(tmp_path: Path) -> None:
    config = BagelConfig.from_official(json.loads((PACK / "pack.json").read_text())["config"])
    model, slots = on_meta(config), checkpoint.bagel_slots(config)
    load_slots(model, slots, PACK / "weights.safetensors", device=CPU)
    save_slots(model, slots, tmp_path / "ema.safetensors")
    official, written = load_file(PACK / "weights.safetensors"), load_file(tmp_path / "ema.safetensors")
    assert written.keys() == official.keys()
    assert [name for name, tensor in official.items() if not torch.equal(written[name], tensor)] == []


def test_a_release_comes_back_bit_for_bit_though_it_was_trained_in_fp32(
    release: Path, tmp_path: Path
) -> None:
    model = on_meta()
    checkpoint.load(model, release, CPU, torch.bfloat16)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert (
        dtypes["layers.0.gen.qkv.weight"] == dtypes["vae.autoencoder.encoder.conv_in.weight"] == torch.float32
    )
    assert dtypes["layers.0.und.qkv.weight"] == torch.bfloat16
    assert not any(tensor.is_meta for tensor in named_tensors(model).values())
    checkpoint.save(model, tmp_path / "out", source=release)
    for path in release.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_trained_change_reaches_the_file_and_nothing_else_does(release: Path, tmp_path: Path) -> None:
    model = on_meta()
    checkpoint.load(model, release, CPU, torch.bfloat16)
    with torch.no_grad():
        model.blocks()[1].gen.mlp.gate_up.weight[: CONFIG.llm.intermediate_size] += 1
    checkpoint.save(model, tmp_path, source=release / "ema.safetensors")
    before, after = (load_file(folder / "ema.safetensors") for folder in (release, tmp_path))
    changed = [name for name, tensor in before.items() if not torch.equal(after[name], tensor)]
    assert changed == ["language_model.model.layers.1.mlp_moe_gen.gate_proj.weight"]


def test_the_position_tables_are_computed_afresh_but_must_be_in_the_file(
    release: Path, tmp_path: Path
) -> None:
    folder = copy_of(release, tmp_path / "copy")
    tensors = load_file(folder / "ema.safetensors")
    tensors["latent_pos_embed.pos_embed"].fill_(7)
    save_file(tensors, folder / "ema.safetensors")
    model = on_meta()
    checkpoint.load(model, folder, CPU)
    assert torch.equal(model.latent_positions, BagelModel(CONFIG).latent_positions)
    del tensors["vit_pos_embed.pos_embed"]
    save_file(tensors, folder / "ema.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing \(vit_pos_embed\.pos_embed\)"):
        checkpoint.load(on_meta(), folder, CPU)


def test_the_index_names_the_file_of_every_tensor_for_loaders_that_look_there_first(release: Path) -> None:
    index = json.loads((release / "model.safetensors.index.json").read_text())
    tensors = load_file(release / "ema.safetensors")
    assert index["weight_map"] == dict.fromkeys(tensors, "ema.safetensors")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("name", ["model.safetensors", "model_bf16.safetensors"])
def test_other_names_of_the_main_file_are_found(release: Path, tmp_path: Path, name: str) -> None:
    folder = copy_of(release, tmp_path / "copy")
    (folder / "ema.safetensors").rename(folder / name)
    assert checkpoint.find_weights(folder) == (folder / name, folder / "ae.safetensors")


def test_of_several_main_files_the_averaged_one_is_taken_unless_another_is_named(
    release: Path, tmp_path: Path
) -> None:
    folder = copy_of(release, tmp_path / "copy")
    (folder / "model.safetensors").write_bytes(b"")
    assert checkpoint.find_weights(folder)[0].name == "ema.safetensors"
    assert checkpoint.find_weights(folder / "model.safetensors")[0].name == "model.safetensors"


def test_missing_files_are_named(release: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected one of ema\.safetensors, model\.safetensors"):
        checkpoint.load(on_meta(), tmp_path, CPU)
    folder = copy_of(release, tmp_path / "copy")
    (folder / "ae.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"ae\.safetensors is missing; copy it from"):
        checkpoint.load(on_meta(), folder, CPU)


def test_another_variant_is_recognised_with_and_without_its_configuration(
    release: Path, tmp_path: Path
) -> None:
    full_size = on_meta(VARIANTS["7b-mot"].config)
    with pytest.raises(CheckpointError, match="hidden_size is 64, but the chosen variant has 3584"):
        checkpoint.load(full_size, release, CPU)
    folder = copy_of(release, tmp_path / "copy")
    for path in folder.glob("*_config.json"):
        path.unlink()
    with pytest.raises(CheckpointError, match="another variant"):
        checkpoint.load(full_size, folder, CPU)


def test_a_configuration_that_shapes_cannot_show_is_compared(release: Path, tmp_path: Path) -> None:
    folder = copy_of(release, tmp_path / "copy")
    path = folder / "llm_config.json"
    stated = json.loads(path.read_text())
    path.write_text(json.dumps(stated | {"num_attention_heads": 8}))
    with pytest.raises(CheckpointError, match="num_attention_heads is 8, but the chosen variant has 4"):
        checkpoint.load(on_meta(), folder, CPU)
    del stated["rms_norm_eps"]
    path.write_text(json.dumps(stated))
    checkpoint.load(on_meta(), folder, CPU)
    path.write_text("[]")
    with pytest.raises(CheckpointError, match="expected a JSON object"):
        checkpoint.load(on_meta(), folder, CPU)


def test_written_configurations_read_back_as_the_same_architecture(release: Path) -> None:
    official = json.loads((release / "config.json").read_text())
    special = {f: getattr(CONFIG.special, f) for f in CONFIG.special.__dataclass_fields__}
    back = BagelConfig.from_official(official | {"special_tokens": special})
    assert (back.llm, back.vision, back.vae, back.special) == (
        CONFIG.llm,
        CONFIG.vision,
        CONFIG.vae,
        CONFIG.special,
    )
    vit = json.loads((release / "vit_config.json").read_text())
    assert vit["num_hidden_layers"] == CONFIG.vision.num_layers + 1
