"""The two feed-forward blocks that families share."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from reca.kernels import Impl, gated_mlp, gelu_mlp
from reca.layers.implementation import activation_dtype
from reca.profiling import span

Approximate = Literal["none", "tanh"]


class SwiGLU(nn.Module):
    """Gated feed-forward block, with gate and up projection in one matrix so that they are one product.

        y = down(silu(gate(x)) * up(x))

    Args:
        dim: width of input and output.
        hidden: width of the gate.

    Weights: gate_up.weight [2 * hidden, dim], rows [gate; up]; down.weight [dim, hidden]; no biases.
    Shape: [..., dim] -> [..., dim].
    Source: arXiv 2002.05202, eq. 6.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)
        self.kernels: Impl = "auto"

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to the last axis of `x`."""
        with span("mlp"):
            gate_up = self.gate_up(x)
            # Autocast does not reach into the operator: the weight comes in the dtype of the activations.
            return gated_mlp(gate_up, self.down.weight.to(gate_up.dtype), impl=self.kernels)


class MLP(nn.Module):
    """Two linear layers with GELU between them.

        y = fc2(gelu(fc1(x)))

    Args:
        dim: width of the input.
        hidden: width between the layers.
        out: width of the output; `dim` if None.
        approximate: "tanh" for the tanh form of GELU, "none" for the exact one.

    Weights: fc1 [hidden, dim], fc2 [out, hidden], both with biases.
    Shape: [..., dim] -> [..., out].
    Source: arXiv 1606.08415, section 2.
    """

    def __init__(
        self, dim: int, hidden: int, out: int | None = None, *, approximate: Approximate = "tanh"
    ) -> None:
        super().__init__()
        self.approximate = approximate
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim if out is None else out)
        self.kernels: Impl = "auto"

    def forward(self, x: Tensor) -> Tensor:
        """Apply both layers to the last axis of `x`."""
        with span("mlp"):
            # Autocast does not reach into the operator: all operands come in the dtype of the activations.
            dtype = activation_dtype(self.fc1.weight)
            layers = (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
            operands = (operand.to(dtype) for operand in (x, *layers))
            return gelu_mlp(*operands, approximate=self.approximate, impl=self.kernels)
