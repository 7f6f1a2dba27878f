"""What a piece of training would launch on a GPU, counted without one: kernels, FLOPs, bytes, live memory.

Meant for tensors without values (`FakeTensorMode`), where a step of any size takes seconds and no memory.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import flop_registry

from reca.profiling.kernel_counts import KERNELS, over_lists

Shape = tuple[int, ...]

_ALLOCATION = 512  # the CUDA caching allocator rounds every block up to a multiple of this
# Allocate, alias or ask only: they launch nothing although they are no views by their schema.
_SILENT = frozenset(
    {
        "aten::_reshape_alias",
        "aten::_unsafe_view",
        "aten::alias",
        "aten::detach",
        "aten::empty",
        "aten::empty_like",
        "aten::empty_strided",
        "aten::is_pinned",
        "aten::lift_fresh",
        "aten::new_empty",
        "aten::new_empty_strided",
        "aten::resize_",
        "aten::set_",
    }
)
_REHEARSED: dict[Hashable, int] = {}


@dataclass(frozen=True, slots=True)
class Launch:
    """One kind of operator call; equal calls are counted together.

    Attributes:
        operator: as in `aten::mm`.
        kind: `matmul` (convolutions, too), `attention`, `attention_backward` or `memory`.
        is_wide: computes in fp32 or wider, so that 16-bit tensor cores do not help.
        flops: a multiply-add is 2; 0 for kind `memory`.
        bytes: read and written, each operand once.
        kernels: that the call launches.
    """

    operator: str
    kind: str
    is_wide: bool
    flops: int
    bytes: int
    kernels: int = 1


class LaunchCounter(TorchDispatchMode):
    """Counts what runs inside it, and the memory of what is allocated inside it.

    Enter it inside the `FakeTensorMode` whose tensors it shall see. Views, allocations and questions to the
    dispatcher launch nothing. An operator without a FLOP formula moves memory only. Kernels are those of
    `reca.profiling.kernel_counts`, which says what is approximated; an operator with an attribute
    `rehearse(*args)` (Triton launches of its launcher on such tensors) is counted by calling that.

    Attributes:
        launches: kind of call -> how often.
        live_bytes, peak_bytes: of storages allocated inside: now, and at most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[Launch] = Counter()
        self.live_bytes = self.peak_bytes = 0
        self._live: set[int] = set()

    @property
    def kernels(self) -> int:
        """Kernels launched so far."""
        return sum(launch.kernels * times for launch, times in self.launches.items())

    @property
    def flops(self) -> int:
        """FLOPs so far."""
        return sum(launch.flops * times for launch, times in self.launches.items())

    @property
    def bytes(self) -> int:
        """Operand bytes so far."""
        return sum(launch.bytes * times for launch, times in self.launches.items())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operator and count it."""
        named = kwargs or {}
        # What returns nothing is only counted: some of these operators have no rule for shapes.
        out = func(*args, **named) if func._schema.returns else None
        if func.namespace != "prim":
            aliases = [returned.alias_info for returned in func._schema.returns]
            if not any(aliases):
                for tensor in _tensors(out):
                    self._allocate(tensor)
            written = [*_written(func, args, named)]
            if (written or not any(aliases)) and func._schema.name not in _SILENT:
                self._count(func, args, named, out, written)
        return out

    def _count(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        out: Any,
        written: Sequence[Tensor],
    ) -> None:
        operator = func._schema.name
        formula = _FORMULAS.get(operator) or _registered(func)
        flops = int(formula(args, kwargs, out)) if formula is not None else 0
        inputs = [*_tensors((*args, *kwargs.values()))]
        results = written or [*_tensors(out)]
        launch = Launch(
            operator=operator,
            kind=_kind(operator) if flops else "memory",
            is_wide=any(tensor.is_floating_point() and tensor.itemsize > 2 for tensor in inputs[:2]),
            flops=flops,
            bytes=sum(tensor.numel() * tensor.itemsize for tensor in (*inputs, *results)),
            kernels=_kernels(func, args, out),
        )
        self.launches[launch] += 1

    def _allocate(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) in self._live:
            return
        size = _ALLOCATION * -(-storage.nbytes() // _ALLOCATION)
        self._live.add(id(storage))
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._free, id(storage), size).atexit = False

    def _free(self, key: int, size: int) -> None:
        self._live.discard(key)
        self.live_bytes -= size


def _kernels(func: Any, args: tuple[Any, ...], out: Any) -> int:
    """What a call launches, by the operator's own account where it has one."""
    operator = func._schema.name
    if "::_foreach_" in operator or "::_fused_" in operator:
        return over_lists(args, out)
    if operator in KERNELS:
        return KERNELS[operator](args)
    return 1 if getattr(func, "rehearse", None) is None else _rehearsed(func, args)


