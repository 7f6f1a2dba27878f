"""Normalisation of rows: by their root mean square, or by mean and variance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from reca.kernels import Impl, add_layer_norm, add_rms_norm, layer_norm, rms_norm
from reca.layers.implementation import activation_dtype


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


class LayerNorm(nn.LayerNorm):
    """LayerNorm in one pass whatever the dtype of its rows and of what reads them.

        y = weight * (x - mean_d x) / sqrt(var_d x + eps) + bias

    Inside it is fp32; the result is rounded once to autocast's dtype, outside autocast to that of x. That is
    the rounding of torch's norm under autocast, which needs a cast before and one for each reader after.

    Args:
        dim: width of the last axis.
        eps: added to the variance.

    Weights: weight [dim], bias [dim].
    Shape: [..., dim] -> [..., dim].
    Source: arXiv 1607.06450, eq. 3.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__(dim, eps)
        self.kernels: Impl = "auto"

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the last axis of `input`."""
        dtype = activation_dtype(input)
        return layer_norm(input, self.weight, self.bias, eps=self.eps, dtype=dtype, impl=self.kernels)

    def add(
        self,
        residual: Tensor,
        deltas: Sequence[Tensor],
        *,
        dtype: torch.dtype | None = None,
        readers: int = 1,
    ) -> tuple[Tensor, ...]:
        """(residual + deltas in the dtype of the stream, its norm in `dtype` for each reader) in one pass."""
        if dtype is None:
            dtype = activation_dtype(deltas[0] if deltas else residual)
        return add_layer_norm(
            residual,
            deltas,
            self.weight,
            self.bias,
            eps=self.eps,
            dtype=dtype,
            readers=readers,
            impl=self.kernels,
        )
