"""Registration of operators with the dispatcher; the only file that touches torch.library."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, ParamSpec, TypeVar, cast

import torch

from reca.kernels._launch import rehearse

P = ParamSpec("P")
R = TypeVar("R")

Impl = Literal["auto", "fused", "reference"]
"""auto follows the device; reference is plain traceable torch; fused is the Triton kernel or an error."""

_INTERPRETED: ContextVar[bool] = ContextVar("reca_interpreted", default=False)
LAUNCHERS: dict[str, Callable[..., Any]] = {}
"""Name of an operator -> what runs it on CUDA, for those who count launches without a GPU."""

_LIBRARY: Any = torch.library.Library("reca", "DEF")  # type: ignore[no-untyped-call]


def triton_interprets() -> bool:
    """Whether Triton interprets kernels, as it does if it was started with TRITON_INTERPRET=1."""
    from triton import knobs  # type: ignore[import-untyped]

    return bool(knobs.runtime.interpret)


@contextmanager
def interpreted_kernels() -> Iterator[None]:
    """Inside, operators run their Triton code on CPU tensors too, under the interpreter: slow, to verify.

    Raises: RuntimeError unless Triton was told to interpret.
    """
    if not triton_interprets():
        raise RuntimeError(
            "interpreted_kernels: Triton must interpret, but TRITON_INTERPRET is not 1; set it at the start"
        )
    token = _INTERPRETED.set(True)
    try:
        yield
    finally:
        _INTERPRETED.reset(token)


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, whose first argument is a tensor, in its own arithmetic whatever the caller's autocast."""

    @functools.wraps(function)
    def exact(*args: P.args, **kwargs: P.kwargs) -> R:
        first: Any = args[0]
        with torch.autocast(first.device.type, enabled=False):
            return function(*args, **kwargs)

    return exact


def runs_fused(impl: Impl, device: torch.device) -> bool:
    """Whether `impl` means the Triton code for tensors on `device`."""
    return impl == "fused" or (impl == "auto" and (device.type == "cuda" or _INTERPRETED.get()))


def can_run_fused(device: torch.device) -> bool:
    """Whether Triton code runs on tensors of `device`: on CUDA, or interpreted."""
    return device.type == "cuda" or _INTERPRETED.get()


def define_op(
    schema: str, *, cpu: Callable[..., Any], cuda: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Register `reca::<schema>` and return it as a callable.

    It gets an attribute `rehearse(*args)`: kernels that its launcher would start, for those who only count.

    Args:
        schema: "name(Tensor x, ...) -> Tensor", every mutation declared.
        cpu: the reference, on CPU tensors.
        cuda: the launcher; imports Triton on its first call.
        fake: shapes and dtypes of the outputs, for tracing.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, lambda *args: (cuda if _INTERPRETED.get() else cpu)(*args), "CPU")
    _LIBRARY.impl(name, cuda, "CUDA")
    LAUNCHERS[name] = cuda
    torch.library.register_fake(f"reca::{name}", fake, lib=_LIBRARY)
    operator: Any = getattr(torch.ops.reca, name).default
    operator.rehearse = functools.partial(rehearse, cuda)
    return cast(Callable[..., Any], operator)
