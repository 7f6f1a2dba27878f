"""Requests to stop: a signal asks, the loop answers at a safe point, nothing is lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from reca.errors import Interrupted

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopNow(BaseException):
    """Unwinds work that may be thrown away. Not an `Exception`, so that no handler on the way swallows it."""


class StopRequest:
    """While entered, SIGTERM, SIGUSR1 and the first SIGINT only set `reason`; a second SIGINT ends at once.

    Signals reach the main thread only; entered in another thread it does nothing and no stop is requested.

    Attributes:
        reason: name of the signal that asked for the stop, or None.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._interrupts = 0
        self._is_disposable = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.reason = self.reason or signal.Signals(number).name
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise Interrupted(
                    "second Ctrl-C: stopped at once, without saving; --resume auto takes the last checkpoint"
                )
        if self._is_disposable:
            self._is_disposable = False
            raise StopNow

    def check(self) -> None:
        """Raise StopNow if a stop was requested; the state is consistent here."""
        if self.reason is not None:
            raise StopNow

    @contextmanager
    def disposable(self) -> Iterator[None]:
        """Work that may be thrown away and holds no locks: a request ends it at once with StopNow."""
        self._is_disposable = True
        try:
            self.check()
            yield
        finally:
            self._is_disposable = False
