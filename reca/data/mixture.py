"""Steps of several tasks: every stream yields its microbatches, and none knows of the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from reca.config import TASKS, CaptionConfig, ConversationConfig, DataConfig, TrainConfig
from reca.data.captions import CaptionFolder
from reca.data.llava import Conversations
from reca.data.loader import PackingLoader, Prepare, Reject, pack_limits
from reca.data.order import SampleOrder
from reca.data.prompts import OwnTexts
from reca.data.sources import TextSource
from reca.errors import CheckpointError, ConfigError, DataError
from reca.types import Processor, StepBatches, StepLoader

ID_BITS = 48


class MixtureLoader:
    """Each step is the microbatches of one step of every stream, in the order of `streams`.

    The cursor maps the name of each stream to that stream's own, so that a stream sees the samples it would
    see alone. Implements `reca.types.StepLoader`.
    """

    def __init__(self, streams: Mapping[str, StepLoader]) -> None:
        if not streams:
            raise ValueError("MixtureLoader: expected at least one stream")
        self._streams = dict(streams)

    @property
    def on_wait(self) -> Callable[[], None]:
        """What every stream calls while it waits."""
        return next(iter(self._streams.values())).on_wait

    @on_wait.setter
    def on_wait(self, call: Callable[[], None]) -> None:
        for stream in self._streams.values():
            stream.on_wait = call

    def __iter__(self) -> MixtureLoader:
        return self

    def __next__(self) -> StepBatches:
        """The next step of every stream, as one. Raises what a stream raises."""
        steps = {name: next(stream) for name, stream in self._streams.items()}
        return StepBatches(
            tuple(batch for step in steps.values() for batch in step.microbatches),
            {name: step.cursor for name, step in steps.items()},
            sum(step.rejected for step in steps.values()),
        )

    def restore(self, cursor: Mapping[str, Any]) -> None:
        """Continue every stream just after the step that yielded `cursor`.

        Raises: CheckpointError if the cursor is damaged, DataError if it is of other streams or other data.
        """
        if cursor.keys() != self._streams.keys():
            raise DataError(
                f"the run began with the streams {', '.join(sorted(cursor)) or 'of nothing'}, not "
                f"{', '.join(sorted(self._streams))}; train the same tasks, or start a new run"
            )
        damaged = [name for name, part in cursor.items() if not isinstance(part, Mapping)]
        if damaged:
            raise CheckpointError(
                f"the data cursor of the checkpoint is damaged: {damaged[0]} has no position"
            )
        for name, stream in self._streams.items():
            stream.restore(cursor[name])

    def close(self) -> None:
        """Close every stream, even if closing one fails; idempotent."""
        with ExitStack() as stack:
            for stream in self._streams.values():
                stack.callback(stream.close)


def text_streams(config: TrainConfig) -> dict[str, ConversationConfig | CaptionConfig]:
    """Task -> its stream, for the tasks of a configuration beside reconstruction."""
    streams = {"image_to_text": config.image_to_text, "text_to_image": config.text_to_image}
    return {task: stream for task, stream in streams.items() if stream is not None}


def first_sample_id(task: str) -> int:
    """Sample id at which a task's stream begins: no two streams ever share one, and so no random draw."""
    return TASKS.index(task) << ID_BITS


def open_texts(task: str, stream: ConversationConfig | CaptionConfig) -> TextSource:
    """The images of a stream and what is said about them.

    Raises: ConfigError without a path; DataError if there is nothing usable there.
    """
    if stream.path is None:
        kind = (
            "a folder of captioned images"
            if isinstance(stream, CaptionConfig)
            else "a LLaVA JSON or JSONL file"
        )
        raise ConfigError(f"no data for {task}: set {task}.path to {kind}, or leave it out with {task}=null")
    if isinstance(stream, CaptionConfig):
        return CaptionFolder(Path(stream.path))
    return Conversations(Path(stream.path), stream.root)


def build_text_loader(
    task: str,
    stream: ConversationConfig | CaptionConfig,
    data: DataConfig,
    processor: Processor,
    seed: int,
    *,
    source: TextSource | None = None,
    on_reject: Callable[[Reject], None] | None = None,
) -> PackingLoader:
    """The stream of one task's steps, for a `MixtureLoader`; names of rejects begin with the task's.

    Args:
        task: image_to_text or text_to_image.
        stream: what it reads and how that is grouped into steps.
        data: gives the number of workers and the largest image.
        processor: the family's for this task.
        seed: of the run; the stream's order and draws are independent of those of other tasks.
        source: what to train on, if it is open already.
        on_reject: called once for every name that is rejected.

    Raises: ConfigError, DataError if there is nothing to train on.
    """
    source = open_texts(task, stream) if source is None else source
    prepare = Prepare(
        source=source,
        processor=processor,
        texts=OwnTexts(source, stream.dropout if isinstance(stream, CaptionConfig) else 0.0),
        max_pixels=data.max_pixels,
        order=SampleOrder(seed, len(source), purpose=f"order/{task}"),
        first_id=first_sample_id(task),
    )

    def report(reject: Reject) -> None:
        if on_reject is not None:
            on_reject(Reject(f"{task}/{reject.name}", reject.reason))

    return PackingLoader(
        prepare,
        pack_limits(stream),
        packs=stream.packs,
        micro_images=stream.micro_images,
        workers=data.workers,
        on_reject=report,
        advice=f"rejected.jsonl in the run folder explains every one; check {task}.path",
    )
