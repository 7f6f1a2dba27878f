"""Checks, schemas, fakes, autograd and the public function."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from reca.kernels._checks import (
    FLOATS,
    check_dtype,
    check_impl,
    check_same_device,
    check_same_dtype,
    check_shape,
)
from reca.kernels._library import Impl, define_op
from reca.kernels.embedding_projection import reference
from reca.kernels.gelu_mlp.op import check_linear, mlp
from reca.kernels.gelu_mlp.reference import Activation

_NAME = "embedding_projection"


def _cuda(*arguments: Any) -> Tensor:
    from reca.kernels.embedding_projection import kernel

    return kernel.place(*arguments)


def _fake(projected: Tensor, bias: Tensor, *others: Any) -> Tensor:
    under: Tensor = projected if others[2] is None else others[2]
    return under.new_empty(under.shape)


def _backward_cpu(
    d_out: Tensor, bias: Tensor, rows: Tensor, source: Tensor, with_dbias: bool
) -> tuple[Tensor, Tensor]:
    d_projected, d_bias = reference.place_backward(d_out, bias, rows, source)
    return d_projected, d_bias if with_dbias else bias.new_empty(0)


def _backward_cuda(*arguments: Any) -> tuple[Tensor, Tensor]:
    from reca.kernels.embedding_projection import kernel

    return kernel.place_backward(*arguments)


def _backward_fake(
    d_out: Tensor, bias: Tensor, rows: Tensor, source: Tensor, with_dbias: bool
) -> tuple[Tensor, Tensor]:
    d_projected = bias.new_empty(rows.shape[0], d_out.shape[1])
    return d_projected, bias.new_empty(bias.shape if with_dbias else (0,))


_forward = define_op(
    "place_embeddings(Tensor projected, Tensor bias, Tensor? position, Tensor? position_ids,"
    " Tensor? destination, Tensor? source) -> Tensor out",
    cpu=reference.place,
    cuda=_cuda,
    fake=_fake,
)
_backward = define_op(
    "place_embeddings_backward(Tensor d_out, Tensor bias, Tensor rows, Tensor source, bool with_dbias)"
    " -> (Tensor d_projected, Tensor d_bias)",
    cpu=_backward_cpu,
    cuda=_backward_cuda,
    fake=_backward_fake,
)


class _Place(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor, bias: Tensor, destination: Any, *others: Any) -> Tensor:
        position, position_ids, rows = others
        source = None if destination is None else reference.sources(rows, destination.shape[0])
        ctx.save_for_backward(bias, rows, source)
        out: Tensor = _forward(projected, bias, position, position_ids, destination, source)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        bias, rows, source = ctx.saved_tensors
        need_projected, need_bias, need_destination = ctx.needs_input_grad[:3]
        d_projected = d_bias = d_destination = None
        if source is None:
            d_projected, d_bias = d_out, d_out.sum(dim=0) if need_bias else None
        elif need_projected or need_bias:
            d_projected, d_bias = _backward(d_out, bias, rows, source, need_bias)
        if need_destination:
            d_destination = torch.where((source < 0)[:, None], d_out, 0.0)
        return (
            d_projected if need_projected else None,
            d_bias if need_bias else None,
            d_destination,
            None,
            None,
            None,
        )


def _check_optional(
    features: Tensor,
    width: int,
    norm: tuple[Tensor | None, Tensor | None],
    places: tuple[Tensor | None, Tensor | None],
    sequence: tuple[Tensor | None, Tensor | None],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(tensors of the dtype of the features, other tensors), by name; pairs are whole or absent."""
    pairs = {
        ("norm_weight", "norm_bias"): norm,
        ("position", "position_ids"): places,
        ("destination", "rows"): sequence,
    }
    given: dict[str, Tensor] = {}
    for (first, second), (one, other) in pairs.items():
        if (one is None) != (other is None):
            raise ValueError(f"{_NAME}: {first} and {second} go together, got one of them; pass both")
        if one is not None and other is not None:
            given |= {first: one, second: other}
    for name in ("norm_weight", "norm_bias"):
        if name in given:
            check_shape(_NAME, name, given[name], (features.shape[1],), "one value per column of features")
    for name in ("position", "destination"):
        if name in given:
            table = given[name]
            check_shape(_NAME, name, table, (*table.shape[:1], width), "[rows, width of the projection]")
            check_dtype(_NAME, name, table, FLOATS)
    if "position" in given and given["position"].shape[0] == 0:
        raise ValueError(
            f"{_NAME}: position must be [positions > 0, {width}], got no rows; pass None for none"
        )
    for name in ("position_ids", "rows"):
        if name in given:
            check_shape(_NAME, name, given[name], (features.shape[0],), "one per row of features")
            check_dtype(_NAME, name, given[name], (torch.int64,))
    norms = {name: tensor for name, tensor in given.items() if name.startswith("norm_")}
    return norms, {name: tensor for name, tensor in given.items() if name not in norms}


