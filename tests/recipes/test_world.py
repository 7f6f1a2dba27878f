"""Runs in the miniature world: stages, arms, gates, what they refuse, and exact continuation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from reca.config import TrainConfig
from reca.engine.checkpoint import load_checkpoint
from reca.engine.loop import Job
from reca.errors import CheckpointError, ConfigError
from reca.models.miniature.batch import GenerationBatch
from reca.models.miniature.config import MiniatureConfig
from reca.recipes import RECIPES, get_recipe
from reca.recipes.api import load, train
from reca.recipes.resolve import resolve
from reca.recipes.world.arms import ARMS, DEFAULT_ARM, get_arm, loss_weights, trained_parts
from reca.recipes.world.evaluation import read_scores
from reca.recipes.world.run import WEIGHTS, assemble_world, check_gate, refuse_ignored, starting_model
from reca.recipes.world.stream import WorldLoader
from reca.types import StepBatches
from reca.world.scenes import World

WORLDS = [name for name in RECIPES if name.startswith("world")]
SMALL = ("world.images=8", "world.prompts=4", "world.samples=2", "optim.warmup_steps=0", "log_every=1")


def config(recipe: str = "world", *overrides: str) -> TrainConfig:
    return resolve(recipe, (*SMALL, *overrides)).config


def steps(loader: WorldLoader, count: int) -> list[StepBatches]:
    return [next(loader) for _ in range(count)]


def same(one: Any, other: Any) -> bool:
    """Whether two microbatches hold the same bits."""
    fields = type(one).__dataclass_fields__
    pairs = [(getattr(one, name), getattr(other, name)) for name in fields]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a base that was trained for three steps in each stage."""
    folder = tmp_path_factory.mktemp("stages")
    weights = None
    for recipe in ("world-encoder", "world-language", "world-alignment", "world-base"):
        chosen = [f"weights={weights}"] if weights is not None else []
        stage = config(recipe, "steps=3", "world.gate=null", "sample.every=2", *chosen)
        train(stage, folder / recipe)
        weights = folder / recipe / WEIGHTS
    assert weights is not None
    return weights


@pytest.mark.parametrize("recipe", WORLDS)
def test_every_recipe_is_complete_and_uses_all_that_it_sets(recipe):
    refuse_ignored(get_recipe(recipe)())
    assert abs(sum(loss_weights(get_recipe(recipe)()).values()) - 1) < 1e-9


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_trains_on_the_same_scenes(arm):
    found = steps(WorldLoader(config("world", f"arm={arm}"), MiniatureConfig("masked")), 2)
    ids = [sorted(int(i) for part in step.microbatches for i in part.sample_ids) for step in found]
    other = steps(WorldLoader(config(), MiniatureConfig("masked")), 2)
    assert ids == [sorted(int(i) for part in step.microbatches for i in part.sample_ids) for step in other]
    assert {part.term for step in found for part in step.microbatches} == set(
        loss_weights(config("world", f"arm={arm}"))
    )


def test_the_default_arm_is_half_reconstruction_and_half_captions():
    assert DEFAULT_ARM == "reca_and_captions"
    assert loss_weights(config()) == {"reconstruction": 0.5, "text_to_image": 0.5}
    sizes = [
        len(part.sample_ids) for part in next(WorldLoader(config(), MiniatureConfig("masked"))).microbatches
    ]
    assert sizes == [4, 4]


def test_controls_change_what_is_given_and_nothing_else():
    def first(arm: str) -> Any:
        return next(WorldLoader(config("world", f"arm={arm}"), MiniatureConfig("masked"))).microbatches[0]

    own, shuffled, rotated, copied = (first(arm) for arm in (DEFAULT_ARM, "shuffled", "rotated", "copy"))
    for other in (shuffled, rotated, copied):
        assert torch.equal(own.codes, other.codes) and torch.equal(own.sample_ids, other.sample_ids)
    assert torch.equal(shuffled.pixels, own.pixels.roll(1, dims=0))
    assert not any(torch.equal(a, b) for a, b in zip(own.pixels, shuffled.pixels, strict=True))
    torch.testing.assert_close(rotated.rotation @ rotated.rotation.T, torch.eye(64), atol=1e-5, rtol=0)
    assert copied.pixels is None and torch.equal(
        copied.embeddings[0, 0] == copied.embeddings[0, 1],
        torch.full((64,), bool(own.codes[0, 0] == own.codes[0, 1])),
    )
    assert first("dense").tokens.shape[1] > 5 and first("captions").term == "text_to_image"


