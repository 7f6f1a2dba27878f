"""Planning a run: the full-size step of every official recipe, counted without a GPU, weights or memory."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from reca.config import TrainConfig
from reca.engine.state import TrainState
from reca.engine.step import accumulate_gradients
from reca.errors import ConfigError
from reca.models import get_family
from reca.models.family import Family
from reca.profiling.launches import LaunchCounter
from reca.profiling.roofline import DEVICES, Device
from reca.randomness import RandomSource
from reca.recipes import RECIPES, get_recipe
from reca.recipes.plan import STEP, Option, Plan, memory_parts, plan
from reca.recipes.plan.count import StepCount, cast_like_load, count_step
from reca.recipes.resolve import resolve

OFFICIAL = (
    "bagel-7b",
    "harmon-0.5b",
    "harmon-1.5b",
    "janus-pro-1b",
    "janus-pro-7b",
    "openuni-b-512",
    "openuni-l-512",
    "openuni-l-1024",
    "showo-clip-256",
    "showo-clip-512",
    "showo-vq-512",
    "showo-vq-512-blur",
)


@functools.cache
def counted(recipe: str, *overrides: str) -> StepCount:
    return count_step(resolve(recipe, overrides).config)


def activations(count: StepCount) -> int:
    return max(part.activation_bytes for part in count.microbatches)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", OFFICIAL)
def test_official_steps_read_nothing_on_the_host_and_execute_little_more_than_the_minimum(
    recipe: str,
) -> None:
    count = counted(recipe)
    assert 0.98 < count.executed_flops / count.minimum_flops <= 1.05
    assert count.images == sum(p.samples * p.times for p in count.microbatches if p.task == "reconstruction")


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name.endswith("-smoke")])
def test_every_smoke_can_be_planned(recipe: str) -> None:
    count = counted(recipe)
    assert count.images == 4 and count.executed_flops > 0
    assert 0 < count.trained_parameters < count.parameters


def test_a_step_without_values_launches_and_holds_what_a_real_one_does() -> None:
    config = get_recipe("janus-smoke")()
    model: Any = get_family("janus").build(get_family("janus").variants["tiny"].config)
    state, count = TrainState.start(model, config, torch.device("cpu")), counted("janus-smoke")
    batch = get_family("janus").example(get_family("janus").variants["tiny"], "reconstruction", 2)
    with LaunchCounter() as counter, torch.no_grad():
        draws = model.draw(batch, RandomSource(config.seed, 1))
    gradients = state.optimizer.gradients
    with gradients.attached(), counter:
        accumulate_gradients(state.model, [batch], [draws], config.loss_weights, collect=gradients.collect)
    assert count.microbatches[0].launches == counter.launches
    assert count.microbatches[0].activation_bytes == pytest.approx(counter.peak_bytes, rel=0.01)
    assert count.trained_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    stored = sum(group.weight.nbytes for group in state.optimizer.weights.groups)
    assert (count.state_bytes["trained weights"], count.state_bytes["frozen weights"]) == (stored, frozen)
    moments = sum(tensor.nbytes for tensor in state.optimizer.state().values())
    assert count.state_bytes["AdamW moments"] == moments
    assert count.state_bytes["gradients"] == sum(flat.nbytes for flat in gradients.flats)


def test_an_average_of_the_weights_costs_a_copy_of_them() -> None:
    kept = counted("janus-smoke", "optim.ema=0.99")
    assert counted("janus-smoke").state_bytes["average of the weights"] == 0
    assert kept.state_bytes["average of the weights"] == kept.state_bytes["trained weights"]
    assert kept.optimizer.total() > counted("janus-smoke").optimizer.total()


def test_recomputing_trades_flops_for_memory() -> None:
    stored, recomputed = counted("janus-smoke"), counted("janus-smoke", "compute.recompute=true")
    assert activations(recomputed) < 0.6 * activations(stored)
    assert recomputed.executed_flops > 1.1 * stored.executed_flops
    assert recomputed.minimum_flops == stored.minimum_flops


def test_microbatches_share_a_step_and_the_last_may_be_smaller() -> None:
    whole = counted("janus-smoke", "data.images=5", "data.micro_images=null")
    cut = counted("janus-smoke", "data.images=5", "data.micro_images=2")
    assert [(part.samples, part.times) for part in whole.microbatches] == [(5, 1)]
    assert [(part.samples, part.times) for part in cut.microbatches] == [(2, 2), (1, 1)]
    assert cut.executed_flops == whole.executed_flops
    assert activations(cut) < 0.5 * activations(whole)


def test_a_step_holds_as_many_samples_as_the_packer_puts_into_it() -> None:
    tokens = get_family("janus").example(get_family("janus").variants["tiny"], "reconstruction", 1).num_tokens
    closed = counted("janus-smoke", f"data.tokens={2 * tokens + 1}", "data.images=9")
    assert closed.images == 3
    with pytest.raises(ConfigError, match=f"has {tokens} tokens, but max_sample_tokens is {tokens - 1}"):
        counted("janus-smoke", f"data.max_sample_tokens={tokens - 1}")


def test_other_tasks_of_a_mixture_are_part_of_the_step() -> None:
    mixed = ("image_to_text.images=6", "image_to_text.micro_images=3", "loss_weights.image_to_text=1")
    count = counted("janus-smoke", *mixed)
    assert [(p.task, p.samples, p.times) for p in count.microbatches] == [
        ("reconstruction", 2, 2),
        ("image_to_text", 3, 2),
    ]
    assert count.images == 4
    assert count.executed_flops > counted("janus-smoke").executed_flops


def frozen_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    return {name: p.dtype for name, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize(
    "family, variant",
    [
        ("bagel", "tiny"),
        ("harmon", "tiny"),
        ("janus", "tiny"),
        ("openuni", "tiny"),
        ("showo", "tiny-clip"),
        ("showo", "tiny-vq"),
    ],
)
def test_frozen_weights_are_planned_in_the_dtypes_they_are_loaded_in(
    family: str, variant: str, tmp_path: Path
) -> None:
    found: Family = get_family(family)
    planned = found.build(found.variants[variant].config)
    found.save(planned, tmp_path / "weights")
    with torch.device("meta"):
        loaded = found.build(found.variants[variant].config)
    found.load(loaded, tmp_path / "weights", torch.device("cpu"), torch.bfloat16)
    config = resolve("bagel-7b").config
    cast_like_load(planned, found, config)
    assert frozen_dtypes(planned) == frozen_dtypes(loaded)


# Fitting


def tiny_plan(monkeypatch: pytest.MonkeyPatch, memory_gb: float, *overrides: str) -> Plan:
    config: TrainConfig = resolve("janus-smoke", ["compute.precision=bf16", *overrides]).config
    monkeypatch.setattr("reca.recipes.plan.DEVICES", {"toy": Device(memory_gb, 1, 1, 1)})
    monkeypatch.setattr("reca.recipes.plan.CONTEXT_GB", 0.0)
    return plan(config, "toy")


def test_a_run_that_fits_needs_no_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    result = tiny_plan(monkeypatch, 1.0)
    assert result.fits and result.options == ()
    assert result.peak_memory_gb == sum(result.memory_gb.values()) < result.capacity_gb


def test_a_run_that_does_not_fit_is_made_smaller_until_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tiny_plan(monkeypatch, 1.0)
    smaller = tiny_plan(monkeypatch, whole.peak_memory_gb - 0.3 * whole.memory_gb[STEP])
    assert not smaller.fits
    assert smaller.options[-1].fits and smaller.options[0].overrides == ("data.micro_images=1",)
    changed = tiny_plan(monkeypatch, smaller.capacity_gb, *smaller.options[-1].overrides)
    assert changed.fits and changed.peak_memory_gb == pytest.approx(smaller.options[-1].peak_memory_gb)


def test_recomputing_comes_after_smaller_microbatches(monkeypatch: pytest.MonkeyPatch) -> None:
    one = tiny_plan(monkeypatch, 1.0, "data.micro_images=1")
    result = tiny_plan(monkeypatch, one.peak_memory_gb - 0.1 * one.memory_gb[STEP])
    assert result.options[-1].overrides == ("data.micro_images=1", "compute.recompute=true")


def test_microbatches_are_left_alone_where_they_change_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tiny_plan(monkeypatch, 1.0)
    room = whole.peak_memory_gb - 0.1 * whole.memory_gb[STEP]
    result = tiny_plan(monkeypatch, room, "normalize=microbatch")
    assert [option.overrides for option in result.options] == [("compute.recompute=true",)]


SMALL_STATE = ("optim.moments=8bit", "optim.weights=bf16", "optim.gradients=bf16")


def test_only_a_smaller_state_is_proposed_where_the_state_alone_is_too_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    result = tiny_plan(monkeypatch, 1e-3)
    assert [option.overrides for option in result.options] == [SMALL_STATE[:n] for n in (1, 2, 3)]
    assert not any(option.fits for option in result.options)


def test_recomputing_is_dropped_again_where_a_smaller_state_makes_it_needless(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def option(config: TrainConfig, overrides: tuple[str, ...], device: Device) -> tuple[Option, StepCount]:
        size = 0.6 if "optim.weights=bf16" in overrides else 1.2
        size -= 0.1 * config.compute.recompute
        return Option(overrides, size, 1.0, size < device.memory_gb), counted("janus-smoke")

    monkeypatch.setattr("reca.recipes.plan._option", option)
    monkeypatch.setattr("reca.recipes.plan.memory_parts", lambda count: {STEP: 1.3})
    options = tiny_plan(monkeypatch, 1.0, "normalize=microbatch", "optim.moments=8bit").options
    assert [(chosen.overrides, chosen.fits) for chosen in options] == [
        (("compute.recompute=true",), False),
        (("compute.recompute=true", "optim.weights=bf16"), True),
        (("optim.weights=bf16",), True),
    ]


def test_memory_is_listed_part_by_part() -> None:
    parts = memory_parts(counted("janus-smoke"))
    assert "average of the weights" not in parts
    assert list(parts)[-2:] == [STEP, "context and fragmentation"]


def test_every_gpu_of_the_contract_is_known() -> None:
    names = "rtx-3090 rtx-4090 rtx-5090 a6000 l40s a100-40 a100-80 h100 h200 b200"
    assert list(DEVICES) == names.split()


def test_full_precision_is_given_up_first(monkeypatch: pytest.MonkeyPatch) -> None:
    result = tiny_plan(monkeypatch, 2e-3, "compute.precision=fp32")
    assert result.options[0].overrides == ("compute.precision=bf16",)
