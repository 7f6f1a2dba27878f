"""Checks, schemas, fakes, autograd and the public functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from reca.kernels._checks import check_impl, check_same_device, check_same_dtype, check_shape
from reca.kernels._library import Impl, define_op
from reca.kernels.gated_mlp import reference


def _cuda(gate_up: Tensor) -> Tensor:
    from reca.kernels.gated_mlp import kernel

    return kernel.forward(gate_up)


def _fake(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


def _backward_cpu(d_product: Tensor, gate_up: Tensor, with_product: bool) -> tuple[Tensor, Tensor]:
    product = reference.forward(gate_up) if with_product else gate_up.new_empty(0)
    return reference.backward(d_product, gate_up), product


def _backward_cuda(d_product: Tensor, gate_up: Tensor, with_product: bool) -> tuple[Tensor, Tensor]:
    from reca.kernels.gated_mlp import kernel

    return kernel.backward(d_product, gate_up, with_product)


def _backward_fake(d_product: Tensor, gate_up: Tensor, with_product: bool) -> tuple[Tensor, Tensor]:
    return gate_up.new_empty(gate_up.shape), gate_up.new_empty(d_product.shape if with_product else (0,))


_forward = define_op(
    "swiglu(Tensor gate_up) -> Tensor product", cpu=reference.forward, cuda=_cuda, fake=_fake
)
_backward = define_op(
    "swiglu_backward(Tensor d_product, Tensor gate_up, bool with_product)"
    " -> (Tensor d_gate_up, Tensor product)",
    cpu=_backward_cpu,
    cuda=_backward_cuda,
    fake=_backward_fake,
)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        product: Tensor = _forward(gate_up)
        return product

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_product: Tensor) -> Tensor:
        d_gate_up: Tensor = _backward(d_product, ctx.saved_tensors[0], False)[0]
        return d_gate_up


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up, weight)
        # Both products at the dtype of the inputs, wherever forward and backward are called from.
        with torch.autocast(gate_up.device.type, enabled=False):
            return F.linear(_forward(gate_up), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, Tensor | None]:
        gate_up, weight = ctx.saved_tensors
        need_gate_up, need_weight = ctx.needs_input_grad
        with torch.autocast(gate_up.device.type, enabled=False):
            if not need_gate_up:
                return None, d_out.t() @ _forward(gate_up)
            d_gate_up, product = _backward(d_out @ weight, gate_up, need_weight)
            return d_gate_up, d_out.t() @ product if need_weight else None


def _check(name: str, gate_up: Tensor, impl: Impl) -> None:
    if gate_up.dim() == 0 or gate_up.shape[-1] == 0 or gate_up.shape[-1] % 2:
        raise ValueError(
            f"{name}: gate_up must be [..., 2 * inner], got {list(gate_up.shape)}; "
            "join the rows of gate and up, gate first"
        )
    check_same_dtype(name, {"gate_up": gate_up})
    check_impl(name, impl, gate_up)


def swiglu(gate_up: Tensor, *, impl: Impl = "auto") -> Tensor:
    """Gated activation of one fused projection.

        product = silu(gate) * up,    gate_up = [gate; up]

    Args:
        gate_up: [..., 2 * inner], floating; the gate first.
        impl: "auto" follows the device; "reference" is plain torch; "fused" is the Triton kernel.

    Returns: [..., inner] in the dtype of gate_up; fp32 inside, rounded once.
    Raises: ValueError for an odd or empty last dimension and "fused" off CUDA; TypeError for dtypes.
    Source: arXiv 2002.05202, eq. 6.
    """
    _check("swiglu", gate_up, impl)
    if impl == "reference":
        return reference.forward(gate_up)
    rows = gate_up.reshape(-1, gate_up.shape[-1])
    product: Tensor = _SwiGLU.apply(rows)  # type: ignore[no-untyped-call]
    return product.view(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


def gated_mlp(gate_up: Tensor, down_weight: Tensor, *, impl: Impl = "auto") -> Tensor:
    """SwiGLU and the projection after it; the product is not kept, the backward recomputes it.

        out = (silu(gate) * up) @ down_weight^T,    gate_up = [gate; up]

    Kept for the backward: gate_up and the weight, two thirds of what `swiglu` and a linear layer keep.

    Args:
        gate_up: [..., 2 * inner], floating; the gate first.
        down_weight: [dim, inner], dtype of gate_up.
        impl: "auto" follows the device; "reference" is plain torch; "fused" is the Triton kernel.

    Returns: [..., dim] in the dtype of gate_up. Autocast does not apply inside.
    Raises: ValueError for shapes, devices and "fused" off CUDA; TypeError for dtypes.
    Source: arXiv 2002.05202, eq. 6.
    """
    _check("gated_mlp", gate_up, impl)
    inner = gate_up.shape[-1] // 2
    if down_weight.dim() != 2:
        got = list(down_weight.shape)
        raise ValueError(f"gated_mlp: down_weight must be [dim, inner={inner}], got {got}; pass layer.weight")
    check_shape(
        "gated_mlp",
        "down_weight",
        down_weight,
        (down_weight.shape[0], inner),
        "[dim, inner], inner half of gate_up",
    )
    tensors = {"gate_up": gate_up, "down_weight": down_weight}
    check_same_dtype("gated_mlp", tensors)
    check_same_device("gated_mlp", tensors)
    if impl == "reference":
        return F.linear(reference.forward(gate_up), down_weight)
    out: Tensor = _GatedMlp.apply(gate_up.reshape(-1, 2 * inner), down_weight)  # type: ignore[no-untyped-call]
    return out.view(*gate_up.shape[:-1], down_weight.shape[0])
