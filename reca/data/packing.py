"""Groups a stream of samples of different lengths into steps. Nothing is lost, nothing comes twice."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StepLimits:
    """When a step is full.

    Attributes:
        images: most samples of a step.
        tokens: a step is closed once it holds this many tokens; None closes by `images` alone.
        max_tokens: a step never holds more.
        max_sample_tokens: longer samples are refused; at most `max_tokens`, so that each fits an empty step.
        max_waiting: samples that may wait for a later step; when so many do, the open step is closed.
    """

    images: int
    tokens: int | None
    max_tokens: int
    max_sample_tokens: int
    max_waiting: int = 16

    def __post_init__(self) -> None:
        if min(self.images, self.max_tokens, self.max_sample_tokens, self.max_waiting) <= 0:
            raise ValueError(f"StepLimits: every limit must be positive, got {self}")
        if self.max_sample_tokens > self.max_tokens:
            raise ValueError(
                f"StepLimits: max_sample_tokens={self.max_sample_tokens} must not exceed {self.max_tokens=}"
            )


class StepPacker(Generic[T]):
    """Greedy packing in arrival order; samples that do not fit wait, and open the next step.

    The first waiting sample always fits an empty step, so none waits for ever. The steps are a pure function
    of the samples offered, and `waiting` is the only state between two steps.
    """

    def __init__(self, limits: StepLimits) -> None:
        self.limits = limits
        self.waiting: deque[tuple[T, int]] = deque()
        self._step: list[T] = []
        self._tokens = 0

    def accepts(self, num_tokens: int) -> bool:
        """Whether a sample of this length can be packed at all."""
        return num_tokens <= self.limits.max_sample_tokens

    @property
    def is_full(self) -> bool:
        """Whether the open step must be taken before anything else is offered."""
        return self._is_closed or len(self.waiting) >= self.limits.max_waiting

    def wait(self, sample: T, num_tokens: int) -> None:
        """Queue a sample that a restored stream had waiting."""
        self.waiting.append((sample, num_tokens))

    def open(self) -> None:
        """Begin a step with the waiting samples that fit, in order."""
        queued, self.waiting = self.waiting, deque()
        for sample, num_tokens in queued:
            if self._is_closed:
                self.waiting.append((sample, num_tokens))
            else:
                self._place(sample, num_tokens)

    def offer(self, sample: T, num_tokens: int) -> None:
        """Put a sample into the open step, or let it wait. Raises ValueError if full or not acceptable."""
        if not self.accepts(num_tokens) or self.is_full:
            raise ValueError(
                f"StepPacker.offer: the step is full or {num_tokens} tokens are too many for a sample"
            )
        self._place(sample, num_tokens)

    def take(self) -> list[T]:
        """The samples of the open step; the next one is begun by `open`."""
        step, self._step, self._tokens = self._step, [], 0
        return step

    @property
    def _is_closed(self) -> bool:
        enough = self.limits.tokens is not None and self._tokens >= self.limits.tokens
        return enough or len(self._step) >= self.limits.images

    def _place(self, sample: T, num_tokens: int) -> None:
        if self._tokens + num_tokens <= self.limits.max_tokens:
            self._step.append(sample)
            self._tokens += num_tokens
        else:
            self.waiting.append((sample, num_tokens))
