"""The mathematics in plain torch; fp32 inside, fp64 for fp64 weights.

t  = updates + 1,   g = gradient / divisor
m <- m + (1 - beta1) (g - m)
v <- beta2 v + (1 - beta2) g^2
w <- (1 - lr weight_decay) w - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)
ema <- ema + (1 - ema_decay) (w - ema)

Moments in 8 bits (`moments.py`) are decoded first and encoded last; in between |m| is held to bound sqrt(v).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reca.kernels._philox import element_words
from reca.kernels.adamw.moments import FIRST, SECOND, decode_moment, encode_moment, moment_bound

_NAN_BITS = 0x7FC00000


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 -> (its nearest bf16, int16 of its 16 low bits); `join_master` gives back every bit."""
    bits = master.view(torch.int32)
    # Without it the carry of a NaN whose low bits are set would leave a zero.
    bits = torch.where(master.isnan(), _NAN_BITS, bits)
    return ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)


def join_master(weight: Tensor, low: Tensor) -> Tensor:
    """The fp32 master of a bf16 weight and the int16 of its 16 low bits."""
    # The low half is signed: where it is negative, rounding to nearest has already carried into the weight.
    return ((weight.view(torch.int16).to(torch.int32) << 16) + low.to(torch.int32)).view(torch.float32)


def round_randomly(master: Tensor, words: Tensor) -> Tensor:
    """fp32 -> bf16, up with the probability of the part that is cut off; `words` hold 16 random bits each."""
    bits = torch.where(master.isnan(), _NAN_BITS, master.view(torch.int32))
    return ((bits + words.to(torch.int32)) >> 16).to(torch.int16).view(torch.bfloat16)


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
    """One update in place, or none at all where `skipped` is set."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    m, v = exp_avg, exp_avg_sq
    if exp_avg_scale is not None and exp_avg_sq_scale is not None:
        m, v = decode_moment(m, exp_avg_scale, FIRST), decode_moment(v, exp_avg_sq_scale, SECOND)
    master = join_master(weight, low) if low is not None else weight.to(dtype)
    g = gradient.to(dtype)
    if divisor is not None:
        g = g / divisor
    t = (updates + 1).to(torch.float64)
    correction1, correction2 = (-torch.expm1(t * math.log(beta)) if beta else 1.0 for beta in (beta1, beta2))
    m = torch.lerp(m, g, 1 - beta1)
    v = beta2 * v + (1 - beta2) * g.square()
    if exp_avg_scale is not None:
        limit = moment_bound(beta1, beta2) * v.sqrt()
        m = torch.clamp(m, -limit, limit)
    master = master - lr * weight_decay * master
    master = master - (lr / correction1).to(m.dtype) * m / ((v / correction2).to(v.dtype).sqrt() + eps)
    words = None if step is None else element_words(key, step, offset, len(weight))
    changed: list[tuple[Tensor, Tensor]] = []
    if words is not None and exp_avg_scale is not None and exp_avg_sq_scale is not None:
        # Both moments take the same bits: a quotient of two numbers that err alike errs less.
        changed += zip((exp_avg, exp_avg_scale), encode_moment(m, words >> 16, FIRST), strict=True)
        changed += zip((exp_avg_sq, exp_avg_sq_scale), encode_moment(v, words >> 16, SECOND), strict=True)
    else:
        changed += [(exp_avg, m), (exp_avg_sq, v)]
    if low is not None:
        changed += zip((weight, low), split_master(master), strict=True)
    elif words is not None and weight.dtype == torch.bfloat16:
        changed.append((weight, round_randomly(master, words & 0xFFFF)))
    else:
        changed.append((weight, master))
    if ema is not None:
        changed.append((ema, torch.lerp(ema, master, 1 - ema_decay)))
    for old, new in changed:
        old.copy_(new if skipped is None else torch.where(skipped, old, new))
