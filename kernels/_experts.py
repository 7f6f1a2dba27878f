"""Weights per row: `experts` names, for each row, the line of a [num_experts, dim] weight that it uses."""

from __future__ import annotations

import torch
from torch import Tensor

from reca.kernels._checks import check_dtype, check_same_device, check_shape


def check_experts(operator: str, experts: Tensor | None, expected: tuple[int, ...], like: Tensor) -> None:
    """ValueError or TypeError unless `experts`, if any, is int32 of this shape beside `like`."""
    if experts is not None:
        check_shape(operator, "experts", experts, expected, "one expert per row")
        check_dtype(operator, "experts", experts, (torch.int32,))
        check_same_device(operator, {"rows": like, "experts": experts})


def check_expert_weight(
    operator: str, name: str, weight: Tensor, width: int, experts: Tensor | None, legend: str
) -> None:
    """ValueError unless `weight` is [width], or [1 or more experts, width] where rows choose experts."""
    if experts is None:
        check_shape(operator, name, weight, (width,), legend)
    elif weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != width:
        raise ValueError(
            f"{operator}: {name} must be [1 or more experts, {width}] beside experts, got "
            f"{list(weight.shape)}; {legend}"
        )


def weight_rows(weight: Tensor, experts: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`weight` itself, or the [rows, dim] that `experts` choose of it; NaN where there is no such expert."""
    if experts is None:
        return weight.to(dtype)
    known = (experts >= 0) & (experts < weight.shape[0])
    chosen = weight.to(dtype)[experts.clamp(0, weight.shape[0] - 1).long()]
    return torch.where(known[:, None], chosen, torch.nan)


def sum_by_expert(rows: Tensor, experts: Tensor | None, num_experts: int) -> Tensor:
    """[dim] sum of [rows, dim], or [num_experts, dim] where each expert sums the rows that chose it."""
    if experts is None:
        return rows.sum(dim=0)
    # A sum per expert has one order; an index_add_ has none on a GPU.
    return torch.stack([rows.where(experts[:, None] == e, 0).sum(dim=0) for e in range(num_experts)])
