"""Norms and what stands around them: residual adds, modulation, rotary embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from reca.benchmarks.cases.case import Case, Inputs, Maker, Output, Provider, Shape
from reca.kernels import (
    Impl,
    add_layer_norm,
    add_rms_norm,
    gate_residual,
    layer_norm,
    layer_norm_modulate,
    qk_norm_rope,
    qk_norm_rope_spread,
    rms_norm,
)

_EPS = 1e-6


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (weight.to(wide) * wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + _EPS)).to(x.dtype)


def _rows(make: Maker) -> Inputs:
    rows, dim = make.shape["rows"], make.shape["dim"]
    return {"x": make.normal(rows, dim), "residual": make.normal(rows, dim), "weight": make.normal(dim)}


def _one_row_set(make: Maker) -> Inputs:
    return {name: value for name, value in _rows(make).items() if name != "residual"}


def _liger_rms() -> Provider:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction  # type: ignore[import-not-found]

    return lambda i: LigerRMSNormFunction.apply(i["x"], i["weight"], _EPS, 0.0, "llama", False)


def _xformers_rms() -> Provider:
    from xformers.ops.rmsnorm import rms_norm as theirs  # type: ignore[import-not-found]

    return lambda i: theirs(i["x"], i["weight"], _EPS)


def _torch_rms() -> Provider:
    return lambda i: F.rms_norm(i["x"], (i["x"].shape[-1],), i["weight"], _EPS)


def _liger_add_rms() -> Provider:
    from liger_kernel.ops.fused_add_rms_norm import (  # type: ignore[import-not-found]
        LigerFusedAddRMSNormFunction,
    )

    def provider(i: Inputs) -> Output:
        normed, summed = LigerFusedAddRMSNormFunction.apply(
            i["x"], i["residual"], i["weight"], _EPS, 0.0, "llama", False
        )
        return normed, summed

    return provider


def _add_rms_plain(i: Inputs) -> Output:
    summed = i["x"] + i["residual"]
    return _rms(summed, i["weight"]), summed


def _tables(make: Maker) -> Inputs:
    s = make.shape
    heads = s["heads"] + 2 * s["kv_heads"]
    angles = make.normal(s["rows"], s["dim"] // 2, dtype=torch.float32)
    return {
        "qkv": make.normal(s["rows"], heads * s["dim"]),
        "query_weight": make.normal(s["dim"]),
        "key_weight": make.normal(s["dim"]),
        "cos": angles.cos(),
        "sin": angles.sin(),
        "heads": s["heads"],
        "kv_heads": s["kv_heads"],
    }


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None]
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _qk_plain(i: Inputs) -> Output:
    heads, kv_heads = i["heads"], i["kv_heads"]
    split = i["qkv"].unflatten(-1, (heads + 2 * kv_heads, -1)).split((heads, kv_heads, kv_heads), dim=1)
    query = _rotate(_rms(split[0], i["query_weight"]), i["cos"], i["sin"])
    key = _rotate(_rms(split[1], i["key_weight"]), i["cos"], i["sin"])
    return query, key, split[2].contiguous()


def _qk_ours(i: Inputs, impl: Impl) -> Output:
    return qk_norm_rope(
        i["qkv"],
        i["query_weight"],
        i["key_weight"],
        i["cos"],
        i["sin"],
        heads=i["heads"],
        kv_heads=i["kv_heads"],
        eps=_EPS,
        impl=impl,
    )


def _partial(make: Maker) -> Inputs:
    s = make.shape
    angles = make.normal(s["rows"], s["rotated"] // 2, dtype=torch.float32)
    biases = {f"{name}_bias": make.normal(s["dim"]) for name in ("query", "key")}
    return {**_tables(make), **biases, "cos": angles.cos(), "sin": angles.sin()}


def _partial_ours(i: Inputs, impl: Impl) -> Output:
    tensors = (i[name] for name in ("qkv", "query_weight", "key_weight", "cos", "sin"))
    return qk_norm_rope(
        *tensors,
        heads=i["heads"],
        kv_heads=i["kv_heads"],
        eps=_EPS,
        query_bias=i["query_bias"],
        key_bias=i["key_bias"],
        impl=impl,
    )


def _partial_plain(i: Inputs) -> Output:
    heads, rotated = i["heads"], 2 * i["cos"].shape[1]
    query, key, value = i["qkv"].unflatten(-1, (3, heads, -1)).unbind(dim=1)
    turned = []
    for x, name in ((query, "query"), (key, "key")):
        normed = F.layer_norm(x, x.shape[-1:], i[f"{name}_weight"], i[f"{name}_bias"], _EPS)
        first, rest = normed[..., :rotated], normed[..., rotated:]
        turned.append(torch.cat([_rotate(first, i["cos"], i["sin"]), rest], dim=-1))
    return turned[0], turned[1], value.contiguous()


def _qk_moved(s: Shape, itemsize: int) -> tuple[int, int]:
    row = (s["heads"] + 2 * s["kv_heads"]) * s["dim"] * itemsize
    values, angles = s["kv_heads"] * s["dim"] * itemsize, s.get("rotated", s["dim"]) * 4
    # The backward needs no values: their gradient is passed on.
    return s["rows"] * (2 * row + angles), s["rows"] * (3 * row - values + angles)


def _spread(make: Maker) -> Inputs:
    """Rows of [what three segments see; what two see; what one sees], and places in any order."""
    seen, words, image = (make.shape["samples"] * make.shape[name] for name in ("seen", "words", "image"))
    rows, shared = seen + words + image, seen + words
    places = torch.arange(rows + shared + seen, device=make.device)
    destinations = torch.full((rows, 3), -1, device=make.device)
    destinations[:, 0] = places[:rows]
    destinations[:shared, 1], destinations[:seen, 2] = places[rows : rows + shared], places[rows + shared :]
    inputs = _partial(Maker({**make.shape, "rows": rows}, make.device, make.dtype, make.generator))
    calls = {"query_rows": [rows - words, words], "key_rows": [len(places) - shared, shared]}
    return {**inputs, "destinations": destinations, **calls}


def _spread_ours(i: Inputs, impl: Impl) -> Output:
    names = ("destinations", "heads", "kv_heads", "query_rows", "key_rows", "query_bias", "key_bias")
    tensors = (i[name] for name in ("qkv", "query_weight", "key_weight", "cos", "sin"))
    calls = qk_norm_rope_spread(*tensors, eps=_EPS, impl=impl, **{name: i[name] for name in names})
    return tuple(part for kind in zip(*calls, strict=True) for part in kind)


def _spread_plain(i: Inputs) -> Output:
    query, key, value = _partial_plain(i)  # type: ignore[misc]
    destinations = i["destinations"]
    rows = torch.arange(len(destinations), device=query.device)[:, None].expand_as(destinations)
    sources = rows.new_zeros(sum(i["key_rows"]))
    sources[destinations[destinations >= 0]] = rows[destinations >= 0]
    stored = (part.index_select(0, sources).split(i["key_rows"]) for part in (key, value))
    return (*query.split(i["query_rows"]), *(piece for pieces in stored for piece in pieces))


def _spread_moved(s: Shape, itemsize: int) -> tuple[int, int]:
    head = s["heads"] * s["dim"] * itemsize
    rows = s["samples"] * (s["seen"] + s["words"] + s["image"])
    places = s["samples"] * (3 * s["seen"] + 2 * s["words"] + s["image"])
    tables = rows * (s["rotated"] * 4 + 3 * 8)
    return (4 * rows + 2 * places) * head + tables, (6 * rows + 2 * places) * head + tables


def _stream(make: Maker) -> Inputs:
    """An fp32 stream, what two branches add to it, and what the norm of the sum is multiplied with."""
    rows, dim = make.shape["rows"], make.shape["dim"]
    return {
        "residual": make.normal(rows, dim, dtype=torch.float32),
        "attended": make.normal(rows, dim),
        "fed": make.normal(rows, dim),
        "weight": make.normal(dim, dtype=torch.float32),
        "bias": make.normal(dim, dtype=torch.float32),
    }


def _layer_norm_ours(i: Inputs, impl: Impl) -> Output:
    deltas, parameters = (i["attended"], i["fed"]), (i["weight"], i["bias"])
    return add_layer_norm(i["residual"], deltas, *parameters, eps=_EPS, readers=2, impl=impl)


def _layer_norm_plain(i: Inputs) -> Output:
    summed = i["residual"] + (i["attended"] + i["fed"])
    normed = F.layer_norm(summed, summed.shape[-1:], i["weight"], i["bias"], _EPS).to(i["fed"].dtype)
    return summed, normed, normed


def _layer_norm_moved(s: Shape, itemsize: int) -> tuple[int, int]:
    narrow = itemsize if itemsize != 4 else 0  # a gradient of one dtype is written once
    return s["rows"] * s["dim"] * (8 + 3 * itemsize), s["rows"] * s["dim"] * (12 + 2 * itemsize + narrow)


def _modulated(make: Maker) -> Inputs:
    rows, dim = make.shape["rows"], make.shape["dim"]
    return {name: make.normal(rows, dim) for name in ("x", "shift", "scale")}


def _modulate_plain(i: Inputs) -> Output:
    normed = F.layer_norm(i["x"], i["x"].shape[-1:], None, None, _EPS)
    return normed * (1 + i["scale"]) + i["shift"]


def _liger_layer_norm() -> Provider:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction  # type: ignore[import-not-found]

    return lambda i: LigerLayerNormFunction.apply(i["x"], i["weight"], i["bias"], _EPS)


def _gated(make: Maker) -> Inputs:
    rows, dim = make.shape["rows"], make.shape["dim"]
    return {name: make.normal(rows, dim) for name in ("x", "gate", "residual")}


def _element_wise(reads: int, writes: int, reads_back: int, writes_back: int) -> Any:
    """Bytes of an operator over [rows, dim] operands."""

    def moved(s: Shape, itemsize: int) -> tuple[int, int]:
        size = s["rows"] * s["dim"] * itemsize
        return (reads + writes) * size, (reads_back + writes_back) * size

    return moved


_BAGEL = {"rows": 32_768, "dim": 3584}
_SMALL = {"rows": 256, "dim": 384}
_HEAD = {"rows": 40_960, "dim": 1536}

CASES = (
    Case(
        operator="rms_norm",
        name="bagel latents, input norm",
        full=_BAGEL,
        small=_SMALL,
        make=_one_row_set,
        ours=lambda i, impl: rms_norm(i["x"], i["weight"], eps=_EPS, impl=impl),
        plain=lambda i: _rms(i["x"], i["weight"]),
        moved=_element_wise(1, 1, 2, 1),
        gradients=("x", "weight"),
        rivals={"liger": _liger_rms, "torch fused": _torch_rms, "xformers": _xformers_rms},
    ),
    Case(
        operator="rms_norm",
        name="bagel latents, residual add and norm",
        full=_BAGEL,
        small=_SMALL,
        make=_rows,
        ours=lambda i, impl: add_rms_norm(i["x"], i["residual"], i["weight"], eps=_EPS, impl=impl),
        plain=_add_rms_plain,
        moved=_element_wise(2, 2, 3, 1),
        gradients=("x", "residual", "weight"),
        rivals={"liger": _liger_add_rms},
    ),
    Case(
        operator="qk_norm_rope",
        name="bagel latents, 28 query and 4 key heads",
        full={"rows": 32_768, "heads": 28, "kv_heads": 4, "dim": 128},
        small={"rows": 256, "heads": 4, "kv_heads": 2, "dim": 64},
        make=_tables,
        ours=_qk_ours,
        plain=_qk_plain,
        moved=_qk_moved,
        gradients=("qkv", "query_weight", "key_weight"),
    ),
    Case(
        operator="qk_norm_rope",
        name="show-o trunk, LayerNorm and partial rotation",
        full={"rows": 8192, "heads": 32, "kv_heads": 32, "dim": 64, "rotated": 32},
        small={"rows": 128, "heads": 4, "kv_heads": 4, "dim": 16, "rotated": 8},
        make=_partial,
        ours=_partial_ours,
        plain=_partial_plain,
        moved=_qk_moved,
        gradients=("qkv", "query_weight", "key_weight", "query_bias", "key_bias"),
    ),
    Case(
        operator="qk_norm_rope",
        name="show-o trunk, keys and values for two attention calls",
        full={"samples": 2, "seen": 578, "words": 33, "image": 1024, "heads": 32, "kv_heads": 32, "dim": 64}
        | {"rotated": 32},
        small={"samples": 2, "seen": 9, "words": 5, "image": 18, "heads": 4, "kv_heads": 4, "dim": 16}
        | {"rotated": 8},
        make=_spread,
        ours=_spread_ours,
        plain=_spread_plain,
        moved=_spread_moved,
        gradients=("qkv", "query_weight", "key_weight", "query_bias", "key_bias"),
    ),
    Case(
        operator="layer_norm",
        name="show-o trunk, fp32 stream, two branches in and two out",
        full={"rows": 3270, "dim": 2048},
        small=_SMALL,
        make=_stream,
        ours=_layer_norm_ours,
        plain=_layer_norm_plain,
        moved=_layer_norm_moved,
        gradients=("residual", "attended", "fed", "weight", "bias"),
    ),
    Case(
        operator="layer_norm",
        name="clip tower, input norm",
        full={"rows": 1154, "dim": 1024},
        small=_SMALL,
        make=lambda make: _rows(make) | {"bias": make.normal(make.shape["dim"])},
        ours=lambda i, impl: layer_norm(i["x"], i["weight"], i["bias"], eps=_EPS, impl=impl),
        plain=lambda i: F.layer_norm(i["x"], i["x"].shape[-1:], i["weight"], i["bias"], _EPS),
        moved=_element_wise(1, 1, 2, 1),
        gradients=("x", "weight", "bias"),
        rivals={"liger": _liger_layer_norm},
    ),
    Case(
        operator="adaln_modulation",
        name="harmon-1.5b diffusion head, norm and modulation",
        full=_HEAD,
        small=_SMALL,
        make=_modulated,
        ours=lambda i, impl: layer_norm_modulate(i["x"], i["shift"], i["scale"], eps=_EPS, impl=impl),
        plain=_modulate_plain,
        moved=_element_wise(3, 1, 3, 2),  # the gradient of the shift is the one that comes in
        gradients=("x", "shift", "scale"),
    ),
    Case(
        operator="adaln_modulation",
        name="harmon-1.5b diffusion head, gate and residual",
        full=_HEAD,
        small=_SMALL,
        make=_gated,
        ours=lambda i, impl: gate_residual(i["x"], i["gate"], i["residual"], impl=impl),
        plain=lambda i: i["residual"] + i["gate"] * i["x"],
        moved=_element_wise(3, 1, 3, 2),
        gradients=("x", "gate", "residual"),
    ),
)
