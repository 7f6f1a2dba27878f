"""Parity packs: tensors of the official code, read safely and compared under one rule of tolerance.

A pack is a folder with `pack.json`, `inputs.safetensors`, `expected.safetensors` and usually
`weights.safetensors`; its description may name further weight files, relative to the folder. A pack of dtype
`int` has no tensor files: what it expects are the numbers in its description, exact. A family turns a
pack into a `Reproduction`; this module decides whether it agrees:

    max|got - expected| <= atol + rtol * max|expected|        per tensor; integers must be equal

Gradients use `grad_rtol` and `grad_atol` where the pack states them, and `ignore_slices` (name -> [start,
stop] along the first dimension) are left out. A tensor neither formed nor declared `not_formed` is a failure.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reca.errors import CheckpointError, ConfigError
from reca.files import read_safetensors
from reca.models.family import Pack, Reproduction

_GRADIENT = re.compile(r"(^|\.)d?grad[._]")
# Losses, understanding embeddings and predictions of all families: what a reproduction may never leave out.
_COMPARED = re.compile(
    r"(^|\.)(loss\w*|\w+_loss|und_embeddings|understanding\w*|vit_embeds|z_enc|connector|velocity|v|v_cond|v_text|v_img"
    r"|pred|prediction|guided_pred|model_output|latents?|reconstruction|siglip|codes\w*|(image|guided)_logits"
    r"|prompt_embeds|query_hidden|pixels|image_latents|(latents|recon)_[ab])(\.|$)"
)


@dataclass(frozen=True, slots=True)
class Deviation:
    """How far one tensor is from the official one: max|got - expected| against what the rule allows."""

    name: str
    error: float
    tolerance: float

    @property
    def ratio(self) -> float:
        """Error over tolerance; infinite for a wrong integer or a value that is not finite."""
        if self.error == 0:
            return 0.0
        return self.error / self.tolerance if self.tolerance > 0 else float("inf")


@dataclass(frozen=True, slots=True)
class PackResult:
    """Outcome of one pack.

    Attributes:
        pack: the pack's folder.
        passed: every expected tensor agrees or is rightly declared `not_formed`.
        worst: the deviation with the largest error over tolerance; None if nothing could be compared.
        failures: one sentence per tensor that disagrees or is absent.
        not_formed: tensor -> why the implementation never forms it.
    """

    pack: Path
    passed: bool
    worst: Deviation | None
    failures: tuple[str, ...]
    not_formed: Mapping[str, str]


def is_pack(folder: Path) -> bool:
    """Whether a folder holds a pack's description."""
    return (folder / "pack.json").is_file()


def read_pack(folder: Path) -> Pack:
    """Read a parity pack from any place; nothing in it is executed.

    Raises:
        ConfigError: if the folder or its description is not a pack.
        CheckpointError: if a tensor file is missing or broken.
    """
    path = folder / "pack.json"
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{folder}: expected a parity pack, but there is no pack.json") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: expected a JSON object, got {error}") from error
    if not isinstance(description, dict) or not isinstance(description.get("model"), str):
        raise ConfigError(f"{path}: expected a JSON object with the key 'model'")
    if description.get("dtype") == "int":
        return _listed_pack(path, description)
    for name in ("rtol", "atol"):
        if not isinstance(description.get(name), int | float):
            raise ConfigError(f"{path}: expected a number under {name!r}, got {description.get(name)!r}")
    for name in _weight_files(description):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder}: pack.json names {name}, but {folder / name} is missing; copy it there"
            )
    inputs, expected = (_tensors(folder / f"{part}.safetensors") for part in ("inputs", "expected"))
    if not expected:
        raise CheckpointError(
            f"{folder / 'expected.safetensors'}: expected tensors to compare with, found none"
        )
    return Pack(folder, description, inputs, expected)


