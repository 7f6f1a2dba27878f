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
from reca.kernels._experts import check_expert_weight, check_experts
from reca.kernels._library import Impl, define_op
from reca.kernels.rms_norm import reference


def _cpu(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    experts: Tensor | None = None,
    rounds_quotient: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    summed = x.new_empty(0) if residual is None else x + residual
    stream = x if residual is None else summed
    normed, rstd = reference.forward(stream, weight, eps, experts, rounds_quotient)
    return summed, normed, rstd


def _cuda(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    experts: Tensor | None = None,
    rounds_quotient: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    from reca.kernels.rms_norm import kernel

    return kernel.forward(x, residual, weight, eps, experts, rounds_quotient)


def _fake(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    experts: Tensor | None = None,
    rounds_quotient: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
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
    experts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    dx, dweight = reference.backward(d_normed, d_summed, x, weight, rstd, experts)
    return dx if with_dx else x.new_empty(0), dweight if with_dweight else weight.new_empty(0)


def _backward_cuda(
    d_normed: Tensor,
    d_summed: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    with_dx: bool,
    with_dweight: bool,
    experts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    from reca.kernels.rms_norm import kernel

    return kernel.backward(d_normed, d_summed, x, weight, rstd, with_dx, with_dweight, experts)


def _backward_fake(
    d_normed: Tensor,
    d_summed: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    with_dx: bool,
    with_dweight: bool,
    experts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if with_dx else (0,)), weight.new_empty(weight.shape if with_dweight else (0,))


_forward = define_op(
    "rms_norm(Tensor x, Tensor? residual, Tensor weight, float eps, Tensor? experts=None,"
    " bool rounds_quotient=False) -> (Tensor summed, Tensor normed, Tensor rstd)",
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
)
_backward = define_op(
    "rms_norm_backward(Tensor d_normed, Tensor? d_summed, Tensor x, Tensor weight, Tensor rstd,"
    " bool with_dx, bool with_dweight, Tensor? experts=None) -> (Tensor dx, Tensor dweight)",
    cpu=_backward_cpu,
    cuda=_backward_cuda,
    fake=_backward_fake,
)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, experts: Tensor | None, eps: float, rounds_quotient: bool
    ) -> Tensor:
        _, normed, rstd = _forward(x, None, weight, eps, experts, rounds_quotient)
        ctx.save_for_backward(x, weight, rstd, experts)
        return normed  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_normed: Tensor) -> tuple[Tensor | None, ...]:
        need_x, need_weight = ctx.needs_input_grad[:2]
        x, weight, rstd, experts = ctx.saved_tensors
        dx, dweight = _backward(d_normed, None, x, weight, rstd, need_x, need_weight, experts)
        return dx if need_x else None, dweight if need_weight else None, None, None, None


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        experts: Tensor | None,
        eps: float,
        rounds_quotient: bool,
    ) -> tuple[Tensor, Tensor]:
        summed, normed, rstd = _forward(x, residual, weight, eps, experts, rounds_quotient)
        ctx.save_for_backward(summed, weight, rstd, experts)
        return normed, summed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_normed: Tensor, d_summed: Tensor) -> tuple[Tensor | None, ...]:
        need_x, need_residual, need_weight = ctx.needs_input_grad[:3]
        summed, weight, rstd, experts = ctx.saved_tensors
        need_dx = need_x or need_residual
        dx, dweight = _backward(d_normed, d_summed, summed, weight, rstd, need_dx, need_weight, experts)
        gradients = (dx if need_x else None, dx if need_residual else None, dweight if need_weight else None)
        return *gradients, None, None, None


