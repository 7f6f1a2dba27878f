"""What the public function refuses."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from reca.kernels._checks import (
    FLOATS,
    check_dtype,
    check_impl,
    check_same_device,
    check_same_dtype,
    check_shape,
)
from reca.kernels._experts import check_expert_weight, check_experts
from reca.kernels._library import Impl

_NAME = "qk_norm_rope"


def check(
    qkv: Tensor,
    weights: Mapping[str, Tensor | None],
    biases: Mapping[str, Tensor | None],
    angles: Mapping[str, Tensor | None],
    heads: int,
    kv_heads: int,
    experts: Tensor | None,
    into: tuple[Tensor, Tensor, Tensor] | None,
    impl: Impl,
) -> None:
    """Raises ValueError or TypeError unless everything fits `qkv`."""
    if heads < 0 or kv_heads < 0 or heads + kv_heads == 0:
        raise ValueError(
            f"{_NAME}: heads and kv_heads must not be negative, nor both 0, got {heads} and {kv_heads}"
        )
    total = heads + 2 * kv_heads
    if qkv.dim() != 2 or qkv.shape[1] == 0 or qkv.shape[1] % total:
        raise ValueError(
            f"{_NAME}: qkv must be [rows, ({heads} + 2 * {kv_heads}) * dim], got {list(qkv.shape)}; "
            "join query, key and value heads in this order"
        )
    dim = qkv.shape[1] // total
    for pair in (weights, biases, angles):
        given = [name for name, tensor in pair.items() if tensor is not None]
        if len(given) == 1:
            raise ValueError(
                f"{_NAME}: {' and '.join(pair)} go together, got only {given[0]}; pass both or none"
            )
    _check_parameters(qkv, weights, biases, dim, experts)
    _check_angles(qkv, angles, dim)
    check_same_dtype(_NAME, {"qkv": qkv})
    if into is not None:
        _check_buffers(qkv, *into, kv_heads, dim)
    check_impl(_NAME, impl, qkv)


def _check_parameters(
    qkv: Tensor,
    weights: Mapping[str, Tensor | None],
    biases: Mapping[str, Tensor | None],
    dim: int,
    experts: Tensor | None,
) -> None:
    has_norm = all(weight is not None for weight in weights.values())
    if not has_norm and any(tensor is not None for tensor in (*biases.values(), experts)):
        raise ValueError(f"{_NAME}: biases and experts need query_weight and key_weight; pass them too")
    check_experts(_NAME, experts, (qkv.shape[0],), qkv)
    parameters = {name: t for name, t in {**weights, **biases}.items() if t is not None}
    for name, parameter in parameters.items():
        check_expert_weight(_NAME, name, parameter, dim, experts, "one value per dimension of a head")
        check_dtype(_NAME, name, parameter, FLOATS)
        check_same_device(_NAME, {"qkv": qkv, name: parameter})
    lines = {name: parameter.shape[0] for name, parameter in parameters.items()}
    if len(set(lines.values())) > 1:
        raise ValueError(f"{_NAME}: weights and biases must be of equally many experts, got {lines}")


def _check_angles(qkv: Tensor, angles: Mapping[str, Tensor | None], dim: int) -> None:
    for name, angle in angles.items():
        if angle is None:
            continue
        if angle.dim() != 2 or angle.shape[0] != qkv.shape[0] or not 0 < 2 * angle.shape[1] <= dim:
            raise ValueError(
                f"{_NAME}: {name} must be [{qkv.shape[0]}, 1 to {dim // 2}], got {list(angle.shape)}; "
                "one angle per row and rotated pair"
            )
        check_dtype(_NAME, name, angle, (torch.float32,))
        check_same_device(_NAME, {"qkv": qkv, name: angle})
    cos, sin = angles["cos"], angles["sin"]
    if cos is not None and sin is not None:
        check_shape(_NAME, "sin", sin, tuple(cos.shape), "shaped like cos")


def _check_buffers(
    qkv: Tensor, keys: Tensor, values: Tensor, destinations: Tensor, kv_heads: int, dim: int
) -> None:
    check_shape(_NAME, "destinations", destinations, (qkv.shape[0],), "one place per row")
    check_dtype(_NAME, "destinations", destinations, (torch.int64,))
    for name, buffer in {"keys": keys, "values": values}.items():
        check_shape(_NAME, name, buffer, (keys.shape[0], kv_heads, dim), "[places, kv_heads, dim]")
        if not buffer.is_contiguous():
            raise ValueError(
                f"{_NAME}: {name} must be contiguous, got strides {list(buffer.stride())}; "
                "it is written in place"
            )
    check_same_dtype(_NAME, {"qkv": qkv, "keys": keys, "values": values})
    check_same_device(_NAME, {"qkv": qkv, "keys": keys, "values": values, "destinations": destinations})
