"""How a model computes: with which operators, and in which dtype where weights of several dtypes meet."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from reca.errors import ConfigError
from reca.kernels import Impl, can_run_fused


def set_kernels(model: nn.Module, impl: Impl) -> None:
    """Make every module of `model` that holds `kernels` use `impl`: `auto`, `fused` or `reference`.

    Raises: ConfigError if `fused` cannot run where the model lies.
    """
    device = next(model.parameters()).device
    if impl == "fused" and not can_run_fused(device):
        raise ConfigError(
            f"kernels=fused needs CUDA tensors, but the model is on {device.type}; use kernels=auto, or a GPU"
        )
    for module in model.modules():
        if hasattr(module, "kernels"):
            module.kernels = impl  # type: ignore[assignment]


def activation_dtype(weight: Tensor) -> torch.dtype:
    """What a linear layer of this weight yields here: autocast's dtype inside autocast, else its own."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def common_arithmetic(*weights: Tensor) -> AbstractContextManager[object]:
    """Autocast to the narrowest of the weights' dtypes where they differ and the caller chose no arithmetic.

    Outside of training, trained weights may be fp32 beside frozen ones in bf16; a run evaluates under its own
    autocast, which stays in force.
    """
    kind, dtypes = weights[0].device.type, {weight.dtype for weight in weights}
    if torch.is_autocast_enabled(kind) or len(dtypes) == 1:
        return nullcontext()
    return torch.autocast(kind, min(dtypes, key=lambda dtype: dtype.itemsize))