@pytest.mark.parametrize(
    "recipe", ["world", "world-encoder", "world-language", "world-alignment", "world-base"]
)
def test_steps_are_a_function_of_the_step_number(recipe):
    whole = steps(WorldLoader(config(recipe), MiniatureConfig("masked")), 3)
    resumed = WorldLoader(config(recipe), MiniatureConfig("masked"))
    resumed.restore(whole[1].cursor)
    again = next(resumed)
    assert again.cursor == whole[2].cursor
    for one, other in zip(whole[2].microbatches, again.microbatches, strict=True):
        assert same(one, other)
        assert not torch.equal(one.sample_ids, whole[1].microbatches[0].sample_ids)


def test_the_scenes_of_a_generator_come_again_after_the_pool_with_new_draws():
    loader = WorldLoader(config("world", "world.pool=16", "arm=captions"), MiniatureConfig("masked"))
    first, _, third = (step.microbatches[0] for step in steps(loader, 3))
    assert torch.equal(first.codes, third.codes) and torch.equal(first.tokens, third.tokens)
    assert not torch.equal(first.sample_ids, third.sample_ids)


def test_a_run_ends_with_scores_before_and_after_a_sheet_and_weights(base: Path, tmp_path: Path):
    seen = []
    summary = train(config("world", "steps=3", f"weights={base}"), tmp_path / "run", on_progress=seen.append)
    written = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert written["after"] == summary["after"]
    for moment in ("before", "after"):
        for name in ("mean", "mean_without_held_out", "held_out", "pair", "reconstruction"):
            assert 0 <= summary[moment][name] <= 1 and f"{name}/standard_error" in summary[moment]
    assert summary["before"]["descriptions_of_pictures"] == summary["after"]["descriptions_of_pictures"]
    assert seen[-1]["loss/reconstruction"] > 0 and seen[-1]["loss/text_to_image"] > 0
    scores = read_scores(tmp_path / "run" / "samples", 3)
    assert len(scores["held_out"]["right"]) == 4 and scores["held_out"]["samples"] == 2
    assert (tmp_path / "run" / "samples" / "step-00000003.png").is_file()
    written = json.loads((tmp_path / "run" / WEIGHTS / "world.json").read_text())
    assert set(written) >= {"world", "world-encoder", "world-language", "world-alignment", "world-base"}
    again = load(tmp_path / "run" / WEIGHTS, "miniature/masked").model.state_dict()
    saved = load_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000003").model
    assert saved and all(torch.equal(tensor, again[name]) for name, tensor in saved.items())


