"""Fixed sine-cosine position embedding of a square grid."""

from __future__ import annotations

import torch
from torch import Tensor


def sincos_position_table(dim: int, side: int) -> Tensor:
    """Position embedding of every cell of a side x side grid; the column comes first.

        table[row * side + col] = [sin(col w), cos(col w), sin(row w), cos(row w)],  w_j = 10000^(-4 j / dim)

    Computed in fp64 and rounded once, so that the table is the same on every machine.

    Args:
        dim: width of an embedding, a multiple of 4; each part has dim / 4 entries.
        side: cells along one edge.

    Returns: [side * side, dim] fp32.
    Raises: ValueError if `dim` is no multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"sincos_position_table: dim must be a multiple of 4, got {dim}")
    quarter = dim // 4
    frequencies = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies  # [side, dim / 4]
    axis = torch.cat([angles.sin(), angles.cos()], dim=-1)  # [side, dim / 2]
    columns = axis[None].expand(side, -1, -1)  # [row, col, dim / 2]
    rows = axis[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], dim=-1).reshape(side * side, dim).to(torch.float32)
