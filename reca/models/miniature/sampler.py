"""Pictures and words from the miniature. A picture depends on its condition, number and seed alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from reca.errors import ConfigError
from reca.images import to_tensor
from reca.models.family import SampleOptions, Variant
from reca.models.miniature.batch import MiniatureBatch
from reca.models.miniature.generator import MASK, FlowGenerator, MaskedGenerator, Memory
from reca.models.miniature.model import MiniatureModel, is_first
from reca.objectives.flow_matching import shifted_time
from reca.randomness import RandomSource
from reca.world.language import ANSWER, PAD, WORD, image_rows, rows_of
from reca.world.render import picture
from reca.world.scenes import NUM_CELLS

_ROWS = 1024  # pictures that are made at a time
_DESCRIPTION = 12  # words of the longest description, and END


def given(tokens: Tensor, pixels: Tensor | None = None, **others: Tensor | None) -> MiniatureBatch:
    """A batch that holds a condition and nothing to learn."""
    ids = torch.arange(len(tokens), device=tokens.device)
    return MiniatureBatch(
        sample_ids=ids,
        num_images=0,
        num_tokens=tokens.numel(),
        term="",
        tokens=tokens,
        pixels=pixels,
        **others,
    )


@torch.no_grad()
def generate(model: MiniatureModel, condition: MiniatureBatch, options: SampleOptions) -> Tensor:
    """[n, 4] codes, one scene for each row of the condition.

    Masked: one cell after the other in random order, each drawn from its softmax. Flow: Euler steps from
    noise, then the nearest codes. Guidance moves logits or velocity away from those without the condition:

        guided = without + text_guidance * (with - without)
    """
    memory, is_visible = model.read(condition)
    numbers = torch.arange(len(condition.tokens), device=condition.tokens.device) + options.first_index
    parts = []
    for start in range(0, len(numbers), _ROWS):
        rows = slice(start, start + _ROWS)
        part = [(key[rows], value[rows]) for key, value in memory]
        parts.append(_generate(model, part, is_visible[rows], numbers[rows], options))
    return torch.cat(parts)


def _generate(
    model: MiniatureModel, memory: Memory, is_visible: Tensor, numbers: Tensor, options: SampleOptions
) -> Tensor:
    guidance = options.text_guidance
    if guidance != 1:
        # The second half of the rows sees START alone.
        memory = [(torch.cat([key, key]), torch.cat([value, value])) for key, value in memory]
        is_visible = torch.cat([is_visible, is_visible & is_first(is_visible)])
    random = RandomSource(options.seed)
    if isinstance(model.generator, FlowGenerator):
        return _follow(model.generator, memory, is_visible, numbers, random, options)
    return _fill_in(model.generator, memory, is_visible, numbers, random, guidance)


def _guided(output: Tensor, guidance: float) -> Tensor:
    if guidance == 1:
        return output
    full, without = output.chunk(2)
    return without + guidance * (full - without)


def _twice(rows: Tensor, guidance: float) -> Tensor:
    return rows if guidance == 1 else torch.cat([rows, rows])


def _fill_in(
    generator: MaskedGenerator,
    memory: Memory,
    is_visible: Tensor,
    numbers: Tensor,
    random: RandomSource,
    guidance: float,
) -> Tensor:
    order = random.uniform("sample/order", numbers, NUM_CELLS).argsort(dim=1)
    chance = random.uniform("sample/code", numbers, NUM_CELLS)
    codes = torch.full_like(order, MASK)
    for turn in range(NUM_CELLS):
        logits = _guided(generator(_twice(codes, guidance), memory, is_visible), guidance)
        cell = order[:, turn : turn + 1]
        here = logits.gather(1, cell[..., None].expand(-1, -1, logits.shape[-1]))[:, 0]
        shares = here.softmax(dim=-1).cumsum(dim=-1)
        # Rounding may leave the last share below 1.
        drawn = (chance[:, turn : turn + 1] > shares).sum(dim=1, keepdim=True).clamp(max=shares.shape[1] - 1)
        codes = codes.scatter(1, cell, drawn)
    return codes


def _follow(
    generator: FlowGenerator,
    memory: Memory,
    is_visible: Tensor,
    numbers: Tensor,
    random: RandomSource,
    options: SampleOptions,
) -> Tensor:
    guidance = options.text_guidance
    width = generator.tokenizer.table.shape[1]
    latents = random.normal("sample/noise", numbers, NUM_CELLS * width).view(-1, NUM_CELLS, width)
    times = shifted_time(torch.linspace(1, 0, options.steps), options.shift).tolist()
    for now, after in itertools.pairwise(times):
        time = latents.new_full((len(is_visible),), now)
        velocity = _guided(generator(_twice(latents, guidance), time, memory, is_visible), guidance)
        latents = latents + (after - now) * velocity
    return generator.tokenizer.decode(latents)


@torch.no_grad()
def describe(model: MiniatureModel, condition: MiniatureBatch) -> Tensor:
    """[n, 12] tokens: the trunk's own description of what it is given, the likeliest word each time."""
    tokens = condition.tokens
    rows = torch.arange(len(tokens), device=tokens.device)
    length = (tokens != PAD).sum(dim=1)
    tokens = torch.cat([tokens, tokens.new_full((len(tokens), 2 + _DESCRIPTION), PAD)], dim=1)
    for word in (WORD["describe"], ANSWER):
        tokens[rows, length] = word
        length = length + 1
    said = []
    for _ in range(_DESCRIPTION):
        hidden, _ = model.trunk(model.embed(replace(condition, tokens=tokens)))
        word = model.trunk.head(hidden[rows, length - 1]).argmax(dim=1)
        tokens[rows, length] = word
        said.append(word)
        length = length + 1
    return torch.stack(said, dim=1)


