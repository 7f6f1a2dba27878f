"""How many kernels one call of an operator launches on a GPU, where it is not one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

CHUNK, MOST_CHUNKS = 65_536, 320
MOST_TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
"""Lists that a kernel over lists of tensors walks in step -> tensors of each list that one launch takes."""


def list_launches(sizes: Sequence[int], depth: int) -> int:
    """Launches of one of torch's kernels over lists of tensors.

    A launch takes chunks of 65,536 elements until it has 320 of them, or has begun as many tensors as its
    arguments have room for.

    Args:
        sizes: elements of the tensors of one list; empty ones are skipped.
        depth: lists that are read or written in step, 1 to 5.
    """
    launches = chunks = tensors = 0
    for size in filter(None, sizes):
        tensors += 1
        full, chunks = divmod(chunks + -(-size // CHUNK), MOST_CHUNKS)
        launches += full
        if full:
            tensors = 1 if chunks else 0  # the rest of this tensor opens the next launch
        if chunks and tensors == MOST_TENSORS[depth]:
            launches, chunks, tensors = launches + 1, 0, 0
    return launches + bool(chunks)


def over_lists(args: Sequence[Any], out: Any) -> int:
    """Launches of `_foreach_...` and `_fused_...`: every list as large as the first is walked in step."""
    lists = [value for value in (*args, out) if isinstance(value, (list, tuple))]
    sizes = [[t.numel() for t in value if isinstance(t, Tensor)] for value in lists]
    return list_launches(sizes[0], min(sum(own == sizes[0] for own in sizes), max(MOST_TENSORS)))


def _layer_norm_backward(args: Sequence[Any]) -> int:
    """One kernel for the rows, one for weight and bias together."""
    rows, weight, bias = args[-1]
    return int(rows) + int(weight or bias)


def _varlen_backward(args: Sequence[Any]) -> int:
    """Row sums, the gradients, rounding of the query's; grouped heads add a sum for keys and for values."""
    query, key = args[1], args[2]
    return 3 if query.shape[1] == key.shape[1] else 5


KERNELS: Mapping[str, Callable[[Sequence[Any]], int]] = {
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": lambda args: 3,
    "aten::native_layer_norm_backward": _layer_norm_backward,
    "reca_profiling::attention": lambda args: 2,  # torch fills an unused random state beside the kernel
    "reca_profiling::attention_backward": _varlen_backward,
    "torch_attn::_varlen_attn": lambda args: 2,
    "torch_attn::_varlen_attn_backward": _varlen_backward,
}
"""Operator of torch -> kernels of a call with these arguments; all others count as one.

Read in torch's sources, not traced on a GPU. What stays approximate: a sort, a cumulative sum, a reduction of
few long rows and the gradient of an embedding are several kernels and count as one, as does a product whose
inner dimension cuBLAS splits; a `copy_` to or from the host counts as a kernel.
"""
