"""The mathematics in plain torch; fp32 inside, fp64 for fp64 inputs.

hat_ncp = (x_ncp - mean_ng) / sqrt(var_ng + eps)      over the channels c of group g and all positions p
out_ncp = silu(weight_c hat_ncp + bias_c)             (rounded once)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from reca.kernels._checks import compute_dtype
from reca.kernels._library import without_autocast


@without_autocast
def forward(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, dtype: torch.dtype) -> Tensor:
    """The shape of `x`, in `dtype`."""
    wide = compute_dtype(x)
    if not x.numel():
        return x.to(dtype)
    normed = torch.group_norm(x.to(wide), groups, weight.to(wide), bias.to(wide), eps)
    return F.silu(normed).to(dtype)
