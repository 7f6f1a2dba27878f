"""Choosing a back end, what each is called with, and how Segments behave; no numerics of the kernels here."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.attention.flex_attention import create_block_mask

from reca.layers import attention_backends
from reca.layers.attention import attention, set_attention_backend
from reca.layers.attention_backends import (
    BACKENDS,
    block_mask,
    choose_backend,
    import_failure,
    run_reference,
)
from reca.layers.segments import Segments

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FLASH2 = "flash_attn.flash_attn_interface"
SEGMENTS = Segments.of([3, 0, 2, 2], [5, 1, 2, 2], is_causal=True)


def qkv(segments: Segments = SEGMENTS, dim: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((segments.query_rows, 4), (segments.key_rows, 2), (segments.key_rows, 2))
    query, key, value = (torch.randn(*shape, dim, generator=generator) for shape in shapes)
    return query, key, value


# --- Segments


def test_cumulative_lengths_start_at_zero_and_move_with_the_segments() -> None:
    assert SEGMENTS.cu_query.tolist() == [0, 3, 3, 5, 7]
    assert SEGMENTS.cu_key.tolist() == [0, 5, 6, 8, 10]
    assert SEGMENTS.cu_query.dtype == SEGMENTS.cu_key.dtype == torch.int32
    moved = SEGMENTS.to(torch.device("meta"))
    assert moved.cu_query.device.type == moved.cu_key.device.type == "meta"
    assert moved == SEGMENTS
    assert moved.query_lengths == (3, 0, 2, 2)


def test_key_lengths_default_to_query_lengths() -> None:
    assert Segments.of([2, 3]) == Segments.of([2, 3], [2, 3])
    assert Segments.of([2, 3]) != Segments.of([2, 3], is_causal=True)


@pytest.mark.parametrize(
    ("queries", "keys", "is_causal", "message"),
    [
        ([1, 2], [1], False, "Segments: got 2 query and 1 key lengths; give one per segment"),
        ([1, -2], None, False, "Segments: lengths must be >= 0, segment 1 has -2 and -2"),
        ([0, 2], [3, 0], False, "segment 1 has 2 queries, 0 keys: a row would see nothing; drop those rows"),
        (
            [3],
            [2],
            True,
            "segment 0 has 3 queries, 2 keys: a row would see nothing under a causal mask",
        ),
    ],
)
def test_lengths_that_make_no_sense_are_refused(
    queries: list[int], keys: list[int] | None, is_causal: bool, message: str
) -> None:
    with pytest.raises(ValueError) as error:
        Segments.of(queries, keys, is_causal=is_causal)
    assert message in str(error.value)


# --- The public function


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda q, k, v: (q[0], k, v),
            "query must be [rows_q, heads, dim], key, value [rows_k,",
        ),
        (lambda q, k, v: (q, k, v[:-1]), "value (9, 2, 8)"),
        (lambda q, k, v: (q[:, :3], k, v), "heads must be a multiple of kv_heads, got query (7, 3, 8)"),
        (
            lambda q, k, v: (q.half(), k, v),
            "must share a dtype, got torch.float16, torch.float32,",
        ),
        (lambda q, k, v: (q[1:], k, v), "segments hold 7 queries, 10 keys, got query (6, 4, 8)"),
    ],
)
def test_shapes_that_disagree_are_refused(change: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        attention(*change(*qkv()), SEGMENTS)
    assert message in str(error.value)


def test_without_query_rows_the_result_is_empty() -> None:
    segments = Segments.of([0, 0], [2, 0])
    assert attention(*qkv(segments), segments).shape == (0, 4, 8)


def test_a_padded_head_keeps_the_scale_of_its_own_dimension(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    padded = attention_backends.Backend(run_reference, lambda *_: None, 16)
    monkeypatch.setattr("reca.layers.attention.BACKENDS", BACKENDS | {"sdpa": padded})
    query, key, value = qkv(dim=10)
    torch.testing.assert_close(
        attention(query, key, value, SEGMENTS), run_reference(query, key, value, SEGMENTS, 10**-0.5)
    )
    torch.testing.assert_close(
        attention(query, key, value, SEGMENTS, scale=0.5), run_reference(query, key, value, SEGMENTS, 0.5)
    )


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_no_value_of_a_tensor_is_read(backend: str) -> None:
    with FakeTensorMode(allow_non_fake_inputs=False):
        query, key, value = (torch.empty(n, h, 8, requires_grad=True) for n, h in ((7, 4), (10, 2), (10, 2)))
        segments = Segments.of([3, 0, 2, 2], [5, 1, 2, 2], is_causal=True)
        out = attention(query, key, value, segments, backend=backend)
        out.sum().backward()
        assert out.shape == (7, 4, 8)
        assert key.grad is not None


@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference"])
def test_it_compiles_without_a_graph_break_and_with_gradients(backend: str) -> None:
    compiled = torch.compile(
        lambda q, k, v, s: attention(q, k, v, s, backend=backend), fullgraph=True, backend="aot_eager"
    )
    leaves = [tensor.requires_grad_() for tensor in qkv()]
    got, expected = compiled(*leaves, SEGMENTS), attention(*leaves, SEGMENTS, backend=backend)
    torch.testing.assert_close(got, expected)
    weight = torch.linspace(-1, 1, got.numel()).view_as(got)
    gradients = (torch.autograd.grad(out, leaves, weight, retain_graph=True) for out in (got, expected))
    torch.testing.assert_close(*gradients)


def test_what_a_backend_derives_from_the_lengths_is_made_once_and_survives_a_move() -> None:
    made: list[int] = []
    segments = Segments.of([2])
    for place in (segments, segments, segments.to(torch.device("meta"))):
        assert place.memo.get("key", lambda: made.append(1) or "value") == "value"
    assert made == [1]


# --- Choice


def test_every_module_that_attends_is_told_its_backend() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention_backend = "auto"

    model = nn.Sequential(nn.Linear(1, 1), nn.Sequential(Attends()), Attends())
    set_attention_backend(model, "sdpa")
    assert [m.attention_backend for m in model.modules() if isinstance(m, Attends)] == ["sdpa", "sdpa"]
    assert not hasattr(model[0], "attention_backend")
    with pytest.raises(ValueError, match=r"attention: unknown back end 'sdap'; did you mean 'sdpa'\?"):
        set_attention_backend(model, "sdap")


def test_an_unknown_backend_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match=r"attention: unknown back end 'varlin'; did you mean 'varlen'\?"):
        attention(*qkv(), SEGMENTS, backend="varlin")


def test_a_named_backend_that_cannot_run_is_never_replaced() -> None:
    message = (
        "attention: back end 'varlen' cannot run here: needs a CUDA device, got cpu; use 'auto' or another"
    )
    with pytest.raises(ValueError, match=message):
        attention(*qkv(), SEGMENTS, backend="varlen")
    query, key, value = qkv()
    with pytest.raises(ValueError, match="'flex' cannot run here: FlexAttention has no backward on the CPU"):
        attention(query.requires_grad_(), key, value, SEGMENTS, backend="flex")


def test_on_the_cpu_auto_is_sdpa() -> None:
    assert choose_backend("auto", CPU, torch.float32, 64, True) == "sdpa"
    assert choose_backend("auto", CPU, torch.bfloat16, 72, False) == "sdpa"


@pytest.mark.parametrize(
    ("capability", "installed", "dtype", "head_dim", "expected"),
    [
        ((9, 0), {"flash_attn_interface", "flash_attn.cute", FLASH2}, torch.bfloat16, 128, "flash3"),
        ((10, 0), {"flash_attn_interface", "flash_attn.cute"}, torch.bfloat16, 128, "flash4"),
        ((10, 0), {"flash_attn.cute"}, torch.bfloat16, 192, "varlen"),
        ((9, 0), {FLASH2}, torch.float16, 72, "varlen"),
        ((8, 6), {"flash_attn_interface", "flash_attn.cute", FLASH2}, torch.bfloat16, 128, "varlen"),
        ((7, 5), {FLASH2}, torch.float16, 64, "sdpa"),
        ((9, 0), {FLASH2}, torch.float32, 64, "sdpa"),
        ((9, 0), {FLASH2}, torch.bfloat16, 512, "sdpa"),
    ],
)
def test_on_a_gpu_auto_takes_the_newest_kernel_that_is_installed_and_fits(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    installed: set[str],
    dtype: torch.dtype,
    head_dim: int,
    expected: str,
) -> None:
    have = {*installed, "torch.nn.attention.varlen"}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(
        attention_backends, "import_failure", lambda m: None if m in have else f"{m} is not installed"
    )
    assert choose_backend("auto", CUDA, dtype, head_dim, True) == expected


@pytest.mark.parametrize(
    ("name", "dtype", "head_dim", "reason"),
    [
        ("varlen", torch.float32, 64, "needs bfloat16 or float16, got float32"),
        ("varlen", torch.bfloat16, 264, "needs a head dim of at most 256, got 264"),
        ("flash3", torch.bfloat16, 64, "needs compute capability 9.x, this device has 8.6"),
        ("flash2", torch.bfloat16, 64, "flash_attn is not installed"),
    ],
)
def test_each_reason_says_what_is_needed_and_what_is_there(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, head_dim: int, reason: str
) -> None:
    absent = {FLASH2: "flash_attn is not installed"}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(attention_backends, "import_failure", absent.get)
    assert BACKENDS[name].missing(CUDA, dtype, head_dim, True) == reason


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError("libcudart.so.12: cannot open\nmore"), "x is broken: OSError: libcudart.so.12: cannot open"),
        (ImportError("undefined symbol: _Z"), "x is broken: ImportError: undefined symbol: _Z"),
        (ModuleNotFoundError("No module named 'cutlass'", name="cutlass"), "cutlass is not installed"),
        (RuntimeError(), "x is broken: RuntimeError: "),
    ],
)
def test_a_broken_package_is_a_reason_and_not_a_crash(
    monkeypatch: pytest.MonkeyPatch, error: Exception, expected: str
) -> None:
    def broken(name: str) -> ModuleType:
        raise error

    monkeypatch.setattr(importlib, "import_module", broken)
    assert import_failure.__wrapped__("x") == expected


# --- FlexAttention's block mask


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        ([130, 0, 257], [140, 3, 259]),
        ([128, 256], [128, 384]),
        ([5, 3, 2], [5, 3, 2]),
        ([600], [900]),
        ([1], [1]),
    ],
)
def test_the_block_mask_is_that_of_the_dense_mask(
    queries: list[int], keys: list[int], is_causal: bool
) -> None:
    segments = Segments.of(queries, keys, is_causal=is_causal)
    got = block_mask(segments, CPU)
    expected = create_block_mask(
        got.mask_mod, None, None, segments.query_rows, segments.key_rows, device="cpu"
    )
    for name in (
        "kv_num_blocks",
        "kv_indices",
        "full_kv_num_blocks",
        "full_kv_indices",
        "q_num_blocks",
        "q_indices",
    ):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), msg=name)
    assert got.seq_lengths == expected.seq_lengths
    # The rule itself, counted by hand: bottom-right aligned triangles, or rectangles, along the diagonal.
    dense = torch.block_diag(
        *(
            torch.ones(q, k).tril(k - q) if is_causal else torch.ones(q, k)
            for q, k in zip(queries, keys, strict=True)
        )
    )
    row, column = torch.meshgrid(torch.arange(sum(queries)), torch.arange(sum(keys)), indexing="ij")
    assert torch.equal(got.mask_mod(None, None, row, column), dense.bool())


def test_the_block_mask_reads_no_value_of_a_tensor() -> None:
    with FakeTensorMode(allow_non_fake_inputs=False):
        mask = block_mask(Segments.of([130, 0, 257], [140, 3, 259], is_causal=True), CPU)
        assert mask.kv_indices.shape == (1, 1, 4, 4)
