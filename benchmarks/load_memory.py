"""Host memory that loading an official checkpoint costs, against the size of the model itself.

    python -m reca.benchmarks.load_memory --megabytes 400 --out benchmarks/results/load_memory.jsonl

One process writes a synthetic checkpoint in the official format; a fresh one builds the model on the meta
device, notes its resident memory, loads, and reports the peak above that. Linux only: the peak is VmHWM of
/proc, reset before the load, and counts mapped files.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reca.benchmarks.environment import cpu_name

if TYPE_CHECKING:
    from reca.models.bagel.config import BagelConfig

_WIDTH = 512
_HIDDEN = 2560
_VOCABULARY = 8192


def architecture(megabytes: int) -> BagelConfig:
    """A model shaped like the release, with as many layers as give a bf16 file of about `megabytes`."""
    from reca.models.bagel.config import BagelConfig, LLMConfig, VisionConfig
    from reca.models.bagel.vae import VAEConfig

    tokens = 2 * _VOCABULARY * _WIDTH
    expert = _WIDTH * (2.5 * _WIDTH + 3 * _HIDDEN)
    layers = max(1, round((megabytes * 1e6 / 2 - tokens) / (2 * expert)))
    return BagelConfig(
        LLMConfig(_WIDTH, _HIDDEN, layers, 8, 2, _VOCABULARY),
        VisionConfig(256, 1024, 4, 4, image_size=224, patch_size=14),
        VAEConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1),
        max_latent_size=16,
        vit_max_num_patch_per_side=16,
    )


def write_checkpoint(folder: Path, megabytes: int) -> None:
    """A release of random weights: bf16, with an fp32 autoencoder."""
    import torch

    from reca.models.bagel.checkpoint import save
    from reca.models.bagel.model import BagelModel

    torch.manual_seed(0)
    save(BagelModel(architecture(megabytes)), folder, dtype=torch.bfloat16)


def load_checkpoint(folder: Path, megabytes: int) -> dict[str, Any]:
    """Load in this process and measure; frozen weights in bf16, trained ones in fp32."""
    import torch

    from reca.models.bagel.checkpoint import load
    from reca.models.bagel.model import BagelModel

    with torch.device("meta"):
        model = BagelModel(architecture(megabytes))
    Path("/proc/self/clear_refs").write_text("5")
    baseline = _status_bytes("VmRSS")
    started = time.perf_counter()
    load(model, folder, torch.device("cpu"), torch.bfloat16)
    seconds = time.perf_counter() - started
    growth = _status_bytes("VmHWM") - baseline
    size = sum(tensor.nbytes for tensor in model.parameters())
    return {
        "file_bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        "model_bytes": size,
        "peak_growth_bytes": growth,
        "ratio": round(growth / size, 4),
        "baseline_bytes": baseline,
        "seconds": round(seconds, 3),
    }


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; this benchmark needs Linux")


def measure(megabytes: int) -> dict[str, Any]:
    """Write and load in processes of their own; the record of one run."""
    with tempfile.TemporaryDirectory() as folder:
        for task in ("write", "load"):
            # -P: from a source checkout the current folder must not shadow installed packages.
            command = [sys.executable, "-P", "-m", "reca.benchmarks.load_memory"]
            command += ["--megabytes", str(megabytes), "--task", task, "--folder", folder]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return {
        "benchmark": "load_memory",
        "command": f"python -m reca.benchmarks.load_memory --megabytes {megabytes}",
        **json.loads(output),
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in ("reca", "torch", "safetensors")},
        "machine": f"{cpu_name()}, {os.cpu_count()} CPUs, {platform.system()}",
    }


def main() -> None:
    """Measure once, print the record, and append it to a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=400, help="size of the bf16 file")
    parser.add_argument("--out", type=Path, help="JSON lines file to append to")
    parser.add_argument("--task", choices=("all", "write", "load"), default="all", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task == "write":
        write_checkpoint(arguments.folder, arguments.megabytes)
    elif arguments.task == "load":
        print(json.dumps(load_checkpoint(arguments.folder, arguments.megabytes)))
    else:
        line = json.dumps(measure(arguments.megabytes))
        print(line)
        if arguments.out:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