def _rehearsed(func: Any, args: tuple[Any, ...]) -> int:
    """Triton's launches and torch's around them, from a call of the launcher; cached by shape."""
    key = (func, *map(_outline, args))
    if key not in _REHEARSED:
        with _disable_current_modes(), FakeTensorMode(), LaunchCounter() as around:
            started = func.rehearse(*map(_without_values, args))
        if started is None:
            return 1  # without Triton a launcher cannot be asked
        _REHEARSED[key] = started + around.kernels
    return _REHEARSED[key]


def _outline(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    return tuple(map(_outline, value)) if isinstance(value, (list, tuple)) else value


def _without_values(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return [*map(_without_values, value)] if isinstance(value, (list, tuple)) else value


def _tensors(values: Any) -> Iterator[Tensor]:
    """All tensors of an operator's arguments or results, in order; lists of tensors are opened."""
    for value in values if isinstance(values, (tuple, list)) else (values,):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """The arguments that an operator changes in place."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from _tensors(args[index] if index < len(args) else kwargs.get(argument.name))


def _kind(operator: str) -> str:
    if "attention" not in operator and "attn" not in operator:
        return "matmul"
    return "attention_backward" if "backward" in operator else "attention"


def _registered(func: Any) -> Callable[..., int] | None:
    """Torch's own formula, or one that an operator registered with `register_flop_formula`."""
    formula = flop_registry.get(func._overloadpacket)
    if formula is None:
        return None
    return lambda args, kwargs, out: int(formula(*args, **kwargs, out_val=out))


def _attention(query: Shape, key: Shape, is_causal: bool) -> int:
    """Forward of [batch, heads, rows, dim], grouped heads included; causal pairs where they are visible."""
    rows, columns = query[-2], key[-2]
    pairs = rows * (rows + 1) // 2 if is_causal else rows * columns
    return 4 * prod(query[:-2]) * pairs * query[-1]


def _attention_forward(args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> int:
    is_causal = bool(args[4] if len(args) > 4 else kwargs.get("is_causal", False))
    return _attention(args[0].shape, args[1].shape, is_causal)


def _attention_backward(args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> int:
    # 10 to the forward's 4: scores are recomputed, then four products
    is_causal = bool(args[7] if len(args) > 7 else kwargs.get("is_causal", False))
    return _attention(args[1].shape, args[2].shape, is_causal) * 10 // 4


def _segments_forward(args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> int:
    query, query_lengths, key_lengths, is_causal = args[0], *args[3:6]
    pairs = 0
    for rows, columns in zip(query_lengths, key_lengths, strict=True):
        hidden = rows * (rows - 1) // 2 if is_causal else 0  # the last row sees all, the one before one less
        pairs += rows * columns - hidden
    return 4 * query.shape[1] * query.shape[2] * pairs


def _segments_backward(args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> int:
    return _segments_forward((args[1], *args[2:4], *args[6:9]), kwargs, out) * 10 // 4


def _convolution_backward(args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> int:
    """Both gradients; torch's own count takes a depthwise convolution for a dense one."""
    gradient, weight, wanted = args[0].shape, args[2].shape, args[-1]
    return 2 * prod(weight) * gradient[0] * prod(gradient[2:]) * (int(wanted[0]) + int(wanted[1]))


_FORMULAS: dict[str, Callable[..., int]] = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention_forward,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "aten::convolution_backward": _convolution_backward,
    "reca_profiling::attention": _segments_forward,
    "reca_profiling::attention_backward": _segments_backward,
}
