"""Norm, rotary embedding, time features, position table, feed-forward blocks: each against its formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from reca.layers.mlp import MLP, SwiGLU
from reca.layers.norm import LayerNorm, RMSNorm
from reca.layers.position import sincos_position_table
from reca.layers.rotary import apply_rotary, rotary_table
from reca.layers.timestep import timestep_features


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- RMSNorm


def test_rms_norm_is_its_formula() -> None:
    norm = RMSNorm(7, eps=0.1).double()
    norm.weight.data = randn(7, seed=1)
    x = randn(3, 5, 7)
    expected = x / (x.pow(2).sum(-1, keepdim=True) / 7 + 0.1).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected, rtol=1e-14, atol=1e-14)


def test_rms_norm_takes_statistics_in_fp32_and_casts_before_the_weight() -> None:
    norm = RMSNorm(1024).bfloat16()
    norm.weight.data = randn(1024, seed=1, dtype=torch.bfloat16)
    x = 30 * randn(5, 1024, dtype=torch.bfloat16)
    wide = x.float()
    quotient = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    assert norm(x).dtype == torch.bfloat16
    assert torch.equal(norm(x), norm.weight * quotient.bfloat16())
    assert not torch.equal(norm(x), (norm.weight.float() * quotient).bfloat16())


def test_rms_norm_prints_its_width_and_eps() -> None:
    assert repr(RMSNorm(3, eps=1e-5)) == "RMSNorm(3, eps=1e-05)"


# --- LayerNorm


def test_layer_norm_is_torchs_under_its_names() -> None:
    norm, twin = LayerNorm(7, eps=0.1).double(), torch.nn.LayerNorm(7, eps=0.1).double()
    norm.weight.data, norm.bias.data = randn(7, seed=1), randn(7, seed=2)
    twin.load_state_dict(norm.state_dict())
    x = randn(3, 5, 7)
    torch.testing.assert_close(norm(x), twin(x), rtol=1e-12, atol=1e-12)
    assert repr(norm) == repr(twin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norm_rounds_once_to_the_dtype_of_autocast(dtype: torch.dtype) -> None:
    norm = LayerNorm(64)
    norm.weight.data, norm.bias.data = (randn(64, seed=i, dtype=torch.float32) for i in (1, 2))
    x = randn(3, 64, dtype=dtype)
    exact = F.layer_norm(x.double(), (64,), norm.weight.double(), norm.bias.double())
    with torch.autocast("cpu", torch.bfloat16):
        normed = norm(x)
    assert normed.dtype == torch.bfloat16
    # Half a unit in the last place, and what fp32 arithmetic may move it.
    torch.testing.assert_close(normed.double(), exact, rtol=2**-8 + 2**-20, atol=2**-20)
    assert norm(x).dtype == dtype


def test_layer_norm_forms_the_sum_that_it_reads_and_serves_several_readers() -> None:
    norm = LayerNorm(6)
    residual, *deltas = (randn(3, 6, seed=i, dtype=torch.float32) for i in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        summed, first, second = norm.add(residual, [delta.bfloat16() for delta in deltas], readers=2)
    rounded = residual + (deltas[0].bfloat16().float() + deltas[1].bfloat16().float())
    assert torch.equal(summed, rounded)
    assert first.dtype == torch.bfloat16
    assert torch.equal(first, second)
    torch.testing.assert_close(first, norm(rounded).bfloat16())
    stream, normed = norm.add(residual, ())
    assert stream is residual
    assert torch.equal(normed, norm(residual))


# --- Rotary embedding


def test_rotation_is_that_of_complex_numbers_made_of_the_two_halves() -> None:
    positions, x = torch.tensor([0, 3, 3, 41]), randn(4, 2, 10)
    frequency = 1000.0 ** (-torch.arange(0, 10, 2, dtype=torch.float64) / 10)
    turn = torch.polar(torch.ones(4, 5, dtype=torch.float64), positions[:, None] * frequency)
    turned = torch.complex(x[..., :5], x[..., 5:]) * turn[:, None]
    got = apply_rotary(x, *rotary_table(positions, 10, theta=1000.0))
    # The table is fp32: an angle of 41 is known to 41 * 2^-24.
    torch.testing.assert_close(got, torch.cat([turned.real, turned.imag], -1), rtol=0, atol=41 * 2**-22)


def test_scores_depend_on_the_distance_of_positions_only() -> None:
    query, key = randn(1, 1, 16), randn(1, 1, 16, seed=1)

    def score(position_q: int, position_k: int) -> Tensor:
        rotated = [
            apply_rotary(x, *rotary_table(torch.tensor([p]), 16))
            for x, p in ((query, position_q), (key, position_k))
        ]
        return (rotated[0] * rotated[1]).sum()

    torch.testing.assert_close(score(9, 4), score(29, 24), rtol=0, atol=1e-4)
    torch.testing.assert_close(score(4, 4), (query * key).sum(), rtol=0, atol=1e-4)
    assert (score(9, 4) - score(4, 9)).abs() > 1e-2


def test_partial_rotation_leaves_the_other_dimensions_alone() -> None:
    x, table = randn(3, 2, 10), rotary_table(torch.tensor([5, 6, 7]), 4)
    got = apply_rotary(x, *table)
    assert torch.equal(got[..., 4:], x[..., 4:])
    torch.testing.assert_close(got[..., :4], apply_rotary(x[..., :4], *table))
    assert not torch.allclose(got[..., :4], x[..., :4])


def test_the_table_is_fp32_and_the_rotation_keeps_the_dtype() -> None:
    cos, sin = rotary_table(torch.tensor([1, 2]), 6)
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.shape == sin.shape == (2, 3)
    assert apply_rotary(randn(2, 1, 6, dtype=torch.bfloat16), cos, sin).dtype == torch.bfloat16


def test_rotary_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="rotary_table: dim must be even, got 5"):
        rotary_table(torch.tensor([1]), 5)
    cos, sin = rotary_table(torch.tensor([1, 2]), 8)
    message = (
        r"apply_rotary: cos and sin must be \[3, at most 4\] for x \(3, 1, 8\), got \(2, 4\) and \(2, 4\)"
    )
    with pytest.raises(ValueError, match=message):
        apply_rotary(randn(3, 1, 8), cos, sin)
    with pytest.raises(ValueError, match=r"at most 3\] for x \(2, 1, 6\), got \(2, 4\)"):
        apply_rotary(randn(2, 1, 6), cos, sin)


# --- Time and position


def test_time_features_are_cosines_first_and_the_time_is_not_scaled() -> None:
    times = [0.0, 0.3, 1.0]
    got = timestep_features(torch.tensor(times), 6)
    frequencies = [10000 ** (-k / 3) for k in range(3)]
    expected = [[f(t * w) for f in (math.cos, math.sin) for w in frequencies] for t in times]
    torch.testing.assert_close(got, torch.tensor(expected), rtol=0, atol=4 * 2**-24)
    assert got.dtype == torch.float32
    with pytest.raises(ValueError, match="timestep_features: dim must be even, got 7"):
        timestep_features(torch.tensor([0.5]), 7)


def test_time_features_of_bf16_times_are_computed_in_fp32() -> None:
    times = torch.tensor([0.3, 0.77]).bfloat16()
    assert torch.equal(timestep_features(times, 8), timestep_features(times.float(), 8))


def test_the_position_table_holds_the_column_first_then_the_row() -> None:
    side, dim = 5, 12
    table = sincos_position_table(dim, side)
    assert table.shape == (25, 12)
    assert table.dtype == torch.float32
    frequencies = [10000 ** (-j / 3) for j in range(3)]
    for row in range(side):
        for col in range(side):
            expected = [
                f(place * w) for place in (col, row) for f in (math.sin, math.cos) for w in frequencies
            ]
            torch.testing.assert_close(table[row * side + col], torch.tensor(expected), rtol=0, atol=2**-24)
    with pytest.raises(ValueError, match="sincos_position_table: dim must be a multiple of 4, got 6"):
        sincos_position_table(6, 2)


# --- Feed-forward blocks


def test_swiglu_is_its_formula_with_the_gate_above_the_up_projection() -> None:
    block, x = SwiGLU(5, 3).double(), randn(4, 5)
    gate, up = block.gate_up.weight[:3], block.gate_up.weight[3:]
    gated = x @ gate.T
    expected = (gated / (1 + torch.exp(-gated)) * (x @ up.T)) @ block.down.weight.T
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-14)
    assert sorted(block.state_dict()) == ["down.weight", "gate_up.weight"]


def test_mlp_uses_the_tanh_form_of_gelu_and_biases() -> None:
    block, x = MLP(5, 7, 3).double(), randn(4, 5)
    hidden = x @ block.fc1.weight.T + block.fc1.bias
    inner = math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)
    expected = (hidden * (1 + inner.tanh()) / 2) @ block.fc2.weight.T + block.fc2.bias
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(block(x), block.fc2(F.gelu(hidden)), rtol=1e-9, atol=1e-9)
    assert MLP(5, 7)(x.float()).shape == (4, 5)


def test_mlp_takes_weights_that_are_cast_already_as_autocast_takes_wide_ones() -> None:
    wide, x = MLP(5, 7, 3).float(), randn(4, 5, dtype=torch.float32).requires_grad_()
    stored = MLP(5, 7, 3).bfloat16()
    stored.load_state_dict(wide.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        outs = [block(x) for block in (wide, stored)]
    assert outs[0].dtype == torch.bfloat16
    assert torch.equal(*outs)
    gradients = [
        torch.autograd.grad(out.float().square().sum(), [x, *block.parameters()])
        for out, block in zip(outs, (wide, stored), strict=True)
    ]
    for from_wide, from_stored in zip(*gradients, strict=True):
        assert torch.equal(from_wide, from_stored.to(from_wide.dtype))
