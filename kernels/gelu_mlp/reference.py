"""The mathematics in plain torch, forward and explicit backward; fp32 inside, fp64 for fp64 inputs.

pre = x + bias,    out = pre share(pre),    slope = share + pre share'

gelu:          share(p) = (1 + erf(p / sqrt 2)) / 2
gelu_tanh:     share(p) = (1 + tanh(z / 2)) / 2 = sigmoid(z),    z = sqrt(8 / pi) (p + 0.044715 p^3)
gelu_sigmoid:  share(p) = sigmoid(1.702 p)
silu:          share(p) = sigmoid(p)

dx_ik = d_out_ik slope_ik,    d_bias_k = sum_i dx_ik
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from reca.kernels._checks import compute_dtype

Activation = Literal["gelu", "gelu_tanh", "gelu_sigmoid", "silu"]

_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}
_SIGMOID_SCALE = 1.702


def activate(pre: Tensor, activation: str) -> Tensor:
    """The activation of `pre`, at its dtype."""
    if activation in _APPROXIMATE:
        return F.gelu(pre, approximate=_APPROXIMATE[activation])
    return pre * torch.sigmoid(_SIGMOID_SCALE * pre) if activation == "gelu_sigmoid" else F.silu(pre)


def forward(x: Tensor, bias: Tensor, activation: str) -> Tensor:
    """[..., width] in the dtype of x, rounded once."""
    dtype = compute_dtype(x)
    return activate(x.to(dtype) + bias.to(dtype), activation).to(x.dtype)


def backward(d_out: Tensor, x: Tensor, bias: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """(dx [rows, width], d_bias [width], summed before dx is rounded)."""
    dtype = compute_dtype(x)
    wide, pre = d_out.to(dtype), x.to(dtype) + bias.to(dtype)
    if activation == "gelu_sigmoid":
        share = torch.sigmoid(_SIGMOID_SCALE * pre)
        dx = wide * (share + pre * share * (1 - share) * _SIGMOID_SCALE)
    elif activation == "silu":
        dx = torch.ops.aten.silu_backward(wide, pre)
    else:
        dx = torch.ops.aten.gelu_backward(wide, pre, approximate=_APPROXIMATE[activation])
    return dx.to(x.dtype), dx.sum(dim=0).to(bias.dtype)


def mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    activation: str,
) -> Tensor:
    """[..., out]: both products at the dtype of x."""
    return F.linear(forward(F.linear(x, fc1_weight), fc1_bias, activation), fc2_weight, fc2_bias)