def _check(name: str, rows: dict[str, Tensor], weight: Tensor, experts: Tensor | None, impl: Impl) -> None:
    x = rows["x"]
    check_width(name, "x", x)
    for other, tensor in rows.items():
        check_shape(name, other, tensor, tuple(x.shape), "shaped like x")
    check_experts(name, experts, tuple(x.shape[:-1]), x)
    check_expert_weight(name, "weight", weight, x.shape[-1], experts, "one scale per column of x")
    check_same_dtype(name, rows)
    check_dtype(name, "weight", weight, FLOATS)
    check_same_device(name, {**rows, "weight": weight})
    check_impl(name, impl, x)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    experts: Tensor | None = None,
    rounds_quotient: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """Root-mean-square norm over the last dimension.

        normed_id = weight_d * x_id / sqrt(mean_d x_id^2 + eps)

    Args:
        x: [..., dim], floating.
        weight: [dim], floating; may be fp32 beside bf16 rows. With `experts`, [num_experts, dim].
        eps: added to the mean square.
        experts: [...] int32, the row of `weight` that scales each row of x. A row that names no expert
            becomes NaN, as does its gradient; it adds nothing to the gradient of `weight`.
        rounds_quotient: cast x / sqrt(...) to the dtype of x before the weight multiplies it, as published
            language models do; their bf16 checkpoints were trained with that rounding.
        impl: "auto" follows the device; "reference" is plain torch; "fused" is the Triton kernel.

    Returns: [..., dim] in the dtype of x; fp32 inside, rounded once.
    Raises: ValueError for shapes, devices, rows wider than 32,768, "fused" off CUDA; TypeError for dtypes.
    Source: arXiv 1910.07467, eq. 4; weights per row, arXiv 2411.04996.
    """
    _check("rms_norm", {"x": x}, weight, experts, impl)
    rows, chosen = x.reshape(-1, x.shape[-1]), None if experts is None else experts.reshape(-1)
    normed: Tensor
    if impl == "reference":
        normed = reference.forward(rows, weight, eps, chosen, rounds_quotient)[0]
    elif torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        normed = _RmsNorm.apply(rows, weight, chosen, eps, rounds_quotient)  # type: ignore[no-untyped-call]
    else:
        normed = _forward(rows, None, weight, eps, chosen, rounds_quotient)[1]
    return normed.view(x.shape)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    *,
    eps: float,
    experts: Tensor | None = None,
    rounds_quotient: bool = False,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """The residual add and the norm that follows it, in one pass.

        summed = x + residual
        normed_id = weight_d * summed_id / sqrt(mean_d summed_id^2 + eps)

    Args:
        x, residual: [..., dim], floating, of one dtype.
        weight: [dim], floating; may be fp32 beside bf16 rows. With `experts`, [num_experts, dim].
        eps: added to the mean square.
        experts: [...] int32, the row of `weight` that scales each row; see `rms_norm`.
        rounds_quotient: see `rms_norm`.
        impl: "auto" follows the device; "reference" is plain torch; "fused" is the Triton kernel.

    Returns: (normed, summed), both [..., dim] in the dtype of x; summed is the new residual stream.
    Raises: ValueError for shapes, devices, rows wider than 32,768, "fused" off CUDA; TypeError for dtypes.
    Source: arXiv 1910.07467, eq. 4; weights per row, arXiv 2411.04996.
    """
    _check("add_rms_norm", {"x": x, "residual": residual}, weight, experts, impl)
    rows, residual_rows = x.reshape(-1, x.shape[-1]), residual.reshape(-1, x.shape[-1])
    chosen = None if experts is None else experts.reshape(-1)
    needs_gradient = x.requires_grad or residual.requires_grad or weight.requires_grad
    if impl == "reference":
        summed = rows + residual_rows
        normed = reference.forward(summed, weight, eps, chosen, rounds_quotient)[0]
    elif torch.is_grad_enabled() and needs_gradient:
        normed, summed = _AddRmsNorm.apply(  # type: ignore[no-untyped-call]
            rows, residual_rows, weight, chosen, eps, rounds_quotient
        )
    else:
        summed, normed, _ = _forward(rows, residual_rows, weight, eps, chosen, rounds_quotient)
    return normed.view(x.shape), summed.view(x.shape)
