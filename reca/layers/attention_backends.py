"""The back ends of `reca.layers.attention`: what each computes with, and what it cannot run.

`reference` is the specification. Every back end answers `missing(device, dtype, head_dim, needs_grad)` with
None or the reason why it cannot run such tensors here. Optional packages are imported when first asked for.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._guards import active_fake_mode
from torch.nn import functional as F

from reca.errors import nearest
from reca.layers.segments import Segments

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Missing = Callable[[torch.device, torch.dtype, int, bool], str | None]
Run = Callable[[Tensor, Tensor, Tensor, Segments, float], Tensor]
P = ParamSpec("P")
T = TypeVar("T")
HALF = (torch.bfloat16, torch.float16)
AMPERE_ON = (8, 9, 10, 11, 12)
FLEX_BLOCK = 128


def _constant(function: Callable[P, T]) -> Callable[P, T]:
    """Let compiled callers take the answer as a constant; for pure functions of constants."""
    marked: Callable[P, T] = torch.compiler.assume_constant_result(function)  # type: ignore[no-untyped-call]
    return marked


@functools.cache
def import_failure(module: str) -> str | None:
    """None if `module` can be imported, else why not, in one line; asked once per process."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    except Exception as error:  # a package built for another torch, CUDA or glibc may fail in any way
        return f"{module} is broken: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return None


def pad_head_dim(rows: Tensor, multiple: int) -> Tensor:
    """`rows` [..., dim] with zeros appended until dim is a multiple; they change no score and no gradient."""
    excess = -rows.shape[-1] % multiple
    return F.pad(rows, (0, excess)) if excess else rows


def run_reference(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float) -> Tensor:
    """Plain torch, one segment at a time, fp32 (fp64 for fp64 inputs) from the scores to the output."""
    wide = torch.promote_types(query.dtype, torch.float32)
    group = query.shape[1] // key.shape[1]
    keys, values = (rows.to(wide).repeat_interleave(group, dim=1) for rows in (key, value))
    outputs, row_q, row_k = [], 0, 0
    for length_q, length_k in zip(segments.query_lengths, segments.key_lengths, strict=True):
        q, k, v = (
            query[row_q : row_q + length_q].to(wide),
            keys[row_k : row_k + length_k],
            values[row_k : row_k + length_k],
        )
        scores = scale * torch.einsum("qhd,khd->hqk", q, k)
        if segments.is_causal:
            hidden = torch.ones(length_q, length_k, dtype=torch.bool, device=q.device)
            scores = scores.masked_fill(hidden.triu(length_k - length_q + 1), -torch.inf)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), v))
        row_q, row_k = row_q + length_q, row_k + length_k
    return torch.cat(outputs).to(query.dtype)


def run_sdpa(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float) -> Tensor:
    """`scaled_dot_product_attention`, one batched call per run of neighbouring segments of equal lengths."""
    outputs, row_q, row_k = [], 0, 0
    for count, length_q, length_k in _equal_runs(segments):
        next_q, next_k = row_q + count * length_q, row_k + count * length_k
        if length_q:
            q = query[row_q:next_q].view(count, length_q, *query.shape[1:]).transpose(1, 2)
            k = key[row_k:next_k].view(count, length_k, *key.shape[1:]).transpose(1, 2)
            v = value[row_k:next_k].view(count, length_k, *value.shape[1:]).transpose(1, 2)
            out = _sdpa_batch(q, k, v, segments.is_causal, scale)
            outputs.append(out.transpose(1, 2).flatten(0, 1))
        row_q, row_k = next_q, next_k
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _equal_runs(segments: Segments) -> list[tuple[int, int, int]]:
    """(count, query length, key length) of each run of neighbouring equal segments."""
    runs: list[tuple[int, int, int]] = []
    for length_q, length_k in zip(segments.query_lengths, segments.key_lengths, strict=True):
        if runs and runs[-1][1:] == (length_q, length_k):
            runs[-1] = (runs[-1][0] + 1, length_q, length_k)
        else:
            runs.append((1, length_q, length_k))
    return runs


def _sdpa_batch(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> Tensor:
    """One call on [count, heads, length, dim]; a causal mask is aligned at the bottom right."""
    length_q, length_k, group = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    mask = None
    if is_causal and length_q != length_k:
        is_causal = False  # torch's flag means the top left
        if length_q > 1:
            # One segment's triangle. Heads are repeated: kernels that take a mask do not group them.
            visible = torch.ones(length_q, length_k, dtype=torch.bool, device=query.device)
            mask = visible.tril(length_k - length_q)
            key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=grouped
    )


def run_varlen(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float) -> Tensor:
    """Torch's own variable-length flash attention: one launch whatever the lengths."""
    from torch.nn.attention.varlen import varlen_attn

    # Before torch 2.12 there is no such argument, and the kernel groups heads without being told.
    grouped: dict[str, Any] = {"enable_gqa": query.shape[1] != key.shape[1]} if _varlen_takes_gqa() else {}
    out = varlen_attn(
        query,
        key,
        value,
        segments.cu_query,
        segments.cu_key,
        max(segments.query_lengths),
        max(segments.key_lengths),
        scale=scale,
        window_size=(-1, 0) if segments.is_causal else (-1, -1),
        **grouped,
    )
    assert isinstance(out, Tensor)  # a pair only with return_aux
    return out


