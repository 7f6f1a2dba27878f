"""The diffusion head of a masked autoregressive generator: its objective, and the dropout of its trunk."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reca.benchmarks.cases.case import Case, Inputs, Maker, Output, Shape
from reca.kernels import Impl, PhiloxDropout, diffusion_loss, diffusion_noise, dropout, dropout_attention

_TIMES = 1000
_BIN = 1 / 255
_RATE = 0.1


def _schedule(device: torch.device) -> Tensor:
    """The coefficients of a cosine schedule with 1000 times, as `diffusion_loss` takes them."""
    grid = torch.arange(_TIMES + 1, dtype=torch.float64) / _TIMES
    level = torch.cos((grid + 0.008) / 1.008 * math.pi / 2).square()
    beta = (1 - level[1:] / level[:-1]).clamp(max=0.999)
    product = torch.cumprod(1 - beta, dim=0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), product[:-1]])
    posterior = beta * (1 - before) / (1 - product)
    columns = (
        product.sqrt(),
        (1 - product).sqrt(),
        product.rsqrt(),
        (1 / product - 1).sqrt(),
        beta * before.sqrt() / (1 - product),
        (1 - before) * (1 - beta).sqrt() / (1 - product),
        posterior.clamp(min=float(posterior[1])).log(),
        beta.log(),
    )
    return torch.stack(columns, dim=1).to(torch.float32).to(device)


def _rows(make: Maker) -> Inputs:
    rows, dim = make.shape["rows"], make.shape["dim"]
    return {
        "output": make.normal(rows, 2 * dim),
        "clean": make.normal(rows, dim, scale=0.5, dtype=torch.float32),
        "noise": make.normal(rows, dim, dtype=torch.float32),
        "time": make.integers(_TIMES, rows),
        "table": _schedule(make.device),
    }


def _columns(i: Inputs) -> tuple[Tensor, ...]:
    wide = i["table"].to(torch.promote_types(i["output"].dtype, torch.float32))
    return wide[i["time"]].split(1, dim=1)


def _cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _loss_plain(i: Inputs) -> Output:
    """Written out as the published objective is: every intermediate is a tensor of its own."""
    signal, level, inverse, inverse_noise, at_clean, at_noised, log_posterior, log_beta = _columns(i)
    wide = signal.dtype
    clean, noise = i["clean"].to(wide), i["noise"].to(wide)
    epsilon, interpolation = i["output"].to(wide).chunk(2, dim=1)
    noised = signal * clean + level * noise
    mean = at_clean * clean + at_noised * noised
    other = at_clean * (inverse * noised - inverse_noise * epsilon.detach()) + at_noised * noised
    fraction = (interpolation + 1) / 2
    log_variance = fraction * log_beta + (1 - fraction) * log_posterior
    gap = log_posterior - log_variance
    distance = (mean - other).square() * torch.exp(-log_variance)
    divergence = 0.5 * (gap.exp() - 1 - gap + distance)
    is_first = i["time"][:, None] == 0
    centred = torch.where(is_first, clean - other, 0.0)
    scale = torch.exp(-0.5 * log_variance)
    above = _cdf((scale * (centred + _BIN)).clamp(-100, 100))
    below = _cdf((scale * (centred - _BIN)).clamp(-100, 100))
    inside = torch.where(clean > 0.999, 1 - below, above - below)
    likelihood = torch.where(clean < -0.999, above, inside).clamp(min=1e-12).log()
    variational = torch.where(is_first, -likelihood, divergence) / math.log(2)
    return ((noise - epsilon).square() + variational).mean(dim=1).sum()


def _loss_ours(i: Inputs, impl: Impl) -> Output:
    return diffusion_loss(i["output"], i["clean"], i["noise"], i["time"], i["table"], impl=impl)[0]


def _loss_moved(s: Shape, itemsize: int) -> tuple[int, int]:
    values = s["rows"] * s["dim"]
    # A time, and two fp32 parts of the loss for each row; the gradient is formed with the loss.
    return values * (4 * itemsize + 8) + 16 * s["rows"], values * 4 * itemsize


def _noise_plain(i: Inputs) -> Output:
    signal, level = _columns(i)[:2]
    return (signal * i["clean"] + level * i["noise"]).to(i["output"].dtype)


def _noise_ours(i: Inputs, impl: Impl) -> Output:
    return diffusion_noise(i["clean"], i["noise"], i["time"], i["table"], dtype=i["output"].dtype, impl=impl)


def _noise_moved(s: Shape, itemsize: int) -> tuple[int, int]:
    return s["rows"] * (s["dim"] * (8 + itemsize) + 8), 0


def _dropped(make: Maker) -> Inputs:
    s = make.shape
    samples = torch.arange(s["samples"], device=make.device)
    bounds = torch.arange(s["samples"] + 1, device=make.device) * (s["rows"] // s["samples"])
    random = PhiloxDropout(
        key=7, step=torch.zeros((), dtype=torch.int64, device=make.device), samples=samples
    )
    ones = torch.ones(s["rows"], s["width"], device=make.device)
    return {
        "x": make.normal(s["rows"], s["width"]),
        "residual": make.normal(s["rows"], s["width"]),
        "random": random,
        "bounds": bounds.to(torch.int32),
        "kept": dropout(ones, random, bounds, _RATE) > 0,
    }


def _dropout_plain(i: Inputs) -> Output:
    return i["residual"] + torch.where(i["kept"], i["x"] / (1 - _RATE), 0.0)


def _dropout_ours(i: Inputs, impl: Impl) -> Output:
    return dropout(i["x"], i["random"], i["bounds"], _RATE, residual=i["residual"], impl=impl)


def _attended(make: Maker) -> Inputs:
    s = make.shape
    made = dict(_dropped(make))
    length = s["rows"] // s["samples"]
    heads = s["width"] // s["dim"]
    kept = torch.ones(s["samples"] * heads * length, length, device=make.device)
    bounds = torch.arange(s["samples"] + 1, device=make.device) * (heads * length)
    made["kept"] = (dropout(kept, made["random"], bounds, _RATE) > 0).view(
        s["samples"], heads, length, length
    )
    made["qkv"] = make.normal(s["rows"], 3, heads, s["dim"])
    made["lengths"] = (length,) * s["samples"]
    return {name: made[name] for name in ("qkv", "random", "bounds", "kept", "lengths")}


def _attended_plain(i: Inputs) -> Output:
    """Dense per sample, as the published code does it."""
    samples, heads, length, _ = i["kept"].shape
    query, key, value = i["qkv"].view(samples, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (query @ key.transpose(-1, -2)).to(wide) * query.shape[-1] ** -0.5
    probability = torch.where(i["kept"], scores.softmax(dim=-1) / (1 - _RATE), 0.0).to(value.dtype)
    return (probability @ value).transpose(1, 2).reshape(samples * length, heads, -1)


def _attended_ours(i: Inputs, impl: Impl) -> Output:
    return dropout_attention(i["qkv"], i["random"], i["bounds"], i["lengths"], _RATE, impl=impl)


def _attended_moved(s: Shape, itemsize: int) -> tuple[int, int]:
    size = s["rows"] * s["width"] * itemsize
    return 4 * size, 8 * size


def _attended_flops(s: Shape) -> tuple[int, int]:
    product = 2 * s["rows"] * (s["rows"] // s["samples"]) * s["width"]
    return 2 * product, 5 * product


def _dropout_moved(s: Shape, itemsize: int) -> tuple[int, int]:
    size = s["rows"] * s["width"] * itemsize
    return 3 * size, 2 * size


_HEAD = {"rows": 196_608, "dim": 16}
_SMALL = {"rows": 512, "dim": 16}

CASES = (
    Case(
        operator="diffusion_loss",
        name="harmon masked tokens, whole objective",
        full=_HEAD,
        small=_SMALL,
        make=_rows,
        ours=_loss_ours,
        plain=_loss_plain,
        moved=_loss_moved,
        gradients=("output",),
        is_one_pass=True,
    ),
    Case(
        operator="diffusion_loss",
        name="harmon masked tokens, noised rows",
        full=_HEAD,
        small=_SMALL,
        make=_rows,
        ours=_noise_ours,
        plain=_noise_plain,
        moved=_noise_moved,
    ),
    Case(
        operator="dropout",
        name="harmon-1.5b encoder, residual add; the plain form reads a stored mask",
        full={"rows": 24_576, "width": 1280, "samples": 48},
        small={"rows": 96, "width": 64, "samples": 3},
        make=_dropped,
        ours=_dropout_ours,
        plain=_dropout_plain,
        moved=_dropout_moved,
        gradients=("x", "residual"),
    ),
    Case(
        operator="dropout_attention",
        name="harmon-1.5b encoder; the plain form reads a stored mask",
        full={"rows": 24_576, "width": 1024, "samples": 48, "dim": 64},
        small={"rows": 96, "width": 64, "samples": 3, "dim": 16},
        make=_attended,
        ours=_attended_ours,
        plain=_attended_plain,
        moved=_attended_moved,
        flops=_attended_flops,
        gradients=("qkv",),
    ),
)
