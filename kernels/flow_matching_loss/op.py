"""Checks, schema, fake, autograd and the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from reca.kernels._checks import check_dtype, check_impl, check_same_device, check_same_dtype, check_shape
from reca.kernels._library import Impl, define_op
from reca.kernels.flow_matching_loss import reference

_NAME = "flow_matching_loss"


def _cpu(
    prediction: Tensor, clean: Tensor, noise: Tensor, mask: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    loss = reference.loss(prediction, clean, noise, mask)
    if not with_gradient:
        return loss, prediction.new_empty(0)
    return loss, reference.gradient(prediction, clean, noise, mask)


def _cuda(
    prediction: Tensor, clean: Tensor, noise: Tensor, mask: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    from reca.kernels.flow_matching_loss import kernel

    return kernel.forward(prediction, clean, noise, mask, with_gradient)


def _fake(
    prediction: Tensor, clean: Tensor, noise: Tensor, mask: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if prediction.dtype == torch.float64 else torch.float32
    gradient = prediction.new_empty(prediction.shape if with_gradient else (0,))
    return prediction.new_empty((), dtype=dtype), gradient


_forward = define_op(
    f"{_NAME}(Tensor prediction, Tensor clean, Tensor noise, Tensor mask, bool with_gradient)"
    " -> (Tensor loss, Tensor gradient)",
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
)


class _FlowMatchingLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, prediction: Tensor, clean: Tensor, noise: Tensor, mask: Tensor) -> Tensor:
        loss: Tensor
        loss, gradient = _forward(prediction, clean, noise, mask, True)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor, None, None, None]:
        gradient: Tensor = ctx.saved_tensors[0]
        return gradient * d_loss, None, None, None


def flow_matching_loss(
    prediction: Tensor, clean: Tensor, noise: Tensor, mask: Tensor, *, impl: Impl = "auto"
) -> Tensor:
    """Masked squared error of a predicted velocity, summed over tokens.

        loss = sum_i mask_i * mean_d (prediction_id - (noise_id - clean_id))^2

    Args:
        prediction: [tokens, dim], floating; receives the gradient.
        clean, noise: [tokens, dim], dtype of the prediction; the end points at time 0 and 1. No gradient.
        mask: [tokens], fp32; 1 where the token counts, rows with 0 are not read. Divide by mask.sum() for
            the mean.
        impl: "auto" follows the device; "reference" is plain torch; "fused" is the Triton kernel.

    Returns: scalar, accumulated in fp32 whatever the input dtype (fp64 for fp64); 0 for no tokens.
    Raises: ValueError if shapes or devices disagree, dim is 0, or "fused" is asked for off CUDA; TypeError
        for dtypes.
    Source: rectified flow, arXiv 2209.03003, eq. 1.
    """
    tensors = {"prediction": prediction, "clean": clean, "noise": noise}
    if prediction.dim() != 2 or prediction.shape[1] == 0:
        got = list(prediction.shape)
        raise ValueError(f"{_NAME}: prediction must be [tokens, dim > 0], got {got}; flatten [B, T, D] first")
    tokens, dim = prediction.shape
    for name in ("clean", "noise"):
        check_shape(_NAME, name, tensors[name], (tokens, dim), "[tokens, dim] like prediction")
    check_shape(_NAME, "mask", mask, (tokens,), "one weight per token, flattened like prediction")
    check_same_dtype(_NAME, tensors)
    check_dtype(_NAME, "mask", mask, (torch.float32,))
    check_same_device(_NAME, {**tensors, "mask": mask})
    check_impl(_NAME, impl, prediction)
    clean, noise, mask = clean.detach(), noise.detach(), mask.detach()
    if impl == "reference":
        return reference.loss(prediction, clean, noise, mask)
    loss: Tensor
    if prediction.requires_grad and torch.is_grad_enabled():
        loss = _FlowMatchingLoss.apply(prediction, clean, noise, mask)  # type: ignore[no-untyped-call]
        return loss
    loss, _ = _forward(prediction, clean, noise, mask, False)
    return loss
