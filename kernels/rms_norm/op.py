"""Checks, schemas, fakes, autograd and the public functions."""

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
    check_width,
    compute_dtype,
)
from reca.kernels._library import Impl, define_op
from reca.kernels.rms_norm import reference


def _cpu(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    summed = x.new_empty(0) if residual is None else x + residual
    normed, rstd = reference.forward(x if residual is None else summed, weight, eps)
    return summed, normed, rstd


def _cuda(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    from reca.kernels.rms_norm import kernel

    return kernel.forward(x, residual, weight, eps)


def _fake(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    summed = x.new_empty((0,) if residual is None else x.shape)
    return summed, x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=compute_dtype(x))


def _backward_cpu(
    d_normed: Tensor,
    d_summed: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    with_dx: bool,
    with_dweight: bool,
) -> tuple[Tensor, Tensor]:
    dx, dweight = reference.backward(d_normed, d_summed, x, weight, rstd)
    return dx if with_dx else x.new_empty(0), dweight if with_dweight else weight.new_empty(0)


def _backward_cuda(
    d_normed: Tensor,
    d_summed: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    with_dx: bool,
    with_dweight: bool,
) -> tuple[Tensor, Tensor]:
    from reca.kernels.rms_norm import kernel

    return kernel.backward(d_normed, d_summed, x, weight, rstd, with_dx, with_dweight)


def _backward_fake(
    d_normed: Tensor,
    d_summed: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    with_dx: bool,
    with_dweight: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if with_dx else (0,)), weight.new_empty(weight.shape if with_dweight else (0,))


_forward = define_op(
    "rms_norm(Tensor x, Tensor? residual, Tensor weight, float eps)"
    " -> (Tensor summed, Tensor normed, Tensor rstd)",
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
)
_backward = define_op(
    "rms_norm_backward(Tensor d_normed, Tensor? d_summed, Tensor x, Tensor weight, Tensor rstd,"
    " bool with_dx, bool with_dweight) -> (Tensor dx, Tensor dweight)",
    cpu=_backward_cpu,
    cuda=_backward_cuda,
    fake=_backward_fake,
)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        _, normed, rstd = _forward(x, None, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return normed  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_normed: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        need_x, need_weight, _ = ctx.needs_input_grad
        dx, dweight = _backward(d_normed, None, *ctx.saved_tensors, need_x, need_weight)
        return dx if need_x else None, dweight if need_weight else None, None


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        summed, normed, rstd = _forward(x, residual, weight, eps)
        ctx.save_for_backward(summed, weight, rstd)
        return normed, summed

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_normed: Tensor, d_summed: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        need_x, need_residual, need_weight, _ = ctx.needs_input_grad
        dx, dweight = _backward(d_normed, d_summed, *ctx.saved_tensors, need_x or need_residual, need_weight)
        return dx if need_x else None, dx if need_residual else None, dweight if need_weight else None, None


def _check(name: str, rows: dict[str, Tensor], weight: Tensor, impl: Impl) -> None:
    x = rows["x"]
    check_width(name, "x", x)
    for other, tensor in rows.items():
        check_shape(name, other, tensor, tuple(x.shape), "shaped like x")
    check_shape(name, "weight", weight, (x.shape[-1],), "one scale per column of x")
    check_same_dtype(name, rows)
    check_dtype(name, "weight", weight, FLOATS)
    check_same_device(name, {**rows, "weight": weight})
    check_impl(name, impl, x)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, impl: Impl = "auto") -> Tensor:
    """Root-mean-square norm over the last dimension.

        normed_id = weight_d * x_id / sqrt(mean_d x_id^2 + eps)

    Args:
        x: [..., dim], floating.
        weight: [dim], floating; may be fp32 beside bf16 rows.
        eps: added to the mean square.
        impl: "auto" follows the device; "reference" is plain torch; "fused" is the Triton kernel.

    Returns: [..., dim] in the dtype of x; fp32 inside, rounded once.
    Raises: ValueError for shapes, devices, rows wider than 32,768, "fused" off CUDA; TypeError for dtypes.
    Source: arXiv 1910.07467, eq. 4.
    """
    _check("rms_norm", {"x": x}, weight, impl)
    if impl == "reference":
        return reference.forward(x, weight, eps)[0]
    rows = x.reshape(-1, x.shape[-1])
    normed: Tensor
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        normed = _RmsNorm.apply(rows, weight, eps)  # type: ignore[no-untyped-call]
    else:
        normed = _forward(rows, None, weight, eps)[1]
    return normed.view(x.shape)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, *, eps: float, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """The residual add and the norm that follows it, in one pass.

        summed = x + residual
        normed_id = weight_d * summed_id / sqrt(mean_d summed_id^2 + eps)

    Args:
        x, residual: [..., dim], floating, of one dtype.
        weight: [dim], floating; may be fp32 beside bf16 rows.
        eps: added to the mean square.
        impl: "auto" follows the device; "reference" is plain torch; "fused" is the Triton kernel.

    Returns: (normed, summed), both [..., dim] in the dtype of x; summed is the new residual stream.
    Raises: ValueError for shapes, devices, rows wider than 32,768, "fused" off CUDA; TypeError for dtypes.
    Source: arXiv 1910.07467, eq. 4.
    """
    _check("add_rms_norm", {"x": x, "residual": residual}, weight, impl)
    if impl == "reference":
        summed = x + residual
        return reference.forward(summed, weight, eps)[0], summed
    rows, residual_rows = x.reshape(-1, x.shape[-1]), residual.reshape(-1, x.shape[-1])
    needs_gradient = x.requires_grad or residual.requires_grad or weight.requires_grad
    if torch.is_grad_enabled() and needs_gradient:
        normed, summed = _AddRmsNorm.apply(rows, residual_rows, weight, eps)  # type: ignore[no-untyped-call]
    else:
        summed, normed, _ = _forward(rows, residual_rows, weight, eps)
    return normed.view(x.shape), summed.view(x.shape)
