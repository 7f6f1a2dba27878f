"""dropout: masks that are functions of (key, step, sample, position), regenerated in the backward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reca.kernels import PhiloxDropout, dropout
from reca.kernels._dropout import keep_threshold
from reca.kernels._philox import signed_key
from reca.kernels.dropout import kernel, op, reference
from reca.kernels.testing import assert_within_budget, make_normal, misaligned
from reca.randomness import RandomSource, key_of

KEY, RATE = key_of(3, "dropout/place"), 0.1
IDS = (5, 1 << 40, (1 << 33) + 7, 0)


def make_inputs(
    lengths: tuple[int, ...], width: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> dict[str, Any]:
    """Packed rows of some samples, and where their masks come from."""
    step, samples = torch.tensor(11, device=device), torch.tensor(IDS[: len(lengths)], device=device)
    rows = sum(lengths)
    return {
        "x": make_normal(rows, width, seed=0, dtype=dtype, device=device),
        "random": PhiloxDropout(KEY, step, samples),
        "cu_lengths": torch.tensor((0, *lengths), device=device).cumsum(0).int(),
        "rate": RATE,
        "residual": make_normal(rows, width, seed=1, dtype=dtype, device=device),
    }


def drawn(lengths: tuple[int, ...], width: int, rate: float = RATE) -> Tensor:
    """[rows, width] bool: the decisions of the random source, sample by sample."""
    source = RandomSource(3, 11)
    uniform = [
        source.uniform("dropout/place", torch.tensor([sample]), rows * width).view(rows, width)
        for sample, rows in zip(IDS, lengths, strict=False)
    ]
    return torch.cat(uniform) >= rate


def plain(x: Tensor, keep: Tensor, rate: float, residual: Tensor | None) -> Tensor:
    """The same as models write it."""
    dropped = x * keep / (1 - rate)
    return dropped if residual is None else residual + dropped


def through_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "_forward", op._cuda)


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=4).map(tuple),
    st.sampled_from([4, 12, 64, 260, 516]),
    st.sampled_from([0.0, 0.1, 0.5, 0.97]),
    st.booleans(),
    st.booleans(),
)
def test_kernel_and_reference_keep_what_the_random_source_keeps(
    device: str, lengths: tuple[int, ...], width: int, rate: float, added: bool, shifted: bool
) -> None:
    inputs = make_inputs(lengths, width, device=device) | {"rate": rate}
    keep = drawn(lengths, width, rate).to(device)
    residual = inputs["residual"] if added else None
    exact = plain(inputs["x"].double(), keep, rate, None if residual is None else residual.double())
    honest = plain(inputs["x"], keep, rate, residual)
    if shifted:
        inputs["x"], residual = misaligned(inputs["x"]), None if residual is None else misaligned(residual)
    for impl in ("reference", "auto"):
        with pytest.MonkeyPatch.context() as patch:
            through_kernel(patch)
            got = dropout(**inputs | {"residual": residual}, impl=impl)
        assert_within_budget(impl, got, honest, exact)
        if residual is None:
            assert torch.equal(got != 0, keep)


@pytest.mark.parametrize("rate", [0.0, 1e-9, 0.1, 0.3, 0.5, 0.9, 0.99999999])
def test_the_integer_threshold_decides_as_the_uniform_number_does(rate: float) -> None:
    threshold = keep_threshold(rate)
    words = torch.arange(max(0, threshold - 99), min(1 << 31, threshold + 99))
    assert torch.equal(words >= threshold, words.to(torch.float32) * 4.6566127342e-10 >= rate)


def test_bf16_is_rounded_once(device: str) -> None:
    inputs = make_inputs((7, 9), 64, dtype=torch.bfloat16, device=device)
    got = kernel.forward(*arguments(inputs))
    exact = plain(inputs["x"].double(), drawn((7, 9), 64).to(device), RATE, inputs["residual"].double())
    # One unit in the last place: the interpreter truncates where the GPU rounds.
    torch.testing.assert_close(got.double(), exact, rtol=2**-7, atol=0)
    assert_within_budget("rounded", reference.forward(*arguments(inputs)), exact.bfloat16(), exact)


def arguments(inputs: dict[str, Any]) -> tuple[Any, ...]:
    """The inputs in the order of the operator."""
    random = inputs["random"]
    places = (inputs["cu_lengths"], random.samples, random.step, signed_key(random.key))
    return inputs["x"], inputs["residual"], *places, inputs["rate"]


@pytest.mark.parametrize("impl", ["kernel", "auto", "reference"])
@pytest.mark.parametrize("needed", range(4))
def test_the_backward_drops_what_the_forward_dropped(
    device: str, monkeypatch: pytest.MonkeyPatch, needed: int, impl: str
) -> None:
    if impl == "kernel":
        through_kernel(monkeypatch)
    inputs = make_inputs((3, 0, 6), 8, device=device)
    for i, name in enumerate(("x", "residual")):
        inputs[name].requires_grad_(bool(needed >> i & 1))
    out = dropout(**inputs, impl="reference" if impl == "reference" else "auto")  # type: ignore[arg-type]
    assert out.requires_grad == bool(needed)
    if needed:
        d_out = make_normal(9, 8, seed=5, device=device)
        out.backward(d_out)
        keep = drawn((3, 0, 6), 8).to(device)
        for name, expected in (("x", d_out * keep / (1 - RATE)), ("residual", d_out)):
            if inputs[name].requires_grad:
                torch.testing.assert_close(inputs[name].grad, expected)
            else:
                assert inputs[name].grad is None


def test_the_public_function_passes_gradcheck() -> None:
    inputs = make_inputs((2, 3), 4, dtype=torch.float64)
    leaves = [inputs.pop(name).requires_grad_() for name in ("x", "residual")]
    assert torch.autograd.gradcheck(lambda x, residual: dropout(x, residual=residual, **inputs), leaves)


def test_a_mask_depends_on_its_sample_alone(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    through_kernel(monkeypatch)
    inputs = make_inputs((5, 7), 16, device=device) | {"residual": None}
    inputs["x"] = torch.ones_like(inputs["x"])
    both = dropout(**inputs)
    random = inputs["random"]
    alone = replace(random, samples=random.samples[1:])
    last = inputs | {"x": inputs["x"][5:], "random": alone, "cu_lengths": inputs["cu_lengths"][::2] * 7 // 12}
    assert torch.equal(dropout(**last), both[5:])
    other = dropout(**inputs | {"random": replace(random, step=random.step + 1)})
    assert not torch.equal(other, both)


@pytest.mark.parametrize("fused", [False, True])
def test_what_is_dropped_may_be_infinite(device: str, monkeypatch: pytest.MonkeyPatch, fused: bool) -> None:
    if fused:
        through_kernel(monkeypatch)
    inputs = make_inputs((40,), 8, device=device) | {"residual": None}
    inputs["x"][~drawn((40,), 8).to(device)] = float("inf")
    assert dropout(**inputs).isfinite().all()
    inputs["x"][drawn((40,), 8).to(device)] = float("nan")
    assert dropout(**inputs).isnan().any()


@pytest.mark.parametrize("fused", [False, True])
def test_rows_that_no_sample_holds_are_nan(device: str, monkeypatch: pytest.MonkeyPatch, fused: bool) -> None:
    if fused:
        through_kernel(monkeypatch)
    inputs = make_inputs((4, 5), 8, device=device)
    inputs["cu_lengths"] = torch.tensor([1, 4, 7], device=device)
    assert dropout(**inputs).isnan().any(dim=1).tolist() == [i in (0, 7, 8) for i in range(9)]
    inputs["cu_lengths"] = torch.tensor([0, 40, 70], device=device)
    assert dropout(**inputs).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("added", [False, True])
def test_the_operator_keeps_the_contracts_of_the_dispatcher(dtype: torch.dtype, added: bool) -> None:
    inputs = make_inputs((3, 2), 8, dtype=dtype)
    if not added:
        inputs["residual"] = None
    torch.library.opcheck(torch.ops.reca.dropout.default, arguments(inputs))


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_the_public_function_compiles_to_one_graph(impl: Any) -> None:
    inputs = make_inputs((3, 2), 8)

    def summed(x: Tensor) -> Tensor:
        return dropout(**inputs | {"x": 2 * x}, impl=impl).square().sum()

    got = []
    for function in (summed, torch.compile(summed, fullgraph=True, backend="aot_eager")):
        leaf = inputs["x"].clone().requires_grad_()
        got += torch.autograd.grad(function(leaf), leaf)
    torch.testing.assert_close(*got)


X = torch.zeros(5, 8)
RANDOM = make_inputs((3, 2), 8)["random"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": X[0]}, ValueError, r"x must be \[rows, a multiple of 4\], got \[8\]; pad or flatten"),
        ({"x": X[:, :6]}, ValueError, r"x must be \[rows, a multiple of 4\], got \[5, 6\]"),
        ({"residual": X[:4]}, ValueError, r"residual must be \[5, 8\], got \[4, 8\]; shaped like x"),
        ({"residual": X.half()}, TypeError, r"residual must be float32 like x, got float16"),
        ({"x": X.int()}, TypeError, r"x must be one of bfloat16.*, got int32"),
        ({"rate": 1.0}, ValueError, r"rate must be in \[0, 1\), got 1.0; it is the share that is dropped"),
        ({"rate": -0.1}, ValueError, r"rate must be in \[0, 1\), got -0.1"),
        (
            {"cu_lengths": X},
            ValueError,
            r"cu_lengths must be \[samples \+ 1\] for 1 to 1024.*got \[5, 8\]; 0",
        ),
        ({"cu_lengths": torch.zeros(1026).int()}, ValueError, r"cu_lengths must be .*got \[1026\]"),
        (
            {"cu_lengths": torch.zeros(4).int()},
            ValueError,
            r"random.samples must be \[3\], got \[2\]; one id",
        ),
        ({"cu_lengths": X[0, :3]}, TypeError, r"cu_lengths must be one of int32, int64, got float32"),
        (
            {"random": replace(RANDOM, step=X[0])},
            ValueError,
            r"random.step must be \[\], got \[8\]; a scalar",
        ),
        ({"random": replace(RANDOM, step=X[0, 0])}, TypeError, r"random.step must be one of int64, got fl"),
        (
            {"random": replace(RANDOM, samples=RANDOM.samples.int())},
            TypeError,
            r"random.samples must be one of int64, got int32",
        ),
        ({"x": X.to("meta"), "residual": None}, ValueError, r"random.step must be on meta like x, got cpu"),
        ({"impl": "fused"}, ValueError, r"impl='fused' needs CUDA tensors, got cpu"),
    ],
)
def test_bad_input_is_refused_with_a_cure(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^dropout: {message}"):
        dropout(**make_inputs((3, 2), 8) | changes)


@pytest.mark.gpu
def test_on_a_gpu_bf16_keeps_the_same_elements_and_is_rounded_once() -> None:
    lengths = (300, 0, 217, 1)
    inputs = make_inputs(lengths, 1280, dtype=torch.bfloat16, device="cuda")
    keep = drawn(lengths, 1280).to("cuda")
    exact = plain(inputs["x"].double(), keep, RATE, inputs["residual"].double())
    assert_within_budget("dropout", dropout(**inputs), exact.bfloat16(), exact)


@pytest.mark.gpu
def test_on_a_gpu_a_captured_graph_replays_with_new_masks() -> None:
    inputs = make_inputs((64, 65), 256, device="cuda")
    inputs["x"].requires_grad_()

    def step() -> Tensor:
        return torch.autograd.grad(dropout(**inputs).sum(), inputs["x"])[0]

    step()  # warm-up compiles outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    before = captured.clone()
    inputs["random"].step.add_(1)
    graph.replay()
    assert torch.equal(captured, step())
    assert not torch.equal(captured, before)
