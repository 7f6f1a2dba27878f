"""Checks, schemas, fakes, autograd and the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from reca.kernels._checks import (
    FLOATS,
    check_dtype,
    check_impl,
    check_same_device,
    check_shape,
    compute_dtype,
)
from reca.kernels._library import Impl, define_op
from reca.kernels.depthwise_glu import reference

_NAME = "depthwise_glu"

Three = tuple[Tensor, Tensor, Tensor]


def _cuda(*arguments: Any) -> Tensor:
    from reca.kernels.depthwise_glu import kernel

    return kernel.forward(*arguments)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, activate: bool) -> Tensor:
    return x.new_empty(*x.shape[:3], x.shape[3] // 2)


def _backward_cpu(d_out: Tensor, x: Tensor, *arguments: Any) -> Three:
    *inputs, with_dx, with_dweight = arguments
    gradients = reference.backward(d_out, x, *inputs)
    wanted = (with_dx, with_dweight, with_dweight)
    dx, d_weight, d_bias = (g if want else g.new_empty(0) for g, want in zip(gradients, wanted, strict=True))
    return dx, d_weight, d_bias


def _backward_cuda(*arguments: Any) -> Three:
    from reca.kernels.depthwise_glu import kernel

    return kernel.backward(*arguments)


def _backward_fake(d_out: Tensor, x: Tensor, weight: Tensor, *arguments: Any) -> Three:
    with_dx, with_dweight = arguments[-2:]
    dtype = compute_dtype(x)
    d_weight = weight.new_empty(weight.shape if with_dweight else (0,), dtype=dtype)
    d_bias = weight.new_empty(weight.shape[0] if with_dweight else 0, dtype=dtype)
    return x.new_empty(x.shape if with_dx else (0,)), d_weight, d_bias


_forward = define_op(
    f"{_NAME}(Tensor x, Tensor weight, Tensor? bias, bool activate) -> Tensor out",
    cpu=reference.forward,
    cuda=_cuda,
    fake=_fake,
)
_backward = define_op(
    f"{_NAME}_backward(Tensor d_out, Tensor x, Tensor weight, Tensor? bias, bool activate, bool with_dx,"
    " bool with_dweight) -> (Tensor dx, Tensor d_weight, Tensor d_bias)",
    cpu=_backward_cpu,
    cuda=_backward_cuda,
    fake=_backward_fake,
)


@register_flop_formula(torch.ops.reca.depthwise_glu)
def _forward_flops(x_shape: torch.Size, *others: Any, **named: Any) -> int:
    """Nine products and sums per convolved element, as of a convolution."""
    return 18 * x_shape.numel()


@register_flop_formula(torch.ops.reca.depthwise_glu_backward)
def _backward_flops(d_out_shape: torch.Size, x_shape: torch.Size, *others: Any, **named: Any) -> int:
    """The convolution again, and one for each gradient that is asked for."""
    with_dx, with_dweight = others[-2:]
    flops: int = 18 * x_shape.numel() * (1 + with_dx + with_dweight)
    return flops


class _DepthwiseGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, activate: bool) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.activate = activate
        out: Tensor = _forward(x, weight, bias, activate)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        needs = (need_x, need_weight or need_bias)
        dx, d_weight, d_bias = _backward(d_out, x, weight, bias, ctx.activate, *needs)
        return (
            dx if need_x else None,
            d_weight.to(weight.dtype) if need_weight else None,
            d_bias.to(bias.dtype) if need_bias else None,
            None,
        )


def depthwise_glu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activate: bool, impl: Impl = "auto"
) -> Tensor:
    """Depthwise 3x3 convolution of tokens on a grid, split into value and gate, gated; in one pass.

        active        = silu(x) if activate else x
        convolved_p   = bias + sum_{dy, dx in -1..1} weight_{dy, dx} active_{p + (dy, dx)}
        [value; gate] = convolved,    out = value * silu(gate)

    Pixels outside of an image count as 0. What is kept for the backward is x.

    Args:
        x: [images, height, width, 2 * inner], floating: token rows, [images, tokens, channels] unflattened.
        weight: [2 * inner, 1, 3, 3], floating, as nn.Conv2d holds it; may be fp32 beside bf16 rows.
        bias: [2 * inner], floating, or None.
        activate: whether SiLU comes before the convolution.
        impl: "auto" follows the device; "reference" is plain torch; "fused" is the Triton kernel.

    Returns: [images, height, width, inner] in the dtype of x; fp32 inside, rounded once.
    Raises: ValueError for shapes, devices, "fused" off CUDA; TypeError for dtypes.
    Source: the mixed feed-forward block of SANA, arXiv 2410.10629, section 2.2.
    """
    if x.dim() != 4 or 0 in x.shape[1:] or x.shape[3] % 2:
        raise ValueError(
            f"{_NAME}: x must be [images, height, width, 2 * inner], got {list(x.shape)}; "
            "unflatten the tokens, channels last, value first"
        )
    check_shape(_NAME, "weight", weight, (x.shape[3], 1, 3, 3), "nine taps per channel of x, groups=channels")
    tensors = {"x": x, "weight": weight}
    if bias is not None:
        check_shape(_NAME, "bias", bias, (x.shape[3],), "one value per channel of x")
        tensors["bias"] = bias
    for name, tensor in tensors.items():
        check_dtype(_NAME, name, tensor, FLOATS)
    check_same_device(_NAME, tensors)
    check_impl(_NAME, impl, x)
    if impl == "reference":
        return reference.forward(x, weight, bias, activate)
    out: Tensor
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors.values()):
        out = _DepthwiseGlu.apply(x, weight, bias, activate)  # type: ignore[no-untyped-call]
    else:
        out = _forward(x, weight, bias, activate)
    return out
