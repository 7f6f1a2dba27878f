# mypy: disable-error-code="import-untyped, no-untyped-def, no-untyped-call, untyped-decorator"
"""Triton: tiles of whole samples or of parts of one; four neighbours share one counter and one store."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from reca.kernels._launch import architecture_of, ceil_div, launch, launch_config, next_power_of_two
from reca.kernels._triton_random import counter_words, interleave_words, normals_of
from reca.kernels.philox.reference import NORMAL, UNIFORM, WORDS

# Four rows of a tile of 2,048: a wider one would idle more lanes behind the end of a row.
_MAX_COLUMNS = 512


# A key or a step of a certain divisibility is no reason to compile again.
@triton.jit(do_not_specialize=["key", "step"])
def _philox_kernel(
    samples_ptr,
    out_ptr,
    num_samples,
    count,
    column_tiles,
    key,
    step,
    IS_WORDS: tl.constexpr,
    IS_NORMAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    # One axis of programs: the others end at 65,535.
    row_tile, column_tile = tl.program_id(0) // column_tiles, tl.program_id(0) % column_tiles
    rows = row_tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = column_tile.to(tl.int64) * COLS + tl.arange(0, COLS)
    inside = (rows < num_samples)[:, None] & (cols < count)[None, :]
    sample = tl.load(samples_ptr + rows, mask=rows < num_samples, other=0)
    blocks = column_tile.to(tl.int64) * (COLS // 4) + tl.arange(0, COLS // 4)
    w0, w1, w2, w3 = counter_words(key, step, sample[:, None], blocks.to(tl.uint32)[None, :])
    if IS_NORMAL:
        n0, n1, n2, n3 = normals_of(w0, w1, w2, w3)
        drawn = interleave_words(n0, n1, n2, n3)
    else:
        words = interleave_words(w0, w1, w2, w3)
        drawn = words.to(tl.int64) if IS_WORDS else tl.uint_to_uniform_float(words)
    tl.store(out_ptr + rows[:, None] * count + cols[None, :], drawn, mask=inside)


def forward(samples: Tensor, count: int, key: int, step: int, kind: int) -> Tensor:
    """[samples, count] int64 words, or fp32 uniforms or normals."""
    assert kind in (WORDS, UNIFORM, NORMAL)
    out = samples.new_empty(samples.shape[0], count, dtype=torch.int64 if kind == WORDS else torch.float32)
    config = launch_config("philox", architecture_of(samples), out.dtype, count)
    cols = min(max(next_power_of_two(count), 4), _MAX_COLUMNS)
    rows, column_tiles = config.tile // cols, ceil_div(count, cols)
    launch(
        _philox_kernel,
        (ceil_div(samples.shape[0], rows) * column_tiles,),
        samples.contiguous(),
        out,
        samples.shape[0],
        count,
        column_tiles,
        key,
        step,
        warps=config.warps,
        IS_WORDS=kind == WORDS,
        IS_NORMAL=kind == NORMAL,
        ROWS=rows,
        COLS=cols,
    )
    return out
