"""Attention over packed rows: one function, several back ends, no dense mask.

Rows of many samples lie one after another in one tensor; `Segments` says which query rows see which key rows.
How that is computed is an argument; `reca.layers.attention_backends` holds the back ends.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from reca.errors import nearest
from reca.layers.attention_backends import BACKENDS, choose_backend, pad_head_dim
from reca.layers.segments import Segments
from reca.profiling import span


@span("attention")
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention of packed rows, each query row over the keys its segment shows it.

        out_ih = sum_j softmax_j(scale * <query_ih, key_jg>) value_jg      with g = h // (heads / kv_heads)

    Args:
        query: [rows_q, heads, dim].
        key, value: [rows_k, kv_heads, dim]; heads must be a multiple of kv_heads (grouped-query attention).
        segments: lengths that sum to rows_q and rows_k, on the device of `query`.
        scale: factor before the softmax; dim ** -0.5 if None.
        backend: "auto" or a key of `BACKENDS`. A named back end runs or raises; it is never replaced.

    Returns: [rows_q, heads, dim] in the dtype of `query`.
    Raises: ValueError if shapes disagree, the back end is unknown, or it cannot run these tensors.
    Source: arXiv 1706.03762, eq. 1; arXiv 2305.13245 for the grouping.
    """
    _check_shapes(query, key, value, segments)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if not query.shape[0]:
        return query.clone()
    needs_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    chosen = BACKENDS[choose_backend(backend, query.device, query.dtype, query.shape[-1], needs_grad)]
    dim = query.shape[-1]
    query, key, value = (pad_head_dim(rows, chosen.head_dim_multiple) for rows in (query, key, value))
    return chosen.run(query, key, value, segments, scale)[..., :dim]


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if query.dim() != 3 or key.dim() != 3 or key.shape != value.shape or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"attention: query must be [rows_q, heads, dim], key, value [rows_k, kv_heads, dim], got {shapes}"
        )
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"attention: heads must be a multiple of kv_heads, got {shapes}")
    if query.dtype != key.dtype or query.dtype != value.dtype:
        raise ValueError(
            f"attention: query, key, value must share a dtype, got {query.dtype}, {key.dtype}, {value.dtype}"
        )
    if query.shape[0] != segments.query_rows or key.shape[0] != segments.key_rows:
        raise ValueError(
            f"attention: segments hold {segments.query_rows} queries, {segments.key_rows} keys, got {shapes}"
        )


def set_attention_backend(model: nn.Module, name: str) -> None:
    """Make every module of `model` that holds an `attention_backend` use back end `name`.

    Raises: ValueError if `name` is neither "auto" nor a back end; whether it can run shows at the first call.
    """
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"attention: unknown back end {name!r}; {nearest(name, ['auto', *BACKENDS])}")
    for module in model.modules():
        if hasattr(module, "attention_backend"):
            module.attention_backend = cast(Any, name)
