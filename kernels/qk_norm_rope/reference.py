"""The mathematics in plain torch, forward and explicit backward; fp32 inside, fp64 for fp64 inputs.

n_j = weight_j x_j / sqrt(mean_j x_j^2 + eps)                              per head; query and key only
n_j = weight_j (x_j - mean_j x_j) / sqrt(var_j x_j + eps) + bias_j         instead, where there are biases
y_j = n_j cos_j - n_(j+r) sin_j,   y_(j+r) = n_(j+r) cos_j + n_j sin_j      for j < r = cos.shape[1]
y_j = n_j                                                                   for j >= 2 r

A quotient that is rounded is cast to the dtype of x before it meets the weight; the backward does not see it.
With experts, weights and biases are those that each row names; one that does not exist is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reca.kernels._checks import compute_dtype
from reca.kernels._experts import sum_by_expert, weight_rows


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


def _standardise(x: Tensor, eps: float, is_centered: bool) -> tuple[Tensor, Tensor]:
    """(x over its root mean square or standard deviation, that scale)."""
    if is_centered:
        x = x - x.mean(dim=-1, keepdim=True)
    rstd = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    return x * rstd, rstd


def _per_head(weight: Tensor, experts: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[dim], or [rows, 1, dim] with experts."""
    rows = weight_rows(weight, experts, dtype)
    return rows if experts is None else rows[:, None]


def forward(
    qkv: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    kv_heads: int,
    eps: float,
    query_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    experts: Tensor | None = None,
    rounds_quotient: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """query [rows, heads, dim], key and value [rows, kv_heads, dim] in the dtype of qkv."""
    query, key, value = _split(qkv, heads, kv_heads)
    out = []
    for part, weight, bias in ((query, query_weight, query_bias), (key, key_weight, key_bias)):
        wide = part.to(compute_dtype(qkv))
        if weight is not None:
            hat, _ = _standardise(wide, eps, bias is not None)
            if rounds_quotient:
                hat = hat.to(qkv.dtype).to(wide.dtype)
            wide = hat * _per_head(weight, experts, wide.dtype)
        if bias is not None:
            wide = wide + _per_head(bias, experts, wide.dtype)
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
    query_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    experts: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(d qkv, d query_weight, d key_weight, d query_bias, d key_bias); no weight, no gradient."""
    dtype = compute_dtype(qkv)
    query, key, _ = _split(qkv, heads, kv_heads)
    parts: list[Tensor] = []
    d_weights: list[Tensor | None] = []
    d_biases: list[Tensor | None] = []
    for part, weight, bias, d_out in (
        (query, query_weight, query_bias, d_query),
        (key, key_weight, key_bias, d_key),
    ):
        d_normed = _rotate(d_out.to(dtype), cos, None if sin is None else -sin)
        if weight is None:
            parts.append(d_normed.to(qkv.dtype))
            d_weights.append(None)
            d_biases.append(None)
            continue
        hat, rstd = _standardise(part.to(dtype), eps, bias is not None)
        d_hat = d_normed * _per_head(weight, experts, dtype)
        d_part = d_hat - hat * (d_hat * hat).mean(dim=-1, keepdim=True)
        if bias is not None:
            d_part = d_part - d_hat.mean(dim=-1, keepdim=True)
        parts.append((rstd * d_part).to(qkv.dtype))
        lines = weight.shape[0]
        d_weights.append(sum_by_expert((d_normed * hat).sum(dim=1), experts, lines).to(weight.dtype))
        d_biases.append(
            None if bias is None else sum_by_expert(d_normed.sum(dim=1), experts, lines).to(bias.dtype)
        )
    d_qkv = torch.cat([*parts, d_value.to(qkv.dtype)], dim=1).flatten(1)
    return d_qkv, *d_weights, *d_biases  # type: ignore[return-value]


def placed(buffer: Tensor, rows: Tensor, destinations: Tensor) -> Tensor:
    """A copy of `buffer` [places, ...] with `rows` at their destinations; those outside are nowhere."""
    places = buffer.shape[0]
    inside = (destinations >= 0) & (destinations < places)
    # One place more takes what is outside, so that nothing depends on how many there are.
    wider = torch.cat([buffer, buffer.new_zeros(1, *buffer.shape[1:])])
    return wider.index_copy(0, torch.where(inside, destinations, places), rows)[:places]


def taken(buffer: Tensor, destinations: Tensor) -> Tensor:
    """Row by row what lies at its destination; zeros where that is outside."""
    inside = (destinations >= 0) & (destinations < buffer.shape[0])
    wider = torch.cat([buffer, buffer.new_zeros(1, *buffer.shape[1:])])
    return wider.index_select(0, torch.where(inside, destinations, buffer.shape[0]))


def without(buffer: Tensor, destinations: Tensor) -> Tensor:
    """A copy of `buffer` with zeros at the destinations."""
    return placed(buffer, buffer.new_zeros(destinations.shape[0], *buffer.shape[1:]), destinations)


def spread(rows: Tensor, destinations: Tensor, places: int) -> Tensor:
    """[places, ...]: each row at all of its destinations [rows, copies]; outside is nowhere."""
    inside = (destinations >= 0) & (destinations < places)
    targets = torch.where(inside, destinations, places).flatten()
    numbers = torch.arange(rows.shape[0], device=rows.device).repeat_interleave(destinations.shape[1])
    sources = numbers.new_zeros(places + 1).index_copy(0, targets, numbers)
    return rows.index_select(0, sources[:places])


def collected(pieces: Sequence[Tensor], destinations: Tensor) -> Tensor:
    """The gradient of `spread` from [places, ...] in pieces: the sum over the copies, in their order."""
    buffer = torch.cat([piece.to(compute_dtype(piece)) for piece in pieces])
    copies = (taken(buffer, column) for column in destinations.unbind(dim=1))
    return torch.stack([*copies]).sum(dim=0)
