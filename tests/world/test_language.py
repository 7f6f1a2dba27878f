"""What is said about scenes, and what never is."""

from __future__ import annotations

import pytest
import torch

from reca.config import WorldConfig
from reca.errors import ConfigError
from reca.randomness import RandomSource
from reca.world.language import (
    ANSWER,
    END,
    IGNORED,
    IMAGE,
    PAD,
    START,
    VOCABULARY,
    WORD,
    conversation,
    decode,
    dense_caption,
    encode,
    rows_of,
    sparse_caption,
)
from reca.world.scenes import COLOURS, PLACES, SHAPES, World, code_of, draw_scenes

WORLD = World.of(WorldConfig(stage="arm").held_out)
RANDOM = RandomSource(2)
IDS = torch.arange(3000)
SCENES = draw_scenes(RANDOM, IDS)


def code(words: str) -> int:
    colour, shape = words.split()
    return int(code_of(torch.tensor(SHAPES.index(shape)), torch.tensor(COLOURS.index(colour))))


def words(rows: torch.Tensor) -> list[str]:
    return [decode(row.tolist()).removeprefix("<start> ") for row in rows]


def test_dense_captions_say_everything_cell_by_cell():
    codes = torch.tensor([[0, code("red circle"), 0, code("blue square")], [code("green ring"), 0, 0, 0]])
    assert words(dense_caption(codes)) == [
        "red circle northeast and blue square southeast",
        "green ring northwest",
    ]


def test_sparse_captions_are_true():
    said_of = [caption.split(" and ") for caption in words(dense_caption(SCENES))]
    for caption, dense in zip(words(sparse_caption(WORLD, SCENES, RANDOM, IDS)), said_of, strict=True):
        first, *rest = caption.split()
        if first in ("one", "two", "three"):
            assert sum(rest[0] in said for said in dense) == ("zero", "one", "two", "three").index(first)
            continue
        for part in caption.split(" and "):
            assert any(set(part.split()) <= set(said.split()) for said in dense), (caption, dense)


def test_no_sparse_caption_names_the_colour_of_a_held_out_pair():
    held_out = set(WorldConfig(stage="arm").held_out)
    captions = words(sparse_caption(WORLD, SCENES, RANDOM, IDS))
    assert WORLD.is_held_out(SCENES).any(dim=1).float().mean() > 0.1
    assert not [caption for caption in captions if any(pair in caption for pair in held_out)]
    # Planted: in a world that holds back another pair they are named.
    other = World.of(("blue circle",))
    captions = words(sparse_caption(other, SCENES, RANDOM, IDS))
    assert [caption for caption in captions if any(pair in caption for pair in held_out)]


def test_sparse_captions_have_the_stated_shares():
    captions = words(sparse_caption(WORLD, SCENES, RANDOM, IDS))
    colours = [caption for caption in captions if set(caption.split()) & set(COLOURS)]
    places = [caption for caption in captions if set(caption.split()) & set(PLACES)]
    pairs = [caption for caption in captions if " and " in caption]
    for found, share in ((colours, 0.15 * 0.92), (places, 0.12), (pairs, 0.10 * 0.7 * 0.6)):
        assert abs(len(found) / len(captions) - share) < 0.02


def test_a_caption_belongs_to_its_sample_id():
    whole = words(sparse_caption(WORLD, SCENES[:50], RANDOM, IDS[:50]))
    assert whole[30:50] == words(sparse_caption(WORLD, SCENES[30:50], RANDOM, IDS[30:50]))


def test_labels_are_the_next_tokens_of_answers_only():
    tokens, labels = conversation(SCENES[:200], RANDOM, IDS[:200], is_seen=False)
    for row, label in zip(tokens.tolist(), labels.tolist(), strict=True):
        is_answer = False
        for here, after, wanted in zip(row, [*row[1:], PAD], label, strict=True):
            is_answer = (is_answer or here == ANSWER) and here != END
            assert wanted == (after if is_answer else IGNORED)


def test_pictures_are_described_cell_by_cell_and_told_in_full():
    tokens, _ = conversation(SCENES[:200], RANDOM, IDS[:200], is_seen=True)
    assert torch.equal(tokens[:, :5], torch.tensor([START] + [IMAGE] * 4).expand(200, -1))
    assert not (tokens == WORD["unknown"]).any()
    for row, caption in zip(tokens.tolist(), words(dense_caption(SCENES[:200])), strict=True):
        said = row[row.index(WORD["describe"]) + 2 :]
        assert decode(said) == caption


def test_what_a_caption_leaves_out_is_answered_with_unknown():
    tokens, _ = conversation(SCENES, RANDOM, IDS, is_seen=False)
    seen = 0
    for row in tokens.tolist():
        text = [VOCABULARY[token] for token in row if token != PAD]
        if "colour" not in text:
            continue
        asked, at = text[text.index("colour") + 1], text.index("colour")
        context = text[1 : min(at, text.index("describe"))]
        said = context[context.index(asked) - 1] if context.index(asked) else ""
        assert text[at + 3] == (said if said in COLOURS else "unknown")
        seen += said not in COLOURS
    assert seen > 50


def test_a_word_that_the_world_lacks_is_an_error_with_its_neighbour():
    assert encode("red circle") == [WORD["red"], WORD["circle"]]
    with pytest.raises(ConfigError, match="no word 'crcle'; did you mean 'circle'"):
        encode("red crcle")
    with pytest.raises(ConfigError, match="no word '<image>'"):
        encode("<image>")


def test_rows_are_padded_on_the_right():
    assert rows_of(["circle", "red circle"]).tolist() == [
        [START, WORD["circle"], PAD],
        [START, WORD["red"], WORD["circle"]],
    ]
