"""Schemas, fakes, autograd and the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from reca.kernels._library import Impl, define_op
from reca.kernels.qk_norm_rope import reference
from reca.kernels.qk_norm_rope.checks import check

_NAME = "qk_norm_rope"


def _cuda(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    from reca.kernels.qk_norm_rope import kernel

    return kernel.forward(*inputs)


def _shapes(qkv: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, dim = qkv.shape[0], qkv.shape[1] // (heads + 2 * kv_heads)
    key, value = (qkv.new_empty(rows, kv_heads, dim) for _ in range(2))
    return qkv.new_empty(rows, heads, dim), key, value


def _fake(qkv: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _shapes(qkv, inputs[4], inputs[5])


def _into_cpu(qkv: Tensor, keys: Tensor, values: Tensor, destinations: Tensor, *inputs: Any) -> Tensor:
    query, key, value = reference.forward(qkv, *inputs)
    keys.copy_(reference.placed(keys, key, destinations))
    values.copy_(reference.placed(values, value, destinations))
    return query


def _into_cuda(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    destinations: Tensor,
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
) -> Tensor:
    from reca.kernels.qk_norm_rope import kernel

    parameters = (query_weight, key_weight, cos, sin, heads, kv_heads, eps, query_bias, key_bias, experts)
    return kernel.forward(qkv, *parameters, rounds_quotient, into=(keys, values, destinations))[0]


def _into_fake(qkv: Tensor, keys: Tensor, values: Tensor, destinations: Tensor, *inputs: Any) -> Tensor:
    return _shapes(qkv, inputs[4], inputs[5])[0]


def _backward_cpu(
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
    with_dqkv: bool,
    with_dweight: bool,
    query_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    experts: Tensor | None = None,
    destinations: Tensor | None = None,
) -> tuple[Tensor, ...]:
    if destinations is not None:
        d_key, d_value = (reference.taken(buffer, destinations) for buffer in (d_key, d_value))
    parameters = (query_weight, key_weight, cos, sin, heads, kv_heads, eps, query_bias, key_bias, experts)
    d_qkv, *d_parameters = reference.backward(d_query, d_key, d_value, qkv, *parameters)
    kept = [d if with_dweight and d is not None else qkv.new_empty(0) for d in d_parameters]
    return d_qkv if with_dqkv else qkv.new_empty(0), *kept


def _backward_cuda(*inputs: Any) -> tuple[Tensor, ...]:
    from reca.kernels.qk_norm_rope import kernel

    return kernel.backward(*inputs)


def _backward_fake(
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
    with_dqkv: bool,
    with_dweight: bool,
    query_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    experts: Tensor | None = None,
    destinations: Tensor | None = None,
) -> tuple[Tensor, ...]:
    d_parameters = [
        tensor.new_empty(tensor.shape) if tensor is not None and with_dweight else qkv.new_empty(0)
        for tensor in (query_weight, key_weight, query_bias, key_bias)
    ]
    return qkv.new_empty(qkv.shape if with_dqkv else (0,)), *d_parameters


_SHARED = (
    "Tensor? query_weight, Tensor? key_weight, Tensor? cos, Tensor? sin, int heads, int kv_heads, float eps"
)
_ADDED = "Tensor? query_bias=None, Tensor? key_bias=None, Tensor? experts=None"
_forward = define_op(
    f"{_NAME}(Tensor qkv, {_SHARED}, {_ADDED}, bool rounds_quotient=False)"
    " -> (Tensor query, Tensor key, Tensor value)",
    cpu=reference.forward,
    cuda=_cuda,
    fake=_fake,
)
_forward_into = define_op(
    f"{_NAME}_into(Tensor qkv, Tensor(a!) keys, Tensor(b!) values, Tensor destinations,"
    f" {_SHARED}, {_ADDED}, bool rounds_quotient=False) -> Tensor query",
    cpu=_into_cpu,
    cuda=_into_cuda,
    fake=_into_fake,
)
_backward = define_op(
    f"{_NAME}_backward(Tensor d_query, Tensor d_key, Tensor d_value, Tensor qkv, {_SHARED},"
    f" bool with_dqkv, bool with_dweight, {_ADDED}, Tensor? destinations=None)"
    " -> (Tensor d_qkv, Tensor d_query_weight, Tensor d_key_weight, Tensor d_query_bias, Tensor d_key_bias)",
    cpu=_backward_cpu,
    cuda=_backward_cuda,
    fake=_backward_fake,
)


def _gradients(
    ctx: Any, saved: tuple[Any, ...], d_outs: tuple[Tensor, ...], destinations: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Of qkv, query_weight, key_weight, query_bias, key_bias: those that are needed."""
    qkv, query_weight, key_weight, query_bias, key_bias, cos, sin, experts = saved
    needed = ctx.needs_input_grad[:5]
    need_parameters = query_weight is not None and any(needed[1:])
    arguments = (qkv, query_weight, key_weight, cos, sin, *ctx.geometry, needed[0], need_parameters)
    gradients = _backward(*d_outs, *arguments, query_bias, key_bias, experts, destinations)
    return tuple(d if need else None for d, need in zip(gradients, needed, strict=True))


