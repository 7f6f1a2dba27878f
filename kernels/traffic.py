# mypy: disable-error-code="import-untyped"
"""Bytes that operators really move, counted without a GPU: Triton's interpreter sees every address.

Distinct bytes are what memory must at least deliver; what a kernel reads twice costs L2 only while it still
lies there, so the total is reported beside them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from reca.kernels._library import LAUNCHERS, interpreted_kernels

# They overwrite what they change without reading it.
_OVERWRITING = frozenset({"aten::copy_", "aten::fill_", "aten::zero_"})
# They alias, whatever their schema says.
_SILENT = frozenset({"aten::_reshape_alias", "aten::_unsafe_view"})
# They read no argument's values, only its dtype and device.
_FILLING = frozenset({"aten::new_zeros", "aten::new_full", "aten::zeros_like", "aten::ones_like"})


@dataclass(frozen=True, slots=True)
class Moved:
    """Bytes of one direction: `distinct` counts every address once, `total` every access."""

    distinct: int
    total: int

    def __add__(self, other: Moved) -> Moved:
        return Moved(self.distinct + other.distinct, self.total + other.total)


@dataclass(frozen=True, slots=True)
class Traffic:
    """What one launch read and wrote.

    Attributes:
        kernel: name of the Triton function, or of torch's operator as in `aten::mm`.
        loads, stores: name of an argument -> its bytes, lanes that are masked off left out. Arguments that
            are parts of one storage share the name of the first. Atomics are a load and a store.
    """

    kernel: str
    loads: Mapping[str, Moved]
    stores: Mapping[str, Moved]

    @property
    def bytes(self) -> Moved:
        """Both directions, all arguments."""
        return sum((*self.loads.values(), *self.stores.values()), Moved(0, 0))


@contextmanager
def count_traffic() -> Iterator[list[Traffic]]:
    """Inside, operators run their Triton code interpreted, and every launch appends what it moved.

    Launches of torch's operators count, too: each operand once. Backward passes count if they run inside.

    Raises: RuntimeError unless Triton was told to interpret.
    """
    counted: list[Traffic] = []
    with interpreted_kernels(), _watched_interpreter(counted) as watcher, _Around(counted, watcher):
        yield counted


class _Watcher:
    """Addresses of the launch that runs, by direction."""

    def __init__(self) -> None:
        self.is_running = False
        self.seen: dict[str, list[tuple[Any, int]]] = {}

    def note(self, direction: str, pointers: Any, mask: Any) -> None:
        import numpy as np

        active = np.broadcast_to(mask.data, pointers.data.shape)
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        self.seen[direction].append((pointers.data[active], size))

    def moved(self, direction: str, arguments: Mapping[str, Any]) -> dict[str, Moved]:
        """Bytes by argument; raises if an access lies in none of them."""
        import numpy as np

        sizes = {size for _, size in self.seen[direction]}
        every = {
            size: np.concatenate(
                [found.ravel() for found, itemsize in self.seen[direction] if itemsize == size]
            )
            for size in sizes
        }
        result = {}
        for name, (start, stop) in _storages(arguments).items():
            here = {size: found[(found >= start) & (found < stop)] for size, found in every.items()}
            moved = Moved(
                sum(size * len(np.unique(found)) for size, found in here.items()),
                sum(size * len(found) for size, found in here.items()),
            )
            if moved.total:
                result[name] = moved
        accessed = sum(size * len(found) for size, found in every.items())
        assert accessed == sum(moved.total for moved in result.values()), "an access outside of all arguments"
        return result


def _storages(arguments: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Name of the first argument in each storage -> its addresses."""
    found: dict[tuple[int, int], str] = {}
    for name, value in arguments.items():
        for tensor in value if isinstance(value, tuple) else (value,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                found.setdefault((storage.data_ptr(), storage.data_ptr() + storage.nbytes()), name)
    return {name: place for place, name in found.items()}


@contextmanager
def _watched_interpreter(counted: list[Traffic]) -> Iterator[_Watcher]:
    from triton.runtime import interpreter

    watcher, builder = _Watcher(), interpreter.interpreter_builder
    run = interpreter.GridExecutor.__call__
    load, store, rmw = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw

    def watched_run(self: Any, *arguments: Any, **constants: Any) -> None:
        watcher.seen = {"load": [], "store": []}
        watcher.is_running = True
        try:
            run(self, *arguments, **constants)
        finally:
            watcher.is_running = False
        named = dict(zip(self.arg_names, arguments, strict=False)) | constants
        moved = (watcher.moved(direction, named) for direction in ("load", "store"))
        counted.append(Traffic(self.fn.__name__, *moved))

    def watched_load(pointers: Any, mask: Any, *others: Any, **named: Any) -> Any:
        watcher.note("load", pointers, mask)
        return load(pointers, mask, *others, **named)

    def watched_store(pointers: Any, value: Any, mask: Any, *others: Any) -> Any:
        watcher.note("store", pointers, mask)
        return store(pointers, value, mask, *others)

    def watched_rmw(operation: Any, pointers: Any, value: Any, mask: Any, *others: Any) -> Any:
        watcher.note("load", pointers, mask)
        watcher.note("store", pointers, mask)
        return rmw(operation, pointers, value, mask, *others)

    interpreter.GridExecutor.__call__ = watched_run
    builder.create_masked_load, builder.create_masked_store = watched_load, watched_store
    builder.create_atomic_rmw = watched_rmw
    try:
        yield watcher
    finally:
        interpreter.GridExecutor.__call__ = run
        del builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw


class _Around(TorchDispatchMode):
    """Counts torch's own operators, and looks into ours by calling their launchers."""

    def __init__(self, counted: list[Traffic], watcher: _Watcher) -> None:
        super().__init__()
        self._counted = counted
        self._watcher = watcher

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if func.namespace == "reca":
            with self:
                return LAUNCHERS[func._schema.name.removeprefix("reca::")](*args, **named)
        out = func(*args, **named)
        # The interpreter moves its arguments to and fro; a GPU has them where they are.
        if not self._watcher.is_running:
            self._count(func._schema, args, named, out)
        return out

    def _count(self, schema: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        given = [
            (
                argument,
                args[place] if place < len(args) else kwargs.get(argument.name),
                argument.alias_info is not None and argument.alias_info.is_write,
            )
            for place, argument in enumerate(schema.arguments)
        ]
        returned = [value.alias_info for value in schema.returns]
        written = [value for _, value, is_written in given if is_written]
        if (any(returned) and not written) or schema.name in _SILENT or "empty" in schema.name:
            return
        values = {argument.name: value for argument, value, _ in given}
        overwrites = schema.name in _OVERWRITING or values.get("beta") == 0
        loads = {
            argument.name: _once(value)
            for argument, value, is_written in given
            if _tensors(value)
            and schema.name not in _FILLING
            and not (is_written and (overwrites or argument.kwarg_only))
        }
        self._counted.append(Traffic(schema.name, loads, {"result": _once(written or out)}))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value for tensor in _tensors(part)] if isinstance(value, (tuple, list)) else []


def _once(value: Any) -> Moved:
    """Every element of every tensor once, those that a stride of 0 repeats once only."""
    size = 0
    for tensor in _tensors(value):
        extents = [
            n if stride else min(n, 1) for n, stride in zip(tensor.shape, tensor.stride(), strict=True)
        ]
        size += prod(extents) * tensor.itemsize
    return Moved(size, size)
