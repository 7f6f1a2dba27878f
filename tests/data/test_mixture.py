"""Steps of several tasks: streams that never touch each other, and what the engine makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from reca.config import TASKS, CaptionConfig, ConversationConfig, DataConfig, TrainConfig
from reca.data import build_loader
from reca.data.loader import Reject
from reca.data.mixture import MixtureLoader, build_text_loader, first_sample_id, open_texts
from reca.engine.step import accumulate_gradients
from reca.errors import CheckpointError, ConfigError, DataError
from reca.images import ImageRejected
from reca.randomness import RandomSource
from reca.types import Batch, Draws, StepBatches, StepLoader, Text

MakeJpeg = Callable[..., bytes]
SEED = 3


@dataclass(frozen=True, slots=True)
class TaskExample:
    text: Text
    pixels: Tensor  # [4] fp32
    num_tokens: int
    number: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskBatch(Batch):
    task: str
    texts: tuple[Text, ...]
    pixels: Tensor  # [num_images, 4] fp32
    words: Tensor  # [num_images] fp32: answer or caption words, what the loss of a text counts
    numbers: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class TaskProcessor:
    """Keeps the text, four pixels, and one random number by sample id."""

    task: str

    def prepare(self, image: Image.Image, text: Text, random: RandomSource, sample_id: int) -> TaskExample:
        if text == "forbidden":
            raise ImageRejected("forbidden text")
        pixels = torch.frombuffer(bytearray(image.tobytes()[:4]), dtype=torch.uint8).float() / 255
        return TaskExample(text, pixels, 4 + len(str(text).split()), random.scalar("number", sample_id))

    def collate(self, examples: Sequence[TaskExample], sample_ids: Sequence[int]) -> TaskBatch:
        return TaskBatch(
            sample_ids=torch.tensor(sample_ids),
            num_images=len(examples),
            num_tokens=sum(example.num_tokens for example in examples),
            task=self.task,
            texts=tuple(example.text for example in examples),
            pixels=torch.stack([example.pixels for example in examples]),
            words=torch.tensor([float(len(str(example.text).split())) for example in examples]),
            numbers=tuple(example.number for example in examples),
        )


@pytest.fixture
def conversations(tmp_path: Path, photos: Path) -> Path:
    """Seven conversations of different lengths about the photos; one names a picture that is not there."""
    entries = [
        {
            "image": f"{k:02}.jpg" if k else "gone.jpg",
            "conversations": [
                {"from": "human", "value": f"<image>\nQ{k}"},
                {"from": "gpt", "value": "word " * k},
            ],
        }
        for k in range(7)
    ]
    path = tmp_path / "mix.json"
    path.write_text(json.dumps(entries))
    return path


@pytest.fixture
def captioned(tmp_path: Path, make_jpeg: MakeJpeg) -> Path:
    folder = tmp_path / "captioned"
    folder.mkdir()
    for k in range(5):
        (folder / f"{k}.jpg").write_bytes(make_jpeg(100 + k))
        (folder / f"{k}.txt").write_text(f"caption {k}")
    return folder


@pytest.fixture
def build(photos: Path, conversations: Path, captioned: Path) -> Callable[..., MixtureLoader]:
    """All three tasks; options change one of them or the number of workers."""

    def build(
        *, workers: int = 0, micro: int | None = None, words: ConversationConfig | None = None, **options: Any
    ) -> MixtureLoader:
        data = DataConfig(path=str(photos), images=3, micro_images=micro, workers=workers)
        words = words or ConversationConfig(
            path=str(conversations),
            root=photos,
            images=4,
            micro_images=micro,
            tokens=30,
            max_tokens=36,
            max_sample_tokens=30,
        )
        captions = CaptionConfig(path=str(captioned), images=2, micro_images=micro, dropout=0.3)
        streams: dict[str, StepLoader] = {
            "reconstruction": build_loader(data, TaskProcessor("reconstruction"), SEED),
            "image_to_text": build_text_loader(
                "image_to_text", words, data, TaskProcessor("image_to_text"), SEED, **options
            ),
            "text_to_image": build_text_loader(
                "text_to_image", captions, data, TaskProcessor("text_to_image"), SEED, **options
            ),
        }
        return MixtureLoader(streams)

    return build


Build = Callable[..., MixtureLoader]


def record(step: StepBatches) -> list[Any]:
    """All that a step holds, in a form that compares."""
    return [
        (batch.task, batch.sample_ids.tolist(), batch.texts, batch.pixels.tolist(), batch.numbers)
        for batch in step.microbatches
    ]


def take(loader: MixtureLoader, count: int) -> list[StepBatches]:
    with closing(loader):
        return [next(loader) for _ in range(count)]


def of_task(steps: Sequence[StepBatches], task: str) -> list[Any]:
    return [row for step in steps for row in record(step) if row[0] == task]


# The stream


def test_a_step_is_the_microbatches_of_every_stream_in_order(build: Build) -> None:
    steps = take(build(micro=2), 6)
    for step in steps:
        tasks = [batch.task for batch in step.microbatches]
        assert tasks == sorted(tasks, key=TASKS.index) and set(tasks) == set(TASKS)
        assert tasks.count("reconstruction") == 2 and tasks.count("text_to_image") == 1
        assert sum(b.num_tokens for b in step.microbatches if b.task == "image_to_text") <= 36
    assert list(steps[0].cursor) == list(TASKS)
    assert steps[-1].rejected == sum(part["rejected"] for part in steps[-1].cursor.values()) > 0


def test_each_task_gets_its_own_kind_of_text(build: Build) -> None:
    steps = take(build(), 12)
    for _, _, texts, _, _ in of_task(steps, "image_to_text"):
        assert all(text == ((f"Q{text[0][0][1]}", "word " * int(text[0][0][1])),) for text in texts)
    captions = [text for row in of_task(steps, "text_to_image") for text in row[2]]
    assert set(captions) == {None, *(f"caption {k}" for k in range(5))}
    ids = [k for row in of_task(steps, "text_to_image") for k in row[1]]
    dropped = [RandomSource(SEED).scalar("text_dropout", k) < 0.3 for k in ids]
    assert [text is None for text in captions] == dropped
    assert all(isinstance(text, str | None) for row in of_task(steps, "reconstruction") for text in row[2])


def test_a_stream_yields_in_a_mixture_what_it_yields_alone(build: Build, photos: Path) -> None:
    mixed = of_task(take(build(), 8), "reconstruction")
    alone = build_loader(
        DataConfig(path=str(photos), images=3, workers=0), TaskProcessor("reconstruction"), SEED
    )
    with closing(alone):
        assert [row for _ in range(8) for row in record(next(alone))] == mixed


def test_changing_one_stream_shifts_no_other(build: Build, conversations: Path, photos: Path) -> None:
    before = take(build(), 8)
    fewer = ConversationConfig(path=str(conversations), root=photos, images=1)
    after = take(build(words=fewer), 8)
    for task in ("reconstruction", "text_to_image"):
        assert of_task(before, task) == of_task(after, task)
    assert of_task(before, "image_to_text") != of_task(after, "image_to_text")


def test_streams_share_neither_sample_ids_nor_random_draws(build: Build) -> None:
    steps = take(build(), 10)
    rows = [row for step in steps for row in record(step)]
    ids = [k for row in rows for k in row[1]]
    numbers = [number for row in rows for number in row[4]]
    assert len(set(ids)) == len(ids) and len(set(numbers)) == len(numbers)
    for task in TASKS:
        first = first_sample_id(task)
        assert all(0 <= k - first < 2**48 for row in of_task(steps, task) for k in row[1])
    assert first_sample_id("reconstruction") == 0 and first_sample_id(TASKS[-1]) + 2**48 < 2**63


def test_streams_of_equal_data_are_shuffled_independently(captioned: Path) -> None:
    orders = []
    for task in TASKS[1:]:
        stream = CaptionConfig(path=str(captioned), images=5, dropout=0)
        loader = build_text_loader(task, stream, DataConfig(workers=0), TaskProcessor(task), SEED)
        with closing(loader):
            orders.append(
                [text for _ in range(4) for batch in next(loader).microbatches for text in batch.texts]
            )
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]


# Cursors


def test_samples_do_not_depend_on_workers_or_on_resuming_twice(build: Build) -> None:
    expected = [record(step) for step in take(build(micro=2), 9)]
    got: list[Any] = []
    cursor: Mapping[str, Any] | None = None
    for workers in (0, 1, 0):
        loader = build(workers=workers, micro=2)
        if cursor is not None:
            loader.restore(cursor)
        steps = take(loader, 3)
        cursor = json.loads(json.dumps(steps[-1].cursor))
        got += [record(step) for step in steps]
    assert got == expected


def test_a_cursor_of_other_streams_or_a_damaged_one_is_refused(build: Build) -> None:
    cursor = dict(take(build(), 1)[0].cursor)
    with pytest.raises(CheckpointError, match="damaged: image_to_text has no position"):
        build().restore(cursor | {"image_to_text": 3})
    with pytest.raises(CheckpointError, match="the data cursor of the checkpoint is damaged"):
        build().restore(cursor | {"text_to_image": {}})
    with pytest.raises(DataError, match="the images are not those"):
        build().restore(cursor | {"text_to_image": cursor["image_to_text"]})
    del cursor["image_to_text"]
    with pytest.raises(
        DataError, match="began with the streams reconstruction, text_to_image, not image_to_text, recon"
    ):
        build().restore(cursor)


class Failing:
    """A stream that counts how often it is closed, and may fail then."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.closed = error, 0

    def __next__(self) -> StepBatches:
        raise DataError("nothing left")

    def restore(self, cursor: Mapping[str, Any]) -> None:
        raise DataError("not mine")

    def close(self) -> None:
        self.closed += 1
        if self.error is not None:
            raise self.error


