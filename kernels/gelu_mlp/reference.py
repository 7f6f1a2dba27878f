"""The mathematics in plain torch, forward and explicit backward; fp32 inside, fp64 for fp64 inputs.

pre = x + bias,    out = pre share(pre),    slope = share + pre share'

gelu:          share(p) = (1 + erf(p / sqrt 2)) / 2
gelu_tanh:     share(p) = (1 + tanh(z / 2)) / 2 = sigmoid(z),    z = sqrt(8 / pi) (p + 0.044715 p^3)
gelu_sigmoid:  share(p) = sigmoid(1.702 p)
silu:          share(p) = sigmoid(p)

dx_ik = d_out_ik slope_ik,    d_bias_k = sum_i dx_ik
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from reca.kernels._checks import compute_dtype

Activation = Literal["gelu", "gelu_tanh", "gelu_sigmoid", "silu"]

_CUBIC = 0.044715
_SIGMOID_SCALE = 1.702


def activate(pre: Tensor, activation: str) -> Tensor:
    """The activation of `pre`, at its dtype."""
    if activation == "gelu":
        return F.gelu(pre)
    if activation == "gelu_tanh":
        return F.gelu(pre, approximate="tanh")
    return pre * torch.sigmoid(_SIGMOID_SCALE * pre) if activation == "gelu_sigmoid" else F.silu(pre)


def slope(pre: Tensor, activation: str) -> Tensor:
    """The derivative of the activation at `pre`."""
    if activation == "gelu":
        density = torch.exp(-0.5 * pre.square()) / math.sqrt(2 * math.pi)
        return 0.5 * (1 + torch.erf(pre / math.sqrt(2))) + pre * density
    if activation == "gelu_tanh":
        scale = math.sqrt(8 / math.pi)
        argument = scale * (pre + _CUBIC * pre**3)
        rate = scale * (1 + 3 * _CUBIC * pre.square())
        share = torch.sigmoid(argument)
        return share + pre * share * (1 - share) * rate
    rate_ = _SIGMOID_SCALE if activation == "gelu_sigmoid" else 1.0
    share = torch.sigmoid(rate_ * pre)
    return share + pre * share * (1 - share) * rate_


def forward(x: Tensor, bias: Tensor, activation: str) -> Tensor:
    """[..., width] in the dtype of x, rounded once."""
    dtype = compute_dtype(x)
    return activate(x.to(dtype) + bias.to(dtype), activation).to(x.dtype)


def backward(d_out: Tensor, x: Tensor, bias: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """(dx [rows, width], d_bias [width], summed before dx is rounded)."""
    dtype = compute_dtype(x)
    dx = d_out.to(dtype) * slope(x.to(dtype) + bias.to(dtype), activation)
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
