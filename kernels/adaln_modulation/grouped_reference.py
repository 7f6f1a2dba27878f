"""The mathematics in plain torch where all rows of a group share a modulation; fp32 inside, fp64 for fp64.

summed_i = residual_i + delta_i                                          (rounded: it is the residual stream)
hat_id   = (summed_id - mean_i) rstd_i,    rstd_i = (mean_d (summed_id - mean_i)^2 + eps)^-1/2
out_id   = hat_id (1 + scale_gd) + shift_gd        for row i of group g  (rounded once)
gated_id = residual_id + gate_gd x_id

Gradients of shift, scale and gate are summed over the rows of their group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reca.kernels._checks import compute_dtype


def _spread(shared: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """[groups, dim] -> [rows, dim]."""
    return shared.to(dtype).repeat_interleave(rows // max(shared.shape[0], 1), dim=0, output_size=rows)


def _group_sums(rows: Tensor, groups: int) -> Tensor:
    return (
        rows.view(groups, -1, rows.shape[1]).sum(dim=1)
        if rows.numel()
        else rows.new_zeros(groups, rows.shape[1])
    )


def add(residual: Tensor, delta: Tensor | None) -> Tensor:
    """The residual stream, in the dtype of `residual`."""
    return residual if delta is None else (residual + delta).to(residual.dtype)


def forward(
    summed: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(out [rows, dim] in `dtype`; mean and rstd [rows] in the dtype of the arithmetic)."""
    wide = summed.to(compute_dtype(summed))
    mean = wide.mean(dim=1)
    centred = wide - mean[:, None]
    rstd = torch.rsqrt(centred.square().mean(dim=1) + eps)
    factor, offset = (_spread(shared, wide.shape[0], wide.dtype) for shared in (scale, shift))
    return (centred * rstd[:, None] * (1 + factor) + offset).to(dtype), mean, rstd


def backward(
    d_out: Tensor, d_summed: Tensor | None, summed: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """(dx [rows, dim], sums [groups, 2, dim] of d_shift and d_scale), in the dtype of the arithmetic."""
    wide, dtype = d_out.to(mean.dtype), mean.dtype
    hat = (summed.to(dtype) - mean[:, None]) * rstd[:, None]
    d_hat = wide * (1 + _spread(scale, hat.shape[0], dtype))
    slope = (d_hat * hat).mean(dim=1, keepdim=True)
    dx = rstd[:, None] * (d_hat - d_hat.mean(dim=1, keepdim=True) - hat * slope)
    if d_summed is not None:
        dx = dx + d_summed.to(dtype)
    groups = scale.shape[0]
    return dx, torch.stack([_group_sums(wide, groups), _group_sums(wide * hat, groups)], dim=1)


def gate_residual(x: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
    """[rows, dim] in the dtype of the residual, rounded once."""
    dtype = torch.promote_types(compute_dtype(x), compute_dtype(residual))
    return (residual.to(dtype) + _spread(gate, x.shape[0], dtype) * x.to(dtype)).to(residual.dtype)


def gate_backward(d_out: Tensor, x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """(dx like x, d_gate [groups, dim] in the dtype of the arithmetic)."""
    wide = d_out.to(compute_dtype(d_out))
    dx = (wide * _spread(gate, x.shape[0], wide.dtype)).to(x.dtype)
    return dx, _group_sums(wide * x.to(wide.dtype), gate.shape[0])
