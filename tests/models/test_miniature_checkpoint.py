"""Weights of a miniature: what is written comes back, and what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from reca.errors import CheckpointError, ConfigError
from reca.models import get_family
from reca.models.family import Pack
from reca.models.miniature.checkpoint import DESCRIPTION, load, load_understanding, read_description, save
from reca.models.miniature.config import VARIANTS
from reca.models.miniature.model import MiniatureModel

CPU = torch.device("cpu")


def new(kind: str, seed: int) -> MiniatureModel:
    torch.manual_seed(seed)
    model = MiniatureModel(VARIANTS[kind].config)
    model.world = "1-test"
    return model


def test_both_kinds_share_a_folder_and_come_back_bit_for_bit(tmp_path: Path):
    models = {kind: new(kind, 1) for kind in VARIANTS}
    models["flow"].load_state_dict(
        {k: v for k, v in models["masked"].state_dict().items() if not k.startswith("generator.")},
        strict=False,
    )
    save(models["masked"], tmp_path, facts={"made": "first"})
    save(models["flow"], tmp_path, source=tmp_path, facts={"again": "second"})
    for kind, model in models.items():
        with torch.device("meta"):
            read = MiniatureModel(VARIANTS[kind].config)
        load(read, tmp_path, CPU, torch.float32)
        assert read.world == "1-test"
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, read.state_dict()[name]), name
        assert {n for n, p in read.named_parameters() if p.requires_grad} == {
            n for n, p in model.named_parameters() if p.requires_grad
        }
    assert read_description(tmp_path) == {
        "format": 1,
        "world": "1-test",
        "made": "first",
        "again": "second",
    }


def test_understanding_alone_leaves_the_generator_as_it_is(tmp_path: Path):
    save(new("masked", 1), tmp_path)
    model = new("flow", 2)
    before = {n: p.clone() for n, p in model.named_parameters()}
    load_understanding(model, tmp_path, CPU, torch.float32)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (
            name.startswith("generator.") or torch.equal(before[name], new("masked", 1).state_dict()[name])
        ), name


def test_a_folder_without_the_other_generator_says_what_is_missing(tmp_path: Path):
    save(new("masked", 1), tmp_path)
    with pytest.raises(CheckpointError, match=r"flow\.safetensors"):
        load(new("flow", 1), tmp_path, CPU)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "expected the description of a miniature's weights"),
        ("{", "expected the description"),
        ("[1]", "expected the description"),
        (json.dumps({"format": 1}), "expected the description"),
        (json.dumps({"format": 2, "world": "1"}), "format 2 is not 1, which this reca reads"),
    ],
)
def test_a_folder_without_a_readable_description_is_refused(tmp_path: Path, content, message):
    save(new("masked", 1), tmp_path)
    (tmp_path / DESCRIPTION).unlink()
    if content is not None:
        (tmp_path / DESCRIPTION).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load(new("masked", 1), tmp_path, CPU)


def test_weights_of_another_size_are_listed(tmp_path: Path):
    save(new("masked", 1), tmp_path)
    model = new("masked", 1)
    model.trunk.head = torch.nn.Linear(64, 5, bias=False)
    with pytest.raises(CheckpointError, match="1 misshapen"):
        load(model, tmp_path, CPU)


def test_there_is_nothing_to_reproduce(tmp_path: Path):
    with pytest.raises(ConfigError, match="has no official code"):
        get_family("miniature").reproduce(Pack(tmp_path, {}, {}, {}))
