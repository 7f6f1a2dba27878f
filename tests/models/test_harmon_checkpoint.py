"""Harmon's release in and out: every name at full size, bits and dtypes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from reca.errors import CheckpointError
from reca.models.checkpoint import load_slots, named_tensors, official_shapes, save_slots
from reca.models.harmon import checkpoint
from reca.models.harmon.config import VARIANTS, HarmonConfig
from reca.models.harmon.model import HarmonModel

DATA = Path(__file__).resolve().parents[1] / "data"
PACK = DATA / "parity" / "harmon" / "tiny_huge"
KEYS = json.loads((DATA / "harmon_keys.json").read_text())
CPU = torch.device("cpu")
CONFIG: HarmonConfig = VARIANTS["tiny"].config
MAIN = "harmon_tiny.pth"


def on_meta(config: HarmonConfig = CONFIG) -> HarmonModel:
    with torch.device("meta"):
        return HarmonModel(config)


def listed(part: str) -> dict[str, tuple[int, ...]]:
    return {
        name.replace("*", str(index)): tuple(shape)
        for name, (shape, count) in KEYS[part].items()
        for index in range(count)
    }


def read(path: Path) -> dict[str, Tensor]:
    content = torch.load(path, weights_only=True)
    return content.get("model", content)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An official folder in the conversion's dtype: fp16, with an fp32 autoencoder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("release")
    checkpoint.save(HarmonModel(CONFIG), folder, dtype=torch.float16)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def copy_of(release: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in release.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("name", ["0.5b", "1.5b"])
def test_all_names_shapes_and_counts_are_those_of_the_release(name: str) -> None:
    model, part = on_meta(VARIANTS[name].config), f"harmon_{name.replace('.', '_')}"
    tensors = named_tensors(model)
    slots = checkpoint.harmon_slots(model.config)
    assert official_shapes(slots, tensors) == listed(part)
    autoencoder = checkpoint.autoencoder_slots(model.config)
    assert official_shapes(autoencoder, tensors) == listed("kl16")
    placed = {slot.parameter for slot in (slots | autoencoder).values()}
    assert placed == set(tensors) - {"schedule_table"}
    counts = KEYS[f"{part}_counts"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == counts["trained_under_reca"]
    assert sum(p.numel() for p in model.parameters()) == counts["total_with_vae"]


@pytest.mark.parity
@pytest.mark.parametrize("name", ["weights.safetensors", MAIN])
def test_official_tensors_come_back_bit_for_bit_in_either_format(tmp_path: Path, name: str) -> None:
    config = HarmonConfig.from_official(json.loads((PACK / "pack.json").read_text())["config"])
    model, slots = on_meta(config), checkpoint.harmon_slots(config)
    load_slots(model, slots, PACK / "weights.safetensors", device=CPU)
    save_slots(model, slots, tmp_path / name)
    official = load_file(PACK / "weights.safetensors")
    written = load_file(tmp_path / name) if name.endswith("safetensors") else read(tmp_path / name)
    assert written.keys() == official.keys()
    assert [name for name, tensor in official.items() if not torch.equal(written[name], tensor)] == []


def test_a_release_comes_back_bit_for_bit_though_it_was_trained_in_fp32(
    release: Path, tmp_path: Path
) -> None:
    model = on_meta()
    checkpoint.load(model, release, CPU, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(tensor.is_meta for tensor in named_tensors(model).values())
    checkpoint.save(model, tmp_path / "out", source=release)
    for name in (MAIN, checkpoint.AUTOENCODER):
        before, after = read(release / name), read(tmp_path / "out" / name)
        assert before.keys() == after.keys()
        assert all(after[key].dtype == tensor.dtype for key, tensor in before.items())
        assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


def test_a_trained_change_reaches_the_file_under_its_own_name(release: Path, tmp_path: Path) -> None:
    model = on_meta()
    checkpoint.load(model, release, CPU)
    with torch.no_grad():
        model.decoder_layers()[1].mlp.gate_up.weight[: CONFIG.llm.intermediate_size] += 1
        model.embed_tokens.weight[3] += 1
    checkpoint.save(model, tmp_path, source=release / MAIN)
    before, after = read(release / MAIN), read(tmp_path / MAIN)
    changed = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    assert changed == {
        "llm.model.layers.1.mlp.gate_proj.weight",
        "llm.model.embed_tokens.weight",
        "llm.lm_head.weight",
    }


def test_the_tied_output_layer_may_be_missing(release: Path, tmp_path: Path) -> None:
    folder = copy_of(release, tmp_path / "copy")
    tensors = read(folder / MAIN)
    del tensors["llm.lm_head.weight"]
    torch.save(tensors, folder / MAIN)
    model = on_meta()
    checkpoint.load(model, folder, CPU)
    assert torch.equal(model.embed_tokens.weight, tensors["llm.model.embed_tokens.weight"].float())


def test_the_hugging_face_form_holds_the_autoencoder_in_the_same_files(release: Path, tmp_path: Path) -> None:
    tensors = read(release / MAIN)
    tensors.pop("llm.lm_head.weight")
    tensors |= {f"vae.{name}": tensor for name, tensor in read(release / checkpoint.AUTOENCODER).items()}
    names = sorted(tensors)
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :])):
        shard = {name: tensors[name].contiguous() for name in part}
        save_file(shard, tmp_path / f"model-{number}.safetensors")
    models = [on_meta(), on_meta()]
    for model, folder in zip(models, (release, tmp_path), strict=True):
        checkpoint.load(model, folder, CPU)
    first, second = (named_tensors(model) for model in models)
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())


def test_what_else_the_autoencoders_file_holds_is_left_out(release: Path, tmp_path: Path) -> None:
    folder = copy_of(release, tmp_path / "copy")
    tensors = read(folder / checkpoint.AUTOENCODER)
    extra = {"model": tensors | {"loss.discriminator.weight": torch.zeros(3)}, "epoch": 7}
    torch.save(extra, folder / checkpoint.AUTOENCODER)
    checkpoint.load(on_meta(), folder, CPU)
    del tensors["quant_conv.bias"]
    torch.save({"model": tensors}, folder / checkpoint.AUTOENCODER)
    with pytest.raises(CheckpointError, match=r"1 missing \(quant_conv\.bias\)"):
        checkpoint.load(on_meta(), folder, CPU)


def test_missing_and_ambiguous_files_are_named(release: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected harmon_\*\.pth or \*\.safetensors"):
        checkpoint.load(on_meta(), tmp_path, CPU)
    folder = copy_of(release, tmp_path / "copy")
    (folder / checkpoint.AUTOENCODER).unlink()
    with pytest.raises(CheckpointError, match=r"kl16\.ckpt is missing; copy it from"):
        checkpoint.load(on_meta(), folder, CPU)
    (folder / "harmon_other.pth").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"several releases \(harmon_other\.pth, harmon_tiny\.pth\)"):
        checkpoint.load(on_meta(), folder, CPU)


def test_weights_of_another_variant_family_or_completeness_are_refused(release: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="another variant"):
        checkpoint.load(on_meta(VARIANTS["0.5b"].config), release, CPU)
    folder = copy_of(release, tmp_path / "copy")
    tensors = read(folder / MAIN)
    torch.save({"image_encoder.weight": torch.zeros(3)}, folder / MAIN)
    with pytest.raises(CheckpointError, match="another family"):
        checkpoint.load(on_meta(), folder, CPU)
    del tensors["mar.fake_latent"]
    torch.save(tensors, folder / MAIN)
    with pytest.raises(CheckpointError, match=r"1 missing \(mar\.fake_latent\)"):
        checkpoint.load(on_meta(), folder, CPU)
    torch.save(tensors | {"mar.fake_latent": torch.zeros(2, 48)}, folder / MAIN)
    with pytest.raises(CheckpointError, match=r"mar\.fake_latent: expected \[1, 48\], got \[2, 48\]"):
        checkpoint.load(on_meta(), folder, CPU)


class Harmful:
    """What a pickle that runs code looks like."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("executed",)


def test_a_file_that_would_run_code_is_refused(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of(release, tmp_path / "copy")
    torch.save({"llm.model.norm.weight": Harmful()}, folder / MAIN)
    with pytest.raises(CheckpointError, match="not a readable file of tensors"):
        checkpoint.load(on_meta(), folder, CPU)
    assert "executed" not in capsys.readouterr().out