def embedding_projection(
    features: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor | None = None,
    fc2_bias: Tensor | None = None,
    *,
    activation: Activation = "gelu",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    position: Tensor | None = None,
    position_ids: Tensor | None = None,
    destination: Tensor | None = None,
    rows: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Features of an encoder, projected, given a position and put into rows of a sequence.

        projected_i = fc2(activation(fc1(norm(features_i)))) + position[position_ids_i]
        out_r       = projected_i where r = rows_i,  destination_r elsewhere

    Without fc2 one linear layer is all: projected = fc1(norm(features)). Without a norm, a position or a
    destination that part falls away; without a destination the projected rows themselves are the result.
    Bias, position and placement are one pass that writes each row once, and reads of the destination only
    what stays. Kept for the backward: what `gelu_mlp` keeps, and one int32 per row.

    Args:
        features: [tokens, dim], floating; receives a gradient, as do weights, biases and the destination.
        fc1_weight, fc1_bias: [inner, dim] and [inner], dtype of features; without fc2 inner is the width.
        fc2_weight, fc2_bias: [width, inner] and [width], dtype of features, both or neither.
        activation: "gelu" (erf), "gelu_tanh", "gelu_sigmoid" or "silu"; unused without fc2.
        norm_weight, norm_bias: [dim], dtype of features: a LayerNorm first.
        norm_eps: added to its variance.
        position: [positions, width], floating. No gradient. With position_ids [tokens] int64.
        destination: [rows, width], floating; is not changed. Overwritten rows receive no gradient.
        rows: [tokens] int64, where each token goes; of equal rows the last token wins, the others are lost
            and receive no gradient.
        impl: "auto" follows the device; "reference" is plain torch; "fused" is the Triton kernels.

    Returns: [rows, width] in the dtype of the destination, or [tokens, width] in that of features; bias and
        position are added in fp32 and rounded once. A position out of range makes its row NaN, an index of
        `rows` out of range the nearest row, which no device read can report. Autocast does not apply inside.
    Raises: ValueError for shapes, devices and "fused" off CUDA; TypeError for dtypes.
    Source: the connector of LLaVA-1.5, arXiv 2310.03744, section 3.3.
    """
    if features.dim() != 2 or features.shape[1] == 0:
        raise ValueError(
            f"{_NAME}: features must be [tokens, dim > 0], got {list(features.shape)}; flatten [B, T, D]"
        )
    if activation not in get_args(Activation):
        names = ", ".join(get_args(Activation))
        raise ValueError(f"{_NAME}: activation must be one of {names}, got {activation!r}")
    if (fc2_weight is None) != (fc2_bias is None):
        raise ValueError(f"{_NAME}: fc2_weight and fc2_bias go together, got one of them; pass both")
    tensors = {"features": features} | check_linear(_NAME, "fc1", fc1_weight, fc1_bias, features.shape[1])
    last_bias = fc1_bias
    if fc2_weight is not None and fc2_bias is not None:
        tensors |= check_linear(_NAME, "fc2", fc2_weight, fc2_bias, fc1_weight.shape[0])
        last_bias = fc2_bias
    optional = ((norm_weight, norm_bias), (position, position_ids), (destination, rows))
    alike, others = _check_optional(features, last_bias.shape[0], *optional)
    check_same_dtype(_NAME, tensors | alike)
    check_same_device(_NAME, tensors | alike | others)
    check_impl(_NAME, impl, features)
    position = None if position is None else position.detach()
    # What is placed later gets its last bias there; what is not gets it from the product.
    is_placed = position is not None or destination is not None
    with torch.autocast(features.device.type, enabled=False):
        if norm_weight is not None:
            features = F.layer_norm(features, features.shape[1:], norm_weight, norm_bias, norm_eps)
        if fc2_weight is None:
            projected = F.linear(features, fc1_weight, None if is_placed else fc1_bias)
        else:
            bias = None if is_placed else fc2_bias
            projected = mlp(features, fc1_weight, fc1_bias, fc2_weight, bias, activation, impl)
        if not is_placed:
            return projected
        if impl == "reference":
            # Rows and destination are both given or both not.
            source = (
                None if destination is None or rows is None else reference.sources(rows, len(destination))
            )
            return reference.place(projected, last_bias, position, position_ids, destination, source)
        out: Tensor = _Place.apply(projected, last_bias, destination, position, position_ids, rows)  # type: ignore[no-untyped-call]
        return out
