"""Rotary position embedding, rotate-half form."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_table(
    positions: Tensor, dim: int, theta: float = 10000.0, rounded_to: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotation angles.

        angle_pi = positions_p * theta^(-2 i / dim)      for i < dim / 2

    Args:
        positions: [rows], integers or floats; need not be sorted or distinct.
        dim: number of rotated dimensions, even.
        theta: base of the frequencies.
        rounded_to: dtype in which the angles' cosines and sines are known: that of the activations, because
            bf16 checkpoints were trained with a rounded table.

    Returns: (cos, sin), each [rows, dim / 2] fp32 on the device of `positions`.
    Raises: ValueError if `dim` is odd.
    Source: arXiv 2104.09864, eq. 15.
    """
    if dim % 2:
        raise ValueError(f"rotary_table: dim must be even, got {dim}")
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim
    angles = positions.to(torch.float32)[:, None] * theta**-exponent  # [rows, dim / 2]
    cos, sin = (table.to(rounded_to).to(torch.float32) for table in (angles.cos(), angles.sin()))
    return cos, sin


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first r dimensions of every head, i paired with i + r/2, where r = 2 * cos.shape[1].

        y_i = x_i cos_i - x_(i + r/2) sin_i,    y_(i + r/2) = x_(i + r/2) cos_i + x_i sin_i

    Args:
        x: [rows, heads, dim]; with r < dim (partial rotary) the dimensions from r on pass unchanged.
        cos, sin: [rows, r / 2] of `rotary_table`; cast to the dtype of x, which is that of the rotation.

    Returns: [rows, heads, dim] in the dtype of x.
    Raises: ValueError if the table has another number of rows, or is wider than a head.
    """
    half = cos.shape[1]
    if cos.shape != sin.shape or cos.shape[0] != x.shape[0] or 2 * half > x.shape[-1]:
        raise ValueError(
            f"apply_rotary: cos and sin must be [{x.shape[0]}, at most {x.shape[-1] // 2}] for x "
            f"{tuple(x.shape)}, got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    cos, sin = cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None]  # [rows, 1, r / 2]
    first, second, rest = torch.split(x, [half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
