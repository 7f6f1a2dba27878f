"""A run that is killed and resumed, twice, ends with the bits of a run that was left alone."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

STEPS = 12
ARGUMENTS = (
    "bagel-smoke",
    f"steps={STEPS}",
    "checkpoint.every=3",
    "sample.every=5",
    "optim.ema=0.9",
    "data.workers=1",
    "compute.threads=1",
)


def start(folder: Path, *extra: str) -> subprocess.Popen[str]:
    """The console script in a process of its own, as a user starts it."""
    command = [sys.executable, "-m", "reca", "train", *ARGUMENTS, "--run", str(folder), *extra]
    return subprocess.Popen(command, cwd=folder.parent, stderr=subprocess.PIPE, text=True)


def wait_for_step(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    """Return once `step` is logged; fail if the process ends before."""
    metrics = folder / "metrics.jsonl"
    while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.01)


def final_hashes(folder: Path) -> dict[str, str]:
    checkpoint = folder / "checkpoints" / f"step-{STEPS:08d}"
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in checkpoint.glob("*.safetensors")
    }


@pytest.mark.slow
def test_a_run_killed_twice_ends_bitwise_like_one_left_alone(tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    process = start(straight)
    assert process.wait() == 0, process.stderr and process.stderr.read()
    for step, stop in ((4, signal.SIGKILL), (8, signal.SIGTERM)):
        process = start(killed, "--resume", "auto")
        wait_for_step(process, killed, step)
        process.send_signal(stop)
        assert process.wait() == (-signal.SIGKILL if stop == signal.SIGKILL else 75)
    process = start(killed, "--resume", "auto")
    assert process.wait() == 0, process.stderr and process.stderr.read()
    assert final_hashes(killed) == final_hashes(straight)
    assert set(final_hashes(killed)) == {"model.safetensors", "ema.safetensors", "optimizer.safetensors"}
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        rows = [
            [json.loads(line) for line in (run / name).read_text().splitlines()] for run in (straight, killed)
        ]
        timeless = [[{k: v for k, v in row.items() if k in EXACT or "/" in k} for row in run] for run in rows]
        assert timeless[0] == timeless[1]
    sheets = [sorted((run / "samples").glob("*.png")) for run in (straight, killed)]
    assert [s.read_bytes() for s in sheets[0]] == [s.read_bytes() for s in sheets[1]]


EXACT = {"step", "loss", "lr", "grad_norm", "psnr", "ssim", "understanding_cycle"}
