"""`reca doctor`: what this machine has, which attention back ends and kernels will run, why not the rest.

A package that is missing or broken is a line of the report, never a crash; nothing is changed or downloaded.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from reca.errors import ConfigError
from reca.layers.attention_backends import BACKENDS, choose_backend, import_failure

VERSIONS = ("torch", "triton", "transformers", "diffusers", "safetensors", "numpy", "reca")
PACKAGES = {
    "flash-attn": "flash_attn.flash_attn_interface",  # flash_attn alone may be the fourth generation
    "xformers": "xformers",
    "torchao": "torchao",
    "bitsandbytes": "bitsandbytes",
    "liger-kernel": "liger_kernel",
}
PROFILERS = ("nsys", "ncu")
HEAD_DIM = 128
GIGABYTE = 1e9
_COMPILED_COLUMNS = (
    "architecture",
    "registers",
    "spills",
    "shared_bytes",
    "loads_128",
    "stores_128",
    "instructions",
)


def collect() -> dict[str, Any]:
    """Everything the report shows, ready for JSON. Where a reason is given, None means that it works."""
    return {
        "machine": _machine(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in VERSIONS},
        "attention": _attention(),
        "kernels": _kernels(),
        "packages": {
            name: {"version": _version(name), "why_not": import_failure(module)}
            for name, module in PACKAGES.items()
        },
        "profilers": {name: shutil.which(name) for name in PROFILERS},
        "disk": _disk(Path.cwd()),
    }


def _machine() -> dict[str, Any]:
    return {
        "os": platform.platform(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "ram_gb": round(_ram_bytes() / GIGABYTE, 1),
        "gpus": _gpus(),
        "why_no_gpu": _why_no_gpu(),
        "driver": _driver(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return named.group(1) if named else platform.processor() or platform.machine()


def _ram_bytes() -> int:
    """Physical memory, or less where a container is limited."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(physical, int(text)) if text.isdigit() else physical


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    gpus = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [
        {
            "name": gpu.name,
            "compute_capability": f"{gpu.major}.{gpu.minor}",
            "memory_gb": round(gpu.total_memory / GIGABYTE, 1),
        }
        for gpu in gpus
    ]


def _why_no_gpu() -> str | None:
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    return f"torch is built for CUDA {torch.version.cuda} but finds no usable device or driver"


def _driver() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(result.stdout.split()), None)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _attention() -> dict[str, Any]:
    """For each kind of tensor met in training: the back end that "auto" takes, and why not the others."""
    kinds = {"cpu fp32": (torch.device("cpu"), torch.float32)}
    if torch.cuda.is_available():
        kinds["cuda bf16"] = (torch.device("cuda"), torch.bfloat16)
    return {
        kind: {
            "auto": choose_backend("auto", device, dtype, HEAD_DIM, True),
            "why_not": {
                name: end.missing(device, dtype, HEAD_DIM, True)
                for name, end in BACKENDS.items()
                if name != "counted"  # of `reca plan`, never of a run
            },
        }
        for kind, (device, dtype) in kinds.items()
    }


def _kernels() -> dict[str, Any]:
    failure = import_failure("reca.kernels")
    if failure is not None:
        return {"operators": [], "auto": "none", "why_not_fused": failure}
    from reca.kernels import OPERATORS

    why_not = import_failure("triton")
    if why_not is None and not torch.cuda.is_available():
        why_not = "needs a CUDA device; the reference runs instead"
    auto = "fused" if why_not is None else "explicit plain torch"
    return {"operators": list(OPERATORS), "auto": auto, "why_not_fused": why_not}


def _disk(folder: Path) -> dict[str, Any]:
    usage = shutil.disk_usage(folder)
    return {
        "folder": str(folder),
        "free_gb": round(usage.free / GIGABYTE, 1),
        "total_gb": round(usage.total / GIGABYTE, 1),
    }


def render(report: Mapping[str, Any]) -> None:
    """Print a report of `collect` for people."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    for title, rows in _sections(report):
        console.print(title, style="bold")
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            console.print(f"  {name:{width}}  {value}")


def _sections(report: Mapping[str, Any]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """(title, rows of name and text), in the order shown."""
    machine, disk, kernels = report["machine"], report["disk"], report["kernels"]
    gpus = [f"{g['name']}, {g['memory_gb']} GB, compute {g['compute_capability']}" for g in machine["gpus"]]
    yield (
        "machine",
        [
            ("system", machine["os"]),
            ("processor", f"{machine['cpu']}, {machine['cores']} cores, {machine['ram_gb']} GB"),
            *[(f"gpu {index}", gpu) for index, gpu in enumerate(gpus)],
            *([] if gpus else [("gpu", f"none: {machine['why_no_gpu']}")]),
            ("driver", machine["driver"] or "none found"),
            ("disk", f"{disk['free_gb']} of {disk['total_gb']} GB free in {disk['folder']}"),
        ],
    )
    yield "versions", [(name, version or "not installed") for name, version in report["versions"].items()]
    for kind, choice in report["attention"].items():
        rows = [(name, _verdict(reason)) for name, reason in choice["why_not"].items()]
        yield f"attention, {kind}: auto takes {choice['auto']}", rows
    operators = kernels["operators"]
    yield (
        f"kernels: auto takes {kernels['auto']}",
        [
            ("operators", f"{len(operators)}: {', '.join(operators)}" if operators else "none"),
            ("fused", _verdict(kernels["why_not_fused"])),
        ],
    )
    packages = report["packages"].items()
    yield (
        "optional packages",
        [(name, _package(found["version"], found["why_not"])) for name, found in packages],
    )
    yield "profilers", [(name, path or "not found") for name, path in report["profilers"].items()]


def compile_kernels() -> list[dict[str, Any]]:
    """Compile every kernel for every architecture; one JSON-ready row each.

    Raises: ConfigError where Triton is missing or interprets, so that nothing could be compiled.
    """
    from reca.kernels.offline import compile_all

    try:
        return [asdict(row) for row in compile_all()]
    except (ImportError, RuntimeError) as error:
        raise ConfigError(f"doctor --compile: {error}") from error


def render_compiled(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the rows of `compile_kernels`, and the closing count."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    width = max(len(row["kernel"]) for row in rows)
    titles = ("sm", "registers", "spills", "shared B", "loads/16 B", "stores/16 B", "instructions")
    console.print(f"{'kernel':{width}}" + "".join(f"{title:>13}" for title in titles), style="bold")
    for row in rows:
        numbers = [row[name] for name in _COMPILED_COLUMNS]
        console.print(f"{row['kernel']:{width}}" + "".join(f"{number:>13}" for number in numbers))
    kernels, architectures = ({row[name] for row in rows} for name in ("kernel", "architecture"))
    spills = sum(row["spills"] for row in rows)
    console.print(f"kernels={len(kernels)} archs={len(architectures)} spills={spills}")


def _verdict(reason: str | None) -> str:
    return "usable" if reason is None else f"no: {reason}"


def _package(version: str | None, reason: str | None) -> str:
    return f"{version or 'unknown version'}, usable" if reason is None else f"no: {reason}"
