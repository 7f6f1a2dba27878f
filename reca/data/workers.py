"""Maps a function over an endless stream of indices in worker processes, in order, leaving none behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import fields, is_dataclass, replace
from multiprocessing import connection
from typing import Any, Generic, TypeVar

import torch
import torch.multiprocessing
from torch import Tensor

from reca.errors import DataError

T = TypeVar("T")

_POLL_S = 0.2

_function: Callable[[int], Any] | None = None  # set once in each worker process


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _start_worker(function: Callable[[int], Any]) -> None:
    global _function
    _function = function
    torch.set_num_threads(1)
    # A stop request is the training process's to answer; workers end when it closes them or dies.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _call(index: int) -> Any:
    assert _function is not None
    return _function(index)


def _own(value: Any) -> Any:
    """Copy tensors out of shared memory: there, each holds a file descriptor, and /dev/shm may be small."""
    if isinstance(value, Tensor):
        return value.clone()
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _own(getattr(value, f.name)) for f in fields(value) if f.init})
    if isinstance(value, tuple | list):
        return type(value)(_own(item) for item in value)
    if isinstance(value, dict):
        return {key: _own(item) for key, item in value.items()}
    return value


class OrderedWorkers(Generic[T]):
    """Iterator over function(index), in the order of `indices`; computed ahead by worker processes.

    Args:
        function: picklable; called in the workers.
        indices: may be endless.
        workers: processes; 0 calls the function in this process, nothing ahead.
        ahead: results computed ahead of the consumer.
        timeout_s: longest wait for one result, in seconds.
        on_wait: called before and while waiting for a result; what it raises reaches the caller.

    Raises: whatever the function raises; DataError if a worker died or did not answer in time.
    """

    def __init__(
        self,
        function: Callable[[int], T],
        indices: Iterator[int],
        *,
        workers: int,
        ahead: int,
        timeout_s: float,
        on_wait: Callable[[], None] = lambda: None,
    ) -> None:
        self._on_wait = on_wait
        self._function = function
        self._indices = indices
        self._ahead = max(ahead, workers)
        self._timeout_s = timeout_s
        self._pending: deque[Future[T]] = deque()
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._pool: ProcessPoolExecutor | None = None
        if workers:
            before = set(multiprocessing.active_children())
            self._pool = ProcessPoolExecutor(
                workers,
                # torch's context hands tensors over in shared memory instead of through a pipe.
                mp_context=torch.multiprocessing.get_context(),
                initializer=_start_worker,
                initargs=(function,),
            )
            self._fill()
            self._processes = [p for p in multiprocessing.active_children() if p not in before]

    def __iter__(self) -> OrderedWorkers[T]:
        return self

    def __next__(self) -> T:
        if self._pool is None:
            self._on_wait()
            return self._function(next(self._indices))
        self._fill()
        if not self._pending:
            raise StopIteration
        try:
            result: T = _own(self._wait(self._pending.popleft()))
        except BrokenProcessPool as error:
            self._end(grace_s=0)
            raise DataError(
                "a loader worker was killed (out of memory, or /dev/shm too small?); "
                "lower data.workers, or set data.workers=0 to decode in the training process"
            ) from error
        except TimeoutError as error:
            self._end(grace_s=0)
            raise DataError(
                f"no loader worker answered within {self._timeout_s:g} s (a stalled file system?); "
                "check that the data can be read, or set data.workers=0"
            ) from error
        return result

    def _wait(self, future: Future[T]) -> T:
        """The result of a future, or TimeoutError; the caller is heard several times a second."""
        deadline = time.monotonic() + self._timeout_s
        while True:
            self._on_wait()
            remaining = deadline - time.monotonic()
            try:
                return future.result(max(min(remaining, _POLL_S), 0))
            except TimeoutError:
                if future.done() or remaining <= _POLL_S:
                    raise

    def _fill(self) -> None:
        assert self._pool is not None
        while len(self._pending) < self._ahead:
            index = next(self._indices, None)
            if index is None:
                return
            try:
                self._pending.append(self._pool.submit(_call, index))
            except BrokenProcessPool as error:
                failed: Future[T] = Future()
                failed.set_exception(error)
                self._pending.append(failed)
                return

    def close(self) -> None:
        """End the workers, after what they are at if that is soon; idempotent."""
        self._end(grace_s=2.0)

    def _end(self, *, grace_s: float) -> None:
        if self._pool is None:
            return
        # A worker that hangs answers nothing but a kill; none of them holds state.
        impatience = threading.Timer(grace_s, self._kill)
        impatience.start()
        self._pool.shutdown(wait=True, cancel_futures=True)
        impatience.cancel()
        self._pending.clear()
        self._pool, self._indices = None, iter(())

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
