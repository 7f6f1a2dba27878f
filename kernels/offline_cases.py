"""Launches of real sizes that are compiled offline, operator by operator; and the exceptions to the gates."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

NARROW_ACCESS = {
    "depthwise_glu": "two channels per thread, 4 bytes: a warp still reads whole lines, and eight channels "
    "would need four times the registers for columns, weights and gradients",
}
"""Cases that need not move 16 bytes per access, each with its reason."""


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """What a launcher may be called with while launches are recorded."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _depthwise_glu() -> None:
    from reca.kernels.depthwise_glu import kernel

    inputs = (meta(42, 16, 16, 11200), meta(11200, 1, 3, 3), meta(11200), True)
    kernel.backward(kernel.forward(*inputs), *inputs, True, True)


def _embedding_projection() -> None:
    from reca.kernels.embedding_projection import kernel

    rows, bias, tokens = meta(40960, 3584), meta(3584), meta(39200, dtype=torch.int64)
    table, source = meta(4900, 3584, dtype=torch.float32), meta(40960, dtype=torch.int32)
    kernel.place(meta(39200, 3584), bias, table, tokens, rows, source)
    kernel.place_backward(rows, bias, tokens, source, True)


def _embedding_projection_plain() -> None:
    from reca.kernels.embedding_projection import kernel

    rows, ids = meta(32768, 2048), meta(32768, dtype=torch.int64)
    kernel.place(rows, meta(2048), meta(4096, 2048), ids, None, None)


def _gelu_mlp(activation: str) -> None:
    from reca.kernels.gelu_mlp import kernel

    rows, bias = meta(39200, 4304), meta(4304)
    kernel.forward(rows, bias, activation)
    kernel.backward(rows, rows, bias, activation, True, True)


def _linear_attention() -> None:
    from reca.kernels.linear_attention import kernel

    query, key, value = meta(42, 256, 3, 70, 32).unbind(dim=2)
    out = kernel.forward(query, key, value, 1e-15)
    kernel.backward(out, query, key, value, 1e-15, True, True, True)


def _skinny_linear(storage: str, transposed: bool) -> None:
    from reca.kernels.skinny_linear import kernel
    from reca.kernels.skinny_linear.reference import Fp8Weight, Nf4Weight

    outs, ins, blocks = 4608, 3584, 4608 * 3584 // 64
    weight: Tensor | Fp8Weight | Nf4Weight = meta(outs, ins)
    if storage == "fp8":
        weight = Fp8Weight(meta(outs, ins, dtype=torch.float8_e4m3fn), meta(outs, dtype=torch.float32))
    if storage == "nf4":
        codes = (meta(outs, ins // 2, dtype=torch.uint8), meta(blocks, dtype=torch.uint8))
        sizes = ((16,), (blocks // 256,), (256,), ())
        weight = Nf4Weight(*codes, *(meta(*size, dtype=torch.float32) for size in sizes))
    kernel.product(
        meta(16, outs if transposed else ins), weight, None if transposed else meta(outs), transposed
    )


CASES: dict[str, Callable[[], None]] = {
    "depthwise_glu": _depthwise_glu,
    "embedding_projection": _embedding_projection,
    "embedding_projection_plain": _embedding_projection_plain,
    "gelu_mlp_erf": functools.partial(_gelu_mlp, "gelu"),
    "gelu_mlp_tanh": functools.partial(_gelu_mlp, "gelu_tanh"),
    "linear_attention": _linear_attention,
    "skinny_linear": functools.partial(_skinny_linear, "plain", False),
    "skinny_linear_transposed": functools.partial(_skinny_linear, "plain", True),
    "skinny_linear_fp8": functools.partial(_skinny_linear, "fp8", False),
    "skinny_linear_fp8_transposed": functools.partial(_skinny_linear, "fp8", True),
    "skinny_linear_nf4": functools.partial(_skinny_linear, "nf4", False),
    "skinny_linear_nf4_transposed": functools.partial(_skinny_linear, "nf4", True),
}
