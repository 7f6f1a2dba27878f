"""Launch parameters, a pure function of (operator, architecture, dtype, width); the one place that launches.

Nothing is timed while training, so ranks and reruns launch the same code. Each entry of the table carries its
reason; "arithmetic:" is a prediction to be tested on a GPU, "measured:" names the machine and the number.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ANY_WIDTH = 1 << 62
MAX_ROWS_PER_PROGRAM = 128
MAX_COLUMNS = 512
# Multiprocessors of the largest common part of each architecture; only balances work, never changes a shape.
MULTIPROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}
DEFAULT_MULTIPROCESSORS = 108


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """How one kernel is launched.

    Attributes:
        tile: elements per program and step, padding included.
        warps: warps per program.
    """

    tile: int
    warps: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the table: the first entry of an operator that matches is taken.

    Attributes:
        max_width: widest row, in elements, for which it holds.
        config: what is launched.
        reason: why.
        architectures: e.g. (80, 90); empty means all.
        itemsize: bytes per element; None means all.
    """

    max_width: int
    config: LaunchConfig
    reason: str
    architectures: tuple[int, ...] = ()
    itemsize: int | None = None


TABLE: dict[str, tuple[Entry, ...]] = {
    "adaln_modulation": (
        Entry(
            1024,
            LaunchConfig(tile=4096, warps=8),
            "arithmetic: several short rows share a program, 16 elements per thread and operand",
        ),
        Entry(
            8192,
            LaunchConfig(tile=4096, warps=8),
            "arithmetic: a row of 1,536 (padded to 2,048) leaves 8 elements per thread, two rows 16, so that "
            "the six fp32 values per element of the backward stay below 128 registers",
        ),
        Entry(
            ANY_WIDTH,
            LaunchConfig(tile=4096, warps=16),
            "arithmetic: rows up to 32,768 leave 64 elements per thread at most",
        ),
    ),
    "adamw": (
        Entry(
            ANY_WIDTH,
            LaunchConfig(tile=2048, warps=4),
            "arithmetic: 16 codes of a moment are one 128-bit access; at 10 bytes per weight instructions "
            "count as much as bytes, and what all elements share is computed once per 16 of them",
            itemsize=1,
        ),
        Entry(
            ANY_WIDTH,
            LaunchConfig(tile=1024, warps=4),
            "arithmetic: 8 elements per thread are two 128-bit accesses per fp32 operand and one per bf16; "
            "seven streams in flight per thread hide the latency without more warps",
        ),
    ),
    "depthwise_glu": (
        Entry(
            ANY_WIDTH,
            LaunchConfig(tile=256, warps=4),
            "arithmetic: two channels per thread; with more, the held columns, the nine weights and their "
            "gradients of value and gate (72 + 36 + 40 registers) would not fit",
        ),
    ),
    "diffusion_loss": (
        Entry(
            ANY_WIDTH,
            LaunchConfig(tile=1024, warps=4),
            "arithmetic: 8 elements per thread are one 128-bit load of each bf16 half of the output; 170,000 "
            "rows of 16 are 2,657 programs, so only one in sixteen meets a first time and its likelihood",
        ),
    ),
    "embedding_projection": (
        Entry(
            ANY_WIDTH,
            LaunchConfig(tile=2048, warps=4),
            "arithmetic: 16 elements per thread are two 128-bit loads of each bf16 operand in flight; a tile "
            "of 4 rows by 512 columns divides 3,584 and 2,048 without idle lanes",
        ),
    ),
    "dropout": (
        Entry(
            ANY_WIDTH,
            LaunchConfig(tile=2048, warps=4),
            "arithmetic: 16 elements per thread are two 128-bit loads of each bf16 operand in flight while "
            "four Philox counters are computed; tiles of 256 columns divide 1,280, 3,072 and 5,120",
        ),
    ),
    "dropout_attention": (
        Entry(
            ANY_WIDTH,
            LaunchConfig(tile=2048, warps=4),
            "arithmetic: 64 rows in steps of 32, operands in shared memory: 232 registers at 80 columns on "
            "sm_90, where steps of 64 spill",
            architectures=(90, 100),
            itemsize=2,
        ),
        Entry(
            ANY_WIDTH,
            LaunchConfig(tile=1024, warps=4),
            "arithmetic: where operands of products lie in registers, steps of 32 spill at 80 columns "
            "(120 instructions on sm_120), steps of 16 do not",
        ),
    ),
    "flow_head": (
        Entry(
            ANY_WIDTH,
            LaunchConfig(tile=4096, warps=8),
            "arithmetic: 64 rows by 64 columns leave 16 accumulators per thread for the prediction; 32,768 "
            "rows are 512 programs, four per multiprocessor",
        ),
    ),
    "flow_input": (
        Entry(
            ANY_WIDTH,
            LaunchConfig(tile=4096, warps=8),
            "arithmetic: 64 rows by 64 columns leave 16 accumulators per thread (80 registers on sm_90, 136 "
            "with twice the columns); 512 programs noise each row once, not once per column block",
        ),
    ),
    "flow_matching_loss": (
        Entry(
            ANY_WIDTH,
            LaunchConfig(tile=2048, warps=4),
            "arithmetic: 16 elements per thread are two 128-bit loads of each bf16 operand in flight; "
            "32,768 x 64 gives 1,024 programs, 8 per multiprocessor",
        ),
    ),
    "gated_mlp": (
        Entry(
            ANY_WIDTH,
            LaunchConfig(tile=1024, warps=4),
            "arithmetic: one 128-bit load per operand and thread in bf16; 18,944 columns waste 2.6 % of the "
            "lanes of the last block, a tile of 4,096 would waste 7.5 %",
        ),
    ),
    "gelu_mlp": (
        Entry(
            ANY_WIDTH,
            LaunchConfig(tile=1024, warps=4),
            "arithmetic: 8 elements per thread keep the backward at 64 registers and 32 warps per processor "
            "(16 elements: 120 and 16) with the same 32 KB in flight; 4,304 columns idle 7 % of the lanes",
        ),
    ),
    "linear_attention": (
        Entry(
            ANY_WIDTH,
            LaunchConfig(tile=1024, warps=4),
            "arithmetic: 32 tokens of 32 leave 110 registers forward and 235 backward on sm_90; 64 tokens "
            "spill in the backward, whose products are made of three TF32 ones",
        ),
    ),
    "masked_token_loss": (
        Entry(
            ANY_WIDTH,
            LaunchConfig(tile=4096, warps=8),
            "arithmetic: 16 elements per thread are two 128-bit loads of bf16 logits in flight; a row of 117 "
            "KB is still in the L2 cache when the second pass turns it into its gradient",
        ),
    ),
    "qk_norm_rope": (
        Entry(
            ANY_WIDTH,
            LaunchConfig(tile=2048, warps=4),
            "arithmetic: 16 rows of 128 give each thread one 128-bit load per half of a head; 32,768 rows "
            "are 2,048 programs, of which several share a multiprocessor and hide each other's latency",
        ),
    ),
    "rms_norm": (
        Entry(
            1024,
            LaunchConfig(tile=4096, warps=4),
            "arithmetic: several short rows share a program, 32 elements per thread",
        ),
        Entry(
            8192,
            LaunchConfig(tile=4096, warps=8),
            "arithmetic: a row of 3,584 (padded to 4,096) leaves 16 elements per thread, so that the five "
            "fp32 values per element of the backward stay below 128 registers, two programs a multiprocessor",
        ),
        Entry(
            ANY_WIDTH,
            LaunchConfig(tile=4096, warps=16),
            "arithmetic: rows up to 32,768 leave 64 elements per thread at most",
        ),
    ),
    "skinny_linear": (
        Entry(
            ANY_WIDTH,
            LaunchConfig(tile=8192, warps=4),
            "arithmetic: 64 outputs are the least that Hopper's products take; with 128 inputs a bf16 tile "
            "is 16 KB, and three in flight in two programs per multiprocessor cover the latency of memory",
        ),
    ),
}


_TRIED: dict[str, LaunchConfig] = {}


@contextmanager
def tried_config(operator: str, config: LaunchConfig) -> Iterator[None]:
    """Inside, `operator` is launched with `config`, whatever the table says; for benchmarks alone.

    Process-wide, because a backward pass on CUDA runs in a thread of its own.
    """
    _TRIED[operator] = config
    try:
        yield
    finally:
        del _TRIED[operator]


def launch_config(operator: str, architecture: int, dtype: torch.dtype, width: int) -> LaunchConfig:
    """The first entry of `operator` that holds for this architecture, dtype and row width."""
    if operator in _TRIED:
        return _TRIED[operator]
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


def rows_per_program(rows: int, architecture: int) -> int:
    """A power of two near rows / (2 programs per multiprocessor), for kernels that reduce over rows."""
    programs = 2 * MULTIPROCESSORS.get(architecture, DEFAULT_MULTIPROCESSORS)
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
