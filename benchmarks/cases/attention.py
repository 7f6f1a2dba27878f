"""Attention over packed segments: every back end of `reca.layers.attention` at the shapes of real steps.

No operator of ours: the case shows which back end "auto" should take on the machine at hand.
"""

from __future__ import annotations

from collections.abc import Callable

from reca.benchmarks.cases.case import Case, Inputs, Maker, Output, Provider, Shape
from reca.kernels import Impl
from reca.layers.attention import attention
from reca.layers.attention_backends import BACKENDS
from reca.layers.segments import Segments

OPERATOR = "attention"
_NO_RIVALS = ("reference", "counted")  # the plain form, and what has no values


def _packed(make: Maker) -> Inputs:
    s = make.shape
    lengths = [s["queries"]] * s["segments"], [s["keys"]] * s["segments"]
    segments = Segments.of(*lengths, is_causal=bool(s["causal"]))
    rows_q, rows_k = segments.query_rows, segments.key_rows
    return {
        "query": make.normal(rows_q, s["heads"], s["dim"]),
        "key": make.normal(rows_k, s["kv_heads"], s["dim"]),
        "value": make.normal(rows_k, s["kv_heads"], s["dim"]),
        "segments": segments.to(make.device),
    }


def _run(inputs: Inputs, backend: str) -> Output:
    return attention(inputs["query"], inputs["key"], inputs["value"], inputs["segments"], backend=backend)


def _ours(inputs: Inputs, impl: Impl) -> Output:
    return _run(inputs, "reference" if impl == "reference" else "auto")


def _backend(name: str) -> Callable[[], Provider]:
    return lambda: lambda inputs: _run(inputs, name)


def _cudnn() -> Provider:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def provider(inputs: Inputs) -> Output:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return _run(inputs, "sdpa")

    return provider


def _moved(s: Shape, itemsize: int) -> tuple[int, int]:
    query = s["segments"] * s["queries"] * s["heads"] * s["dim"] * itemsize
    key = s["segments"] * s["keys"] * s["kv_heads"] * s["dim"] * itemsize
    return 2 * query + 2 * key, 4 * query + 4 * key


def _flops(s: Shape) -> tuple[int, int]:
    hidden = s["queries"] * (s["queries"] - 1) // 2 if s["causal"] else 0
    forward = 4 * s["segments"] * s["heads"] * s["dim"] * (s["queries"] * s["keys"] - hidden)
    return forward, forward * 10 // 4  # scores are recomputed, then four products


def _case(name: str, full: Shape, small: Shape, *without: str) -> Case:
    rivals = [rival for rival in BACKENDS if rival not in (*_NO_RIVALS, *without)]
    return Case(
        operator=OPERATOR,
        name=name,
        full=full,
        small=small,
        make=_packed,
        ours=_ours,
        plain=lambda inputs: _run(inputs, "reference"),
        moved=_moved,
        flops=_flops,
        gradients=("query", "key", "value"),
        rivals={rival: _backend(rival) for rival in rivals} | {"cudnn": _cudnn},
    )


_SMALL = {"segments": 2, "queries": 33, "keys": 40, "heads": 4, "kv_heads": 2, "dim": 16, "causal": 0}

CASES = (
    _case(
        "bagel latents over their sample, 4 images",
        {"segments": 4, "queries": 4098, "keys": 4380, "heads": 28, "kv_heads": 4, "dim": 128, "causal": 0},
        _SMALL,
    ),
    _case(
        "show-o image over its sample, 2 samples",
        {"segments": 2, "queries": 1026, "keys": 1603, "heads": 32, "kv_heads": 32, "dim": 64, "causal": 0},
        {**_SMALL, "kv_heads": 4},
        "flex",  # compiles for most of a minute, which the first case has shown the worth of
    ),
    _case(
        "janus-pro-7b decoder, 8 causal samples",
        {"segments": 8, "queries": 1184, "keys": 1184, "heads": 32, "kv_heads": 32, "dim": 128, "causal": 1},
        {**_SMALL, "keys": 33, "kv_heads": 4, "causal": 1},
        "flex",
    ),
)
