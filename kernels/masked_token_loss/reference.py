"""The mathematics in plain torch; fp32 inside, fp64 for fp64 inputs.

logits_iv = sum_d hidden_id weight_vd + bias_v                   (rounded, as a linear layer does)
loss_i    = log sum_v exp(logits_iv) - logits_i,label_i
d loss_i / d logits_iv = exp(logits_iv - lse_i) - [v = label_i]
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from reca.kernels._checks import compute_dtype
from reca.kernels._library import without_autocast

IGNORED = -100
"""The label of a row that does not count."""


def _losses(log_probs: Tensor, labels: Tensor) -> Tensor:
    """The loss of each row: 0 where ignored, NaN where the label is out of range."""
    vocab = log_probs.shape[1]
    picked = log_probs.gather(1, labels.clamp(0, vocab - 1)[:, None])[:, 0]
    in_range = (labels >= 0) & (labels < vocab)
    return torch.where(labels == IGNORED, 0, torch.where(in_range, -picked, torch.nan))


@without_autocast
def loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """Scalar sum over the rows that count; differentiable by autograd."""
    logits = F.linear(hidden, weight, bias)
    return _losses(torch.log_softmax(logits.to(compute_dtype(logits)), dim=1), labels).sum()


def loss_rows_(logits: Tensor, vocab: int, labels: Tensor, with_gradient: bool) -> Tensor:
    """Losses [rows] of logits [rows, padded]; with a gradient, `logits` is overwritten by it.

    Columns from `vocab` on are padding: they may hold anything, and receive zeros.
    """
    log_probs = torch.log_softmax(logits[:, :vocab].to(compute_dtype(logits)), dim=1)
    losses = _losses(log_probs, labels)
    if with_gradient:
        ignored = (labels < 0) | (labels >= vocab)
        gradient = log_probs.exp_()
        gradient.scatter_add_(
            1, labels.clamp(0, vocab - 1)[:, None], gradient.new_full((len(labels), 1), -1.0)
        )
        logits[:, :vocab] = gradient.masked_fill_(ignored[:, None], 0)
        logits[:, vocab:] = 0
    return losses
