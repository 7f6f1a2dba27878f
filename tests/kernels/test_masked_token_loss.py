"""masked_token_loss: linear layer and cross-entropy in chunks of rows, loss and gradients in one pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from reca.kernels import masked_token_loss
from reca.kernels.masked_token_loss import kernel, op, reference
from reca.kernels.testing import assert_within_budget, make_normal

LossRows = Callable[[Tensor, int, Tensor, bool], Tensor]
ROW_FUNCTIONS = pytest.mark.parametrize(
    "loss_rows_", [kernel.loss_rows_, reference.loss_rows_], ids=["kernel", "reference"]
)


def make_labels(rows: int, vocab: int, device: str = "cpu") -> Tensor:
    """Labels over the whole vocabulary, its ends included; every third row does not count."""
    labels = torch.arange(rows, device=device) * 7 % vocab
    labels[1::3] = vocab - 1
    labels[2::3] = -100
    return labels


def make_inputs(
    rows: int, vocab: int, width: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, labels, bias; logits spread over a few units, so that the softmax has a peak."""
    hidden = make_normal(rows, width, seed=0, dtype=dtype, device=device)
    weight = make_normal(vocab, width, seed=1, dtype=dtype, device=device)
    bias = make_normal(vocab, seed=2, dtype=dtype, device=device)
    return hidden, weight, make_labels(rows, vocab, device), bias


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> Tensor:
    """As models write it: a linear layer, then torch's cross-entropy in fp32."""
    logits = F.linear(hidden, weight, bias)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, labels, ignore_index=-100, reduction="sum")


def plain_rows(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(losses, gradient of their sum) of torch's cross-entropy."""
    leaf = logits.clone().requires_grad_()
    losses = F.cross_entropy(leaf, labels, ignore_index=-100, reduction="none")
    return losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]


def gradients(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], labels: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(loss, gradients of hidden, weight and bias)."""
    hidden, weight, bias = (tensor.detach().clone().requires_grad_() for tensor in inputs)
    loss = function(hidden, weight, labels, bias)
    return loss.detach(), torch.autograd.grad(loss, (hidden, weight, bias))


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The public function runs the Triton code wherever its tensors are."""
    monkeypatch.setattr(op, "_forward", op._cuda)


def test_the_reference_is_the_formula() -> None:
    hidden, weight, labels, bias = make_inputs(4, 5, 3, dtype=torch.float64)
    logits = hidden @ weight.t() + bias
    expected = sum(
        torch.log(torch.exp(logits[i]).sum()) - logits[i, labels[i]] for i in range(4) if labels[i] != -100
    )
    torch.testing.assert_close(reference.loss(hidden, weight, bias, labels), expected)


def test_the_public_function_passes_gradcheck() -> None:
    hidden, weight, labels, bias = make_inputs(4, 5, 3, dtype=torch.float64)
    leaves = tuple(t.requires_grad_() for t in (hidden, weight, bias))
    assert torch.autograd.gradcheck(lambda h, w, b: masked_token_loss(h, w, labels, b), leaves)


