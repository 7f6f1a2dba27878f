# mypy: disable-error-code="import-untyped, no-untyped-def, no-untyped-call, untyped-decorator"
"""Triton: where the keys and values of a row lie: at the row itself, at one given place or at several.

Gradients may come in two pieces, those of two attention calls.
"""

from __future__ import annotations

import triton
import triton.language as tl

from reca.kernels._triton import load_head, store_head


@triton.jit
def place_of(destinations_ptr, rows, inside, total, COPY, COPIES: tl.constexpr):
    """(where one copy of each row lies, whether it lies anywhere)."""
    places = tl.load(destinations_ptr + rows * COPIES + COPY, mask=inside, other=-1)
    return places, inside & (places >= 0) & (places < total)


@triton.jit
def _piece(
    base_ptr,
    other_ptr,
    places,
    stored,
    bound,
    offset,
    LINE: tl.constexpr,
    PIECES: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    HALF: tl.constexpr,
    TAIL: tl.constexpr,
):
    """One head of each place; with two pieces, places from `bound` on lie in the second one."""
    line = base_ptr + places * LINE
    if PIECES > 1:
        line = tl.where(places < bound, line, other_ptr + (places - bound) * LINE)
    return load_head(line + offset, stored, PAIRS, REST, HALF, TAIL)


@triton.jit
def collected_head(
    base_ptr,
    other_ptr,
    destinations_ptr,
    rows,
    inside,
    places,
    stored,
    total,
    bound,
    offset,
    LINE: tl.constexpr,
    COPIES: tl.constexpr,
    PIECES: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    HALF: tl.constexpr,
    TAIL: tl.constexpr,
):
    """The gradient of a head, summed over its copies in their order."""
    first, second, rest = _piece(
        base_ptr, other_ptr, places, stored, bound, offset, LINE, PIECES, PAIRS, REST, HALF, TAIL
    )
    for copy in tl.static_range(1, COPIES):
        more, found = place_of(destinations_ptr, rows, inside, total, copy, COPIES)
        more_first, more_second, more_rest = _piece(
            base_ptr, other_ptr, more, found, bound, offset, LINE, PIECES, PAIRS, REST, HALF, TAIL
        )
        first += more_first
        second += more_second
        rest += more_rest
    return first, second, rest


@triton.jit
def store_copies(
    out_ptr,
    destinations_ptr,
    first,
    second,
    rest,
    rows,
    inside,
    places,
    writable,
    total,
    offset,
    LINE: tl.constexpr,
    COPIES: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    HALF: tl.constexpr,
    TAIL: tl.constexpr,
):
    """A head of each row to all of its places."""
    line = out_ptr + places * LINE + offset
    store_head(line, first, second, rest, writable, PAIRS, REST, HALF, TAIL)
    for copy in tl.static_range(1, COPIES):
        more, found = place_of(destinations_ptr, rows, inside, total, copy, COPIES)
        line = out_ptr + more * LINE + offset
        store_head(line, first, second, rest, found, PAIRS, REST, HALF, TAIL)


@triton.jit
def spread_heads(
    source_ptr,
    out_ptr,
    destinations_ptr,
    rows,
    inside,
    places,
    writable,
    total,
    HEADS: tl.constexpr,
    COPIES: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    HALF: tl.constexpr,
    TAIL: tl.constexpr,
):
    """The heads of each row as they are, to all of its places."""
    DIM: tl.constexpr = 2 * PAIRS + REST
    for head in range(HEADS):
        first, second, rest = load_head(source_ptr + head * DIM, inside, PAIRS, REST, HALF, TAIL)
        store_copies(
            out_ptr, destinations_ptr, first, second, rest, rows, inside, places, writable, total,
            head * DIM, HEADS * DIM, COPIES, PAIRS, REST, HALF, TAIL,
        )  # fmt: skip


@triton.jit
def collect_heads(
    d_out_ptr,
    d_other_ptr,
    d_source_ptr,
    destinations_ptr,
    rows,
    inside,
    places,
    stored,
    total,
    bound,
    HEADS: tl.constexpr,
    COPIES: tl.constexpr,
    PIECES: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    HALF: tl.constexpr,
    TAIL: tl.constexpr,
):
    """The gradient of `spread_heads`; where a row has no place, zero."""
    DIM: tl.constexpr = 2 * PAIRS + REST
    for head in range(HEADS):
        first, second, rest = collected_head(
            d_out_ptr, d_other_ptr, destinations_ptr, rows, inside, places, stored, total, bound,
            head * DIM, HEADS * DIM, COPIES, PIECES, PAIRS, REST, HALF, TAIL,
        )  # fmt: skip
        store_head(d_source_ptr + head * DIM, first, second, rest, inside, PAIRS, REST, HALF, TAIL)
