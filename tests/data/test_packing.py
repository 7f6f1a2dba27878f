"""Grouping samples into steps: nothing lost, nothing doubled, no limit broken."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reca.data.order import SampleOrder
from reca.data.packing import Packer, PackLimits

LIMITS = st.builds(
    lambda images, max_tokens, sample_share, tokens_share, waiting: PackLimits(
        images=images,
        tokens=None if tokens_share is None else max(1, int(max_tokens * tokens_share)),
        max_tokens=max_tokens,
        max_sample_tokens=max(1, int(max_tokens * sample_share)),
        max_waiting=waiting,
    ),
    st.integers(1, 9),
    st.integers(1, 200),
    st.floats(0.05, 1),
    st.none() | st.floats(0.05, 1),
    st.integers(1, 5),
)
LENGTHS = st.lists(st.integers(0, 220), min_size=1, max_size=120)


def pack(
    limits: PackLimits, lengths: list[int], waiting: tuple[int, ...] = (), start: int = 0
) -> tuple[list[tuple[list[int], list[int]]], list[int], list[int]]:
    """(steps as (samples, waiting after), refused, left at the end of the stream)."""
    packer: Packer[int] = Packer(limits)
    for sample in waiting:
        packer.wait(sample, lengths[sample])
    stream = iter(range(start, len(lengths)))
    steps: list[tuple[list[int], list[int]]] = []
    refused: list[int] = []
    while True:
        packer.open()
        while not packer.is_full:
            sample = next(stream, None)
            if sample is None:
                return steps, refused, packer.take() + [waiter for waiter, _ in packer.waiting]
            if packer.accepts(lengths[sample]):
                packer.offer(sample, lengths[sample])
            else:
                refused.append(sample)
        steps.append((packer.take(), [waiter for waiter, _ in packer.waiting]))


@given(LIMITS, LENGTHS)
@settings(max_examples=150, deadline=None)
def test_every_sample_is_packed_once_or_refused_once(limits: PackLimits, lengths: list[int]) -> None:
    steps, refused, left = pack(limits, lengths)
    packed = [sample for step, _ in steps for sample in step]
    assert sorted(packed + refused + left) == list(range(len(lengths)))
    assert all(lengths[sample] > limits.max_sample_tokens for sample in refused)


@given(LIMITS, LENGTHS)
@settings(max_examples=150, deadline=None)
def test_no_step_is_empty_or_breaks_a_limit(limits: PackLimits, lengths: list[int]) -> None:
    for step, waiting in pack(limits, lengths)[0]:
        total = sum(lengths[sample] for sample in step)
        assert 1 <= len(step) <= limits.images
        assert total <= limits.max_tokens
        assert len(waiting) <= limits.max_waiting
        closed_by_tokens = limits.tokens is not None and total >= limits.tokens
        assert closed_by_tokens or len(step) == limits.images or len(waiting) == limits.max_waiting


@given(LIMITS, LENGTHS)
@settings(max_examples=100, deadline=None)
def test_the_first_that_waits_opens_the_next_step(limits: PackLimits, lengths: list[int]) -> None:
    steps = pack(limits, lengths)[0]
    for (_, waiting), (step, _) in pairwise(steps):
        if waiting:
            assert step[0] == waiting[0]


@given(LIMITS, LENGTHS, st.data())
@settings(max_examples=100, deadline=None)
def test_packing_goes_on_from_any_step(limits: PackLimits, lengths: list[int], data: st.DataObject) -> None:
    steps, _, left = pack(limits, lengths)
    if not steps:
        return
    cut = data.draw(st.integers(0, len(steps) - 1))
    seen = {sample for step, waiting in steps[: cut + 1] for sample in (*step, *waiting)}
    refused = {k for k, length in enumerate(lengths) if length > limits.max_sample_tokens}
    start = max(seen) + 1
    while start in refused:
        start += 1
    rest, _, rest_left = pack(limits, lengths, tuple(steps[cut][1]), start)
    assert (rest, rest_left) == (steps[cut + 1 :], left)


def test_a_step_holds_the_samples_in_the_order_of_the_stream_until_one_does_not_fit() -> None:
    limits = PackLimits(images=9, tokens=10, max_tokens=12, max_sample_tokens=8)
    steps, refused, left = pack(limits, [4, 5, 8, 2, 9, 4, 4, 1])
    assert steps == [([0, 1, 3], [2]), ([2, 5], [])]
    assert (refused, left) == ([4], [6, 7])


def test_a_step_is_closed_once_enough_samples_wait() -> None:
    limits = PackLimits(images=9, tokens=None, max_tokens=10, max_sample_tokens=8, max_waiting=2)
    steps, _, left = pack(limits, [8] * 6)
    assert steps == [([0], [1, 2]), ([1], [2, 3]), ([2], [3, 4]), ([3], [4, 5])]
    assert left == [4, 5]


def test_without_a_token_goal_steps_are_closed_by_images() -> None:
    limits = PackLimits(images=3, tokens=None, max_tokens=100, max_sample_tokens=50)
    assert [step for step, _ in pack(limits, [9] * 8)[0]] == [[0, 1, 2], [3, 4, 5]]


def test_impossible_limits_and_offers_are_refused() -> None:
    with pytest.raises(ValueError, match="max_sample_tokens=9 must not exceed"):
        PackLimits(images=1, tokens=None, max_tokens=8, max_sample_tokens=9)
    with pytest.raises(ValueError, match="every limit must be positive"):
        PackLimits(images=0, tokens=None, max_tokens=8, max_sample_tokens=8)
    packer: Packer[int] = Packer(PackLimits(images=1, tokens=None, max_tokens=8, max_sample_tokens=4))
    with pytest.raises(ValueError, match="5 tokens are too many"):
        packer.offer(0, 5)
    packer.offer(0, 4)
    with pytest.raises(ValueError, match="the pack is full"):
        packer.offer(1, 1)


# Order


@given(st.integers(0, 2**31), st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_every_pass_is_a_permutation(seed: int, length: int) -> None:
    order = SampleOrder(seed, length)
    for epoch in range(3):
        places = [order.place(epoch * length + k) for k in range(length)]
        assert {e for e, _ in places} == {epoch}
        assert sorted(item for _, item in places) == list(range(length))


def test_the_order_depends_on_seed_length_and_index_alone() -> None:
    indices = [*range(95), 3, 90, 0, 47]
    one, fresh = SampleOrder(7, 31), [SampleOrder(7, 31).place(k) for k in indices]
    assert [one.place(k) for k in indices] == fresh
    assert [SampleOrder(8, 31).place(k) for k in indices] != fresh


def test_passes_differ_from_one_another() -> None:
    order = SampleOrder(0, 31)
    passes = [tuple(order.place(e * 31 + k)[1] for k in range(31)) for e in range(4)]
    assert len(set(passes)) == 4


def test_the_order_refuses_what_it_cannot_place() -> None:
    with pytest.raises(ValueError, match="length must be positive"):
        SampleOrder(0, 0)
    with pytest.raises(ValueError, match="index must not be negative"):
        SampleOrder(0, 3).place(-1)
    assert [SampleOrder(0, 1).place(k) for k in range(3)] == [(0, 0), (1, 0), (2, 0)]
