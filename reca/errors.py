"""Errors that a user can cause or cure, each with the exit code of the command line.

Raise one of these for anything that is not a bug in reca: the command line prints its text in one or two
lines (what was expected, what came, the cure) and ends with `exit_code`. A bug raises an ordinary exception.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RecaError(Exception):
    """Base of all errors shown without a traceback; subclasses fix the exit code."""

    exit_code = 1


class ConfigError(RecaError):
    """A bad recipe, key, value or argument."""

    exit_code = 2


class DataError(RecaError):
    """Images or data sets that cannot be used."""

    exit_code = 3


class CheckpointError(RecaError):
    """Weights or a checkpoint that cannot be loaded or trusted."""

    exit_code = 4


class NumericError(RecaError):
    """Loss or gradients stopped being finite."""

    exit_code = 5


class MemoryExhausted(RecaError):
    """Device or host memory ran out."""

    exit_code = 6


class DiskError(RecaError):
    """A file could not be written: full disk, quota, permissions."""

    exit_code = 7


class PeerLost(RecaError):
    """Another rank died or did not answer in time."""

    exit_code = 8


class Preempted(RecaError):
    """The run was asked to stop, saved, and can be resumed."""

    exit_code = 75


class Interrupted(RecaError):
    """A second Ctrl-C: stop at once, without saving."""

    exit_code = 130


def nearest(name: str, known: Iterable[str]) -> str:
    """ " did you mean 'x'?" for the closest known name, else the list of all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
