"""The learning rate as a pure function of the updates done so far, on the device that counts them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reca.config import OptimConfig


def learning_rate(updates: Tensor, optim: OptimConfig, steps: int) -> Tensor:
    """Learning rate of the update that follows `updates` earlier ones.

        constant: lr(n) = warm(n) * lr
        cosine:   lr(n) = warm(n) * (min_lr + (lr - min_lr) (1 + cos(pi p)) / 2)
        warm(n) = min(n / warmup_steps, 1)
        p       = (n - warmup_steps) / (steps - warmup_steps), clamped to [0, 1]

    The first update of a warm-up has a rate of exactly 0 and the peak comes after `warmup_steps` updates, as
    in the released training code. A skipped step is no update, so it does not move the schedule.

    Args:
        updates: scalar, any dtype; the number of updates already applied. Never read on the host.
        optim: peak, floor, shape and warm-up.
        steps: length of the whole run, which ends the cosine.

    Returns: scalar fp32 on the device of `updates`.
    """
    count = updates.to(torch.float64)
    rate = torch.full_like(count, optim.lr)
    if optim.schedule == "cosine":
        progress = ((count - optim.warmup_steps) / max(steps - optim.warmup_steps, 1)).clamp(0.0, 1.0)
        rate = optim.min_lr + (optim.lr - optim.min_lr) * 0.5 * (1.0 + torch.cos(math.pi * progress))
    if optim.warmup_steps:
        rate = rate * (count / optim.warmup_steps).clamp(max=1.0)
    return rate.to(torch.float32)
