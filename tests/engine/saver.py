"""A process that is made to be killed: it imports torch once and forks a child for each job.

    request   {"job": name, ...arguments}   answer: the child's pid
    request   {"wait": pid}                 answer: its return code (negative: the signal)

A child may print lines of its own in between; it ends with the exit code of the error that stopped it.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from reca.engine.checkpoint import CheckpointState, find_latest, load_checkpoint, save_checkpoint
from reca.errors import RecaError
from reca.files import JsonLines, RunLock, at_crash_points, sweep_staging, write_safetensors


def say(value: Any) -> None:
    """One line in one write, so that those of parent and child do not mix."""
    os.write(1, (json.dumps(value) + "\n").encode())


def state_at(step: int, size: int = 96) -> CheckpointState:
    """What the toy run holds after `step` steps: every value depends on the step."""
    weight = torch.arange(size * size, dtype=torch.float32).view(size, size) / 7 + step
    bias = torch.full((5,), 1.0 / (step + 1), dtype=torch.bfloat16)
    return CheckpointState(
        step,
        model={"weight": weight, "bias": bias},
        optimizer={"exp_avg/weight": weight * 0.1, "exp_avg_sq/weight": weight.square() * 0.01},
        ema={"weight": weight - 0.5, "bias": bias},
        meta={"cursor": {"epoch": 0, "position": 3 * step}, "seed": 17},
    )


def equal(first: CheckpointState, second: CheckpointState) -> bool:
    """Whether two states are the same bit for bit, the versions that a save adds aside."""
    mine, theirs = first.tensors(), second.tensors()
    same = all(
        mine[stem].keys() == theirs[stem].keys()
        and all(torch.equal(mine[stem][name], theirs[stem][name]) for name in mine[stem])
        for stem in mine
    )
    facts = [{k: v for k, v in state.meta.items() if k != "versions"} for state in (first, second)]
    return same and first.step == second.step and facts[0] == facts[1]


def train(run: str, steps: int, keep: int) -> None:
    """Resume, then save after every step."""
    folder = Path(run)
    with RunLock(folder):
        sweep_staging(folder)
        swept = sweep_staging(folder / "checkpoints")
        latest = find_latest(folder / "checkpoints").path
        done = load_checkpoint(latest).step if latest else 0
        metrics, published = JsonLines(folder / "metrics.jsonl"), JsonLines(folder / "published.jsonl")
        metrics.truncate_after(done)
        say({"resumed": done, "swept": len(swept)})
        for step in range(done + 1, done + steps + 1):
            metrics.append({"step": step, "loss": 1.0 / step})
            save_checkpoint(folder / "checkpoints", step, state_at(step), keep=keep)
            published.append({"step": step})


def save_and_die(checkpoints: str, step: int, keep: int, moment: int) -> None:
    """Save twice (the second save replaces the first), killed at the given crash point, counted from 0."""
    seen = iter(range(moment + 1))

    def hook(name: str, path: Path) -> None:
        if next(seen) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    with at_crash_points(hook):
        save_checkpoint(Path(checkpoints), step, state_at(step), keep=keep)
        save_checkpoint(Path(checkpoints), step, state_at(step), keep=keep)


def hold(run: str, *, with_worker: bool = False) -> None:
    """Hold the lock of a run until killed; the worker is a forked process that outlives its parent."""
    with RunLock(Path(run)):
        worker = os.fork() if with_worker else 0
        if worker or not with_worker:
            say({"holding": worker})
        signal.pause()


def lock(run: str) -> None:
    """Take the lock of a run and end."""
    with RunLock(Path(run)):
        pass


def save_with_limit(checkpoints: str, step: int, limit: int) -> None:
    """Save under a limit of the size of any file, in bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    save_checkpoint(Path(checkpoints), step, state_at(step), keep=2)


def save_without_rights(checkpoints: str) -> None:
    """Save as a user who may not write there: the administrator may write everywhere."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    save_checkpoint(Path(checkpoints), 1, state_at(1), keep=1)


def write_large(path: str, size: int) -> None:
    """Print by how many bytes the process grew at most while it wrote a tensor of `size` bytes."""
    tensor = torch.full((size // 4,), 0.5)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    write_safetensors(Path(path), {"weight": tensor})
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    say({"grown": grown * 1024})


JOBS = {
    job.__name__: job
    for job in (train, save_and_die, hold, lock, save_with_limit, save_without_rights, write_large)
}


def child(request: dict[str, Any]) -> int:
    """Run one job; its error goes to stderr and becomes the exit code."""
    try:
        JOBS[request.pop("job")](**request)
    except RecaError as error:
        say({"error": str(error)})
        return error.exit_code
    return 0


def serve() -> None:
    """Answer requests until stdin ends."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            say(os.waitstatus_to_exitcode(status))
            continue
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                code = child(request)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        say(pid)


if __name__ == "__main__":
    serve()
