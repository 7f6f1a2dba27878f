"""Where the trained tensors live: a few flat buffers, so that one launch reaches all tensors of a kind.

Under bf16 arithmetic the weights of linear layers and convolutions are stored as the forward reads them: in
bf16, with the 16 bits that are missing to their fp32 masters apart. It casts nothing, and no bit is lost.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from reca.config import OptimConfig
from reca.errors import CheckpointError, ConfigError
from reca.kernels import join_master, split_master

ALIGNMENT = 256
"""Every tensor starts at a multiple of this: room for vector loads, and whole blocks of 8-bit moments."""


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of one tensor in the flat buffers of its group."""

    name: str
    shape: torch.Size
    start: int

    @property
    def numel(self) -> int:
        """Elements of the tensor, without what is added to align the next one."""
        return prod(self.shape)

    @property
    def padded(self) -> int:
        """Elements up to the start of the next tensor."""
        return -(-self.numel // ALIGNMENT) * ALIGNMENT

    def view(self, flat: Tensor) -> Tensor:
        """The tensor's part of a buffer of its group, in its shape."""
        return flat[self.start : self.start + self.numel].view(self.shape)


@dataclass(slots=True)
class Group:
    """Trained tensors of one kind, one after another.

    Attributes:
        decays: whether weight decay acts on them.
        is_small: they are vectors or scalars: many, and few elements in all.
        slots: in the order of the parameters.
        start: elements in the groups before this one.
        weight: [count] fp32, or bf16 as the forward reads it.
        low: [count] int16 beside a bf16 weight, the other half of its fp32 master; None if there is none.
    """

    decays: bool
    is_small: bool
    slots: list[Slot]
    start: int
    weight: Tensor
    low: Tensor | None

    @property
    def count(self) -> int:
        """Elements, with what aligns them."""
        return sum(slot.padded for slot in self.slots)

    def master(self) -> Tensor:
        """[count] fp32 (bf16 if there is no more): the buffer itself, or the two halves joined."""
        return self.weight if self.low is None else join_master(self.weight, self.low)


class Weights:
    """The trained tensors of a model, moved into flat buffers; the parameters become views of them.

    Args:
        parameters: name -> trained tensor, fp32, on one device.
        config: what is decayed, and whether weights in bf16 keep the other half of their masters.
        halves: names of those that the forward reads in bf16.

    Attributes:
        parameters: name -> parameter.
        groups: buffers; tensors of one group are updated in one pass.

    Raises: ConfigError for a pattern of `no_decay` that matches nothing; TypeError unless tensors are fp32.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], config: OptimConfig, halves: Collection[str] = ()
    ) -> None:
        for part in config.no_decay:
            if not any(part in name for name in parameters):
                raise ConfigError(f"optim.no_decay: no trained tensor's name contains {part!r}; drop it")
        self.parameters = dict(parameters)
        kinds: dict[tuple[bool, bool, bool], list[Slot]] = {}
        for name, parameter in parameters.items():
            if parameter.dtype != torch.float32:
                raise TypeError(
                    f"Weights: trained tensors must be float32 masters, got {parameter.dtype} for {name!r}"
                )
            slots = kinds.setdefault(
                (_decays(name, parameter, config), parameter.ndim < 2, name in halves), []
            )
            slots.append(Slot(name, parameter.shape, sum(slot.padded for slot in slots)))
        self.groups: list[Group] = []
        for (decays, is_small, is_half), slots in kinds.items():
            self.groups.append(self._group(decays, is_small, is_half, config.weights == "exact", slots))
        self.attach()

    def _group(self, decays: bool, is_small: bool, is_half: bool, is_exact: bool, slots: list[Slot]) -> Group:
        """A filled group, after those that are there already."""
        device = self.parameters[slots[0].name].device
        count, start = sum(slot.padded for slot in slots), sum(group.count for group in self.groups)
        weight = torch.zeros(count, dtype=torch.bfloat16 if is_half else torch.float32, device=device)
        low = torch.zeros(count, dtype=torch.int16, device=device) if is_half and is_exact else None
        group = Group(decays, is_small, slots, start, weight, low)
        for slot in slots:
            _store(group, slot, self.parameters[slot.name].detach())
            self.parameters[slot.name].data = torch.empty(0, device=device)  # frees what has been moved
        return group

    def attach(self) -> None:
        """Let the parameters be the views of the buffers; their gradients are dropped."""
        for group in self.groups:
            for slot in group.slots:
                self.parameters[slot.name].grad = None
                self.parameters[slot.name].data = slot.view(group.weight)

    def by_name(self, flats: Sequence[Tensor]) -> dict[str, Tensor]:
        """Name -> its part of buffers that are laid out like the groups, in the order of the parameters."""
        pairs = zip(self.groups, flats, strict=True)
        views = {slot.name: slot.view(flat) for group, flat in pairs for slot in group.slots}
        return {name: views[name] for name in self.parameters}

    def masters(self) -> Mapping[str, Tensor]:
        """Name -> fp32 master (bf16 if there is no more), not copied or joined before it is asked for."""
        return _Masters(self)

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from `masters()`. Raises CheckpointError, before any copy, unless all of them fit."""
        refuse_misfit("weights", self.masters(), tensors)
        for group in self.groups:
            for slot in group.slots:
                _store(group, slot, tensors[slot.name].to(group.weight.device))


class _Masters(Mapping[str, Tensor]):
    """Joins the two halves of a master when it is asked for: a save holds one tensor at a time."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._slots = {slot.name: (group, slot) for group in weights.groups for slot in group.slots}

    def __getitem__(self, name: str) -> Tensor:
        group, slot = self._slots[name]
        weight = slot.view(group.weight)
        return weight if group.low is None else join_master(weight, slot.view(group.low))

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights.parameters)

    def __len__(self) -> int:
        return len(self._weights.parameters)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter for all that require gradients. Raises ConfigError if there is none."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ConfigError(
            "nothing to train: no parameter of the model requires gradients; check what the recipe freezes"
        )
    return trained


def read_in_bf16(model: nn.Module) -> frozenset[str]:
    """Names of the trained tensors that autocast would cast: those of linear layers and convolutions only."""
    cast: set[int] = set()
    kept: set[int] = set()
    for module in model.modules():
        held = cast if isinstance(module, (nn.Linear, _ConvNd)) else kept
        held.update(id(parameter) for parameter in module.parameters(recurse=False))
    return frozenset(name for name, p in trained_parameters(model).items() if id(p) in cast - kept)


def _decays(name: str, parameter: Tensor, config: OptimConfig) -> bool:
    if not config.weight_decay:
        return False
    return (config.decay_vectors or parameter.ndim > 1) and not any(part in name for part in config.no_decay)


def _store(group: Group, slot: Slot, master: Tensor) -> None:
    """Put a tensor into its place; only an exact group keeps all bits of an fp32 one."""
    if group.low is None:
        slot.view(group.weight).copy_(master)
        return
    high, low = split_master(master)
    slot.view(group.weight).copy_(high)
    slot.view(group.low).copy_(low)


def refuse_misfit(what: str, into: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError unless `source` has exactly the names, shapes and dtypes of `into`."""
    missing, unexpected = into.keys() - source.keys(), source.keys() - into.keys()
    if missing or unexpected:
        raise CheckpointError(
            f"checkpoint: the {what} does not fit the model: {_listed('missing', missing)}, "
            f"{_listed('unexpected', unexpected)}; resume with the configuration it was written with"
        )
    for name, tensor in into.items():
        if tensor.shape != source[name].shape or tensor.dtype != source[name].dtype:
            raise CheckpointError(
                f"checkpoint: {what} {name!r} must be {tuple(tensor.shape)} {tensor.dtype}, "
                f"got {tuple(source[name].shape)} {source[name].dtype}"
            )


@torch.no_grad()
def copy_exactly(what: str, into: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    """Copy named tensors in place. Raises CheckpointError, before any copy, unless all of them fit."""
    refuse_misfit(what, into, source)
    for name, tensor in into.items():
        tensor.copy_(source[name])


def _listed(label: str, names: Collection[str]) -> str:
    return f"{len(names)} {label}" + (f" (first {min(names)!r})" if names else "")
