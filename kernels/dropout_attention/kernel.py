# mypy: disable-error-code="import-untyped, no-untyped-def, no-untyped-call, untyped-decorator"
"""Triton: online softmax over tiles of one head of one sample; every tile draws its piece of the mask again.

A head is held as two parts, a power of two and the rest: 80 columns cost 64 + 16, not 128. Wider
ones are held whole: as 64 + 32 they spill registers, which costs more than idle lanes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from reca.kernels._dropout import keep_threshold
from reca.kernels._launch import architecture_of, ceil_div, launch, launch_config, next_power_of_two
from reca.kernels._triton_dropout import keep_tile

_OWN = 64
_STAGES = 2


@triton.jit
def _place(cu_lengths_ptr, rows_total, num_samples, SAMPLES: tl.constexpr, BLOCK: tl.constexpr):
    """Sample of this program, its first row, its length, and the first row of the block within it."""
    index = tl.arange(0, SAMPLES)
    inside = index < num_samples
    starts = tl.load(cu_lengths_ptr + index, mask=inside, other=0).to(tl.int32)
    ends = tl.load(cu_lengths_ptr + 1 + index, mask=inside, other=0).to(tl.int32)
    blocks = (ends - starts + BLOCK - 1) // BLOCK
    passed = inside & (tl.cumsum(blocks, axis=0) <= tl.program_id(0))
    sample = tl.minimum(tl.sum(passed.to(tl.int32), axis=0), num_samples - 1)
    before = tl.sum(tl.where(index < sample, blocks, 0), axis=0)
    start = tl.load(cu_lengths_ptr + sample).to(tl.int32)
    # Lengths that are not those of the launch must not lead out of bounds.
    stop = tl.minimum(tl.load(cu_lengths_ptr + sample + 1).to(tl.int32), rows_total)
    start = tl.maximum(start, 0)
    return sample, start.to(tl.int64), stop - start, (tl.program_id(0) - before) * BLOCK


@triton.jit
def _load(
    base_ptr, rows, inside, STRIDE: tl.constexpr, DIM: tl.constexpr, OFFSET: tl.constexpr, PART: tl.constexpr
):
    """[rows, PART] columns OFFSET to OFFSET + PART of a head, 0 outside of it."""
    cols = OFFSET + tl.arange(0, PART)
    mask = inside[:, None] & (cols < DIM)[None, :]
    return tl.load(base_ptr + (rows * STRIDE)[:, None] + cols, mask=mask, other=0.0)


@triton.jit
def _store(
    base_ptr,
    rows,
    inside,
    STRIDE: tl.constexpr,
    DIM: tl.constexpr,
    values,
    OFFSET: tl.constexpr,
    PART: tl.constexpr,
):
    cols = OFFSET + tl.arange(0, PART)
    mask = inside[:, None] & (cols < DIM)[None, :]
    at = base_ptr + (rows * STRIDE)[:, None] + cols
    tl.store(at, values.to(base_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _scores(left, left_rest, right, right_rest, REST: tl.constexpr):
    """[rows of left, rows of right] fp32 inner products."""
    product = tl.dot(left, tl.trans(right), input_precision="ieee")
    if REST > 0:
        product = tl.dot(left_rest, tl.trans(right_rest), product, input_precision="ieee")
    return product


@triton.jit
def _forward_kernel(
    qkv_ptr,
    cu_lengths_ptr,
    samples_ptr,
    step_ptr,
    out_ptr,
    lse_ptr,
    rows_total,
    num_samples,
    key,
    threshold,
    factor,
    scale,
    STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    PART: tl.constexpr,
    REST: tl.constexpr,
    SAMPLES: tl.constexpr,
    ALIGNED: tl.constexpr,
    STAGES: tl.constexpr,
):
    sample, start, length, block = _place(cu_lengths_ptr, rows_total, num_samples, SAMPLES, BLOCK)
    head = tl.program_id(1).to(tl.int64)
    step, sample_id = tl.load(step_ptr), tl.load(samples_ptr + sample)
    queries = block + tl.arange(0, BLOCK)
    present = queries < length
    q_ptr = qkv_ptr + start * STRIDE + head * DIM
    k_ptr, v_ptr = q_ptr + HEADS * DIM, q_ptr + 2 * HEADS * DIM
    q = _load(q_ptr, queries, present, STRIDE, DIM, 0, PART)
    q_rest = q
    if REST > 0:
        q_rest = _load(q_ptr, queries, present, STRIDE, DIM, PART, REST)
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    out = tl.zeros([BLOCK, PART], tl.float32)
    out_rest = tl.zeros([BLOCK, REST if REST > 0 else 16], tl.float32)
    for first_key in tl.range(0, length, KEYS, num_stages=STAGES):
        keys = first_key + tl.arange(0, KEYS)
        seen = keys < length
        k = _load(k_ptr, keys, seen, STRIDE, DIM, 0, PART)
        k_rest = k
        if REST > 0:
            k_rest = _load(k_ptr, keys, seen, STRIDE, DIM, PART, REST)
        scores = _scores(q, q_rest, k, k_rest, REST) * (scale * 1.4426950408889634)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        shrink = tl.exp2(highest - higher)
        weights = tl.exp2(scores - higher[:, None])
        # The sum is that of the softmax: what is dropped still counts.
        total = total * shrink + tl.sum(weights, axis=1)
        keep = keep_tile(key, step, sample_id, head, queries, first_key, length, threshold, KEYS, ALIGNED)
        weights = tl.where(keep, weights, 0.0).to(qkv_ptr.dtype.element_ty)
        v = _load(v_ptr, keys, seen, STRIDE, DIM, 0, PART)
        out = tl.dot(weights, v, out * shrink[:, None], input_precision="ieee")
        if REST > 0:
            v_rest = _load(v_ptr, keys, seen, STRIDE, DIM, PART, REST)
            out_rest = tl.dot(weights, v_rest, out_rest * shrink[:, None], input_precision="ieee")
        highest = higher
    kept = (factor / total)[:, None]
    o_ptr = out_ptr + (start * HEADS + head) * DIM
    _store(o_ptr, queries, present, HEADS * DIM, DIM, out * kept, 0, PART)
    if REST > 0:
        _store(o_ptr, queries, present, HEADS * DIM, DIM, out_rest * kept, PART, REST)
    lse_at = lse_ptr + head * rows_total + start + queries
    tl.store(lse_at, (highest + tl.log2(total)) * 0.6931471805599453, mask=present)


@triton.jit
def _query_kernel(
    d_out_ptr,
    qkv_ptr,
    out_ptr,
    lse_ptr,
    cu_lengths_ptr,
    samples_ptr,
    step_ptr,
    delta_ptr,
    d_qkv_ptr,
    rows_total,
    num_samples,
    key,
    threshold,
    factor,
    scale,
    STRIDE: tl.constexpr,
    D_STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    PART: tl.constexpr,
    REST: tl.constexpr,
    SAMPLES: tl.constexpr,
    ALIGNED: tl.constexpr,
    STAGES: tl.constexpr,
):
    sample, start, length, block = _place(cu_lengths_ptr, rows_total, num_samples, SAMPLES, BLOCK)
    head = tl.program_id(1).to(tl.int64)
    step, sample_id = tl.load(step_ptr), tl.load(samples_ptr + sample)
    queries = block + tl.arange(0, BLOCK)
    present = queries < length
    q_ptr = qkv_ptr + start * STRIDE + head * DIM
    k_ptr, v_ptr = q_ptr + HEADS * DIM, q_ptr + 2 * HEADS * DIM
    d_ptr, o_ptr = d_out_ptr + start * D_STRIDE + head * DIM, out_ptr + (start * HEADS + head) * DIM
    q = _load(q_ptr, queries, present, STRIDE, DIM, 0, PART)
    d_out = _load(d_ptr, queries, present, D_STRIDE, DIM, 0, PART)
    out = _load(o_ptr, queries, present, HEADS * DIM, DIM, 0, PART)
    delta = tl.sum(d_out.to(tl.float32) * out.to(tl.float32), axis=1)
    q_rest, d_out_rest = q, d_out
    if REST > 0:
        q_rest = _load(q_ptr, queries, present, STRIDE, DIM, PART, REST)
        d_out_rest = _load(d_ptr, queries, present, D_STRIDE, DIM, PART, REST)
        out = _load(o_ptr, queries, present, HEADS * DIM, DIM, PART, REST)
        delta += tl.sum(d_out_rest.to(tl.float32) * out.to(tl.float32), axis=1)
    line = head * rows_total + start + queries
    tl.store(delta_ptr + line, delta, mask=present)
    lse = tl.load(lse_ptr + line, mask=present, other=float("inf")) * 1.4426950408889634
    dq = tl.zeros([BLOCK, PART], tl.float32)
    dq_rest = tl.zeros([BLOCK, REST if REST > 0 else 16], tl.float32)
    for first_key in tl.range(0, length, KEYS, num_stages=STAGES):
        keys = first_key + tl.arange(0, KEYS)
        seen = keys < length
        k = _load(k_ptr, keys, seen, STRIDE, DIM, 0, PART)
        v = _load(v_ptr, keys, seen, STRIDE, DIM, 0, PART)
        k_rest, v_rest = k, v
        if REST > 0:
            k_rest = _load(k_ptr, keys, seen, STRIDE, DIM, PART, REST)
            v_rest = _load(v_ptr, keys, seen, STRIDE, DIM, PART, REST)
        scores = _scores(q, q_rest, k, k_rest, REST) * (scale * 1.4426950408889634)
        weights = tl.exp2(tl.where(seen[None, :], scores - lse[:, None], float("-inf")))
        d_weights = _scores(d_out, d_out_rest, v, v_rest, REST)
        keep = keep_tile(key, step, sample_id, head, queries, first_key, length, threshold, KEYS, ALIGNED)
        d_scores = weights * (tl.where(keep, d_weights * factor, 0.0) - delta[:, None])
        d_scores = d_scores.to(qkv_ptr.dtype.element_ty)
        dq = tl.dot(d_scores, k, dq, input_precision="ieee")
        if REST > 0:
            dq_rest = tl.dot(d_scores, k_rest, dq_rest, input_precision="ieee")
    dq_ptr = d_qkv_ptr + (start * 3 * HEADS + head) * DIM
    _store(dq_ptr, queries, present, 3 * HEADS * DIM, DIM, dq * scale, 0, PART)
    if REST > 0:
        _store(dq_ptr, queries, present, 3 * HEADS * DIM, DIM, dq_rest * scale, PART, REST)


@triton.jit
def _key_kernel(
    d_out_ptr,
    qkv_ptr,
    lse_ptr,
    delta_ptr,
    cu_lengths_ptr,
    samples_ptr,
    step_ptr,
    d_qkv_ptr,
    rows_total,
    num_samples,
    key,
    threshold,
    factor,
    scale,
    STRIDE: tl.constexpr,
    D_STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    PART: tl.constexpr,
    REST: tl.constexpr,
    SAMPLES: tl.constexpr,
    ALIGNED: tl.constexpr,
    STAGES: tl.constexpr,
):
    sample, start, length, block = _place(cu_lengths_ptr, rows_total, num_samples, SAMPLES, KEYS)
    head = tl.program_id(1).to(tl.int64)
    step, sample_id = tl.load(step_ptr), tl.load(samples_ptr + sample)
    keys = block + tl.arange(0, KEYS)
    seen = keys < length
    q_ptr, d_ptr = qkv_ptr + start * STRIDE + head * DIM, d_out_ptr + start * D_STRIDE + head * DIM
    k_ptr, v_ptr = q_ptr + HEADS * DIM, q_ptr + 2 * HEADS * DIM
    k = _load(k_ptr, keys, seen, STRIDE, DIM, 0, PART)
    v = _load(v_ptr, keys, seen, STRIDE, DIM, 0, PART)
    k_rest, v_rest = k, v
    if REST > 0:
        k_rest = _load(k_ptr, keys, seen, STRIDE, DIM, PART, REST)
        v_rest = _load(v_ptr, keys, seen, STRIDE, DIM, PART, REST)
    dk, dv = tl.zeros([KEYS, PART], tl.float32), tl.zeros([KEYS, PART], tl.float32)
    dk_rest = tl.zeros([KEYS, REST if REST > 0 else 16], tl.float32)
    dv_rest = dk_rest
    for first_query in tl.range(0, length, BLOCK, num_stages=STAGES):
        queries = first_query + tl.arange(0, BLOCK)
        present = queries < length
        q = _load(q_ptr, queries, present, STRIDE, DIM, 0, PART)
        d_out = _load(d_ptr, queries, present, D_STRIDE, DIM, 0, PART)
        q_rest, d_out_rest = q, d_out
        if REST > 0:
            q_rest = _load(q_ptr, queries, present, STRIDE, DIM, PART, REST)
            d_out_rest = _load(d_ptr, queries, present, D_STRIDE, DIM, PART, REST)
        line = head * rows_total + start + queries
        lse = tl.load(lse_ptr + line, mask=present, other=float("inf")) * 1.4426950408889634
        delta = tl.load(delta_ptr + line, mask=present, other=0.0)
        # Transposed, so that keys and values stay spread over the warps and no product has to be turned.
        scores = _scores(k, k_rest, q, q_rest, REST) * (scale * 1.4426950408889634)
        weights = tl.exp2(tl.where(seen[:, None], scores - lse[None, :], float("-inf")))
        keep = tl.trans(
            keep_tile(key, step, sample_id, head, queries, block, length, threshold, KEYS, ALIGNED)
        )
        d_weights = _scores(v, v_rest, d_out, d_out_rest, REST)
        d_scores = weights * (tl.where(keep, d_weights * factor, 0.0) - delta[None, :])
        kept = tl.where(keep, weights * factor, 0.0).to(qkv_ptr.dtype.element_ty)
        d_scores = d_scores.to(qkv_ptr.dtype.element_ty)
        dv = tl.dot(kept, d_out, dv, input_precision="ieee")
        dk = tl.dot(d_scores, q, dk, input_precision="ieee")
        if REST > 0:
            dv_rest = tl.dot(kept, d_out_rest, dv_rest, input_precision="ieee")
            dk_rest = tl.dot(d_scores, q_rest, dk_rest, input_precision="ieee")
    dk_ptr = d_qkv_ptr + (start * 3 * HEADS + HEADS + head) * DIM
    dv_ptr = dk_ptr + HEADS * DIM
    _store(dk_ptr, keys, seen, 3 * HEADS * DIM, DIM, dk * scale, 0, PART)
    _store(dv_ptr, keys, seen, 3 * HEADS * DIM, DIM, dv, 0, PART)
    if REST > 0:
        _store(dk_ptr, keys, seen, 3 * HEADS * DIM, DIM, dk_rest * scale, PART, REST)
        _store(dv_ptr, keys, seen, 3 * HEADS * DIM, DIM, dv_rest, PART, REST)


def _constants(qkv: Tensor, lengths: Sequence[int], samples: Tensor) -> dict[str, Any]:
    """The compile-time parameters that all three kernels share, and the warps."""
    heads, dim = qkv.shape[2:]
    part = max(16, next_power_of_two(dim + 1) // 2) if dim <= 80 else next_power_of_two(dim)
    config = launch_config("dropout_attention", architecture_of(qkv), qkv.dtype, dim)
    return {
        "warps": config.warps,
        "STRIDE": qkv.stride(0),
        "HEADS": heads,
        "DIM": dim,
        "BLOCK": _OWN,
        "KEYS": config.tile // _OWN,
        "PART": part,
        "REST": 0 if dim <= part else max(16, next_power_of_two(dim - part)),
        "SAMPLES": next_power_of_two(len(lengths)),
        # Only then does every line of probabilities start at a Philox counter.
        "ALIGNED": not any(length % 4 for length in lengths),
        "STAGES": _STAGES,
    }


def _packed(rows: Tensor, lengths: Sequence[int]) -> Tensor:
    """The same with contiguous rows, perhaps parts of wider ones, that 32-bit offsets reach in a sample."""
    near = max(lengths) * rows.stride(0) < 1 << 31
    return rows if near and rows[:1].is_contiguous() else rows.contiguous()


def _blocks(lengths: Sequence[int], block: int) -> int:
    return sum(ceil_div(length, block) for length in lengths)


def forward(
    qkv: Tensor,
    cu_lengths: Tensor,
    lengths: Sequence[int],
    samples: Tensor,
    step: Tensor,
    key: int,
    rate: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Out [rows, heads, dim] in the dtype of qkv [rows, 3, heads, dim], lse [heads, rows] fp32."""
    qkv = _packed(qkv, lengths)
    constants = _constants(qkv, lengths, samples)
    rows, _, heads, dim = qkv.shape
    out, lse = qkv.new_empty(rows, heads, dim), qkv.new_empty(heads, rows, dtype=torch.float32)
    launch(
        _forward_kernel,
        (_blocks(lengths, constants["BLOCK"]), heads),
        qkv,
        cu_lengths.contiguous(),
        samples.contiguous(),
        step,
        out,
        lse,
        rows,
        len(lengths),
        key,
        keep_threshold(rate),
        1 / (1 - rate),
        scale,
        **constants,
    )
    return out, lse


