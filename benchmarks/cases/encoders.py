"""What the convolutional encoders of image tokenizers do between their convolutions."""

from __future__ import annotations

from torch.nn import functional as F

from reca.benchmarks.cases.case import Case, Inputs, Maker, Output, Provider, Shape
from reca.kernels import Impl, group_norm_silu

_EPS = 1e-6
_GROUPS = 32


def _pictures(make: Maker) -> Inputs:
    s = make.shape
    channels = s["channels"]
    pictures = make.normal(s["images"], channels, s["side"], s["side"])
    return {"x": pictures, "weight": make.normal(channels), "bias": make.normal(channels)}


def _ours(i: Inputs, impl: Impl) -> Output:
    return group_norm_silu(i["x"], i["weight"], i["bias"], groups=_GROUPS, eps=_EPS, impl=impl)


def _plain(i: Inputs) -> Output:
    return F.silu(F.group_norm(i["x"], _GROUPS, i["weight"], i["bias"], _EPS))


def _under_autocast() -> Provider:
    def provider(i: Inputs) -> Output:
        x, weight, bias = (i[name].float() for name in ("x", "weight", "bias"))
        return F.silu(F.group_norm(x, _GROUPS, weight, bias, _EPS)).to(i["x"].dtype)

    return provider


def _moved(s: Shape, itemsize: int) -> tuple[int, int]:
    return 3 * s["images"] * s["channels"] * s["side"] ** 2 * itemsize, 0


CASES = (
    Case(
        operator="group_norm_silu",
        name="bagel autoencoder, first level of 1024 x 1024",
        full={"images": 1, "channels": 128, "side": 1024},
        small={"images": 1, "channels": 64, "side": 64},
        make=_pictures,
        ours=_ours,
        plain=_plain,
        moved=_moved,
        rivals={"torch under autocast": _under_autocast},
    ),
)
