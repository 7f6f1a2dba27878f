"""The 8-bit format of moments: error bound, exact mean, blocks, and the same codes from Triton."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reca.kernels.adamw import kernel
from reca.kernels.adamw.moments import (
    BLOCK,
    FIRST,
    SECOND,
    MomentFormat,
    decode_moment,
    encode_moment,
    moment_bound,
)
from reca.kernels.testing import make_normal

FORMATS = pytest.mark.parametrize(("form", "depth"), [(FIRST, 17), (SECOND, 33)], ids=["first", "second"])


def make_words(count: int, seed: int = 0) -> Tensor:
    """16 random bits per element."""
    return torch.randint(1 << 16, (count,), generator=torch.Generator().manual_seed(seed))


def make_values(count: int, form: MomentFormat, *, spread: float = 20.0, seed: int = 1) -> Tensor:
    """Values whose magnitudes cover `spread` octaves; of both signs where the format has one."""
    values = make_normal(count, seed=seed) * torch.exp2(spread * make_normal(count, seed=seed + 1) / 4)
    return values if form.sign else values.abs()


@FORMATS
def test_a_code_is_a_small_float_below_the_scale_of_its_block(form: MomentFormat, depth: int) -> None:
    codes = torch.arange(256, dtype=torch.int32)
    magnitude = codes & (0xFF - form.sign)
    exponent, mantissa = magnitude >> 3, magnitude & 7
    expected = [
        math.ldexp(f if e == 0 else 8 + f, (0 if e == 0 else e - 1) - depth)
        for e, f in zip(exponent.tolist(), mantissa.tolist(), strict=True)
    ]
    sign = torch.where((codes & form.sign) != 0, -1.0, 1.0)
    got = decode_moment(codes.to(torch.uint8), torch.tensor([4.0]), form)
    assert torch.equal(got, 4 * sign * torch.tensor(expected))
    assert float(got.abs().max()) == 4 * 1.875


@FORMATS
def test_what_is_representable_never_moves(form: MomentFormat, depth: int) -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    values = decode_moment(codes, torch.tensor([2.0**-30]), form)
    for words in (torch.zeros(256, dtype=torch.int64), torch.full((256,), 0xFFFF)):
        again, scales = encode_moment(values, words, form)
        assert scales.tolist() == [2.0**-30]
        assert torch.equal(again, codes)


@FORMATS
@given(
    count=st.sampled_from([0, 1, 255, 256, 257, 700]), exponent=st.integers(-60, 60), seed=st.integers(0, 99)
)
def test_the_error_is_below_an_eighth_or_the_smallest_step(
    form: MomentFormat, depth: int, count: int, exponent: int, seed: int
) -> None:
    values = make_values(count, form, seed=seed) * 2.0**exponent
    codes, scales = encode_moment(values, make_words(count, seed), form)
    assert scales.shape == (-(-count // BLOCK),)
    scale = scales.repeat_interleave(BLOCK)[:count]
    assert bool((values.abs() <= 1.875 * scale).all())
    error = (decode_moment(codes, scales, form) - values).abs()
    assert bool((error <= torch.maximum(values.abs() / 8, scale * 2.0**-depth)).all())


@FORMATS
def test_the_mean_over_all_random_bits_is_the_value(form: MomentFormat, depth: int) -> None:
    bits = torch.arange(1 << 16)
    for seed in range(6):
        value = make_values(1, form, seed=10 + seed)
        block = torch.cat([value.abs() * 1.1 ** (7 * seed), value.expand(255)])  # one larger, one value
        rows = block.repeat(1 << 10)
        words = bits.view(-1, 1).expand(-1, BLOCK).reshape(-1, BLOCK)[:: 1 << 6].reshape(-1)
        codes, scales = encode_moment(rows, words, form)
        decoded = decode_moment(codes, scales, form).view(-1, BLOCK)[:, 1].double()
        step = torch.maximum(value.abs() / 8, scales[0] * 2.0**-depth)
        # Every 64th of the 65,536 random numbers: the mean is right to 2^-10 of a step.
        assert abs(float(decoded.mean() - value)) <= float(step) * 2**-9


@FORMATS
def test_a_block_without_finite_values_is_nan_and_the_next_one_is_not(form: MomentFormat, depth: int) -> None:
    for poison in (float("nan"), float("inf"), 3e38):
        values = make_values(3 * BLOCK, form)
        values[BLOCK + 7] = poison
        decoded = decode_moment(*encode_moment(values, make_words(3 * BLOCK), form), form).view(3, BLOCK)
        assert decoded.isnan().all(dim=1).tolist() == [False, True, False]
        assert not decoded[[0, 2]].isnan().any()


def test_zeros_are_the_state_before_the_first_update() -> None:
    codes, scales = torch.zeros(300, dtype=torch.uint8), torch.zeros(2)
    for form in (FIRST, SECOND):
        assert torch.equal(decode_moment(codes, scales, form), torch.zeros(300))
        again, _ = encode_moment(torch.zeros(300), make_words(300), form)
        assert torch.equal(again, codes)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.95), (0.0, 0.9), (0.5, 0.5)])
def test_no_sequence_of_gradients_takes_exact_moments_past_the_bound(betas: tuple[float, float]) -> None:
    beta1, beta2 = betas
    ages = torch.arange(200, dtype=torch.float64)
    worst = (beta1 / beta2) ** ages  # where Cauchy-Schwarz is an equality
    for gradients in (worst, make_normal(200, seed=0, dtype=torch.float64)):
        m = ((1 - beta1) * beta1**ages * gradients).sum()
        v = ((1 - beta2) * beta2**ages * gradients.square()).sum()
        assert float(m.abs() / v.sqrt()) <= moment_bound(beta1, beta2) * (1 + 1e-9)
    m = ((1 - beta1) * beta1**ages * worst).sum()
    v = ((1 - beta2) * beta2**ages * worst.square()).sum()
    assert float(m / v.sqrt()) == pytest.approx(moment_bound(beta1, beta2), rel=1e-3)


def test_betas_without_a_bound_hold_nothing_back() -> None:
    assert moment_bound(0.95, 0.9) == moment_bound(0.9, 0.81 * 0.99) == 1e30


@pytest.mark.parametrize("count", [1, 255, 2051])
def test_triton_gives_the_same_codes_bit_for_bit(device: str, count: int) -> None:
    # Without memory the moments are the gradient and its square: nothing but the encoding is left.
    gradient = make_values(count, FIRST, spread=12.0).to(device)
    blocks = -(-count // BLOCK)
    codes = [torch.full((count,), 77, dtype=torch.uint8, device=device) for _ in range(2)]
    scales = [torch.ones(blocks, device=device) for _ in range(2)]
    weight = torch.zeros(count, device=device)
    number = torch.zeros((), device=device)
    step = torch.tensor(3, device=device)
    arguments = (number, number, None, None, step, 0.0, 0.0, 1e-8, 0.0, 0.0, 9, 1 << 34)
    kernel.step_(weight, None, gradient, *codes, None, *arguments, *scales)
    from reca.kernels._philox import element_words

    halves = element_words(9, step, 1 << 34, count) >> 16
    for i, (form, values) in enumerate(((FIRST, gradient), (SECOND, gradient.square()))):
        want_codes, want_scales = encode_moment(values, halves, form)
        assert torch.equal(codes[i], want_codes)
        assert torch.equal(scales[i], want_scales)
