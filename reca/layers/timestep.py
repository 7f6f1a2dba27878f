"""Sinusoidal features of the diffusion time."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def timestep_features(time: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Cosines, then sines, of the time at geometrically spaced frequencies.

        features = [cos(time f_k), sin(time f_k)],    f_k = max_period^(-k / half),  k < half = dim / 2

    The time is used as it is: a model whose time runs to 1000 passes it in that unit.

    Args:
        time: [n], fp32 (other dtypes are widened first).
        dim: number of features, even.
        max_period: the frequencies fall from 1 towards 1 / max_period.

    Returns: [n, dim] fp32.
    Raises: ValueError if `dim` is odd.
    """
    if dim % 2:
        raise ValueError(f"timestep_features: dim must be even, got {dim}")
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=time.device) / half
    angles = time.to(torch.float32)[:, None] * torch.exp(-math.log(max_period) * exponent)  # [n, half]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
