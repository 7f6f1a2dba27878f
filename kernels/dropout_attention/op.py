"""Checks, schemas, fakes, autograd and the public function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from reca.kernels._checks import FLOATS, check_dtype, check_impl, check_same_device, compute_dtype
from reca.kernels._dropout import PhiloxDropout, check_dropout
from reca.kernels._library import Impl, define_op
from reca.kernels._philox import signed_key
from reca.kernels.dropout_attention import reference

_NAME = "dropout_attention"
_MAX_DIM = 128
_MAX_SAMPLES = 1024


def _cuda(*arguments: Any) -> tuple[Tensor, Tensor]:
    from reca.kernels.dropout_attention import kernel

    return kernel.forward(*arguments)


def _fake(qkv: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    rows, _, heads, dim = qkv.shape
    return qkv.new_empty(rows, heads, dim), qkv.new_empty(heads, rows, dtype=compute_dtype(qkv))


def _backward_cuda(*arguments: Any) -> Tensor:
    from reca.kernels.dropout_attention import kernel

    return kernel.backward(*arguments)


def _backward_fake(d_out: Tensor, qkv: Tensor, *others: Any) -> Tensor:
    return qkv.new_empty(qkv.shape)


_DRAWN = "Tensor cu_lengths, int[] lengths, Tensor samples, Tensor step, int key, float rate, float scale"
_forward = define_op(
    f"{_NAME}(Tensor qkv, {_DRAWN}) -> (Tensor out, Tensor lse)",
    cpu=reference.forward,
    cuda=_cuda,
    fake=_fake,
)
_backward = define_op(
    f"{_NAME}_backward(Tensor d_out, Tensor qkv, Tensor out, Tensor lse, {_DRAWN}) -> Tensor d_qkv",
    cpu=reference.backward,
    cuda=_backward_cuda,
    fake=_backward_fake,
)


@register_flop_formula(torch.ops.reca.dropout_attention)
def _flops(qkv: Any, cu_lengths: Any, lengths: Sequence[int], *others: Any, **unused: Any) -> int:
    """Two products of [length, length, dim] per head and sample."""
    return 4 * int(qkv[2]) * int(qkv[3]) * sum(length * length for length in lengths)


@register_flop_formula(torch.ops.reca.dropout_attention_backward)
def _backward_flops(d_out: Any, qkv: Any, out: Any, lse: Any, *others: Any, **unused: Any) -> int:
    """Five such products, as is usual: the second recomputation of the scores is not counted."""
    return 5 * _flops(qkv, *others[:2]) // 2


class _DropoutAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cu_lengths: Tensor, lengths: Any, *others: Any) -> Tensor:
        out: Tensor
        out, lse = _forward(qkv, cu_lengths, lengths, *others)
        samples, step, *ctx.scalars = others
        ctx.lengths = lengths
        ctx.save_for_backward(qkv, out, lse, cu_lengths, samples, step)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        qkv, out, lse, cu_lengths, samples, step = ctx.saved_tensors
        d_qkv: Tensor = _backward(d_out, qkv, out, lse, cu_lengths, ctx.lengths, samples, step, *ctx.scalars)
        return d_qkv, *[None] * 7


def dropout_attention(
    qkv: Tensor,
    random: PhiloxDropout,
    cu_lengths: Tensor,
    lengths: Sequence[int],
    rate: float,
    *,
    scale: float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Self-attention within each of several packed samples, with dropout of its probabilities.

        probability_hij = softmax_j(scale <query_ih, key_jh>)
        out_ih = sum_j keep_hij probability_hij value_jh / (1 - rate)
        keep_hij = uniform((h length + i) length + j) >= rate     with i and j counted within the sample

    Probabilities and mask are formed tile by tile, in the backward again; no [length, length] is stored.

    Args:
        qkv: [rows, 3, heads, dim <= 128], floating: query, key, value; receives the gradient.
        random: where the uniform numbers come from: one key per place, one id per sample.
        cu_lengths: [samples + 1] int32 or int64, on the device: 0, then the sums of `lengths`.
        lengths: rows of each sample, at most 1024 samples; their sum is rows.
        rate: the share that is dropped, in [0, 1).
        scale: factor before the softmax; dim ** -0.5 if None.
        impl: "auto" follows the device; "reference" is plain torch; "fused" is the Triton kernel.

    Returns: [rows, heads, dim] in the dtype of qkv; sums and softmax in fp32 (fp64 for fp64).
    Raises: ValueError for shapes, lengths, rates, devices and "fused" off CUDA; TypeError for dtypes.
    Source: arXiv 1706.03762, eq. 1; tiles after arXiv 2205.14135; Philox 4x32-10, Salmon et al., SC 2011.
    """
    if qkv.dim() != 4 or qkv.shape[1] != 3 or not qkv.shape[2] or not 0 < qkv.shape[3] <= _MAX_DIM:
        got = list(qkv.shape)
        raise ValueError(
            f"{_NAME}: qkv must be [rows, 3, heads > 0, 1 to {_MAX_DIM}], got {got}; query, key, value"
        )
    check_dtype(_NAME, "qkv", qkv, FLOATS)
    tensors = {"qkv": qkv} | check_dropout(_NAME, random, cu_lengths, rate, _MAX_SAMPLES)
    num_samples, (rows, _, heads, dim) = cu_lengths.shape[0] - 1, qkv.shape
    if len(lengths) != num_samples or sum(lengths) != rows or min(lengths) < 0:
        raise ValueError(
            f"{_NAME}: lengths must be {num_samples} counts of rows that sum to {rows}, got "
            f"{list(lengths)}; those of cu_lengths"
        )
    if heads * max(lengths) ** 2 > 1 << 34:
        raise ValueError(
            f"{_NAME}: heads * length^2 must be at most 2^34, got {heads} * {max(lengths)}^2; "
            "split the sample"
        )
    check_same_device(_NAME, tensors)
    check_impl(_NAME, impl, qkv)
    scale = dim**-0.5 if scale is None else scale
    places = (cu_lengths, list(lengths), random.samples, random.step, signed_key(random.key), rate, scale)
    if impl == "reference":
        return reference.forward(qkv, *places)[0]
    out: Tensor
    if qkv.requires_grad and torch.is_grad_enabled():
        out = _DropoutAttention.apply(qkv, *places)  # type: ignore[no-untyped-call]
    else:
        out = _forward(qkv, *places)[0]
    return out
