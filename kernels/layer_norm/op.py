"""Checks, schemas, fakes, autograd and the public functions."""

from __future__ import annotations

from collections.abc import Sequence
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
    check_width,
    compute_dtype,
)
from reca.kernels._library import Impl, define_op
from reca.kernels.layer_norm import reference

MAX_DELTAS = 2
MAX_READERS = 2


def _cpu(
    residual: Tensor, deltas: list[Tensor], weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    summed = reference.add(residual, deltas)
    normed = reference.forward(summed, weight, bias, eps, dtype)
    return summed if deltas else residual.new_empty(0), normed


def _cuda(*inputs: Any) -> tuple[Tensor, Tensor]:
    from reca.kernels.layer_norm import kernel

    return kernel.forward(*inputs)


def _fake(
    residual: Tensor, deltas: list[Tensor], weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    summed = residual.new_empty(residual.shape if deltas else (0,))
    return summed, residual.new_empty(residual.shape, dtype=dtype)


def _backward_cpu(
    d_normed: list[Tensor],
    d_summed: Tensor | None,
    x: Tensor,
    weight: Tensor,
    eps: float,
    with_dx: bool,
    delta_dtype: torch.dtype | None,
    with_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx, sums = reference.backward(d_normed, d_summed, x, weight, eps)
    with_ddelta = with_dx and delta_dtype is not None
    return (
        dx.to(x.dtype) if with_dx else x.new_empty(0),
        dx.to(delta_dtype, copy=True) if with_ddelta else x.new_empty(0, dtype=delta_dtype),
        sums if with_dweight else sums.new_empty(0),
    )


def _backward_cuda(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    from reca.kernels.layer_norm import kernel

    return kernel.backward(*inputs)


def _backward_fake(
    d_normed: list[Tensor],
    d_summed: Tensor | None,
    x: Tensor,
    weight: Tensor,
    eps: float,
    with_dx: bool,
    delta_dtype: torch.dtype | None,
    with_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    with_ddelta = with_dx and delta_dtype is not None
    return (
        x.new_empty(x.shape if with_dx else (0,)),
        x.new_empty(x.shape if with_ddelta else (0,), dtype=delta_dtype),
        x.new_empty((2, x.shape[1]) if with_dweight else (0,), dtype=compute_dtype(x)),
    )


_forward = define_op(
    "layer_norm(Tensor residual, Tensor[] deltas, Tensor weight, Tensor bias, float eps, ScalarType dtype)"
    " -> (Tensor summed, Tensor normed)",
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
)
_backward = define_op(
    "layer_norm_backward(Tensor[] d_normed, Tensor? d_summed, Tensor x, Tensor weight, float eps,"
    " bool with_dx, ScalarType? delta_dtype, bool with_dweight) -> (Tensor dx, Tensor d_delta, Tensor sums)",
    cpu=_backward_cpu,
    cuda=_backward_cuda,
    fake=_backward_fake,
)


class _LayerNorm(torch.autograd.Function):
    """Inputs with a gradient first, the deltas last; outputs: summed if there are deltas, then normed."""

    @staticmethod
    def forward(
        ctx: Any,
        residual: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        dtype: torch.dtype,
        readers: int,
        *deltas: Tensor,
    ) -> tuple[Tensor, ...]:
        summed, normed = _forward(residual, list(deltas), weight, bias, eps, dtype)
        ctx.eps, ctx.parameters = eps, (weight.dtype, bias.dtype)
        ctx.delta_dtypes = [delta.dtype for delta in deltas]
        ctx.save_for_backward(summed if deltas else residual, weight)
        copies = (normed, *(normed.view_as(normed) for _ in range(readers - 1)))
        return (summed, *copies) if deltas else copies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_outs: Tensor) -> tuple[Tensor | None, ...]:
        need_residual, need_weight, need_bias, _, _, _, *need_deltas = ctx.needs_input_grad
        x, weight = ctx.saved_tensors
        d_summed, d_normed = (d_outs[0], d_outs[1:]) if ctx.delta_dtypes else (None, d_outs)
        delta_dtype = next((dtype for dtype in ctx.delta_dtypes if dtype != x.dtype), None)
        with_dx, with_dweight = need_residual or any(need_deltas), need_weight or need_bias
        wanted = (with_dx, delta_dtype, with_dweight)
        dx, d_delta, sums = _backward(list(d_normed), d_summed, x, weight, ctx.eps, *wanted)
        passed = dx if delta_dtype is None else d_delta
        d_weight, d_bias = (
            sums[line].to(dtype) if need else None
            for line, dtype, need in zip((0, 1), ctx.parameters, (need_weight, need_bias), strict=True)
        )
        d_deltas = [passed if need else None for need in need_deltas]
        return dx if need_residual else None, d_weight, d_bias, None, None, None, *d_deltas


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """LayerNorm over the last dimension, rounded to the dtype of what reads it.

        normed_id = weight_d (x_id - mean_d x_id) / sqrt(var_d x_id + eps) + bias_d

    Args:
        x: [..., dim], floating.
        weight, bias: [dim], floating; may be fp32 beside bf16 rows.
        eps: added to the variance.
        dtype: of the result; that of x if None. An fp32 stream is read once and leaves in bf16.
        impl: "auto" follows the device; "reference" is plain torch; "fused" is the Triton kernel.

    Returns: [..., dim] in `dtype`; fp32 inside, rounded once.
    Raises: ValueError for shapes, devices, rows wider than 32,768, "fused" off CUDA; TypeError for dtypes.
    Source: arXiv 1607.06450, eq. 3.
    """
    return add_layer_norm(x, (), weight, bias, eps=eps, dtype=dtype, impl=impl)[1]


def add_layer_norm(
    residual: Tensor,
    deltas: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    dtype: torch.dtype | None = None,
    readers: int = 1,
    impl: Impl = "auto",
) -> tuple[Tensor, ...]:
    """The residual adds and the LayerNorm that follows them, in one pass; for parallel blocks as well.

        summed = residual + (delta_1 + delta_2)
        normed_id = weight_d (summed_id - mean_d summed_id) / sqrt(var_d summed_id + eps) + bias_d

    Args:
        residual: [..., dim], floating.
        deltas: up to two tensors shaped like `residual`, of one floating dtype, often narrower than it.
        weight, bias: [dim], floating.
        eps: added to the variance.
        dtype: of `normed`; that of the deltas if None, without deltas that of `residual`.
        readers: how often `normed` is returned, 1 or 2. Each copy may feed another branch, and their
            gradients are added where they are read.
        impl: "auto" follows the device; "reference" is plain torch; "fused" is the Triton kernel.

    Returns: (summed [..., dim] in the dtype of `residual`; normed [..., dim] in `dtype`, once for each
        reader). Without deltas `summed` is `residual` itself.
    Raises: ValueError for shapes, devices, rows wider than 32,768, "fused" off CUDA; TypeError for dtypes.
    Source: arXiv 1607.06450, eq. 3.
    """
    if dtype is None:
        dtype = deltas[0].dtype if deltas else residual.dtype
    _check(residual, deltas, weight, bias, dtype, readers, impl)
    width = residual.shape[-1]
    rows, *parts = (tensor.reshape(-1, width) for tensor in (residual, *deltas))
    if impl == "reference":
        summed = reference.add(rows, parts)
        copies: Sequence[Tensor] = [reference.forward(summed, weight, bias, eps, dtype)] * readers
    elif torch.is_grad_enabled() and any(t.requires_grad for t in (residual, weight, bias, *deltas)):
        outs = _LayerNorm.apply(rows, weight, bias, eps, dtype, readers, *parts)  # type: ignore[no-untyped-call]
        summed, copies = (outs[0], outs[1:]) if parts else (rows, outs)
    else:
        summed, normed = _forward(rows, parts, weight, bias, eps, dtype)
        copies = [normed] * readers
    stream = summed.view(residual.shape) if parts else residual
    return stream, *(copy.view(residual.shape) for copy in copies)


def _check(
    residual: Tensor,
    deltas: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    dtype: torch.dtype,
    readers: int,
    impl: Impl,
) -> None:
    name = "add_layer_norm" if deltas or readers > 1 else "layer_norm"
    check_width(name, "residual" if deltas else "x", residual)
    if len(deltas) > MAX_DELTAS or not 0 < readers <= MAX_READERS:
        raise ValueError(
            f"{name}: takes up to {MAX_DELTAS} deltas and 1 to {MAX_READERS} readers, got {len(deltas)} and"
            f" {readers}; add what is more before"
        )
    rows = {f"deltas[{index}]": delta for index, delta in enumerate(deltas)}
    for other, delta in rows.items():
        check_shape(name, other, delta, tuple(residual.shape), "shaped like residual")
    parameters = {"weight": weight, "bias": bias}
    for other, parameter in parameters.items():
        check_shape(name, other, parameter, (residual.shape[-1],), "one value per column")
        check_dtype(name, other, parameter, FLOATS)
    check_same_dtype(name, {"residual": residual})
    if rows:
        check_same_dtype(name, rows)
    if dtype not in FLOATS:
        raise TypeError(f"{name}: dtype must be a floating one, got {dtype}; say what reads the result")
    check_same_device(name, {"residual": residual, **rows, **parameters})
    check_impl(name, impl, residual)
