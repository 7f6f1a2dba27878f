"""Counter-based random numbers: pure, keyed, and the same function as Triton's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from reca.kernels import philox, philox4x32
from reca.profiling.launches import LaunchCounter
from reca.randomness import RandomSource, key_of

SAMPLES = torch.tensor([0, 3, (5 << 32) | 7])


@pytest.mark.parametrize("make", [int, lambda word: torch.tensor([word])])
def test_philox_matches_the_published_known_answers(make: Callable[[int], Any]) -> None:
    # Random123 kat_vectors, philox 4x32 10 rounds: zero counter and key, and all ones.
    zero, ones = make(0), make(0xFFFFFFFF)
    words = philox4x32(0, zero, zero, zero, zero)
    assert [int(w) for w in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    words = philox4x32(0xFFFFFFFFFFFFFFFF, ones, ones, ones, ones)
    assert [int(w) for w in words] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_numbers_depend_on_seed_step_sample_and_purpose_only() -> None:
    source = RandomSource(seed=1, step=2)
    base = source.normal("noise", SAMPLES, 9)
    assert torch.equal(base, RandomSource(1, 2).normal("noise", SAMPLES, 9))
    assert torch.equal(base[1:2], source.normal("noise", SAMPLES[1:2], 9)), (
        "a sample's numbers ignore its neighbours"
    )
    assert torch.equal(base[:, :5], source.normal("noise", SAMPLES, 5)), "a prefix ignores the length"
    others = [
        RandomSource(2, 2).normal("noise", SAMPLES, 9),
        source.at(3).normal("noise", SAMPLES, 9),
        source.normal("time", SAMPLES, 9),
        source.normal("noise", SAMPLES + 1, 9),
    ]
    assert all(not torch.isclose(base, other).any() for other in others)


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    RandomSource(0).normal("noise", SAMPLES, 100)
    assert torch.equal(before, torch.get_rng_state())


def test_normals_have_the_moments_of_a_standard_normal() -> None:
    values = RandomSource(0).normal("noise", torch.arange(64), 4096).double()
    n = values.numel()
    assert abs(values.mean()) < 5 / math.sqrt(n)
    assert abs(values.square().mean() - 1) < 5 * math.sqrt(2 / n)
    assert abs(values.pow(4).mean() - 3) < 5 * math.sqrt(96 / n)


def test_uniforms_fill_the_unit_interval_evenly() -> None:
    values = RandomSource(0).uniform("u", torch.arange(64), 4096)
    assert values.min() >= 0 and values.max() < 1
    counts = torch.histc(values, bins=16, min=0, max=1)
    expected = values.numel() / 16
    assert ((counts - expected).square() / expected).sum() < 45, "chi-square, 15 degrees of freedom, p < 1e-4"


def test_ragged_rows_equal_each_sample_drawn_alone() -> None:
    source = RandomSource(4, 1)
    rows = source.normal_rows("noise", SAMPLES, [2, 0, 5], 3)
    alone = [source.normal("noise", SAMPLES[i : i + 1], n * 3).view(n, 3) for i, n in enumerate([2, 0, 5])]
    assert torch.equal(rows, torch.cat(alone))


def test_ragged_rows_refuse_a_wrong_number_of_lengths() -> None:
    with pytest.raises(ValueError, match="one entry per sample, got 2 for 3"):
        RandomSource(0).normal_rows("noise", SAMPLES, [1, 2], 3)


@pytest.mark.parametrize("length", [1, 2, 7, 1000])
def test_permutations_hold_every_index_once_and_change_with_the_epoch(length: int) -> None:
    source = RandomSource(0)
    first, second = source.permutation("order", 0, length), source.permutation("order", 1, length)
    assert torch.equal(first.sort().values, torch.arange(length))
    assert length < 3 or not torch.equal(first, second)


def test_integers_stay_below_their_bound_and_reach_all_values() -> None:
    drawn = {RandomSource(0).integer("prompt", i, 5) for i in range(200)}
    assert drawn == set(range(5))


@pytest.mark.parametrize("sample", [0, 5, (1 << 63) - 1, -3])
def test_decisions_on_the_host_are_the_first_number_of_the_sample(sample: int) -> None:
    source, ids = RandomSource(9, 4), torch.tensor([sample])
    assert source.scalar("crop", sample) == float(source.uniform("crop", ids, 1))
    word = philox(ids, 1, key=key_of(9, "crop"), step=4, distribution="words")
    assert source.integer("crop", sample, 1237) == int(word) * 1237 >> 32


def test_a_draw_is_one_launch_even_if_samples_are_ragged_but_for_their_join() -> None:
    source = RandomSource(0)
    for draw, launches in (
        (lambda: source.normal("noise", SAMPLES, 64), 1),
        (lambda: source.uniform("order", SAMPLES, 7), 1),
        (lambda: source.normal_rows("noise", SAMPLES, [4, 4, 4], 3), 1),
        (lambda: source.normal_rows("noise", SAMPLES, [4, 0, 9], 3), 2),
    ):
        with LaunchCounter() as counter:
            draw()
        assert counter.kernels == launches


def test_keys_differ_by_purpose() -> None:
    assert key_of(0, "a") != key_of(0, "b") != key_of(1, "b")