def test_all_streams_are_closed_even_if_one_fails_to() -> None:
    streams = {"a": Failing(), "b": Failing(OSError("stuck")), "c": Failing()}
    loader = MixtureLoader(streams)
    with pytest.raises(DataError, match="nothing left"):
        next(loader)
    with pytest.raises(OSError, match="stuck"):
        loader.close()
    assert [stream.closed for stream in streams.values()] == [1, 1, 1]
    with pytest.raises(ValueError, match="at least one stream"):
        MixtureLoader({})


# Bad items


def test_rejects_carry_the_name_of_their_stream(build: Build, captioned: Path) -> None:
    (captioned / "2.txt").write_text("forbidden")
    reports: list[Reject] = []
    take(build(on_reject=reports.append), 8)
    assert {reject.name: reject.reason for reject in reports} == {
        "image_to_text/mix.json:1": "image gone.jpg cannot be read: No such file or directory",
        "text_to_image/2.jpg": "forbidden text",
    }


def test_a_stream_without_a_usable_item_stops_the_run_with_advice(captioned: Path) -> None:
    for path in captioned.glob("*.txt"):
        path.write_text("")
    stream = CaptionConfig(path=str(captioned))
    loader = build_text_loader("text_to_image", stream, DataConfig(workers=0), TaskProcessor("x"), SEED)
    with pytest.raises(
        DataError, match=r"none of the 5 images .* is empty; rejected\.jsonl .* text_to_image\.path"
    ):
        next(loader)


