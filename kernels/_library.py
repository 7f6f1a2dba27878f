"""Registration of operators with the dispatcher; the only file that touches torch.library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

Impl = Literal["auto", "fused", "reference"]
"""auto follows the device; reference is plain traceable torch; fused is the Triton kernel or an error."""

_LIBRARY: Any = torch.library.Library("reca", "DEF")  # type: ignore[no-untyped-call]


def define_op(
    schema: str, *, cpu: Callable[..., Any], cuda: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Register `reca::<schema>` and return it as a callable.

    Args:
        schema: "name(Tensor x, ...) -> Tensor", every mutation declared.
        cpu: the reference, on CPU tensors.
        cuda: the launcher; imports Triton on its first call.
        fake: shapes and dtypes of the outputs, for tracing.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, cpu, "CPU")
    _LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"reca::{name}", fake, lib=_LIBRARY)
    operator: Callable[..., Any] = getattr(torch.ops.reca, name).default
    return operator
