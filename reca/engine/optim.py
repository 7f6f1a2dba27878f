"""AdamW over flat buffers of trained tensors; a bad step is skipped on the device, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from reca.config import OptimConfig
from reca.engine.ema import Ema
from reca.engine.gradients import Gradients
from reca.engine.schedule import learning_rate
from reca.engine.weights import ALIGNMENT, Group, Weights, copy_exactly
from reca.kernels import Impl, adamw_, runs_fused
from reca.randomness import key_of

_TINY_NORM = 1e-6  # torch.nn.utils.clip_grad_norm_ adds the same before it divides


@dataclass(frozen=True, slots=True)
class Update:
    """What one optimizer step did, as device scalars: nothing here has been read on the host.

    Attributes:
        lr: fp32, the learning rate of this step.
        grad_norm: fp32, global gradient norm before clipping.
        skipped: bool, True where loss or norm was not finite and nothing was changed.
    """

    lr: Tensor
    grad_norm: Tensor
    skipped: Tensor


@dataclass(slots=True)
class _Part:
    """All that belongs to one group of weights: buffers beside its own, and a count of updates."""

    group: Group
    gradient: Tensor
    first: Tensor
    second: Tensor
    scales: tuple[Tensor, Tensor] | None
    counter: Tensor

    @classmethod
    def of(cls, group: Group, gradient: Tensor, counter: Tensor, config: OptimConfig) -> _Part:
        """A part before its first update."""
        # Vectors are few elements: nothing is gained by rounding their moments.
        is_coded = config.moments == "8bit" and not group.is_small
        dtype = torch.uint8 if is_coded else torch.float32
        first, second = (torch.zeros_like(group.weight, dtype=dtype) for _ in range(2))
        scale = gradient.new_zeros(group.count // ALIGNMENT, dtype=torch.float32)
        return cls(group, gradient, first, second, (scale, scale.clone()) if is_coded else None, counter)

    @property
    def is_fp32(self) -> bool:
        """Whether nothing of it is kept in fewer bits, which torch's own update wants."""
        return self.group.weight.dtype == torch.float32 and self.scales is None

    @property
    def is_rounded(self) -> bool:
        """Whether something of it is rounded at random."""
        return self.scales is not None or (not self.is_fp32 and self.group.low is None)


