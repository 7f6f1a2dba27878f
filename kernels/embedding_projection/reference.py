"""The mathematics in plain torch, forward and explicit backward; fp32 inside, fp64 for fp64 inputs.

projected = fc2(activation(fc1(norm(features))))             without the last bias
embedded_i = projected_i + bias + position[position_ids_i]

source_r = the last i with rows_i = r, -1 if there is none
out_r    = embedded_(source_r), or destination_r where source_r = -1            (rounded once)

d_projected_i = d_out_(rows_i) where source_(rows_i) = i, else 0;    d_bias = sum_i d_projected_i
d_destination_r = d_out_r where source_r = -1, else 0

An index of `rows` out of range makes `tokens`, which is no token, the source of the nearest row: NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reca.kernels._checks import compute_dtype
from reca.kernels.flow_input.reference import pick


def sources(rows: Tensor, total: int) -> Tensor:
    """[total] int32: which of the tokens [n] lies in each row; -1 for none, n for an index out of range."""
    tokens = rows.shape[0]
    source = rows.new_full((total,), -1, dtype=torch.int32)
    if total == 0:
        return source
    inside = (rows >= 0) & (rows < total)
    token = torch.arange(tokens, dtype=torch.int32, device=rows.device)
    token = torch.where(inside, token, tokens)
    # The largest wins whatever the order of the writes, so equal rows are settled and runs agree.
    return source.scatter_reduce(0, rows.clamp(0, total - 1), token, "amax")


def place(
    projected: Tensor,
    bias: Tensor,
    position: Tensor | None,
    position_ids: Tensor | None,
    destination: Tensor | None,
    source: Tensor | None,
) -> Tensor:
    """[rows, width] in the dtype of the destination, or [tokens, width] in that of `projected`."""
    dtype = compute_dtype(projected)
    embedded = projected.to(dtype) + bias.to(dtype)
    if position is not None and position_ids is not None:
        embedded = embedded + pick(position.to(dtype), position_ids)
    if destination is None or source is None:
        return embedded.to(projected.dtype)
    missing = embedded.new_full((1, embedded.shape[1]), torch.nan)
    tokens, index = projected.shape[0], source.long()
    placed = torch.cat([embedded, missing])[torch.where(index < 0, tokens, index)]
    return torch.where((index < 0)[:, None], destination, placed.to(destination.dtype))


def place_backward(d_out: Tensor, bias: Tensor, rows: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """(d_projected [tokens, width] in the dtype of the bias, d_bias [width])."""
    total = d_out.shape[0]
    inside = (rows >= 0) & (rows < total)
    token = torch.arange(rows.shape[0], device=rows.device)
    # One row past the end stands for all indices out of range: nobody's source, and no gradient.
    found = torch.cat([source, source.new_full((1,), -1)])[torch.where(inside, rows, total)]
    wide = torch.cat([d_out.to(compute_dtype(bias)), d_out.new_zeros(1, d_out.shape[1])])
    d_projected = wide[torch.where(found == token, rows, total)]
    return d_projected.to(bias.dtype), d_projected.sum(dim=0).to(bias.dtype)
