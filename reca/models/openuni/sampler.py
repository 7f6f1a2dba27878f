"""Pictures from OpenUni: DPM-Solver++ along SANA's velocity, with guidance by text.

One picture is made at a time, its two guidance passes as one batch: a picture depends on its prompt, its
index and the seed, and has the same bits whatever else is asked for. What the language model says about a
prompt does not depend on time, so it runs once per picture.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from reca.errors import ConfigError
from reca.images import to_image, to_tensor
from reca.layers.implementation import common_arithmetic
from reca.layers.segments import Segments
from reca.models.family import SampleOptions, Variant
from reca.models.openuni.batch import Prompts
from reca.models.openuni.model import TIMESTEPS, OpenUniModel
from reca.models.openuni.prompt import PromptWriter
from reca.models.openuni.tokenizer import read_tokenizer
from reca.objectives.flow_matching import shifted_time
from reca.randomness import RandomSource

NEUTRAL = "Keep the image as it is."
"""What the unconditional pass says of an image: the official default of both passes."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the solver.

    Attributes:
        timestep: what SANA was told.
        velocity: [images, channels, h, w] fp32, guided.
        latents: the same shape, after the step.
    """

    timestep: int
    velocity: Tensor
    latents: Tensor


def time_grid(evaluations: int, shift: float) -> Tensor:
    """[evaluations + 1] fp32 on the CPU: times from noise to 0, moved towards noise by `shift`.

    As in DPM-Solver's flow schedule they start at 0.999, before the shift, and end at 0.
    """
    times = torch.linspace(0, 0.999, evaluations + 1, dtype=torch.float64).flip(0)
    return torch.cat([shifted_time(times[:-1], shift), times.new_zeros(1)]).to(torch.float32)


def trajectory(
    model: OpenUniModel, captions: Tensor, noise: Tensor, options: SampleOptions
) -> Iterator[Step]:
    """The steps from noise to data: second-order multistep DPM-Solver++, in its data prediction form.

        x0 = z - t v,    l = ln((1 - t) / t),    h = l' - l
        D  = x0 + (x0 - x0_before) h / (2 (l - l_before))        in the first step D = x0
        z' = (t' / t) z - (1 - t') (e^-h - 1) D                  in the last step, t' = 0, z' = x0

    Args:
        captions: [2 * images, queries, dim]: the conditional ones, then the unconditional ones.
        noise: [images, channels, h, w] fp32, latents at the first time.

    Source: arXiv 2211.01095, algorithm 2, with the signal 1 - t and the noise t.
    """
    times = time_grid(options.steps - 1, options.shift).double()
    low, high = options.guidance_interval
    latents, before = noise, None
    log_ratio = torch.log((1 - times) / times)
    for index in range(options.steps - 1):
        time, after = float(times[index]), float(times[index + 1])
        # officially the model's time is truncated, the solver's is not
        timestep = int(TIMESTEPS * times[index].float())
        is_guided = options.text_guidance != 1 and low < time <= high
        velocity = _guided(model, captions, latents, timestep, options.text_guidance if is_guided else 1.0)
        clean = latents - time * velocity
        if after == 0:
            latents = clean
        else:
            step = float(log_ratio[index + 1] - log_ratio[index])
            data = clean
            if before is not None:
                data = clean + (clean - before) * (
                    step / (2 * float(log_ratio[index] - log_ratio[index - 1]))
                )
            latents = after / time * latents - (1 - after) * math.expm1(-step) * data
        before = clean
        yield Step(timestep, velocity, latents)


def _guided(model: OpenUniModel, captions: Tensor, latents: Tensor, timestep: int, scale: float) -> Tensor:
    """[images, channels, h, w] fp32: v_without + scale (v - v_without); scale 1 runs one pass."""
    passes = 1 if scale == 1 else 2
    times = torch.full((passes * len(latents),), float(timestep), device=latents.device)
    told = captions if passes == 2 else captions[: len(latents)]
    velocity = model.predict(latents.repeat(passes, 1, 1, 1), times, told).to(torch.float32)
    if passes == 1:
        return velocity
    full, without = velocity.chunk(2)
    return without + scale * (full - without)


class OpenUniSampler:
    """The `Sampler` of an OpenUni; `steps - 1` evaluations, no renormalisation.

    Args:
        model: with weights; the weights may go on being trained between calls.
        variant: pixels of both encoders.
        folder: of the weights, with the tokenizer's files; None for variants that need none.

    Raises: CheckpointError if the tokenizer is missing or does not fit.
    """

    def __init__(self, model: OpenUniModel, variant: Variant, folder: Path | None = None) -> None:
        self.model = model
        self.variant = variant
        self.writer = PromptWriter(model.config, read_tokenizer(model.config, folder))

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.model.meta_queries.device

    @torch.no_grad()
    def text_to_image(
        self, prompts: Sequence[str], size: tuple[int, int], options: SampleOptions
    ) -> list[Image.Image]:
        """One picture per prompt; `size` is (height, width) in pixels.

        Raises: ConfigError if the sides are no multiples of a latent's, or guidance by image is asked for.
        """
        _check_guidance(options)
        without = self.writer.text_to_image(None)
        captions = (self._captions([self.writer.text_to_image(prompt), without], None) for prompt in prompts)
        return [self._picture(caption, size, options, index) for index, caption in enumerate(captions)]

    @torch.no_grad()
    def reconstruct(
        self, images: Sequence[Image.Image], prompts: Sequence[str], options: SampleOptions
    ) -> list[Image.Image]:
        """Image -> understanding embeddings -> image, at the size of training.

        Guidance moves away from what the image gives under a neutral instruction.
        Raises: ConfigError if guidance by image is asked for.
        """
        _check_guidance(options)
        pictures = []
        for index, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
            ids = [self.writer.reconstruction(text) for text in (prompt, NEUTRAL)]
            embeddings = self._embeddings(image)
            captions = self._captions(ids, embeddings.repeat(2, 1))
            size = (self.variant.target.max_size,) * 2
            pictures.append(self._picture(captions, size, options, index))
        return pictures

    def edit(
        self, images: Sequence[Image.Image], prompts: Sequence[str], options: SampleOptions
    ) -> list[Image.Image]:
        """Pictures that follow the instruction; all that is known of the input is its embeddings."""
        return self.reconstruct(images, prompts, options)

    @torch.no_grad()
    def understand(self, images: Sequence[Image.Image]) -> Tensor:
        """[num_images, dim] fp32: mean of the understanding embeddings."""
        pooled = [self._embeddings(image).to(torch.float32).mean(dim=0) for image in images]
        dim = self.model.config.llm.hidden_size
        return torch.stack(pooled) if pooled else torch.empty(0, dim, device=self.device)

    def _arithmetic(self) -> AbstractContextManager[object]:
        return common_arithmetic(self.model.meta_queries, self.model.embed_tokens.weight)

    def _embeddings(self, image: Image.Image) -> Tensor:
        """[embeddings, dim] of the central square; one tensor of the target's size feeds both encoders."""
        pixels = to_tensor(image, self.variant.target)[None].to(self.device)
        rows = Segments.of([self.model.config.vision.num_patches + 1]).to(self.device)
        with self._arithmetic():
            encoded: Tensor = self.model.aligner(self.model.vision(pixels, rows))
        return encoded[0]

    def _captions(self, prompts: Sequence[Sequence[int]], embeddings: Tensor | None) -> Tensor:
        with self._arithmetic():
            return self.model.caption(Prompts.of(self.model.config, prompts).to(self.device), embeddings)

    def _picture(
        self, captions: Tensor, size: tuple[int, int], options: SampleOptions, index: int
    ) -> Image.Image:
        """Sample and decode picture number `index` of this call."""
        config = self.model.config.autoencoder
        if any(side <= 0 or side % config.stride for side in size):
            raise ConfigError(
                f"picture of {size[0]}x{size[1]}: sides must be multiples of {config.stride} pixels"
            )
        shape = (1, config.latent_channels, size[0] // config.stride, size[1] // config.stride)
        samples = torch.tensor([options.first_index + index], device=self.device)
        latents = RandomSource(options.seed).normal("sampler/noise", samples, math.prod(shape)).view(shape)
        with self._arithmetic():
            for step in trajectory(self.model, captions, latents, options):
                latents = step.latents
        return to_image(self.model.vae.decode(latents)[0])


def _check_guidance(options: SampleOptions) -> None:
    if options.image_guidance != 1:
        raise ConfigError(
            f"image_guidance={options.image_guidance}: OpenUni has no guidance by image; use text_guidance"
        )
