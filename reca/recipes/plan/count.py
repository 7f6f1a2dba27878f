"""One optimizer step of a recipe at full size, run on tensors without values: what it does and holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from reca.config import TASKS, StreamConfig, TrainConfig
from reca.data.loader import pack_limits
from reca.data.mixture import text_streams
from reca.data.packing import Packer
from reca.engine.state import TrainState, recomputed
from reca.engine.step import accumulate_gradients
from reca.errors import ConfigError
from reca.layers.attention import set_attention_backend
from reca.layers.implementation import set_kernels
from reca.models import get_variant
from reca.models.family import Family, Variant
from reca.profiling.launches import Launch, LaunchCounter
from reca.randomness import RandomSource
from reca.recipes.assemble import RANDOM, check_tasks
from reca.types import Batch, TensorStruct


@dataclass(frozen=True, slots=True)
class Microbatch:
    """Equal microbatches of one task.

    Attributes:
        task: what they train.
        samples: of one of them.
        times: how many of them a step has.
        launches: of one of them: draw, forward and backward.
        minimum_flops: of one of them, by the model's own account.
        activation_bytes: most memory that its forward and backward hold beside weights and batches.
        input_bytes: batch and draws of one of them.
    """

    task: str
    samples: int
    times: int
    launches: Counter[Launch]
    minimum_flops: int
    activation_bytes: int
    input_bytes: int


@dataclass(frozen=True, slots=True)
class StepCount:
    """One optimizer step.

    Attributes:
        microbatches: all kinds of them.
        optimizer: launches after the last microbatch.
        images: that are reconstructed.
        parameters, trained_parameters: of the model, frozen autoencoder included.
        state_bytes: part of what lives as long as the run -> bytes.
        optimizer_bytes: most memory that the optimizer holds beside the state.
    """

    microbatches: tuple[Microbatch, ...]
    optimizer: Counter[Launch]
    images: int
    parameters: int
    trained_parameters: int
    state_bytes: dict[str, int]
    optimizer_bytes: int

    @property
    def minimum_flops(self) -> int:
        """What no exact implementation can do without."""
        return sum(part.times * part.minimum_flops for part in self.microbatches)

    @property
    def executed_flops(self) -> int:
        """What the microbatches execute."""
        return sum(
            part.times * launch.flops * number
            for part in self.microbatches
            for launch, number in part.launches.items()
        )

    @property
    def launches(self) -> Counter[Launch]:
        """Of the whole step."""
        total = Counter(self.optimizer)
        for part in self.microbatches:
            for launch, number in part.launches.items():
                total[launch] += part.times * number
        return total


def count_step(config: TrainConfig, on_progress: Callable[[str], None] = lambda line: None) -> StepCount:
    """Run one step of `config` with samples of typical size on tensors without values.

    Nothing is read, downloaded or allocated; a 7B step takes seconds. Attention is torch's kernel for
    variable lengths, as a GPU runs it, whatever `compute.attention` says except for `reference` and `sdpa`;
    `fused` kernels are those of `auto`.

    Args:
        config: the resolved configuration; data and weights need not exist.
        on_progress: called with a line before each part.

    Raises: ConfigError for an unknown model or task, or if no sample of typical size fits a stream's limits.
    """
    check_tasks(config)
    family, variant = get_variant(config.model)
    examples = [*_examples(config, family, variant)]
    # An operator without a rule for shapes would be run for real, on 7 B parameters.
    with FakeTensorMode(allow_fallback_kernels=False) as mode:
        on_progress(f"building {config.model} without memory")
        model: Any = family.build(variant.config)
        cast_like_load(model, family, config)
        chosen = config.compute.attention
        set_attention_backend(model, chosen if chosen in ("reference", "sdpa") else "counted")
        set_kernels(model, "reference" if config.compute.kernels == "reference" else "auto")
        # Not `TrainState.start`: moving a module between devices fails for tensors without values.
        state = TrainState.of(model, config)
        parts = []
        with recomputed(model.blocks(), config.compute.recompute):
            for task, times, real in examples:
                on_progress(f"counting {task}: {times} microbatches of {len(real.sample_ids)}")
                parts.append(_count_microbatch(state, task, times, real, mode))
        on_progress("counting the optimizer")
        optimizer, optimizer_bytes = _count_optimizer(state)
    return StepCount(
        microbatches=tuple(parts),
        optimizer=optimizer,
        images=sum(part.times * part.samples for part in parts if part.task == TASKS[0]),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        state_bytes=_state_bytes(state),
        optimizer_bytes=optimizer_bytes,
    )


def cast_like_load(model: nn.Module, family: Family, config: TrainConfig) -> None:
    """Give frozen weights the dtype that `load_model` would; random ones keep what they are built in."""
    frozen = torch.bfloat16 if config.compute.precision == "bf16" else torch.float32
    if config.weights == RANDOM:
        return
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and name.partition(".")[0] not in family.fp32_parts:
            parameter.data = parameter.data.to(frozen)


def samples_per_pack(task: str, stream: StreamConfig, family: Family, variant: Variant) -> int:
    """Samples of typical size that the packer puts into a pack. Raises ConfigError if none fits."""
    tokens = family.example(variant, task, 1).num_tokens
    packer: Packer[int] = Packer(pack_limits(stream))
    if not packer.accepts(tokens):
        raise ConfigError(
            f"{task}: a sample of typical size has {tokens} tokens, but max_sample_tokens is "
            f"{stream.max_sample_tokens}; raise it (and max_tokens)"
        )
    while not packer.is_full:
        packer.offer(0, tokens)
    return len(packer.take())


def _examples(config: TrainConfig, family: Family, variant: Variant) -> Iterator[tuple[str, int, Batch]]:
    """(task, times in a step, microbatch) for every kind of microbatch."""
    streams: dict[str, StreamConfig] = {TASKS[0]: config.data, **text_streams(config)}
    for task, stream in streams.items():
        samples = samples_per_pack(task, stream, family, variant)
        for size, times in _cut(samples, stream.micro_images).items():
            yield task, stream.packs * times, family.example(variant, task, size)


def _cut(samples: int, micro_images: int | None) -> dict[int, int]:
    """Size of a microbatch -> how many of it a pack has; the last one may be smaller."""
    size = min(micro_images or samples, samples)
    whole, rest = divmod(samples, size)
    return {size: whole} | ({rest: 1} if rest else {})


def _count_microbatch(
    state: TrainState, task: str, times: int, real: Batch, mode: FakeTensorMode
) -> Microbatch:
    """Draw, forward and backward of one microbatch."""
    batch = real.map(mode.from_tensor)
    with LaunchCounter() as drawing, torch.no_grad():
        draws = state.model.draw(batch, RandomSource(state.config.seed, 1))
    weights = {name: state.config.loss_weights[name] for name in draws.counts}
    gradients = state.optimizer.gradients
    with gradients.attached(), LaunchCounter() as counter:
        accumulate_gradients(
            state.model,
            [batch],
            [draws],
            weights,
            normalize=state.config.normalize,
            precision=state.config.compute.precision,
            collect=gradients.collect,
        )
    return Microbatch(
        task=task,
        samples=len(real.sample_ids),
        times=times,
        launches=drawing.launches + counter.launches,
        minimum_flops=state.model.flops(real),
        activation_bytes=counter.peak_bytes,
        input_bytes=_bytes(_tensors_of(batch)) + _bytes(_tensors_of(draws)),
    )


def _count_optimizer(state: TrainState) -> tuple[Counter[Launch], int]:
    with LaunchCounter() as counter:
        state.optimizer.gradients.zero()
        state.optimizer.step(torch.zeros(()), state.ema)
    return counter.launches, counter.peak_bytes


def _state_bytes(state: TrainState) -> dict[str, int]:
    optimizer = state.optimizer
    frozen = [p for p in state.model.parameters() if not p.requires_grad]
    lows = [group.low for group in optimizer.weights.groups if group.low is not None]
    return {
        "trained weights": _bytes(group.weight for group in optimizer.weights.groups),
        "low halves of their masters": _bytes(lows),
        "frozen weights": _bytes([*frozen, *state.model.buffers()]),
        "gradients": _bytes(optimizer.gradients.flats),
        "AdamW moments": _bytes(optimizer.state().values()),
        "average of the weights": _bytes(state.ema.flats) if state.ema is not None else 0,
    }


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def _tensors_of(struct: TensorStruct) -> list[Tensor]:
    found: list[Tensor] = []

    def take(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    struct.map(take)
    return found
