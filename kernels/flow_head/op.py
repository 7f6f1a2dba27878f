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
    check_same_dtype,
    check_shape,
    compute_dtype,
)
from reca.kernels._library import Impl, define_op
from reca.kernels._philox import PhiloxNoise, check_noise, given_or_drawn, noise_arguments
from reca.kernels.flow_head import reference

_NAME = "flow_head"
_MAX_DIM = 256


def _cpu(
    hidden: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    clean: Tensor,
    mask: Tensor,
    images: Tensor | None,
    *arguments: Any,
) -> reference.Saved:
    *coordinates, eps = arguments
    noise = given_or_drawn(*(*coordinates, images, clean.shape[1]))
    return reference.forward(hidden, scale, weight, bias, clean, noise, mask, eps)


def _cuda(*arguments: Any) -> reference.Saved:
    from reca.kernels.flow_head import kernel

    return kernel.forward(*arguments)


def _fake(hidden: Tensor, scale: Tensor, weight: Tensor, *others: Any) -> reference.Saved:
    tokens, dtype = hidden.shape[0], compute_dtype(hidden)
    shapes = ((), (tokens, weight.shape[0]), (tokens,), (tokens,))
    loss, d_prediction, rstd, mean = (hidden.new_empty(shape, dtype=dtype) for shape in shapes)
    return loss, d_prediction, rstd, mean


def _backward_cuda(*arguments: Any) -> reference.Gradients:
    from reca.kernels.flow_head import kernel

    return kernel.backward(*arguments)


def _backward_fake(
    d_loss: Tensor, hidden: Tensor, scale: Tensor, weight: Tensor, *others: Any
) -> reference.Gradients:
    wanted = (others[-2], *3 * (others[-1],))
    shapes = (hidden.shape, scale.shape, weight.shape, weight.shape[:1])
    d_hidden, d_scale, d_weight, d_bias = (
        like.new_empty(shape if want else (0,))
        for like, shape, want in zip((hidden, scale, weight, weight), shapes, wanted, strict=True)
    )
    return d_hidden, d_scale, d_weight, d_bias


_forward = define_op(
    f"{_NAME}(Tensor hidden, Tensor scale, Tensor weight, Tensor? bias, Tensor clean, Tensor mask,"
    " Tensor? images, Tensor? noise, Tensor? samples, Tensor? rows, Tensor? step, int key, float eps)"
    " -> (Tensor loss, Tensor d_prediction, Tensor rstd, Tensor mean)",
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
)
_backward = define_op(
    f"{_NAME}_backward(Tensor d_loss, Tensor hidden, Tensor scale, Tensor weight, Tensor d_prediction,"
    " Tensor rstd, Tensor mean, bool with_dhidden, bool with_dparameters)"
    " -> (Tensor d_hidden, Tensor d_scale, Tensor d_weight, Tensor d_bias)",
    cpu=reference.backward,
    cuda=_backward_cuda,
    fake=_backward_fake,
)


@register_flop_formula(torch.ops.reca.flow_head)
def _forward_flops(hidden_shape: Any, scale_shape: Any, weight_shape: Any, *others: Any, **named: Any) -> int:
    return int(2 * hidden_shape[0] * hidden_shape[1] * weight_shape[0])


@register_flop_formula(torch.ops.reca.flow_head_backward)
def _backward_flops(d_loss_shape: Any, *others: Any, **named: Any) -> int:
    """One product for the rows, one for the parameters."""
    return int(_forward_flops(*others) * (others[-2] + others[-1]))


class _FlowHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, scale: Tensor, weight: Tensor, bias: Any, *others: Any) -> Tensor:
        loss: Tensor
        loss, *saved = _forward(hidden, scale, weight, bias, *others)
        ctx.save_for_backward(hidden, scale, weight, *saved)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        hidden, scale, weight, d_prediction, rstd, mean = ctx.saved_tensors
        need_hidden, *needed = ctx.needs_input_grad[:4]
        saved = (hidden, scale, weight, d_prediction, rstd, mean)
        gradients = _backward(d_loss, *saved, need_hidden, any(needed))
        wanted = zip(gradients, (need_hidden, *needed), strict=True)
        return (*(gradient if need else None for gradient, need in wanted), *[None] * 9)


