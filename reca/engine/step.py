"""One optimizer step: draws, forward and backward of every microbatch, update. The host reads nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from reca.engine.state import TrainState
from reca.errors import ConfigError, nearest
from reca.profiling import span
from reca.randomness import RandomSource
from reca.types import B, Batch, D, ReconstructionModel

Precision = Literal["fp32", "bf16"]
Normalize = Literal["global", "microbatch"]


@dataclass(frozen=True, slots=True)
class StepLoss:
    """Losses of a whole step as device scalars, fp32, over all microbatches and ranks.

    Attributes:
        total: weighted sum of the terms.
        terms: name -> normalised loss of that term, without its weight.
    """

    total: Tensor
    terms: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """What a step yields: device scalars that are read only when the step is logged.

    Attributes:
        loss: weighted sum of the terms, fp32.
        terms: name -> loss of that term, fp32.
        lr: learning rate, fp32.
        grad_norm: global norm before clipping, fp32.
        skipped: bool; the step was not finite and changed nothing.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    lr: Tensor
    grad_norm: Tensor
    skipped: Tensor


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The arithmetic of `precision`: activations in bf16 for `bf16`, nothing for `fp32`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def accumulate_gradients(
    model: ReconstructionModel[B, D],
    microbatches: Sequence[B],
    draws: Sequence[D],
    weights: Mapping[str, float],
    *,
    normalize: Normalize = "global",
    precision: Precision = "fp32",
    collect: Callable[[], None] = lambda: None,
) -> StepLoss:
    """Backward passes of one step; how the step is cut into microbatches does not matter.

        global:      loss = sum_name weight * (sum over microbatches of the term's sum) / (sum of its counts)
        microbatch:  loss = sum_name weight * (mean over microbatches of the term's sum / its own count)

    A term whose count is zero gives loss 0 and zero gradients. Counts and losses are summed over ranks where
    torch.distributed is initialised; gradients are those of this rank's microbatches.

    Args:
        microbatches, draws: of equal length, on the model's device.
        weights: exactly the names that the model yields -> weight; a term of weight 0 is only measured.
        normalize: what each term's sum is divided by.
        precision: arithmetic of the forward pass.
        collect: called after the backward pass of each microbatch, to take gradients out of `.grad`; else
            autograd adds them up there.

    Returns: device scalars; the host reads nothing.
    Raises: ConfigError if the names of `weights` and of the model's terms differ.
    """
    _check_names(draws, weights)
    scales = _scales(draws, normalize)
    terms: dict[str, Tensor] = {}
    for batch, draw, scale in zip(microbatches, draws, scales, strict=True):
        with span("forward"), autocast(batch.sample_ids.device, precision):
            sums = model(batch, draw)
        if sums.keys() != scale.keys():
            raise ValueError(
                f"{type(model).__name__}: terms {sorted(sums)} must be those counted by draw, {sorted(scale)}"
            )
        losses = {name: sums[name].to(torch.float32) * scale[name] for name in sorted(sums)}
        total = _weighted_sum(losses, weights)
        with span("backward"):
            # A microbatch whose labels are all ignored may not reach any weight.
            if total.requires_grad:
                torch.autograd.backward(total)
            collect()
        for name, loss in losses.items():
            terms[name] = terms[name] + loss.detach() if name in terms else loss.detach()
    _all_reduce([terms[name] for name in sorted(terms)])
    return StepLoss(_weighted_sum(terms, weights), terms)


def train_step(state: TrainState, microbatches: Sequence[Batch]) -> StepMetrics:
    """One optimizer step over `microbatches`, which lie on the state's device; `state.step` is counted up.

    A step with a non-finite loss or gradient changes neither weights, moments, average nor schedule. The
    host reads no tensor; see `StepMetrics`.
    """
    model: ReconstructionModel[Any, Any] = state.model
    config = state.config
    random = RandomSource(config.seed, state.step + 1)
    with span("draw"), torch.no_grad():
        draws = [model.draw(batch, random) for batch in microbatches]
    gradients = state.optimizer.gradients
    gradients.zero()
    with gradients.attached():
        loss = accumulate_gradients(
            model,
            microbatches,
            draws,
            config.loss_weights,
            normalize=config.normalize,
            precision=config.compute.precision,
            collect=gradients.collect,
        )
    with span("optimizer"):
        _all_reduce(gradients.flats)
        update = state.optimizer.step(loss.total, state.ema)
    state.step += 1
    return StepMetrics(loss.total, loss.terms, update.lr, update.grad_norm, update.skipped)


def _check_names(draws: Sequence[D], weights: Mapping[str, float]) -> None:
    yielded = {name for draw in draws for name in draw.counts}
    for name in weights.keys() - yielded:
        raise ConfigError(
            f"loss_weights: the model yields no term {name!r} in this step; {nearest(name, yielded)}"
        )
    for name in yielded - weights.keys():
        raise ConfigError(
            f"loss_weights: the term {name!r} has no weight; add loss_weights.{name}=1 (or 0 to only measure)"
        )


def _scales(draws: Sequence[D], normalize: Normalize) -> list[dict[str, Tensor]]:
    """Per microbatch: name -> what its sum is multiplied by. Scalars, fp32; 0 where nothing counts."""
    # fp64: counts of tokens exceed what fp32 holds exactly.
    counts = [{name: count.to(torch.float64) for name, count in draw.counts.items()} for draw in draws]
    totals: dict[str, Tensor] = {}
    for microbatch in counts:
        for name, count in microbatch.items():
            share = count if normalize == "global" else torch.ones_like(count)
            totals[name] = totals[name] + share if name in totals else share.clone()
    _all_reduce([totals[name] for name in sorted(totals)])
    if normalize == "global":
        return [{name: _inverse(totals[name]) for name in microbatch} for microbatch in counts]
    return [{name: _inverse(count * totals[name]) for name, count in one.items()} for one in counts]


def _inverse(count: Tensor) -> Tensor:
    # Not `where` with a Python number: on CUDA that copies the number from the host and waits for the copy.
    counts = (count > 0).to(count.dtype)
    return (counts / (count + (1.0 - counts))).to(torch.float32)


def _weighted_sum(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Scalar fp32 on the device of the losses; a term of weight 0 does not take part, finite or not."""
    parts = [weights[name] * losses[name] for name in sorted(losses) if weights[name] > 0]
    return torch.stack(parts).sum() if parts else torch.zeros_like(next(iter(losses.values()))).detach()


def _all_reduce(tensors: Sequence[Tensor]) -> None:
    """Sum each tensor over ranks, in place; nothing without torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)
