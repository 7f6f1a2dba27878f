# mypy: disable-error-code="import-untyped, no-untyped-def, no-untyped-call, untyped-decorator"
"""Triton: every element is read once and written once; bf16 weights are handled as integers, bit for bit."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from reca.kernels._launch import architecture_of, ceil_div, launch, launch_config
from reca.kernels._triton_random import rounding_words


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
def _adamw_kernel(
    weight_ptr,
    low_ptr,
    gradient_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
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
    key,
    first_block,
    TILE: tl.constexpr,
    HAS_LOW: tl.constexpr,
    HAS_STEP: tl.constexpr,
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
    elif HAS_STEP:
        master = (weight.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        master = weight
    gradient = tl.load(gradient_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    if HAS_DIVISOR:
        gradient = gradient / tl.load(divisor_ptr)
    exp_avg = tl.load(exp_avg_ptr + cols, mask=inside, other=0.0)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + cols, mask=inside, other=0.0)
    exp_avg += keep1 * (gradient - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + keep2 * gradient * gradient
    lr, t = tl.load(lr_ptr), tl.load(updates_ptr) + 1.0
    rate = lr / _correction(t, log_beta1)
    master = master - lr * weight_decay * master
    master -= rate * exp_avg / (tl.sqrt(exp_avg_sq / _correction(t, log_beta2)) + eps)
    tl.store(exp_avg_ptr + cols, exp_avg, mask=inside)
    tl.store(exp_avg_sq_ptr + cols, exp_avg_sq, mask=inside)
    if HAS_EMA:
        ema = tl.load(ema_ptr + cols, mask=inside, other=0.0)
        tl.store(ema_ptr + cols, ema + ema_keep * (master - ema), mask=inside)
    if HAS_LOW:
        bits = _clean_bits(master)
        tl.store(weight_ptr + cols, ((bits + 0x8000) >> 16).to(tl.int16), mask=inside)
        tl.store(low_ptr + cols, bits.to(tl.int16), mask=inside)
    elif HAS_STEP:
        words = rounding_words(key, tl.load(step_ptr), first_block + start // 4, TILE // 4)
        tl.store(weight_ptr + cols, ((_clean_bits(master) + words) >> 16).to(tl.int16), mask=inside)
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
) -> None:
    """One update of [count] tensors in place; see the reference for the formula."""
    count = weight.shape[0]
    config = launch_config("adamw", architecture_of(weight), weight.dtype, count)
    launch(
        _adamw_kernel,
        (ceil_div(count, config.tile),),
        weight if weight.dtype == torch.float32 else weight.view(torch.int16),
        weight if low is None else low,
        gradient,
        exp_avg,
        exp_avg_sq,
        exp_avg if ema is None else ema,
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
        key,
        offset // 4,
        warps=config.warps,
        TILE=config.tile,
        HAS_LOW=low is not None,
        HAS_STEP=step is not None,
        HAS_EMA=ema is not None,
        HAS_DIVISOR=divisor is not None,
        HAS_SKIPPED=skipped is not None,
    )
