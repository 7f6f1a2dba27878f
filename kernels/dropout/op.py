"""Checks, schema, fake, autograd and the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from reca.kernels._checks import check_impl, check_same_device, check_same_dtype, check_shape
from reca.kernels._dropout import PhiloxDropout, check_dropout
from reca.kernels._library import Impl, define_op
from reca.kernels._philox import signed_key
from reca.kernels.dropout import reference

_NAME = "dropout"
_MAX_SAMPLES = 1024


def _cuda(*arguments: Any) -> Tensor:
    from reca.kernels.dropout import kernel

    return kernel.forward(*arguments)


def _fake(x: Tensor, *others: Any) -> Tensor:
    return x.new_empty(x.shape)


_forward = define_op(
    f"{_NAME}(Tensor x, Tensor? residual, Tensor cu_lengths, Tensor samples, Tensor step, int key,"
    " float rate) -> Tensor out",
    cpu=reference.forward,
    cuda=_cuda,
    fake=_fake,
)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Any, *others: Any) -> Tensor:
        *tensors, ctx.key, ctx.rate = others
        ctx.save_for_backward(*tensors)
        out: Tensor = _forward(x, residual, *others)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        need_x, need_residual = ctx.needs_input_grad[:2]
        dx = _forward(d_out, None, *ctx.saved_tensors, ctx.key, ctx.rate) if need_x else None
        return dx, d_out if need_residual else None, *[None] * 5


def dropout(
    x: Tensor,
    random: PhiloxDropout,
    cu_lengths: Tensor,
    rate: float,
    *,
    residual: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Dropout of the packed rows of several samples, and the residual add that follows it, in one pass.

        out_rc = residual_rc + x_rc / (1 - rate)     where uniform(r' width + c) >= rate, else residual_rc

    r' is the row of r within its sample. The mask is drawn again in the backward, so nothing is stored, and a
    sample's mask depends neither on its neighbours nor on the order of calls.

    Args:
        x: [rows, width], floating, width a multiple of 4; receives a gradient, as does residual.
        random: where the uniform numbers come from: one key per place, one id per sample.
        cu_lengths: [samples + 1] int32 or int64: 0, then the sums of the samples' rows. At most 1024 samples.
        rate: the share that is dropped, in [0, 1).
        residual: [rows, width], dtype of x.
        impl: "auto" follows the device; "reference" is plain torch; "fused" is the Triton kernel.

    Returns: [rows, width] in the dtype of x, rounded once; NaN in rows that no sample holds.
    Raises: ValueError for shapes, rates, devices and "fused" off CUDA; TypeError for dtypes.
    Source: Srivastava et al., JMLR 15 (2014); Philox 4x32-10, Salmon et al., SC 2011.
    """
    if x.dim() != 2 or x.shape[1] == 0 or x.shape[1] % 4:
        got = list(x.shape)
        raise ValueError(f"{_NAME}: x must be [rows, a multiple of 4], got {got}; pad or flatten it")
    tensors = {"x": x}
    if residual is not None:
        check_shape(_NAME, "residual", residual, tuple(x.shape), "shaped like x")
        tensors["residual"] = residual
    check_same_dtype(_NAME, tensors)
    tensors |= check_dropout(_NAME, random, cu_lengths, rate, _MAX_SAMPLES)
    check_same_device(_NAME, tensors)
    check_impl(_NAME, impl, x)
    arguments = (cu_lengths, random.samples, random.step, signed_key(random.key), rate)
    if impl == "reference":
        return reference.forward(x, residual, *arguments)
    out: Tensor
    needs_gradient = x.requires_grad or (residual is not None and residual.requires_grad)
    if torch.is_grad_enabled() and needs_gradient:
        out = _Dropout.apply(x, residual, *arguments)  # type: ignore[no-untyped-call]
    else:
        out = _forward(x, residual, *arguments)
    return out
