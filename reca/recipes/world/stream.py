"""The steps of a world run: a pure function of the seed and the step number, so that resuming is trivial."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from reca.config import TrainConfig
from reca.models.miniature.batch import EncoderBatch, GenerationBatch, LanguageBatch, MiniatureBatch
from reca.models.miniature.config import MiniatureConfig
from reca.randomness import RandomSource
from reca.recipes.world.arms import get_arm, loss_weights
from reca.types import StepBatches
from reca.world.language import conversation, dense_caption, encode, image_rows, sparse_caption
from reca.world.render import observe
from reca.world.scenes import NUM_CODES, World, draw_scenes

DROPOUT = 0.1
"""Share of samples trained without their condition, for guidance."""
TEST_IDS = 1 << 45
"""First scene that only scores are taken from."""

# Every stage has scenes of its own; a post-training run knows none of those that the base was trained on.
_FIRST_ID = {
    name: rank << 40 for rank, name in enumerate(("encoder", "language", "alignment", "base", "arm"))
}
_CODE_SCALE = 0.5
# Words without a meaning for pictures; the trunk knows them from questions.
_INSTRUCTIONS = torch.tensor(encode("describe what colour place count and empty unknown"))


class WorldLoader:
    """An endless, deterministic, resumable stream of steps; implements `reca.types.StepLoader`.

    Args:
        config: of a run in the world.
        model: the architecture, for the sizes of embeddings.
    """

    def __init__(self, config: TrainConfig, model: MiniatureConfig) -> None:
        assert config.world is not None
        self.on_wait: Callable[[], None] = lambda: None
        self._world, self._stage, self._images = (
            World.of(config.world.held_out),
            config.world.stage,
            config.world.images,
        )
        self._pool = config.world.pool
        self._weights = loss_weights(config)
        self._arm = get_arm(config)
        self._random = RandomSource(config.seed)
        self._step = 0
        normal = self._random.normal("rotation", torch.tensor([0]), model.dim**2)
        self._rotation = torch.linalg.qr(normal.view(model.dim, model.dim)).Q
        self._code_table = _CODE_SCALE * self._random.normal("codes", torch.arange(NUM_CODES), model.dim)

    def __next__(self) -> StepBatches:
        """The microbatches of the next step, one for each loss term, in shares of its scenes."""
        number = self._step * self._images
        ids = torch.arange(number, number + self._images) + _FIRST_ID[self._stage]
        scenes = ids
        if self._stage in ("base", "arm"):
            scenes = (ids - _FIRST_ID[self._stage]) % self._pool + _FIRST_ID[self._stage]
        sizes = _shares(self._images, list(self._weights.values()))
        parts = zip(self._weights, torch.split(ids, sizes), torch.split(scenes, sizes), strict=True)
        batches = tuple(self._batch(*part) for part in parts)
        self._step += 1
        return StepBatches(batches, cursor={"step": self._step})

    def restore(self, cursor: Mapping[str, Any]) -> None:
        """Continue after the step of this cursor."""
        self._step = int(cursor.get("step", 0))

    def close(self) -> None:
        """Nothing to end: scenes are drawn in this process."""

    def _batch(self, term: str, ids: Tensor, scenes: Tensor) -> MiniatureBatch:
        codes = draw_scenes(self._random, scenes)
        common: dict[str, Any] = {"sample_ids": ids, "num_images": len(ids), "term": term}
        if term == "cells":
            rows = image_rows(len(ids))
            pixels = observe(codes, self._random, scenes)
            return EncoderBatch(**common, num_tokens=codes.numel(), tokens=rows, pixels=pixels, codes=codes)
        if term in ("language", "image_to_text"):
            is_seen = term == "image_to_text"
            tokens, labels = conversation(codes, self._random, scenes, is_seen=is_seen)
            seen = observe(codes, self._random, scenes) if is_seen else None
            return LanguageBatch(
                **common, num_tokens=tokens.numel(), tokens=tokens, labels=labels, pixels=seen
            )
        tokens, given = self._given(term, codes, scenes)
        return GenerationBatch(
            **common,
            num_tokens=tokens.numel() + codes.numel(),
            tokens=tokens,
            codes=codes,
            dropout=DROPOUT,
            **given,
        )

    def _given(self, term: str, codes: Tensor, scenes: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Rows of tokens that scenes are drawn from, and what else is given."""
        if term == "text_to_image":
            return sparse_caption(self._world, codes, self._random, scenes), {}
        if term == "dense_captions":
            return dense_caption(codes), {}
        rows = image_rows(len(codes))
        if self._arm.instructions:
            chosen = self._random.at(0).uniform("instruction", scenes, 1) * self._arm.instructions
            rows = torch.cat([rows, _INSTRUCTIONS[chosen.long()]], dim=1)
        if self._arm.condition == "codes":
            return rows, {"embeddings": self._code_table[codes]}
        pixels = observe(codes, self._random, scenes)
        if self._arm.condition == "shuffled":
            return rows, {"pixels": pixels.roll(1, dims=0)}
        if self._arm.condition == "rotated":
            return rows, {"pixels": pixels, "rotation": self._rotation}
        return rows, {"pixels": pixels}


def _shares(total: int, weights: list[float]) -> list[int]:
    """Whole numbers in proportion to the weights, which sum to 1; the last takes what rounding leaves."""
    sizes = [round(total * weight) for weight in weights[:-1]]
    return [*sizes, total - sum(sizes)]
