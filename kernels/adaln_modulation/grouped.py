"""A modulation that all rows of a group share, as all tokens of an image do: checks, schemas, autograd."""

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
    check_shape,
    check_width,
    compute_dtype,
)
from reca.kernels._library import Impl, define_op
from reca.kernels.adaln_modulation import grouped_reference as reference


def _cpu(
    residual: Tensor, delta: Tensor | None, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    summed = reference.add(residual, delta)
    out = reference.forward(summed, shift, scale, eps, dtype)
    return residual.new_empty(0) if delta is None else summed, *out


def _cuda(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from reca.kernels.adaln_modulation import grouped_kernel

    return grouped_kernel.forward(*arguments)


def _fake(
    residual: Tensor, delta: Tensor | None, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, rstd = (residual.new_empty(residual.shape[0], dtype=compute_dtype(residual)) for _ in range(2))
    summed = residual.new_empty((0,) if delta is None else residual.shape)
    return summed, residual.new_empty(residual.shape, dtype=dtype), mean, rstd


def _backward_cpu(d_out: Tensor, d_summed: Tensor | None, summed: Tensor, *arguments: Any) -> Any:
    *inputs, delta_dtype, with_dx, with_dmodulation = arguments
    dx, sums = reference.backward(d_out, d_summed, summed, *inputs)
    has_delta = with_dx and delta_dtype is not None
    return (
        dx.to(summed.dtype) if with_dx else summed.new_empty(0),
        dx.to(delta_dtype) if has_delta else summed.new_empty(0, dtype=delta_dtype),
        sums if with_dmodulation else sums.new_empty(0, 2, 0),
    )


def _backward_cuda(*arguments: Any) -> Any:
    from reca.kernels.adaln_modulation import grouped_kernel

    return grouped_kernel.backward(*arguments)


def _backward_fake(
    d_out: Tensor, d_summed: Tensor | None, summed: Tensor, scale: Tensor, *others: Any
) -> Any:
    delta_dtype, with_dx, with_dmodulation = others[-3:]
    dx = summed.new_empty(summed.shape if with_dx else (0,))
    has_delta = with_dx and delta_dtype is not None
    d_delta = summed.new_empty(summed.shape if has_delta else (0,), dtype=delta_dtype)
    groups, dim = (scale.shape[0], summed.shape[1]) if with_dmodulation else (0, 0)
    return dx, d_delta, summed.new_empty(groups, 2, dim, dtype=compute_dtype(summed))


def _gate_cuda(*arguments: Any) -> Tensor:
    from reca.kernels.adaln_modulation import grouped_kernel

    return grouped_kernel.gate_residual(*arguments)


def _gate_fake(x: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
    return residual.new_empty(residual.shape)


def _gate_backward_cuda(*arguments: Any) -> tuple[Tensor, Tensor]:
    from reca.kernels.adaln_modulation import grouped_kernel

    return grouped_kernel.gate_backward(*arguments)


def _gate_backward_fake(d_out: Tensor, x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(gate.shape, dtype=compute_dtype(d_out))


_forward = define_op(
    "add_layer_norm_modulate(Tensor residual, Tensor? delta, Tensor shift, Tensor scale, float eps,"
    " ScalarType dtype) -> (Tensor summed, Tensor out, Tensor mean, Tensor rstd)",
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
)
_backward = define_op(
    "add_layer_norm_modulate_backward(Tensor d_out, Tensor? d_summed, Tensor summed, Tensor scale,"
    " Tensor mean, Tensor rstd, ScalarType? delta_dtype, bool with_dx, bool with_dmodulation)"
    " -> (Tensor dx, Tensor d_delta, Tensor sums)",
    cpu=_backward_cpu,
    cuda=_backward_cuda,
    fake=_backward_fake,
)
_gate_forward = define_op(
    "group_gate_residual(Tensor x, Tensor gate, Tensor residual) -> Tensor out",
    cpu=reference.gate_residual,
    cuda=_gate_cuda,
    fake=_gate_fake,
)
_gate_backward = define_op(
    "group_gate_residual_backward(Tensor d_out, Tensor x, Tensor gate) -> (Tensor dx, Tensor d_gate)",
    cpu=reference.gate_backward,
    cuda=_gate_backward_cuda,
    fake=_gate_backward_fake,
)


class _Modulate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, residual: Tensor, delta: Tensor | None, shift: Tensor, scale: Tensor, *others: Any
    ) -> tuple[Tensor, Tensor]:
        summed, out, mean, rstd = _forward(residual, delta, shift, scale, *others)
        stream = residual if delta is None else summed
        ctx.set_materialize_grads(False)
        ctx.dtypes = (None if delta is None else delta.dtype, shift.dtype, scale.dtype)
        ctx.save_for_backward(stream, scale, mean, rstd)
        return residual.view_as(residual) if delta is None else summed, out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_summed: Tensor | None, d_out: Tensor | None) -> tuple[Tensor | None, ...]:
        need_residual, need_delta, need_shift, need_scale = ctx.needs_input_grad[:4]
        delta_dtype, shift_dtype, scale_dtype = ctx.dtypes
        summed, scale, mean, rstd = ctx.saved_tensors
        if d_out is None:
            d_delta = None if d_summed is None or not need_delta else d_summed.to(delta_dtype)
            return d_summed if need_residual else None, d_delta, None, None, None, None
        # A delta of the stream's own dtype has the stream's gradient.
        apart = delta_dtype if need_delta and delta_dtype != summed.dtype else None
        wanted = (apart, need_residual or need_delta, need_shift or need_scale)
        dx, d_delta, sums = _backward(d_out, d_summed, summed, scale, mean, rstd, *wanted)
        return (
            dx if need_residual else None,
            (dx if apart is None else d_delta) if need_delta else None,
            sums[:, 0].to(shift_dtype) if need_shift else None,
            sums[:, 1].to(scale_dtype) if need_scale else None,
            None,
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
        x, gate = ctx.saved_tensors
        dx = d_gate = None
        if need_x or need_gate:
            dx, d_gate = _gate_backward(d_out, x, gate)
        return (
            dx if need_x else None,
            d_gate.to(gate.dtype) if need_gate and d_gate is not None else None,
            d_out if need_residual else None,
        )


def _check(name: str, rows: dict[str, Tensor], shared: dict[str, Tensor], impl: Impl) -> None:
    (first, leader), *others = rows.items()
    if leader.dim() != 3:
        raise ValueError(
            f"{name}: {first} must be [groups, rows, dim], got {list(leader.shape)}; unflatten the groups"
        )
    check_width(name, first, leader)
    for other, tensor in others:
        check_shape(name, other, tensor, tuple(leader.shape), f"shaped like {first}")
    for other, tensor in shared.items():
        check_shape(name, other, tensor, (leader.shape[0], 1, leader.shape[2]), "one row per group")
    for other, tensor in (rows | shared).items():
        check_dtype(name, other, tensor, FLOATS)
    check_same_device(name, rows | shared)
    check_impl(name, impl, leader)


def add_layer_norm_modulate(
    residual: Tensor,
    delta: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    *,
    eps: float,
    dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """The residual add and the adaptive layer norm behind it, where all rows of a group share a modulation.

        summed = residual + delta
        out    = (summed - mean(summed)) / sqrt(var(summed) + eps) * (1 + scale) + shift

    Args:
        residual: [groups, rows, dim], floating: the residual stream.
        delta: shaped like `residual`, any floating dtype; None adds nothing.
        shift, scale: [groups, 1, dim], floating; slices of one wider tensor need no copy.
        eps: added to the variance, which divides by dim.
        dtype: of `out`; that of `residual` if None. An fp32 stream is read once and leaves in bf16.
        impl: "auto" follows the device; "reference" is plain torch; "fused" is the Triton kernel.

    Returns: (summed in the dtype of `residual`, out in `dtype`); fp32 inside, each rounded once. Read the
        stream on from `summed` also without a delta: its gradient is then added in the pass of the norm's.
    Raises: ValueError for shapes, devices, rows wider than 32,768, "fused" off CUDA; TypeError for dtypes.
    Source: adaptive layer norm, arXiv 2212.09748, section 3.2.
    """
    name = "add_layer_norm_modulate"
    rows = {"residual": residual} | ({} if delta is None else {"delta": delta})
    _check(name, rows, {"shift": shift, "scale": scale}, impl)
    dtype = residual.dtype if dtype is None else dtype
    if dtype not in FLOATS:
        raise TypeError(f"{name}: dtype must be a floating one, got {dtype}; say what reads the result")
    dim = residual.shape[2]
    flat = residual.reshape(-1, dim)
    added = None if delta is None else delta.reshape(-1, dim)
    shared = (shift.reshape(-1, dim), scale.reshape(-1, dim))
    if impl == "reference":
        summed = reference.add(flat, added)
        out = reference.forward(summed, *shared, eps, dtype)[0]
    elif torch.is_grad_enabled() and any(t.requires_grad for t in (*rows.values(), shift, scale)):
        summed, out = _Modulate.apply(flat, added, *shared, eps, dtype)  # type: ignore[no-untyped-call]
    else:
        summed, out = _forward(flat, added, *shared, eps, dtype)[:2]
        summed = flat if added is None else summed
    return summed.view(residual.shape), out.view(residual.shape)


def group_gate_residual(x: Tensor, gate: Tensor, residual: Tensor, *, impl: Impl = "auto") -> Tensor:
    """The gated output of a sub-layer, added to the residual stream; all rows of a group share the gate.

        out = residual + gate * x

    Args:
        x: [groups, rows, dim], floating.
        gate: [groups, 1, dim], floating; a slice of a wider tensor needs no copy.
        residual: shaped like x, any floating dtype; an fp32 stream beside bf16 rows needs no cast.
        impl: "auto" follows the device; "reference" is plain torch; "fused" is the Triton kernel.

    Returns: [groups, rows, dim] in the dtype of the residual; fp32 inside, rounded once.
    Raises: ValueError for shapes, devices, rows wider than 32,768, "fused" off CUDA; TypeError for dtypes.
    Source: adaptive layer norm, arXiv 2212.09748, section 3.2.
    """
    _check("group_gate_residual", {"x": x, "residual": residual}, {"gate": gate}, impl)
    rows = [tensor.reshape(-1, x.shape[2]) for tensor in (x, gate, residual)]
    if impl == "reference":
        return reference.gate_residual(*rows).view(x.shape)
    out: Tensor = _Gate.apply(*rows)  # type: ignore[no-untyped-call]
    return out.view(x.shape)
