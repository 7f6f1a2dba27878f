"""Bytes that each operator moves, as the interpreter counts them, against those that its case asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from reca.benchmarks.cases import CASES, Case
from reca.benchmarks.cases.case import Shape, make_inputs
from reca.kernels import OPERATORS, _launch
from reca.kernels.flow_input.reference import features_width
from reca.kernels.traffic import Moved, Traffic, count_traffic

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts what the interpreter does")

OURS = tuple(case for case in CASES if case.operator in OPERATORS)
TOLERANCE = 0.03
"""Share of what the design need not count: vectors, statistics of rows, partial sums of a few programs."""

Bytes = Callable[[Shape], int]


def _logits(s: Shape) -> int:
    return 2 * s["rows"] * s["vocab"]


def _token_operands(s: Shape) -> int:
    return 2 * (s["rows"] + s["vocab"]) * s["width"]


def _none(s: Shape) -> int:
    return 0


# Enough rows that vectors do not count, enough blocks that every loop is walked more than once.
SHAPES: dict[str, Shape] = {
    "show-o labelled image tokens": {"rows": 48, "vocab": 1024, "width": 96},
    "harmon labelled text tokens": {"rows": 96, "vocab": 2048, "width": 64},
    "bagel latents: last norm, projection, loss": {"tokens": 1536, "dim": 16, "width": 256},
    "bagel latents: noise, projection, time and position": {
        "tokens": 2048,
        "dim": 16,
        "width": 256,
        "images": 4,
    },
    "show-o trunk, bias and gelu": {"rows": 512, "inner": 256},
    "bagel connector into the sequence": {
        "rows": 128,
        "dim": 96,
        "inner": 192,
        "out": 192,
        "positions": 32,
        "sequence": 160,
    },
    "clip tower, input norm": {"rows": 512, "dim": 384},
    "harmon masked tokens, whole objective": {"rows": 6144, "dim": 16},
    "harmon masked tokens, noised rows": {"rows": 6144, "dim": 16},
    "harmon-1.5b encoder; the plain form reads a stored mask": {
        "rows": 192,
        "width": 128,
        "samples": 3,
        "dim": 64,
    },
}

SHAPES |= {
    f"openuni-l-512, {what}": {"images": 2, "tokens": 128, "dim": 96}
    for what in ("sum, norm and modulation of 42 images", "gate of 42 images and residual")
}
SHAPES |= {
    f"bagel markers, gate and up projection{storage}": {"rows": 4, "out": 768, "in": 256}
    for storage in ("", ", fp8 weight", ", NF4 weight")
}

EXCESS: dict[str, tuple[Bytes, Bytes, str]] = {
    "show-o labelled image tokens": (
        lambda s: 2 * _token_operands(s) + 5 * _logits(s),
        _none,
        "the forward forms both gradients: logits are written, turned into theirs and read by two products",
    ),
    "bagel latents: noise, projection, time and position": (
        _none,
        lambda s: (4 * s["tokens"] + 6 * s["width"]) * features_width(s["dim"], s["images"]),
        "the noised rows are made again, written and read by one product, whose parts are copied",
    ),
    "show-o trunk, whole block": (
        _none,
        lambda s: 2 * s["rows"] * s["out"],
        "the sum for the second bias reads its gradient again",
    ),
    "harmon-1.5b encoder; the plain form reads a stored mask": (
        _none,
        lambda s: 8 * s["rows"] * s["width"],
        "queries and keys are walked in a kernel each; both read query, key, value and the gradient",
    ),
    "openuni-l-512, 42 images of 16 x 16": (
        lambda s: 40 * s["inner"],
        lambda s: 12 * s["images"] * s["side"] ** 2 * s["inner"] + 932 * s["inner"],
        "the gradient of the convolution is written and read, x is read again; here 4 partial sums count",
    ),
}
EXCESS["bagel latents: last norm, projection, loss"] = (
    _none,
    lambda s: 14 * s["dim"] * s["width"],
    "the products of each group of rows are written and added up",
)
EXCESS["harmon labelled text tokens"] = EXCESS["show-o labelled image tokens"]

# All bytes over distinct ones, where that is more than 1.15: what L2 or L1 must deliver again.
AGAIN: dict[str, tuple[float, float, str]] = {
    "bagel latents: last norm, projection, loss": (1.25, 1.15, "the weight by every block of rows"),
    "bagel latents: noise, projection, time and position": (
        2.6,
        1.15,
        "the weight by every block of rows, the time by every row, positions by every image",
    ),
    "openuni-l-512, 42 images of 16 x 16": (
        1.32,
        1.15,
        "rows above and below a strip, weights by every strip",
    ),
    "openuni-l-512, 42 images of 256 tokens": (1.0, 1.29, "keys and values in the second walk"),
    "bagel markers, gate and up projection, NF4 weight": (9.0, 9.0, "one of 16 levels for each weight"),
}


def _runs(case: Case, shape: Shape) -> Iterator[tuple[str, list[Traffic]]]:
    """("forward" or "backward", its launches) of a case in bf16."""
    inputs: Mapping[str, Any] = make_inputs(case, shape, torch.device("cpu"), torch.bfloat16, seed=0)
    with count_traffic() as counted:
        made = case.ours(inputs, "fused")
        yield "forward", list(counted)
        counted.clear()
        if case.gradients:
            outputs = made if isinstance(made, tuple) else (made,)
            flowing = [output for output in outputs if output is not None and output.requires_grad]
            ones = [torch.ones_like(output) for output in flowing]
            counted.clear()
            torch.autograd.grad(flowing, [inputs[name] for name in case.gradients], ones)
            yield "backward", list(counted)


@pytest.fixture(autouse=True)
def one_multiprocessor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part so small that programs are to the rows of these shapes what those of a GPU are to real ones."""
    monkeypatch.setattr(_launch, "DEFAULT_MULTIPROCESSORS", 1)


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    lines = [f"{'operator: case':<72}{'pass':<10}{'design':>10}{'distinct':>10}{'total':>8}"]
    yield lines
    print("\n" + "\n".join(lines))


