"""Checks, schema, fake, autograd, the walk over chunks of rows, and the public function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from reca.kernels._checks import (
    check_dtype,
    check_impl,
    check_same_device,
    check_same_dtype,
    check_shape,
    compute_dtype,
)
from reca.kernels._launch import ceil_div
from reca.kernels._library import Impl, define_op
from reca.kernels.masked_token_loss import reference

_NAME = "masked_token_loss"
_LOGITS_BYTES = 384 << 20
# Gradients of the weight add up over chunks at its own dtype: k roundings of growing sums cost about
# sqrt(k / 2) times the error of one, so six stay below twice that of a product in one piece.
_MAX_CHUNKS = 6
_ALIGNMENT = 64

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


def chunk_rows(rows: int, vocab: int, itemsize: int) -> int:
    """Rows of logits held at a time: within the memory budget, but never more than six chunks."""
    chunks = min(ceil_div(rows * vocab * itemsize, _LOGITS_BYTES), _MAX_CHUNKS)
    return _ALIGNMENT * ceil_div(rows, _ALIGNMENT * max(chunks, 1))


def _walk(
    loss_rows_: Callable[[Tensor, int, Tensor, bool], Tensor],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    with_dhidden: bool,
    with_dweight: bool,
    with_dbias: bool,
    *,
    alignment: int,
) -> Outputs:
    """Loss and gradients, chunk by chunk in one buffer of logits with rows of a multiple of `alignment`."""
    rows, vocab = hidden.shape[0], weight.shape[0]
    with_gradient = with_dhidden or with_dweight or with_dbias
    d_hidden = hidden.new_empty(hidden.shape if with_dhidden else (0,))
    d_weight = weight.new_empty(weight.shape if with_dweight else (0,))
    d_bias = hidden.new_zeros(vocab if with_dbias else 0, dtype=compute_dtype(hidden))
    step = chunk_rows(rows, vocab, hidden.itemsize)
    buffer = hidden.new_empty(min(step, rows), alignment * ceil_div(vocab, alignment))
    losses = []
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, rows, max(step, 1)):
            part = hidden[start : start + step]
            logits = buffer[: len(part)]
            torch.mm(part, weight.t(), out=logits[:, :vocab])
            if bias is not None:
                logits[:, :vocab] += bias
            losses.append(loss_rows_(logits, vocab, labels[start : start + step], with_gradient))
            d_logits = logits[:, :vocab]
            if with_dhidden:
                torch.mm(d_logits, weight, out=d_hidden[start : start + step])
            if with_dweight:
                # The first chunk writes, so nothing has to be zeroed.
                d_weight.addmm_(d_logits.t(), part, beta=int(start > 0))
            if with_dbias:
                d_bias += d_logits.sum(dim=0, dtype=d_bias.dtype)
    if not losses:
        d_weight.zero_()
        losses.append(hidden.new_zeros(1, dtype=compute_dtype(hidden)))
    loss = torch.cat(losses).sum()
    return loss, d_hidden, d_weight, d_bias.to(hidden.dtype)


def _cpu(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *flags: bool) -> Outputs:
    return _walk(reference.loss_rows_, hidden, weight, bias, labels, *flags, alignment=1)


def _cuda(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *flags: bool) -> Outputs:
    from reca.kernels.masked_token_loss import kernel

    # An odd vocabulary would cost the kernel its wide loads, the products their tensor cores.
    return _walk(kernel.loss_rows_, hidden, weight, bias, labels, *flags, alignment=_ALIGNMENT)


def _fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    with_dhidden: bool,
    with_dweight: bool,
    with_dbias: bool,
) -> Outputs:
    return (
        hidden.new_empty((), dtype=compute_dtype(hidden)),
        hidden.new_empty(hidden.shape if with_dhidden else (0,)),
        weight.new_empty(weight.shape if with_dweight else (0,)),
        hidden.new_empty(weight.shape[0] if with_dbias else 0),
    )


_forward = define_op(
    f"{_NAME}(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, bool with_dhidden,"
    " bool with_dweight, bool with_dbias) -> (Tensor loss, Tensor d_hidden, Tensor d_weight, Tensor d_bias)",
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
)


@register_flop_formula(torch.ops.reca.masked_token_loss)
def _flops(
    hidden_shape: Any,
    weight_shape: Any,
    bias_shape: Any,
    labels_shape: Any,
    with_dhidden: bool,
    with_dweight: bool,
    *others: Any,
    **named: Any,
) -> int:
    """The logits, and each gradient that is formed with them."""
    return int(2 * hidden_shape[0] * hidden_shape[1] * weight_shape[0] * (1 + with_dhidden + with_dweight))


class _MaskedTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        with_dhidden: bool,
        with_dweight: bool,
        with_dbias: bool,
    ) -> Tensor:
        ctx.flags = (with_dhidden, with_dweight, with_dbias)
        loss: Tensor
        loss, *gradients = _forward(hidden, weight, bias, labels, *ctx.flags)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [
            gradient * d_loss if needed else None
            for gradient, needed in zip(ctx.saved_tensors, ctx.flags, strict=True)
        ]
        return (*gradients, None, None, None, None)


def masked_token_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, *, impl: Impl = "auto"
) -> Tensor:
    """Linear layer and cross-entropy of labelled rows, summed; loss and gradients in one pass.

        logits = hidden @ weight^T + bias
        loss   = sum_i [label_i != -100] (log sum_v exp(logits_iv) - logits_i,label_i)

    Logits exist only for a chunk of rows (at most 384 MiB up to six chunks). Give it the labelled rows alone:
    ignored rows count nothing, but their products are formed, so they must be finite.

    Args:
        hidden: [rows, width], floating; receives a gradient.
        weight: [vocab, width], dtype of hidden; receives a gradient if it requires one.
        labels: [rows] int64 in [0, vocab), or -100 where the row does not count.
        bias: [vocab], dtype of hidden, or None.
        impl: "auto" follows the device; "reference" is plain torch; "fused" is the Triton kernel.

    Returns: scalar, fp32 from logits of the dtype of hidden (fp64 for fp64); NaN if a label is out of range,
        which no device read can report. Divide by the number of labels for the mean.
    Raises: ValueError for shapes, devices and "fused" off CUDA; TypeError for dtypes.
    Source: cut cross-entropy, arXiv 2411.09009, eq. 4, with rows in chunks.
    """
    tensors = {"hidden": hidden, "weight": weight}
    for name, tensor in tensors.items():
        if tensor.dim() != 2 or 0 in tensor.shape[1:]:
            legend = "[rows, width]" if name == "hidden" else "[vocab, width]"
            raise ValueError(
                f"{_NAME}: {name} must be {legend}, got {list(tensor.shape)}; flatten [B, T, D] first"
            )
    vocab, width = weight.shape
    if vocab == 0 or hidden.shape[1] != width:
        raise ValueError(
            f"{_NAME}: weight must be [vocab > 0, {hidden.shape[1]}], got {list(weight.shape)}; "
            "one row per token id, as wide as hidden"
        )
    check_shape(_NAME, "labels", labels, (hidden.shape[0],), "one label per row of hidden")
    if bias is not None:
        check_shape(_NAME, "bias", bias, (vocab,), "one value per row of weight")
        tensors["bias"] = bias
    check_same_dtype(_NAME, tensors)
    check_dtype(_NAME, "labels", labels, (torch.int64,))
    check_same_device(_NAME, {**tensors, "labels": labels})
    check_impl(_NAME, impl, hidden)
    if impl == "reference":
        return reference.loss(hidden, weight, bias, labels)
    flags = [t is not None and t.requires_grad and torch.is_grad_enabled() for t in (hidden, weight, bias)]
    loss: Tensor
    if any(flags):
        loss = _MaskedTokenLoss.apply(hidden, weight, bias, labels, *flags)  # type: ignore[no-untyped-call]
    else:
        loss = _forward(hidden, weight, bias, labels, *flags)[0]
    return loss
