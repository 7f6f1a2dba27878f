"""The stream of steps: the same for any number of workers and resumptions, whatever some images are like."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from reca.config import DataConfig
from reca.data.loader import PackingLoader, Reject, build_loader
from reca.data.prompts import choose_prompt
from reca.data.sources import open_source, split_source
from reca.errors import CheckpointError, ConfigError, DataError
from reca.randomness import RandomSource
from reca.types import StepBatches

MakeJpeg = Callable[..., bytes]
MakeProcessor = Callable[..., Any]


def config(path: Path | None, **changes: Any) -> DataConfig:
    base: dict[str, Any] = {"path": None if path is None else str(path), "images": 4, "workers": 0}
    return DataConfig(**{**base, "tokens": 40, "max_tokens": 50, "max_sample_tokens": 24} | changes)


def record(step: StepBatches) -> list[tuple[list[int], list[tuple[str, str | None, list[int]]]]]:
    """All that a step holds, in a form that compares."""
    return [
        (
            batch.sample_ids.tolist(),
            [(example.digest, example.prompt, example.pixels.tolist()) for example in batch.examples],
        )
        for batch in step.microbatches
    ]


def steps_of(loader: PackingLoader, count: int) -> tuple[list[Any], dict[str, Any]]:
    """(records of the next steps, cursor after them, through JSON as a checkpoint stores it)."""
    with closing(loader):
        steps = [next(loader) for _ in range(count)]
    return [record(step) for step in steps], json.loads(json.dumps(steps[-1].cursor))


# The stream


def test_a_step_is_cut_into_microbatches_in_order(photos: Path, processor: MakeProcessor) -> None:
    whole, _ = steps_of(build_loader(config(photos), processor(), 0), 5)
    cut, _ = steps_of(build_loader(config(photos, micro_images=3), processor(), 0), 5)
    for one, parts in zip(whole, cut, strict=True):
        assert all(len(ids) == 3 for ids, _ in parts[:-1]) and 1 <= len(parts[-1][0]) <= 3
        assert one == [([k for ids, _ in parts for k in ids], [e for _, examples in parts for e in examples])]


def test_a_step_of_several_packs_holds_what_so_many_steps_of_one_pack_hold(
    photos: Path, processor: MakeProcessor
) -> None:
    single, after = steps_of(build_loader(config(photos), processor(), 0), 6)
    three, cursor = steps_of(build_loader(config(photos, packs=3), processor(), 0), 2)
    joined = [[batch for step in steps for batch in step] for steps in (single[:3], single[3:])]
    assert joined == three  # each pack is a microbatch of its own
    assert cursor == after


def test_every_sample_comes_once_per_pass_and_no_limit_is_broken(
    photos: Path, processor: MakeProcessor
) -> None:
    with closing(build_loader(config(photos), processor(), 0)) as loader:
        steps = [next(loader) for _ in range(30)]
    ids = [k for step in steps for batch in step.microbatches for k in batch.sample_ids.tolist()]
    waiting = steps[-1].cursor["pending"]
    assert sorted([*ids, *waiting]) == list(range(steps[-1].cursor["next_index"]))
    assert any(step.cursor["pending"] for step in steps)
    for step in steps:
        assert sum(batch.num_images for batch in step.microbatches) <= 4
        assert sum(batch.num_tokens for batch in step.microbatches) <= 50
    batches = [batch for step in steps for batch in step.microbatches]
    digests = {k: e.digest for b in batches for k, e in zip(b.sample_ids.tolist(), b.examples, strict=True)}
    first_pass = Counter(digests[k] for k in range(11))
    assert len(first_pass) == 11 and set(first_pass.values()) == {1}


def test_the_stream_follows_the_seed_alone(photos: Path, processor: MakeProcessor) -> None:
    streams = [steps_of(build_loader(config(photos), processor(), seed), 4)[0] for seed in (3, 3, 4)]
    assert streams[0] == streams[1] != streams[2]


def test_samples_do_not_depend_on_workers_or_on_resuming_twice(
    photos: Path, processor: MakeProcessor
) -> None:
    expected, _ = steps_of(build_loader(config(photos), processor(), 5), 15)
    got: list[Any] = []
    cursor: dict[str, Any] | None = None
    for workers in (0, 2, 1):
        loader = build_loader(config(photos, workers=workers), processor(), 5)
        if cursor is not None:
            loader.restore(cursor)
        records, cursor = steps_of(loader, 5)
        got += records
    assert got == expected


def test_every_step_can_be_resumed_from(photos: Path, processor: MakeProcessor) -> None:
    (photos / "bad.jpg").write_bytes(b"no image")
    with closing(build_loader(config(photos), processor(), 1)) as loader:
        steps = [next(loader) for _ in range(12)]
    assert any(step.cursor["pending"] for step in steps[:-1]) and steps[-1].rejected > 1
    for before, after in pairwise(steps):
        with closing(build_loader(config(photos), processor(), 1)) as loader:
            loader.restore(before.cursor)
            again = next(loader)
        assert record(again) == record(after)
        assert (again.cursor, again.rejected) == (after.cursor, after.rejected)


def test_a_loader_leaves_the_global_random_numbers_alone(photos: Path, processor: MakeProcessor) -> None:
    before = torch.get_rng_state()
    steps_of(build_loader(config(photos, workers=1), processor(), 0), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_one_image_is_enough(tmp_path: Path, processor: MakeProcessor, make_jpeg: MakeJpeg) -> None:
    (tmp_path / "1.jpg").write_bytes(make_jpeg(0))
    records, _ = steps_of(build_loader(config(tmp_path, workers=2), processor(), 0), 3)
    assert [ids for step in records for ids, _ in step] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_a_part_of_the_source_can_be_trained_on(photos: Path, processor: MakeProcessor) -> None:
    train, _ = split_source(open_source(photos), [f"{k:02}.jpg" for k in range(2, 11)])
    records, _ = steps_of(build_loader(config(photos), processor(), 0, source=train), 4)
    assert len({digest for step in records for _, examples in step for digest, _, _ in examples}) == 2


# Prompts


def test_prompts_and_dropout_are_drawn_by_sample(
    tmp_path: Path, photos: Path, processor: MakeProcessor
) -> None:
    (tmp_path / "prompts.txt").write_text("one\n\n two \nthree\n")
    settings = config(photos, prompts=tmp_path / "prompts.txt", prompt_dropout=0.3)
    records, _ = steps_of(build_loader(settings, processor(), 9), 60)
    pairs = [pair for step in records for ids, examples in step for pair in zip(ids, examples, strict=True)]
    drawn = {sample_id: prompt for sample_id, (_, prompt, _) in pairs}
    random = RandomSource(9)
    assert all(text == choose_prompt(("one", "two", "three"), 0.3, random, k) for k, text in drawn.items())
    share = sum(text is None for text in drawn.values()) / len(drawn)
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / len(drawn)) ** 0.5
    assert set(drawn.values()) == {None, "one", "two", "three"}


def test_dropout_never_changes_who_gets_which_prompt() -> None:
    prompts, random = tuple("abcdefg"), RandomSource(2)
    kept = [choose_prompt(prompts, 0.0, random, k) for k in range(200)]
    half = [choose_prompt(prompts, 0.5, random, k) for k in range(200)]
    assert None not in kept and 60 < half.count(None) < 140
    assert all(b in (None, a) for a, b in zip(kept, half, strict=True))
    assert {choose_prompt(prompts, 1.0, random, k) for k in range(50)} == {None}


# Bad images


def test_bad_images_are_skipped_counted_and_reported_once(
    photos: Path, processor: MakeProcessor, make_jpeg: MakeJpeg
) -> None:
    (photos / "cut.jpg").write_bytes(make_jpeg(1)[:300])
    (photos / "page.jpg").write_bytes(b"<html>")
    (photos / "wide.jpg").write_bytes(make_jpeg(1, width=200, height=16))
    reports: list[Reject] = []
    settings = config(photos, max_pixels=96 * 16)
    with closing(
        build_loader(settings, processor(forbidden_width=56), 0, on_reject=reports.append)
    ) as loader:
        steps = [next(loader) for _ in range(20)]
    reasons = {reject.name: reject.reason for reject in reports}
    assert len(reports) == len(reasons) == 4
    assert reasons["05.jpg"] == "width 56 is forbidden"
    assert reasons["wide.jpg"] == "200x16 pixels exceed max_pixels=1536" and "<html>" in reasons["page.jpg"]
    used = [k for step in steps for batch in step.microbatches for k in batch.sample_ids.tolist()]
    consumed = steps[-1].cursor["next_index"] - len(steps[-1].cursor["pending"])
    assert steps[-1].rejected == consumed - len(used) > 8


def test_a_sample_that_is_too_long_is_rejected_by_name(photos: Path, processor: MakeProcessor) -> None:
    reports: list[Reject] = []
    loader = build_loader(config(photos, max_sample_tokens=23), processor(), 0, on_reject=reports.append)
    steps_of(loader, 8)
    assert reports == [Reject("10.jpg", "24 tokens exceed max_sample_tokens=23")]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_set_without_a_usable_image_stops_the_run(
    tmp_path: Path, processor: MakeProcessor, workers: int
) -> None:
    for k in range(7):
        (tmp_path / f"{k}.jpg").write_bytes(b"no image")
    loader = build_loader(config(tmp_path, workers=workers), processor(), 0)
    with closing(loader), pytest.raises(DataError, match=r"none of the 7 images .*not a JPEG.*data check"):
        next(loader)


def test_images_that_turn_bad_later_stop_the_run_within_two_passes(
    photos: Path, processor: MakeProcessor
) -> None:
    with closing(build_loader(config(photos), processor(), 0)) as loader:
        next(loader)
        for path in photos.iterdir():
            path.write_bytes(b"")
        with pytest.raises(
            DataError, match=r"none of the 11 images can be used; \d\d\.jpg: the file is empty"
        ):
            for _ in range(9):
                next(loader)


def test_data_that_cannot_be_trained_on_fails_before_the_first_step(
    tmp_path: Path, photos: Path, processor: MakeProcessor
) -> None:
    with pytest.raises(ConfigError, match="no training images"):
        build_loader(config(None), processor(), 0)
    for path in photos.iterdir():
        path.unlink()
    with pytest.raises(DataError, match="holds no images"):
        build_loader(config(photos), processor(), 0)
    with pytest.raises(DataError, match="gone does not exist"):
        build_loader(config(tmp_path / "gone"), processor(), 0)


# Cursors


def test_a_damaged_cursor_is_refused(photos: Path, processor: MakeProcessor) -> None:
    _, good = steps_of(build_loader(config(photos), processor(), 0), 3)
    broken: list[Any] = [{}, good | {"next_index": "x"}, good | {"pending": 3}, good | {"next_index": -1}]
    broken += [good | {"pending": [good["next_index"]]}, {k: v for k, v in good.items() if k != "rejected"}]
    for cursor in broken:
        with pytest.raises(CheckpointError, match="the data cursor of the checkpoint is damaged"):
            build_loader(config(photos), processor(), 0).restore(cursor)


def test_a_cursor_of_other_data_or_another_seed_is_refused(photos: Path, processor: MakeProcessor) -> None:
    _, cursor = steps_of(build_loader(config(photos), processor(), 0), 3)
    with pytest.raises(DataError, match="the run began with seed=0, not 1"):
        build_loader(config(photos), processor(), 1).restore(cursor)
    (photos / "03.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="the images are not those that the run began with"):
        build_loader(config(photos), processor(), 0).restore(cursor)


def test_restore_comes_before_the_first_step(photos: Path, processor: MakeProcessor) -> None:
    with closing(build_loader(config(photos), processor(), 0)) as loader:
        cursor = next(loader).cursor
        with pytest.raises(ValueError, match="before the first step"):
            loader.restore(cursor)


def test_samples_that_waited_are_refused_if_the_limits_have_shrunk(
    photos: Path, processor: MakeProcessor
) -> None:
    with closing(build_loader(config(photos), processor(), 0)) as loader:
        step = next(step for step in loader if step.cursor["pending"])
    reports: list[Reject] = []
    loader = build_loader(config(photos, max_sample_tokens=4), processor(), 0, on_reject=reports.append)
    loader.restore(step.cursor)
    with closing(loader):
        assert all(e.num_tokens <= 4 for batch in next(loader).microbatches for e in batch.examples)
    assert reports and all("exceed max_sample_tokens=4" in reject.reason for reject in reports)
