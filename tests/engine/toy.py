"""A toy family, its loader and a job: the smallest things that keep the contracts of `reca.types`.

Run as a program it trains until it is stopped, for tests that send signals to a process.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reca.config import (
    CheckpointConfig,
    ConversationConfig,
    DataConfig,
    OptimConfig,
    SampleConfig,
    TrainConfig,
)
from reca.engine.loop import Job, run
from reca.errors import RecaError
from reca.randomness import RandomSource
from reca.types import Batch, Draws, StepBatches

DIM = 5
PICTURES = 37  # odd and small: 20 steps wrap around several times


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyBatch(Batch):
    clean: Tensor  # [num_images, DIM] fp32
    mask: Tensor  # [num_images] fp32, 1 = counts in the loss


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyDraws(Draws):
    noise: Tensor  # [num_images, DIM] fp32
    time: Tensor  # [num_images, 1] fp32


class ToyModel(nn.Module):
    """A frozen encoder, two trained blocks, a velocity loss and (with `captions`) a second term."""

    def __init__(self, seed: int = 0, captions: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.encoder = nn.Linear(DIM, 3)
            self.first = nn.Sequential(nn.Linear(DIM + 3 + 1, 11), nn.Tanh())
            self.second = nn.Sequential(nn.Linear(11, 7), nn.Tanh())
            self.head = nn.Linear(7, DIM)
        self.captions = captions
        self.encoder.requires_grad_(False)

    def draw(self, batch: ToyBatch, random: RandomSource) -> ToyDraws:
        counts = {"reconstruction": batch.mask.sum() * DIM}
        if self.captions:
            counts["image_to_text"] = batch.mask.sum()
        return ToyDraws(
            counts=counts,
            noise=random.normal("noise", batch.sample_ids, DIM),
            time=random.uniform("time", batch.sample_ids, 1),
        )

    def forward(self, batch: ToyBatch, draws: ToyDraws) -> dict[str, Tensor]:
        noisy = (1 - draws.time) * batch.clean + draws.time * draws.noise
        hidden = torch.cat([noisy, self.encoder(batch.clean).float(), draws.time], dim=1)
        velocity = self.head(self.second(self.first(hidden))).float()
        error = (velocity - (draws.noise - batch.clean)).square()
        terms = {"reconstruction": (error.sum(dim=1) * batch.mask).sum()}
        if self.captions:
            terms["image_to_text"] = (velocity.mean(dim=1).abs() * batch.mask).sum()
        return terms

    def blocks(self) -> Sequence[nn.Module]:
        return [self.first, self.second]

    def flops(self, batch: ToyBatch) -> int:
        return 6 * batch.num_images * sum(p.numel() for p in self.parameters() if p.requires_grad)


def toy_batch(sample_ids: Sequence[int], **changes: Any) -> ToyBatch:
    ids = torch.tensor(sample_ids, dtype=torch.int64)
    clean = RandomSource(7).normal("clean", ids % PICTURES, DIM)
    batch = ToyBatch(
        sample_ids=ids, num_images=len(ids), num_tokens=3 * len(ids), clean=clean, mask=torch.ones(len(ids))
    )
    return replace(batch, **changes)


class ToyLoader:
    """Step k holds the next `images` sample ids, in microbatches of `micro`; `spoil` may change one."""

    def __init__(
        self, images: int = 6, micro: int = 4, spoil: Callable[[int, ToyBatch], ToyBatch] | None = None
    ) -> None:
        self.images, self.micro, self.spoil = images, micro, spoil
        self.next = 0
        self.closed = False
        self.on_wait: Callable[[], None] = lambda: None

    def __next__(self) -> StepBatches:
        self.on_wait()
        ids = range(self.next * self.images, (self.next + 1) * self.images)
        self.next += 1
        batches = [toy_batch(ids[i : i + self.micro]) for i in range(0, len(ids), self.micro)]
        if self.spoil is not None:
            batches = [self.spoil(self.next, batch) for batch in batches]
        return StepBatches(tuple(batches), cursor={"next": self.next}, rejected=self.next // 4)

    def restore(self, cursor: Mapping[str, Any]) -> None:
        self.next = int(cursor["next"])

    def close(self) -> None:
        self.closed = True


def toy_config(**changes: Any) -> TrainConfig:
    """A run with every feature on: accumulation, EMA, clipping, warm-up, cosine, evaluations, saves."""
    config: dict[str, Any] = {
        "recipe": "toy",
        "model": "toy/small",
        "data": DataConfig(path="toy", images=6, micro_images=4, workers=0),
        "optim": OptimConfig(
            lr=3e-2, schedule="cosine", min_lr=1e-3, warmup_steps=3, ema=0.9, clip_norm=0.5, weight_decay=0.01
        ),
        "sample": SampleConfig(every=5),
        "checkpoint": CheckpointConfig(every=4, keep=2),
        "steps": 20,
        "seed": 11,
    }
    if "image_to_text" in changes.get("loss_weights", {}):
        config["image_to_text"] = ConversationConfig(path="toy.json", images=6)
    return TrainConfig(**(config | changes))


def toy_job(folder: Path, config: TrainConfig | None = None, **changes: Any) -> Job:
    model = changes.pop("model", None) or ToyModel()

    def evaluate(step: int, samples: Path) -> dict[str, float]:
        samples.mkdir(parents=True, exist_ok=True)
        (samples / f"{step:08d}.txt").write_text("a picture")
        batch = toy_batch(range(1000, 1008))
        return {"error": float(model(batch, model.draw(batch, RandomSource(0)))["reconstruction"])}

    job = Job(
        config=config or toy_config(),
        model=model,
        loader=ToyLoader(),
        folder=folder,
        evaluate=evaluate,
        fingerprint={"weights": "sha256:1", "data": "sha256:2"},
        on_progress=lambda record: None,
    )
    return replace(job, **changes)


if __name__ == "__main__":
    torch.set_num_threads(1)

    def announce(record: Mapping[str, Any]) -> None:
        print(record["step"], flush=True)

    endless = toy_config(
        steps=10_000_000, optim=OptimConfig(lr=1e-3), checkpoint=CheckpointConfig(every=10_000_000)
    )
    try:
        run(toy_job(Path(sys.argv[1]), endless, on_progress=announce))
    except RecaError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
