"""How the tasks of a configuration meet a family: what it trains, with which processor, on which data."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from reca.config import TrainConfig
from reca.data import Reject, open_source, open_texts
from reca.data.mixture import text_streams
from reca.errors import ConfigError, DataError
from reca.models import get_variant
from reca.models.bagel import BagelProcessor
from reca.models.bagel.batch import BagelBatch
from reca.randomness import RandomSource
from reca.recipes import assemble as module
from reca.recipes.assemble import Loaded, assemble, build_streams, check_tasks
from reca.recipes.resolve import resolve

FAMILY, VARIANT = get_variant("bagel/tiny")


def mixed(tmp_path: Path) -> TrainConfig:
    """The smoke recipe with captions and one conversation about the shipped photographs."""
    source = open_source("package:photos")
    folder = tmp_path / "captioned"
    folder.mkdir()
    for k in range(2):
        (folder / f"{k}.jpg").write_bytes(source.read(k))
        (folder / f"{k}.txt").write_text(f"caption {k}")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
    file = tmp_path / "mix.json"
    file.write_text(json.dumps([{"image": "captioned/0.jpg", "conversations": turns}]))
    overrides = [f"image_to_text.path={file}", f"text_to_image.path={folder}", "data.images=2"]
    overrides += [f"{task}.images=1" for task in ("image_to_text", "text_to_image")]
    overrides += [f"loss_weights.{task}=1" for task in ("image_to_text", "text_to_image")]
    return resolve("bagel-smoke", overrides).config


class Speaking:
    """BAGEL's processor, which notes the task it was made for and the texts that it was given."""

    made: list[tuple[str, list[Any]]]

    def __init__(self, variant: Any, folder: Any, *, task: str = "default") -> None:
        self.texts: list[Any] = []
        self.inner = BagelProcessor(variant, folder)
        Speaking.made.append((task, self.texts))

    def prepare(self, image: Image.Image, text: Any, random: RandomSource, sample_id: int) -> Any:
        self.texts.append(text)
        return self.inner.prepare(image, None, random, sample_id)

    def collate(self, examples: Any, sample_ids: Any) -> BagelBatch:
        return self.inner.collate(examples, sample_ids)


def test_each_stream_has_the_processor_of_its_task(tmp_path: Path) -> None:
    Speaking.made = []
    config = mixed(tmp_path)
    family = replace(FAMILY, processor=Speaking, tasks=config.tasks)
    loaded = Loaded(family, VARIANT, torch.nn.Identity(), None)
    texts = {task: open_texts(task, stream) for task, stream in text_streams(config).items()}
    with closing(
        build_streams(config, loaded, open_source("package:photos"), texts, lambda reject: None)
    ) as loader:
        step = next(loader)
    assert [task for task, _ in Speaking.made] == ["default", "image_to_text", "text_to_image"]
    assert Speaking.made[1][1] == [(("What?", "That."),)]
    assert set(Speaking.made[2][1]) <= {None, "caption 0", "caption 1"}
    assert [batch.num_images for batch in step.microbatches] == [2, 1, 1]
    assert list(step.cursor) == list(config.tasks)


def test_reconstruction_alone_is_not_wrapped(tmp_path: Path) -> None:
    config = resolve("bagel-smoke").config
    loaded = Loaded(FAMILY, VARIANT, torch.nn.Identity(), None)
    rejects: list[Reject] = []
    with closing(build_streams(config, loaded, open_source("package:photos"), {}, rejects.append)) as loader:
        assert set(next(loader).cursor) == {"next_index", "pending", "rejected", "seed", "fingerprint"}


def start(config: TrainConfig, folder: Path) -> Any:
    return assemble(
        config, folder, on_progress=lambda r: None, on_reject=lambda r: None, on_start=lambda: None
    )


def test_a_task_that_the_family_does_not_train_fails_before_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "load_model", lambda *a: pytest.fail("loaded"))
    with pytest.raises(
        ConfigError, match="bagel does not train image_to_text, only reconstruction; leave it"
    ):
        start(mixed(tmp_path), tmp_path / "run")
    check_tasks(resolve("bagel-smoke").config)


def test_missing_conversations_fail_before_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "load_model", lambda *a: pytest.fail("loaded"))
    monkeypatch.setattr(module, "check_tasks", lambda config: None)
    config = mixed(tmp_path)
    (tmp_path / "mix.json").unlink()
    with pytest.raises(DataError, match=r"cannot read .*mix\.json: No such file"):
        start(config, tmp_path / "run")


def test_the_fingerprint_of_a_run_names_every_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Speaking.made = []
    config = mixed(tmp_path)
    family = replace(FAMILY, processor=Speaking, tasks=config.tasks)
    monkeypatch.setattr(module, "get_variant", lambda name: (family, VARIANT))
    job = start(config, tmp_path / "run")
    job.loader.close()
    assert set(job.fingerprint) == {"data", "held_out", "weights", "image_to_text", "text_to_image"}
    for task, stream in text_streams(config).items():
        assert job.fingerprint[task] == open_texts(task, stream).fingerprint()


def test_an_instruction_is_not_a_conversation() -> None:
    with pytest.raises(TypeError, match="expected an instruction or None, got a conversation"):
        BagelProcessor(VARIANT).prepare(Image.new("RGB", (32, 32)), (("a", "b"),), RandomSource(0), 0)
