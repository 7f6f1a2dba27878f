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
from reca.kernels.adaln_modulation import reference

Four = tuple[Tensor, Tensor, Tensor, Tensor]


def _cuda(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from reca.kernels.adaln_modulation import kernel

    return kernel.forward(*arguments)


def _fake(x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty(x.shape[0], dtype=compute_dtype(x)) for _ in range(2))
    return x.new_empty(x.shape), mean, rstd


def _backward_cpu(d_out: Tensor, x: Tensor, *arguments: Any) -> Four:
    *inputs, with_dx, with_dscale, with_daffine = arguments
    gradients = reference.backward(d_out, x, *inputs)
    wanted = (with_dx, with_dscale, with_daffine, with_daffine)
    dx, d_scale, d_weight, d_bias = (
        g if want else g.new_empty(0) for g, want in zip(gradients, wanted, strict=True)
    )
    return dx, d_scale, d_weight, d_bias


def _backward_cuda(*arguments: Any) -> Four:
    from reca.kernels.adaln_modulation import kernel

    return kernel.backward(*arguments)


def _backward_fake(d_out: Tensor, x: Tensor, *arguments: Any) -> Four:
    with_dx, with_dscale, with_daffine = arguments[-3:]
    dx, d_scale = (x.new_empty(x.shape if wanted else (0,)) for wanted in (with_dx, with_dscale))
    width = x.shape[1] if with_daffine else 0
    d_weight, d_bias = (x.new_empty(width, dtype=compute_dtype(x)) for _ in range(2))
    return dx, d_scale, d_weight, d_bias


def _gate_cuda(x: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
    from reca.kernels.adaln_modulation import kernel

    return kernel.gate_residual(x, gate, residual)


def _gate_fake(x: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _gate_backward_cpu(
    d_out: Tensor, x: Tensor, gate: Tensor, with_dx: bool, with_dgate: bool
) -> tuple[Tensor, Tensor]:
    dx, d_gate = reference.gate_backward(d_out, x, gate)
    return dx if with_dx else x.new_empty(0), d_gate if with_dgate else x.new_empty(0)


def _gate_backward_cuda(*arguments: Any) -> tuple[Tensor, Tensor]:
    from reca.kernels.adaln_modulation import kernel

    return kernel.gate_backward(*arguments)


def _gate_backward_fake(
    d_out: Tensor, x: Tensor, gate: Tensor, with_dx: bool, with_dgate: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if with_dx else (0,)), x.new_empty(x.shape if with_dgate else (0,))


_forward = define_op(
    "layer_norm_modulate(Tensor x, Tensor shift, Tensor scale, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor out, Tensor mean, Tensor rstd)",
    cpu=reference.forward,
    cuda=_cuda,
    fake=_fake,
)
_backward = define_op(
    "layer_norm_modulate_backward(Tensor d_out, Tensor x, Tensor scale, Tensor? weight, Tensor? bias,"
    " Tensor mean, Tensor rstd, bool with_dx, bool with_dscale, bool with_daffine)"
    " -> (Tensor dx, Tensor d_scale, Tensor d_weight, Tensor d_bias)",
    cpu=_backward_cpu,
    cuda=_backward_cuda,
    fake=_backward_fake,
)
_gate_forward = define_op(
    "gate_residual(Tensor x, Tensor gate, Tensor residual) -> Tensor out",
    cpu=reference.gate_residual,
    cuda=_gate_cuda,
    fake=_gate_fake,
)
_gate_backward = define_op(
    "gate_residual_backward(Tensor d_out, Tensor x, Tensor gate, bool with_dx, bool with_dgate)"
    " -> (Tensor dx, Tensor d_gate)",
    cpu=_gate_backward_cpu,
    cuda=_gate_backward_cuda,
    fake=_gate_backward_fake,
)


class _Modulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, *others: Any) -> Tensor:
        weight, bias, eps = others
        out: Tensor
        out, mean, rstd = _forward(x, shift, scale, weight, bias, eps)
        ctx.save_for_backward(x, scale, weight, bias, mean, rstd)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        need_x, need_shift, need_scale, need_weight, need_bias, _ = ctx.needs_input_grad
        saved = ctx.saved_tensors  # unpacked once: recomputation allows no second time
        weight, bias = saved[2:4]
        needs = (need_x, need_scale, need_weight or need_bias)
        dx = d_scale = d_weight = d_bias = None
        if any(needs):
            dx, d_scale, d_weight, d_bias = _backward(d_out, *saved, *needs)
        return (
            dx if need_x else None,
            d_out if need_shift else None,
            d_scale if need_scale else None,
            d_weight.to(weight.dtype) if need_weight and d_weight is not None else None,
            d_bias.to(bias.dtype) if need_bias and d_bias is not None else None,
            None,
        )


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
        ctx.save_for_backward(x, gate)
        out: Tensor = _gate_forward(x, gate, residual)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        need_x, need_gate, need_residual = ctx.needs_input_grad
        dx = d_gate = None
        if need_x or need_gate:
            dx, d_gate = _gate_backward(d_out, *ctx.saved_tensors, need_x, need_gate)
        return dx if need_x else None, d_gate if need_gate else None, d_out if need_residual else None


def _check(name: str, rows: dict[str, Tensor], impl: Impl) -> None:
    x = rows["x"]
    check_width(name, "x", x)
    for other, tensor in rows.items():
        check_shape(name, other, tensor, tuple(x.shape), "shaped like x, expand it if it is shared")
    check_same_dtype(name, rows)
    check_same_device(name, rows)
    check_impl(name, impl, x)


def layer_norm_modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    eps: float,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Layer norm over the last dimension, then a scale and a shift of each row's own.

        out = (weight * (x - mean(x)) / sqrt(var(x) + eps) + bias) * (1 + scale) + shift

    Args:
        x, shift, scale: [..., dim], floating, of one dtype; slices of one wider tensor need no copy.
        eps: added to the variance, which divides by dim.
        weight, bias: [dim], floating, both or neither; may be fp32 beside bf16 rows.
        impl: "auto" follows the device; "reference" is plain torch; "fused" is the Triton kernel.

    Returns: [..., dim] in the dtype of x; fp32 inside, rounded once. Kept: x, scale and two numbers per row.
    Raises: ValueError for shapes, devices, rows wider than 32,768, "fused" off CUDA; TypeError for dtypes.
    Source: adaptive layer norm, arXiv 2212.09748, section 3.2.
    """
    name = "layer_norm_modulate"
    _check(name, {"x": x, "shift": shift, "scale": scale}, impl)
    if (weight is None) != (bias is None):
        raise ValueError(f"{name}: weight and bias go together, got one of them; pass both or neither")
    for label, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            check_shape(name, label, vector, (x.shape[-1],), "one value per column of x")
            check_dtype(name, label, vector, FLOATS)
            check_same_device(name, {"x": x, label: vector})
    if impl == "reference":
        return reference.forward(x, shift, scale, weight, bias, eps)[0]
    rows = [tensor.reshape(-1, x.shape[-1]) for tensor in (x, shift, scale)]
    out: Tensor
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*rows, weight, bias)):
        out = _Modulate.apply(*rows, weight, bias, eps)  # type: ignore[no-untyped-call]
    else:
        out = _forward(*rows, weight, bias, eps)[0]
    return out.view(x.shape)


def gate_residual(x: Tensor, gate: Tensor, residual: Tensor, *, impl: Impl = "auto") -> Tensor:
    """The gated output of a sub-layer, added to the residual stream.

        out = residual + gate * x

    Args:
        x, gate, residual: [..., dim], floating, of one dtype; slices of one wider tensor need no copy.
        impl: "auto" follows the device; "reference" is plain torch; "fused" is the Triton kernel.

    Returns: [..., dim] in the dtype of x; fp32 inside, rounded once.
    Raises: ValueError for shapes, devices, rows wider than 32,768, "fused" off CUDA; TypeError for dtypes.
    Source: adaptive layer norm, arXiv 2212.09748, section 3.2.
    """
    _check("gate_residual", {"x": x, "gate": gate, "residual": residual}, impl)
    if impl == "reference":
        return reference.gate_residual(x, gate, residual)
    rows = [tensor.reshape(-1, x.shape[-1]) for tensor in (x, gate, residual)]
    out: Tensor = _Gate.apply(*rows)  # type: ignore[no-untyped-call]
    return out.view(x.shape)
