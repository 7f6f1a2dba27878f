"""The mathematics in plain torch, forward and explicit backward; fp32 inside, fp64 for fp64 inputs.

product = silu(gate) * up,    silu(g) = g s,    s = 1 / (1 + exp(-g))
d_gate  = d_product up s (1 + g (1 - s)),    d_up = d_product g s
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from reca.kernels._checks import compute_dtype


def forward(gate_up: Tensor) -> Tensor:
    """[..., inner] in the dtype of gate_up [..., 2 * inner], gate first."""
    gate, up = gate_up.to(compute_dtype(gate_up)).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def backward(d_product: Tensor, gate_up: Tensor) -> Tensor:
    """d gate_up, [..., 2 * inner]."""
    dtype = compute_dtype(gate_up)
    gate, up = gate_up.to(dtype).chunk(2, dim=-1)
    wide = d_product.to(dtype)
    d_gate = torch.ops.aten.silu_backward(wide * up, gate)
    return torch.cat([d_gate, wide * F.silu(gate)], dim=-1).to(gate_up.dtype)
