"""The pieces of a SANA block around its products, on an fp32 residual stream beside narrower rows."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from reca.benchmarks.cases.case import Case, Inputs, Maker, Output, Shape
from reca.kernels import add_layer_norm_modulate, depthwise_glu, group_gate_residual, linear_attention

_EPS, _NORM_EPS = 1e-15, 1e-6


def _grid(make: Maker) -> Inputs:
    s = make.shape
    channels = 2 * s["inner"]
    return {
        "x": make.normal(s["images"], s["side"], s["side"], channels),
        "weight": make.normal(channels, 1, 3, 3, scale=1 / 3),
        "bias": make.normal(channels),
    }


def _grid_plain(i: Inputs) -> Output:
    active = F.silu(i["x"]).permute(0, 3, 1, 2)
    convolved = F.conv2d(active, i["weight"], i["bias"], padding=1, groups=active.shape[1])
    value, gate = convolved.permute(0, 2, 3, 1).chunk(2, dim=-1)
    return value * F.silu(gate)


def _grid_moved(s: Shape, itemsize: int) -> tuple[int, int]:
    size = s["images"] * s["side"] ** 2 * s["inner"] * itemsize
    return 3 * size, 5 * size


def _heads(make: Maker) -> Inputs:
    s = make.shape
    sizes = (s["images"], s["tokens"], s["heads"], s["dim"])
    return {name: make.normal(*sizes) for name in ("query", "key", "value")}


def _heads_plain(i: Inputs) -> Output:
    dtype = torch.promote_types(i["query"].dtype, torch.float32)
    query, key, value = (i[name].to(dtype).transpose(1, 2) for name in ("query", "key", "value"))
    query, key = F.relu(query), F.relu(key)
    padded = F.pad(value, (0, 1), value=1.0)
    summed = query @ (key.transpose(-1, -2) @ padded)
    out = summed[..., :-1] / (summed[..., -1:] + _EPS)
    return out.transpose(1, 2).to(i["query"].dtype)


def _heads_moved(s: Shape, itemsize: int) -> tuple[int, int]:
    size = s["images"] * s["tokens"] * s["heads"] * s["dim"] * itemsize
    return 4 * size, 7 * size


def _stream(make: Maker) -> Inputs:
    s = make.shape
    rows, wide = (s["images"], s["tokens"], s["dim"]), {"dtype": torch.float32}
    shared = {name: make.normal(s["images"], 1, s["dim"], **wide) for name in ("shift", "scale", "gate")}
    return {"residual": make.normal(*rows, **wide), "x": make.normal(*rows)} | shared


def _modulate_plain(i: Inputs) -> Output:
    summed = i["residual"] + i["x"]
    normed = F.layer_norm(summed, summed.shape[-1:], None, None, _NORM_EPS)
    return summed, (normed * (1 + i["scale"]) + i["shift"]).to(i["x"].dtype)


def _stream_moved(s: Shape, itemsize: int) -> tuple[int, int]:
    """Sum and norm: two rows in and two out; back, two gradients and the sum in and two gradients out."""
    size, narrow = s["images"] * s["tokens"] * s["dim"], itemsize if itemsize != 4 else 0
    return (8 + 2 * itemsize) * size, (12 + itemsize + narrow) * size


def _gate_moved(s: Shape, itemsize: int) -> tuple[int, int]:
    size = s["images"] * s["tokens"] * s["dim"]
    return (8 + itemsize) * size, (4 + 2 * itemsize) * size


_STREAM = {"images": 42, "tokens": 256, "dim": 2240}
_SMALL = {"images": 3, "tokens": 16, "dim": 48}

CASES = (
    Case(
        operator="adaln_modulation",
        name="openuni-l-512, sum, norm and modulation of 42 images",
        full=_STREAM,
        small=_SMALL,
        make=_stream,
        ours=lambda i, impl: add_layer_norm_modulate(
            i["residual"], i["x"], i["shift"], i["scale"], eps=_NORM_EPS, dtype=i["x"].dtype, impl=impl
        ),
        plain=_modulate_plain,
        moved=_stream_moved,
        gradients=("residual", "x", "shift", "scale"),
    ),
    Case(
        operator="adaln_modulation",
        name="openuni-l-512, gate of 42 images and residual",
        full=_STREAM,
        small=_SMALL,
        make=_stream,
        ours=lambda i, impl: group_gate_residual(i["x"], i["gate"], i["residual"], impl=impl),
        plain=lambda i: i["residual"] + i["gate"] * i["x"],
        moved=_gate_moved,
        gradients=("x", "gate", "residual"),
    ),
    Case(
        operator="depthwise_glu",
        name="openuni-l-512, 42 images of 16 x 16",
        full={"images": 42, "side": 16, "inner": 5600},
        small={"images": 2, "side": 8, "inner": 48},
        make=_grid,
        ours=lambda i, impl: depthwise_glu(i["x"], i["weight"], i["bias"], activate=True, impl=impl),
        plain=_grid_plain,
        moved=_grid_moved,
        gradients=("x", "weight", "bias"),
    ),
    Case(
        operator="linear_attention",
        name="openuni-l-512, 42 images of 256 tokens",
        full={"images": 42, "tokens": 256, "heads": 70, "dim": 32},
        small={"images": 2, "tokens": 64, "heads": 2, "dim": 16},
        make=_heads,
        ours=lambda i, impl: linear_attention(i["query"], i["key"], i["value"], eps=_EPS, impl=impl),
        plain=_heads_plain,
        moved=_heads_moved,
        gradients=("query", "key", "value"),
    ),
)
