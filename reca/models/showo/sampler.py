"""Pictures from Show-o: masked codes filled in step by step, the surest first, with guidance.

One picture is made at a time: it depends on its prompt, its index and the seed, and has the same bits
whatever else is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from reca.errors import ConfigError
from reca.images import to_image, to_tensor
from reca.models.family import SampleOptions, Variant
from reca.models.showo.batch import (
    MaskedBatch,
    MaskedExample,
    ReconstructionBatch,
    ShowoDraws,
    collate_masked,
)
from reca.models.showo.model import ShowoModel
from reca.models.showo.text import instruction, read_tokenizer
from reca.randomness import RandomSource

UNKNOWN = -1
"""In place of a code that is yet to be generated."""
_TINY = 1e-20
_TEMPERATURE = 1.0


@dataclass(frozen=True, slots=True)
class Step:
    """One step of filling in.

    Attributes:
        before, after: [codes] int64 with UNKNOWN, what was known before and what is kept.
        sampled: [codes] int64, a full picture: known codes and those that this step chose.
        full, without: [codes, codebook] logits with and without the condition; None where guidance is off.
        probabilities: [codes, codebook] after guidance.
        masked: [codes] bool, to be generated again.
    """

    before: Tensor
    after: Tensor
    sampled: Tensor
    full: Tensor
    without: Tensor | None
    probabilities: Tensor
    masked: Tensor


class Canvas:
    """One sequence whose image is being filled in.

    Args:
        model: with weights.
        batch: of one sample, on the model's device, all of its codes masked.
    """

    def __init__(self, model: ShowoModel, batch: MaskedBatch) -> None:
        device = batch.image_rows.device
        self.model, self.batch = model, batch
        codes = torch.zeros(1, model.config.num_codes, dtype=torch.int64, device=device)
        masked = torch.arange(model.config.num_codes, device=device)
        draws = ShowoDraws(counts={}, masked=masked)
        self.embedded = model.embed(batch, model.token_ids(batch, draws, codes))
        self.chosen, _ = model.masked_rows(batch, draws, codes)

    def logits(self, codes: Tensor) -> Tensor:
        """[codes, codebook] fp32 for the next choice of every code; `codes` [codes] int64 with UNKNOWN."""
        model, special = self.model, self.model.config.special
        ids = torch.where(codes == UNKNOWN, special.mask, codes + special.codes)
        hidden = self.embedded.index_copy(0, self.batch.image_rows, model.embed_tokens(ids))
        hidden = model.transform(hidden, self.batch.layout, self.chosen)[: len(codes)]
        columns = slice(special.codes, special.codes + model.config.codebook_size)
        head = model.lm_head
        return F.linear(model.final_layernorm(hidden), head.weight[columns], head.bias[columns]).float()


def fill(
    full: Canvas,
    without: Canvas | None,
    codes: Tensor,
    *,
    steps: int,
    guidance: float,
    draws: Callable[[int], tuple[Tensor, Tensor]],
) -> Iterator[Step]:
    """Fill in what is UNKNOWN of one picture.

        logits = guidance * full - (guidance - 1) * without;    code = argmax(softmax(logits) / e)
        confidence = log p(code) - temperature * log(-log u)    the least confident are generated again

    The temperature is multiplied by 1 - (s + 1) / steps in step s, and so falls faster than linearly.

    Args:
        full, without: with and without the condition; `without` None switches guidance off.
        codes: [codes] int64, codes that are known and UNKNOWN.
        steps: number of steps; the last one's `sampled` is the picture.
        guidance: scale; 1 would ignore `without`.
        draws: step -> (e [codes, codebook] of Exp(1), u [codes] uniform).

    Source: arXiv 2202.04200, section 3.2.
    """
    count, num_codes = int((codes == UNKNOWN).sum()), len(codes)
    temperature = _TEMPERATURE
    for index in range(steps):
        given, blank = full.logits(codes), without.logits(codes) if without is not None else None
        logits = given if blank is None else guidance * given - (guidance - 1) * blank
        probabilities = logits.softmax(dim=-1)
        exponential, uniform = draws(index)
        is_known = codes != UNKNOWN
        sampled = torch.where(is_known, codes, (probabilities / exponential).argmax(dim=-1))
        ratio = (index + 1) / steps
        temperature *= 1 - ratio
        # fp32, as officially: the floor of half a picture is decided by rounding
        kept_open = float(torch.floor(num_codes * torch.cos(torch.tensor(ratio) * (math.pi * 0.5))))
        count = max(1, min(count - 1, int(kept_open)))
        chance = probabilities.gather(1, sampled[:, None])[:, 0]
        chance = torch.where(is_known, torch.finfo(chance.dtype).max, chance)
        gumbel = -torch.log((-torch.log(uniform.clamp_min(_TINY))).clamp_min(_TINY))
        confidence = torch.log(chance.clamp_min(_TINY)) + temperature * gumbel
        masked = confidence < confidence.sort().values[count]
        after = torch.where(masked, UNKNOWN, sampled)
        yield Step(codes, after, sampled, given, blank, probabilities, masked)
        codes = after


class ShowoSampler:
    """The `Sampler` of a Show-o; the paper's guidance g is a scale of 1 + g here.

    Args:
        model: with weights; the weights may go on being trained between calls.
        variant: pixels.
        folder: of the weights, with the tokenizer in or beside it; None for variants that need none.

    Raises: CheckpointError if the tokenizer is missing or does not fit.
    """

    def __init__(self, model: ShowoModel, variant: Variant, folder: Path | None = None) -> None:
        self.model = model
        self.variant = variant
        self.tokenizer = read_tokenizer(model.config, folder)

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.model.embed_tokens.weight.device

    @torch.no_grad()
    def text_to_image(
        self, prompts: Sequence[str], size: tuple[int, int], options: SampleOptions
    ) -> list[Image.Image]:
        """One picture per prompt; the only size is that of the variant.

        Raises: ConfigError for another size.
        """
        side = self.model.config.resolution
        if tuple(size) != (side, side):
            raise ConfigError(
                f"picture of {size[0]}x{size[1]}: this variant makes {side}x{side} pixels only; ask for that"
            )
        images = []
        for index, prompt in enumerate(prompts):
            full = self._captioned(self.tokenizer.encode(prompt))
            images.append(self._picture(full, options.text_guidance, options, index))
        return images

    @torch.no_grad()
    def reconstruct(
        self, images: Sequence[Image.Image], prompts: Sequence[str], options: SampleOptions
    ) -> list[Image.Image]:
        """Image -> what the model is shown of it in training -> image, with `image_guidance`."""
        pictures = []
        for index, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
            ids = self.tokenizer.encode(instruction(prompt))
            full = Canvas(self.model, self._reconstruction(image, ids))
            pictures.append(self._picture(full, options.image_guidance, options, index))
        return pictures

    def edit(
        self, images: Sequence[Image.Image], prompts: Sequence[str], options: SampleOptions
    ) -> list[Image.Image]:
        """Not offered. Raises: ConfigError always."""
        raise ConfigError("Show-o cannot edit: it was never trained on instructions that change an image")

    @torch.no_grad()
    def understand(self, images: Sequence[Image.Image]) -> Tensor:
        """[num_images, dim] fp32: mean of what a reconstruction is shown of the image, as embeddings."""
        pooled = []
        for image in images:
            batch = self._reconstruction(image, ())
            if self.model.vision is not None:
                seen = self.model.understand(batch)
            else:
                seen = self.model.embed_tokens(
                    self.model.given_codes(batch) + self.model.config.special.codes
                )
            pooled.append(seen[0].float().mean(dim=0))
        dim = self.model.config.phi.hidden_size
        return torch.stack(pooled) if pooled else torch.empty(0, dim, device=self.device)

    def _reconstruction(self, image: Image.Image, ids: tuple[int, ...]) -> ReconstructionBatch:
        batch = collate_masked(self.model.config, [self._example(ids, image)], [0]).to(self.device)
        assert isinstance(batch, ReconstructionBatch)
        return batch

    def _captioned(self, ids: tuple[int, ...]) -> Canvas:
        config = self.model.config
        batch = collate_masked(config, [self._example(ids, None)], [0], text_length=config.generation_text)
        return Canvas(self.model, batch.to(self.device))

    def _example(self, ids: tuple[int, ...], image: Image.Image | None) -> MaskedExample:
        return MaskedExample(
            text=ids,
            pixels=torch.empty(3, 0, 0) if image is None else to_tensor(image, self.variant.target),
            num_masked=self.model.config.num_codes,
            is_reconstruction=image is not None,
            num_tokens=0,
        )

    def _picture(self, full: Canvas, guidance: float, options: SampleOptions, index: int) -> Image.Image:
        """Sample and decode picture number `index` of this call."""
        config = self.model.config
        samples = torch.tensor([options.first_index + index], device=self.device)
        source = RandomSource(options.seed)

        def draws(step: int) -> tuple[Tensor, Tensor]:
            uniform = source.at(step).uniform(
                "sampler/code", samples, config.num_codes * config.codebook_size
            )
            exponential = -torch.log1p(-uniform.view(config.num_codes, -1)).clamp_max(-_TINY)
            return exponential, source.at(step).uniform("sampler/confidence", samples, config.num_codes)[0]

        without = self._captioned(()) if guidance > 1 else None
        codes = torch.full((config.num_codes,), UNKNOWN, device=self.device)
        for step in fill(full, without, codes, steps=options.steps, guidance=guidance, draws=draws):
            codes = step.sampled
        side = config.resolution // config.magvit.stride
        return to_image(self.model.magvit.decode(codes[None], side, side)[0])
