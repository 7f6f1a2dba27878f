"""Random numbers of samples, as `draw` asks for them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reca.benchmarks.cases.case import Case, Inputs, Maker, Output, Shape
from reca.kernels import Impl, philox, philox4x32

_KEY, _STEP = 0x0123_4567_89AB_CDEF, 11
_WORD = 0xFFFFFFFF
_UNIT = 4.6566127342e-10  # 2^-31, as the operator rounds it


def _ids(make: Maker) -> Inputs:
    return {
        "samples": make.integers(1 << 40, make.shape["samples"]),
        "unit": torch.tensor(_UNIT, device=make.device),
        "count": make.shape["count"],
    }


def _uniforms(i: Inputs) -> list[Tensor]:
    """Written out as one does it with integer tensors: about eighty passes over memory."""
    samples = i["samples"]
    blocks = torch.arange(-(-i["count"] // 4), device=samples.device)
    low, high = (samples & _WORD)[:, None], ((samples >> 32) & _WORD)[:, None]
    words = philox4x32(_KEY, blocks, torch.full_like(low, _STEP), low, high)
    folded = [torch.where(word > _WORD // 2, _WORD - word, word).to(torch.float32) for word in words]
    return [(word * i["unit"].to(torch.float32)).to(i["unit"].dtype) for word in folded]


def _joined(i: Inputs, parts: list[Tensor]) -> Tensor:
    return torch.stack(parts, dim=-1).flatten(1)[:, : i["count"]]


def _uniform_plain(i: Inputs) -> Output:
    return _joined(i, _uniforms(i))


def _normal_plain(i: Inputs) -> Output:
    uniforms = _uniforms(i)
    parts = []
    for radius_draw, angle_draw in (uniforms[:2], uniforms[2:]):
        radius = torch.sqrt(-2 * torch.log(radius_draw.clamp_min(1e-7)))
        parts += [radius * torch.cos(2 * math.pi * angle_draw), radius * torch.sin(2 * math.pi * angle_draw)]
    return _joined(i, parts)


def _uniform_ours(i: Inputs, impl: Impl) -> Output:
    return philox(i["samples"], i["count"], key=_KEY, step=_STEP, impl=impl)


def _normal_ours(i: Inputs, impl: Impl) -> Output:
    return philox(i["samples"], i["count"], key=_KEY, step=_STEP, distribution="normal", impl=impl)


def _moved(s: Shape, itemsize: int) -> tuple[int, int]:
    return s["samples"] * (8 + 4 * s["count"]), 0


CASES = (
    Case(
        operator="philox",
        name="bagel latents, noise of 48 images",
        full={"samples": 48, "count": 262_144},
        small={"samples": 3, "count": 4096},
        make=_ids,
        ours=_normal_ours,
        plain=_normal_plain,
        moved=_moved,
    ),
    Case(
        operator="philox",
        name="harmon order of tokens, uniform",
        full={"samples": 48, "count": 1024},
        small={"samples": 3, "count": 1023},
        make=_ids,
        ours=_uniform_ours,
        plain=_uniform_plain,
        moved=_moved,
    ),
)
