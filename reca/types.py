"""The contracts between models, data and engine, and nothing else.

Randomness is an input: `draw` makes every random decision of a microbatch and returns it as tensors; the
forward
pass is then a pure function of (batch, draws). The model owns its loss and returns sums by name; the engine
owns the normalisation and divides by global counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, Self, TypeAlias, TypeVar, runtime_checkable

import torch
from PIL import Image
from torch import Tensor, nn

from reca.randomness import RandomSource

LossTerms: TypeAlias = Mapping[str, Tensor]
"""Name -> scalar fp32 tensor: a SUM over elements, never a mean."""


Text: TypeAlias = str | tuple[tuple[str, str], ...] | None
"""What a sample says: an instruction or caption (None: dropped), or the (question, answer) turns about it."""


def _map_tensors(value: Any, function: Any) -> Any:
    """Apply `function` to every tensor inside structs, tuples and mappings; leave the rest as it is."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, TensorStruct):
        return replace(
            value, **{f.name: _map_tensors(getattr(value, f.name), function) for f in fields(value)}
        )
    if isinstance(value, tuple):
        return tuple(_map_tensors(item, function) for item in value)
    if isinstance(value, Mapping):
        return {key: _map_tensors(item, function) for key, item in value.items()}
    return value


@dataclass(frozen=True, slots=True)
class TensorStruct:
    """A frozen bundle of tensors (also inside tuples, mappings and nested structs) that moves as one."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same bundle with `function` applied to every tensor; everything else is shared."""
        mapped: Self = _map_tensors(self, function)
        return mapped

    def to(self, device: torch.device, *, non_blocking: bool = True) -> Self:
        """The same bundle with every tensor on `device`; everything else is shared."""
        moved: Self = _map_tensors(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))
        return moved

    def pin_memory(self) -> Self:
        """The same bundle in page-locked memory, so that `to` can overlap with computation."""
        pinned: Self = _map_tensors(self, lambda tensor: tensor.pin_memory())
        return pinned


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch(TensorStruct):
    """One microbatch as a loader yields it; a family adds its own fields.

    Attributes:
        sample_ids: [num_images] int64, global indices in the sample stream: the identity of every random
            draw.
        num_images: images whose reconstruction counts.
        num_tokens: sequence tokens, for throughput.
    """

    sample_ids: Tensor
    num_images: int
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws(TensorStruct):
    """Every random decision of one microbatch; a family adds its own fields.

    Attributes:
        counts: name of a loss term -> scalar tensor, the number of elements that term will sum.
    """

    counts: LossTerms


B = TypeVar("B", bound=Batch, contravariant=True)
D = TypeVar("D", bound=Draws)


@runtime_checkable
class ReconstructionModel(Protocol[B, D]):
    """All the engine knows of a model, which is an `nn.Module`; what is trained has `requires_grad`."""

    def draw(self, batch: B, random: RandomSource) -> D:
        """Every random decision of this microbatch, on the batch's device."""
        ...

    def __call__(self, batch: B, draws: D) -> LossTerms:
        """The whole forward pass; the names are those of `draws.counts`."""
        ...

    def blocks(self) -> Sequence[nn.Module]:
        """The units that the engine shards, recomputes and compiles, in order of execution."""
        ...

    def flops(self, batch: B) -> int:
        """Least FLOPs of forward + backward (a multiply-add is 2); backward of trained parts only."""
        ...


@dataclass(frozen=True, slots=True)
class StepBatches:
    """All microbatches of one optimizer step.

    Attributes:
        microbatches: on the CPU, in order; how a step is cut into them does not change its gradients.
        cursor: JSON-ready position of the data stream just after this step; `StepLoader.restore` takes it.
        rejected: samples rejected since the start of the run, this step included.
    """

    microbatches: tuple[Batch, ...]
    cursor: Mapping[str, Any]
    rejected: int = 0


class StepLoader(Protocol):
    """An endless, deterministic, resumable stream of steps.

    Attributes:
        on_wait: called a few times a second while `__next__` waits; what it raises abandons the step. A
            signal handler must not raise into the loader: it may hold locks that its workers need.
    """

    on_wait: Callable[[], None]

    def __next__(self) -> StepBatches: ...

    def restore(self, cursor: Mapping[str, Any]) -> None:
        """Continue just after the step that yielded `cursor`; before the first `__next__`."""
        ...

    def close(self) -> None:
        """End worker processes; idempotent."""
        ...


class Example(Protocol):
    """One prepared training sample, on the CPU. `num_tokens` is what the packer counts."""

    @property
    def num_tokens(self) -> int:
        """Sequence tokens of this sample."""
        ...


class Processor(Protocol):
    """How a family turns the samples of one task into batches.

    Runs in loader workers: picklable, and holds no model.
    """

    def prepare(self, image: Image.Image, text: Text, random: RandomSource, sample_id: int) -> Example:
        """Resize, normalise and tokenise one RGB image and its text.

        Random decisions come from `random` keyed by `sample_id`. By task, `text` is the reconstruction
        instruction, the turns of a conversation, or a caption; None: it is dropped (the loader has drawn that
        already).
        """
        ...

    def collate(self, examples: Sequence[Any], sample_ids: Sequence[int]) -> Batch:
        """One microbatch of prepared examples, in this order."""
        ...