def flow_head(
    hidden: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    clean: Tensor,
    noise: Tensor | PhiloxNoise,
    mask: Tensor,
    *,
    eps: float,
    images: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Masked squared error of the velocity predicted by a final RMSNorm and a linear layer, summed.

        prediction_i = weight (scale * hidden_i / sqrt(mean_k hidden_ik^2 + eps)) + bias
        loss         = sum_i mask_i * mean_d (prediction_id - (noise_id - clean_id))^2

    The gradient of the prediction is formed with the loss, so the backward reads `hidden` once and writes its
    gradient; neither the normed rows nor regenerated noise are stored.

    Args:
        hidden: [tokens, width], floating; receives a gradient, as do scale, weight and bias.
        scale: [width], floating; of the norm. May be fp32 beside bf16 rows.
        weight: [dim <= 256, width], dtype of hidden.
        bias: [dim], dtype of hidden, or None.
        clean: [tokens, dim], floating; the end point at time 0. No gradient.
        noise: [tokens, dim], floating, or the coordinates from which it is regenerated. No gradient.
        mask: [tokens] fp32; 1 where the token counts. Rows with 0 must be finite all the same.
        eps: added to the mean square.
        images: [tokens] int64, the image of each token; needed to regenerate noise. Out of range: NaN.
        impl: "auto" follows the device; "reference" is plain torch; "fused" is the Triton kernel.

    Returns: scalar, accumulated in fp32 (fp64 for fp64); 0 for no tokens. Divide by mask.sum() for the mean.
    Raises: ValueError for shapes, devices and "fused" off CUDA; TypeError for dtypes.
    Source: rectified flow, arXiv 2209.03003, eq. 1; RMSNorm, arXiv 1910.07467, eq. 4.
    """
    if hidden.dim() != 2 or hidden.shape[1] == 0:
        raise ValueError(
            f"{_NAME}: hidden must be [tokens, width > 0], got {list(hidden.shape)}; flatten [B, T, D]"
        )
    tokens, width = hidden.shape
    if weight.dim() != 2 or not 0 < weight.shape[0] <= _MAX_DIM or weight.shape[1] != width:
        got = list(weight.shape)
        raise ValueError(
            f"{_NAME}: weight must be [1 to {_MAX_DIM}, width={width}], got {got}; as nn.Linear holds it"
        )
    dim = weight.shape[0]
    check_shape(_NAME, "scale", scale, (width,), "one scale per column of hidden")
    check_shape(_NAME, "clean", clean, (tokens, dim), "[tokens, dim], a row per token, a column per output")
    check_shape(_NAME, "mask", mask, (tokens,), "one weight per token")
    tensors = {"hidden": hidden, "weight": weight}
    if bias is not None:
        check_shape(_NAME, "bias", bias, (dim,), "one value per row of weight")
        tensors["bias"] = bias
    check_same_dtype(_NAME, tensors)
    check_dtype(_NAME, "scale", scale, FLOATS)
    check_dtype(_NAME, "clean", clean, FLOATS)
    check_dtype(_NAME, "mask", mask, (torch.float32,))
    if isinstance(noise, PhiloxNoise):
        if images is None:
            raise ValueError(
                f"{_NAME}: images must be given to regenerate noise, got None; pass [tokens] int64"
            )
        check_shape(_NAME, "images", images, (tokens,), "the image of each token")
        check_dtype(_NAME, "images", images, (torch.int64,))
        tensors["images"] = images
    num_images = noise.samples.shape[0] if isinstance(noise, PhiloxNoise) and noise.samples.dim() else 0
    tensors |= check_noise(_NAME, noise, tokens, dim, num_images)
    check_same_device(_NAME, {**tensors, "scale": scale, "clean": clean, "mask": mask})
    check_impl(_NAME, impl, hidden)
    inputs = (clean.detach(), mask.detach(), images, *noise_arguments(noise), eps)
    if impl == "reference":
        return _cpu(hidden, scale, weight, bias, *inputs)[0]
    loss: Tensor
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (hidden, scale, weight, bias)
    ):
        loss = _FlowHead.apply(hidden, scale, weight, bias, *inputs)  # type: ignore[no-untyped-call]
    else:
        loss = _forward(hidden, scale, weight, bias, *inputs)[0]
    return loss
