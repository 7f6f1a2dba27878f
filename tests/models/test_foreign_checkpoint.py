"""Each family refuses a checkpoint of another one, of other shapes, or not whole, and says which tensors."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from reca.errors import CheckpointError
from reca.models import get_variant

FAMILIES = {
    "bagel/tiny": "ema.safetensors",
    "harmon/tiny": "harmon_tiny.pth",
    "janus/tiny": "model.safetensors",
    "openuni/tiny": "openuni.pth",
    "showo/tiny-clip": "pytorch_model.bin",
}


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each family that holds its official files."""
    root = tmp_path_factory.mktemp("releases")
    for name in FAMILIES:
        family, variant = get_variant(name)
        torch.manual_seed(0)
        family.save(family.build(variant.config), root / family.name)
    return root


def refusal(name: str, path: Path) -> str:
    """What loading says."""
    family, variant = get_variant(name)
    with torch.device("meta"):
        model = family.build(variant.config)
    with pytest.raises(CheckpointError) as error:
        family.load(model, path, torch.device("cpu"), torch.float32)
    return str(error.value)


def rewritten(releases: Path, name: str, folder: Path, tensors: dict[str, Tensor]) -> Path:
    """A copy of the release with other tensors in its main file, and nothing that names a variant."""
    shutil.copytree(releases / name.partition("/")[0], folder)
    for path in folder.glob("*.json"):
        path.unlink()
    path = folder / FAMILIES[name]
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    return folder


def main_tensors(releases: Path, name: str) -> dict[str, Tensor]:
    path = releases / name.partition("/")[0] / FAMILIES[name]
    if path.suffix == ".safetensors":
        return load_file(path)
    tensors: dict[str, Tensor] = torch.load(path, weights_only=True)
    return {key: tensor.clone() for key, tensor in tensors.items()}  # tied names share their memory


@pytest.mark.parametrize("name", FAMILIES)
def test_the_folder_of_another_family_is_refused_in_two_lines(releases: Path, name: str) -> None:
    for other in FAMILIES:
        if other != name:
            message = refusal(name, releases / other.partition("/")[0])
            assert len(message.splitlines()) <= 2, message
            assert re.search("another family|give the folder|of an OpenUni", message), message


@pytest.mark.parametrize("name", FAMILIES)
def test_tensors_of_another_family_under_the_right_name_are_recognised(
    releases: Path, tmp_path: Path, name: str
) -> None:
    other = next(other for other in FAMILIES if other != name)
    folder = rewritten(releases, name, tmp_path / "copy", main_tensors(releases, other))
    assert "Likely cause: these are weights of another family" in refusal(name, folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_missing_an_unexpected_and_a_misshapen_tensor_are_listed_by_name(
    releases: Path, tmp_path: Path, name: str
) -> None:
    tensors = main_tensors(releases, name)
    missing, misshapen = sorted(key for key, tensor in tensors.items() if tensor.ndim == 1)[:2]
    shape = list(tensors[misshapen].shape)
    del tensors[missing]
    tensors |= {"an.extra": torch.zeros(2), misshapen: torch.zeros(shape[0] + 1)}
    message = refusal(name, rewritten(releases, name, tmp_path / "copy", tensors))
    listed = f"1 missing ({missing}); 1 unexpected (an.extra); 1 misshapen ({misshapen}: expected {shape}"
    assert listed in message
