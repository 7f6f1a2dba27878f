"""Checks, schema, fake, autograd and the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from reca.kernels._checks import (
    check_dtype,
    check_impl,
    check_same_device,
    check_same_dtype,
    check_shape,
)
from reca.kernels._library import Impl, define_op
from reca.kernels.skinny_linear import reference
from reca.kernels.skinny_linear.reference import NF4_BLOCK, Fp8Weight, Nf4Weight

_NAME = "skinny_linear"
_MAX_ROWS = 64

Weight = Tensor | Fp8Weight | Nf4Weight


def _pack(parts: tuple[Tensor | None, ...]) -> Weight:
    """The weight whose parts the operator was called with."""
    first, second, third, *nested = parts
    assert first is not None
    if third is not None:
        assert second is not None
        return Nf4Weight(first, second, third, *nested)
    return first if second is None else Fp8Weight(first.view(torch.float8_e4m3fn), second)


def _unpack(weight: Weight) -> tuple[Tensor | None, ...]:
    """Six parts; fp8 as bytes, because few tools of the dispatcher can handle more than its storage."""
    parts: tuple[Tensor | None, ...] = (weight,) if isinstance(weight, Tensor) else tuple(weight)
    if isinstance(weight, Fp8Weight):
        parts = (weight.values.view(torch.uint8), weight.scale)
    return (*parts, *[None] * (6 - len(parts)))


def _cpu(x: Tensor, *arguments: Any) -> Tensor:
    *parts, bias, transposed = arguments
    return reference.product(x, _pack(tuple(parts)), bias, transposed)


def _cuda(x: Tensor, *arguments: Any) -> Tensor:
    from reca.kernels.skinny_linear import kernel

    *parts, bias, transposed = arguments
    return kernel.product(x, _pack(tuple(parts)), bias, transposed)


def _fake(x: Tensor, matrix: Tensor, scale: Tensor | None, table: Tensor | None, *others: Any) -> Tensor:
    transposed = others[-1]
    width = matrix.shape[1] * (1 if table is None else 2) if transposed else matrix.shape[0]
    return x.new_empty(x.shape[0], width)


_product = define_op(
    f"{_NAME}(Tensor x, Tensor weight, Tensor? scale, Tensor? table, Tensor? nested_absmax,"
    " Tensor? nested_table, Tensor? offset, Tensor? bias, bool transposed) -> Tensor out",
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
)


@register_flop_formula(torch.ops.reca.skinny_linear)
def _flops(
    x_shape: torch.Size, weight_shape: torch.Size, scale: Any, table: Any, *others: Any, **named: Any
) -> int:
    """One product and sum per row and weight; two weights per byte of NF4."""
    return 2 * x_shape[0] * weight_shape.numel() * (1 if table is None else 2)


class _SkinnyLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, *parts: Tensor | None) -> Tensor:
        ctx.save_for_backward(*parts)
        out: Tensor = _product(x, *parts, bias, False)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        return (_product(d_out, *ctx.saved_tensors, None, True), *[None] * 7)


def _check_nf4(weight: Nf4Weight) -> int:
    """Number of inputs, once the parts fit each other."""
    packed = weight.packed
    check_dtype(_NAME, "weight.packed", packed, (torch.uint8,))
    if packed.shape[1] % (NF4_BLOCK // 2):
        got = list(packed.shape)
        raise ValueError(
            f"{_NAME}: weight.packed must be [out, a multiple of {NF4_BLOCK // 2}], got {got}; "
            "two weights per byte, whole blocks of 64"
        )
    blocks = 2 * packed.numel() // NF4_BLOCK
    check_shape(_NAME, "weight.absmax", weight.absmax, (blocks,), "one scale per 64 weights")
    check_shape(_NAME, "weight.table", weight.table, (16,), "the value of each code")
    nested = (weight.nested_absmax, weight.nested_table, weight.offset)
    scales = (torch.float32,) if weight.nested_absmax is None else (torch.uint8,)
    check_dtype(_NAME, "weight.absmax", weight.absmax, scales)
    if len({part is None for part in nested}) > 1:
        raise ValueError(
            f"{_NAME}: weight.nested_absmax, nested_table and offset go together, got some of them; "
            "pass all or none"
        )
    shapes = ((-(-blocks // 256),), (256,), ())
    names = ("nested_absmax", "nested_table", "offset")
    for name, part, shape in zip(names, nested, shapes, strict=True):
        if part is not None:
            check_shape(_NAME, f"weight.{name}", part, shape, "as quantize_nf4 makes it")
            check_dtype(_NAME, f"weight.{name}", part, (torch.float32,))
    check_dtype(_NAME, "weight.table", weight.table, (torch.float32,))
    return 2 * packed.shape[1]


def _check_fp8(weight: Fp8Weight) -> int:
    """Number of inputs, once the parts fit each other."""
    check_dtype(_NAME, "weight.values", weight.values, (torch.float8_e4m3fn,))
    check_shape(_NAME, "weight.scale", weight.scale, (weight.values.shape[0],), "one scale per output")
    check_dtype(_NAME, "weight.scale", weight.scale, (torch.float32,))
    return weight.values.shape[1]


def _check(x: Tensor, weight: Weight, bias: Tensor | None, impl: Impl) -> None:
    matrix = weight if isinstance(weight, Tensor) else weight[0]
    if matrix.dim() != 2 or 0 in matrix.shape:
        got = list(matrix.shape)
        raise ValueError(f"{_NAME}: weight must be [out > 0, in > 0], got {got}; as nn.Linear holds it")
    tensors = {"x": x}
    if isinstance(weight, Tensor):
        tensors["weight"], num_ins = weight, weight.shape[1]
    else:
        num_ins = _check_nf4(weight) if isinstance(weight, Nf4Weight) else _check_fp8(weight)
    if x.dim() == 0 or x.shape[-1] != num_ins:
        got = list(x.shape)
        raise ValueError(f"{_NAME}: x must be [..., in={num_ins}], got {got}; one column per input of weight")
    rows = x.numel() // num_ins
    if rows > _MAX_ROWS:
        raise ValueError(
            f"{_NAME}: x must have at most {_MAX_ROWS} rows, got {rows}; use torch's linear for more"
        )
    if bias is not None:
        check_shape(_NAME, "bias", bias, (matrix.shape[0],), "one value per row of weight")
        tensors["bias"] = bias
    check_same_dtype(_NAME, tensors)
    parts = {"weight": weight} if isinstance(weight, Tensor) else weight._asdict()
    present = {name: part for name, part in parts.items() if part is not None}
    check_same_device(_NAME, {**tensors, **present})
    frozen = [*present.values(), *([] if bias is None else [bias])]
    if torch.is_grad_enabled() and any(part.requires_grad for part in frozen):
        raise ValueError(
            f"{_NAME}: weight and bias must be frozen, got requires_grad; use torch's linear to train them"
        )
    check_impl(_NAME, impl, x)


def skinny_linear(x: Tensor, weight: Weight, bias: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
    """A few rows through a large frozen matrix, which is read once, in the form in which it is stored.

        out = x weight^T + bias

    Args:
        x: [..., in], bf16, fp16 or fp32 (fp64 off CUDA), at most 64 rows; receives the gradient.
        weight: [out, in] in the dtype of x, or a `Fp8Weight` or `Nf4Weight`. Frozen.
        bias: [out] in the dtype of x, or None. Frozen.
        impl: "auto" follows the device; "reference" is plain torch; "fused" is the Triton kernel.

    Returns: [..., out] in the dtype of x; on CUDA NF4 weights are rounded to that dtype before the product,
        as bitsandbytes does; sums are fp32, in a fixed order, and the result is rounded once.
    Raises: ValueError for shapes, devices, more than 64 rows, weights that require gradients, "fused" off
        CUDA; TypeError for dtypes.
    Source: NF4 and nested scales, arXiv 2305.14314, section 3.
    """
    _check(x, weight, bias, impl)
    parts = _unpack(weight)
    rows = x.reshape(-1, x.shape[-1])
    out: Tensor
    if impl == "reference":
        out = reference.product(rows, weight, bias, False)
    elif torch.is_grad_enabled() and x.requires_grad:
        out = _SkinnyLinear.apply(rows, bias, *parts)  # type: ignore[no-untyped-call]
    else:
        out = _product(rows, *parts, bias, False)
    return out.view(*x.shape[:-1], out.shape[1])
