"""The mathematics in plain torch, forward and explicit backward; fp32 inside, fp64 for fp64 inputs.

rstd_i        = (mean_k hidden_ik^2 + eps)^-1/2
prediction_id = rstd_i sum_k (hidden_ik scale_k) weight_dk + bias_d
error_id      = prediction_id - (noise_id - clean_id)
loss          = sum_i mask_i / dim * sum_d error_id^2

d_prediction  = 2 mask_i / dim * error_id
mean_i        = 1 / width * sum_d d_prediction_id (prediction_id - bias_d)     (= mean_k d_hat_ik hat_ik)
d_hidden_ik   = rstd_i (scale_k sum_d d_prediction_id weight_dk - rstd_i hidden_ik mean_i)
products_dk   = sum_i d_prediction_id rstd_i hidden_ik
d_weight      = products * scale,    d_scale_k = sum_d products_dk weight_dk
"""

from __future__ import annotations

import torch
from torch import Tensor

from reca.kernels._checks import compute_dtype
from reca.kernels._library import without_autocast

Saved = tuple[Tensor, Tensor, Tensor, Tensor]
"""(loss, d_prediction, rstd, mean)"""
Gradients = tuple[Tensor, Tensor, Tensor, Tensor]
"""(d_hidden, d_scale, d_weight, d_bias)"""


@without_autocast
def forward(
    hidden: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    clean: Tensor,
    noise: Tensor,
    mask: Tensor,
    eps: float,
) -> Saved:
    """Loss (scalar), d_prediction [tokens, dim], rstd and mean [tokens], in the dtype of the arithmetic."""
    dtype = compute_dtype(hidden)
    wide = hidden.to(dtype)
    rstd = torch.rsqrt(wide.square().mean(dim=1) + eps)
    # Rounded as the tensor cores take it; without the factor that is only known at the end of the row.
    scaled = (wide * scale.to(dtype)).to(hidden.dtype)
    projected = rstd[:, None] * (scaled.to(dtype) @ weight.to(dtype).t())  # [tokens, dim]
    prediction = projected if bias is None else projected + bias.to(dtype)
    error = prediction - (noise.to(dtype) - clean.to(dtype))
    d_prediction = (2.0 / error.shape[1]) * mask.to(dtype)[:, None] * error
    loss = (mask.to(dtype) * error.square().mean(dim=1)).sum()
    return loss, d_prediction, rstd, (d_prediction * projected).sum(dim=1) / hidden.shape[1]


def backward(
    d_loss: Tensor,
    hidden: Tensor,
    scale: Tensor,
    weight: Tensor,
    d_prediction: Tensor,
    rstd: Tensor,
    mean: Tensor,
    with_dhidden: bool,
    with_dparameters: bool,
) -> Gradients:
    """Of hidden [tokens, width], scale [width], weight [dim, width], bias [dim]; empty if not asked for."""
    dtype = compute_dtype(hidden)
    d_hidden, d_scale, d_weight, d_bias = (x.new_empty(0) for x in (hidden, scale, weight, weight))
    if with_dhidden:
        d_hat = (d_prediction.to(hidden.dtype).to(dtype) @ weight.to(dtype)) * scale.to(dtype)
        hat = hidden.to(dtype) * rstd[:, None]
        d_hidden = (d_loss.to(dtype) * rstd[:, None] * (d_hat - hat * mean[:, None])).to(hidden.dtype)
    if with_dparameters:
        factors = (d_prediction * rstd[:, None]).to(hidden.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            products = d_loss.to(dtype) * (factors.t() @ hidden).to(dtype)
        d_scale = (products * weight.to(dtype)).sum(dim=0).to(scale.dtype)
        d_weight = (products * scale.to(dtype)).to(weight.dtype)
        d_bias = (d_prediction.sum(dim=0) * d_loss.to(dtype)).to(weight.dtype)
    return d_hidden, d_scale, d_weight, d_bias
