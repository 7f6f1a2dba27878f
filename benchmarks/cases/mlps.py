"""Feed-forward blocks and projections: the products are cuBLAS's, what is measured is what stands around."""

from __future__ import annotations

from torch.nn import functional as F

from reca.benchmarks.cases.case import Case, Inputs, Maker, Output, Provider, Shape
from reca.kernels import Impl, bias_gelu, embedding_projection, gated_mlp, gelu_mlp, swiglu


def _gate_up(make: Maker) -> Inputs:
    return {"gate_up": make.normal(make.shape["rows"], 2 * make.shape["inner"])}


def _swiglu_plain(i: Inputs) -> Output:
    gate, up = i["gate_up"].chunk(2, dim=-1)
    return F.silu(gate) * up


def _liger_swiglu() -> Provider:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction  # type: ignore[import-not-found]

    def provider(i: Inputs) -> Output:
        gate, up = i["gate_up"].chunk(2, dim=-1)
        return LigerSiLUMulFunction.apply(gate.contiguous(), up.contiguous())  # type: ignore[no-any-return]

    return provider


def _swiglu_moved(s: Shape, itemsize: int) -> tuple[int, int]:
    size = s["rows"] * s["inner"] * itemsize
    return 3 * size, 5 * size


def _gated(make: Maker) -> Inputs:
    return {**_gate_up(make), "down": make.weight(make.shape["dim"], make.shape["inner"])}


def _gated_moved(s: Shape, itemsize: int) -> tuple[int, int]:
    inner, out = s["rows"] * s["inner"] * itemsize, s["rows"] * s["dim"] * itemsize
    weight = s["inner"] * s["dim"] * itemsize
    return 4 * inner + out + weight, 8 * inner + 2 * (out + weight)


def _gated_flops(s: Shape) -> tuple[int, int]:
    product = 2 * s["rows"] * s["inner"] * s["dim"]
    return product, 2 * product


def _biased(make: Maker) -> Inputs:
    return {
        "x": make.normal(make.shape["rows"], make.shape["inner"]),
        "bias": make.normal(make.shape["inner"]),
    }


def _biased_moved(s: Shape, itemsize: int) -> tuple[int, int]:
    size = s["rows"] * s["inner"] * itemsize
    return 2 * size, 3 * size


def _two_layers(make: Maker) -> Inputs:
    s = make.shape
    return {
        "x": make.normal(s["rows"], s["dim"]),
        "fc1": make.weight(s["inner"], s["dim"]),
        "bias1": make.normal(s["inner"]),
        "fc2": make.weight(s["out"], s["inner"]),
        "bias2": make.normal(s["out"]),
    }


def _two_layers_plain(i: Inputs) -> Output:
    hidden = F.gelu(F.linear(i["x"], i["fc1"], i["bias1"]), approximate="tanh")
    return F.linear(hidden, i["fc2"], i["bias2"])


def _two_layers_ours(i: Inputs, impl: Impl) -> Output:
    return gelu_mlp(i["x"], i["fc1"], i["bias1"], i["fc2"], i["bias2"], approximate="tanh", impl=impl)


def _two_layers_moved(s: Shape, itemsize: int) -> tuple[int, int]:
    ends = s["rows"] * (s["dim"] + s["out"]) * itemsize
    inner = s["rows"] * s["inner"] * itemsize
    weights = s["inner"] * (s["dim"] + s["out"]) * itemsize
    return ends + 4 * inner + weights, 2 * (ends + weights) + 8 * inner


def _two_layers_flops(s: Shape) -> tuple[int, int]:
    products = 2 * s["rows"] * s["inner"] * (s["dim"] + s["out"])
    return products, 2 * products


def _placed(make: Maker) -> Inputs:
    s = make.shape
    order = make.integers(1 << 30, s["sequence"]).argsort()
    return {
        **_two_layers(make),
        "position": make.normal(s["positions"], s["out"]),
        "position_ids": make.integers(s["positions"], s["rows"]),
        "destination": make.normal(s["sequence"], s["out"]),
        "rows": order[: s["rows"]].sort().values,
    }


def _placed_plain(i: Inputs) -> Output:
    projected = _two_layers_plain(i) + i["position"][i["position_ids"]]
    return i["destination"].index_copy(0, i["rows"], projected)


def _placed_ours(i: Inputs, impl: Impl) -> Output:
    return embedding_projection(
        i["x"],
        i["fc1"],
        i["bias1"],
        i["fc2"],
        i["bias2"],
        activation="gelu_tanh",
        position=i["position"],
        position_ids=i["position_ids"],
        destination=i["destination"],
        rows=i["rows"],
        impl=impl,
    )


def _placed_moved(s: Shape, itemsize: int) -> tuple[int, int]:
    forward, backward = _two_layers_moved(s, itemsize)
    row = s["out"] * itemsize
    kept, tables = 2 * s["sequence"] - s["rows"], min(s["positions"], s["rows"])
    placed = s["rows"] + kept + tables
    return forward + placed * row, backward + 2 * (s["rows"] + s["sequence"]) * row


_TWO_LAYERS = ("x", "fc1", "bias1", "fc2", "bias2")

CASES = (
    Case(
        operator="gated_mlp",
        name="bagel latents, swiglu alone",
        full={"rows": 32_768, "inner": 18_944},
        small={"rows": 128, "inner": 384},
        make=_gate_up,
        ours=lambda i, impl: swiglu(i["gate_up"], impl=impl),
        plain=_swiglu_plain,
        moved=_swiglu_moved,
        gradients=("gate_up",),
        rivals={"liger": _liger_swiglu},
    ),
    Case(
        operator="gated_mlp",
        name="bagel latents, swiglu and down projection, 8,192 rows",
        full={"rows": 8192, "inner": 18_944, "dim": 3584},
        small={"rows": 128, "inner": 384, "dim": 96},
        make=_gated,
        ours=lambda i, impl: gated_mlp(i["gate_up"], i["down"], impl=impl),
        plain=lambda i: F.linear(_swiglu_plain(i), i["down"]),  # type: ignore[arg-type]
        moved=_gated_moved,
        flops=_gated_flops,
        gradients=("gate_up", "down"),
    ),
    Case(
        operator="gelu_mlp",
        name="show-o trunk, bias and gelu",
        full={"rows": 8192, "inner": 8192},
        small={"rows": 128, "inner": 512},
        make=_biased,
        ours=lambda i, impl: bias_gelu(i["x"], i["bias"], approximate="tanh", impl=impl),
        plain=lambda i: F.gelu(i["x"] + i["bias"], approximate="tanh"),
        moved=_biased_moved,
        gradients=("x", "bias"),
    ),
    Case(
        operator="gelu_mlp",
        name="show-o trunk, whole block",
        full={"rows": 8192, "dim": 2048, "inner": 8192, "out": 2048},
        small={"rows": 128, "dim": 96, "inner": 384, "out": 96},
        make=_two_layers,
        ours=_two_layers_ours,
        plain=_two_layers_plain,
        moved=_two_layers_moved,
        flops=_two_layers_flops,
        gradients=_TWO_LAYERS,
    ),
    Case(
        operator="embedding_projection",
        name="bagel connector into the sequence",
        full={"rows": 2048, "dim": 1152, "inner": 3584, "out": 3584, "positions": 4900, "sequence": 2304},
        small={"rows": 64, "dim": 48, "inner": 96, "out": 96, "positions": 16, "sequence": 80},
        make=_placed,
        ours=_placed_ours,
        plain=_placed_plain,
        moved=_placed_moved,
        flops=_two_layers_flops,
        gradients=(*_TWO_LAYERS, "destination"),
    ),
)