def backward(
    d_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_lengths: Tensor,
    lengths: Sequence[int],
    samples: Tensor,
    step: Tensor,
    key: int,
    rate: float,
    scale: float,
) -> Tensor:
    """d_qkv [rows, 3, heads, dim] in the dtype of qkv."""
    qkv = _packed(qkv, lengths)
    constants = _constants(qkv, lengths, samples)
    rows, heads = qkv.shape[0], qkv.shape[2]
    d_out = _packed(d_out, lengths)
    delta, d_qkv = lse.new_empty(lse.shape), qkv.new_empty(qkv.shape)
    places = (cu_lengths.contiguous(), samples.contiguous(), step)
    sizes = (rows, len(lengths))
    constants["D_STRIDE"] = d_out.stride(0)
    draws = (key, keep_threshold(rate), 1 / (1 - rate), scale)
    grid = (_blocks(lengths, constants["BLOCK"]), heads)
    launch(_query_kernel, grid, d_out, qkv, out, lse, *places, delta, d_qkv, *sizes, *draws, **constants)
    constants |= {"BLOCK": constants["KEYS"], "KEYS": _OWN}
    launch(_key_kernel, grid, d_out, qkv, lse, delta, *places, d_qkv, *sizes, *draws, **constants)
    return d_qkv
