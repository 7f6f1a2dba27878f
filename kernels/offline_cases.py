"""Launches of real sizes that are compiled offline, operator by operator; and the exceptions to the gates."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from reca.kernels.philox.reference import NORMAL, UNIFORM, WORDS

NARROW_ACCESS = {
    "depthwise_glu": "two channels per thread, 4 bytes: a warp still reads whole lines, and eight channels "
    "would need four times the registers for columns, weights and gradients",
    "group_norm_silu": "a program of the first kernel writes two numbers; all else moves 16 bytes",
}
"""Cases that need not move 16 bytes per access, each with its reason."""


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """What a launcher may be called with while launches are recorded."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _adaln_modulation_grouped() -> None:
    from reca.kernels.adaln_modulation import grouped_kernel as kernel

    stream, branch = meta(42 * 256, 2240, dtype=torch.float32), meta(42 * 256, 2240)
    shared = meta(42, 6 * 2240, dtype=torch.float32)[:, :2240]
    summed, out, mean, rstd = kernel.forward(stream, branch, shared, shared, 1e-6, torch.bfloat16)
    kernel.backward(out, stream, summed, shared, mean, rstd, torch.bfloat16, True, True)
    kernel.gate_residual(branch, shared, stream)


def _adaln_modulation_grouped_back() -> None:
    from reca.kernels.adaln_modulation import grouped_kernel as kernel

    stream, branch = meta(42 * 256, 2240, dtype=torch.float32), meta(42 * 256, 2240)
    kernel.gate_backward(stream, branch, meta(42, 6 * 2240, dtype=torch.float32)[:, :2240])


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


def _layer_norm(rows: int, dim: int, deltas: int) -> None:
    from reca.kernels.layer_norm import kernel

    stream, branch = meta(rows, dim, dtype=torch.float32 if deltas else torch.bfloat16), meta(rows, dim)
    parameters = (meta(dim, dtype=torch.float32), meta(dim, dtype=torch.float32))
    kernel.forward(stream, [branch] * deltas, *parameters, 1e-5, torch.bfloat16)
    passed, dtype = (stream, torch.bfloat16) if deltas else (None, None)
    kernel.backward([branch] * max(deltas, 1), passed, stream, parameters[0], 1e-5, True, dtype, True)


def _qk_norm_rope_spread() -> None:
    from reca.kernels.qk_norm_rope import kernel

    rows, places = 3270, 5648
    qkv, weight, angle = (
        meta(rows, 96 * 64),
        meta(64, dtype=torch.float32),
        meta(rows, 16, dtype=torch.float32),
    )
    inputs = (qkv, weight, weight, angle, angle, 32, 32, 1e-5)
    keys, destinations = meta(places, 32, 64), meta(rows, 3, dtype=torch.int64)
    query, *_ = kernel.forward(*inputs, weight, weight, into=(keys, keys, destinations))
    pieces = [rows_.split([rows_.shape[0] - 70, 70]) for rows_ in (query, keys, keys)]
    kernel.backward_of_pieces(*pieces, *inputs, True, True, weight, None, destinations)


def _group_norm_silu() -> None:
    from reca.kernels.group_norm_silu import kernel

    parameters = (meta(128, dtype=torch.float32), meta(128, dtype=torch.float32))
    kernel.forward(meta(1, 128, 1024, 1024), *parameters, 32, 1e-6, torch.bfloat16)


def _linear_attention() -> None:
    from reca.kernels.linear_attention import kernel

    query, key, value = meta(42, 256, 3, 70, 32).unbind(dim=2)
    out = kernel.forward(query, key, value, 1e-15)
    kernel.backward(out, query, key, value, 1e-15, True, True, True)


def _philox(kind: int) -> None:
    from reca.kernels.philox import kernel

    kernel.forward(meta(48, dtype=torch.int64), 262_144, 0x1234_5678_9ABC_DEF1, 5, kind)


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
    "adaln_modulation_grouped": _adaln_modulation_grouped,
    "adaln_modulation_grouped_back": _adaln_modulation_grouped_back,
    "depthwise_glu": _depthwise_glu,
    "embedding_projection": _embedding_projection,
    "embedding_projection_plain": _embedding_projection_plain,
    "gelu_mlp_erf": functools.partial(_gelu_mlp, "gelu"),
    "gelu_mlp_tanh": functools.partial(_gelu_mlp, "gelu_tanh"),
    "layer_norm": functools.partial(_layer_norm, 32768, 2048, 2),
    "layer_norm_plain": functools.partial(_layer_norm, 32768, 1024, 0),
    "group_norm_silu": _group_norm_silu,
    "linear_attention": _linear_attention,
    "philox": functools.partial(_philox, NORMAL),
    "philox_uniform": functools.partial(_philox, UNIFORM),
    "philox_words": functools.partial(_philox, WORDS),
    "qk_norm_rope_spread": _qk_norm_rope_spread,
    "skinny_linear": functools.partial(_skinny_linear, "plain", False),
    "skinny_linear_transposed": functools.partial(_skinny_linear, "plain", True),
    "skinny_linear_fp8": functools.partial(_skinny_linear, "fp8", False),
    "skinny_linear_fp8_transposed": functools.partial(_skinny_linear, "fp8", True),
    "skinny_linear_nf4": functools.partial(_skinny_linear, "nf4", False),
    "skinny_linear_nf4_transposed": functools.partial(_skinny_linear, "nf4", True),
}
