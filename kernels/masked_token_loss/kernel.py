# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"
"""Triton: one program per row of logits; an online log-sum-exp, then the gradient in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from reca.kernels._launch import architecture_of, launch, launch_config, next_power_of_two
from reca.kernels.masked_token_loss.reference import IGNORED


@triton.jit
def _loss_rows_kernel(
    logits_ptr,
    labels_ptr,
    losses_ptr,
    vocab,
    padded,
    COLS: tl.constexpr,
    IGNORED_LABEL: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    line_ptr = logits_ptr + row * padded
    label = tl.load(labels_ptr + row)
    # Each lane keeps its own maximum and sum: one reduction per row instead of one per step. The maximum
    # starts finite, since the padding is -inf and -inf - -inf is no number.
    highest = tl.full([COLS], -3.0e38, tl.float32)
    total = tl.zeros([COLS], tl.float32)
    for start in range(0, padded, COLS):
        cols = start + tl.arange(0, COLS)
        # The mask of the load ends at a multiple of 16 elements, which keeps the accesses 16 bytes wide.
        logits = tl.load(line_ptr + cols, mask=cols < padded, other=0.0).to(tl.float32)
        logits = tl.where(cols < vocab, logits, float("-inf"))
        risen = tl.maximum(highest, logits)
        total = total * tl.exp(highest - risen) + tl.exp(logits - risen)
        highest = risen
    top = tl.max(highest, axis=0)
    normaliser = tl.sum(total * tl.exp(highest - top), axis=0)
    counted = (label >= 0) & (label < vocab)
    picked = tl.load(line_ptr + label, mask=counted, other=float("nan")).to(tl.float32)
    tl.store(losses_ptr + row, tl.where(label == IGNORED_LABEL, 0.0, tl.log(normaliser) + (top - picked)))
    if WITH_GRADIENT:
        for start in range(0, padded, COLS):
            cols = start + tl.arange(0, COLS)
            logits = tl.load(line_ptr + cols, mask=cols < padded, other=0.0).to(tl.float32)
            gradient = tl.exp(logits - top) / normaliser - tl.where(cols == label, 1.0, 0.0)
            gradient = tl.where(counted & (cols < vocab), gradient, 0.0)
            tl.store(line_ptr + cols, gradient.to(logits_ptr.dtype.element_ty), mask=cols < padded)


def loss_rows_(logits: Tensor, vocab: int, labels: Tensor, with_gradient: bool) -> Tensor:
    """Losses [rows] fp32 of contiguous logits [rows, padded]; with a gradient, `logits` is overwritten by it.

    Columns from `vocab` on are padding: they may hold anything, and receive zeros. The loss is 0 where the
    label is ignored and NaN where it is out of range; neither has a gradient.
    """
    rows, padded = logits.shape
    config = launch_config("masked_token_loss", architecture_of(logits), logits.dtype, vocab)
    losses = logits.new_empty(rows, dtype=torch.float32)
    launch(
        _loss_rows_kernel,
        (rows,),
        logits,
        labels.contiguous(),
        losses,
        vocab,
        padded,
        warps=config.warps,
        COLS=min(config.tile, next_power_of_two(padded)),
        IGNORED_LABEL=IGNORED,
        WITH_GRADIENT=with_gradient,
    )
    return losses
