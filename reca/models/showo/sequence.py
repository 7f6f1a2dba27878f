"""Show-o's sequences as blocks of rows, and who sees whom, as rules.

Officially every sequence is padded and carries a dense mask. Each of those masks is a short list of blocks
whose rows see whole blocks, all of their own block (`full`) or its past (`causal`); only the order in which a
row's keys are listed changes, which attention does not notice, because positions travel with the rows:

    reconstruction, CLIP    vision [vision head] | head, text causal | image [vision head text image]
    reconstruction, VQ      mmu | given [mmu given] | text causal | image [mmu given text image]
    image to text, CLIP     vision [vision head] | head, chat causal
    image to text, VQ       given [given] | chat causal
    text to image           text causal | image [text image]

Positions count the official padding, which is otherwise left out, as are rows that nothing needed sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reca.errors import DataError
from reca.models.showo.config import ShowoConfig

VISION, GIVEN, IMAGE = -1, -2, -3
"""In place of an id: a row of the vision encoder, a code of the image that is given, one to be generated."""


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of one sequence with equal rules.

    Attributes:
        ids: token of each row, or one of VISION, GIVEN, IMAGE.
        positions: of each row in the official sequence.
        sees: blocks of the sequence whose rows are keys, in this order; for a causal block it comes last.
        is_causal: whether a row sees only the past of its own block.
    """

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    sees: tuple[int, ...]
    is_causal: bool = False

    @property
    def rows(self) -> int:
        """Rows of the block."""
        return len(self.ids)


def _block(ids: Sequence[int], start: int, sees: Sequence[int], *, is_causal: bool = False) -> Block:
    return Block(tuple(ids), tuple(range(start, start + len(ids))), tuple(sees), is_causal)


def reconstruction(
    config: ShowoConfig, text: Sequence[int], *, is_complete: bool = False
) -> tuple[Block, ...]:
    """An image, an instruction, and the codes of the image to be filled in.

    Args:
        text: ids of the instruction in its template; empty where it is dropped.
        is_complete: with padding and closing rows that training leaves out.

    Raises: DataError if the instruction is too long for the sequence.
    """
    if config.clip is None:
        return _reconstruction_vq(config, text, is_complete)
    special, seen, block = config.special, config.clip.num_tokens, config.text_block
    middle = (special.eoi, special.sot, *text, special.eot)
    num_pads, after = block - len(middle) - 2, block + seen
    if num_pads < 0:
        raise _too_long(text, block - 5)
    vision = _block([VISION] * seen, 2, (0, 1))
    head = _block([special.mmu, special.soi], 0, (0, 1), is_causal=True)
    if not is_complete:
        start = 2 + seen
        positions = (*range(start, start + len(middle)), after)
        words = Block((*middle, special.soi), positions, (0, 1, 2), is_causal=True)
        return vision, head, words, _block([IMAGE] * config.num_codes, after + 1, (0, 1, 2, 3))
    words = _block(middle, 2 + seen, (0, 1, 2), is_causal=True)
    pads = _block([special.pad] * num_pads, 2 + seen + len(middle), (0, 1, 2))
    opening = _block([special.soi], after, (0, 1, 2, 4))
    image = _block([IMAGE] * config.num_codes, after + 1, (0, 1, 2, 4, 5))
    closing = _block([special.eoi], after + 1 + config.num_codes, (0, 1, 2, 4, 5, 6))
    return vision, head, words, pads, opening, image, closing


def _reconstruction_vq(config: ShowoConfig, text: Sequence[int], is_complete: bool) -> tuple[Block, ...]:
    special = config.special
    words = (special.sot, *text, special.eot)
    num_pads = config.max_text - len(words)
    if num_pads < 1:
        raise _too_long(text, config.max_text - 3)
    given = (special.soi, *[GIVEN] * config.num_given, special.eoi)
    image = (special.soi, *[IMAGE] * config.num_codes, special.eoi)
    start = num_pads + 1 + len(given)
    blocks = (
        _block([special.mmu], num_pads, (0,), is_causal=True),
        _block(given, num_pads + 1, (0, 1)),
        _block(words, start, (0, 1, 2), is_causal=True),
        _block(image, start + len(words), (0, 1, 2, 3)),
    )
    return (*blocks, _block([special.pad] * num_pads, 0, (4,), is_causal=True)) if is_complete else blocks


def _too_long(text: Sequence[int], most: int) -> DataError:
    return DataError(
        f"an instruction has {len(text)} tokens, this variant holds at most {most}; shorten the prompts"
    )


def image_to_text(
    config: ShowoConfig, chat: Sequence[int], *, is_complete: bool = False
) -> tuple[Block, ...]:
    """An image and a conversation about it; the last block ends with the conversation.

    Args:
        chat: ids of the conversation, already cut; with `is_complete` padding follows them.
    """
    special = config.special
    chat = (*chat, *[special.pad] * (config.max_chat - len(chat))) if is_complete else tuple(chat)
    if config.clip is None:
        given = (special.mmu, special.soi, *[GIVEN] * config.num_codes, special.eoi)
        return _block(given, 0, (0,)), _block(chat, len(given), (0, 1), is_causal=True)
    head, seen = (special.mmu, *config.system_ids, special.soi), config.clip.num_tokens
    return (
        _block([VISION] * seen, len(head), (0, 1)),
        _block(head, 0, (0, 1), is_causal=True),
        _block((special.eoi, *chat), len(head) + seen, (0, 1, 2), is_causal=True),
    )


def text_to_image(
    config: ShowoConfig, text: Sequence[int], *, length: int | None = None, is_complete: bool = False
) -> tuple[Block, ...]:
    """A caption and the codes of its image; a caption too long is cut.

    Args:
        text: ids of the caption; empty where it is dropped.
        length: text positions without the task's token; `config.max_text` if None.
    """
    special, length = config.special, config.max_text if length is None else length
    words = (special.t2i, special.sot, *text, special.eot)
    if len(words) > length + 1:
        words = (*words[:length], special.eot)
    num_pads = length + 1 - len(words)
    image = (special.soi, *[IMAGE] * config.num_codes, special.eoi)
    blocks = (
        _block(words, num_pads, (0,), is_causal=True),
        _block(image, length + 1, (0, 1)),
    )
    if not is_complete or not num_pads:
        return blocks
    return (*blocks, _block([special.pad] * num_pads, 0, (2,), is_causal=True))
