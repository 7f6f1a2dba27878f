"""Attention over packed rows: one function, several back ends, no dense mask.

Rows of many samples lie one after another in one tensor; `Segments` says which query rows see which key rows.
How that is computed is an argument; `reca.layers.attention_backends` holds the back ends.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from reca.errors import nearest
from reca.layers.attention_backends import BACKENDS, choose_backend, pad_head_dim
from reca.profiling import span
from reca.types import TensorStruct


@dataclass(slots=True)
class Memo:
    """What back ends derived from the lengths (a block mask, a bias), made once and shared by all layers."""

    values: dict[Hashable, Any] = field(default_factory=dict)

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The value of `key`, made by `make` at the first call, and always inside a compiled region."""
        if torch.compiler.is_compiling():
            return make()
        if key not in self.values:
            self.values[key] = make()
        return self.values[key]


@dataclass(frozen=True, slots=True)
class Segments(TensorStruct):
    """Which packed rows see which: query segment i sees key segment i, whole or causally.

    Causal is aligned at the bottom right: the last query row sees every key of its segment, the row before
    it all but one. With equal lengths that is the usual triangle; with more keys, queries are the last rows.

    Attributes:
        query_lengths, key_lengths: rows of each segment, in the order they are packed; Python ints, so that
            no launch waits for the device. A segment may be empty.
        is_causal: whether every segment is causal (True) or fully visible (False).
        cu_query, cu_key: [segments + 1] int32, cumulative lengths from 0; they move with the batch.
        memo: what a back end derived from the lengths; never compared, never moved.
    """

    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    is_causal: bool
    cu_query: Tensor = field(repr=False, compare=False)
    cu_key: Tensor = field(repr=False, compare=False)
    memo: Memo = field(default_factory=Memo, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        query_lengths: Sequence[int],
        key_lengths: Sequence[int] | None = None,
        *,
        is_causal: bool = False,
    ) -> Self:
        """Segments of these lengths, on the CPU; `key_lengths` defaults to `query_lengths`.

        Raises:
            ValueError: if the lists differ in length, or some query row would see no key at all.
        """
        queries = tuple(query_lengths)
        keys = queries if key_lengths is None else tuple(key_lengths)
        if len(queries) != len(keys):
            raise ValueError(
                f"Segments: got {len(queries)} query and {len(keys)} key lengths; give one per segment"
            )
        for index, (rows_q, rows_k) in enumerate(zip(queries, keys, strict=True)):
            if rows_q < 0 or rows_k < 0:
                raise ValueError(f"Segments: lengths must be >= 0, segment {index} has {rows_q} and {rows_k}")
            if (rows_q and not rows_k) or (is_causal and rows_q > rows_k):
                raise ValueError(
                    f"Segments: segment {index} has {rows_q} queries, {rows_k} keys: a row would see nothing"
                    f"{' under a causal mask' if is_causal else ''}; drop those rows"
                )
        return cls(queries, keys, is_causal, _cumulative(queries), _cumulative(keys))

    @property
    def query_rows(self) -> int:
        """Rows of all query segments together."""
        return sum(self.query_lengths)

    @property
    def key_rows(self) -> int:
        """Rows of all key segments together."""
        return sum(self.key_lengths)


def _cumulative(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


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
