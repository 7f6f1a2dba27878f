"""The mathematics in plain torch, forward and explicit backward; fp32 inside, fp64 for fp64 inputs.

error_id = prediction_id - (noise_id - clean_id)
loss     = sum_i mask_i / dim * sum_d error_id^2
"""

from __future__ import annotations

import torch
from torch import Tensor

from reca.kernels._checks import compute_dtype


def _error(prediction: Tensor, clean: Tensor, noise: Tensor, mask: Tensor) -> Tensor:
    dtype = compute_dtype(prediction)
    error = prediction.to(dtype) - (noise.to(dtype) - clean.to(dtype))  # [tokens, dim]
    # A row that does not count may hold anything, infinities included.
    return torch.where(mask[:, None] != 0, error, 0)


def loss(prediction: Tensor, clean: Tensor, noise: Tensor, mask: Tensor) -> Tensor:
    """Scalar sum over tokens of mask times the mean over dim."""
    error = _error(prediction, clean, noise, mask)
    return (mask.to(error.dtype) * error.square().mean(dim=1)).sum()


def gradient(prediction: Tensor, clean: Tensor, noise: Tensor, mask: Tensor) -> Tensor:
    """d loss / d prediction, in the dtype of the prediction."""
    error = _error(prediction, clean, noise, mask)
    scale = mask.to(error.dtype) * (2.0 / prediction.shape[1])
    return (scale[:, None] * error).to(prediction.dtype)