@pytest.mark.parametrize("case", OURS, ids=lambda case: f"{case.operator}: {case.name}")
def test_an_operator_moves_the_bytes_of_its_design(case: Case, table: list[str]) -> None:
    shape = SHAPES.get(case.name, case.small)
    least = case.moved(shape, 2)
    *excess, _ = EXCESS.get(case.name, (_none, _none, ""))
    *again, _ = AGAIN.get(case.name, (1.15, 1.15, ""))
    for place, (name, launches) in enumerate(_runs(case, shape)):
        moved = sum((launch.bytes for launch in launches), Moved(0, 0))
        design = least[place] + excess[place](shape)
        line = f"{case.operator + ': ' + case.name:<72.70}{name:<10}{design:>10}"
        table.append(line + f"{moved.distinct / design:>10.3f}{moved.total / design:>8.2f}")
        assert 1 <= moved.distinct / design <= 1 + TOLERANCE, launches
        assert moved.total / moved.distinct <= again[place], launches


@triton.jit
def _toy_kernel(x_ptr, table_ptr, total_ptr, out_ptr, size, COLS: tl.constexpr):  # type: ignore[no-untyped-def]
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    inside = cols < size
    once = tl.load(x_ptr + cols, mask=inside, other=0.0)
    again = tl.load(x_ptr + cols, mask=inside, other=0.0)
    out = once + again + tl.load(table_ptr)
    tl.store(out_ptr + cols, out, mask=inside)
    tl.atomic_add(total_ptr, tl.sum(out))


def test_every_access_counts_once_as_distinct_and_each_time_in_total() -> None:
    x, table, total = torch.ones(13), torch.ones(1), torch.zeros(1)
    out = torch.empty_like(x)
    with count_traffic() as counted:
        _launch.launch(_toy_kernel, (2,), x, table, total, out, 13, warps=1, COLS=8)
        x.mul_(2.0)
    toy, scaled = counted
    assert (total.item(), toy.kernel, scaled.kernel) == (42.0, "_toy_kernel", "aten::mul_")
    assert toy.loads == {"x_ptr": Moved(52, 104), "table_ptr": Moved(4, 8), "total_ptr": Moved(4, 8)}
    assert toy.stores == {"out_ptr": Moved(52, 52), "total_ptr": Moved(4, 8)}
    assert toy.bytes == Moved(116, 180)
    assert scaled.bytes == Moved(104, 104)


def test_only_what_torch_reads_and_writes_counts() -> None:
    x, row = torch.ones(4, 8), torch.ones(8)
    with count_traffic() as counted:
        x.view(8, 4).t()
        torch.empty_like(x).copy_(row.expand(4, 8))
        torch.mm(x, x.t(), out=torch.empty(4, 4))
        torch.zeros(3)
    assert [(made.kernel, made.bytes.total) for made in counted] == [
        ("aten::copy_", 32 + 128),
        ("aten::mm", 256 + 64),
        ("aten::zeros", 12),
    ]


def test_after_the_count_the_interpreter_is_as_before() -> None:
    from triton.runtime.interpreter import GridExecutor, interpreter_builder

    before = GridExecutor.__call__
    with count_traffic():
        assert GridExecutor.__call__ is not before
        assert "create_masked_load" in vars(interpreter_builder)
    assert GridExecutor.__call__ is before
    assert "create_masked_load" not in vars(interpreter_builder)