@_constant
def _varlen_takes_gqa() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def run_counted(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float) -> Tensor:
    """What "auto" runs on a GPU without other packages, as one operator that has shapes only."""
    if query.dtype not in HALF or query.shape[-1] > 256:
        return run_sdpa(query, key, value, segments, scale)
    from reca.profiling.attention import segments_attention

    rows = [pad_head_dim(given, 8) for given in (query, key, value)]
    lengths = (segments.query_lengths, segments.key_lengths)
    out = segments_attention(rows[0], rows[1], rows[2], *lengths, segments.is_causal)
    return out[..., : query.shape[-1]]


def run_flash(
    module: str, query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float
) -> Tensor:
    """`flash_attn_varlen_func` of one of the flash-attn packages, which agree on these names."""
    out = importlib.import_module(module).flash_attn_varlen_func(
        query,
        key,
        value,
        cu_seqlens_q=segments.cu_query,
        cu_seqlens_k=segments.cu_key,
        max_seqlen_q=max(segments.query_lengths),
        max_seqlen_k=max(segments.key_lengths),
        softmax_scale=scale,
        causal=segments.is_causal,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    rows: Tensor = out[0] if isinstance(out, tuple) else out  # some versions return (out, lse)
    return rows


def run_xformers(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float) -> Tensor:
    """`memory_efficient_attention` with a block-diagonal bias made from the lengths."""
    operators = importlib.import_module("xformers.ops")

    def make_bias() -> Any:
        lengths = list(segments.query_lengths), list(segments.key_lengths)
        bias = operators.fmha.attn_bias.BlockDiagonalMask.from_seqlens(*lengths, device=query.device)
        return bias.make_causal_from_bottomright() if segments.is_causal else bias

    # Grouped heads have no backward there, so they are repeated.
    group = query.shape[1] // key.shape[1]
    batch = (query, key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1))
    bias = segments.memo.get(("xformers", query.device), make_bias)
    out: Tensor = operators.memory_efficient_attention(
        *(rows[None] for rows in batch), attn_bias=bias, scale=scale
    )
    return out[0]


def run_flex(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float) -> Tensor:
    """Compiled FlexAttention over the blocks of 128 x 128 that some row sees."""
    mask = segments.memo.get(("flex", query.device), lambda: block_mask(segments, query.device))
    batch = (rows.transpose(0, 1)[None] for rows in (query, key, value))  # [1, heads, rows, dim]
    grouped = query.shape[1] != key.shape[1]
    out: Tensor = _flex_attention(query.device)(*batch, block_mask=mask, scale=scale, enable_gqa=grouped)
    return out[0].transpose(0, 1)


def _flex_attention(device: torch.device) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    function: Callable[..., Any] = flex_attention
    # Row counts change with every batch, but torch 2.13's C++ template does not compile with dynamic shapes.
    return function if torch.compiler.is_compiling() else _compiled(function, device.type == "cuda")


@functools.cache
def _compiled(function: Callable[..., Any], dynamic: bool) -> Callable[..., Any]:
    # fullgraph: past the recompilation limit an error is better than the eager form, which stores all scores.
    return torch.compile(function, dynamic=dynamic, fullgraph=True)


