"""AdamW over exactly the tensors that require gradients; a bad step is skipped on the device, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from reca.config import OptimConfig
from reca.engine.schedule import learning_rate
from reca.errors import CheckpointError, ConfigError
from reca.kernels import Impl, adamw_, runs_fused

if TYPE_CHECKING:
    from reca.engine.ema import Ema

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
class _Group:
    """Tensors that share one weight decay, with their moments; parallel lists for the fused update."""

    weight_decay: float
    names: list[str] = field(default_factory=list)
    parameters: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    counters: list[Tensor] = field(default_factory=list)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter for all that require gradients. Raises ConfigError if there is none."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ConfigError(
            "nothing to train: no parameter of the model requires gradients; check what the recipe freezes"
        )
    return trained


def _decays(name: str, parameter: Tensor, config: OptimConfig) -> bool:
    return (config.decay_vectors or parameter.ndim > 1) and not any(part in name for part in config.no_decay)


class AdamW:
    """AdamW (arXiv 1711.05101, algorithm 2) with clipping by global norm and a schedule, all on the device.

    Gradients live in buffers that are allocated once and zeroed, so a tensor that a step does not reach has a
    zero gradient, as under the sharded official training.

    Args:
        parameters: name -> trained tensor, fp32.
        config: rates, decays, clipping.
        steps: of the whole run, for the schedule.
        kernels: `reference` is torch's own fused update; `auto` too, but on CUDA the operator of reca.

    Attributes:
        parameters: name -> trained tensor, fp32.
        updates: scalar fp32, updates applied so far; skipped steps do not count.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        config: OptimConfig,
        steps: int,
        kernels: Impl = "auto",
    ) -> None:
        for part in config.no_decay:
            if not any(part in name for name in parameters):
                raise ConfigError(f"optim.no_decay: no trained tensor's name contains {part!r}; drop it")
        self.parameters = dict(parameters)
        self._config, self._steps, self._kernels = config, steps, kernels
        device = next(iter(parameters.values())).device
        counters = torch.zeros(len(parameters), dtype=torch.float32, device=device)
        self.updates = counters[0]
        self._counters = counters
        self._moments: dict[str, tuple[Tensor, Tensor]] = {}
        groups = {decay: _Group(config.weight_decay if decay else 0.0) for decay in (True, False)}
        for (name, parameter), counter in zip(parameters.items(), counters.unbind(), strict=True):
            if parameter.dtype != torch.float32:
                raise TypeError(
                    f"AdamW: trained tensors must be float32 masters, got {parameter.dtype} for {name!r}"
                )
            moments = (torch.zeros_like(parameter), torch.zeros_like(parameter))
            self._moments[name] = moments
            parameter.grad = torch.zeros_like(parameter)
            group = groups[_decays(name, parameter, config)]
            group.names.append(name)
            group.parameters.append(parameter)
            group.exp_avgs.append(moments[0])
            group.exp_avg_sqs.append(moments[1])
            group.counters.append(counter)
        self._groups = [group for group in groups.values() if group.parameters]

    def gradients(self) -> list[Tensor]:
        """The gradient buffers, in the order of `parameters`."""
        return [gradient for p in self.parameters.values() if (gradient := p.grad) is not None]

    def zero_gradients(self) -> None:
        """Zero every gradient in place."""
        torch._foreach_zero_(self.gradients())

    @torch.no_grad()
    def step(self, loss: Tensor, ema: Ema | None = None) -> Update:
        """One clipped update, or none at all where `loss` or the gradient norm is not finite.

        Args:
            loss: scalar fp32 of this step, equal on every rank.
            ema: the average of the weights, which takes in the new ones.

        Returns: device scalars; the host reads nothing.
        """
        grad_norm = torch.nn.utils.get_total_norm(self.gradients(), foreach=True)
        skipped = ~(torch.isfinite(grad_norm) & torch.isfinite(loss))
        lr = learning_rate(self.updates, self._config, self._steps)
        clip = self._config.clip_norm
        divisor = None if clip is None else ((grad_norm + _TINY_NORM) / clip).clamp(min=1.0)
        # On a CPU torch's vectorised update takes an eighth of the time: quickstart, 1.6 ms against 12.4 ms.
        if runs_fused(self._kernels, grad_norm.device):
            self._update_in_one_pass(lr, divisor, skipped, ema)
        else:
            self._update(lr, divisor, skipped)
            if ema is not None:
                ema.update(skipped)
        return Update(lr=lr, grad_norm=grad_norm, skipped=skipped)

    def _update(self, lr: Tensor, divisor: Tensor | None, skipped: Tensor) -> None:
        """Torch's fused update of lists of tensors, which counts the updates itself."""
        beta1, beta2 = self._config.betas
        for group in self._groups:
            # The fused kernel divides by `grad_scale` as it reads, and where `found_inf` is set it changes
            # nothing: clipping and skipping cost no pass over memory and no look from the host.
            adamw(
                group.parameters,
                [gradient for p in group.parameters if (gradient := p.grad) is not None],
                group.exp_avgs,
                group.exp_avg_sqs,
                [],
                group.counters,
                fused=True,
                grad_scale=divisor,
                found_inf=skipped.to(torch.float32),
                amsgrad=False,
                maximize=False,
                beta1=beta1,
                beta2=beta2,
                lr=lr,
                weight_decay=group.weight_decay,
                eps=self._config.eps,
            )

    def _update_in_one_pass(
        self, lr: Tensor, divisor: Tensor | None, skipped: Tensor, ema: Ema | None
    ) -> None:
        """Clipping, update and average of each tensor in one pass over memory."""
        averages = {} if ema is None else ema.state()
        for group in self._groups:
            moments = zip(group.exp_avgs, group.exp_avg_sqs, strict=True)
            for name, parameter, (exp_avg, exp_avg_sq) in zip(
                group.names, group.parameters, moments, strict=True
            ):
                assert parameter.grad is not None
                average = averages.get(name)
                adamw_(
                    parameter.view(-1),
                    parameter.grad.view(-1),
                    exp_avg.view(-1),
                    exp_avg_sq.view(-1),
                    lr=lr,
                    updates=self.updates,
                    betas=self._config.betas,
                    eps=self._config.eps,
                    weight_decay=group.weight_decay,
                    divisor=divisor,
                    skipped=skipped,
                    ema=None if average is None else average.view(-1),
                    ema_decay=0.0 if ema is None else ema.decay,
                    impl=self._kernels,
                )
        self._counters.add_((~skipped).to(torch.float32))

    def state(self) -> dict[str, Tensor]:
        """The moments as named tensors: `exp_avg/<name>` and `exp_avg_sq/<name>`; `updates` travels apart."""
        first = {f"exp_avg/{name}": moments[0] for name, moments in self._moments.items()}
        return first | {f"exp_avg_sq/{name}": moments[1] for name, moments in self._moments.items()}

    def restore(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """Continue from `state()` and `updates`. Raises CheckpointError unless names and shapes agree."""
        copy_exactly("optimizer state", self.state(), tensors)
        self._counters.fill_(updates)


@torch.no_grad()
def copy_exactly(what: str, into: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    """Copy named tensors in place. Raises CheckpointError, before any copy, unless all of them fit."""
    missing, unexpected = into.keys() - source.keys(), source.keys() - into.keys()
    if missing or unexpected:
        raise CheckpointError(
            f"checkpoint: the {what} does not fit the model: {_listed('missing', missing)}, "
            f"{_listed('unexpected', unexpected)}; resume with the configuration it was written with"
        )
    for name, tensor in into.items():
        if tensor.shape != source[name].shape or tensor.dtype != source[name].dtype:
            raise CheckpointError(
                f"checkpoint: {what} {name!r} must be {tuple(tensor.shape)} {tensor.dtype}, "
                f"got {tuple(source[name].shape)} {source[name].dtype}"
            )
    for name, tensor in into.items():
        tensor.copy_(source[name])


def _listed(label: str, names: Iterable[str]) -> str:
    ordered = sorted(names)
    return f"{len(ordered)} {label}" + (f" (first {ordered[0]!r})" if ordered else "")
