"""skinny_linear: a few rows through large frozen weights, plain, fp8 and NF4; the gradient of the rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from reca.kernels import Fp8Weight, dequantize_nf4, quantize_fp8, quantize_nf4, skinny_linear
from reca.kernels.skinny_linear import kernel, op, reference
from reca.kernels.skinny_linear.op import Weight
from reca.kernels.testing import assert_within_budget, make_normal, misaligned

STORAGES: dict[str, Callable[[Tensor], Weight]] = {
    "plain": lambda weight: weight,
    "fp8": quantize_fp8,
    "nf4": lambda weight: quantize_nf4(weight, nested=False),
    "nf4 nested": quantize_nf4,
}
storages = pytest.mark.parametrize("storage", STORAGES)


def make_inputs(
    rows: int, outs: int, ins: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """x [rows, ins], weight [outs, ins], bias [outs]."""
    shapes = ((rows, ins), (outs, ins), (outs,))
    x, weight, bias = (
        make_normal(*shape, seed=seed, dtype=dtype, device=device) for seed, shape in enumerate(shapes)
    )
    return x, weight, bias


def plain(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, reference.dequantize(weight, x.dtype), bias)


def through_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "_product", op._cuda)


def exact(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    return F.linear(
        x.double(), reference.dequantize(weight, torch.float64), None if bias is None else bias.double()
    )


@storages
def test_the_reference_is_the_formula_and_its_gradient_the_transposed_product(storage: str) -> None:
    x, matrix, bias = make_inputs(3, 5, 64, dtype=torch.float64)
    weight = STORAGES[storage](matrix)
    assert torch.autograd.gradcheck(lambda rows: skinny_linear(rows, weight, bias), [x.requires_grad_()])
    torch.testing.assert_close(skinny_linear(x, weight, bias), exact(x, weight, bias))
    torch.testing.assert_close(skinny_linear(x, weight, bias, impl="reference"), exact(x, weight, bias))


@given(
    st.integers(0, 64),
    st.sampled_from([1, 3, 64, 65, 200]),
    st.sampled_from([64, 192, 320]),
    st.sampled_from(sorted(STORAGES)),
    st.booleans(),
)
def test_the_kernels_stay_within_the_error_budget(
    device: str, rows: int, outs: int, ins: int, storage: str, biased: bool
) -> None:
    x, matrix, bias = make_inputs(rows, outs, ins, device=device)
    weight = STORAGES[storage](matrix)
    added = bias if biased else None
    out = kernel.product(misaligned(x), weight, added, False)
    assert_within_budget("out", out, plain(x, weight, added), exact(x, weight, added))
    d_out = make_normal(rows, outs, seed=5, device=device)
    honest = d_out @ reference.dequantize(weight, d_out.dtype)
    truth = d_out.double() @ reference.dequantize(weight, torch.float64)
    assert_within_budget("dx", kernel.product(d_out, weight, None, True), honest, truth)


@given(st.integers(1, 20), st.sampled_from([1, 7, 70]), st.sampled_from([1, 7, 33, 130]), st.booleans())
def test_odd_widths_are_read_right_plain_and_in_fp8(
    device: str, rows: int, outs: int, ins: int, is_fp8: bool
) -> None:
    x, matrix, bias = make_inputs(rows, outs, ins, device=device)
    weight = quantize_fp8(matrix) if is_fp8 else misaligned(matrix)
    out = kernel.product(x, weight, bias, False)
    assert_within_budget("out", out, plain(x, weight, bias), exact(x, weight, bias))
    dx = kernel.product(out, weight, None, True)
    truth = out.double() @ reference.dequantize(weight, torch.float64)
    assert_within_budget("dx", dx, out @ reference.dequantize(weight, out.dtype), truth)


@storages
def test_fp16_rows_stay_within_the_error_budget(device: str, storage: str) -> None:
    x, matrix, bias = make_inputs(5, 66, 192, dtype=torch.float16, device=device)
    weight = STORAGES[storage](matrix)
    assert_within_budget(
        "out",
        kernel.product(x, weight, bias, False),
        plain(x, weight, bias),
        exact(x, weight, bias),
    )


@storages
@pytest.mark.parametrize("transposed", [False, True])
def test_one_split_and_many_agree(
    device: str, monkeypatch: pytest.MonkeyPatch, storage: str, transposed: bool
) -> None:
    _, matrix, bias = make_inputs(3, 192, 640, device=device)
    weight = STORAGES[storage](matrix)
    rows = make_normal(3, 192 if transposed else 640, seed=7, device=device)
    added = None if transposed else bias
    outs = []
    for splits in (1, 3):
        monkeypatch.setattr(kernel, "_split", lambda blocks, steps, _, n=splits: (n, -(-steps // n)))
        outs.append(kernel.product(rows, weight, added, transposed))
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-5, atol=1e-4)


def test_programs_are_split_to_fill_the_multiprocessors_and_none_is_idle() -> None:
    assert kernel._split(592, 28, 90) == (1, 28)
    assert kernel._split(56, 28, 90) == (4, 7)
    assert kernel._split(8, 28, 90) == (28, 1)
    assert kernel._split(100, 5, 90) == (2, 3)


def test_every_code_of_fp8_is_decoded_by_integer_arithmetic_as_by_the_hardware(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = torch.arange(256, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
    codes = codes[codes.float().isfinite()]  # e4m3 has two codes for NaN, which are never written
    weight = Fp8Weight(codes[:, None].contiguous(), torch.ones(len(codes), device=device))
    x = torch.ones(1, 1, device=device)
    for since in (0, 1000):
        monkeypatch.setattr(kernel, "_FP8_SINCE", since)
        assert torch.equal(kernel.product(x, weight, None, False)[0], codes.float())


def test_fp8_keeps_three_bits_of_each_weight_and_survives_empty_rows() -> None:
    matrix = make_normal(6, 40, seed=0)
    matrix[2] = 0
    matrix[3, 0] = float("nan")
    weight = quantize_fp8(matrix)
    back = reference.dequantize(weight, torch.float32)
    assert back[3].isnan().all()
    assert torch.equal(back[2], torch.zeros(40))
    keep = [0, 1, 4, 5]
    assert float((back[keep].abs().amax(dim=1) - matrix[keep].abs().amax(dim=1)).abs().max()) < 1e-6
    bound = matrix[keep].abs() / 16 + weight.scale[keep, None] * 2**-10
    assert bool(((back[keep] - matrix[keep]).abs() <= bound).all())


@pytest.mark.parametrize("nested", [False, True])
def test_nf4_rounds_each_weight_to_the_nearest_of_sixteen_values_of_its_block(nested: bool) -> None:
    matrix = make_normal(40, 512, seed=0)
    matrix[0, :64] = 0
    weight = quantize_nf4(matrix, nested=nested)
    back = dequantize_nf4(weight)
    blocks, found = matrix.view(-1, 64), back.view(-1, 64)
    if not nested:
        assert torch.equal(found[0], torch.zeros(64))
        values = weight.table * blocks.abs().amax(dim=1)[:, None]
        nearest = (blocks[:, :, None] - values[:, None]).abs().amin(dim=2)
        torch.testing.assert_close((found - blocks).abs(), nearest, rtol=1e-5, atol=1e-6)
    # Half the widest gap of the table, and what nested scales are off.
    bound = 0.152 + (0.01 if nested else 0.0)
    assert bool(((found[1:] - blocks[1:]).abs() <= bound * blocks[1:].abs().amax(dim=1)[:, None]).all())


def test_nf4_bytes_are_those_of_bitsandbytes() -> None:
    # Its rules: the first of two codes in the high half, blocks of 64 along the rows, 256 scales to a nested
    # block after their mean was taken off, nested codes of a sorted map from -0.993 to 1.
    matrix = torch.zeros(1, 64)
    matrix[0, :4] = torch.tensor([1.0, -1.0, 0.0, 0.44])
    weight = quantize_nf4(matrix, nested=False)
    assert weight.packed[0, :3].tolist() == [0xF0, 0x7C, 0x77]
    nested = quantize_nf4(make_normal(8, 64 * 40, seed=1))
    assert nested.nested_table is not None and nested.nested_absmax is not None
    table = nested.nested_table
    assert len(table) == 256 and bool((table.diff() > 0).all())
    assert (float(table[-1]), int((table == 0).sum())) == (1.0, 1)
    torch.testing.assert_close(table[[0, -2]], torch.tensor([-0.99296875, 0.99296875]))
    assert (nested.absmax.shape, nested.nested_absmax.shape) == ((320,), (2,))


@storages
@pytest.mark.parametrize("through", ["kernel", "reference"])
def test_only_the_rows_receive_a_gradient(
    device: str, monkeypatch: pytest.MonkeyPatch, storage: str, through: str
) -> None:
    if through == "kernel":
        through_kernel(monkeypatch)
    x, matrix, bias = make_inputs(4, 70, 64, device=device)
    weight = STORAGES[storage](matrix)
    rows = x.view(2, 2, 64).clone().requires_grad_()
    out = skinny_linear(rows, weight, bias)
    assert out.shape == (2, 2, 70)
    d_out = make_normal(2, 2, 70, seed=6, device=device)
    out.backward(d_out)
    assert rows.grad is not None
    torch.testing.assert_close(rows.grad, d_out @ reference.dequantize(weight, torch.float32))
    assert not skinny_linear(x, weight, bias).requires_grad


@storages
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_keeps_the_contracts_of_the_dispatcher(dtype: torch.dtype, storage: str) -> None:
    x, matrix, bias = make_inputs(3, 5, 64, dtype=dtype)
    parts = op._unpack(STORAGES[storage](matrix))
    operator = torch.ops.reca.skinny_linear.default
    torch.library.opcheck(operator, (x, *parts, bias, False))
    torch.library.opcheck(operator, (x[:, :5].contiguous(), *parts, None, True))


@storages
def test_the_public_function_compiles_to_one_graph(storage: str) -> None:
    x, matrix, bias = make_inputs(3, 5, 64)
    weight = STORAGES[storage](matrix)
    compiled = torch.compile(
        lambda rows: skinny_linear(2 * rows, weight, bias), fullgraph=True, backend="aot_eager"
    )
    rows = x.requires_grad_()
    (got,) = torch.autograd.grad(compiled(rows).sum(), rows)
    (want,) = torch.autograd.grad(skinny_linear(2 * rows, weight, bias).sum(), rows)
    torch.testing.assert_close(got, want)


@storages
def test_counted_flops_are_those_of_the_product(storage: str) -> None:
    x, matrix, bias = make_inputs(3, 5, 64)
    with FlopCounterMode(display=False) as counter:
        skinny_linear(x.requires_grad_(), STORAGES[storage](matrix), bias).sum().backward()
    assert counter.get_total_flops() == 2 * (2 * 3 * 5 * 64)


X, W, B = torch.zeros(2, 64), torch.zeros(5, 64), torch.zeros(5)
FP8, NF4 = quantize_fp8(W), quantize_nf4(W)
GOOD: dict[str, Any] = {"x": X, "weight": W, "bias": B}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weight": B}, ValueError, r"weight must be \[out > 0, in > 0\], got \[5\]; as nn.Linear holds it"),
        ({"weight": W[:0]}, ValueError, r"weight must be \[out > 0, in > 0\], got \[0, 64\]"),
        ({"x": X[:, :3]}, ValueError, r"x must be \[..., in=64\], got \[2, 3\]; one column per input"),
        (
            {"x": torch.zeros(5, 13, 64)},
            ValueError,
            r"x must have at most 64 rows, got 65; use torch's linear",
        ),
        ({"bias": B[:3]}, ValueError, r"bias must be \[5\], got \[3\]; one value per row of weight"),
        ({"weight": W.half()}, TypeError, r"weight must be float32 like x, got float16; convert one"),
        ({"x": X.long()}, TypeError, r"x must be one of bfloat16.*, got int64; convert it first"),
        ({"bias": B.to("meta")}, ValueError, r"bias must be on cpu like x, got meta; move it there"),
        ({"weight": FP8._replace(values=W)}, TypeError, r"weight.values must be one of float8_e4m3fn, got"),
        ({"weight": FP8._replace(scale=B[:2])}, ValueError, r"weight.scale must be \[5\], got \[2\]; one sc"),
        ({"weight": FP8._replace(scale=B.half())}, TypeError, r"weight.scale must be one of float32, got"),
        ({"weight": NF4._replace(packed=W)}, TypeError, r"weight.packed must be one of uint8, got float32"),
        (
            {"weight": NF4._replace(packed=NF4.packed[:, :9])},
            ValueError,
            r"weight.packed must be \[out, a mu",
        ),
        (
            {"weight": NF4._replace(absmax=B[:2])},
            ValueError,
            r"weight.absmax must be \[5\], got \[2\]; one sc",
        ),
        ({"weight": NF4._replace(absmax=B)}, TypeError, r"weight.absmax must be one of uint8, got float32"),
        ({"weight": NF4._replace(table=B)}, ValueError, r"weight.table must be \[16\], got \[5\]; the value"),
        (
            {"weight": NF4._replace(offset=None)},
            ValueError,
            r"weight.nested_absmax, .* go together, got some",
        ),
        ({"weight": NF4._replace(nested_table=B)}, ValueError, r"weight.nested_table must be \[256\], got"),
        ({"weight": NF4._replace(offset=X.long()[0, 0])}, TypeError, r"weight.offset must be one of float32"),
        (
            {"weight": W.clone().requires_grad_()},
            ValueError,
            r"weight and bias must be frozen, got requires_",
        ),
        ({"impl": "fused"}, ValueError, r"impl='fused' needs CUDA tensors, got cpu"),
    ],
)
def test_bad_input_is_refused_with_a_cure(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^skinny_linear: {message}"):
        skinny_linear(**GOOD | changes)


def test_a_matrix_that_blocks_of_64_do_not_divide_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^quantize_nf4: weight must be \[out, a multiple of 64\], got \[5, 6"
    ):
        quantize_nf4(W[:, :60])


@pytest.mark.gpu
@storages
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [2, 16, 64])
def test_on_a_gpu_every_dtype_stays_within_the_error_budget(
    rows: int, dtype: torch.dtype, storage: str
) -> None:
    x, matrix, bias = make_inputs(rows, 1000, 3584, dtype=dtype, device="cuda")
    weight = STORAGES[storage](matrix)
    out = skinny_linear(x, weight, bias)
    assert_within_budget("out", out, plain(x, weight, bias), exact(x, weight, bias))
    d_out = make_normal(rows, 1000, seed=5, dtype=dtype, device="cuda")
    rows_ = x.requires_grad_()
    (dx,) = torch.autograd.grad(skinny_linear(rows_, weight, bias), rows_, d_out)
    truth = d_out.double() @ reference.dequantize(weight, torch.float64)
    assert_within_budget("dx", dx, d_out @ reference.dequantize(weight, dtype), truth)


@pytest.mark.gpu
@storages
def test_on_a_gpu_a_captured_graph_replays_on_new_values(storage: str) -> None:
    x, matrix, bias = make_inputs(4, 512, 3584, dtype=torch.bfloat16, device="cuda")
    weight, static = STORAGES[storage](matrix), x.requires_grad_()

    def step() -> Tensor:
        return torch.autograd.grad(skinny_linear(static, weight, bias).square().sum(), static)[0]

    step()  # warm-up compiles outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        static.mul_(2)
    graph.replay()
    assert torch.equal(captured, step())
