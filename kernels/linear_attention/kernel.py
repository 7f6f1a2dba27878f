# mypy: disable-error-code="import-untyped, no-untyped-def, no-untyped-call, untyped-decorator"
"""Triton: one program per image and head; its state stays in registers, its keys and values in the caches."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from reca.kernels._launch import architecture_of, launch, launch_config, next_power_of_two


@triton.jit
def _load(base_ptr, tokens, stride, tokens_total, dim, DIM: tl.constexpr):
    """Rows of one head in fp32, [tokens, DIM]; 0 outside."""
    cols = tl.arange(0, DIM)
    inside = (tokens < tokens_total)[:, None] & (cols < dim)[None, :]
    return tl.load(base_ptr + tokens[:, None] * stride + cols, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(base_ptr, rows, tokens, stride, tokens_total, dim, DIM: tl.constexpr):
    cols = tl.arange(0, DIM)
    inside = (tokens < tokens_total)[:, None] & (cols < dim)[None, :]
    tl.store(base_ptr + tokens[:, None] * stride + cols, rows.to(base_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _relu(x):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _keys(
    key_ptr,
    value_ptr,
    key_stride,
    value_stride,
    tokens_total,
    dim,
    DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    EXACT: tl.constexpr,
):
    """(sum of k v^T [DIM, DIM], sum of k [DIM])."""
    state = tl.zeros([DIM, DIM], tl.float32)
    norm = tl.zeros([DIM], tl.float32)
    for start in range(0, tokens_total, TOKENS):
        tokens = start + tl.arange(0, TOKENS).to(tl.int64)
        k = _relu(_load(key_ptr, tokens, key_stride, tokens_total, dim, DIM))
        v = _load(value_ptr, tokens, value_stride, tokens_total, dim, DIM)
        state = tl.dot(tl.trans(k), v, state, input_precision=EXACT)
        norm += tl.sum(k, axis=0)
    return state, norm


@triton.jit
def _forward_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    heads,
    tokens_total,
    dim,
    query_image,
    query_stride,
    query_head,
    key_image,
    key_stride,
    key_head,
    value_image,
    value_stride,
    value_head,
    eps,
    DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    EXACT: tl.constexpr,
    WIDE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    image, head = program // heads, program % heads
    query_ptr += image * query_image + head * query_head
    key_ptr += image * key_image + head * key_head
    value_ptr += image * value_image + head * value_head
    out_stride = heads.to(tl.int64) * dim
    out_ptr += image * tokens_total * out_stride + head * dim
    state, norm = _keys(key_ptr, value_ptr, key_stride, value_stride, tokens_total, dim, DIM, TOKENS, EXACT)
    for start in range(0, tokens_total, TOKENS):
        tokens = start + tl.arange(0, TOKENS).to(tl.int64)
        q = _relu(_load(query_ptr, tokens, query_stride, tokens_total, dim, DIM))
        denominator = tl.sum(q * norm[None, :], axis=1) + eps
        out = tl.dot(q, state, input_precision=WIDE) / denominator[:, None]
        _store(out_ptr, out, tokens, out_stride, tokens_total, dim, DIM)


@triton.jit
def _backward_kernel(
    d_out_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    d_query_ptr,
    d_key_ptr,
    d_value_ptr,
    heads,
    tokens_total,
    dim,
    d_out_image,
    d_out_stride,
    d_out_head,
    query_image,
    query_stride,
    query_head,
    key_image,
    key_stride,
    key_head,
    value_image,
    value_stride,
    value_head,
    eps,
    DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    EXACT: tl.constexpr,
    WIDE: tl.constexpr,
    WITH_DQUERY: tl.constexpr,
    WITH_DKEY: tl.constexpr,
    WITH_DVALUE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    image, head = program // heads, program % heads
    d_out_ptr += image * d_out_image + head * d_out_head
    query_ptr += image * query_image + head * query_head
    key_ptr += image * key_image + head * key_head
    value_ptr += image * value_image + head * value_head
    stride = heads.to(tl.int64) * dim
    offset = image * tokens_total * stride + head * dim
    state, norm = _keys(key_ptr, value_ptr, key_stride, value_stride, tokens_total, dim, DIM, TOKENS, EXACT)
    d_state = tl.zeros([DIM, DIM], tl.float32)
    d_norm = tl.zeros([DIM], tl.float32)
    for start in range(0, tokens_total, TOKENS):
        tokens = start + tl.arange(0, TOKENS).to(tl.int64)
        q = _relu(_load(query_ptr, tokens, query_stride, tokens_total, dim, DIM))
        d_numerator = _load(d_out_ptr, tokens, d_out_stride, tokens_total, dim, DIM)
        scale = 1.0 / (tl.sum(q * norm[None, :], axis=1) + eps)
        d_numerator *= scale[:, None]
        out = tl.dot(q, state, input_precision=WIDE) * scale[:, None]
        d_denominator = -tl.sum(d_numerator * out, axis=1)
        if WITH_DQUERY:
            d_q = tl.dot(d_numerator, tl.trans(state), input_precision=WIDE)
            d_q = tl.where(q > 0, d_q + d_denominator[:, None] * norm[None, :], 0.0)
            _store(d_query_ptr + offset, d_q, tokens, stride, tokens_total, dim, DIM)
        if WITH_DKEY or WITH_DVALUE:
            d_state = tl.dot(tl.trans(q), d_numerator, d_state, input_precision=WIDE)
            d_norm += tl.sum(q * d_denominator[:, None], axis=0)
    if WITH_DKEY or WITH_DVALUE:
        for start in range(0, tokens_total, TOKENS):
            tokens = start + tl.arange(0, TOKENS).to(tl.int64)
            k = _relu(_load(key_ptr, tokens, key_stride, tokens_total, dim, DIM))
            if WITH_DKEY:
                v = _load(value_ptr, tokens, value_stride, tokens_total, dim, DIM)
                d_k = tl.dot(v, tl.trans(d_state), input_precision=WIDE) + d_norm[None, :]
                _store(d_key_ptr + offset, tl.where(k > 0, d_k, 0.0), tokens, stride, tokens_total, dim, DIM)
            if WITH_DVALUE:
                d_v = tl.dot(k, d_state, input_precision=WIDE)
                _store(d_value_ptr + offset, d_v, tokens, stride, tokens_total, dim, DIM)


def _with_unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(3) == 1 or tensor.shape[3] == 1 else tensor.contiguous()


def _options(query: Tensor) -> dict[str, Any]:
    """Warps and compile-time constants; three TF32 products per product keep what fp32 sums hold."""
    dim = query.shape[3]
    config = launch_config("linear_attention", architecture_of(query), query.dtype, dim)
    padded = max(16, next_power_of_two(dim))
    # Values of 16 bits are exact in TF32; fp32 ones are not, and keep to fp32 throughout.
    is_fp32 = query.dtype == torch.float32
    return {
        "warps": config.warps,
        "DIM": padded,
        "TOKENS": max(16, config.tile // padded),
        "EXACT": "ieee" if is_fp32 else "tf32",
        "WIDE": "ieee" if is_fp32 else "tf32x3",
    }


def forward(query: Tensor, key: Tensor, value: Tensor, eps: float) -> Tensor:
    """[images, tokens, heads, dim] in the dtype of query."""
    query, key, value = (_with_unit_stride(tensor) for tensor in (query, key, value))
    images, tokens, heads, dim = query.shape
    out = query.new_empty(query.shape)
    launch(
        _forward_kernel,
        (images * heads if tokens else 0,),
        query,
        key,
        value,
        out,
        heads,
        tokens,
        dim,
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        eps,
        **_options(query),
    )
    return out


def backward(
    d_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    eps: float,
    with_dquery: bool,
    with_dkey: bool,
    with_dvalue: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_query, d_key, d_value), each [images, tokens, heads, dim]; what is not asked for is empty."""
    d_out, query, key, value = (_with_unit_stride(tensor) for tensor in (d_out, query, key, value))
    images, tokens, heads, dim = query.shape
    wanted = (with_dquery, with_dkey, with_dvalue)
    d_query, d_key, d_value = (query.new_empty(query.shape if want else (0,)) for want in wanted)
    launch(
        _backward_kernel,
        (images * heads if tokens else 0,),
        d_out,
        query,
        key,
        value,
        d_query,
        d_key,
        d_value,
        heads,
        tokens,
        dim,
        *d_out.stride()[:3],
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        eps,
        WITH_DQUERY=with_dquery,
        WITH_DKEY=with_dkey,
        WITH_DVALUE=with_dvalue,
        **_options(query),
    )
    return d_query, d_key, d_value
