"""Losses and the heads before them."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from reca.benchmarks.cases.case import Case, Inputs, Maker, Output, Provider, Shape
from reca.kernels import Impl, flow_head, flow_input, flow_matching_loss, masked_token_loss

_EPS = 1e-6


def _tokens(make: Maker) -> Inputs:
    s = make.shape
    return {
        "hidden": make.normal(s["rows"], s["width"]),
        "weight": make.weight(s["vocab"], s["width"]),
        "labels": make.integers(s["vocab"], s["rows"]),
    }


def _token_plain(i: Inputs) -> Output:
    logits = i["hidden"] @ i["weight"].t()
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, i["labels"], reduction="sum")


def _liger_tokens() -> Provider:
    from liger_kernel.ops.fused_linear_cross_entropy import (  # type: ignore[import-not-found]
        LigerFusedLinearCrossEntropyFunction,
    )

    def provider(i: Inputs) -> Output:
        result = LigerFusedLinearCrossEntropyFunction.apply(
            i["hidden"], i["weight"], i["labels"], None, None, -100, 0.0, 0.0, "sum"
        )
        loss: torch.Tensor = result[0] if isinstance(result, tuple) else result
        return loss

    return provider


def _cce_tokens() -> Provider:
    from cut_cross_entropy import linear_cross_entropy  # type: ignore[import-not-found]

    return lambda i: linear_cross_entropy(i["hidden"], i["weight"], i["labels"], reduction="sum")


def _torch_tokens() -> Provider:
    fused = F.linear_cross_entropy  # type: ignore[attr-defined]

    return lambda i: fused(i["hidden"], i["weight"], i["labels"], reduction="sum")


def _token_moved(s: Shape, itemsize: int) -> tuple[int, int]:
    operands = (s["rows"] + s["vocab"]) * s["width"] * itemsize
    return operands, 2 * operands


def _token_flops(s: Shape) -> tuple[int, int]:
    product = 2 * s["rows"] * s["vocab"] * s["width"]
    return product, 2 * product


def _flow(make: Maker) -> Inputs:
    tokens, dim = make.shape["tokens"], make.shape["dim"]
    names = ("prediction", "clean", "noise")
    return {name: make.normal(tokens, dim) for name in names} | {"mask": make.ones(tokens)}


def _flow_plain(i: Inputs) -> Output:
    error = i["prediction"] - (i["noise"] - i["clean"])
    wide = error.to(torch.promote_types(error.dtype, torch.float32))
    return (wide.square().mean(dim=1) * i["mask"]).sum()


def _flow_moved(s: Shape, itemsize: int) -> tuple[int, int]:
    size = s["tokens"] * s["dim"] * itemsize
    return 4 * size + 4 * s[
        "tokens"
    ], 2 * size  # the gradient is formed with the loss; the backward scales it


def _head(make: Maker) -> Inputs:
    s = make.shape
    return {
        "hidden": make.normal(s["tokens"], s["width"]),
        "scale": make.normal(s["width"]),
        "weight": make.weight(s["dim"], s["width"]),
        "bias": make.normal(s["dim"]),
        "clean": make.normal(s["tokens"], s["dim"], dtype=torch.float32),
        "noise": make.normal(s["tokens"], s["dim"], dtype=torch.float32),
        "mask": make.ones(s["tokens"]),
    }


def _head_plain(i: Inputs) -> Output:
    hidden = i["hidden"]
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    normed = (i["scale"] * wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + _EPS)).to(hidden.dtype)
    prediction = F.linear(normed, i["weight"], i["bias"])
    error = prediction - (i["noise"] - i["clean"])
    return (error.square().mean(dim=1) * i["mask"]).sum()


def _head_ours(i: Inputs, impl: Impl) -> Output:
    names = ("hidden", "scale", "weight", "bias", "clean", "noise", "mask")
    return flow_head(*(i[name] for name in names), eps=_EPS, impl=impl)


def _head_moved(s: Shape, itemsize: int) -> tuple[int, int]:
    hidden = s["tokens"] * s["width"] * itemsize
    latents = s["tokens"] * s["dim"] * 4
    return hidden + 3 * latents, 2 * hidden + latents


def _input(make: Maker) -> Inputs:
    s = make.shape
    tokens, dim, width, images = s["tokens"], s["dim"], s["width"], s["images"]
    return {
        "clean": make.normal(tokens, dim, dtype=torch.float32),
        "noise": make.normal(tokens, dim, dtype=torch.float32),
        "time": make.integers(1000, images).to(torch.float32) / 1000,
        "images": torch.arange(tokens, device=make.device) * images // tokens,
        "weight": make.weight(width, dim),
        "bias": make.normal(width),
        "time_embedding": make.normal(images, width),
        "position": make.normal(tokens // images, width, dtype=torch.float32),
        "position_ids": torch.arange(tokens, device=make.device) % (tokens // images),
    }


def _input_plain(i: Inputs) -> Output:
    time = i["time"][i["images"]][:, None]
    noised = ((1 - time) * i["clean"] + time * i["noise"]).to(i["weight"].dtype)
    embedded = F.linear(noised, i["weight"], i["bias"]) + i["time_embedding"][i["images"]]
    return embedded + i["position"][i["position_ids"]].to(embedded.dtype)


def _input_ours(i: Inputs, impl: Impl) -> Output:
    return flow_input(
        i["clean"],
        i["noise"],
        i["time"],
        i["images"],
        i["weight"],
        i["bias"],
        time_embedding=i["time_embedding"],
        position=i["position"],
        position_ids=i["position_ids"],
        impl=impl,
    )


def _input_moved(s: Shape, itemsize: int) -> tuple[int, int]:
    latents, embedded = 2 * s["tokens"] * s["dim"] * 4, s["tokens"] * s["width"] * itemsize
    position = s["tokens"] // s["images"] * s["width"] * 4
    return latents + embedded + position, latents + embedded


_LATENTS = {"tokens": 32_768, "dim": 64, "width": 3584, "images": 8}
_FEW = {"tokens": 256, "dim": 16, "width": 192, "images": 4}

CASES = (
    Case(
        operator="masked_token_loss",
        name="show-o labelled image tokens",
        full={"rows": 1304, "vocab": 58_498, "width": 2048},
        small={"rows": 48, "vocab": 1000, "width": 96},
        make=_tokens,
        ours=lambda i, impl: masked_token_loss(i["hidden"], i["weight"], i["labels"], impl=impl),
        plain=_token_plain,
        moved=_token_moved,
        flops=_token_flops,
        gradients=("hidden", "weight"),
        rivals={"liger": _liger_tokens, "cut-cross-entropy": _cce_tokens, "torch fused": _torch_tokens},
        is_one_pass=True,
    ),
    Case(
        operator="masked_token_loss",
        name="harmon labelled text tokens",
        full={"rows": 4800, "vocab": 151_936, "width": 1536},
        small={"rows": 96, "vocab": 2000, "width": 64},
        make=_tokens,
        ours=lambda i, impl: masked_token_loss(i["hidden"], i["weight"], i["labels"], impl=impl),
        plain=_token_plain,
        moved=_token_moved,
        flops=_token_flops,
        gradients=("hidden", "weight"),
        rivals={"liger": _liger_tokens, "cut-cross-entropy": _cce_tokens, "torch fused": _torch_tokens},
        is_one_pass=True,
    ),
    Case(
        operator="flow_matching_loss",
        name="bagel latents",
        full={"tokens": 32_768, "dim": 64},
        small={"tokens": 256, "dim": 16},
        make=_flow,
        ours=lambda i, impl: flow_matching_loss(
            i["prediction"], i["clean"], i["noise"], i["mask"], impl=impl
        ),
        plain=_flow_plain,
        moved=_flow_moved,
        gradients=("prediction",),
    ),
    Case(
        operator="flow_matching_loss",
        name="latents beyond every cache",
        full={"tokens": 1_048_576, "dim": 64},
        small={"tokens": 4096, "dim": 16},
        make=_flow,
        ours=lambda i, impl: flow_matching_loss(
            i["prediction"], i["clean"], i["noise"], i["mask"], impl=impl
        ),
        plain=_flow_plain,
        moved=_flow_moved,
        gradients=("prediction",),
    ),
    Case(
        operator="flow_head",
        name="bagel latents: last norm, projection, loss",
        full=_LATENTS,
        small=_FEW,
        make=_head,
        ours=_head_ours,
        plain=_head_plain,
        moved=_head_moved,
        gradients=("hidden", "scale", "weight", "bias"),
    ),
    Case(
        operator="flow_input",
        name="bagel latents: noise, projection, time and position",
        full=_LATENTS,
        small=_FEW,
        make=_input,
        ours=_input_ours,
        plain=_input_plain,
        moved=_input_moved,
        gradients=("weight", "bias", "time_embedding"),
    ),
)
