"""The mathematics in plain torch, forward and explicit backward; fp32 inside, fp64 for fp64 inputs.

n_j = weight_j x_j / sqrt(mean_j x_j^2 + eps)                              per head; query and key only
y_j = n_j cos_j - n_(j+r) sin_j,   y_(j+r) = n_(j+r) cos_j + n_j sin_j      for j < r = cos.shape[1]
y_j = n_j                                                                   for j >= 2 r
"""

from __future__ import annotations

import torch
from torch import Tensor

from reca.kernels._checks import compute_dtype


def _split(rows: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """query, key, value as [rows, heads, dim]."""
    by_head = rows.view(rows.shape[0], heads + 2 * kv_heads, rows.shape[1] // (heads + 2 * kv_heads))
    query, key, value = torch.tensor_split(by_head, (heads, heads + kv_heads), dim=1)
    return query, key, value


def _rotate(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """x [rows, heads, dim] turned by the angles of its row; the negative sine turns back."""
    if cos is None or sin is None:
        return x
    pairs = cos.shape[1]
    cos, sin = cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None]  # [rows, 1, pairs]
    first, second, rest = torch.tensor_split(x, (pairs, 2 * pairs), dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def _rstd(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)


def forward(
    qkv: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    kv_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """query [rows, heads, dim], key and value [rows, kv_heads, dim] in the dtype of qkv."""
    query, key, value = _split(qkv, heads, kv_heads)
    out = []
    for part, weight in ((query, query_weight), (key, key_weight)):
        wide = part.to(compute_dtype(qkv))
        if weight is not None:
            wide = wide * _rstd(wide, eps) * weight.to(wide.dtype)
        out.append(_rotate(wide, cos, sin).to(qkv.dtype).contiguous())
    return out[0], out[1], value.clone(memory_format=torch.contiguous_format)


def backward(
    d_query: Tensor,
    d_key: Tensor,
    d_value: Tensor,
    qkv: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    kv_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(d qkv, d query_weight, d key_weight); no weight, no gradient."""
    dtype = compute_dtype(qkv)
    query, key, _ = _split(qkv, heads, kv_heads)
    parts: list[Tensor] = []
    d_weights: list[Tensor | None] = []
    for part, weight, d_out in ((query, query_weight, d_query), (key, key_weight, d_key)):
        d_normed = _rotate(d_out.to(dtype), cos, None if sin is None else -sin)
        if weight is None:
            parts.append(d_normed.to(qkv.dtype))
            d_weights.append(None)
            continue
        wide = part.to(dtype)
        rstd = _rstd(wide, eps)
        hat, d_hat = wide * rstd, d_normed * weight.to(dtype)
        parts.append((rstd * (d_hat - hat * (d_hat * hat).mean(dim=-1, keepdim=True))).to(qkv.dtype))
        d_weights.append((d_normed * hat).sum(dim=(0, 1)).to(weight.dtype))
    d_qkv = torch.cat([*parts, d_value.to(qkv.dtype)], dim=1).flatten(1)
    return d_qkv, d_weights[0], d_weights[1]
