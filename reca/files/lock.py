"""One run per folder, also after a crash: the kernel drops the lock with the process."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import warnings
from pathlib import Path
from types import TracebackType

from reca.errors import ConfigError
from reca.files.atomic import disk_errors

_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}  # e.g. Lustre mounted without -o flock


class RunLock:
    """Hold a run folder for this process; a context manager.

    Raises: ConfigError at once, naming the other process, if the folder is held; DiskError if read-only.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptor: int | None = None

    def __enter__(self) -> RunLock:
        path = self._folder / ".lock"
        with disk_errors(path):
            self._folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                self._take(descriptor)
            except BaseException:
                os.close(descriptor)
                raise
        self._descriptor = descriptor
        # A forked loader worker that outlives a killed trainer must not go on holding the folder.
        os.register_at_fork(after_in_child=self._close)
        return self

    def _take(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip() or "another process"
            raise ConfigError(
                f"{self._folder} is in use by {owner}; end that run or choose another --run"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            warnings.warn(f"{self._folder}: {error.strerror}; let only one run use this folder", stacklevel=3)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()