def _listed_pack(path: Path, description: Mapping[str, Any]) -> Pack:
    """A pack whose expected numbers stand in its description."""
    expected = dict(_listed_tensors("", description.get("expected")))
    if not expected:
        raise ConfigError(f"{path}: expected numbers under 'expected' in a pack of dtype int, found none")
    return Pack(path.parent, {**description, "rtol": 0.0, "atol": 0.0}, {}, expected)


def _listed_tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Dotted name -> int64 tensor of each number and each rectangular list of numbers; texts are left out."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _listed_tensors(f"{name}.{key}" if name else key, entry)
        return
    if isinstance(value, int | list) and value != []:
        try:
            tensor = torch.tensor(value)
        except (ValueError, TypeError, RuntimeError):  # ragged, or not numbers
            assert isinstance(value, list)
            for index, entry in enumerate(value):
                yield from _listed_tensors(f"{name}.{index}", entry)
        else:
            yield name, tensor


def _weight_files(description: Mapping[str, Any]) -> Iterator[str]:
    """Tensor files that the description names, relative to the pack."""
    for key in ("files", "weights"):
        entries = description.get(key)
        yield from (
            str(name) for name in (entries if isinstance(entries, Mapping) else ()) if ".safetensors" in name
        )


def _tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; a parity pack needs inputs and expected tensors")
    return read_safetensors(path)


def compare(pack: Pack, reproduction: Reproduction) -> PackResult:
    """Compare every expected tensor of a pack with what an implementation got."""
    failures: list[str] = []
    deviations: list[Deviation] = []
    not_formed = {name: why for name, why in reproduction.not_formed.items() if name in pack.expected}
    for name, expected in pack.expected.items():
        got = reproduction.tensors.get(name)
        if got is None:
            if name not in not_formed:
                failures.append(f"{name}: neither formed nor declared as not formed")
            elif _GRADIENT.search(name) or _COMPARED.search(name):
                failures.append(f"{name}: must be compared, but was declared not formed ({not_formed[name]})")
        elif got.shape != expected.shape:
            failures.append(f"{name}: expected shape {list(expected.shape)}, got {list(got.shape)}")
        else:
            deviation = _deviation(name, got, expected, pack.description)
            deviations.append(deviation)
            if not deviation.ratio <= 1:
                failures.append(
                    f"{name}: error {deviation.error:.3g} exceeds tolerance {deviation.tolerance:.3g}"
                )
    worst = max(deviations, key=lambda deviation: deviation.ratio, default=None)
    return PackResult(pack.folder, not failures, worst, tuple(failures), not_formed)


def _deviation(name: str, got: Tensor, expected: Tensor, description: Mapping[str, Any]) -> Deviation:
    """One tensor under the rule; fp64 so that large integers and tiny errors survive the subtraction."""
    got, expected = (_without_ignored(tensor.detach().cpu(), name, description) for tensor in (got, expected))
    if not expected.is_floating_point():
        if got.is_floating_point():
            return Deviation(name, float("inf"), 0.0)
        if torch.equal(got.long(), expected.long()):
            return Deviation(name, 0.0, 0.0)
        return Deviation(name, float((got.long() - expected.long()).abs().max()), 0.0)
    got, expected = got.to(torch.float64), expected.to(torch.float64)
    kind = "grad_" if _GRADIENT.search(name) else ""
    rtol, atol = (description.get(f"{kind}{t}", description[t]) for t in ("rtol", "atol"))
    if expected.numel() == 0:
        return Deviation(name, 0.0, float(atol))
    largest = float((got - expected).abs().max())
    error = float("inf") if math.isnan(largest) else largest
    return Deviation(name, error, float(atol + rtol * expected.abs().max()))


def _without_ignored(tensor: Tensor, name: str, description: Mapping[str, Any]) -> Tensor:
    """The tensor without the rows that the pack declares meaningless."""
    bounds = description.get("ignore_slices", {}).get(name)
    return tensor if bounds is None else torch.cat([tensor[: bounds[0]], tensor[bounds[1] :]])
