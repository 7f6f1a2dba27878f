"""A few rows through large frozen weights: the image markers of a mixture of transformers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from reca.benchmarks.cases.case import Case, Inputs, Maker, Output, Provider, Shape
from reca.kernels import (
    Fp8Weight,
    Impl,
    Nf4Weight,
    dequantize_nf4,
    quantize_fp8,
    quantize_nf4,
    skinny_linear,
)


def _plain_weight(make: Maker) -> Inputs:
    s = make.shape
    return {"x": make.normal(s["rows"], s["in"]), "weight": make.weight(s["out"], s["in"])}


def _fp8(make: Maker) -> Inputs:
    made = dict(_plain_weight(make))
    made["values"], made["scale"] = quantize_fp8(made.pop("weight"))
    return made


def _fp8_ours(i: Inputs, impl: Impl) -> Output:
    return skinny_linear(i["x"], Fp8Weight(i["values"], i["scale"].to(torch.float32)), impl=impl)


def _fp8_plain(i: Inputs) -> Output:
    wide = torch.promote_types(i["x"].dtype, torch.float32)
    weight = i["values"].to(wide) * i["scale"].to(wide)[:, None]
    return F.linear(i["x"].to(wide), weight).to(i["x"].dtype)


def _nf4(make: Maker) -> Inputs:
    made = dict(_plain_weight(make))
    made["quantized"] = quantize_nf4(made.pop("weight"))
    return made


def _nf4_ours(i: Inputs, impl: Impl) -> Output:
    weight: Nf4Weight = i["quantized"]
    return skinny_linear(i["x"], weight, impl=impl)


def _nf4_plain(i: Inputs) -> Output:
    return F.linear(i["x"], dequantize_nf4(i["quantized"], i["x"].dtype))


def _bitsandbytes() -> Provider:
    import bitsandbytes as bnb  # type: ignore[import-not-found]

    made: dict[int, Any] = {}

    def provider(i: Inputs) -> Output:
        weight: Nf4Weight = i["quantized"]
        key = weight.packed.data_ptr()
        if key not in made:  # its own packing of the same values, once for each input set
            made[key] = bnb.functional.quantize_4bit(
                dequantize_nf4(weight, i["x"].dtype), quant_type="nf4", compress_statistics=True
            )
        packed, state = made[key]
        out: Tensor = bnb.matmul_4bit(i["x"], packed.t(), quant_state=state)
        return out

    return provider


def _torchao_nf4() -> Provider:
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import (  # type: ignore[import-not-found]
        linear_nf4,
        to_nf4,
    )

    made: dict[int, Any] = {}

    def provider(i: Inputs) -> Output:
        weight: Nf4Weight = i["quantized"]
        key = weight.packed.data_ptr()
        if key not in made:
            values = dequantize_nf4(weight, i["x"].dtype)
            made[key] = to_nf4(values, 64, math.gcd(values.numel() // 64, 256))
        return linear_nf4(i["x"], made[key])  # type: ignore[no-any-return]

    return provider


def _torchao_fp8() -> Provider:
    from torchao.quantization import Float8WeightOnlyConfig, quantize_  # type: ignore[import-not-found]

    made: dict[int, torch.nn.Linear] = {}

    def provider(i: Inputs) -> Output:
        key = i["values"].data_ptr()
        if key not in made:
            out, width = i["values"].shape
            layer = torch.nn.Linear(width, out, bias=False, device=i["x"].device, dtype=i["x"].dtype)
            wide = i["values"].to(torch.float32) * i["scale"].to(torch.float32)[:, None]
            layer.weight.requires_grad_(False).copy_(wide)
            quantize_(layer, Float8WeightOnlyConfig())
            made[key] = layer
        result: Tensor = made[key](i["x"])
        return result

    return provider


def _moved(bits: float | None) -> Any:
    def moved(s: Shape, itemsize: int) -> tuple[int, int]:
        size = s["out"] * s["in"] * (itemsize if bits is None else bits / 8)
        rows = s["rows"] * (s["out"] + s["in"]) * itemsize
        return int(size) + rows, int(size) + rows

    return moved


def _flops(s: Shape) -> tuple[int, int]:
    product = 2 * s["rows"] * s["out"] * s["in"]
    return product, product


_FULL = {"rows": 16, "out": 37_888, "in": 3584}
_SMALL = {"rows": 4, "out": 192, "in": 128}

CASES = (
    Case(
        operator="skinny_linear",
        name="bagel markers, gate and up projection",
        full=_FULL,
        small=_SMALL,
        make=_plain_weight,
        ours=lambda i, impl: skinny_linear(i["x"], i["weight"], impl=impl),
        plain=lambda i: F.linear(i["x"], i["weight"]),
        moved=_moved(None),
        flops=_flops,
        gradients=("x",),
    ),
    Case(
        operator="skinny_linear",
        name="bagel markers, gate and up projection, fp8 weight",
        full=_FULL,
        small=_SMALL,
        make=_fp8,
        ours=_fp8_ours,
        plain=_fp8_plain,
        moved=_moved(8),
        flops=_flops,
        gradients=("x",),
        rivals={"torchao": _torchao_fp8},
    ),
    Case(
        operator="skinny_linear",
        name="bagel markers, gate and up projection, NF4 weight",
        full=_FULL,
        small=_SMALL,
        make=_nf4,
        ours=_nf4_ours,
        plain=_nf4_plain,
        moved=_moved(4.13),
        flops=_flops,
        gradients=("x",),
        rivals={"bitsandbytes": _bitsandbytes, "torchao": _torchao_nf4},
    ),
)
