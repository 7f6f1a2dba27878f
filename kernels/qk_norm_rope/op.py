"""Checks, schemas, fakes, autograd and the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from reca.kernels._checks import (
    FLOATS,
    check_dtype,
    check_impl,
    check_same_device,
    check_same_dtype,
    check_shape,
)
from reca.kernels._library import Impl, define_op
from reca.kernels.qk_norm_rope import reference

_NAME = "qk_norm_rope"


def _cuda(
    qkv: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    kv_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from reca.kernels.qk_norm_rope import kernel

    return kernel.forward(qkv, query_weight, key_weight, cos, sin, heads, kv_heads, eps)


def _fake(
    qkv: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    kv_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, dim = qkv.shape[0], qkv.shape[1] // (heads + 2 * kv_heads)
    key, value = (qkv.new_empty(rows, kv_heads, dim) for _ in range(2))
    return qkv.new_empty(rows, heads, dim), key, value


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
) -> tuple[Tensor, Tensor, Tensor]:
    d_qkv, *d_weights = reference.backward(
        d_query, d_key, d_value, qkv, query_weight, key_weight, cos, sin, heads, kv_heads, eps
    )
    kept = [w if with_dweight and w is not None else qkv.new_empty(0) for w in d_weights]
    return d_qkv if with_dqkv else qkv.new_empty(0), kept[0], kept[1]


def _backward_cuda(
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
) -> tuple[Tensor, Tensor, Tensor]:
    from reca.kernels.qk_norm_rope import kernel

    with_dweight = with_dweight and query_weight is not None
    arguments = (qkv, query_weight, key_weight, cos, sin, heads, kv_heads, eps, with_dqkv, with_dweight)
    return kernel.backward(d_query, d_key, d_value, *arguments)


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
) -> tuple[Tensor, Tensor, Tensor]:
    d_weights = [
        weight.new_empty(weight.shape) if weight is not None and with_dweight else qkv.new_empty(0)
        for weight in (query_weight, key_weight)
    ]
    return qkv.new_empty(qkv.shape if with_dqkv else (0,)), d_weights[0], d_weights[1]


_INPUTS = (
    "Tensor qkv, Tensor? query_weight, Tensor? key_weight, Tensor? cos, Tensor? sin,"
    " int heads, int kv_heads, float eps"
)
_forward = define_op(
    f"{_NAME}({_INPUTS}) -> (Tensor query, Tensor key, Tensor value)",
    cpu=reference.forward,
    cuda=_cuda,
    fake=_fake,
)
_backward = define_op(
    f"{_NAME}_backward(Tensor d_query, Tensor d_key, Tensor d_value, {_INPUTS},"
    " bool with_dqkv, bool with_dweight) -> (Tensor d_qkv, Tensor d_query_weight, Tensor d_key_weight)",
    cpu=_backward_cpu,
    cuda=_backward_cuda,
    fake=_backward_fake,
)


class _QkNormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        query_weight: Tensor | None,
        key_weight: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        heads: int,
        kv_heads: int,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(qkv, query_weight, key_weight, cos, sin)
        ctx.geometry = (heads, kv_heads, eps)
        query, key, value = _forward(qkv, query_weight, key_weight, cos, sin, heads, kv_heads, eps)
        return query, key, value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_query: Tensor, d_key: Tensor, d_value: Tensor) -> tuple[Tensor | None, ...]:
        need_qkv, need_query, need_key = ctx.needs_input_grad[:3]
        saved, need_weight = (*ctx.saved_tensors, *ctx.geometry), need_query or need_key
        d_qkv, d_query_weight, d_key_weight = _backward(
            d_query, d_key, d_value, *saved, need_qkv, need_weight
        )
        return (
            d_qkv if need_qkv else None,
            d_query_weight if need_query else None,
            d_key_weight if need_key else None,
            *(None,) * 5,
        )


def _check(
    qkv: Tensor,
    weights: dict[str, Tensor | None],
    angles: dict[str, Tensor | None],
    heads: int,
    kv_heads: int,
    impl: Impl,
) -> None:
    if heads < 1 or kv_heads < 1:
        raise ValueError(f"{_NAME}: heads and kv_heads must be positive, got {heads} and {kv_heads}")
    total = heads + 2 * kv_heads
    if qkv.dim() != 2 or qkv.shape[1] == 0 or qkv.shape[1] % total:
        raise ValueError(
            f"{_NAME}: qkv must be [rows, ({heads} + 2 * {kv_heads}) * dim], got {list(qkv.shape)}; "
            "join query, key and value heads in this order"
        )
    rows, dim = qkv.shape[0], qkv.shape[1] // total
    for pair in (weights, angles):
        given = [name for name, tensor in pair.items() if tensor is not None]
        if len(given) == 1:
            raise ValueError(
                f"{_NAME}: {' and '.join(pair)} go together, got only {given[0]}; pass both or none"
            )
    for name, weight in weights.items():
        if weight is not None:
            check_shape(_NAME, name, weight, (dim,), "one scale per dimension of a head")
            check_dtype(_NAME, name, weight, FLOATS)
            check_same_device(_NAME, {"qkv": qkv, name: weight})
    for name, angle in angles.items():
        if angle is not None:
            if angle.dim() != 2 or angle.shape[0] != rows or not 0 < 2 * angle.shape[1] <= dim:
                raise ValueError(
                    f"{_NAME}: {name} must be [{rows}, 1 to {dim // 2}], got {list(angle.shape)}; "
                    "one angle per row and rotated pair"
                )
            check_dtype(_NAME, name, angle, (torch.float32,))
            check_same_device(_NAME, {"qkv": qkv, name: angle})
    cos, sin = angles["cos"], angles["sin"]
    if cos is not None and sin is not None:
        check_shape(_NAME, "sin", sin, tuple(cos.shape), "shaped like cos")
    check_same_dtype(_NAME, {"qkv": qkv})
    check_impl(_NAME, impl, qkv)


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
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of one fused projection to attention layout: per-head RMSNorm and rotation of query and key.

        n_j = weight_j x_j / sqrt(mean_j x_j^2 + eps)
        y_j = n_j cos_j - n_(j+r) sin_j,   y_(j+r) = n_(j+r) cos_j + n_j sin_j     for j < r
        y_j = n_j                                                                  for j >= 2 r

    Args:
        qkv: [rows, (heads + 2 kv_heads) dim], floating; heads of query, key, value in this order.
        query_weight, key_weight: [dim], floating; both None: no norm.
        cos, sin: [rows, r] fp32, 2 r <= dim; both None: no rotation. No gradient.
        heads, kv_heads: heads of the query; of key and value.
        eps: added to the mean square.
        impl: "auto" follows the device; "reference" is plain torch; "fused" is the Triton kernel.

    Returns: query [rows, heads, dim], key and value [rows, kv_heads, dim], contiguous, in the dtype of qkv;
        fp32 inside, rounded once. The gradient of qkv is written in one pass, without slices or zero fills.
    Raises: ValueError for shapes, devices, half a pair and "fused" off CUDA; TypeError for dtypes.
    Source: arXiv 1910.07467, eq. 4; arXiv 2104.09864, eq. 15.
    """
    weights = {"query_weight": query_weight, "key_weight": key_weight}
    _check(qkv, weights, {"cos": cos, "sin": sin}, heads, kv_heads, impl)
    function = reference.forward if impl == "reference" else _QkNormRope.apply
    query, key, value = function(qkv, query_weight, key_weight, cos, sin, heads, kv_heads, eps)
    return query, key, value
