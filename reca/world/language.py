"""Telegraphic language about scenes: words, captions, questions and answers, as rows of token ids.

All functions take whole batches. A row is built in fixed slots, those that say nothing hold PAD, and
`compact` moves the words to the left.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reca.errors import ConfigError, nearest
from reca.randomness import RandomSource
from reca.world.scenes import COLOURS, NUM_CELLS, PLACES, SHAPES, World, colour_of, shape_of

_SPECIAL = ("<pad>", "<start>", "<end>", "<image>", "<answer>")
NUMBERS = ("zero", "one", "two", "three")
VOCABULARY = (
    *_SPECIAL,
    *SHAPES,
    *COLOURS,
    *PLACES,
    *NUMBERS,
    *("and", "empty", "unknown", "what", "colour", "place", "count", "describe"),
)
PAD, START, END, IMAGE, ANSWER = range(len(_SPECIAL))
WORD = {word: index for index, word in enumerate(VOCABULARY)}
IMAGE_TOKENS = NUM_CELLS
"""Positions that one picture takes in a row, right after START."""
IGNORED = -100
"""Label of a position that no loss counts."""

_SHAPE, _COLOUR, _PLACE, _NUMBER = (WORD[words[0]] for words in (SHAPES, COLOURS, PLACES, NUMBERS))
_MOST_DROPPED = 0.6
# Sparse captions: a shape; with its colour; with its place; how many; two shapes; both with colours.
_SPARSE_EDGES = (0.55, 0.70, 0.82, 0.90, 0.995)


def encode(text: str) -> list[int]:
    """Token ids of words between blanks. Raises ConfigError naming the nearest word for an unknown one."""
    words = text.split()
    for word in words:
        if word not in WORD or word in _SPECIAL:
            known = VOCABULARY[len(_SPECIAL) :]
            raise ConfigError(f"the world has no word {word!r}; {nearest(word, known)}")
    return [WORD[word] for word in words]


def decode(tokens: Sequence[int]) -> str:
    """Words of token ids up to the first END, without PAD."""
    words = []
    for token in tokens:
        if token == END:
            break
        if token != PAD:
            words.append(VOCABULARY[token])
    return " ".join(words)


def compact(slots: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Move what is not PAD in [n, slots] to the left, keep its order, and cut columns that are all PAD.

    `others`: tensors of the same shape that move along.
    """
    is_pad = slots == PAD
    order = is_pad.to(torch.int8).argsort(dim=1, stable=True)
    width = int((~is_pad).sum(dim=1).max())
    return tuple(rows.gather(1, order)[:, :width] for rows in (slots, *others))


def rows_of(texts: Sequence[str]) -> Tensor:
    """[n, longest] token ids of captions, each after START and padded on the right."""
    rows = [[START, *encode(text)] for text in texts]
    width = max(len(row) for row in rows)
    return torch.tensor([row + [PAD] * (width - len(row)) for row in rows])


def image_rows(count: int) -> Tensor:
    """[count, 5]: START and the places of one picture's embeddings."""
    return torch.tensor([START] + [IMAGE] * IMAGE_TOKENS).expand(count, -1)


