"""All that changes while a run goes on, on the device and on the host, and how it becomes a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from reca.config import ComputeConfig, TrainConfig
from reca.engine.checkpoint import CheckpointState
from reca.engine.ema import Ema
from reca.engine.optim import AdamW
from reca.engine.weights import Weights, read_in_bf16, trained_parameters
from reca.errors import CheckpointError, ConfigError
from reca.layers.stream import Stream


@dataclass(slots=True)
class Progress:
    """The host's counters, JSON-ready; with the tensors they are everything that a resume needs.

    Attributes:
        cursor: position of the data stream after the last finished step; None before the first.
        images: images trained on, skipped steps included.
        rejected: samples that the data path rejected.
        seconds: wall-clock time spent in the run, over all its sessions.
        evaluated: last step that was evaluated; -1 before the first evaluation.
        before, after: metrics of the first and of the latest evaluation.
        skipped_steps: steps that were not finite.
        bad_in_a_row: how many of the latest steps were not finite.
        notes: what a reader of the results should know.
    """

    cursor: Mapping[str, Any] | None = None
    images: int = 0
    rejected: int = 0
    seconds: float = 0.0
    evaluated: int = -1
    before: dict[str, float | None] = field(default_factory=dict)
    after: dict[str, float | None] = field(default_factory=dict)
    skipped_steps: int = 0
    bad_in_a_row: int = 0
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Progress:
        """The counters of a checkpoint. Raises CheckpointError if one is missing or unknown."""
        known = {f.name for f in fields(cls)}
        if record.keys() != known:
            raise CheckpointError(
                f"checkpoint: counters must be {sorted(known)}, got {sorted(record)}; it is another version's"
            )
        return cls(**record)


@dataclass(slots=True)
class TrainState:
    """A run in progress.

    Attributes:
        config: the run's configuration.
        model: a `ReconstructionModel`; the optimizer's `weights` hold the masters of its trained tensors.
        optimizer: moments and update counter of the trained tensors.
        ema: their average, or None.
        step: optimizer steps done, skipped ones included.
        progress: counters on the host.
    """

    config: TrainConfig
    model: Any
    optimizer: AdamW
    ema: Ema | None
    step: int = 0
    progress: Progress = field(default_factory=Progress)

    @classmethod
    def start(cls, model: nn.Module, config: TrainConfig, device: torch.device) -> TrainState:
        """The state before step 1: the model moved and cast, moments zero, the average at the weights."""
        prepare_weights(model, device)
        return cls.of(model, config)

    @classmethod
    def of(cls, model: nn.Module, config: TrainConfig) -> TrainState:
        """The state before step 1 of a model that lies where it shall, its trained tensors in fp32."""
        optim, compute = config.optim, config.compute
        halves = read_in_bf16(model) if compute.precision == "bf16" else ()
        weights = Weights(trained_parameters(model), optim, halves)
        ema = Ema(weights, optim.ema) if optim.ema is not None else None
        return cls(config, model, AdamW(weights, optim, config.steps, compute.kernels, config.seed), ema)

    def to_checkpoint(self, identity: Mapping[str, Any]) -> CheckpointState:
        """Every tensor a resume needs, not copied, and the counters; `identity`: what the run is made of."""
        return CheckpointState(
            step=self.step,
            model=self.optimizer.weights.masters(),
            optimizer=self.optimizer.state(),
            ema=self.ema.state() if self.ema is not None else {},
            meta={
                "progress": asdict(self.progress),
                "updates": int(self.optimizer.updates),
                "identity": dict(identity),
            },
        )

    def restore(self, saved: CheckpointState) -> None:
        """Continue from a checkpoint, bit for bit. Raises CheckpointError if something does not fit."""
        self.optimizer.weights.restore(saved.model)
        self.optimizer.restore(saved.optimizer, saved.meta["updates"])
        if self.ema is not None:
            self.ema.restore(saved.ema)
        self.step = saved.step
        self.progress = Progress.of(saved.meta["progress"])

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the model computes with the averaged weights if an average is kept."""
        return self.ema.applied() if self.ema is not None else nullcontext()


def prepare_weights(model: nn.Module, device: torch.device) -> None:
    """Move the model; trained tensors become fp32 masters, frozen ones keep the dtype they came with."""
    model.to(device)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)


def select_device(compute: ComputeConfig) -> torch.device:
    """The device of the run. Raises ConfigError if CUDA is asked for and absent."""
    if compute.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "compute.device=cuda, but torch sees no CUDA device; see `reca doctor` or set compute.device=auto"
        )
    if compute.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


@contextmanager
def recomputed(blocks: Sequence[nn.Module], enabled: bool) -> Iterator[None]:
    """Inside, the backward pass runs the forward of each block again instead of storing its activations."""
    # The random numbers of a step are inputs, so there is no generator state to stash for the second forward.
    wrapped = list(dict.fromkeys(blocks)) if enabled else []
    for block in wrapped:
        original = block.forward

        def forward(*args: Any, _original: Any = original, **kwargs: Any) -> Any:
            # A block's arguments are kept: of a stream one tensor instead of two.
            args = tuple(Stream(value.rows) if isinstance(value, Stream) else value for value in args)
            return checkpoint(_original, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        block.forward = forward
    try:
        yield
    finally:
        for block in wrapped:
            del block.forward
