"""Packs: what is read, what is refused, and the one rule of tolerance."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from reca.commands import verify as command
from reca.errors import CheckpointError, ConfigError
from reca.models.family import Pack, Reproduction
from reca.models.parity import PackResult, compare, read_pack


def pack_of(expected: dict[str, Tensor], **description: Any) -> Pack:
    return Pack(Path("pack"), {"model": "toy", "rtol": 1e-2, "atol": 1e-3, **description}, {}, expected)


def result_of(name: str, expected: Tensor, got: Tensor, **description: Any) -> PackResult:
    return compare(pack_of({name: expected}, **description), Reproduction({name: got}))


def write_pack(folder: Path, **description: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "pack.json").write_text(json.dumps({"model": "toy", "rtol": 0.0, "atol": 0.0, **description}))
    save_file({"x": torch.ones(2)}, folder / "inputs.safetensors")
    save_file({"y": torch.ones(2)}, folder / "expected.safetensors")
    return folder


def test_the_tolerance_is_absolute_plus_relative_to_the_largest_expected_entry() -> None:
    expected = torch.tensor([0.0, -4.0])
    allowed = 1e-3 + 1e-2 * 4
    assert result_of("hidden", expected, expected + torch.tensor([0.99 * allowed, 0.0])).passed
    result = result_of("hidden", expected, expected + torch.tensor([1.01 * allowed, 0.0]))
    assert not result.passed
    assert result.worst is not None
    assert result.worst.tolerance == pytest.approx(allowed)
    assert result.worst.error == pytest.approx(1.01 * allowed, rel=1e-5)


def test_gradients_use_their_own_tolerance_where_the_pack_states_one() -> None:
    gradient = torch.tensor([1.0])
    assert result_of("grad.weight", gradient, gradient + 5e-3).passed
    assert not result_of("grad.weight", gradient, gradient + 5e-3, grad_rtol=1e-4, grad_atol=1e-6).passed
    assert result_of("hidden", gradient, gradient + 5e-3, grad_rtol=1e-4, grad_atol=1e-6).passed


def test_integers_must_be_equal() -> None:
    ids = torch.tensor([1, 2**53 + 1])
    assert result_of("ids", ids, ids.clone()).passed
    assert not result_of("ids", ids, torch.tensor([1, 2**53])).passed
    assert not result_of("ids", ids[:1], ids[:1].double()).passed


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_never_pass(bad: float) -> None:
    pack = pack_of({"first": torch.zeros(2), "hidden": torch.zeros(2)})
    result = compare(pack, Reproduction({"first": torch.ones(2), "hidden": torch.tensor([0.0, bad])}))
    assert not result.passed
    assert result.worst is not None
    assert result.worst.name == "hidden"
    assert json.loads(json.dumps(command.records([result]), allow_nan=False))[0]["worst"]["error"] is None


def test_a_wrong_shape_fails_even_if_it_broadcasts() -> None:
    assert not result_of("hidden", torch.zeros(2, 1), torch.zeros(1, 2)).passed


def test_ignored_slices_are_left_out_and_nothing_else() -> None:
    expected, ignore = torch.zeros(6), {"hidden": [2, 4]}
    assert result_of("hidden", expected, torch.tensor([0.0, 0, 9, 9, 0, 0]), ignore_slices=ignore).passed
    assert not result_of("hidden", expected, torch.tensor([0.0, 0, 9, 9, 9, 0]), ignore_slices=ignore).passed


def test_a_tensor_that_is_absent_without_a_reason_fails() -> None:
    pack = pack_of({"hidden": torch.zeros(1)})
    assert not compare(pack, Reproduction({})).passed
    result = compare(pack, Reproduction({}, {"hidden": "never formed"}))
    assert result.passed
    assert result.not_formed == {"hidden": "never formed"}


@pytest.mark.parametrize(
    "name",
    [
        "loss", "shift3.loss", "loss_recon", "lm_loss", "grad.layers.0.weight", "shift3.grad.x", "grad_z",
        "dgrad.prompt_embeds", "velocity", "run.v", "run.step0.v_img", "run.latent", "connector",
        "und_embeddings", "pred", "latents.step2",
    ],
)  # fmt: skip
def test_losses_understanding_predictions_and_gradients_may_not_be_left_out(name: str) -> None:
    result = compare(pack_of({name: torch.zeros(1)}), Reproduction({}, {name: "too much work"}))
    assert not result.passed
    assert "must be compared" in result.failures[0]


def test_a_pack_is_read_from_any_folder(tmp_path: Path) -> None:
    pack = read_pack(write_pack(tmp_path / "whatever name", kind="train"))
    assert (pack.kind, pack.inputs["x"].tolist(), pack.expected["y"].tolist()) == (
        "train",
        [1.0, 1.0],
        [1.0, 1.0],
    )


def test_a_folder_without_description_is_not_a_pack(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no pack"):
        read_pack(tmp_path)


def test_a_broken_description_is_refused(tmp_path: Path) -> None:
    folder = write_pack(tmp_path / "pack")
    (folder / "pack.json").write_text("{")
    with pytest.raises(ConfigError, match="expected a JSON object"):
        read_pack(folder)
    (folder / "pack.json").write_text('{"rtol": 1, "atol": 1}')
    with pytest.raises(ConfigError, match="'model'"):
        read_pack(folder)
    (folder / "pack.json").write_text('{"model": "toy", "rtol": "1e-4", "atol": 1}')
    with pytest.raises(ConfigError, match="number under 'rtol'"):
        read_pack(folder)


@pytest.mark.parametrize("name", ["inputs.safetensors", "expected.safetensors"])
def test_a_missing_or_cut_tensor_file_is_named(tmp_path: Path, name: str) -> None:
    folder = write_pack(tmp_path / "pack")
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:-3])
    with pytest.raises(CheckpointError, match=f"{name} is not a usable"):
        read_pack(folder)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        read_pack(folder)


@pytest.mark.parametrize("key", ["files", "weights"])
def test_weights_named_relative_to_the_pack_must_exist(tmp_path: Path, key: str) -> None:
    names = {"../tokenizer/weights.safetensors": "tokenizer"}
    folder = write_pack(tmp_path / "pack", **{key: names})
    with pytest.raises(CheckpointError, match=r"\.\./tokenizer/weights\.safetensors"):
        read_pack(folder)
    write_pack(tmp_path / "tokenizer")
    save_file({"w": torch.ones(1)}, tmp_path / "tokenizer" / "weights.safetensors")
    assert read_pack(folder).expected


def test_an_empty_pack_proves_nothing_and_is_refused(tmp_path: Path) -> None:
    folder = write_pack(tmp_path / "pack")
    save_file({}, folder / "expected.safetensors")
    with pytest.raises(CheckpointError, match="found none"):
        read_pack(folder)


def test_a_folder_of_packs_stands_for_all_of_them_once(tmp_path: Path) -> None:
    first, second = write_pack(tmp_path / "a" / "b"), write_pack(tmp_path / "c")
    assert command.find_packs([second, tmp_path]) == [second, first]
    with pytest.raises(ConfigError, match="neither a parity pack nor a folder of packs"):
        command.find_packs([tmp_path / "nowhere"])


def test_an_unknown_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown model family 'toy'"):
        command.verify([write_pack(tmp_path / "pack")])


def test_the_report_has_one_line_per_pack_and_closes_with_the_count() -> None:
    good = result_of("hidden", torch.zeros(2), torch.zeros(2))
    bad = compare(pack_of({f"t{i}": torch.zeros(1) for i in range(7)}), Reproduction({}))
    lines = command.render([good, bad]).splitlines()
    assert lines[0].startswith("passed  pack  worst hidden")
    assert lines[1].startswith("FAILED  pack  nothing compared")
    assert lines[-2].strip() == "and 2 more"
    assert lines[-1] == "1 passed, 1 failed"
    assert command.records([bad])[0]["worst"] is None