class _QkNormRope(torch.autograd.Function):
    """Inputs with a gradient first: qkv, two weights, two biases."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        qkv, query_weight, key_weight, query_bias, key_bias, cos, sin, experts, *rest = inputs
        heads, kv_heads, eps, rounds_quotient = rest
        ctx.save_for_backward(*inputs[:8])
        ctx.geometry = (heads, kv_heads, eps)
        arguments = (query_weight, key_weight, cos, sin, *ctx.geometry, query_bias, key_bias, experts)
        query, key, value = _forward(qkv, *arguments, rounds_quotient)
        return query, key, value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_outs: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, ctx.saved_tensors, d_outs, None), *(None,) * 7


class _QkNormRopeInto(torch.autograd.Function):
    """As above, then the two buffers and the destinations; the buffers come back written."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        qkv, query_weight, key_weight, query_bias, key_bias, cos, sin, experts, *rest = inputs
        heads, kv_heads, eps, rounds_quotient, keys, values, destinations = rest
        ctx.save_for_backward(*inputs[:8], destinations)
        ctx.geometry = (heads, kv_heads, eps)
        arguments = (query_weight, key_weight, cos, sin, *ctx.geometry, query_bias, key_bias, experts)
        query = _forward_into(qkv, keys, values, destinations, *arguments, rounds_quotient)
        ctx.mark_dirty(keys, values)
        return query, keys, values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_query: Tensor, d_keys: Tensor, d_values: Tensor) -> tuple[Tensor | None, ...]:
        *saved, destinations = ctx.saved_tensors  # unpacked once: recomputation allows no second time
        gradients = _gradients(ctx, tuple(saved), (d_query, d_keys, d_values), destinations)
        need_keys, need_values = ctx.needs_input_grad[12:14]
        # What was overwritten has no gradient any more.
        past_keys = reference.without(d_keys, destinations) if need_keys else None
        past_values = reference.without(d_values, destinations) if need_values else None
        return *gradients, *(None,) * 7, past_keys, past_values, None


def qk_norm_rope(
    qkv: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    heads: int,
    kv_heads: int,
    eps: float,
    query_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    experts: Tensor | None = None,
    rounds_quotient: bool = False,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of one fused projection to attention layout: per-head norm and rotation of query and key.

        n_j = weight_j x_j / sqrt(mean_j x_j^2 + eps)                             RMSNorm
        n_j = weight_j (x_j - mean_j x_j) / sqrt(var_j x_j + eps) + bias_j        LayerNorm, with biases
        y_j = n_j cos_j - n_(j+r) sin_j,   y_(j+r) = n_(j+r) cos_j + n_j sin_j    for j < r
        y_j = n_j                                                                 for j >= 2 r

    Args:
        qkv: [rows, (heads + 2 kv_heads) dim], floating; heads of query, key, value in this order.
        query_weight, key_weight: [dim], floating; both None: no norm. With `experts`, [num_experts, dim].
        cos, sin: [rows, r] fp32, 2 r <= dim; both None: no rotation. No gradient.
        heads, kv_heads: heads of the query; of key and value. One of them may be 0: its outputs are empty.
        eps: added to the mean square, or to the variance.
        query_bias, key_bias: shaped like the weights; with them the norm is a LayerNorm.
        experts: [rows] int32, the line of weights and biases that each row uses. Where there is no such line,
            query, key and their gradients are NaN; the gradients of the weights are not touched.
        rounds_quotient: cast the quotient to the dtype of qkv before the weight multiplies it, as the
            published language models do; their bf16 checkpoints were trained with that rounding.
        into: (keys, values, destinations): two buffers [places, kv_heads, dim], contiguous, that are written
            in place, and [rows] int64, the place of each row's key and value. No two rows may share a place;
            a row whose place is outside the buffers is written nowhere.
        impl: "auto" follows the device; "reference" is plain torch; "fused" is the Triton kernel.

    Returns: query [rows, heads, dim], key and value [rows, kv_heads, dim], contiguous, in the dtype of qkv;
        fp32 inside, rounded once. With `into`, the two buffers instead of key and value: what was in them
        before keeps its gradient except where it was overwritten.
        The gradient of qkv is written in one pass, without slices or zero fills.
    Raises: ValueError for shapes, devices, half a pair and "fused" off CUDA; TypeError for dtypes.
    Source: arXiv 1910.07467, eq. 4; arXiv 1607.06450, eq. 3; arXiv 2104.09864, eq. 15; arXiv 2411.04996.
    """
    weights = {"query_weight": query_weight, "key_weight": key_weight}
    biases = {"query_bias": query_bias, "key_bias": key_bias}
    check(qkv, weights, biases, {"cos": cos, "sin": sin}, heads, kv_heads, experts, into, impl)
    shared = (query_weight, key_weight, cos, sin, heads, kv_heads, eps, query_bias, key_bias, experts)
    if impl == "reference":
        query, key, value = reference.forward(qkv, *shared, rounds_quotient)
        if into is None:
            return query, key, value
        keys, values, destinations = into
        return (
            query,
            keys.copy_(reference.placed(keys, key, destinations)),
            values.copy_(reference.placed(values, value, destinations)),
        )
    trained = (qkv, query_weight, key_weight, query_bias, key_bias)
    inputs = (*trained, cos, sin, experts, heads, kv_heads, eps, rounds_quotient)
    if into is None:
        query, key, value = _QkNormRope.apply(*inputs)  # type: ignore[no-untyped-call]
        return query, key, value
    if torch.is_grad_enabled():
        query, key, value = _QkNormRopeInto.apply(*inputs, *into)  # type: ignore[no-untyped-call]
        return query, key, value
    # Dynamo traces mark_dirty only where gradients are recorded.
    return _forward_into(qkv, *into, *shared, rounds_quotient), into[0], into[1]
