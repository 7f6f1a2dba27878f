"""The mathematics in plain torch, forward and explicit backward; fp32 inside, fp64 for fp64 inputs.

q, k      = relu(query), relu(key)
state     = sum_j k_j v_j^T,    norm = sum_j k_j             (the norm is the column of a value that is 1)
out_i     = state^T q_i / (q_i . norm + eps)                 (rounded once)

d_num_i   = d_out_i / (q_i . norm + eps),    d_den_i = -d_num_i . out_i
d_q_i     = state d_num_i + d_den_i norm                     (where query > 0)
d_state   = sum_i q_i d_num_i^T,    d_norm = sum_i d_den_i q_i
d_k_j     = d_state v_j + d_norm                             (where key > 0)
d_v_j     = d_state^T k_j
"""

from __future__ import annotations

import torch
from torch import Tensor

from reca.kernels._checks import compute_dtype
from reca.kernels._library import without_autocast


def _heads(tensor: Tensor) -> Tensor:
    """[images, heads, tokens, dim] in the dtype of the arithmetic."""
    return tensor.to(compute_dtype(tensor)).transpose(1, 2)


def _rows(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.transpose(1, 2).to(like.dtype).contiguous()


@without_autocast
def forward(query: Tensor, key: Tensor, value: Tensor, eps: float) -> Tensor:
    """[images, tokens, heads, dim] in the dtype of query."""
    q, k = torch.relu(_heads(query)), torch.relu(_heads(key))
    numerator = q @ (k.mT @ _heads(value))
    denominator = q @ k.sum(dim=2)[..., None] + eps
    return _rows(numerator / denominator, query)


def backward(
    d_out: Tensor, query: Tensor, key: Tensor, value: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_query, d_key, d_value), each in the dtype of query."""
    wide_query, wide_key, v = _heads(query), _heads(key), _heads(value)
    q, k = torch.relu(wide_query), torch.relu(wide_key)
    state, norm = k.mT @ v, k.sum(dim=2)[..., None]  # [images, heads, dim, dim or 1]
    denominator = q @ norm + eps
    d_numerator = _heads(d_out) / denominator
    d_denominator = -(d_numerator * ((q @ state) / denominator)).sum(dim=3, keepdim=True)
    d_q = d_numerator @ state.mT + d_denominator @ norm.mT
    d_state, d_norm = q.mT @ d_numerator, q.mT @ d_denominator
    d_k = v @ d_state.mT + d_norm.mT
    return _rows(d_q * (wide_query > 0), query), _rows(d_k * (wide_key > 0), query), _rows(k @ d_state, query)
