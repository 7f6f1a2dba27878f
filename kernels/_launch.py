"""Launch parameters, a pure function of (operator, architecture, dtype, width); the one place that launches.

Nothing is timed while training, so ranks and reruns launch the same code.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reca.kernels._launch_table import ANY_WIDTH as ANY_WIDTH
from reca.kernels._launch_table import TABLE as TABLE
from reca.kernels._launch_table import Entry as Entry
from reca.kernels._launch_table import LaunchConfig as LaunchConfig

MAX_ROWS_PER_PROGRAM = 128
MAX_COLUMNS = 512
# Multiprocessors of the largest common part of each architecture; only balances work, never changes a shape.
MULTIPROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}
DEFAULT_MULTIPROCESSORS = 108
REHEARSED_ARCHITECTURE = 90  # which only changes tiles, never what is launched

Asked = tuple[int, torch.dtype, int]
"""Architecture, dtype and width for which a launcher looked into the table."""
_TRIED: dict[str, tuple[LaunchConfig, set[Asked]]] = {}


@contextmanager
def tried_config(operator: str, config: LaunchConfig) -> Iterator[set[Asked]]:
    """Inside, `operator` is launched with `config`, whatever the table says; for benchmarks alone.

    Yields what launchers asked the table for meanwhile.
    Process-wide, because a backward pass on CUDA runs in a thread of its own.
    """
    asked: set[Asked] = set()
    _TRIED[operator] = config, asked
    try:
        yield asked
    finally:
        del _TRIED[operator]


def launch_config(operator: str, architecture: int, dtype: torch.dtype, width: int) -> LaunchConfig:
    """The first entry of `operator` that holds for this architecture, dtype and row width."""
    if operator in _TRIED:
        config, asked = _TRIED[operator]
        asked.add((architecture, dtype, width))
        return config
    for entry in TABLE[operator]:
        fits = width <= entry.max_width and entry.itemsize in (None, dtype.itemsize)
        if fits and (not entry.architectures or architecture in entry.architectures):
            return entry.config
    raise AssertionError(f"the launch table of {operator} must end in an entry that always holds")


@functools.cache
def _capability(index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def architecture_of(tensor: Tensor) -> int:
    """90 for sm_90 and so on; 0 for tensors that are on no GPU (the interpreter)."""
    recording = _RECORDING.get()
    if recording is not None:
        return recording.architecture
    return _capability(tensor.device.index) if tensor.is_cuda else 0


def tile_shape(tile: int, width: int) -> tuple[int, int]:
    """(rows, columns) of a tile of at most `tile` elements over rows of `width`; both powers of two."""
    columns = min(next_power_of_two(width), tile)
    return tile // columns, columns


def next_power_of_two(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def multiprocessors(architecture: int) -> int:
    """Of the part whose work is balanced; a stand-in for architectures without a line of their own."""
    return MULTIPROCESSORS.get(architecture, DEFAULT_MULTIPROCESSORS)


def rows_per_program(rows: int, architecture: int) -> int:
    """A power of two near rows / (2 programs per multiprocessor), for kernels that reduce over rows."""
    programs = 2 * multiprocessors(architecture)
    return min(next_power_of_two(ceil_div(rows, programs)), MAX_ROWS_PER_PROGRAM)


def column_tiles(operator: str, rows: Tensor, *, reduces: bool) -> tuple[tuple[int, int], int, int, int, int]:
    """(grid, rows, columns, steps, warps) of a walk over [rows, width] in tiles of at most 512 columns.

    A kernel that reduces over rows takes `steps` tiles one below the other; 8 programs per multiprocessor.
    """
    (total, width), architecture = rows.shape, architecture_of(rows)
    config = launch_config(operator, architecture, rows.dtype, width)
    columns = min(next_power_of_two(width), MAX_COLUMNS)
    tile_rows, blocks = config.tile // columns, ceil_div(width, columns)
    together = rows_per_program(ceil_div(total * blocks, 4), architecture) if reduces else tile_rows
    steps = ceil_div(together, tile_rows)
    return (ceil_div(total, tile_rows * steps), blocks), tile_rows, columns, steps, config.warps


def ceil_div(n: int, d: int) -> int:
    """n / d, rounded up."""
    return -(-n // d)


def as_rows(tensor: Tensor) -> Tensor:
    """[rows, width] with unit stride inside a row; copies only where the layout demands it."""
    rows = tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch that was recorded instead of made."""

    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int


@dataclass(frozen=True, slots=True)
class Recording:
    """The launches that operators would make on one architecture."""

    architecture: int
    launches: list[Launch]


_RECORDING: ContextVar[Recording | None] = ContextVar("reca_recording", default=None)


@contextmanager
def record_launches(architecture: int) -> Iterator[Recording]:
    """Inside, `launch` runs nothing and remembers everything: launchers can be called on meta tensors."""
    recording = Recording(architecture, [])
    token = _RECORDING.set(recording)
    try:
        yield recording
    finally:
        _RECORDING.reset(token)


def rehearse(launcher: Callable[..., Any], *arguments: Any) -> int | None:
    """Triton kernels that `launcher` would start on tensors without values; None if Triton is missing."""
    if importlib.util.find_spec("triton") is None:
        return None
    with record_launches(REHEARSED_ARCHITECTURE) as recording:
        launcher(*arguments)
    return len(recording.launches)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, warps: int, **constants: Any) -> None:
    """Launch a Triton kernel on the device of its first argument; an empty grid launches nothing.

    Args:
        kernel: a `triton.jit` function.
        grid: programs per axis.
        arguments: tensors, ints and floats in the order of the signature.
        warps: warps per program.
        constants: the `tl.constexpr` parameters by name.
    """
    if 0 in grid:
        return
    recording = _RECORDING.get()
    if recording is not None:
        recording.launches.append(Launch(kernel, arguments, constants, warps))
        return
    device = arguments[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        # Triton launches on the current device, whatever the pointers say.
        with torch.cuda.device(device):
            kernel[grid](*arguments, **constants, num_warps=warps)
        return
    kernel[grid](*arguments, **constants, num_warps=warps)
