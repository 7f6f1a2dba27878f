"""Guards of the public operators: one message form, shapes and types only, never a value on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

import torch
from torch import Tensor

from reca.kernels._library import Impl, can_run_fused

MAX_WIDTH = 32768
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def names_of(dtypes: Sequence[torch.dtype]) -> str:
    """float32, bfloat16, ..."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_shape(operator: str, name: str, tensor: Tensor, expected: tuple[int, ...], legend: str) -> None:
    """ValueError unless `tensor` has exactly this shape; `legend` names its dimensions and the cure."""
    if tensor.shape != expected:
        raise ValueError(f"{operator}: {name} must be {list(expected)}, got {list(tensor.shape)}; {legend}")


def check_width(operator: str, name: str, tensor: Tensor) -> None:
    """ValueError unless rows of `tensor` hold at least one element and fit the registers of one program."""
    if tensor.dim() == 0 or not 0 < tensor.shape[-1] <= MAX_WIDTH:
        raise ValueError(
            f"{operator}: {name} must be [..., 1 to {MAX_WIDTH}], got {list(tensor.shape)}; "
            "normalise over the last dimension, split wider rows"
        )


def check_dtype(operator: str, name: str, tensor: Tensor, allowed: Sequence[torch.dtype]) -> None:
    """TypeError unless the dtype of `tensor` is one of `allowed`."""
    if tensor.dtype not in allowed:
        got = names_of([tensor.dtype])
        raise TypeError(f"{operator}: {name} must be one of {names_of(allowed)}, got {got}; convert it first")


def check_same_dtype(operator: str, tensors: Mapping[str, Tensor]) -> None:
    """TypeError unless all of `tensors` share one floating dtype; the first one decides."""
    (first, leader), *others = tensors.items()
    check_dtype(operator, first, leader, FLOATS)
    for name, tensor in others:
        if tensor.dtype != leader.dtype:
            want, got = names_of([leader.dtype]), names_of([tensor.dtype])
            raise TypeError(f"{operator}: {name} must be {want} like {first}, got {got}; convert one of them")


def check_same_device(operator: str, tensors: Mapping[str, Tensor]) -> None:
    """ValueError unless all of `tensors` are on one device; the first one decides."""
    (first, leader), *others = tensors.items()
    for name, tensor in others:
        if tensor.device != leader.device:
            raise ValueError(
                f"{operator}: {name} must be on {leader.device} like {first}, got {tensor.device}; "
                "move it there"
            )


def check_impl(operator: str, impl: Impl, tensor: Tensor) -> None:
    """ValueError for an unknown `impl`, and for "fused" where no kernel can run or the dtype has none."""
    if impl not in get_args(Impl):
        raise ValueError(f"{operator}: impl must be one of {', '.join(get_args(Impl))}, got {impl!r}")
    if impl == "fused" and not can_run_fused(tensor.device):
        raise ValueError(
            f"{operator}: impl='fused' needs CUDA tensors, got {tensor.device.type}; "
            "use impl='auto' or move them"
        )
    if tensor.device.type == "cuda" and tensor.dtype == torch.float64 and impl != "reference":
        raise TypeError(f"{operator}: no float64 kernel on CUDA; use impl='reference' or float32")


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """What references compute in: fp32 for every storage type but fp64."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