def test_a_run_that_was_cut_short_continues_to_the_same_bits(base: Path, tmp_path: Path):
    changes = ("steps=4", "checkpoint.every=2", "checkpoint.keep=2", f"weights={base}")
    train(config("world", *changes), tmp_path / "whole")

    class Cut(Exception):
        pass

    def stop(record: Any) -> None:
        if record["step"] == 3:
            raise Cut

    with pytest.raises(Cut):
        train(config("world", *changes), tmp_path / "cut", on_progress=stop)
    train(config("world", *changes), tmp_path / "cut", resume="auto")
    one, other = (
        load_checkpoint(tmp_path / name / "checkpoints" / "step-00000004").model for name in ("whole", "cut")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert read_scores(tmp_path / "whole" / "samples", 4) == read_scores(tmp_path / "cut" / "samples", 4)


def test_only_the_parts_of_an_arm_are_trained(base: Path):
    chosen = starting_model(config("world", f"weights={base}")).model
    assert {n.split(".")[0] for n, p in chosen.named_parameters() if p.requires_grad} == {"generator"}
    assert set(trained_parts(config("world", "arm=trunk"))) == {"generator", "trunk", "projector"}
    assert get_arm(config("world", "arm=trunk_and_text")).image_to_text > 0


def test_the_base_starts_as_a_copy_of_the_reader(base: Path):
    stage = starting_model(config("world-flow-base", f"weights={base}")).model
    for name, tensor in stage.trunk.layers.state_dict().items():
        assert torch.equal(tensor, stage.generator.expert.layers.state_dict()[name])


def test_an_arm_may_raise_the_learning_rate_and_add_instructions(base: Path, tmp_path: Path):
    def job(arm: str) -> Job:
        chosen = config("world", f"arm={arm}", f"weights={base}")
        return assemble_world(chosen, tmp_path, on_progress=lambda record: None, on_start=lambda: None)

    assert job("high_rate").config.optim.lr == pytest.approx(10 * job("captions").config.optim.lr)
    one, many = (
        next(job(f"{name}_instruction{s}").loader).microbatches[0] for name, s in (("one", ""), ("many", "s"))
    )
    assert isinstance(one, GenerationBatch) and isinstance(many, GenerationBatch)
    assert one.tokens.shape == many.tokens.shape == (4, 6)
    assert len(one.tokens[:, 5].unique()) == 1 < len(many.tokens[:, 5].unique())


@pytest.mark.parametrize("recipe", ["world", "world-flow"])
def test_the_shipped_bases_are_small_and_of_this_world(recipe):
    loaded = starting_model(get_recipe(recipe)())
    assert loaded.weights is not None and loaded.model.world == World.of(config().world.held_out).identity
    assert sum(file.stat().st_size for file in loaded.weights.iterdir()) < 3_100_000
    stated = json.loads((loaded.weights / "world.json").read_text())
    for stage in ("world-encoder", "world-language", "world-alignment", "world-base", "world-flow-base"):
        made = get_recipe(stage)()
        assert stated[stage]["steps"] == made.steps and stated[stage]["seed"] == made.seed
        if stage in ("world-encoder", "world-language", "world-alignment"):
            check_gate(made, Path(stage), {"after": stated[stage]["scores"]})


def test_an_unknown_arm_names_its_neighbour(tmp_path: Path):
    with pytest.raises(ConfigError, match="unknown arm 'shufled'; did you mean 'shuffled'"):
        train(config("world", "arm=shufled", "weights=random"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_world_without_a_held_out_pair_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="needs at least one held-out pair"):
        train(config("world", "world.held_out=[]", "weights=random"), tmp_path / "run")


def test_weights_of_another_world_are_refused(base: Path, tmp_path: Path):
    changed = config("world", 'world.held_out=["purple circle"]', f"weights={base}")
    with pytest.raises(CheckpointError, match=r"was taught in world .*, but this is world") as caught:
        train(changed, tmp_path / "run")
    assert World.of(("purple circle",)).identity in str(caught.value)
    assert "world-encoder" in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "override", "key"),
    [
        ("world", "data.path=photos", "data"),
        ("world", "loss_weights.reconstruction=2", "loss_weights"),
        ("world", "sample.steps=20", "sample.steps"),
        ("world", "timestep_shift=2", "timestep_shift"),
        ("world", "compute.recompute=true", "compute.recompute"),
        ("world-base", "arm=captions", "arm"),
        ("world-flow", "sample.images=3", "sample.images"),
    ],
)
def test_what_would_be_ignored_is_refused(recipe, override, key, tmp_path: Path):
    with pytest.raises(ConfigError, match=rf"{key} would be ignored by {recipe}"):
        train(config(recipe, override), tmp_path / "run")


def test_an_arm_outside_the_world_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="arm=captions would be ignored by quickstart"):
        train(resolve("quickstart", ["arm=captions"]).config, tmp_path / "run")


def test_a_missed_gate_is_an_error_with_the_cure(tmp_path: Path):
    with pytest.raises(
        CheckpointError, match=r"cells are right in 0\.\d+, less than world\.gate=0\.98; train longer"
    ):
        train(config("world-encoder", "steps=2"), tmp_path / "run")
    # Everything was written before, so that it can be looked at.
    assert (tmp_path / "run" / "summary.json").is_file() and (tmp_path / "run" / WEIGHTS).is_dir()


def test_a_base_that_still_rises_misses_its_gate():
    rising = {"after": {"gain_of_last_quarter": 0.2}}
    with pytest.raises(CheckpointError, match=r"rose by 0\.200 over the last quarter"):
        check_gate(config("world-base"), Path("run"), rising)
    check_gate(config("world-base"), Path("run"), {"after": {"gain_of_last_quarter": 0.001}})
