# mypy: disable-error-code="import-untyped, no-untyped-def, no-untyped-call, untyped-decorator"
"""Triton: every element is read once and written once; bf16 weights are handled as integers, bit for bit."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from reca.kernels._launch import architecture_of, ceil_div, launch, launch_config
from reca.kernels._triton_random import element_words
from reca.kernels.adamw.moments import BLOCK, FIRST, SECOND, moment_bound


@triton.jit
def _correction(t, log_beta):
    """1 - beta^t without cancellation for a beta near one: -expm1(t log beta)."""
    x = t * log_beta
    series = 1.0 + x / 2 * (1.0 + x / 3 * (1.0 + x / 4 * (1.0 + x / 5 * (1.0 + x / 6 * (1.0 + x / 7)))))
    return tl.where(x > -0.25, -x * series, 1.0 - tl.exp(x))


@triton.jit
def _clean_bits(master):
    """Bits of an fp32; every NaN becomes the one whose low bits are zero, so that rounding cannot carry."""
    return tl.where(master == master, master.to(tl.int32, bitcast=True), 0x7FC00000)


@triton.jit
def _decode(codes, scales, SHRINK: tl.constexpr, SIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """fp32 of 8-bit floats [TILE], whose blocks have the `scales`; see the reference."""
    if SIGNED:
        # Sign extension puts the sign where fp32 has it.
        wide = (codes.to(tl.int8, bitcast=True).to(tl.int32) << 20) & -0x78100000
    else:
        wide = codes.to(tl.int32) << 20
    # Read as fp32, a code is its value times a power of two; codes without an exponent are its denormals.
    blocks = tl.reshape(wide.to(tl.float32, bitcast=True), [scales.shape[0], BLOCK])
    return tl.reshape(blocks * (1.0 / SHRINK) * scales[:, None], [codes.shape[0]])


@triton.jit
def _encode(values, noise, SHRINK: tl.constexpr, SIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """(codes [TILE] uint8, scales [TILE / BLOCK]) of fp32; `noise` is added to the 20 bits that are cut."""
    BLOCKS: tl.constexpr = values.shape[0] // BLOCK
    bits = tl.reshape(values.to(tl.int32, bitcast=True), [BLOCKS, BLOCK])
    magnitude = bits & 0x7FFFFFFF
    largest = tl.minimum(tl.max(magnitude, axis=1), 0x7F000000)
    exponent = tl.maximum((largest + 0xFFFFF) >> 23, 1)
    finite = exponent <= 252
    scales = tl.where(finite, exponent << 23, 0x7FC00000).to(tl.float32, bitcast=True)
    inverse = ((254 - tl.minimum(exponent, 252)) << 23).to(tl.float32, bitcast=True)
    shrunk = magnitude.to(tl.float32, bitcast=True) * inverse[:, None] * SHRINK
    codes = (shrunk.to(tl.int32, bitcast=True) + tl.reshape(noise, [BLOCKS, BLOCK]) + 8) >> 20
    if SIGNED:
        codes = (codes & 0x7F) | ((bits >> 24) & 0x80)
    return tl.reshape(codes, [BLOCKS * BLOCK]).to(tl.uint8), scales


@triton.jit
def _adamw_kernel(
    weight_ptr,
    low_ptr,
    gradient_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    exp_avg_scale_ptr,
    exp_avg_sq_scale_ptr,
    ema_ptr,
    lr_ptr,
    updates_ptr,
    divisor_ptr,
    skipped_ptr,
    step_ptr,
    count,
    log_beta1,
    log_beta2,
    keep1,
    keep2,
    beta2,
    eps,
    weight_decay,
    ema_keep,
    bound,
    key,
    first_block,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    SHRINK_FIRST: tl.constexpr,
    SHRINK_SECOND: tl.constexpr,
    HAS_LOW: tl.constexpr,
    HAS_CODES: tl.constexpr,
    ROUNDS_WEIGHT: tl.constexpr,
    HAS_EMA: tl.constexpr,
    HAS_DIVISOR: tl.constexpr,
    HAS_SKIPPED: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * TILE
    cols = start + tl.arange(0, TILE)
    if HAS_SKIPPED:
        # A skipped step neither reads nor writes: what it would have changed stays as it is, bit for bit.
        count = tl.where(tl.load(skipped_ptr).to(tl.int32) != 0, 0, count)
    inside = cols < count
    weight = tl.load(weight_ptr + cols, mask=inside, other=0)
    if HAS_LOW:
        low = tl.load(low_ptr + cols, mask=inside, other=0)
        master = ((weight.to(tl.int32) << 16) + low.to(tl.int32)).to(tl.float32, bitcast=True)
    elif ROUNDS_WEIGHT:
        master = (weight.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        master = weight
    gradient = tl.load(gradient_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    if HAS_DIVISOR:
        gradient *= 1.0 / tl.load(divisor_ptr)
    exp_avg = tl.load(exp_avg_ptr + cols, mask=inside, other=0)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + cols, mask=inside, other=0)
    if HAS_CODES:
        blocks = start // BLOCK + tl.arange(0, TILE // BLOCK)
        has_block = blocks * BLOCK < count
        scale = tl.load(exp_avg_scale_ptr + blocks, mask=has_block, other=0.0)
        exp_avg = _decode(exp_avg, scale, SHRINK_FIRST, True, BLOCK)
        scale = tl.load(exp_avg_sq_scale_ptr + blocks, mask=has_block, other=0.0)
        exp_avg_sq = _decode(exp_avg_sq, scale, SHRINK_SECOND, False, BLOCK)
    exp_avg += keep1 * (gradient - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + keep2 * gradient * gradient
    root = tl.sqrt(exp_avg_sq)
    if HAS_CODES:
        limit = bound * root
        exp_avg = tl.minimum(exp_avg, limit, propagate_nan=tl.PropagateNan.ALL)
        exp_avg = tl.maximum(exp_avg, -limit, propagate_nan=tl.PropagateNan.ALL)
    lr, t = tl.load(lr_ptr), tl.load(updates_ptr) + 1.0
    # Divisions by numbers that all elements share are made once, and become products.
    rate = lr / _correction(t, log_beta1)
    root_scale = tl.rsqrt(_correction(t, log_beta2))
    master = master - lr * weight_decay * master
    master -= rate * exp_avg / (root * root_scale + eps)
    if HAS_CODES or ROUNDS_WEIGHT:
        words = element_words(key, tl.load(step_ptr), first_block + start // 4, TILE // 4)
    if HAS_CODES:
        # Both moments take the same bits: a quotient of two numbers that err alike errs less.
        noise = (words >> 12) & 0xFFFF0
        exp_avg, scale = _encode(exp_avg, noise, SHRINK_FIRST, True, BLOCK)
        tl.store(exp_avg_scale_ptr + blocks, scale, mask=has_block)
        exp_avg_sq, scale = _encode(exp_avg_sq, noise, SHRINK_SECOND, False, BLOCK)
        tl.store(exp_avg_sq_scale_ptr + blocks, scale, mask=has_block)
    tl.store(exp_avg_ptr + cols, exp_avg, mask=inside)
    tl.store(exp_avg_sq_ptr + cols, exp_avg_sq, mask=inside)
    if HAS_EMA:
        ema = tl.load(ema_ptr + cols, mask=inside, other=0.0)
        tl.store(ema_ptr + cols, ema + ema_keep * (master - ema), mask=inside)
    if HAS_LOW:
        bits = _clean_bits(master)
        tl.store(weight_ptr + cols, ((bits + 0x8000) >> 16).to(tl.int16), mask=inside)
        tl.store(low_ptr + cols, bits.to(tl.int16), mask=inside)
    elif ROUNDS_WEIGHT:
        rounded = (_clean_bits(master) + (words & 0xFFFF)) >> 16
        tl.store(weight_ptr + cols, rounded.to(tl.int16), mask=inside)
    else:
        tl.store(weight_ptr + cols, master, mask=inside)


def step_(
    weight: Tensor,
    low: Tensor | None,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    ema: Tensor | None,
    lr: Tensor,
    updates: Tensor,
    divisor: Tensor | None,
    skipped: Tensor | None,
    step: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    ema_decay: float,
    key: int,
    offset: int,
    exp_avg_scale: Tensor | None = None,
    exp_avg_sq_scale: Tensor | None = None,
) -> None:
    """One update of [count] tensors in place; see the reference for the formula."""
    count = weight.shape[0]
    config = launch_config("adamw", architecture_of(weight), exp_avg.dtype, count)
    launch(
        _adamw_kernel,
        (ceil_div(count, config.tile),),
        weight if weight.dtype == torch.float32 else weight.view(torch.int16),
        weight if low is None else low,
        gradient,
        exp_avg,
        exp_avg_sq,
        lr if exp_avg_scale is None else exp_avg_scale,
        lr if exp_avg_sq_scale is None else exp_avg_sq_scale,
        lr if ema is None else ema,
        lr,
        updates,
        lr if divisor is None else divisor,
        lr if skipped is None else skipped,
        lr if step is None else step,
        count,
        # A beta of 0 corrects nothing: 1 - 0^t = 1, as 1 - exp(-100) is in fp32.
        *(math.log(beta) if beta else -100.0 for beta in (beta1, beta2)),
        1 - beta1,
        1 - beta2,
        beta2,
        eps,
        weight_decay,
        1 - ema_decay,
        moment_bound(beta1, beta2),
        key,
        offset // 4,
        warps=config.warps,
        TILE=config.tile,
        BLOCK=BLOCK,
        SHRINK_FIRST=FIRST.shrink,
        SHRINK_SECOND=SECOND.shrink,
        HAS_LOW=low is not None,
        HAS_CODES=exp_avg_scale is not None,
        ROUNDS_WEIGHT=weight.dtype == torch.bfloat16 and low is None,
        HAS_EMA=ema is not None,
        HAS_DIVISOR=divisor is not None,
        HAS_SKIPPED=skipped is not None,
    )
