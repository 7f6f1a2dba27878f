"""Quantised weights and the product with them in plain torch; fp32 inside, fp64 for fp64 inputs.

fp8:  weight_nk = scale_n * values_nk,    scale_n = max_k |weight_nk| / 448
NF4:  weight_nk = absmax_b * table[code_nk],    b = (n * in_features + k) // 64
      absmax_b  = nested_table[absmax code_b] * nested_absmax_{b // 256} + offset        where it is nested

out = x weight^T + bias, or x weight for the gradient of x; rounded once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from reca.kernels._checks import compute_dtype

NF4_BLOCK = 64
_NESTED_BLOCK = 256
_FP8_MAX = 448.0
# Quantiles of a normal distribution with an exact 0 and both ends at 1: arXiv 2305.14314, appendix E.
_NF4_TABLE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


class Fp8Weight(NamedTuple):
    """A matrix in fp8 with one scale per output.

    Attributes:
        values: [out, in] float8_e4m3fn.
        scale: [out] fp32.
    """

    values: Tensor
    scale: Tensor


class Nf4Weight(NamedTuple):
    """A matrix in 4-bit normal floats with one scale per 64 weights.

    The bytes are those of bitsandbytes with blocksize 64: its packed data viewed as [out, in / 2], and of its
    quantisation state absmax, code, state2.absmax, state2.code and offset.

    Attributes:
        packed: [out, in / 2] uint8, two codes per byte, the first one in the high half.
        absmax: [out * in / 64] fp32, or uint8 codes where the scales are quantised themselves.
        table: [16] fp32, the value of each code.
        nested_absmax: [out * in / 64 / 256, rounded up] fp32, or None.
        nested_table: [256] fp32, the value of each code of absmax, or None.
        offset: [] fp32, the mean that was taken from absmax, or None.
    """

    packed: Tensor
    absmax: Tensor
    table: Tensor
    nested_absmax: Tensor | None = None
    nested_table: Tensor | None = None
    offset: Tensor | None = None


def quantize_fp8(weight: Tensor) -> Fp8Weight:
    """Round a matrix to fp8 e4m3 with one scale per row, of which the largest entry becomes 448.

    Args:
        weight: [out, in], floating. A row with a NaN or an infinity becomes NaN.
    """
    wide = weight.detach().to(torch.float32)
    largest = wide.abs().amax(dim=1) if wide.shape[1] else wide.new_zeros(len(wide))
    scale = torch.where(largest > 0, largest / _FP8_MAX, torch.where(largest.isnan(), largest, 1.0))
    return Fp8Weight((wide / scale[:, None]).to(torch.float8_e4m3fn), scale)


def _nearest(values: Tensor, table: Tensor) -> Tensor:
    """Index of the nearest entry of an ascending table, uint8."""
    return torch.bucketize(values, (table[1:] + table[:-1]) / 2, out_int32=True).to(torch.uint8)


def _nested_table(device: torch.device) -> Tensor:
    """bitsandbytes' signed dynamic map: seven decades with 1, 2, ..., 64 steps each, both signs, 0 and 1."""
    magnitudes = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, (1 << decade) + 1, dtype=torch.float32)
        magnitudes.append((edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6))
    positive = torch.cat(magnitudes)
    return torch.cat([positive, -positive, torch.tensor([0.0, 1.0])]).sort().values.to(device)


def _blockwise(flat: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(values divided by the largest magnitude of their block, those magnitudes)."""
    blocks = F.pad(flat, (0, -len(flat) % block)).view(-1, block)
    largest = blocks.abs().amax(dim=1) if len(blocks) else blocks.new_zeros(0)
    scaled = blocks / torch.where(largest > 0, largest, 1.0)[:, None]
    return scaled.view(-1)[: len(flat)], largest


def quantize_nf4(weight: Tensor, *, nested: bool = True) -> Nf4Weight:
    """Round a matrix to 4-bit normal floats, 64 weights to a scale, in bitsandbytes' layout.

    Args:
        weight: [out, in], floating, finite; in is a multiple of 64.
        nested: whether to quantise the scales too: 4.13 bits per weight instead of 4.5.

    Raises: ValueError for a shape that blocks of 64 do not divide.
    """
    if weight.dim() != 2 or weight.shape[1] % NF4_BLOCK:
        raise ValueError(
            f"quantize_nf4: weight must be [out, a multiple of {NF4_BLOCK}], got {list(weight.shape)}; "
            "keep it in fp8 or plain"
        )
    table = torch.tensor(_NF4_TABLE, dtype=torch.float32, device=weight.device)
    scaled, absmax = _blockwise(weight.detach().to(torch.float32).reshape(-1), NF4_BLOCK)
    codes = _nearest(scaled, table)
    packed = (codes[::2] << 4 | codes[1::2]).view(weight.shape[0], weight.shape[1] // 2)
    if not nested or not len(absmax):
        return Nf4Weight(packed, absmax, table)
    nested_table, offset = _nested_table(weight.device), absmax.mean()
    scaled, nested_absmax = _blockwise(absmax - offset, _NESTED_BLOCK)
    return Nf4Weight(packed, _nearest(scaled, nested_table), table, nested_absmax, nested_table, offset)


def dequantize_nf4(weight: Nf4Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix [out, in] that the codes mean."""
    absmax = weight.absmax
    if weight.nested_absmax is not None:
        assert weight.nested_table is not None and weight.offset is not None
        scales = weight.nested_absmax.repeat_interleave(_NESTED_BLOCK)[: len(absmax)]
        absmax = weight.nested_table[absmax.int()] * scales + weight.offset
    codes = torch.stack([weight.packed >> 4, weight.packed & 15], dim=2).int()
    values = weight.table[codes].view(-1, NF4_BLOCK) * absmax[:, None]
    return values.view(weight.packed.shape[0], 2 * weight.packed.shape[1]).to(dtype)


def dequantize(weight: Tensor | Fp8Weight | Nf4Weight, dtype: torch.dtype) -> Tensor:
    """[out, in] in `dtype`, whatever the storage."""
    if isinstance(weight, Nf4Weight):
        return dequantize_nf4(weight, dtype)
    if isinstance(weight, Fp8Weight):
        return (weight.values.to(torch.float32) * weight.scale[:, None]).to(dtype)
    return weight.to(dtype)


def product(
    x: Tensor, weight: Tensor | Fp8Weight | Nf4Weight, bias: Tensor | None, transposed: bool
) -> Tensor:
    """[rows, out], or [rows, in] if transposed, in the dtype of x [rows, in], or [rows, out]."""
    dtype = compute_dtype(x)
    wide = dequantize(weight, dtype)
    with torch.autocast(x.device.type, enabled=False):
        out = x.to(dtype) @ (wide if transposed else wide.t())
    return (out if bias is None else out + bias.to(dtype)).to(x.dtype)
