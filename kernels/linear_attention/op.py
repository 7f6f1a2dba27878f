"""Checks, schemas, fakes, autograd and the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from reca.kernels._checks import check_impl, check_same_device, check_same_dtype, check_shape
from reca.kernels._library import Impl, define_op
from reca.kernels.linear_attention import reference

_NAME = "linear_attention"
_MAX_DIM = 32

Three = tuple[Tensor, Tensor, Tensor]


def _cuda(*arguments: Any) -> Tensor:
    from reca.kernels.linear_attention import kernel

    return kernel.forward(*arguments)


def _fake(query: Tensor, key: Tensor, value: Tensor, eps: float) -> Tensor:
    return query.new_empty(query.shape)


def _backward_cpu(*arguments: Any) -> Three:
    *inputs, with_dquery, with_dkey, with_dvalue = arguments
    gradients = reference.backward(*inputs)
    wanted = (with_dquery, with_dkey, with_dvalue)
    d_query, d_key, d_value = (
        g if want else g.new_empty(0) for g, want in zip(gradients, wanted, strict=True)
    )
    return d_query, d_key, d_value


def _backward_cuda(*arguments: Any) -> Three:
    from reca.kernels.linear_attention import kernel

    return kernel.backward(*arguments)


def _backward_fake(d_out: Tensor, query: Tensor, *arguments: Any) -> Three:
    wanted = arguments[-3:]
    d_query, d_key, d_value = (query.new_empty(query.shape if want else (0,)) for want in wanted)
    return d_query, d_key, d_value


_forward = define_op(
    f"{_NAME}(Tensor query, Tensor key, Tensor value, float eps) -> Tensor out",
    cpu=reference.forward,
    cuda=_cuda,
    fake=_fake,
)
_backward = define_op(
    f"{_NAME}_backward(Tensor d_out, Tensor query, Tensor key, Tensor value, float eps, bool with_dquery,"
    " bool with_dkey, bool with_dvalue) -> (Tensor d_query, Tensor d_key, Tensor d_value)",
    cpu=_backward_cpu,
    cuda=_backward_cuda,
    fake=_backward_fake,
)


@register_flop_formula(torch.ops.reca.linear_attention)
def _forward_flops(query_shape: torch.Size, *others: Any, **named: Any) -> int:
    """Two products of tokens by dim by dim per head."""
    return 4 * query_shape.numel() * query_shape[-1]


@register_flop_formula(torch.ops.reca.linear_attention_backward)
def _backward_flops(d_out_shape: torch.Size, *others: Any, **named: Any) -> int:
    """The two products of the forward again; one for d_query; d_state and one each for d_key and d_value."""
    with_dquery, with_dkey, with_dvalue = others[-3:]
    products = 2 + with_dquery + (with_dkey or with_dvalue) + with_dkey + with_dvalue
    flops: int = 2 * products * d_out_shape.numel() * d_out_shape[-1]
    return flops


class _LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.eps = eps
        out: Tensor = _forward(query, key, value, eps)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[:3]
        gradients = _backward(d_out, *ctx.saved_tensors, ctx.eps, *needed)
        return (*(g if need else None for g, need in zip(gradients, needed, strict=True)), None)


def linear_attention(query: Tensor, key: Tensor, value: Tensor, *, eps: float, impl: Impl = "auto") -> Tensor:
    """Attention of all tokens of an image to each other with relu features, linear in their number.

        out_i = sum_j (relu(q_i) . relu(k_j)) v_j / (sum_j relu(q_i) . relu(k_j) + eps)

    Sums are fp32 whatever the dtype, as in SANA, whose eps is 1e-15. A query without a positive entry gives
    0. What is kept for the backward are the three inputs.

    Args:
        query, key, value: [images, tokens, heads, dim <= 32], floating, of one dtype; slices of one fused
            projection need no copy.
        eps: added to the denominator.
        impl: "auto" follows the device; "reference" is plain torch; "fused" is the Triton kernel.

    Returns: [images, tokens, heads, dim] in the dtype of query, rounded once.
    Raises: ValueError for shapes, devices, "fused" off CUDA; TypeError for dtypes.
    Source: the linear attention of SANA, arXiv 2410.10629, section 2.2.
    """
    if query.dim() != 4 or not 0 < query.shape[3] <= _MAX_DIM:
        raise ValueError(
            f"{_NAME}: query must be [images, tokens, heads, 1 to {_MAX_DIM}], got {list(query.shape)}; "
            "unflatten the heads"
        )
    tensors = {"query": query, "key": key, "value": value}
    for name, tensor in tensors.items():
        check_shape(_NAME, name, tensor, tuple(query.shape), "shaped like query")
    check_same_dtype(_NAME, tensors)
    check_same_device(_NAME, tensors)
    check_impl(_NAME, impl, query)
    if impl == "reference":
        return reference.forward(query, key, value, eps)
    out: Tensor
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors.values()):
        out = _LinearAttention.apply(query, key, value, eps)  # type: ignore[no-untyped-call]
    else:
        out = _forward(query, key, value, eps)
    return out