def block_mask(segments: Segments, device: torch.device) -> BlockMask:
    """FlexAttention's mask of these segments, from lengths on `device`: no host sync and no dense mask.

    Each query row sees one interval of keys. A block is skipped if none of its rows sees any of its keys, and
    needs no mask if all rows see all of them. Largest temporary: a boolean per query row and block of keys.
    """
    from torch.nn.attention.flex_attention import BlockMask

    cu_query, cu_key = segments.cu_query.to(device), segments.cu_key.to(device)
    rows_q, rows_k = segments.query_rows, segments.key_rows
    spread = functools.partial(torch.repeat_interleave, repeats=cu_query.diff(), output_size=rows_q)
    start, stop = spread(cu_key[:-1]), spread(cu_key[1:])
    if segments.is_causal:
        stop = stop - (spread(cu_query[1:]) - 1 - torch.arange(rows_q, dtype=torch.int32, device=device))
    excess = -rows_q % FLEX_BLOCK
    start, stop = F.pad(start, (0, excess), value=rows_k), F.pad(stop, (0, excess))  # the rest sees nothing
    edge = FLEX_BLOCK * torch.arange(-(-rows_k // FLEX_BLOCK), dtype=torch.int32, device=device)
    touched = (start[:, None] < edge + FLEX_BLOCK) & (stop[:, None] > edge)
    covered = (start[:, None] <= edge) & (stop[:, None] >= edge + FLEX_BLOCK)
    full = covered.view(-1, FLEX_BLOCK, len(edge)).all(dim=1)
    partial = touched.view(-1, FLEX_BLOCK, len(edge)).any(dim=1) & ~full

    def sees(batch: Tensor, head: Tensor, row_q: Tensor, row_k: Tensor) -> Tensor:
        return (row_k >= start[row_q]) & (row_k < stop[row_q])

    return BlockMask.from_kv_blocks(
        *_ordered(partial),
        *_ordered(full),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=sees,
        seq_lengths=(rows_q, rows_k),
    )


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(number, indices with the chosen ones first) of each row of blocks, as [1, 1, ...] int32."""
    numbers = blocks.sum(dim=1, dtype=torch.int32)
    indices = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True).to(torch.int32)
    return numbers[None, None], indices[None, None].contiguous()


def _always(device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool) -> str | None:
    return None


def _counted_missing(device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool) -> str | None:
    return None if active_fake_mode() is not None else "counts launches, on tensors without values only"


def _flex_missing(device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool) -> str | None:
    if device.type == "cpu" and needs_grad:
        return "FlexAttention has no backward on the CPU"
    if device.type not in ("cpu", "cuda"):
        return f"needs a CUDA device or the CPU, got {device.type}"
    return None


def _kernel_missing(module: str, majors: tuple[int, ...], max_head_dim: int) -> Missing:
    """Capability of a half-precision CUDA kernel in `module` for these major compute capabilities."""

    def missing(device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool) -> str | None:
        if (failure := import_failure(module)) is not None:
            return failure
        if device.type != "cuda":
            return f"needs a CUDA device, got {device.type}"
        if dtype not in HALF:
            return f"needs bfloat16 or float16, got {str(dtype).removeprefix('torch.')}"
        if head_dim > max_head_dim:
            return f"needs a head dim of at most {max_head_dim}, got {head_dim}"
        major, minor = torch.cuda.get_device_capability(device)
        if major not in majors:
            wanted = ", ".join(f"{m}.x" for m in majors)
            return f"needs compute capability {wanted}, this device has {major}.{minor}"
        return None

    return missing


@dataclass(frozen=True, slots=True)
class Backend:
    """One way to compute attention.

    Attributes:
        run: (query, key, value, segments, scale) -> output; tensors as in `attention`, dim already padded.
        missing: (device, dtype, head_dim, needs_grad) -> None, or the reason why it cannot run.
        head_dim_multiple: dim is padded with zeros to a multiple of this.
    """

    run: Run
    missing: Missing
    head_dim_multiple: int = 1


def _flash(module: str, majors: tuple[int, ...], max_head_dim: int) -> Backend:
    return Backend(functools.partial(run_flash, module), _kernel_missing(module, majors, max_head_dim), 8)


BACKENDS: Mapping[str, Backend] = {
    "reference": Backend(run_reference, _always),
    "sdpa": Backend(run_sdpa, _always),
    "varlen": Backend(run_varlen, _kernel_missing("torch.nn.attention.varlen", AMPERE_ON, 256), 8),
    "flex": Backend(run_flex, _flex_missing, 16),
    "flash2": _flash("flash_attn.flash_attn_interface", AMPERE_ON, 256),
    "flash3": _flash("flash_attn_interface", (9,), 256),
    "flash4": _flash("flash_attn.cute", AMPERE_ON, 128),
    "counted": Backend(run_counted, _counted_missing),
    "xformers": Backend(run_xformers, _kernel_missing("xformers.ops", AMPERE_ON, 256), 8),
}


def auto_order(device: torch.device) -> tuple[str, ...]:
    """Back ends in the order in which "auto" tries them; the last can run everything.

    Hopper and data-centre Blackwell have kernels of their own in FlashAttention 3 and 4, about 1.7 times as
    fast as the second generation, so these come first where they are installed. Elsewhere torch's kernel for
    variable lengths is of that second generation, needs no package and takes one launch whatever the lengths.
    `flex` and `xformers` bring nothing that these masks need; they are there to compare with.
    """
    if device.type != "cuda":
        return ("sdpa",)
    newest = torch.cuda.get_device_capability(device)[0] in (9, 10)
    return (*(("flash3", "flash4") if newest else ()), "varlen", "flash2", "sdpa")


@_constant
def choose_backend(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool
) -> str:
    """The back end for such tensors: `name` itself, or for "auto" the first of `auto_order` that can run.

    Raises: ValueError if `name` is unknown, or cannot run such tensors.
    """
    if name == "auto":
        ask = (device, dtype, head_dim, needs_grad)
        return next(choice for choice in auto_order(device) if BACKENDS[choice].missing(*ask) is None)
    if name not in BACKENDS:
        raise ValueError(f"attention: unknown back end {name!r}; {nearest(name, ['auto', *BACKENDS])}")
    reason = BACKENDS[name].missing(device, dtype, head_dim, needs_grad)
    if reason is not None:
        raise ValueError(f"attention: back end {name!r} cannot run here: {reason}; use 'auto' or another")
    return name
