"""Which packed rows see which: lengths of segments, and what back ends derive from them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

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
