"""What a recipe needs of a GPU, before any weights are fetched: memory, FLOPs and predicted time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from reca.config import TASKS, TrainConfig
from reca.errors import ConfigError, nearest
from reca.profiling.roofline import DEVICES, LAUNCH_SECONDS, Device
from reca.recipes.plan.count import StepCount, count_step
from reca.recipes.strict_yaml import parse_yaml

CONTEXT_GB = 1.0
"""CUDA's context, the workspaces of its libraries and what fused operators hold inside."""
STEP = "activations and temporaries"
"""The part of the memory that comes and goes with every microbatch."""
FRAGMENTATION = 0.05
"""Of that part, lost between blocks of the allocator."""


@dataclass(frozen=True, slots=True)
class Option:
    """A change of the configuration that makes a run smaller.

    Attributes:
        overrides: as on the command line.
        peak_memory_gb, images_per_second: with it.
        fits: whether the run then fits.
    """

    overrides: tuple[str, ...]
    peak_memory_gb: float
    images_per_second: float
    fits: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """One recipe on one GPU.

    Attributes:
        recipe, gpu: names.
        count: one optimizer step.
        steps: of the run.
        memory_gb: part -> 1e9 bytes at the peak of a step.
        capacity_gb: of the GPU.
        seconds_per_step: predicted, a lower bound of what eager torch needs.
        options: smaller configurations, where this one does not fit.
        basis: what the numbers rest on.
    """

    recipe: str
    gpu: str
    count: StepCount
    steps: int
    memory_gb: Mapping[str, float]
    capacity_gb: float
    seconds_per_step: float
    options: tuple[Option, ...]
    basis: str

    @property
    def peak_memory_gb(self) -> float:
        """All parts together."""
        return sum(self.memory_gb.values())

    @property
    def fits(self) -> bool:
        """Whether the peak stays below the GPU's memory."""
        return self.peak_memory_gb <= self.capacity_gb

    @property
    def images_per_second(self) -> float:
        """Reconstructed images; microbatches of other tasks are part of their cost."""
        return self.count.images / self.seconds_per_step

    @property
    def gpu_hours(self) -> float:
        """Of the whole run."""
        return self.steps * self.seconds_per_step / 3600


def get_device(name: str) -> Device:
    """A GPU by its name in `reca plan`. Raises ConfigError naming the nearest."""
    if name not in DEVICES:
        raise ConfigError(f"unknown GPU {name!r}; {nearest(name, DEVICES)}")
    return DEVICES[name]


def plan(config: TrainConfig, gpu: str, on_progress: Callable[[str], None] = lambda line: None) -> Plan:
    """Count one step of `config` on tensors without values and predict the run on a GPU.

    Args:
        config: the resolved configuration; neither data nor weights need to exist.
        gpu: a key of `DEVICES`.
        on_progress: called with a line before each part of the work.

    Raises: ConfigError for an unknown GPU, model or task.
    """
    device = get_device(gpu)
    count = count_step(config, on_progress)
    memory = memory_parts(count)
    peak = sum(memory.values())
    options = () if peak <= device.memory_gb else _options(config, count, device, on_progress)
    return Plan(
        recipe=config.recipe,
        gpu=gpu,
        count=count,
        steps=config.steps,
        memory_gb=memory,
        capacity_gb=device.memory_gb,
        seconds_per_step=seconds_per_step(count, device),
        options=options,
        basis=basis(device),
    )


def memory_parts(count: StepCount) -> dict[str, float]:
    """Part -> 1e9 bytes at the peak of a step."""
    step = max(*(part.activation_bytes for part in count.microbatches), count.optimizer_bytes)
    inputs = sum(part.times * part.input_bytes for part in count.microbatches)
    parts = {name: size / 1e9 for name, size in count.state_bytes.items() if size}
    return parts | {
        "batches and draws of a step": inputs / 1e9,
        STEP: step / 1e9,
        "context and fragmentation": CONTEXT_GB + FRAGMENTATION * step / 1e9,
    }


def seconds_per_step(count: StepCount, device: Device) -> float:
    """Sum over all calls of the longest of arithmetic, traffic and launch."""
    return sum(device.seconds(launch) * times for launch, times in count.launches.items())


