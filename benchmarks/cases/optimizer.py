"""One optimizer step over a flattened group: clip factor, AdamW and average in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from reca.benchmarks.cases.case import Case, Inputs, Maker, Output, Provider, Shape
from reca.kernels import Impl, adamw_, split_master

_LR, _BETAS, _EPS, _DECAY, _EMA, _DIVISOR = 1e-3, (0.9, 0.95), 1e-8, 0.1, 0.999, 2.0
_MOMENT_BLOCK = 256


def _scalar(value: float, device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device=device)


def _settings(make: Maker) -> dict[str, Any]:
    return {
        "lr": _scalar(_LR, make.device),
        "updates": _scalar(10.0, make.device),
        "divisor": _scalar(_DIVISOR, make.device),
    }


def _group(make: Maker) -> Inputs:
    count = make.shape["count"]
    wide = torch.float32
    return {
        "weight": make.normal(count, dtype=wide),
        "gradient": make.normal(count, dtype=wide),
        "exp_avg": make.normal(count, scale=0.1, dtype=wide),
        "exp_avg_sq": make.normal(count, dtype=wide).square(),
        "ema": make.normal(count, dtype=wide),
        **_settings(make),
    }


def _step(i: Inputs, impl: Impl, **more: Any) -> None:
    adamw_(
        i["weight"],
        i["gradient"],
        i["exp_avg"],
        i["exp_avg_sq"],
        lr=i["lr"],
        updates=i["updates"],
        betas=_BETAS,
        eps=_EPS,
        weight_decay=_DECAY,
        divisor=i["divisor"],
        impl=impl,
        **more,
    )


def _ours(i: Inputs, impl: Impl) -> Output:
    return _step(i, impl, ema=i["ema"], ema_decay=_EMA)


def _plain(i: Inputs) -> Output:
    """As one writes it: a pass over memory for every line."""
    gradient, step = i["gradient"] / i["divisor"].to(i["gradient"].dtype), 11.0
    i["exp_avg"].lerp_(gradient, 1 - _BETAS[0])
    i["exp_avg_sq"].mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1 - _BETAS[1])
    first, second = 1 - _BETAS[0] ** step, 1 - _BETAS[1] ** step
    i["weight"].mul_(1 - _LR * _DECAY)
    i["weight"].addcdiv_(i["exp_avg"], (i["exp_avg_sq"] / second).sqrt() + _EPS, value=-_LR / first)
    i["ema"].lerp_(i["weight"], 1 - _EMA)


def _torch_fused() -> Provider:
    from torch.optim.adamw import adamw

    def provider(i: Inputs) -> Output:
        adamw(
            [i["weight"]],
            [i["gradient"]],
            [i["exp_avg"]],
            [i["exp_avg_sq"]],
            [],
            [i["updates"].clone()],  # the fused form counts up
            fused=True,
            grad_scale=i["divisor"],
            found_inf=None,
            amsgrad=False,
            maximize=False,
            beta1=_BETAS[0],
            beta2=_BETAS[1],
            lr=i["lr"],
            weight_decay=_DECAY,
            eps=_EPS,
        )
        i["ema"].lerp_(i["weight"], 1 - _EMA)

    return provider


def _split(make: Maker) -> Inputs:
    group = dict(_group(make))
    group["weight"], group["low"] = split_master(group["weight"])
    group["gradient"] = group["gradient"].to(torch.bfloat16)
    return group


def _split_plain(i: Inputs) -> Output:
    """What the split saves: a master beside the weight, and the cast after the step."""
    wide = i["exp_avg"].dtype
    master = i["weight"].to(wide)
    _plain({**i, "weight": master, "gradient": i["gradient"].to(wide)})
    i["weight"].copy_(master)


def _eighth(make: Maker) -> Inputs:
    count, blocks = make.shape["count"], -(-make.shape["count"] // _MOMENT_BLOCK)
    return {
        "weight": make.normal(count, dtype=torch.bfloat16),
        "gradient": make.normal(count, dtype=torch.bfloat16),
        "exp_avg": torch.zeros(count, dtype=torch.uint8, device=make.device),
        "exp_avg_sq": torch.zeros(count, dtype=torch.uint8, device=make.device),
        "scales": tuple(torch.zeros(blocks, device=make.device) for _ in range(2)),
        "step": torch.zeros((), dtype=torch.int64, device=make.device),
        "ema": torch.zeros(count, device=make.device),
        **_settings(make),
    }


def _eighth_plain(i: Inputs) -> Output:
    """Moments in bf16, the smallest that plain torch can hold; rounding to nearest."""
    moments = (i["exp_avg"].to(torch.bfloat16), i["exp_avg_sq"].to(torch.bfloat16))
    _plain({**i, "exp_avg": moments[0], "exp_avg_sq": moments[1], "ema": i["ema"].to(torch.bfloat16)})


def _with_optimizer(make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Provider:
    """A library's optimizer with a state of its own for every set of inputs, made at the first step."""
    made: dict[int, torch.optim.Optimizer] = {}

    def provider(i: Inputs) -> Output:
        key = i["weight"].data_ptr()
        if key not in made:
            parameter = nn.Parameter(i["weight"])
            parameter.grad = i["gradient"]
            made[key] = make_optimizer([parameter])
        made[key].step()
        return None

    return provider


def _torchao() -> Provider:
    from torchao.optim import AdamW8bit  # type: ignore[import-not-found]

    settings: dict[str, Any] = {"betas": _BETAS, "eps": _EPS, "weight_decay": _DECAY}
    return _with_optimizer(lambda made: AdamW8bit(made, lr=_LR, bf16_stochastic_round=True, **settings))


def _bitsandbytes() -> Provider:
    from bitsandbytes.optim import AdamW8bit  # type: ignore[import-not-found]

    settings: dict[str, Any] = {"betas": _BETAS, "eps": _EPS, "weight_decay": _DECAY}
    return _with_optimizer(lambda made: AdamW8bit(made, lr=_LR, **settings))


def _moved(per_element: int) -> Any:
    def moved(s: Shape, itemsize: int) -> tuple[int, int]:
        return per_element * s["count"], 0

    return moved


_FULL, _SMALL = {"count": 268_435_456}, {"count": 4096}

CASES = (
    Case(
        operator="adamw",
        name="fp32 weight, moments and average",
        full=_FULL,
        small=_SMALL,
        make=_group,
        ours=_ours,
        plain=_plain,
        moved=_moved(36),
        mutates=("weight", "exp_avg", "exp_avg_sq", "ema"),
        rivals={"torch fused, then average": _torch_fused},
    ),
    Case(
        operator="adamw",
        name="bf16 weight with the low half of its master, bf16 gradient",
        full=_FULL,
        small=_SMALL,
        make=_split,
        ours=lambda i, impl: _step(i, impl, low=i["low"]),
        plain=_split_plain,
        moved=_moved(26),
        mutates=("exp_avg", "exp_avg_sq"),
    ),
    Case(
        operator="adamw",
        name="bf16 weight, moments in 8 bits, rounded at random",
        full=_FULL,
        small=_SMALL,
        make=_eighth,
        ours=lambda i, impl: _step(i, impl, moment_scales=i["scales"], step=i["step"], key=3),
        plain=_eighth_plain,
        moved=_moved(10),
        mutates=("weight",),
        rivals={"torchao": _torchao, "bitsandbytes, rounded to nearest": _bitsandbytes},
        is_exact=False,
    ),
)
