"""Groups a stream of samples of different lengths into packs. Nothing is lost, nothing comes twice."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PackLimits:
    """When a pack is full.

    Attributes:
        images: most samples of a pack.
        tokens: a pack is closed once it holds this many tokens; None closes by `images` alone.
        max_tokens: a pack never holds more.
        max_sample_tokens: longer samples are refused; at most `max_tokens`, so that each fits an empty pack.
        max_waiting: samples that may wait for a later pack; when so many do, the open pack is closed.
    """

    images: int
    tokens: int | None
    max_tokens: int
    max_sample_tokens: int
    max_waiting: int = 16

    def __post_init__(self) -> None:
        if min(self.images, self.max_tokens, self.max_sample_tokens, self.max_waiting) <= 0:
            raise ValueError(f"PackLimits: every limit must be positive, got {self}")
        if self.max_sample_tokens > self.max_tokens:
            raise ValueError(
                f"PackLimits: max_sample_tokens={self.max_sample_tokens} must not exceed {self.max_tokens=}"
            )


class Packer(Generic[T]):
    """Greedy packing in arrival order; samples that do not fit wait, and open the next pack.

    The first waiting sample always fits an empty pack, so none waits for ever. The packs are a pure function
    of the samples offered, and `waiting` is the only state between two packs.
    """

    def __init__(self, limits: PackLimits) -> None:
        self.limits = limits
        self.waiting: deque[tuple[T, int]] = deque()
        self._pack: list[T] = []
        self._tokens = 0

    def accepts(self, num_tokens: int) -> bool:
        """Whether a sample of this length can be packed at all."""
        return num_tokens <= self.limits.max_sample_tokens

    @property
    def is_full(self) -> bool:
        """Whether the open pack must be taken before anything else is offered."""
        return self._is_closed or len(self.waiting) >= self.limits.max_waiting

    def wait(self, sample: T, num_tokens: int) -> None:
        """Queue a sample that a restored stream had waiting."""
        self.waiting.append((sample, num_tokens))

    def open(self) -> None:
        """Begin a pack with the waiting samples that fit, in order."""
        queued, self.waiting = self.waiting, deque()
        for sample, num_tokens in queued:
            if self._is_closed:
                self.waiting.append((sample, num_tokens))
            else:
                self._place(sample, num_tokens)

    def offer(self, sample: T, num_tokens: int) -> None:
        """Put a sample into the open pack, or let it wait. Raises ValueError if full or not acceptable."""
        if not self.accepts(num_tokens) or self.is_full:
            raise ValueError(
                f"Packer.offer: the pack is full or {num_tokens} tokens are too many for a sample"
            )
        self._place(sample, num_tokens)

    def take(self) -> list[T]:
        """The samples of the open pack; the next one is begun by `open`."""
        pack, self._pack, self._tokens = self._pack, [], 0
        return pack

    @property
    def _is_closed(self) -> bool:
        enough = self.limits.tokens is not None and self._tokens >= self.limits.tokens
        return enough or len(self._pack) >= self.limits.images

    def _place(self, sample: T, num_tokens: int) -> None:
        if self._tokens + num_tokens <= self.limits.max_tokens:
            self._pack.append(sample)
            self._tokens += num_tokens
        else:
            self.waiting.append((sample, num_tokens))
