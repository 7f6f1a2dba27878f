"""Checks, schema, fake and the public function; nothing here has a gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from reca.kernels._checks import check_dtype, check_impl, check_same_device, check_shape
from reca.kernels._library import Impl, define_op
from reca.kernels._philox import signed_key
from reca.kernels.adamw import reference
from reca.kernels.adamw.moments import BLOCK

_NAME = "adamw_"
_WEIGHTS = (torch.float32, torch.bfloat16, torch.float64)


def _cuda(*arguments: Any) -> None:
    from reca.kernels.adamw import kernel

    kernel.step_(*arguments)


def _fake(*arguments: Any) -> None:
    return None


_step = define_op(
    "adamw_(Tensor(a!) weight, Tensor(b!)? low, Tensor gradient, Tensor(c!) exp_avg, Tensor(d!) exp_avg_sq,"
    " Tensor(e!)? ema, Tensor lr, Tensor updates, Tensor? divisor, Tensor? skipped, Tensor? step,"
    " float beta1, float beta2, float eps, float weight_decay, float ema_decay, int key, int offset,"
    " Tensor(f!)? exp_avg_scale=None, Tensor(g!)? exp_avg_sq_scale=None) -> ()",
    cpu=reference.step_,
    cuda=_cuda,
    fake=_fake,
)


def _check(
    weight: Tensor,
    vectors: Mapping[str, Tensor | None],
    scalars: Mapping[str, Tensor | None],
    low: Tensor | None,
    step: Tensor | None,
    moment_scales: tuple[Tensor, Tensor] | None,
    offset: int,
    impl: Impl,
) -> None:
    """Shapes, dtypes, devices and layouts of one group."""
    check_dtype(_NAME, "weight", weight, _WEIGHTS)
    present = {name: t for name, t in vectors.items() if t is not None}
    state = torch.float64 if weight.dtype == torch.float64 else torch.float32
    moment = state if moment_scales is None else torch.uint8
    for name, tensor in {"weight": weight, **present}.items():
        check_shape(_NAME, name, tensor, (weight.numel(),), "flatten the group: one element per weight")
        if not tensor.is_contiguous():
            got = tensor.stride(0)
            raise ValueError(
                f"{_NAME}: {name} must be contiguous, got a stride of {got}; it is updated in place"
            )
        if name in ("exp_avg", "exp_avg_sq"):
            check_dtype(_NAME, name, tensor, (moment,))
        if name == "ema":
            check_dtype(_NAME, name, tensor, (state,))
    check_dtype(_NAME, "gradient", present["gradient"], _WEIGHTS)
    for name, scalar in scalars.items():
        if scalar is not None:
            check_shape(_NAME, name, scalar, (), "a scalar on the device, so that no step waits for the host")
            expected = {"skipped": torch.bool, "step": torch.int64}.get(name, torch.float32)
            check_dtype(_NAME, name, scalar, (expected,))
    if low is not None:
        check_dtype(_NAME, "low", low, (torch.int16,))
    if moment_scales is not None:
        _check_scales(weight, moment_scales, step)
    given = (low is not None) + (step is not None and moment_scales is None)
    if (low is not None or moment_scales is None) and given != (weight.dtype == torch.bfloat16):
        raise ValueError(
            f"{_NAME}: a bfloat16 weight needs either low (exact) or key and step (stochastic rounding), "
            f"others neither; got {weight.dtype} with {given} of them"
        )
    if offset < 0 or offset % 4:
        raise ValueError(f"{_NAME}: offset must be a multiple of 4 from 0 on, got {offset}; pad the groups")
    others = {name: t for name, t in scalars.items() if t is not None}
    check_same_device(_NAME, {"weight": weight, **present, **others})
    check_impl(_NAME, impl, weight)


def _check_scales(weight: Tensor, scales: tuple[Tensor, Tensor], step: Tensor | None) -> None:
    check_dtype(_NAME, "a weight with 8-bit moments", weight, (torch.float32, torch.bfloat16))
    for i, scale in enumerate(scales):
        name, blocks = f"moment_scales[{i}]", -(-weight.shape[0] // BLOCK)
        check_shape(_NAME, name, scale, (blocks,), f"one per {BLOCK} weights")
        check_dtype(_NAME, name, scale, (torch.float32,))
        check_same_device(_NAME, {"weight": weight, name: scale})
        if not scale.is_contiguous():
            raise ValueError(
                f"{_NAME}: {name} must be contiguous, got a stride of {scale.stride(0)}; "
                "it is updated in place"
            )
    if step is None:
        raise ValueError(f"{_NAME}: 8-bit moments are rounded at random, got no step; pass key and step")


@torch.no_grad()
def adamw_(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: Tensor,
    updates: Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    divisor: Tensor | None = None,
    skipped: Tensor | None = None,
    low: Tensor | None = None,
    ema: Tensor | None = None,
    ema_decay: float = 0.0,
    moment_scales: tuple[Tensor, Tensor] | None = None,
    key: int = 0,
    step: Tensor | None = None,
    offset: int = 0,
    impl: Impl = "auto",
) -> None:
    """One AdamW update of a flattened group, in place and in one pass over memory.

        t  = updates + 1,   g = gradient / divisor
        m <- m + (1 - beta1) (g - m),   v <- beta2 v + (1 - beta2) g^2
        w <- (1 - lr weight_decay) w - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)
        ema <- ema + (1 - ema_decay) (w - ema)

    A bf16 weight is the nearest bf16 of an fp32 master whose 16 low bits are in `low` (exact: no bit of the
    master is lost), or is all there is, rounded up or down at random so that its mean is the master.
    Moments in 8 bits are rounded at random too: their mean is exact, their error below an eighth
    (`kernels/adamw/moments.py` has the format). Between decoding and encoding |m| is held to the largest
    multiple of sqrt(v) that exact moments can reach, so that no rounding makes a step larger than AdamW's.

    Args:
        weight: [count] fp32 or bf16 (fp64 on CPU); 16-byte accesses need a count divisible by 16.
        gradient: [count] fp32 or bf16.
        exp_avg, exp_avg_sq: [count] fp32, m and v; uint8 with `moment_scales`. Both start as zeros.
        lr, updates: scalars fp32; `updates` counts the updates before this one and is not changed.
        betas, eps, weight_decay: of AdamW; the decay is decoupled.
        divisor: scalar fp32, max(1, norm / clip); None is 1.
        skipped: scalar bool; where it is set, nothing at all changes, bit for bit.
        low: [count] int16 beside a bf16 weight, from `split_master`.
        ema: [count] fp32, the running average of the fp32 weights.
        ema_decay: of the average; 0 copies.
        moment_scales: two [ceil(count / 256)] fp32, of m and of v in 8 bits; both start as zeros. They need
            a step and a weight that is not fp64.
        key, step, offset: Philox key, scalar int64 and position of the group, a multiple of 4, of the
            stochastic rounding; element p takes word p % 4 of counter (p // 4 low, step, p // 4 high, 0):
            its lower half for the weight, its upper half for the moments.
        impl: "auto" follows the device; "reference" is plain torch; "fused" is the Triton kernel.

    Raises: ValueError for shapes, layouts, devices, a bf16 weight without its other half; TypeError
        for dtypes.
    Source: arXiv 1711.05101, algorithm 2; stochastic rounding, arXiv 2010.06192; 8-bit moments in blocks,
        arXiv 2110.02861; blocks that share a power of two, arXiv 2310.10537.
    """
    vectors = {"gradient": gradient, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "low": low, "ema": ema}
    scalars = {"lr": lr, "updates": updates, "divisor": divisor, "skipped": skipped, "step": step}
    _check(weight, vectors, scalars, low, step, moment_scales, offset, impl)
    run = reference.step_ if impl == "reference" else _step
    arguments = (weight, low, gradient, exp_avg, exp_avg_sq, ema, lr, updates, divisor, skipped, step)
    settings = (*betas, eps, weight_decay, ema_decay, signed_key(key), offset)
    run(*arguments, *settings, *(moment_scales or ()))
