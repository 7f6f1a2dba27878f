# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"
"""Triton: mean and spread of parts of each group, then the norm; two reads and one write in all.

The groups of one picture are fewer than a GPU has processors (32), so each is cut into parts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from reca.kernels._launch import (
    architecture_of,
    ceil_div,
    launch,
    launch_config,
    multiprocessors,
    next_power_of_two,
)

_MAX_PARTS = 64  # of a group; every program of the second kernel joins them
_STEPS = 4  # tiles of one program of the second kernel


@triton.jit
def _moments_kernel(x_ptr, moments_ptr, length, part, steps, PARTS: tl.constexpr, TILE: tl.constexpr):
    group = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1).to(tl.int64) * part
    x_ptr += group * length + start
    left = length - start
    cols = tl.arange(0, TILE)
    # Every lane has its own mean: sums of squares would lose the spread of values far from zero.
    mean, square = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
    for step in range(steps):
        inside = cols < left - step * TILE
        x = tl.load(x_ptr + cols, mask=inside, other=0.0).to(tl.float32)
        delta = tl.where(inside, x - mean, 0.0)
        mean += delta * (1.0 / (step + 1))
        square += delta * (x - mean)
        x_ptr += TILE
    count = tl.minimum(tl.maximum((left - cols + TILE - 1) // TILE, 0), steps).to(tl.float32)
    total = tl.minimum(left, part).to(tl.float32)
    centre = tl.sum(count * mean, axis=0) / total
    spread = tl.sum(square + count * (mean - centre) * (mean - centre), axis=0)
    moments_ptr += (group * PARTS + tl.program_id(1)) * 2
    tl.store(moments_ptr, centre)
    tl.store(moments_ptr + 1, spread)


@triton.jit
def _norm_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    moments_ptr,
    out_ptr,
    length,
    positions,
    channels,
    channels_of_group,
    part,
    parts,
    eps,
    PARTS: tl.constexpr,
    STEPS: tl.constexpr,
    TILE: tl.constexpr,
):
    line = tl.program_id(0).to(tl.int64)  # one channel of one picture
    channel = line % channels
    index = tl.arange(0, PARTS)
    moments_ptr += (line // channels_of_group) * PARTS * 2 + index * 2
    known = index < parts
    means = tl.load(moments_ptr, mask=known, other=0.0)
    spreads = tl.load(moments_ptr + 1, mask=known, other=0.0)
    sizes = tl.minimum(length - index.to(tl.int64) * part, part).to(tl.float32)
    sizes = tl.where(known, sizes, 0.0)
    total = tl.sum(sizes, axis=0)
    mean = tl.sum(sizes * means, axis=0) / total
    spread = tl.sum(spreads + sizes * (means - mean) * (means - mean), axis=0)
    scale = tl.load(weight_ptr + channel).to(tl.float32) * tl.rsqrt(spread / total + eps)
    bias = tl.load(bias_ptr + channel).to(tl.float32)
    start = tl.program_id(1).to(tl.int64) * (STEPS * TILE)
    x_ptr += line * positions + start
    out_ptr += line * positions + start
    left = positions - start
    cols = tl.arange(0, TILE)
    for _ in range(STEPS):
        inside = cols < left
        x = tl.load(x_ptr + cols, mask=inside, other=0.0).to(tl.float32)
        normed = (x - mean) * scale + bias
        out = normed * tl.sigmoid(normed)
        tl.store(out_ptr + cols, out.to(out_ptr.dtype.element_ty), mask=inside)
        x_ptr += TILE
        out_ptr += TILE
        left -= TILE


def forward(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, dtype: torch.dtype) -> Tensor:
    """The shape of `x` [batch, channels, ...], in `dtype`."""
    x = x.contiguous()
    out = torch.empty_like(x, dtype=dtype)
    batch, channels = x.shape[:2]
    if not x.numel():
        return out
    positions = x.numel() // (batch * channels)
    architecture = architecture_of(x)
    config = launch_config("group_norm_silu", architecture, x.dtype, positions)
    rows, length = batch * groups, channels // groups * positions
    tiles = ceil_div(length, config.tile)
    # Eight programs per multiprocessor hide the latency of memory.
    wanted = max(1, min(ceil_div(8 * multiprocessors(architecture), rows), _MAX_PARTS, tiles))
    steps = ceil_div(tiles, wanted)
    part = steps * config.tile
    parts = ceil_div(length, part)
    slots = next_power_of_two(parts)
    moments = torch.empty(rows, slots, 2, dtype=torch.float32, device=x.device)
    shared = {"PARTS": slots, "TILE": config.tile, "warps": config.warps}
    launch(_moments_kernel, (rows, parts), x, moments, length, part, steps, **shared)
    grid = (batch * channels, ceil_div(positions, _STEPS * config.tile))
    sizes = (length, positions, channels, channels // groups, part, parts)
    launch(_norm_kernel, grid, x, weight, bias, moments, out, *sizes, eps, STEPS=_STEPS, **shared)
    return out
