"""Harmon's dropout: masks that are functions of (seed, step, sample, place, pass)."""

from __future__ import annotations

import pytest
import torch

from reca.layers.segments import Segments
from reca.models.harmon.dropout import UNDERSTANDING, VISIBLE, BlockDropout, DrawnDropout
from reca.randomness import RandomSource

RANDOM = RandomSource(seed=3, step=7)


def test_dropout_drops_its_share_scales_the_rest_and_repeats() -> None:
    ids = torch.tensor([5, 9])
    masks = DrawnDropout.of(RANDOM, ids)
    drop = BlockDropout(masks, 0.1, 0.1, "encoder_blocks.0")
    ones = torch.ones(300, 40)
    got = drop.rows(ones, "mlp.drop1", Segments.of((100, 200)))
    assert torch.equal(got, drop.rows(ones, "mlp.drop1", Segments.of((100, 200))))
    assert set(got.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.9))}
    assert float((got == 0).float().mean()) == pytest.approx(0.1, abs=0.01)
    # a sample's mask depends neither on its neighbours nor on its place
    alone = BlockDropout(DrawnDropout.of(RANDOM, ids[1:]), 0.1, 0.1, "encoder_blocks.0")
    assert torch.equal(alone.rows(ones[100:], "mlp.drop1", Segments.of((200,))), got[100:])
    for place, block in (("mlp.drop2", "encoder_blocks.0"), ("mlp.drop1", "encoder_blocks.1")):
        other = BlockDropout(masks, 0.1, 0.1, block)
        assert not torch.equal(other.rows(ones, place, Segments.of((100, 200))), got)


def test_passes_over_the_same_samples_have_masks_of_their_own() -> None:
    ids, segments = torch.tensor([5, 9]), Segments.of((30, 40, 30, 40))
    masks = DrawnDropout.of(RANDOM, ids).over((UNDERSTANDING, VISIBLE))
    both = BlockDropout(masks, 0.1, 0.1, "encoder_blocks.0", (UNDERSTANDING, VISIBLE))
    whole, visible = both.rows(torch.ones(140, 40), "mlp.drop1", segments).chunk(2)
    agreement = float(((whole == 0) & (visible == 0)).float().mean())
    assert agreement == pytest.approx(0.01, abs=0.005)
    for number, expected in ((UNDERSTANDING, whole), (VISIBLE, visible)):
        one = BlockDropout(
            DrawnDropout.of(RANDOM, ids).over((number,)), 0.1, 0.1, "encoder_blocks.0", (number,)
        )
        assert torch.equal(one.rows(torch.ones(70, 40), "mlp.drop1", Segments.of((30, 40))), expected)


def test_dropout_of_attention_drops_probabilities() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(7, 2, 8), torch.randn(7, 2, 8)
    value = torch.ones(7, 2, 8)
    drop = BlockDropout(DrawnDropout.of(RANDOM, torch.tensor([1, 2])), 0.5, 0.0, "encoder_blocks.0")
    segments = Segments.of([3, 4])
    attended = drop.attend(torch.stack([query, key, value], dim=1), segments)
    place = "dropout/encoder_blocks.0.attn.attn_drop"
    keep = RANDOM.uniform(place, torch.tensor([2]), 2 * 4 * 4).view(2, 4, 4) >= 0.5
    scores = torch.einsum("qhd,khd->hqk", query[3:], key[3:]) * 8**-0.5
    expected = (scores.softmax(-1) * keep).sum(-1).t() / 0.5
    torch.testing.assert_close(attended[3:, :, 0], expected)