def test_a_stream_without_a_path_names_what_it_needs() -> None:
    with pytest.raises(ConfigError, match=r"set image_to_text\.path to a LLaVA JSON or JSONL file, or leave"):
        open_texts("image_to_text", ConversationConfig())
    with pytest.raises(ConfigError, match=r"set text_to_image\.path to a folder of captioned images"):
        open_texts("text_to_image", CaptionConfig())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"image_to_text": ConversationConfig()},
            "image_to_text is trained, so it needs a weight: set loss_weights.image_to_text=1, or leave",
        ),
        (
            {"text_to_image": CaptionConfig(), "loss_weights": {"reconstruction": 1, "text_to_image": 0}},
            "text_to_image is trained, so it needs a weight",
        ),
        (
            {"loss_weights": {"reconstruction": 1, "image_to_text": 0.5}},
            "loss_weights.image_to_text would be ignored: nothing trains it; set image_to_text.path, or drop",
        ),
        (
            {"image_to_text": ConversationConfig(), "loss_weights": {"image_to_text": 1}},
            r"reconstruction is trained, so it needs a weight: set loss_weights.reconstruction=1 ",
        ),
    ],
)
def test_streams_and_weights_must_agree(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(recipe="toy", model="toy/s", **changes)


# Through the engine


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskDraws(Draws):
    noise: Tensor


class TaskModel(nn.Module):
    """Dispatches on the task of the batch; both losses share the first layer."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.shared, self.image, self.words = nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(5, 1)

    def draw(self, batch: TaskBatch, random: RandomSource) -> TaskDraws:
        noise = random.normal("noise", batch.sample_ids, 4)
        count = torch.tensor(4.0 * batch.num_images) if batch.task != "image_to_text" else batch.words.sum()
        return TaskDraws(counts={batch.task: count}, noise=noise)

    def forward(self, batch: TaskBatch, draws: TaskDraws) -> dict[str, Tensor]:
        hidden = torch.tanh(self.shared(batch.pixels + draws.noise))
        if batch.task == "image_to_text":
            return {"image_to_text": (self.words(hidden)[:, 0].square() * batch.words).sum()}
        return {batch.task: (self.image(hidden) - batch.pixels).square().sum()}

    def blocks(self) -> Sequence[nn.Module]:
        return [self.shared]

    def flops(self, batch: TaskBatch) -> int:
        return batch.num_images


@pytest.mark.parametrize("micro", [None, 1, 2])
def test_a_mixed_step_has_the_gradients_of_its_normalised_losses_summed(
    build: Build, micro: int | None
) -> None:
    weights = {"reconstruction": 1.0, "image_to_text": 0.25, "text_to_image": 2.0}
    step = take(build(micro=micro), 2)[1]
    model, random = TaskModel(), RandomSource(SEED, 2)
    draws = [model.draw(batch, random) for batch in step.microbatches]
    loss = accumulate_gradients(model, step.microbatches, draws, weights)
    expected = TaskModel()
    total = torch.zeros(())
    for task, weight in weights.items():
        pairs = [(b, expected.draw(b, random)) for b in step.microbatches if b.task == task]
        mean = sum(expected(*pair)[task] for pair in pairs) / sum(draw.counts[task] for _, draw in pairs)
        torch.testing.assert_close(loss.terms[task], mean)
        total = total + weight * mean
    total.backward()
    torch.testing.assert_close(loss.total, total)
    for got, want in zip(model.parameters(), expected.parameters(), strict=True):
        assert want.grad is not None and want.grad.abs().max() > 1e-3
        torch.testing.assert_close(got.grad, want.grad)
