"""The stream of training steps: order, decode, prepare, pack, collate; resumable at every step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from reca.config import DataConfig, StreamConfig
from reca.data.order import SampleOrder
from reca.data.packing import Packer, PackLimits
from reca.data.prompts import Instructions, TextProvider, load_prompts
from reca.data.sources import Source, open_source
from reca.data.workers import OrderedWorkers
from reca.errors import CheckpointError, DataError
from reca.images import ImageRejected, load_image
from reca.randomness import RandomSource
from reca.types import Batch, Example, Processor, StepBatches

MAX_AHEAD = 64


@dataclass(frozen=True, slots=True)
class Reject:
    """One image that was left out: its name in the source, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One global sample index after preparation; `example` is None if the image was rejected for `reason`."""

    index: int
    name: str
    example: Example | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Prepare:
    """Global sample index -> Sample: the part of loading that runs in worker processes.

    A function of (seed, data, index) alone, so the number of workers cannot matter.

    Attributes:
        source: image files.
        processor: of the family, for the task of this stream.
        texts: the text of each sample.
        max_pixels: images with more pixels are rejected before they are decoded.
        order: index -> item of the source.
        first_id: sample id of index 0; streams of one run lie so far apart that they share no random draw.
    """

    source: Source
    processor: Processor
    texts: TextProvider
    max_pixels: int
    order: SampleOrder
    first_id: int = 0

    def __call__(self, index: int) -> Sample:
        """Read, decode and prepare one sample. Never raises for what is wrong with one item."""
        _, item = self.order.place(index)
        name, sample_id = self.source.name(item), self.first_id + index
        random = RandomSource(self.order.seed)
        try:
            image = load_image(self.source.read(item), max_pixels=self.max_pixels)
            text = self.texts(item, sample_id, random)
            return Sample(index, name, self.processor.prepare(image, text, random, sample_id))
        except ImageRejected as reject:
            return Sample(index, name, None, reject.reason)


class PackingLoader:
    """An endless, deterministic, resumable stream of steps; implements `reca.types.StepLoader`.

    Every global sample index goes once through (order, decode, prompt, prepare); steps are packed from them
    in order. The cursor holds the next index and the indices that wait for a later step: a run resumed from
    it, also a second time and with other workers, sees the samples that an uninterrupted one sees.

    Args:
        prepare: what workers do for one index.
        limits: when a pack is full.
        packs: packs of one step.
        micro_images: images of one microbatch; None makes each pack one.
        workers: processes; they start with the first step.
        timeout_s: longest wait for one sample, in seconds.
        on_reject: called once for every name that is rejected.
        advice: what to do if nothing can be used.
    """

    def __init__(
        self,
        prepare: Prepare,
        limits: PackLimits,
        *,
        packs: int = 1,
        micro_images: int | None = None,
        workers: int = 0,
        timeout_s: float = 300.0,
        on_reject: Callable[[Reject], None] | None = None,
        advice: str = "`reca data check PATH` explains every one",
    ) -> None:
        self._prepare = prepare
        self._packer: Packer[Sample] = Packer(limits)
        self._packs = packs
        self._micro_images = micro_images or limits.images
        self._workers = workers
        self._timeout_s = timeout_s
        self._on_reject = on_reject
        self._advice = advice
        self._fingerprint = prepare.source.fingerprint()
        self._next_index = 0
        self._pending: list[int] = []
        self._rejected = 0
        self._last_usable = -1
        self._reported: set[str] = set()
        self._samples: OrderedWorkers[Sample] | None = None
        self.on_wait: Callable[[], None] = lambda: None

    def __iter__(self) -> Iterator[StepBatches]:
        return self

    def __next__(self) -> StepBatches:
        """The next step. Raises DataError if a whole epoch holds no usable image or the workers fail."""
        samples, size = self._start(), self._micro_images
        parts: list[list[Sample]] = []
        for _ in range(self._packs):
            self._packer.open()
            while not self._packer.is_full:
                self._admit(next(samples))
            pack = self._packer.take()
            parts += [pack[i : i + size] for i in range(0, len(pack), size)]
        return StepBatches(tuple(self._collate(part) for part in parts), self._cursor(), self._rejected)

    def restore(self, cursor: Mapping[str, Any]) -> None:
        """Continue just after the step that yielded `cursor`.

        Raises: CheckpointError if the cursor is damaged, DataError if it is of other data or another seed.
        """
        if self._samples is not None:
            raise ValueError("PackingLoader.restore: must be called before the first step")
        try:
            next_index, rejected = int(cursor["next_index"]), int(cursor["rejected"])
            pending = [int(index) for index in cursor["pending"]]
            fingerprint, seed = str(cursor["fingerprint"]), int(cursor["seed"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the data cursor of the checkpoint is damaged: {cursor!r:.200}") from error
        if min(next_index, rejected, *pending, 0) < 0 or any(index >= next_index for index in pending):
            raise CheckpointError(f"the data cursor of the checkpoint is damaged: {cursor!r:.200}")
        if fingerprint != self._fingerprint:
            raise DataError(
                "the images are not those that the run began with (names or sizes changed); "
                "restore them, or start a new run"
            )
        if seed != self._prepare.order.seed:
            raise DataError(f"the run began with seed={seed}, not {self._prepare.order.seed}; use that seed")
        self._next_index, self._pending, self._rejected = next_index, pending, rejected
        self._last_usable = next_index - 1  # what came before is unknown: no alarm for the epoch that was cut

    def close(self) -> None:
        """End the workers; idempotent."""
        if self._samples is not None:
            self._samples.close()

    def _start(self) -> OrderedWorkers[Sample]:
        if self._samples is None:
            self._samples = OrderedWorkers(
                self._prepare,
                itertools.chain(self._pending, itertools.count(self._next_index)),
                workers=self._workers,
                ahead=min(max(2 * self._workers, self._packer.limits.images), MAX_AHEAD),
                timeout_s=self._timeout_s,
                on_wait=lambda: self.on_wait(),
            )
            for _ in self._pending:
                self._queue(next(self._samples))
        return self._samples

    def _queue(self, sample: Sample) -> None:
        """A sample that waited when the cursor was taken waits again."""
        reason = self._refusal(sample)
        if sample.example is None or reason:
            self._reject(sample, reason)
        else:
            self._packer.wait(sample, sample.example.num_tokens)

    def _admit(self, sample: Sample) -> None:
        """Offer the next sample of the stream to the packer, or reject it."""
        self._next_index = sample.index + 1
        reason = self._refusal(sample)
        if sample.example is None or reason:
            self._reject(sample, reason)
            self._check_epoch(sample)
        else:
            self._last_usable = sample.index
            self._packer.offer(sample, sample.example.num_tokens)

    def _refusal(self, sample: Sample) -> str:
        if sample.example is None:
            return sample.reason
        num_tokens = sample.example.num_tokens
        if self._packer.accepts(num_tokens):
            return ""
        return f"{num_tokens} tokens exceed max_sample_tokens={self._packer.limits.max_sample_tokens}"

    def _reject(self, sample: Sample, reason: str) -> None:
        self._rejected += 1
        if self._on_reject is not None and sample.name not in self._reported:
            self._reported.add(sample.name)
            self._on_reject(Reject(sample.name, reason))

    def _check_epoch(self, sample: Sample) -> None:
        """Stop when a whole pass over the data has yielded nothing."""
        length = self._prepare.order.length
        epoch_start = sample.index // length * length
        if sample.index == epoch_start + length - 1 and self._last_usable < epoch_start:
            raise DataError(
                f"none of the {length} images can be used; {sample.name}: {self._refusal(sample)}; "
                f"{self._advice}"
            )

    def _collate(self, samples: list[Sample]) -> Batch:
        examples = [sample.example for sample in samples]
        first_id = self._prepare.first_id
        return self._prepare.processor.collate(examples, [first_id + sample.index for sample in samples])

    def _cursor(self) -> dict[str, Any]:
        return {
            "next_index": self._next_index,
            "pending": [sample.index for sample, _ in self._packer.waiting],
            "rejected": self._rejected,
            "seed": self._prepare.order.seed,
            "fingerprint": self._fingerprint,
        }


def pack_limits(config: StreamConfig) -> PackLimits:
    """When a pack of this stream is full."""
    return PackLimits(
        images=config.images,
        tokens=config.tokens,
        max_tokens=config.max_tokens,
        max_sample_tokens=config.max_sample_tokens,
    )


def build_loader(
    config: DataConfig,
    processor: Processor,
    seed: int,
    *,
    source: Source | None = None,
    timeout_s: float = 300.0,
    on_reject: Callable[[Reject], None] | None = None,
) -> PackingLoader:
    """The stream of training steps that `config` describes.

    Args:
        config: where images come from and how they are grouped.
        processor: the family's; picklable, as it goes to the workers.
        seed: seed of the run; order, prompts and dropout follow from it.
        source: what to train on if not all of `config.path` (see `split_source`).
        timeout_s: longest wait for one sample, in seconds.
        on_reject: called once for every name that is rejected.

    Raises: ConfigError, DataError if there is nothing to train on.
    """
    source = open_source(config.path) if source is None else source
    prepare = Prepare(
        source=source,
        processor=processor,
        texts=Instructions(load_prompts(config.prompts), config.prompt_dropout),
        max_pixels=config.max_pixels,
        order=SampleOrder(seed, len(source)),
    )
    return PackingLoader(
        prepare,
        pack_limits(config),
        packs=config.packs,
        micro_images=config.micro_images,
        workers=config.workers,
        timeout_s=timeout_s,
        on_reject=on_reject,
    )