class MiniatureSampler:
    """Pictures from a miniature; implements `reca.models.family.Sampler`.

    Args:
        model: with weights.
        variant: what it is.
        folder: of the weights; the words are those of the world, so nothing is read there.
    """

    def __init__(self, model: MiniatureModel, variant: Variant, folder: Path | None = None) -> None:
        self.model, self.variant = model, variant

    @property
    def _device(self) -> torch.device:
        return self.model.trunk.positions.device

    def text_to_image(
        self, prompts: Sequence[str], size: tuple[int, int], options: SampleOptions
    ) -> list[Image.Image]:
        """One picture per prompt, such as "purple circle northwest"; `size` is (height, width) in pixels.

        Raises: ConfigError for a word that the world does not have.
        """
        codes = generate(self.model, given(rows_of(prompts).to(self._device)), options)
        height, width = size
        return [picture(scene).resize((width, height), Image.Resampling.LANCZOS) for scene in codes.cpu()]

    def reconstruct(
        self, images: Sequence[Image.Image], prompts: Sequence[str], options: SampleOptions
    ) -> list[Image.Image]:
        """Image -> understanding embeddings -> image; the miniature takes no instruction beside them."""
        pixels = self._pixels(images)
        rows = image_rows(len(images)).to(self._device)
        return [picture(scene) for scene in generate(self.model, given(rows, pixels), options).cpu()]

    def edit(
        self, images: Sequence[Image.Image], prompts: Sequence[str], options: SampleOptions
    ) -> list[Image.Image]:
        """Raises ConfigError: the miniature was never shown an edit."""
        raise ConfigError("the miniature cannot edit pictures; use `reca sample` or `reca reconstruct`")

    @torch.no_grad()
    def understand(self, images: Sequence[Image.Image]) -> Tensor:
        """[num_images, dim] fp32: mean of the encoder's embeddings."""
        embeddings: Tensor = self.model.encoder(self._pixels(images))
        return embeddings.mean(dim=1)

    def _pixels(self, images: Sequence[Image.Image]) -> Tensor:
        spec = self.variant.understanding
        return torch.stack([to_tensor(image, spec) for image in images]).to(self._device)
