"""Root-mean-square normalisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reca.kernels import Impl, add_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """Divides each row by its root mean square and scales it.

        y = weight * cast(x / sqrt(mean_d x_d^2 + eps))

    Statistics and quotient are fp32; the quotient is cast back to the dtype of x before it meets the weight,
    as the published language models do: bf16 checkpoints see the rounding they were trained with.

    Args:
        dim: width of the last axis.
        eps: added to the mean square.

    Shape: [..., dim] -> [..., dim], the dtype of x.
    Source: arXiv 1910.07467, eq. 4.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps
        self.kernels: Impl = "auto"

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis of `x`."""
        return rms_norm(x, self.weight, eps=self.eps, rounds_quotient=True, impl=self.kernels)

    def add(self, delta: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of residual + delta, residual + delta) in one pass, in the dtype of the residual stream."""
        delta = delta.to(residual.dtype)
        return add_rms_norm(
            delta, residual, self.weight, eps=self.eps, rounds_quotient=True, impl=self.kernels
        )

    def extra_repr(self) -> str:
        """Width and eps, for printing."""
        return f"{self.weight.shape[0]}, eps={self.eps}"
