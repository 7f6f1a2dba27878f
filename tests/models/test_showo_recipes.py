"""Show-o's recipes: the published numbers, and all three tasks trained by the engine from tiny weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from reca.config import TrainConfig
from reca.models import FAMILIES
from reca.recipes import showo
from reca.recipes.api import train


@pytest.mark.parametrize(
    ("recipe", "micro_images", "steps"),
    [
        (showo.showo_clip_512, 2, 5000),
        (showo.showo_clip_256, 4, 10_000),
        (showo.showo_vq_512, 2, 5000),
        (showo.showo_vq_512_blur, 2, 5000),
    ],
)
def test_official_recipes_have_the_published_numbers(
    recipe: Callable[[], TrainConfig], micro_images: int, steps: int
) -> None:
    config = recipe()
    assert config.steps == steps and config.seed == 10_086 and config.normalize == "microbatch"
    assert config.loss_weights == {"reconstruction": 1.0, "image_to_text": 1.0}
    assert config.image_to_text is not None
    for stream in (config.data, config.image_to_text):
        assert (stream.micro_images, stream.images) == (micro_images, 5 * micro_images)
    optim = config.optim
    assert (optim.lr, optim.betas, optim.eps, optim.weight_decay) == (5e-7, (0.9, 0.999), 1e-8, 0.01)
    assert optim.schedule == ("cosine" if steps == 10_000 else "constant")
    assert (optim.warmup_steps, optim.clip_norm, optim.ema) == (1000, None, None)


def mixture(folder: Path) -> dict[str, Any]:
    """Four captioned images and a conversation about each."""
    entries = []
    for index, colour in enumerate(("red", "green", "blue", "white")):
        Image.new("RGB", (40, 30), colour).save(folder / f"{colour}.png")
        (folder / f"{colour}.txt").write_text(f"all {colour}")
        turns = [
            {"from": "human", "value": "<image>\nWhich colour?"},
            {"from": "gpt", "value": f"It is {colour}."},
        ]
        entries.append({"id": str(index), "image": f"{colour}.png", "conversations": turns})
    (folder / "chat.json").write_text(json.dumps(entries))
    return {
        "image_to_text": {"path": str(folder / "chat.json"), "images": 4, "micro_images": 2},
        "text_to_image": {"path": str(folder), "images": 2},
        "loss_weights": {"reconstruction": 1.0, "image_to_text": 1.0, "text_to_image": 0.5},
    }


@pytest.mark.parametrize("recipe", [showo.showo_clip_smoke, showo.showo_vq_smoke])
def test_the_engine_trains_all_three_tasks_and_each_loss_falls(
    recipe: Callable[[], TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, "showo", "reca.models.showo")
    (tmp_path / "texts").mkdir()
    changes = {"steps": 12, "normalize": "microbatch", **mixture(tmp_path / "texts")}
    config = TrainConfig.model_validate(recipe().model_dump() | changes)
    records: list[dict[str, Any]] = []
    summary = train(config, tmp_path / "run", on_progress=lambda record: records.append(dict(record)))
    assert (summary["status"], summary["rejected"], summary["skipped_steps"]) == ("finished", 0, 0)
    for term in ("reconstruction", "image_to_text", "text_to_image"):
        assert records[-1][f"loss/{term}"] < 0.85 * records[0][f"loss/{term}"]
