"""Flow matching: the squared error of a predicted velocity, and the path between data and noise."""

from __future__ import annotations

import torch
from torch import Tensor

from reca.kernels import flow_matching_loss


def interpolate(clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """The point between data (time 0) and noise (time 1): (1 - time) * clean + time * noise.

    Args:
        clean, noise: [tokens, dim] fp32.
        time: [tokens] or [tokens, 1] fp32. fp32: bf16 rounds a time of 0.999 to 1, and the input loses the
            image.
    """
    time = time.reshape(-1, 1)
    return (1 - time) * clean + time * noise


def shifted_time(time: Tensor, shift: float) -> Tensor:
    """Move times in [0, 1] towards noise for shift > 1: shift * time / (1 + (shift - 1) * time).

    Source: arXiv 2403.03206, eq. 23.
    """
    # The same bits in four launches less: most recipes do not shift.
    return time if shift == 1 else shift * time / (1 + (shift - 1) * time)


def flow_matching(prediction: Tensor, clean: Tensor, noise: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared error of the velocity, mean over channels, summed over tokens.

        loss = sum_i mask_i * mean_d (prediction_id - (noise_id - clean_id))^2

    Args:
        prediction: [tokens, dim], bf16 or fp32; receives the gradient.
        clean, noise: [tokens, dim] fp32; the end points at time 0 and 1. No gradient.
        mask: [tokens] fp32; 1 where the token counts. None counts all.

    Returns: scalar, fp32.
    Source: rectified flow, arXiv 2209.03003, eq. 1.
    """
    if mask is None:
        mask = torch.ones(prediction.shape[0], dtype=torch.float32, device=prediction.device)
    loss: Tensor = flow_matching_loss(prediction.to(clean.dtype), clean, noise, mask)
    return loss
