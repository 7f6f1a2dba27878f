"""The two feed-forward blocks that families share."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from reca.kernels import Impl, gated_mlp
from reca.profiling import span


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
    """Two linear layers with the tanh form of GELU between them.

        y = fc2(gelu_tanh(fc1(x)))

    Args:
        dim: width of the input.
        hidden: width between the layers.
        out: width of the output; `dim` if None.

    Weights: fc1 [hidden, dim], fc2 [out, hidden], both with biases.
    Shape: [..., dim] -> [..., out].
    Source: arXiv 1606.08415, section 2.
    """

    def __init__(self, dim: int, hidden: int, out: int | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim if out is None else out)

    def forward(self, x: Tensor) -> Tensor:
        """Apply both layers to the last axis of `x`."""
        with span("mlp"):
            out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
            return out