@ROW_FUNCTIONS
@given(st.integers(0, 12), st.sampled_from([1, 2, 63, 64, 65, 4096, 4999]))
def test_loss_and_gradient_of_logits_stay_within_the_error_budget(
    device: str, loss_rows_: LossRows, rows: int, vocab: int
) -> None:
    padded = 64 * -(-vocab // 64)
    logits = torch.full((rows, padded), float("nan"), device=device)
    logits[:, :vocab] = 4 * make_normal(rows, vocab, seed=0, device=device)
    labels = make_labels(rows, vocab, device)
    honest, exact = (plain_rows(x, labels) for x in (logits[:, :vocab], logits[:, :vocab].double()))
    losses = loss_rows_(logits, vocab, labels, True)
    assert_within_budget("losses", losses, honest[0], exact[0])
    assert_within_budget("gradient", logits[:, :vocab], honest[1], exact[1])
    assert torch.equal(logits[:, vocab:], torch.zeros_like(logits[:, vocab:]))


@ROW_FUNCTIONS
def test_without_a_gradient_the_logits_stay_what_they_are(device: str, loss_rows_: LossRows) -> None:
    logits, labels = make_normal(3, 64, seed=0, device=device), make_labels(3, 64, device)
    before = logits.clone()
    losses = loss_rows_(logits, 64, labels, False)
    assert torch.equal(logits, before)
    assert torch.equal(losses, loss_rows_(logits, 64, labels, True))


@ROW_FUNCTIONS
def test_ignored_rows_give_no_loss_and_no_gradient_whatever_they_hold(
    device: str, loss_rows_: LossRows
) -> None:
    logits = torch.full((2, 64), float("nan"), device=device)
    assert torch.equal(
        loss_rows_(logits, 64, torch.full((2,), -100, device=device), True).cpu(), torch.zeros(2)
    )
    assert torch.equal(logits.cpu(), torch.zeros(2, 64))


@ROW_FUNCTIONS
@pytest.mark.parametrize("label", [-1, -101, 60, 1 << 40])
def test_a_label_out_of_range_makes_the_loss_nan_and_reads_nothing(
    device: str, loss_rows_: LossRows, label: int
) -> None:
    logits = make_normal(2, 64, seed=0, device=device)
    losses = loss_rows_(logits, 60, torch.tensor([label, 3], device=device), True)
    assert losses.isnan().tolist() == [True, False]
    assert torch.equal(logits[0], torch.zeros_like(logits[0]))


@ROW_FUNCTIONS
def test_huge_and_infinite_logits_are_guarded(device: str, loss_rows_: LossRows) -> None:
    logits = torch.full((3, 64), -1e4, device=device)
    logits[0, 5], logits[1, 6], logits[2, 7] = 1e4, 0.0, 3e4
    logits[1, 10:] = float("-inf")
    labels = torch.tensor([5, 6, 0], device=device)
    losses = loss_rows_(logits, 64, labels, True)
    torch.testing.assert_close(losses.cpu(), torch.tensor([0.0, 0.0, 4e4]))
    assert logits.isfinite().all()


@pytest.mark.parametrize("with_bias", [False, True])
def test_the_whole_operator_stays_within_the_error_budget(device: str, fused: None, with_bias: bool) -> None:
    hidden, weight, labels, bias = make_inputs(11, 130, 24, device=device)
    inputs = (hidden, weight, bias if with_bias else torch.zeros_like(bias))
    loss, got = gradients(masked_token_loss, inputs, labels)
    honest_loss, honest = gradients(plain, inputs, labels)
    exact_loss, exact = gradients(plain, tuple(t.double() for t in inputs), labels)
    assert_within_budget("loss", loss, honest_loss, exact_loss)
    for name, *tensors in zip(("d_hidden", "d_weight", "d_bias"), got, honest, exact, strict=True):
        assert_within_budget(name, *tensors)


@pytest.mark.parametrize("rows", [63, 64, 65, 200])
def test_the_result_does_not_depend_on_the_chunks(
    monkeypatch: pytest.MonkeyPatch, device: str, rows: int
) -> None:
    hidden, weight, labels, bias = make_inputs(rows, 70, 9, dtype=torch.float64, device=device)
    whole = gradients(masked_token_loss, (hidden, weight, bias), labels)
    monkeypatch.setattr(op, "_LOGITS_BYTES", 1)
    cut = gradients(masked_token_loss, (hidden, weight, bias), labels)
    assert op.chunk_rows(200, 70, 8) == 64
    torch.testing.assert_close(cut, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("rows", "vocab", "chunks"), [(0, 10, 0), (1304, 58498, 1), (4800, 151936, 4), (1 << 20, 151936, 6)]
)
def test_logits_keep_to_their_memory_in_at_most_six_chunks(rows: int, vocab: int, chunks: int) -> None:
    step = op.chunk_rows(rows, vocab, 2)
    assert -(-rows // max(step, 1)) == chunks
    assert chunks == 6 or step * vocab * 2 <= op._LOGITS_BYTES


@pytest.mark.parametrize("needed", range(1, 8))
def test_every_subset_of_required_gradients_is_served(device: str, fused: None, needed: int) -> None:
    hidden, weight, labels, bias = make_inputs(7, 10, 4, device=device)
    inputs = (hidden, weight, bias)
    leaves = [t.clone().requires_grad_(bool(needed >> i & 1)) for i, t in enumerate(inputs)]
    (-2.0 * masked_token_loss(leaves[0], leaves[1], labels, leaves[2])).backward()
    _, exact = gradients(plain, tuple(t.double() for t in inputs), labels)
    for i, (leaf, truth) in enumerate(zip(leaves, exact, strict=True)):
        assert (leaf.grad is not None) == bool(needed >> i & 1)
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad.double(), -2.0 * truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [0, 5])
def test_with_no_row_that_counts_loss_and_gradients_are_zero(device: str, fused: None, rows: int) -> None:
    hidden, weight, labels, bias = make_inputs(rows, 6, 3, device=device)
    loss, got = gradients(masked_token_loss, (hidden, weight, bias), torch.full_like(labels, -100))
    assert float(loss) == 0.0
    assert [int(t.count_nonzero()) for t in got] == [0, 0, 0]
    assert [t.shape for t in got] == [hidden.shape, weight.shape, bias.shape]


def test_bf16_logits_are_rounded_once_and_summed_in_fp32(device: str, fused: None) -> None:
    hidden, weight, labels, bias = make_inputs(9, 70, 16, dtype=torch.bfloat16, device=device)
    loss, _ = gradients(masked_token_loss, (hidden, weight, torch.zeros_like(bias)), labels)
    torch.testing.assert_close(loss, plain(hidden, weight, labels, None))
    assert loss.dtype == torch.float32


def test_autocast_changes_neither_loss_nor_gradients() -> None:
    hidden, weight, labels, bias = make_inputs(7, 10, 4)
    outside = gradients(masked_token_loss, (hidden, weight, bias), labels)
    with torch.autocast("cpu", torch.bfloat16):
        inside = gradients(masked_token_loss, (hidden, weight, bias), labels)
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)