def basis(device: Device) -> str:
    """What a prediction rests on, in one sentence each."""
    forward, backward = (round(device.matmul_tflops * share) for share in device.attention)
    return (
        "predicted, not measured: FLOPs, operand bytes and launches of one step counted on tensors without "
        f"values; {device.matmul_tflops:g} TFLOP/s bf16 products, {device.wide_tflops:g} in fp32, attention "
        f"{forward} forward and {backward} backward, {device.copy_tb_per_s:g} TB/s, "
        f"{LAUNCH_SECONDS * 1e6:g} us per launch, no overlap, no waiting for data; "
        "samples of typical size at the largest resolution; "
        f"memory with {CONTEXT_GB:g} GB of context and {FRAGMENTATION:.0%} fragmentation"
    )


def _options(
    config: TrainConfig, count: StepCount, device: Device, on_progress: Callable[[str], None]
) -> tuple[Option, ...]:
    """What makes a run smaller, one change upon the other until it fits: first what changes no result."""
    found: list[Option] = []
    overrides: tuple[str, ...] = ()
    changes = [
        _half_precision,
        _smaller_microbatches,
        _recompute,
        _coded_moments,
        _short_weights,
        _short_gradients,
    ]
    while changes and not (found and found[-1].fits):
        is_hopeless = _state_gb(count) + CONTEXT_GB > device.memory_gb
        change = next((c for c in changes if not is_hopeless or c in _SAVE_STATE), None)
        if change is None:
            break
        changes.remove(change)
        if not (further := change(config, count, device)):
            continue
        overrides = (*overrides, *further)
        on_progress(f"too large for this GPU; trying {' '.join(overrides)}")
        config = _with(config, further)
        option, count = _option(config, overrides, device)
        found.append(option)
    recompute = "compute.recompute=true"
    if found and found[-1].fits and recompute in overrides[:-1]:
        fewer = tuple(override for override in overrides if override != recompute)
        on_progress(f"it fits; trying {' '.join(fewer)}")
        option, _ = _option(_with(config, ["compute.recompute=false"]), fewer, device)
        found += [option] if option.fits else []
    return tuple(found)


def _option(config: TrainConfig, overrides: tuple[str, ...], device: Device) -> tuple[Option, StepCount]:
    count = count_step(config)
    peak = sum(memory_parts(count).values())
    rate = count.images / seconds_per_step(count, device)
    return Option(overrides, peak, rate, peak <= device.memory_gb), count


def _state_gb(count: StepCount) -> float:
    return sum(count.state_bytes.values()) / 1e9


def _half_precision(config: TrainConfig, count: StepCount, device: Device) -> tuple[str, ...]:
    return ("compute.precision=bf16",) if config.compute.precision == "fp32" else ()


def _smaller_microbatches(config: TrainConfig, count: StepCount, device: Device) -> tuple[str, ...]:
    """As many samples as should fit: memory is nearly proportional to them."""
    if config.normalize != "global":
        return ()  # it would change the gradients
    memory = memory_parts(count)
    held = sum(memory.values()) - (1 + FRAGMENTATION) * memory[STEP]
    room = (device.memory_gb - held) / (1 + FRAGMENTATION)
    overrides = []
    for part in count.microbatches:
        size = max(1, int(part.samples * room / (part.activation_bytes / 1e9)))
        if size < part.samples:
            stream = "data" if part.task == TASKS[0] else part.task
            overrides.append(f"{stream}.micro_images={size}")
    return tuple(dict.fromkeys(overrides))


def _recompute(config: TrainConfig, count: StepCount, device: Device) -> tuple[str, ...]:
    return () if config.compute.recompute else ("compute.recompute=true",)


def _coded_moments(config: TrainConfig, count: StepCount, device: Device) -> tuple[str, ...]:
    return ("optim.moments=8bit",) if config.optim.moments == "fp32" else ()


def _short_weights(config: TrainConfig, count: StepCount, device: Device) -> tuple[str, ...]:
    is_exact = config.compute.precision == "bf16" and config.optim.weights == "exact"
    return ("optim.weights=bf16",) if is_exact else ()


def _short_gradients(config: TrainConfig, count: StepCount, device: Device) -> tuple[str, ...]:
    is_wide = config.compute.precision == "bf16" and config.optim.gradients == "fp32"
    return ("optim.gradients=bf16",) if is_wide else ()


_SAVE_STATE = (_half_precision, _coded_moments, _short_weights, _short_gradients)
"""Changes that help where weights, gradients and moments alone are too large."""


def _with(config: TrainConfig, overrides: Sequence[str]) -> TrainConfig:
    tree = config.model_dump(mode="json")
    for override in overrides:
        key, _, value = override.partition("=")
        section, _, name = key.partition(".")
        tree[section][name] = parse_yaml(value, key)
    return TrainConfig.model_validate_json(json.dumps(tree), strict=True)