class AdamW:
    """AdamW (arXiv 1711.05101, algorithm 2) with clipping by global norm and a schedule, all on the device.

    Args:
        weights: what is trained.
        config: rates, decays, clipping, what is stored in fewer bits.
        steps: of the whole run, for the schedule.
        kernels: `reference` is plain torch; `auto` too on a CPU, on CUDA the fused operator.
        seed: of the random rounding of what is stored in fewer bits.

    Attributes:
        weights: what is trained.
        gradients: their sums over a step.
        updates: scalar fp32, updates applied so far; skipped steps do not count.
    """

    def __init__(
        self, weights: Weights, config: OptimConfig, steps: int, kernels: Impl = "auto", seed: int = 0
    ) -> None:
        self.weights = weights
        self._config, self._steps, self._kernels = config, steps, kernels
        self._key = key_of(seed, "rounding")
        halved = torch.bfloat16 if config.gradients == "bf16" else torch.float32
        self.gradients = Gradients(weights, halved)
        device = weights.groups[0].weight.device
        # One for each group, because torch's fused update counts for itself.
        self._counters = torch.zeros(len(weights.groups), dtype=torch.float32, device=device)
        self.updates = self._counters[0]
        kinds = zip(weights.groups, self.gradients.flats, self._counters.unbind(), strict=True)
        self._parts = [_Part.of(*kind, config) for kind in kinds]

    @torch.no_grad()
    def step(self, loss: Tensor, ema: Ema | None = None) -> Update:
        """One clipped update, or none at all where `loss` or the gradient norm is not finite.

        Args:
            loss: scalar fp32 of this step, equal on every rank.
            ema: the average of the weights, which takes in the new ones.

        Returns: device scalars; the host reads nothing.
        """
        grad_norm = self.gradients.norm()
        skipped = ~(torch.isfinite(grad_norm) & torch.isfinite(loss))
        lr = learning_rate(self.updates, self._config, self._steps)
        clip = self._config.clip_norm
        divisor = None if clip is None else ((grad_norm + _TINY_NORM) / clip).clamp(min=1.0)
        for index, part in enumerate(self._parts):
            # On a CPU torch's vectorised update takes an eighth of the time: quickstart, 1.6 against 12.4 ms.
            if part.is_fp32 and not runs_fused(self._kernels, grad_norm.device):
                self._update(part, lr, divisor, skipped)
                if ema is not None:
                    ema.update_group(index, skipped)
            else:
                average = None if ema is None else (ema.flats[index], ema.decay)
                self._update_in_one_pass(part, lr, divisor, skipped, average)
        return Update(lr=lr, grad_norm=grad_norm, skipped=skipped)

    def _weight_decay(self, part: _Part) -> float:
        return self._config.weight_decay if part.group.decays else 0.0

    def _update(self, part: _Part, lr: Tensor, divisor: Tensor | None, skipped: Tensor) -> None:
        """Torch's fused update, which counts the updates itself."""
        # It divides by `grad_scale` as it reads, and where `found_inf` is set it changes nothing: clipping
        # and skipping cost no pass over memory and no look from the host.
        adamw(
            [part.group.weight],
            [part.gradient],
            [part.first],
            [part.second],
            [],
            [part.counter],
            fused=True,
            grad_scale=divisor,
            found_inf=skipped.to(torch.float32),
            amsgrad=False,
            maximize=False,
            beta1=self._config.betas[0],
            beta2=self._config.betas[1],
            lr=lr,
            weight_decay=self._weight_decay(part),
            eps=self._config.eps,
        )

    def _update_in_one_pass(
        self,
        part: _Part,
        lr: Tensor,
        divisor: Tensor | None,
        skipped: Tensor,
        average: tuple[Tensor, float] | None,
    ) -> None:
        """Clipping, update and average in one pass over memory, in however many bits things are kept."""
        ema, ema_decay = average or (None, 0.0)
        adamw_(
            part.group.weight,
            part.gradient,
            part.first,
            part.second,
            lr=lr,
            updates=part.counter,
            betas=self._config.betas,
            eps=self._config.eps,
            weight_decay=self._weight_decay(part),
            divisor=divisor,
            skipped=skipped,
            low=part.group.low,
            ema=ema,
            ema_decay=ema_decay,
            moment_scales=part.scales,
            key=self._key,
            step=part.counter.to(torch.int64) if part.is_rounded else None,
            offset=part.group.start,
            impl=self._kernels,
        )
        part.counter.add_((~skipped).to(torch.float32))

    def state(self) -> dict[str, Tensor]:
        """Moments: `exp_avg/<name>`, `exp_avg_sq/<name>`, and where those are codes `..._scale/<name>` too.

        `updates` travels apart.
        """
        first = self.weights.by_name([part.first for part in self._parts])
        second = self.weights.by_name([part.second for part in self._parts])
        found = {f"exp_avg/{name}": view for name, view in first.items()}
        found |= {f"exp_avg_sq/{name}": view for name, view in second.items()}
        for part in self._parts:
            for slot in part.group.slots if part.scales is not None else ():
                blocks = slice(slot.start // ALIGNMENT, (slot.start + slot.padded) // ALIGNMENT)
                for kind, scale in zip(("exp_avg", "exp_avg_sq"), part.scales or (), strict=True):
                    found[f"{kind}_scale/{slot.name}"] = scale[blocks]
        return found

    def restore(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """Continue from `state()` and `updates`. Raises CheckpointError unless names and shapes agree."""
        copy_exactly("optimizer state", self.state(), tensors)
        self._counters.fill_(updates)
