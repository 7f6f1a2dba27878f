"""The launch table: how each operator is launched, by architecture, dtype and width, and why.

"arithmetic:" is a prediction to be tested on a GPU, "measured:" names the machine and the number.
"""

from __future__ import annotations

from dataclasses import dataclass

ANY_WIDTH = 1 << 62


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
            80,
            LaunchConfig(tile=2048, warps=4),
            "arithmetic: 64 rows in steps of 32, operands in shared memory: 232 registers at 80 columns on "
            "sm_90, where steps of 64 spill",
            architectures=(90, 100),
            itemsize=2,
        ),
        Entry(
            80,
            LaunchConfig(tile=1024, warps=4),
            "arithmetic: where operands of products lie in registers, steps of 32 spill at 80 columns "
            "(120 instructions on sm_120), steps of 16 do not",
        ),
        Entry(
            ANY_WIDTH,
            LaunchConfig(tile=2048, warps=8),
            "arithmetic: sums of 128 columns over twice the threads, 235 registers at most; four warps spill",
            itemsize=2,
        ),
        Entry(ANY_WIDTH, LaunchConfig(tile=1024, warps=8), "arithmetic: as above, operands twice as wide"),
    ),
    "flow_head": (
        Entry(
            ANY_WIDTH,
            LaunchConfig(tile=4096, warps=8),
            "arithmetic: 64 rows by 64 columns leave 16 accumulators per thread for the prediction, 512 "
            "programs. Backward: 32 by 128 take 178 registers at most; 64 by 64 take 235 and read L2 twice",
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
    "group_norm_silu": (
        Entry(
            ANY_WIDTH,
            LaunchConfig(tile=4096, warps=8),
            "arithmetic: 16 elements per thread are two accesses of 16 bytes of bf16, and their means and "
            "spreads stay below 128 registers",
        ),
    ),
    "layer_norm": (
        Entry(
            1024,
            LaunchConfig(tile=4096, warps=4),
            "arithmetic: several short rows share a program, 32 elements per thread",
        ),
        Entry(
            8192,
            LaunchConfig(tile=4096, warps=8),
            "arithmetic: two rows of 2,048 leave 16 elements per thread, so that row, gradient and the two "
            "sums over rows of the backward stay below 128 registers, two programs a multiprocessor",
        ),
        Entry(
            ANY_WIDTH,
            LaunchConfig(tile=4096, warps=16),
            "arithmetic: rows up to 32,768 leave 64 elements per thread at most",
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
    "philox": (
        Entry(
            ANY_WIDTH,
            LaunchConfig(tile=2048, warps=4),
            "arithmetic: four counters per thread hide the latency of ten dependent products; each gives one "
            "128-bit store, and 48 samples of 65,536 numbers are 1,536 programs",
        ),
    ),
    "qk_norm_rope": (
        Entry(
            64,
            LaunchConfig(tile=1024, warps=2),
            "arithmetic: 16 rows of 64 are 128-bit loads of the rest of a head; two samples of 1,635 "
            "rows are 205 programs, more than an H200 has multiprocessors, where 32 rows would be 103",
        ),
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
