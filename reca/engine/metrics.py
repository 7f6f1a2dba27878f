"""Numbers of a logged step, read from the device once, and the throughput since the previous line."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reca.engine.step import StepMetrics
from reca.types import Batch

# Dense bf16 TFLOP/s of the vendors' data sheets; the longest matching name wins.
PEAK_TFLOPS = {
    "RTX 3090": 71.0,
    "RTX 4090": 165.2,
    "RTX 5090": 209.5,
    "RTX A6000": 154.8,
    "A100": 312.0,
    "L40S": 362.05,
    "H100": 989.4,
    "H100 PCIe": 756.0,
    "H200": 989.4,
    "B200": 2250.0,
}


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of a device; None for a CPU or a GPU that is not in the table."""
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float | None:
    """Dense bf16 FLOP/s of a device name as the driver spells it; None if the table lacks it."""
    matches = [known for known in PEAK_TFLOPS if known in name]
    return PEAK_TFLOPS[max(matches, key=len)] * 1e12 if matches else None


def peak_memory_gb(device: torch.device) -> float:
    """Largest memory so far in 1e9 bytes: allocated by torch on CUDA, resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class Meter:
    """Collects what the host knows of each step and turns it into one line of metrics.jsonl.

    Rates are over the wall-clock time since the previous line; `restart` leaves evaluations and saves out.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._peak = peak_flops(device)
        self.restart()

    def restart(self) -> None:
        """Begin a new window."""
        self._began = time.perf_counter()
        self._images = self._tokens = self._flops = 0
        self._waited = 0.0

    def add(self, model: Any, microbatches: Sequence[Batch], waited: float) -> None:
        """Count one step. `waited`: seconds in which the step waited for its data."""
        self._images += sum(batch.num_images for batch in microbatches)
        self._tokens += sum(batch.num_tokens for batch in microbatches)
        if self._peak is not None:
            self._flops += sum(model.flops(batch) for batch in microbatches)
        self._waited += waited

    def line(self, step: int, metrics: StepMetrics) -> dict[str, float | int | None]:
        """The record of a logged step, and a new window. Waits for the device once.

        `loss`, `lr` and `grad_norm` are of this step; `data_wait` is the share of the window spent on
        waiting, in [0, 1]; `mfu` is least FLOPs over dense bf16 peak, None where the peak is unknown.
        """
        names = ["loss", *(f"loss/{name}" for name in metrics.terms), "lr", "grad_norm"]
        values: list[Tensor] = [metrics.loss, *metrics.terms.values(), metrics.lr, metrics.grad_norm]
        read = dict(zip(names, torch.stack(values).tolist(), strict=True))
        seconds = max(time.perf_counter() - self._began, 1e-9)
        record: dict[str, float | int | None] = {
            "step": step,
            **read,
            "images_per_second": self._images / seconds,
            "tokens_per_second": self._tokens / seconds,
            "mfu": self._flops / seconds / self._peak if self._peak is not None else None,
            "data_wait": min(self._waited / seconds, 1.0),
            "peak_memory_gb": peak_memory_gb(self._device),
        }
        self.restart()
        return record