def test_without_anything_to_train_no_gradient_is_formed() -> None:
    hidden, weight, labels, bias = make_inputs(7, 10, 4)
    assert not masked_token_loss(hidden, weight, labels, bias).requires_grad
    with torch.no_grad():
        assert not masked_token_loss(hidden.requires_grad_(), weight, labels).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("flags", [(False, False, False), (True, False, False), (True, True, True)])
def test_the_operator_keeps_the_contracts_of_the_dispatcher(
    dtype: torch.dtype, flags: tuple[bool, bool, bool]
) -> None:
    hidden, weight, labels, bias = make_inputs(5, 7, 3, dtype=dtype)
    for optional in (bias, None)[: 1 + (not flags[2])]:
        arguments = (hidden, weight, optional, labels, *flags)
        torch.library.opcheck(torch.ops.reca.masked_token_loss.default, arguments)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_the_public_function_compiles_to_one_graph(impl: str) -> None:
    def step(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor) -> Tensor:
        return 3 * masked_token_loss(2 * hidden, weight, labels, bias, impl=impl)

    hidden, weight, labels, bias = make_inputs(5, 7, 3)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = [gradients(function, (hidden, weight, bias), labels) for function in (compiled, step)]
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


H, W, L, B = torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(4, dtype=torch.int64), torch.zeros(5)


@pytest.mark.parametrize(
    ("inputs", "impl", "error", "message"),
    [
        (
            (H[0], W, L, B),
            "auto",
            ValueError,
            r"hidden must be \[rows, width\], got \[3\]; flatten \[B, T, D\]",
        ),
        ((H, W[0], L, B), "auto", ValueError, r"weight must be \[vocab, width\], got \[3\]"),
        ((H[:, :0], W, L, B), "auto", ValueError, r"hidden must be \[rows, width\], got \[4, 0\]"),
        (
            (H, W[:, :2], L, B),
            "auto",
            ValueError,
            r"weight must be \[vocab > 0, 3\], got \[5, 2\]; one row per",
        ),
        ((H, W[:0], L, B), "auto", ValueError, r"weight must be \[vocab > 0, 3\], got \[0, 3\]"),
        (
            (H, W, L[:2], B),
            "auto",
            ValueError,
            r"labels must be \[4\], got \[2\]; one label per row of hidden",
        ),
        ((H, W, L, B[:2]), "auto", ValueError, r"bias must be \[5\], got \[2\]; one value per row of weight"),
        ((H, W, L.int(), B), "auto", TypeError, r"labels must be one of int64, got int32; convert it first"),
        ((H, W.half(), L, B), "auto", TypeError, r"weight must be float32 like hidden, got float16"),
        ((H, W, L, B.half()), "auto", TypeError, r"bias must be float32 like hidden, got float16"),
        ((H.int(), W, L, B), "auto", TypeError, r"hidden must be one of bfloat16.*, got int32"),
        ((H, W, L.to("meta"), B), "auto", ValueError, r"labels must be on cpu like hidden, got meta"),
        ((H, W, L, B), "fused", ValueError, r"impl='fused' needs CUDA tensors, got cpu"),
        ((H, W, L, B), "cce", ValueError, r"impl must be one of auto, fused, reference, got 'cce'"),
    ],
)
def test_bad_input_is_refused_with_a_cure(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor], impl: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^masked_token_loss: {message}"):
        masked_token_loss(*inputs, impl=impl)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunked", [False, True])
def test_on_a_gpu_low_precision_stays_within_the_error_budget(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, chunked: bool
) -> None:
    if chunked:
        monkeypatch.setattr(op, "_LOGITS_BYTES", 1)
    hidden, weight, labels, _ = make_inputs(389, 5003, 256, dtype=dtype, device="cuda")
    inputs = (hidden, weight / 16, torch.zeros(5003, dtype=dtype, device="cuda"))
    loss, got = gradients(masked_token_loss, inputs, labels)
    honest_loss, honest = gradients(plain, inputs, labels)
    exact_loss, exact = gradients(plain, tuple(t.double() for t in inputs), labels)
    assert_within_budget("loss", loss, honest_loss, exact_loss)
    for name, *tensors in zip(("d_hidden", "d_weight"), got, honest, exact, strict=False):
        assert_within_budget(name, *tensors)


@pytest.mark.gpu
def test_on_a_gpu_a_captured_graph_replays_on_new_values() -> None:
    hidden, weight, labels, bias = make_inputs(129, 515, 64, device="cuda")
    static = [t.clone().requires_grad_() for t in (hidden, weight, bias)]

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(masked_token_loss(static[0], static[1], labels, static[2]), static)

    step()  # warm-up compiles outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        static[0].copy_(2 * hidden)
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)
