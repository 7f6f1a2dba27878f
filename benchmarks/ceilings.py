"""What this machine can do at most, measured in the same run: copying memory and multiplying matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from reca.benchmarks.timing import measure

_COPY_BYTES = {"cuda": 1 << 32, "cpu": 1 << 25}
_SIDE = {"cuda": 8192, "cpu": 512}


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The two yardsticks of every kernel.

    Attributes:
        copy_gbps: bytes read plus bytes written per second, in 1e9, of a large device copy.
        gemm_tflops: 1e12 floating-point operations per second of a large square product (cuBLAS on a GPU) in
            `dtype`; random data, since zeros run faster.
        dtype: of the product.
    """

    copy_gbps: float
    gemm_tflops: float
    dtype: torch.dtype


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure both on `device`, median of 20 rounds; about 10 GB of device memory on a GPU."""
    count = _COPY_BYTES[device.type] // 4
    source = torch.rand(count, device=device)
    target = torch.empty_like(source)
    side = _SIDE[device.type]
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(side, side, device=device, generator=generator).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    timings = measure(
        {
            "copy": lambda _: target.copy_(source),
            "gemm": lambda _: torch.mm(left, right, out=product),
        },
        device,
    )
    return Ceilings(
        copy_gbps=2 * source.nbytes / timings["copy"].p50 / 1e6,
        gemm_tflops=2 * side**3 / timings["gemm"].p50 / 1e9,
        dtype=dtype,
    )
