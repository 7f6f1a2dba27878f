"""How a configuration is resolved, and how each mistake is answered."""

from __future__ import annotations

from pathlib import Path

import pytest

from reca.config import ConversationConfig, TrainConfig
from reca.errors import ConfigError
from reca.recipes import RECIPES, get_recipe
from reca.recipes.resolve import config_yaml, read_config, resolve
from reca.recipes.strict_yaml import parse_yaml


def test_scientific_notation_without_a_dot_is_a_float() -> None:
    assert resolve("bagel-smoke", ["optim.lr=4e-5"]).config.optim.lr == 4e-5


def test_later_overrides_win_over_earlier_ones_and_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("extends: bagel-smoke\noptim:\n  lr: 1e-3\nsteps: 7\n")
    resolved = resolve(str(file), ["steps=8", "steps=9"])
    assert (resolved.config.steps, resolved.config.optim.lr) == (9, 1e-3)
    assert resolved.origins["steps"] == "command line"
    assert resolved.origins["optim.lr"] == str(file)
    assert resolved.origins["seed"] == "recipe bagel-smoke"


def test_the_written_configuration_reads_back_equal(tmp_path: Path) -> None:
    resolved = resolve("bagel-smoke", ["optim.betas=[0.8, 0.99]", "optim.ema=0.99", "data.path=a b/c#d"])
    path = tmp_path / "config.yaml"
    path.write_text(config_yaml(resolved))
    assert read_config(path) == resolved.config


def test_the_written_configuration_names_each_origin() -> None:
    text = config_yaml(resolve("bagel-smoke", ["steps=9"]))
    assert "steps: 9  # command line" in text
    assert "seed: 0  # recipe bagel-smoke" in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", "did you mean 'optim.lr'"),
        ("lr=1e-4", "did you mean 'optim.lr'"),
        ("optim=3", "'optim' is a group; set one of its keys, such as optim.betas"),
        ("steps", "must look like key=value"),
        ("steps=many", "command line: steps: Input should be a valid integer, got 'many'"),
        ("steps=true", "command line: steps: Input should be a valid integer, got True"),
        ("steps=0", "steps: Input should be greater than 0, got 0"),
        ("compute.precision=fp8", "compute.precision: Input should be 'fp32' or 'bf16', got 'fp8'"),
        ("optim.min_lr=1e-6", "min_lr would be ignored by schedule=constant"),
        ("optim.weights=bf16", "optim.weights=bf16 would be ignored by compute.precision=fp32"),
        ("optim.gradients=bf16", "set compute.precision=bf16, or drop it"),
        ("optim.warmup_steps=100000", "must not exceed steps"),
        ("loss_weights.reconstruction=0", "at least one positive weight"),
        ("data.tokens=99999999", "must not exceed max_tokens"),
        ("image_to_text=3", "'image_to_text' is a group; set one of its keys, such as image_to_text.images"),
        ("text_to_image=[]", "such as text_to_image.dropout, or leave it out with null"),
        ("data=null", "'data' is a group; set one of its keys, such as data.images"),
        ("image_to_text.pat=x", "unknown key 'image_to_text.pat'; did you mean 'image_to_text.path'"),
        ("image_to_text.dropout=0.1", "did you mean 'text_to_image.dropout'"),
        ("image_to_text.path=x", "it needs a weight: set loss_weights.image_to_text=1"),
        ("loss_weights.image_to_text=0", "drop the weight with loss_weights.image_to_text=null"),
        ("text_to_image.images=0", "text_to_image.images: Input should be greater than 0, got 0"),
    ],
)
def test_a_wrong_override_is_answered_with_the_cure(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve("bagel-smoke", [override])
    assert message in str(error.value)
    assert error.value.exit_code == 2


MIXED = ["image_to_text.path=mix.json", "loss_weights.image_to_text=1"]


def test_an_override_begins_a_group_that_was_null() -> None:
    resolved = resolve("bagel-smoke", [*MIXED, "image_to_text.root=photos"])
    assert resolved.config.image_to_text == ConversationConfig(path="mix.json", root=Path("photos"))
    assert resolved.config.tasks == ("reconstruction", "image_to_text")
    assert resolved.origins["image_to_text.path"] == "command line"
    assert "image_to_text" not in resolved.origins and "image_to_text.images" not in resolved.origins
    text = config_yaml(resolved)
    assert "  path: mix.json  # command line" in text and "text_to_image: null  # recipe bagel-smoke" in text


def test_null_leaves_a_group_and_its_weight_out_again(tmp_path: Path) -> None:
    plain = resolve("bagel-smoke").config
    dropped = ["image_to_text=null", "loss_weights.image_to_text=null"]
    assert resolve("bagel-smoke", [*MIXED, *dropped]).config == plain
    assert resolve("bagel-smoke", [*MIXED, *dropped, *MIXED]).config.tasks == (
        "reconstruction",
        "image_to_text",
    )
    file = tmp_path / "mixed.yaml"
    file.write_text("extends: bagel-smoke\ntext_to_image: {path: x}\nloss_weights: {text_to_image: 2}\n")
    assert resolve(str(file)).config.tasks == ("reconstruction", "text_to_image")
    dropped = ["text_to_image=null", "loss_weights.text_to_image=null"]
    assert resolve(str(file), dropped).config == plain


def test_a_mixture_reads_back_equal(tmp_path: Path) -> None:
    resolved = resolve("bagel-smoke", [*MIXED, "image_to_text.images=3", "image_to_text.root=a b"])
    path = tmp_path / "config.yaml"
    path.write_text(config_yaml(resolved))
    assert read_config(path) == resolved.config


def test_an_unknown_recipe_names_its_nearest_neighbour() -> None:
    with pytest.raises(ConfigError, match="unknown recipe 'quikstart'; did you mean 'quickstart'"):
        resolve("quikstart")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "given twice"),
        ("a: &x [1]\nb: *x", "aliases are not allowed"),
        ("a: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("a: [1,", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
        ("a: [" + "1," * 20_000 + "]", "more than"),
    ],
)
def test_hostile_yaml_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_yaml(text, "file.yaml")


def test_words_like_on_and_off_stay_strings() -> None:
    assert parse_yaml("[on, off, yes, no, true]", "x") == ["on", "off", "yes", "no", True]


def test_a_file_without_a_base_recipe_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("steps: 7\n")
    with pytest.raises(ConfigError, match="extends: NAME"):
        resolve(str(file))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*none\.yaml"):
        resolve(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_valid_and_carries_its_name(name: str) -> None:
    config = get_recipe(name)()
    assert isinstance(config, TrainConfig)
    assert config.recipe == name
