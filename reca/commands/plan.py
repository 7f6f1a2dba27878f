"""`reca plan`: what a recipe needs of a GPU, for people and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from reca.commands.plan_launches import launches_record, render_launches
from reca.errors import ConfigError
from reca.recipes.plan import Plan, get_device, plan
from reca.recipes.plan.launches import PartLaunches, compare_launches
from reca.recipes.resolve import resolve


@dataclass(frozen=True, slots=True)
class Planned:
    """What `reca plan` found.

    Attributes:
        plan: memory, FLOPs and time.
        model: the variant.
        launches: with and without operators; None unless asked for.
    """

    plan: Plan
    model: str
    launches: list[PartLaunches] | None


def plan_recipe(
    recipe: str, overrides: Sequence[str], *, gpu: str, gpus: int, launches: bool = False
) -> Planned:
    """Plan a recipe on one GPU, with `launches` also in plain torch; progress goes to stderr.

    Raises: ConfigError for an unknown recipe, key or GPU, and for several GPUs.
    """
    get_device(gpu)
    if gpus != 1:
        raise ConfigError(
            f"--gpus {gpus}: `reca train` runs on one GPU so far, so there is nothing to plan; drop --gpus"
        )
    console = Console(stderr=True)
    with console.status("planning") as status:

        def show(line: str) -> None:
            if console.is_terminal:
                status.update(line)
            else:
                console.print(line, highlight=False, soft_wrap=True)

        config = resolve(recipe, overrides).config
        result = plan(config, gpu, show)
        compared = compare_launches(config, result.count, show) if launches else None
        return Planned(result, config.model, compared)


def record(planned: Planned) -> dict[str, Any]:
    """The JSON document; FLOPs are in 1e12, per reconstructed image; memory in 1e9 bytes."""
    result = planned.plan
    count, images = result.count, result.count.images
    document = {
        "recipe": result.recipe,
        "gpu": result.gpu,
        "gpu_hours": result.gpu_hours,
        "images_per_second": result.images_per_second,
        "seconds_per_step": result.seconds_per_step,
        "images_per_step": images,
        "steps": result.steps,
        "peak_memory_gb": result.peak_memory_gb,
        "gpu_memory_gb": result.capacity_gb,
        "fits": result.fits,
        "memory_gb": dict(result.memory_gb),
        "min_tflop_per_image": count.minimum_flops / images / 1e12,
        "executed_tflop_per_image": count.executed_flops / images / 1e12,
        "executed_over_minimum": count.executed_flops / count.minimum_flops,
        "parameters": count.parameters,
        "trained_parameters": count.trained_parameters,
        "launches_per_step": _kernels(count.launches),
        "microbatches": [
            {
                "task": part.task,
                "samples": part.samples,
                "times": part.times,
                "launches": _kernels(part.launches),
                "activations_gb": part.activation_bytes / 1e9,
            }
            for part in count.microbatches
        ],
        "options": [
            {
                "overrides": list(option.overrides),
                "peak_memory_gb": option.peak_memory_gb,
                "images_per_second": option.images_per_second,
                "fits": option.fits,
            }
            for option in result.options
        ],
        "basis": result.basis,
    }
    if planned.launches is not None:
        document["launches"] = launches_record(planned.model, planned.launches)
    return document


def render(planned: Planned) -> None:
    """The plan as a short table on stdout."""
    console = Console(highlight=False, soft_wrap=True)
    result = planned.plan
    count, facts = result.count, record(planned)
    table = Table(title=f"{result.recipe} on one {result.gpu}", show_header=False, box=None)
    table.add_column(justify="left")
    table.add_column(justify="right")
    for name, size in result.memory_gb.items():
        table.add_row(name, f"{size:.1f} GB")
    table.add_row("peak memory", f"{result.peak_memory_gb:.1f} GB of {result.capacity_gb:.1f} GB")
    table.add_row(
        "parameters, trained", f"{count.parameters / 1e9:.2f} G, {count.trained_parameters / 1e9:.2f} G"
    )
    table.add_row(
        "TFLOP per image, executed / least",
        f"{facts['executed_tflop_per_image']:.4g} / {facts['min_tflop_per_image']:.4g} = "
        f"{facts['executed_over_minimum']:.3f}",
    )
    table.add_row("images per step, steps", f"{count.images}, {result.steps}")
    table.add_row("kernel launches per step", f"{facts['launches_per_step']:,}")
    table.add_row("PREDICTED seconds per step", f"{result.seconds_per_step:.3g}")
    table.add_row("PREDICTED images per second", f"{result.images_per_second:.3g}")
    table.add_row("PREDICTED GPU-hours", f"{result.gpu_hours:.3g}")
    console.print(table)
    console.print("It fits." if result.fits else "It does NOT fit.")
    for line in advice(result):
        console.print(line)
    console.print(result.basis)
    if planned.launches is not None:
        render_launches(planned.model, planned.launches, console)


def advice(result: Plan) -> list[str]:
    """What to change to make it fit; nothing where it fits already."""
    if result.fits:
        return []
    lines = [
        f"{' '.join(option.overrides)}: {option.peak_memory_gb:.1f} GB, "
        f"PREDICTED {option.images_per_second:.3g} images/s, "
        f"{'fits' if option.fits else 'does not fit either'}"
        for option in result.options
    ]
    if not any(option.fits for option in result.options):
        state = sum(result.count.state_bytes.values()) / 1e9
        lines.append(
            "no option of this version makes it fit: weights, gradients and moments alone take "
            f"{state:.1f} GB; choose a larger GPU or a smaller model"
        )
    return lines


def _kernels(launches: Any) -> int:
    return sum(launch.kernels * times for launch, times in launches.items())
