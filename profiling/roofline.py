"""What counted work would take on a GPU: a prediction from ceilings, never a measurement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from reca.profiling.launches import Launch

LAUNCH_SECONDS = 5e-6
"""Least time between two kernels that eager torch launches one by one."""


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU by what it sustains, not by its data sheet.

    Attributes:
        memory_gb: whole memory, in 1e9 bytes.
        matmul_tflops: bf16 products of large matrices; measured for the H200, scaled from data sheets else.
        wide_tflops: the same in fp32 without TF32.
        copy_tb_per_s: 1e12 bytes per second, read and written.
        attention: share of `matmul_tflops` that torch's own flash attention reaches forward and backward.
    """

    memory_gb: float
    matmul_tflops: float
    wide_tflops: float
    copy_tb_per_s: float
    attention: tuple[float, float] = (0.80, 0.65)

    def seconds(self, launch: Launch) -> float:
        """Time of one call: the longest of its arithmetic, its traffic and its launches.

        An operator that launches several kernels is given the bandwidth once.
        """
        rate = self.wide_tflops if launch.is_wide else self.matmul_tflops
        if launch.kind == "attention":
            rate *= self.attention[0]
        elif launch.kind == "attention_backward":
            rate *= self.attention[1]
        arithmetic = launch.flops / (rate * 1e12)
        traffic = launch.bytes / (self.copy_tb_per_s * 1e12)
        return max(arithmetic, traffic, launch.kernels * LAUNCH_SECONDS)


# Torch's flash attention is of the second generation, which was made for Ampere: newer tensor cores idle.
_HOPPER = (0.47, 0.38)
_BLACKWELL = (0.25, 0.20)

DEVICES: Mapping[str, Device] = {
    "rtx-3090": Device(25.8, 62, 28, 0.84),
    "rtx-4090": Device(25.8, 155, 66, 0.90),
    "rtx-5090": Device(34.4, 195, 84, 1.60),
    "a6000": Device(51.5, 115, 31, 0.69),
    "l40s": Device(48.3, 240, 73, 0.77),
    "a100-40": Device(42.9, 250, 17, 1.35),
    "a100-80": Device(85.9, 250, 17, 1.75),
    "h100": Device(85.5, 700, 54, 3.00, _HOPPER),
    "h200": Device(150.8, 790, 54, 4.30, _HOPPER),
    "b200": Device(192.3, 1790, 60, 7.00, _BLACKWELL),
}
"""Name of `reca plan --gpu` -> what to expect of it."""
