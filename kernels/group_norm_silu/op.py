"""Checks, schema, fake and the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reca.kernels._checks import (
    FLOATS,
    check_dtype,
    check_impl,
    check_same_device,
    check_same_dtype,
    check_shape,
)
from reca.kernels._library import Impl, define_op
from reca.kernels.group_norm_silu import reference

_NAME = "group_norm_silu"


def _cuda(*inputs: Any) -> Tensor:
    from reca.kernels.group_norm_silu import kernel

    return kernel.forward(*inputs)


def _fake(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


_forward = define_op(
    f"{_NAME}(Tensor x, Tensor weight, Tensor bias, int groups, float eps, ScalarType dtype) -> Tensor out",
    cpu=lambda *inputs: reference.forward(*inputs).contiguous(),
    cuda=_cuda,
    fake=_fake,
)


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    groups: int,
    eps: float,
    dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """GroupNorm and the SiLU after it, for the frozen encoders of image tokenizers.

        normed_ncp = weight_c (x_ncp - mean_ng) / sqrt(var_ng + eps) + bias_c,    g the group of channel c
        out_ncp    = normed_ncp / (1 + exp(-normed_ncp))

    Mean and variance are over all channels of a group and all positions. Two passes over x whatever its
    size; under autocast torch takes a cast, a norm, an activation and a cast, four of them in fp32.

    Args:
        x: [batch, channels, ...], floating; channels a multiple of `groups`. Copied unless contiguous.
        weight, bias: [channels], floating; may be fp32 beside a bf16 x.
        groups: of neighbouring channels that share mean and variance.
        eps: added to the variance.
        dtype: of the result; that of x if None.
        impl: "auto" follows the device; "reference" is plain torch; "fused" is the Triton kernel, which has
            no backward. Where a gradient is needed, "auto" is plain torch.

    Returns: the shape of x, contiguous, in `dtype`; fp32 inside, rounded once.
    Raises: ValueError for shapes, devices, and "fused" off CUDA or where a gradient is needed; TypeError for
        dtypes.
    Source: arXiv 1803.08494, eq. 7; arXiv 1702.03118, eq. 5.
    """
    dtype = x.dtype if dtype is None else dtype
    if x.dim() < 2 or groups < 1 or x.shape[1] == 0 or x.shape[1] % groups:
        raise ValueError(
            f"{_NAME}: x must be [batch, a multiple of groups={groups}, ...], got {list(x.shape)}; "
            "channels come second"
        )
    for name, parameter in {"weight": weight, "bias": bias}.items():
        check_shape(_NAME, name, parameter, (x.shape[1],), "one value per channel")
        check_dtype(_NAME, name, parameter, FLOATS)
    check_same_dtype(_NAME, {"x": x})
    if dtype not in FLOATS:
        raise TypeError(f"{_NAME}: dtype must be a floating one, got {dtype}; say what reads the result")
    check_same_device(_NAME, {"x": x, "weight": weight, "bias": bias})
    check_impl(_NAME, impl, x)
    needs_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias))
    if impl == "fused" and needs_gradient:
        raise ValueError(f"{_NAME}: impl='fused' has no backward; use impl='auto', or torch.no_grad()")
    if impl == "reference" or needs_gradient:
        return reference.forward(x, weight, bias, groups, eps, dtype)
    out: Tensor = _forward(x, weight, bias, groups, eps, dtype)
    return out
