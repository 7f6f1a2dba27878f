"""The mathematics in plain torch; fp32 inside, fp64 for fp64 inputs. It is linear: the backward is itself.

keep_rc = uniform(r' width + c) >= rate        with r' the row of r within its sample
out_rc  = residual_rc + keep_rc x_rc / (1 - rate)
"""

from __future__ import annotations

import torch
from torch import Tensor

from reca.kernels._checks import compute_dtype
from reca.kernels._dropout import folded_words, keep_threshold


def keep_rows(
    shape: torch.Size, cu_lengths: Tensor, samples: Tensor, step: Tensor, key: int, rate: float
) -> tuple[Tensor, Tensor]:
    """What is kept, bool [rows, width], and whether a sample holds the row, bool [rows, 1]."""
    rows = torch.arange(shape[0], device=samples.device)
    sample = torch.searchsorted(cu_lengths[1:].long(), rows, right=True)
    held = (sample < samples.shape[0]) & (rows >= cu_lengths[0])
    sample = sample.clamp(max=samples.shape[0] - 1)
    blocks = torch.arange(shape[1] // 4, device=samples.device)
    first = (rows - cu_lengths[sample]) * (shape[1] // 4)
    words = folded_words(key, step, samples[sample][:, None], first[:, None] + blocks)
    return words >= keep_threshold(rate), held[:, None]


def forward(
    x: Tensor,
    residual: Tensor | None,
    cu_lengths: Tensor,
    samples: Tensor,
    step: Tensor,
    key: int,
    rate: float,
) -> Tensor:
    """[rows, width] in the dtype of x, rounded once; NaN in rows that no sample holds."""
    dtype = compute_dtype(x)
    keep, held = keep_rows(x.shape, cu_lengths, samples, step, key, rate)
    kept = torch.where(keep, x.to(dtype) * (1 / (1 - rate)), 0)
    out = kept if residual is None else residual.to(dtype) + kept
    return torch.where(held, out, torch.nan).to(x.dtype)
