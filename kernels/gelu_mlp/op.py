"""Checks, schemas, fakes, autograd and the public functions."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from reca.kernels._checks import check_impl, check_same_device, check_same_dtype, check_shape
from reca.kernels._library import Impl, define_op
from reca.kernels.gelu_mlp import reference

Approximate = Literal["none", "tanh", "sigmoid"]
_ACTIVATIONS = {"none": "gelu", "tanh": "gelu_tanh", "sigmoid": "gelu_sigmoid"}


def _cuda(x: Tensor, bias: Tensor, activation: str) -> Tensor:
    from reca.kernels.gelu_mlp import kernel

    return kernel.forward(x, bias, activation)


def _fake(x: Tensor, bias: Tensor, activation: str) -> Tensor:
    return x.new_empty(x.shape)


def _backward_cpu(
    d_out: Tensor, x: Tensor, bias: Tensor, activation: str, with_out: bool, with_dbias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx, d_bias = reference.backward(d_out, x, bias, activation)
    out = reference.forward(x, bias, activation) if with_out else x.new_empty(0)
    return dx, out, d_bias if with_dbias else bias.new_empty(0)


def _backward_cuda(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from reca.kernels.gelu_mlp import kernel

    return kernel.backward(*arguments)


def _backward_fake(
    d_out: Tensor, x: Tensor, bias: Tensor, activation: str, with_out: bool, with_dbias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    out = x.new_empty(x.shape if with_out else (0,))
    return x.new_empty(x.shape), out, bias.new_empty(bias.shape if with_dbias else (0,))


_forward = define_op(
    "bias_activation(Tensor x, Tensor bias, str activation) -> Tensor out",
    cpu=reference.forward,
    cuda=_cuda,
    fake=_fake,
)
_backward = define_op(
    "bias_activation_backward(Tensor d_out, Tensor x, Tensor bias, str activation, bool with_out,"
    " bool with_dbias) -> (Tensor dx, Tensor out, Tensor d_bias)",
    cpu=_backward_cpu,
    cuda=_backward_cuda,
    fake=_backward_fake,
)


class _BiasActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, activation: str) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(x, bias)
        out: Tensor = _forward(x, bias, activation)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        need_x, need_bias, _ = ctx.needs_input_grad
        dx, _, d_bias = _backward(d_out, *ctx.saved_tensors, ctx.activation, False, need_bias)
        return dx if need_x else None, d_bias if need_bias else None, None


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, *others: Any) -> Tensor:
        fc2_weight, fc2_bias, activation = others
        # All products at the dtype of the inputs, wherever forward and backward are called from.
        with torch.autocast(x.device.type, enabled=False):
            pre = F.linear(x, fc1_weight)  # [rows, inner], without the bias
            ctx.activation = activation
            kept = x if ctx.needs_input_grad[1] else None
            ctx.save_for_backward(kept, fc1_weight, fc1_bias, fc2_weight, pre)
            return F.linear(_forward(pre, fc1_bias, activation), fc2_weight, fc2_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, fc1_weight, fc1_bias, fc2_weight, pre = ctx.saved_tensors
        need_x, need_weight1, need_bias1, need_weight2, need_bias2, _ = ctx.needs_input_grad
        d_pre = act = d_bias1 = None
        with torch.autocast(pre.device.type, enabled=False):
            if need_x or need_weight1 or need_bias1:
                d_act = d_out @ fc2_weight
                flags = (ctx.activation, need_weight2, need_bias1)
                d_pre, act, d_bias1 = _backward(d_act, pre, fc1_bias, *flags)
            elif need_weight2:
                act = _forward(pre, fc1_bias, ctx.activation)
            return (
                d_pre @ fc1_weight if need_x and d_pre is not None else None,
                d_pre.t() @ x if need_weight1 and d_pre is not None else None,
                d_bias1 if need_bias1 else None,
                d_out.t() @ act if need_weight2 and act is not None else None,
                d_out.sum(dim=0) if need_bias2 else None,
                None,
            )


def mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    activation: str,
    impl: Impl,
) -> Tensor:
    """fc2(activation(fc1(x))) of checked inputs; the last bias may be left to a later operator."""
    if impl == "reference":
        return reference.mlp(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation)
    rows = x.reshape(-1, x.shape[-1])
    out: Tensor = _Mlp.apply(rows, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation)  # type: ignore[no-untyped-call]
    return out.view(*x.shape[:-1], fc2_weight.shape[0])


def check_linear(operator: str, layer: str, weight: Tensor, bias: Tensor, width: int) -> dict[str, Tensor]:
    """Weight and bias by name; ValueError unless they are those of a linear layer on rows of `width`."""
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != width:
        raise ValueError(
            f"{operator}: {layer}_weight must be [out > 0, {width}], got {list(weight.shape)}; "
            "as nn.Linear holds it"
        )
    check_shape(operator, f"{layer}_bias", bias, (weight.shape[0],), f"one value per row of {layer}_weight")
    return {f"{layer}_weight": weight, f"{layer}_bias": bias}


def _check_rows(name: str, x: Tensor, approximate: str) -> None:
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(
            f"{name}: x must be [..., width > 0], got {list(x.shape)}; rows lie in the last axis"
        )
    if approximate not in _ACTIVATIONS:
        names = ", ".join(_ACTIVATIONS)
        raise ValueError(f"{name}: approximate must be one of {names}, got {approximate!r}")


def bias_gelu(x: Tensor, bias: Tensor, *, approximate: Approximate = "none", impl: Impl = "auto") -> Tensor:
    """A bias and the GELU after it; for a product whose bias was left out.

        out = p Phi(p),    p = x + bias
        "none":    Phi(p) = (1 + erf(p / sqrt 2)) / 2
        "tanh":    Phi(p) ~ (1 + tanh(sqrt(2 / pi) (p + 0.044715 p^3))) / 2
        "sigmoid": Phi(p) ~ 1 / (1 + exp(-1.702 p))

    Args:
        x: [..., width], floating.
        bias: [width], dtype of x.
        approximate: which form; "tanh" is also called gelu_new, "sigmoid" quick GELU.
        impl: "auto" follows the device; "reference" is plain torch; "fused" is the Triton kernel.

    Returns: [..., width] in the dtype of x; fp32 inside, rounded once. The gradient of the bias is summed in
        fp32 in the pass that forms that of x, in an order that does not change between runs.
    Raises: ValueError for shapes, devices, an unknown form and "fused" off CUDA; TypeError for dtypes.
    Source: arXiv 1606.08415, section 2.
    """
    _check_rows("bias_gelu", x, approximate)
    check_shape("bias_gelu", "bias", bias, (x.shape[-1],), "one value per column of x")
    tensors = {"x": x, "bias": bias}
    check_same_dtype("bias_gelu", tensors)
    check_same_device("bias_gelu", tensors)
    check_impl("bias_gelu", impl, x)
    activation = _ACTIVATIONS[approximate]
    if impl == "reference":
        return reference.forward(x, bias, activation)
    out: Tensor = _BiasActivation.apply(x.reshape(-1, x.shape[-1]), bias, activation)  # type: ignore[no-untyped-call]
    return out.view(x.shape)


def gelu_mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    *,
    approximate: Approximate = "none",
    impl: Impl = "auto",
) -> Tensor:
    """Two linear layers with GELU between them; the activation is not kept, the backward recomputes it.

        out = gelu(x @ fc1_weight^T + fc1_bias) @ fc2_weight^T + fc2_bias

    Kept for the backward: x (if fc1_weight is trained), the weights and the product before the first bias;
    of rows as wide as the inner layer that is half of what linear, GELU and linear keep.

    Args:
        x: [..., dim], floating.
        fc1_weight, fc1_bias: [inner, dim] and [inner], dtype of x.
        fc2_weight, fc2_bias: [out, inner] and [out], dtype of x.
        approximate: "none" (erf), "tanh" (gelu_new) or "sigmoid" (quick GELU); formulas at `bias_gelu`.
        impl: "auto" follows the device; "reference" is plain torch; "fused" is the Triton kernel.

    Returns: [..., out] in the dtype of x. Autocast does not apply inside.
    Raises: ValueError for shapes, devices, an unknown form and "fused" off CUDA; TypeError for dtypes.
    Source: arXiv 1606.08415, section 2.
    """
    _check_rows("gelu_mlp", x, approximate)
    tensors = {"x": x} | check_linear("gelu_mlp", "fc1", fc1_weight, fc1_bias, x.shape[-1])
    tensors |= check_linear("gelu_mlp", "fc2", fc2_weight, fc2_bias, fc1_weight.shape[0])
    check_same_dtype("gelu_mlp", tensors)
    check_same_device("gelu_mlp", tensors)
    check_impl("gelu_mlp", impl, x)
    activation = _ACTIVATIONS[approximate]
    return mlp(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, impl)
