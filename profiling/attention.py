"""Attention of packed segments as one operator that has shapes only: what a counter sees of a GPU's kernel.

Torch's own operator for variable lengths takes them as a tensor, which has no values while a step is counted;
this one takes them as numbers. It allocates what the flash kernel of the second generation allocates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_LIBRARY: Any = torch.library.Library("reca_profiling", "DEF")  # type: ignore[no-untyped-call]
_LENGTHS = "int[] query_lengths, int[] key_lengths, bool is_causal"
_LIBRARY.define(f"attention(Tensor query, Tensor key, Tensor value, {_LENGTHS}) -> (Tensor, Tensor)")
_LIBRARY.define(
    "attention_backward(Tensor upstream, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
    f"{_LENGTHS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_ROUNDING = 128  # the backward pads every segment to a multiple of this in its fp32 query gradient


def segments_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
    is_causal: bool,
) -> Tensor:
    """The output's shape; query segment i sees key segment i, causal at the bottom right.

    Args:
        query: [rows_q, heads, dim], bf16 or fp16, without values.
        key, value: [rows_k, kv_heads, dim].
        query_lengths, key_lengths: rows of each segment.
        is_causal: whether every segment is causal.

    Returns: [rows_q, heads, dim]. The dispatcher refuses tensors with values.
    """
    lengths = [list(query_lengths), list(key_lengths), is_causal]
    out: Tensor = torch.ops.reca_profiling.attention(query, key, value, *lengths)[0]
    return out


def _fake(query: Tensor, key: Tensor, value: Tensor, *lengths: Any) -> tuple[Tensor, Tensor]:
    lse = query.new_empty((query.shape[1], query.shape[0]), dtype=torch.float32)
    return query.new_empty(query.shape), lse


def _fake_backward(
    upstream: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *lengths: Any
) -> tuple[Tensor, ...]:
    rows = query.shape[0] + _ROUNDING * len(lengths[0])
    wide = query.new_empty((rows, *query.shape[1:]), dtype=torch.float32)
    # Grouped heads are summed afterwards: the kernel writes keys and values for each query head.
    expanded = (2, key.shape[0], *query.shape[1:]) if is_grouped(query, key) else (0,)
    inputs = (tensor.new_empty(tensor.shape) for tensor in (query, key, value))
    return *inputs, wide, query.new_empty(expanded)


def is_grouped(query: Tensor, key: Tensor) -> bool:
    """Whether several query heads share a key head."""
    return query.shape[1] != key.shape[1]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.lengths = inputs[3:]


def _backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    found = torch.ops.reca_profiling.attention_backward(upstream, *ctx.saved_tensors, *ctx.lengths)
    return *found[:3], None, None, None


torch.library.register_fake("reca_profiling::attention", _fake, lib=_LIBRARY)
torch.library.register_fake("reca_profiling::attention_backward", _fake_backward, lib=_LIBRARY)
torch.library.register_autograd("reca_profiling::attention", _backward, setup_context=_save, lib=_LIBRARY)
