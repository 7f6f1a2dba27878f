# mypy: disable-error-code="import-untyped, no-untyped-def, no-untyped-call, untyped-decorator, assignment"
"""Triton: a program walks a strip of rows from left to right; sums or three columns of it are in registers.

An input is loaded and activated once per strip, not once per tap; only the halo above and below is repeated.
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

# Three held columns of six pixels, of value and gate, are 72 registers; of ten pixels they would be 120.
_ROWS = 4


@triton.jit
def _sigmoid(x):
    """Six instructions instead of twelve; below -44 it is 0, where the true value is under 1e-19."""
    grown = 1.0 + tl.exp2(x * -1.4426950408889634)
    return tl.rsqrt(grown * grown)


@triton.jit
def _zeros(COUNT: tl.constexpr, COLS: tl.constexpr):
    column = ()
    for _ in tl.static_range(COUNT):
        column += (tl.zeros([COLS], tl.float32),)
    return column


@triton.jit
def _column(
    image_ptr, top, x, height, width, stride, cols, channels, COUNT: tl.constexpr, ACTIVATE: tl.constexpr
):
    """COUNT pixels of column x from row `top` down, [COLS] fp32 each; 0 outside of the image."""
    column = ()
    for row in tl.static_range(COUNT):
        y = top + row
        inside = cols < tl.where((y >= 0) & (y < height) & (x < width), channels, 0)
        pixel = tl.load(image_ptr + (y * width + x) * stride + cols, mask=inside, other=0.0).to(tl.float32)
        if ACTIVATE:
            pixel = pixel * _sigmoid(pixel)
        column += (pixel,)
    return column


@triton.jit
def _taps(weight_ptr, cols, channels, FLIPPED: tl.constexpr):
    """The nine weights of each channel, row by row; FLIPPED for the transposed convolution."""
    taps = ()
    for tap in tl.static_range(9):
        at = weight_ptr + cols.to(tl.int64) * 9 + (8 - tap if FLIPPED else tap)
        taps += (tl.load(at, mask=cols < channels, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def _bias(bias_ptr, cols, channels, HAS_BIAS: tl.constexpr, COLS: tl.constexpr):
    bias = tl.zeros([COLS], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + cols, mask=cols < channels, other=0.0).to(tl.float32)
    return bias


@triton.jit
def _correlate(total, left, mid, right, taps, ROW: tl.constexpr):
    for dy in tl.static_range(3):
        total += left[ROW + dy] * taps[3 * dy]
        total += mid[ROW + dy] * taps[3 * dy + 1]
        total += right[ROW + dy] * taps[3 * dy + 2]
    return total


@triton.jit
def _tap_gradients(sums, d_total, left, mid, right, ROW: tl.constexpr):
    """`sums` of nine taps and the bias, with the share of one pixel added."""
    added = ()
    for dy in tl.static_range(3):
        added += (sums[3 * dy] + d_total * left[ROW + dy],)
        added += (sums[3 * dy + 1] + d_total * mid[ROW + dy],)
        added += (sums[3 * dy + 2] + d_total * right[ROW + dy],)
    added += (sums[9] + d_total,)
    return added


@triton.jit
def _spread(late, soon, bias, column, taps, ROWS: tl.constexpr):
    """Sums of three columns of outputs with a column of pixels added: finished, next `late`, next `soon`.

    Holding sums instead of pixels spares moving them on at every column, a seventh of all instructions.
    """
    finished, later, sooner = (), (), ()
    for row in tl.static_range(ROWS):
        left, mid, right = bias, soon[row], late[row]
        for dy in tl.static_range(3):
            left += column[row + dy] * taps[3 * dy]
            mid += column[row + dy] * taps[3 * dy + 1]
            right += column[row + dy] * taps[3 * dy + 2]
        finished += (right,)
        later += (mid,)
        sooner += (left,)
    return finished, later, sooner


@triton.jit
def _store_gated(out_ptr, top, x, height, width, inner, cols, values, gates, ROWS: tl.constexpr):
    """Column x of value * gate * sigmoid(gate)."""
    for row in tl.static_range(ROWS):
        y, gate = top + row, gates[row]
        inside = cols < tl.where((y < height) & (x >= 0), inner, 0)
        out = (values[row] * gate * _sigmoid(gate)).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (y * width + x) * inner + cols, out, mask=inside)


@triton.jit
def _forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    height,
    width,
    inner,
    strips,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ACTIVATE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    strip = tl.program_id(0).to(tl.int64)
    image, top = strip // strips, (strip % strips) * ROWS
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    value_ptr = x_ptr + image * height * width * 2 * inner
    gate_ptr = value_ptr + inner
    out_ptr += image * height * width * inner
    value_taps, gate_taps = (
        _taps(weight_ptr, cols, inner, False),
        _taps(weight_ptr + inner * 9, cols, inner, False),
    )
    value_bias = _bias(bias_ptr, cols, inner, HAS_BIAS, COLS)
    gate_bias = _bias(bias_ptr + inner, cols, inner, HAS_BIAS, COLS)
    above, stride = top - 1, 2 * inner
    late, late_gate = (value_bias,) * ROWS, (gate_bias,) * ROWS
    soon, soon_gate = late, late_gate
    for x in range(0, width):
        column = _column(value_ptr, above, x, height, width, stride, cols, inner, ROWS + 2, ACTIVATE)
        values, late, soon = _spread(late, soon, value_bias, column, value_taps, ROWS)
        column = _column(gate_ptr, above, x, height, width, stride, cols, inner, ROWS + 2, ACTIVATE)
        gates, late_gate, soon_gate = _spread(late_gate, soon_gate, gate_bias, column, gate_taps, ROWS)
        _store_gated(out_ptr, top, x - 1, height, width, inner, cols, values, gates, ROWS)
    _store_gated(out_ptr, top, width - 1, height, width, inner, cols, late, late_gate, ROWS)


@triton.jit
def _gate_backward_kernel(
    d_out_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    d_convolved_ptr,
    partial_ptr,
    height,
    width,
    inner,
    strips,
    strips_total,
    steps,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ACTIVATE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WITH_DX: tl.constexpr,
    WITH_DWEIGHT: tl.constexpr,
):
    """Gradient of the convolution's output, and `steps` strips' share of the gradient of its weights."""
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    value_taps, gate_taps = (
        _taps(weight_ptr, cols, inner, False),
        _taps(weight_ptr + inner * 9, cols, inner, False),
    )
    value_bias = _bias(bias_ptr, cols, inner, HAS_BIAS, COLS)
    gate_bias = _bias(bias_ptr + inner, cols, inner, HAS_BIAS, COLS)
    stride = 2 * inner
    d_value_taps = _zeros(10, COLS)
    d_gate_taps = d_value_taps
    for step in range(0, steps):
        strip = tl.program_id(0).to(tl.int64) * steps + step
        image = strip // strips
        # Strips past the last one lie below every image: nothing is loaded, added or stored.
        top = tl.where(strip < strips_total, (strip % strips) * ROWS, height + 1)
        above = top - 1
        value_ptr = x_ptr + image * height * width * stride
        gate_ptr = value_ptr + inner
        left = _zeros(ROWS + 2, COLS)
        left_gate = left
        mid = _column(value_ptr, above, 0, height, width, stride, cols, inner, ROWS + 2, ACTIVATE)
        mid_gate = _column(gate_ptr, above, 0, height, width, stride, cols, inner, ROWS + 2, ACTIVATE)
        for x in range(0, width):
            right = _column(value_ptr, above, x + 1, height, width, stride, cols, inner, ROWS + 2, ACTIVATE)
            right_gate = _column(
                gate_ptr, above, x + 1, height, width, stride, cols, inner, ROWS + 2, ACTIVATE
            )
            for row in tl.static_range(ROWS):
                value = _correlate(value_bias, left, mid, right, value_taps, row)
                gate = _correlate(gate_bias, left_gate, mid_gate, right_gate, gate_taps, row)
                y = top + row
                inside = cols < tl.where(y < height, inner, 0)
                at = (image * height + y) * width + x
                d_out = tl.load(d_out_ptr + at * inner + cols, mask=inside, other=0.0).to(tl.float32)
                sigmoid = _sigmoid(gate)
                d_value = d_out * gate * sigmoid
                d_gate = d_out * value * sigmoid * (1.0 + gate * (1.0 - sigmoid))
                if WITH_DX:
                    d_convolved_at = d_convolved_ptr + at * stride + cols
                    tl.store(d_convolved_at, d_value.to(d_convolved_ptr.dtype.element_ty), mask=inside)
                    tl.store(d_convolved_at + inner, d_gate.to(d_convolved_ptr.dtype.element_ty), mask=inside)
                if WITH_DWEIGHT:
                    d_value_taps = _tap_gradients(d_value_taps, d_value, left, mid, right, row)
                    d_gate_taps = _tap_gradients(d_gate_taps, d_gate, left_gate, mid_gate, right_gate, row)
            left, left_gate, mid, mid_gate = mid, mid_gate, right, right_gate
    if WITH_DWEIGHT:
        partial_ptr += tl.program_id(0).to(tl.int64) * 10 * stride
        for tap in tl.static_range(10):
            tl.store(partial_ptr + tap * stride + cols, d_value_taps[tap], mask=cols < inner)
            tl.store(partial_ptr + tap * stride + inner + cols, d_gate_taps[tap], mask=cols < inner)


@triton.jit
def _store_dx(
    dx_ptr,
    x_ptr,
    top,
    x,
    height,
    width,
    channels,
    cols,
    gradients,
    ROWS: tl.constexpr,
    ACTIVATE: tl.constexpr,
):
    """Column x of the gradient, that of the activation included."""
    for row in tl.static_range(ROWS):
        y, dx = top + row, gradients[row]
        inside = cols < tl.where((y < height) & (x >= 0), channels, 0)
        at = (y * width + x) * channels + cols
        if ACTIVATE:
            pixel = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
            sigmoid = _sigmoid(pixel)
            dx *= sigmoid * (1.0 + pixel * (1.0 - sigmoid))
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _input_backward_kernel(
    d_convolved_ptr,
    x_ptr,
    weight_ptr,
    dx_ptr,
    height,
    width,
    channels,
    strips,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ACTIVATE: tl.constexpr,
):
    strip = tl.program_id(0).to(tl.int64)
    image, top = strip // strips, (strip % strips) * ROWS
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    start = image * height * width * channels
    d_image_ptr = d_convolved_ptr + start
    x_ptr += start
    dx_ptr += start
    taps = _taps(weight_ptr, cols, channels, True)
    zero = tl.zeros([COLS], tl.float32)
    late, soon = (zero,) * ROWS, (zero,) * ROWS
    for x in range(0, width):
        column = _column(d_image_ptr, top - 1, x, height, width, channels, cols, channels, ROWS + 2, False)
        gradients, late, soon = _spread(late, soon, zero, column, taps, ROWS)
        _store_dx(dx_ptr, x_ptr, top, x - 1, height, width, channels, cols, gradients, ROWS, ACTIVATE)
    _store_dx(dx_ptr, x_ptr, top, width - 1, height, width, channels, cols, late, ROWS, ACTIVATE)


def _geometry(x: Tensor, width: int, tiles: int = 1) -> tuple[int, int, int, int]:
    """(strips per image, columns per program, blocks of columns, warps)."""
    config = launch_config("depthwise_glu", architecture_of(x), x.dtype, width)
    cols = min(tiles * config.tile, next_power_of_two(width))
    return ceil_div(x.shape[1], _ROWS), cols, ceil_div(width, cols), config.warps


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, activate: bool) -> Tensor:
    """[images, height, width, inner] of x [images, height, width, 2 * inner]."""
    x, weight = x.contiguous(), weight.contiguous()
    images, height, width, channels = x.shape
    strips, cols, blocks, warps = _geometry(x, channels // 2)
    out = x.new_empty(images, height, width, channels // 2)
    launch(
        _forward_kernel,
        (images * strips, blocks),
        x,
        weight,
        weight if bias is None else bias.contiguous(),
        out,
        height,
        width,
        channels // 2,
        strips,
        warps=warps,
        ROWS=_ROWS,
        COLS=cols,
        ACTIVATE=activate,
        HAS_BIAS=bias is not None,
    )
    return out


def backward(
    d_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activate: bool,
    with_dx: bool,
    with_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx like x; d_weight [channels, 1, 3, 3] and d_bias [channels] fp32); empty if not asked for."""
    d_out, x, weight = d_out.contiguous(), x.contiguous(), weight.contiguous()
    images, height, width, channels = x.shape
    strips, cols, blocks, warps = _geometry(x, channels // 2)
    # Four programs per multiprocessor: more would write more partial sums, fewer would not hide the latency.
    groups = max(1, 4 * multiprocessors(architecture_of(x)) // blocks)
    steps = ceil_div(images * strips, groups) if with_dweight else 1
    grid = (ceil_div(images * strips, max(steps, 1)), blocks)
    d_convolved = x.new_empty(x.shape if with_dx else (0,))
    partial = x.new_empty((grid[0], 10, channels) if with_dweight else (0, 10, 0), dtype=torch.float32)
    launch(
        _gate_backward_kernel,
        grid,
        d_out,
        x,
        weight,
        weight if bias is None else bias.contiguous(),
        d_convolved,
        partial,
        height,
        width,
        channels // 2,
        strips,
        images * strips,
        steps,
        warps=warps,
        ROWS=_ROWS,
        COLS=cols,
        ACTIVATE=activate,
        HAS_BIAS=bias is not None,
        WITH_DX=with_dx,
        WITH_DWEIGHT=with_dweight,
    )
    dx = torch.empty_like(d_convolved)
    if with_dx:
        # Four channels per thread: without gates there are registers for them, a quarter fewer instructions.
        strips, cols, blocks, warps = _geometry(x, channels, 2)
        launch(
            _input_backward_kernel,
            (images * strips, blocks),
            d_convolved,
            x,
            weight,
            dx,
            height,
            width,
            channels,
            strips,
            warps=warps,
            ROWS=_ROWS,
            COLS=cols,
            ACTIVATE=activate,
        )
    sums = partial.sum(dim=0)
    d_weight = sums[:9].t().contiguous().view(-1, 1, 3, 3)
    return dx, d_weight if with_dweight else sums.new_empty(0), sums[9].clone()
