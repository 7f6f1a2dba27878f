"""The mathematics in plain torch, forward and explicit backward; fp32 inside, fp64 for fp64 inputs.

For every head h of every sample of L rows, with r = 1 / (1 - rate):
P_ij  = softmax_j(scale <q_i, k_j>),    lse_i = log sum_j exp(scale <q_i, k_j>)
M_ij  = r where uniform((h L + i) L + j) >= rate, else 0
out_i = sum_j M_ij P_ij v_j

delta_i = <d_out_i, out_i>                              (= sum_j P_ij M_ij <d_out_i, v_j>)
d_v_j   = sum_i M_ij P_ij d_out_i
dS_ij   = P_ij (M_ij <d_out_i, v_j> - delta_i)
d_q_i   = scale sum_j dS_ij k_j,        d_k_j = scale sum_i dS_ij q_i
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from reca.kernels._checks import compute_dtype
from reca.kernels._dropout import folded_words, keep_threshold
from reca.kernels._library import without_autocast


def factors(
    length: int, heads: int, sample: Tensor, step: Tensor, key: int, rate: float, dtype: torch.dtype
) -> Tensor:
    """M of one sample, [heads, length, length]."""
    count = heads * length * length
    blocks = torch.arange((count + 3) // 4, device=sample.device)
    words = folded_words(key, step, sample, blocks)[:count].view(heads, length, length)
    kept: Tensor = words >= keep_threshold(rate)
    return kept.to(dtype) / (1 - rate)


def _samples(
    qkv: Tensor, lengths: Sequence[int], samples: Tensor, step: Tensor, key: int, rate: float
) -> Iterator[tuple[slice, tuple[Tensor, ...], Tensor]]:
    """(its rows, query, key and value [heads, length, dim], M) of every sample."""
    start = 0
    for index, length in enumerate(lengths):
        rows = slice(start, start + length)
        heads = qkv[rows].to(compute_dtype(qkv)).permute(1, 2, 0, 3).unbind(0)
        kept = factors(length, qkv.shape[2], samples[index], step, key, rate, heads[0].dtype)
        yield rows, heads, kept
        start += length


@without_autocast
def forward(
    qkv: Tensor,
    cu_lengths: Tensor,
    lengths: Sequence[int],
    samples: Tensor,
    step: Tensor,
    key: int,
    rate: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Out [rows, heads, dim] in the dtype of qkv, lse [heads, rows] in the dtype of the arithmetic."""
    outs, lses = [], []
    for _, (query, keys, values), kept in _samples(qkv, lengths, samples, step, key, rate):
        scores = scale * query @ keys.mT
        outs.append(((scores.softmax(dim=-1) * kept) @ values).transpose(0, 1))
        lses.append(scores.logsumexp(dim=-1))
    return torch.cat(outs).to(qkv.dtype), torch.cat(lses, dim=1)


def backward(
    d_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_lengths: Tensor,
    lengths: Sequence[int],
    samples: Tensor,
    step: Tensor,
    key: int,
    rate: float,
    scale: float,
) -> Tensor:
    """d_qkv [rows, 3, heads, dim] in the dtype of qkv."""
    parts = []
    for rows, (query, keys, values), kept in _samples(qkv, lengths, samples, step, key, rate):
        d_rows, out_rows = (rows_[rows].to(query.dtype).transpose(0, 1) for rows_ in (d_out, out))
        probability = torch.exp(scale * query @ keys.mT - lse[:, rows, None])
        delta = (d_rows * out_rows).sum(dim=-1, keepdim=True)
        d_scores = scale * probability * (kept * (d_rows @ values.mT) - delta)
        d_heads = (d_scores @ keys, d_scores.mT @ query, (kept * probability).mT @ d_rows)
        parts.append(torch.stack(d_heads).permute(2, 0, 1, 3))
    return torch.cat(parts).to(qkv.dtype)
