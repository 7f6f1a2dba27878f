"""The mathematics in plain torch, forward and what the backward multiplies; fp32 inside, fp64 for fp64.

noised_id   = (1 - t_i) clean_id + t_i noise_id,    t_i = time[images_i]    (rounded to the dtype of weight)
embedded_ik = sum_d noised_id weight_kd + bias_k + time_embedding[images_i]_k + position[position_ids_i]_k

features_i  = [noised_i, 1, onehot(images_i)],  d_embedded^T features = [d_weight, d_bias, d_time_embedding^T]
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from reca.kernels._checks import compute_dtype
from reca.kernels._launch import ceil_div
from reca.kernels._library import without_autocast

_ALIGNMENT = 16


def features_width(dim: int, num_images: int) -> int:
    """Columns of the features, padded to 16: noised latents, a one, one per image."""
    return _ALIGNMENT * ceil_div(dim + 1 + num_images, _ALIGNMENT)


def pick(table: Tensor, index: Tensor) -> Tensor:
    """Rows of `table` [n, ...]; NaN where the index is out of range, which no device read can report."""
    inside = (index >= 0) & (index < table.shape[0])
    rows = table[index.clamp(0, table.shape[0] - 1)]
    return torch.where(inside.view(-1, *[1] * (rows.dim() - 1)), rows, torch.nan)


def noised(clean: Tensor, noise: Tensor, time: Tensor, images: Tensor, dtype: torch.dtype) -> Tensor:
    """[tokens, dim] in `dtype`: the points between data and noise."""
    wide = torch.promote_types(compute_dtype(clean), time.dtype)
    t = pick(time, images)[:, None]
    return ((1 - t) * clean.to(wide) + t * noise.to(wide)).to(dtype)


@without_autocast
def embed(
    noised: Tensor,
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    time_embedding: Tensor | None,
    position: Tensor | None,
    position_ids: Tensor | None,
) -> Tensor:
    """[tokens, width] in the dtype of the weight, rounded once."""
    dtype = compute_dtype(weight)
    out = F.linear(noised.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    if time_embedding is not None:
        out = out + pick(time_embedding.to(dtype), images)
    if position is not None and position_ids is not None:
        out = out + pick(position.to(dtype), position_ids)
    return out.to(weight.dtype)


def features(noised: Tensor, images: Tensor, num_images: int) -> Tensor:
    """[tokens, features_width] in the dtype of `noised`."""
    tokens, dim = noised.shape
    out = noised.new_zeros(tokens, features_width(dim, num_images))
    out[:, :dim] = noised
    out[:, dim] = 1
    out[:, dim + 1 : dim + 1 + num_images] = images[:, None] == torch.arange(num_images, device=images.device)
    return out
