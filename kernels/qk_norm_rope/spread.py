"""The operator whose keys and values go to several attention calls at once; schemas, fakes, autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from reca.kernels._checks import check_dtype, check_same_device
from reca.kernels._library import Impl, define_op
from reca.kernels.qk_norm_rope import reference
from reca.kernels.qk_norm_rope.checks import check

_NAME = "qk_norm_rope"
_SHARED = (
    "Tensor? query_weight, Tensor? key_weight, Tensor? cos, Tensor? sin, int heads, int kv_heads, float eps"
)
_BIASES = "Tensor? query_bias, Tensor? key_bias"
MAX_CALLS = 2


def _cpu(qkv: Tensor, destinations: Tensor, places: int, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = reference.forward(qkv, *inputs)
    keys, values = (reference.spread(rows, destinations, places) for rows in (key, value))
    return query, keys, values


def _cuda(qkv: Tensor, destinations: Tensor, places: int, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    from reca.kernels.qk_norm_rope import kernel

    launcher: Any = kernel.forward
    _, keys, values = _fake(qkv, destinations, places, *inputs)
    written: tuple[Tensor, Tensor, Tensor] = launcher(
        qkv, *inputs, into=(keys, values, destinations.contiguous())
    )
    return written


def _fake(qkv: Tensor, destinations: Tensor, places: int, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    heads, kv_heads = inputs[4:6]
    dim = qkv.shape[1] // (heads + 2 * kv_heads)
    keys, values = (qkv.new_empty(places, kv_heads, dim) for _ in range(2))
    return qkv.new_empty(qkv.shape[0], heads, dim), keys, values


def _backward_cpu(
    d_query: list[Tensor],
    d_keys: list[Tensor],
    d_values: list[Tensor],
    qkv: Tensor,
    destinations: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    kv_heads: int,
    eps: float,
    with_dqkv: bool,
    with_dweight: bool,
    query_bias: Tensor | None,
    key_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    d_key, d_value = (reference.collected(pieces, destinations) for pieces in (d_keys, d_values))
    parameters = (query_weight, key_weight, cos, sin, heads, kv_heads, eps, query_bias, key_bias)
    d_qkv, *found = reference.backward(torch.cat(d_query), d_key, d_value, qkv, *parameters)
    sums = d_key.new_empty(0)
    if with_dweight:
        lines = [d.to(d_key.dtype) for d in found if d is not None]
        sums = torch.stack([torch.stack(lines[part::2]) for part in range(2)])
    return d_qkv if with_dqkv else qkv.new_empty(0), sums


def _backward_cuda(*inputs: Any) -> tuple[Tensor, Tensor]:
    from reca.kernels.qk_norm_rope import kernel

    launcher: Any = kernel.backward_of_pieces
    d_query, d_keys, d_values, qkv, destinations, *shared, query_bias, _ = inputs
    places = (query_bias, None, destinations.contiguous())
    d_qkv, sums = launcher(d_query, d_keys, d_values, qkv, *shared, *places)
    return d_qkv, sums.flatten(1, 2) if sums.dim() > 1 else sums


def _backward_fake(
    d_query: list[Tensor],
    d_keys: list[Tensor],
    d_values: list[Tensor],
    qkv: Tensor,
    destinations: Tensor,
    query_weight: Tensor | None,
    *inputs: Any,
) -> tuple[Tensor, Tensor]:
    with_dqkv, with_dweight, query_bias, _ = inputs[-4:]
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    width = 0 if query_weight is None else query_weight.shape[0]
    shape = (2, 1 if query_bias is None else 2, width) if with_dweight else (0,)
    return qkv.new_empty(qkv.shape if with_dqkv else (0,)), qkv.new_empty(shape, dtype=dtype)


_forward = define_op(
    f"{_NAME}_spread(Tensor qkv, Tensor destinations, int places, {_SHARED}, {_BIASES}, Tensor? experts,"
    " bool rounds_quotient) -> (Tensor query, Tensor keys, Tensor values)",
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
)
_backward = define_op(
    f"{_NAME}_spread_backward(Tensor[] d_query, Tensor[] d_keys, Tensor[] d_values, Tensor qkv,"
    f" Tensor destinations, {_SHARED}, bool with_dqkv, bool with_dweight, {_BIASES})"
    " -> (Tensor d_qkv, Tensor sums)",
    cpu=_backward_cpu,
    cuda=_backward_cuda,
    fake=_backward_fake,
)


class _Spread(torch.autograd.Function):
    """Inputs with a gradient first: qkv, two weights, two biases."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        qkv, query_weight, key_weight, query_bias, key_bias, cos, sin, destinations, *rest = inputs
        geometry, rounds_quotient, query_rows, key_rows = rest
        ctx.save_for_backward(*inputs[:8])
        ctx.geometry = geometry
        arguments = (query_weight, key_weight, cos, sin, *geometry, query_bias, key_bias, None)
        query, *stored = _forward(qkv, destinations, sum(key_rows), *arguments, rounds_quotient)
        return (*query.split(query_rows), *(piece for rows in stored for piece in rows.split(key_rows)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_outs: Tensor) -> tuple[Tensor | None, ...]:
        qkv, query_weight, key_weight, query_bias, key_bias, cos, sin, destinations = ctx.saved_tensors
        needed, calls = ctx.needs_input_grad[:5], len(d_outs) // 3
        pieces = [list(d_outs[i * calls : (i + 1) * calls]) for i in range(3)]
        need_parameters = query_weight is not None and any(needed[1:])
        arguments = (qkv, destinations, query_weight, key_weight, cos, sin, *ctx.geometry)
        d_qkv, sums = _backward(*pieces, *arguments, needed[0], need_parameters, query_bias, key_bias)
        gradients: list[Tensor | None] = [d_qkv if needed[0] else None]
        for index, parameter in enumerate((query_weight, key_weight, query_bias, key_bias)):
            line = sums[index % 2, index // 2].to(parameter.dtype) if needed[index + 1] else None
            gradients.append(line)
        return *gradients, *(None,) * 7


def qk_norm_rope_spread(
    qkv: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    destinations: Tensor,
    *,
    heads: int,
    kv_heads: int,
    eps: float,
    query_rows: Sequence[int],
    key_rows: Sequence[int],
    query_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    rounds_quotient: bool = False,
    impl: Impl = "auto",
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """`qk_norm_rope` for one or two attention calls whose queries see some of the same rows.

    What several segments see must lie once in each of them: keys and values are written to all their places
    in the pass that makes them, and the backward adds up what comes back in the pass that reads it.

    Args:
        qkv, query_weight, key_weight, cos, sin, heads, kv_heads, eps, query_bias, key_bias, rounds_quotient:
            as in `qk_norm_rope`, one expert.
        destinations: [rows, copies] int64, where each row's key and value lie among the key rows of the first
            call and then of the second; outside is nowhere. Every place must be named exactly once.
        query_rows: query rows of each call; they follow each other in `qkv`.
        key_rows: key rows of each call.
        impl: "auto" follows the device; "reference" is plain torch; "fused" is the Triton kernel.

    Returns: for each call (query [query rows, heads, dim], key and value [key rows, kv_heads, dim]),
        contiguous, in the dtype of qkv. Gradients of copies are summed in fp32 in the order of their columns.
    Raises: ValueError for shapes, devices, half a pair and "fused" off CUDA; TypeError for dtypes.
    Source: as `qk_norm_rope`.
    """
    weights = {"query_weight": query_weight, "key_weight": key_weight}
    biases = {"query_bias": query_bias, "key_bias": key_bias}
    check(qkv, weights, biases, {"cos": cos, "sin": sin}, heads, kv_heads, None, None, impl)
    query_rows, key_rows = list(query_rows), list(key_rows)
    _check_calls(qkv, destinations, query_rows, key_rows)
    if impl == "reference":
        shared = (query_weight, key_weight, cos, sin, heads, kv_heads, eps, query_bias, key_bias, None)
        query, *rows = reference.forward(qkv, *shared, rounds_quotient)
        keys, values = (reference.spread(part, destinations, sum(key_rows)) for part in rows)
        cut = ((query, query_rows), (keys, key_rows), (values, key_rows))
        pieces = tuple(piece for part, lengths in cut for piece in torch.split(part, lengths))
    else:
        trained = (qkv, query_weight, key_weight, query_bias, key_bias)
        geometry = ((heads, kv_heads, eps), rounds_quotient, query_rows, key_rows)
        pieces = _Spread.apply(*trained, cos, sin, destinations, *geometry)  # type: ignore[no-untyped-call]
    calls = len(query_rows)
    return list(zip(pieces[:calls], pieces[calls : 2 * calls], pieces[2 * calls :], strict=True))


def _check_calls(qkv: Tensor, destinations: Tensor, query_rows: list[int], key_rows: list[int]) -> None:
    if destinations.dim() != 2 or destinations.shape[0] != qkv.shape[0] or not destinations.shape[1]:
        raise ValueError(
            f"{_NAME}_spread: destinations must be [{qkv.shape[0]}, copies > 0], got"
            f" {list(destinations.shape)}; one line of places per row"
        )
    check_dtype(f"{_NAME}_spread", "destinations", destinations, (torch.int64,))
    check_same_device(f"{_NAME}_spread", {"qkv": qkv, "destinations": destinations})
    if not 0 < len(query_rows) == len(key_rows) <= MAX_CALLS or min(*query_rows, *key_rows) < 0:
        raise ValueError(
            f"{_NAME}_spread: query_rows and key_rows must be of 1 or {MAX_CALLS} calls, got {query_rows} and"
            f" {key_rows}; give the rows of each call"
        )
    if sum(query_rows) != qkv.shape[0]:
        raise ValueError(
            f"{_NAME}_spread: query_rows must sum to {qkv.shape[0]}, got {query_rows}; every row is a query"
        )