def _objects(codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Words of every cell, [n, 4] each: colour, shape, place; PAD where it is empty."""
    taken = codes > 0
    places = torch.arange(NUM_CELLS, device=codes.device).expand_as(codes) + _PLACE
    return (
        torch.where(taken, colour_of(codes) + _COLOUR, PAD),
        torch.where(taken, shape_of(codes) + _SHAPE, PAD),
        torch.where(taken, places, PAD),
    )


def _listed(colour: Tensor, shape: Tensor, place: Tensor, key: Tensor) -> Tensor:
    """[n, 16] slots that name objects in the order of their keys ([n, 4]), with "and" between them."""
    order = torch.where(shape == PAD, torch.inf, key.float()).argsort(dim=1)
    colour, shape, place = (words.gather(1, order) for words in (colour, shape, place))
    is_later = (shape != PAD) & (torch.arange(NUM_CELLS, device=key.device) > 0)
    joint = torch.where(is_later, WORD["and"], PAD)
    return torch.stack((joint, colour, shape, place), dim=2).flatten(1)


def dense_caption(codes: Tensor) -> Tensor:
    """[n, longest] rows that say everything: "red circle northwest and blue square southeast"."""
    cells = torch.arange(NUM_CELLS, device=codes.device).expand_as(codes)
    return compact(_started(_listed(*_objects(codes), cells)))[0]


def _started(words: Tensor) -> Tensor:
    return torch.cat([torch.full_like(words[:, :1], START), words], dim=1)


def sparse_caption(world: World, codes: Tensor, random: RandomSource, ids: Tensor) -> Tensor:
    """[n, longest] rows that say little, as captions do, and never the colour of a held-out pair.

    A shape (55 %), with its colour (15 %) or place (12 %), how many of a shape (8 %), two shapes (9.5 %), or
    both with their colours (0.5 %); where there is but one object, or both are alike, a shape.
    """
    draws = random.at(0).uniform("sparse_caption", ids, 5)
    edges = torch.tensor(_SPARSE_EDGES, device=codes.device)
    kind = torch.bucketize(draws[:, 0].contiguous(), edges, right=True)
    order = torch.where(codes > 0, draws[:, 1:5], 2.0).argsort(dim=1)[:, :2]
    pair = order.sort(dim=1).values  # in the order of the cells, as dense captions go
    is_pair = (kind >= 4) & ((codes > 0).sum(dim=1) > 1)
    is_pair &= shape_of(codes.gather(1, pair))[:, 0] != shape_of(codes.gather(1, pair))[:, 1]
    cells = torch.where(is_pair[:, None], pair, order)
    chosen = codes.gather(1, cells)  # [n, 2]
    shape, colour = shape_of(chosen), colour_of(chosen)
    number = (shape_of(codes) == shape[:, :1]).sum(dim=1, keepdim=True)
    says_colour = ((kind == 1) | (is_pair & (kind == 5)))[:, None] & ~world.is_held_out(chosen)
    says_second = torch.stack([torch.ones_like(is_pair), is_pair], dim=1)
    slots = [
        torch.where((kind == 3)[:, None], number + _NUMBER, PAD),
        *_named(shape[:, :1], colour[:, :1], says_colour[:, :1], says_second[:, :1]),
        torch.where((kind == 2)[:, None], cells[:, :1] + _PLACE, PAD),
        torch.where(is_pair[:, None], WORD["and"], PAD),
        *_named(shape[:, 1:], colour[:, 1:], says_colour[:, 1:], says_second[:, 1:]),
    ]
    return compact(_started(torch.cat(slots, dim=1)))[0]


def _named(shape: Tensor, colour: Tensor, says_colour: Tensor, says_shape: Tensor) -> tuple[Tensor, Tensor]:
    return (
        torch.where(says_colour & says_shape, colour + _COLOUR, PAD),
        torch.where(says_shape, shape + _SHAPE, PAD),
    )


def conversation(codes: Tensor, random: RandomSource, ids: Tensor, *, is_seen: bool) -> tuple[Tensor, Tensor]:
    """A scene, one question about it and the request to describe it, in either order, with their answers.

    Questions: what a cell holds, the colour or place of a shape that occurs once, how many there are of one.

    Args:
        codes: [n, 4] scenes.
        random, ids: seed and sample ids.
        is_seen: the scene is given as a picture; else as a caption of its objects in any order that leaves
            out up to 60 % of colours and places (30 % on average); those are answered with "unknown".

    Returns: tokens [n, longest], and labels of that shape: the next token where it belongs to an answer.
    """
    draws = random.at(0).uniform("conversation", ids, 24)
    is_told = (draws[:, :8] >= _MOST_DROPPED * draws[:, 8:9]) | is_seen
    says_colour, says_place = is_told[:, :4], is_told[:, 4:]
    colour, shape, place = _objects(codes)
    told_colour = torch.where(says_colour | (colour == PAD), colour, WORD["unknown"])
    told_place = torch.where(says_place | (place == PAD), place, WORD["unknown"])
    said_at = draws[:, 9:13].argsort(dim=1).argsort(dim=1)
    if is_seen:
        context = image_rows(len(codes)).to(codes.device)
    else:
        said = (torch.where(says_colour, colour, PAD), shape, torch.where(says_place, place, PAD))
        context = _started(_listed(*said, said_at))
    question, answer = _question(codes, draws[:, 13:], told_colour, told_place)
    # Descriptions go cell by cell, whatever the caption did; what has no place comes last.
    cells = torch.arange(NUM_CELLS, device=codes.device)
    described_at = torch.where(says_place, cells, NUM_CELLS + said_at)
    description = _listed(told_colour, shape, told_place, described_at)
    request = torch.tensor([[WORD["describe"], ANSWER]], device=codes.device).expand(len(codes), -1)
    end = torch.full_like(request[:, :1], END)
    first = torch.cat([question, answer, end], dim=1)
    second = torch.cat([request, description, end], dim=1)
    is_answer = torch.cat([_is_answer(context, 99), _is_answer(first, 3), _is_answer(second, 2)], dim=1)
    slots = torch.cat([context, first, second], dim=1)
    # Half of the rows ask for the description first.
    key = torch.cat(
        [torch.full_like(part, rank) for rank, part in enumerate((context, first, second))], dim=1
    )
    swapped = (draws[:, 23:24] < 0.5) & (key == 1)
    order = torch.where(swapped, 3, key).argsort(dim=1, stable=True)
    tokens, answers = compact(slots.gather(1, order), is_answer.gather(1, order))
    labels = torch.where(answers[:, 1:], tokens[:, 1:], IGNORED)
    return tokens, torch.cat([labels, torch.full_like(labels[:, :1], IGNORED)], dim=1)


def _is_answer(part: Tensor, first: int) -> Tensor:
    return (torch.arange(part.shape[1], device=part.device) >= first).expand_as(part) & (part != PAD)


def _question(codes: Tensor, draws: Tensor, told_colour: Tensor, told_place: Tensor) -> tuple[Tensor, Tensor]:
    """Slots of one question, [n, 3] with ANSWER at the end, and of its answer, [n, 2]."""
    shape = shape_of(codes)
    place = (draws[:, :1] * NUM_CELLS).long()
    target = torch.where(codes > 0, draws[:, 1:5], 2.0).argsort(dim=1)[:, :1]  # an object to ask about
    asked = shape.gather(1, target)
    number = (shape == asked).sum(dim=1, keepdim=True)
    # Half of the counts ask for any shape, so that "zero" is an answer too.
    any_shape = (draws[:, 5:6] * 2 * len(SHAPES)).long()
    counted = torch.where(any_shape < len(SHAPES), any_shape, asked)
    kind = (draws[:, 6:7] * 4).long()
    kind = torch.where((number > 1) & ((kind == 1) | (kind == 2)), 3, kind)
    here, colour = codes.gather(1, place), told_colour.gather(1, place)
    # A cell that no caption names is empty only if no object lacks its place.
    is_hidden = (told_place == WORD["unknown"]).any(dim=1, keepdim=True)
    named = (here > 0) & (told_place.gather(1, place) != WORD["unknown"])
    nothing = torch.where(is_hidden, WORD["unknown"], WORD["empty"])
    kinds = torch.tensor([WORD[word] for word in ("what", "colour", "place", "count")], device=codes.device)
    about = _pick(kind, place + _PLACE, asked + _SHAPE, asked + _SHAPE, counted + _SHAPE)
    answer = _pick(
        kind,
        torch.where(named, colour, nothing),
        told_colour.gather(1, target),
        told_place.gather(1, target),
        (shape == counted).sum(dim=1, keepdim=True) + _NUMBER,
    )
    rest = torch.where((kind == 0) & named, shape.gather(1, place) + _SHAPE, PAD)
    question = torch.cat([kinds[kind], about, torch.full_like(about, ANSWER)], dim=1)
    return question, torch.cat([answer, rest], dim=1)


def _pick(kind: Tensor, *options: Tensor) -> Tensor:
    return torch.cat(options, dim=1).gather(1, kind)
