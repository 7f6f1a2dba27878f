"""Recipes: the only place where models, data and the engine meet. Importing this imports none of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from reca.config import TrainConfig
from reca.errors import ConfigError, nearest

RECIPES = {
    "quickstart": "reca.recipes.quickstart:quickstart",
    "world": "reca.recipes.world.recipes:world",
    "world-flow": "reca.recipes.world.recipes:world_flow",
    "world-encoder": "reca.recipes.world.recipes:world_encoder",
    "world-language": "reca.recipes.world.recipes:world_language",
    "world-alignment": "reca.recipes.world.recipes:world_alignment",
    "world-base": "reca.recipes.world.recipes:world_base",
    "world-flow-base": "reca.recipes.world.recipes:world_flow_base",
    "bagel-7b": "reca.recipes.bagel:bagel_7b",
    "bagel-smoke": "reca.recipes.bagel:bagel_smoke",
    "harmon-0.5b": "reca.recipes.harmon:harmon_05b",
    "harmon-1.5b": "reca.recipes.harmon:harmon_15b",
    "harmon-smoke": "reca.recipes.harmon:harmon_smoke",
    "janus-pro-1b": "reca.recipes.janus:janus_pro_1b",
    "janus-pro-7b": "reca.recipes.janus:janus_pro_7b",
    "janus-smoke": "reca.recipes.janus:janus_smoke",
    "openuni-b-512": "reca.recipes.openuni:openuni_b_512",
    "openuni-l-512": "reca.recipes.openuni:openuni_l_512",
    "openuni-l-1024": "reca.recipes.openuni:openuni_l_1024",
    "openuni-smoke": "reca.recipes.openuni:openuni_smoke",
    "showo-clip-256": "reca.recipes.showo:showo_clip_256",
    "showo-clip-512": "reca.recipes.showo:showo_clip_512",
    "showo-vq-512": "reca.recipes.showo:showo_vq_512",
    "showo-vq-512-blur": "reca.recipes.showo:showo_vq_512_blur",
    "showo-clip-smoke": "reca.recipes.showo:showo_clip_smoke",
    "showo-vq-smoke": "reca.recipes.showo:showo_vq_smoke",
}


def get_recipe(name: str) -> Callable[[], TrainConfig]:
    """The function that builds a recipe's configuration. Raises ConfigError naming the nearest recipe."""
    if name not in RECIPES:
        raise ConfigError(f"unknown recipe {name!r}; {nearest(name, RECIPES)}")
    module, _, function = RECIPES[name].partition(":")
    recipe: Callable[[], TrainConfig] = getattr(importlib.import_module(module), function)
    return recipe
