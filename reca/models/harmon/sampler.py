"""Pictures from Harmon: tokens appear in random order, ever more at a time, each by its own diffusion.

One picture is made at a time, its guidance passes as one batch: a picture depends on its prompt, its index
and the seed, and has the same bits whatever else is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torch.func import functional_call

from reca.errors import ConfigError
from reca.images import to_image, to_tensor
from reca.models.family import SampleOptions, Variant
from reca.models.harmon.context import Canvas, Prefix, embed_image, read_prefix
from reca.models.harmon.diffusion import Schedule
from reca.models.harmon.head import DiffusionHead
from reca.models.harmon.model import HarmonModel
from reca.models.harmon.processor import stretched
from reca.models.harmon.tokenizer import UNCONDITIONAL, read_template
from reca.randomness import RandomSource


@dataclass(frozen=True, slots=True)
class Plan:
    """How a picture is made.

    Attributes:
        iterations: passes of the model; the number of masked tokens falls along a cosine.
        guidance: classifier-free guidance scale of the last iteration; 1 switches it off.
        guidance_schedule: `constant`, or `linear` in the share of tokens that are there after an iteration.
        temperature: factor of the noise that denoising adds.
    """

    iterations: int
    guidance: float
    guidance_schedule: Literal["constant", "linear"] = "constant"
    temperature: float = 1.0


@dataclass(frozen=True, slots=True)
class Randomness:
    """The random numbers of one picture.

    Attributes:
        order: [h * w] int64 permutation, consumed from its end.
        initial: [h * w, channels] fp32, the token at the highest noise level.
        steps: [h * w, denoising steps, channels] fp32, added after each step, highest level first.
    """

    order: Tensor
    initial: Tensor
    steps: Tensor

    @classmethod
    def of(cls, seed: int, sample: Tensor, tokens: int, channels: int, steps: int) -> Randomness:
        """Those of picture `sample` ([1] int64) under a seed."""
        random = RandomSource(seed)
        order = random.uniform("sampler/order", sample, tokens)[0].argsort(stable=True)
        initial = random.normal("sampler/initial", sample, tokens * channels).view(tokens, channels)
        noise = random.normal("sampler/steps", sample, tokens * steps * channels)
        return cls(order, initial, noise.view(tokens, steps, channels))


@dataclass(frozen=True, slots=True)
class Step:
    """One iteration.

    Attributes:
        before, after: [h * w, channels] fp32 latents.
        condition: [passes, h * w, width].
        predicted: [n] int64, positions that appeared.
    """

    before: Tensor
    after: Tensor
    condition: Tensor
    predicted: Tensor


def masked_after(iteration: int, iterations: int, tokens: int, masked: int) -> int:
    """Tokens that stay masked after an iteration: tokens * cos(pi / 2 * (i + 1) / iterations), at least 1."""
    kept = math.floor(tokens * math.cos(math.pi / 2 * (iteration + 1) / iterations))
    return max(1, min(masked - 1, kept))


def picture_steps(canvas: Canvas, randomness: Randomness, plan: Plan) -> Iterator[Step]:
    """The iterations from an empty canvas to a whole picture; those that add no token are left out."""
    tokens = canvas.grid[0] * canvas.grid[1]
    schedule = Schedule.respaced(canvas.model.config.mar.num_sampling_steps)
    latents, masked = torch.zeros_like(randomness.initial), tokens
    iterations = min(plan.iterations, tokens)
    for iteration in range(iterations):
        kept = masked_after(iteration, iterations, tokens, masked)
        guidance = plan.guidance
        if plan.guidance_schedule == "linear":
            guidance = 1 + (plan.guidance - 1) * (tokens - kept) / tokens
        if iteration == iterations - 1:
            kept = 0
        predicted = randomness.order[kept:masked]
        condition = canvas.condition(latents, randomness.order[masked:].sort().values)
        sampled = denoise(
            canvas.model.diffusion_head,
            condition.index_select(1, predicted),
            randomness.initial.index_select(0, predicted),
            randomness.steps.index_select(0, predicted),
            schedule,
            guidance=guidance,
            temperature=plan.temperature,
        )
        after = latents.index_copy(0, predicted, sampled)
        yield Step(latents, after, condition, predicted)
        latents, masked = after, kept


def denoise(
    head: DiffusionHead,
    condition: Tensor,
    initial: Tensor,
    noise: Tensor,
    schedule: Schedule,
    *,
    guidance: float,
    temperature: float,
) -> Tensor:
    """Ancestral sampling of some tokens.

        epsilon = e_u + guidance (e_c - e_u)
        x <- mean(x, epsilon) + temperature * exp(log_var / 2) * noise

    The variance is that of the conditional pass; nothing is added after the last step.

    Args:
        condition: [passes, tokens, width]: conditional, then unconditional where there is guidance.
        initial: [tokens, channels] fp32. noise: [tokens, steps, channels] fp32.

    Returns: [tokens, channels] fp32.
    """
    passes, device = condition.shape[0], initial.device
    # fp32 throughout: the first step multiplies an error of the predicted noise by hundreds
    weights = {name: weight.to(torch.float32) for name, weight in head.named_parameters()}
    rows, latents = condition.flatten(0, 1).to(torch.float32), initial
    schedule = schedule.to(device)
    with torch.autocast(device.type, enabled=False):
        for number, index in enumerate(range(schedule.table.shape[0] - 1, -1, -1)):
            at = schedule.at(torch.full((1,), index, device=device))
            inputs = (latents.repeat(passes, 1), schedule.times[index : index + 1], rows)
            output: Tensor = functional_call(head, weights, inputs)
            epsilons, interpolation = output.to(torch.float32).unflatten(0, (passes, -1)).chunk(2, dim=2)
            epsilon = epsilons[0]
            if passes > 1:
                epsilon = epsilons[1] + guidance * (epsilons[0] - epsilons[1])
            latents = at.predicted_mean(latents, epsilon)
            if index:
                deviation = torch.exp(0.5 * at.log_variance(interpolation[0]))
                latents = latents + temperature * deviation * noise[:, number]
    return latents


class HarmonSampler:
    """The `Sampler` of a Harmon.

    `steps` of the options are iterations; every token is denoised in the number of steps of the architecture.
    Shift, intervals and renormalisation of the options belong to flow matching and do not act here.

    Args:
        model: with weights; the weights may go on being trained between calls.
        variant: pixels.
        folder: of the weights, with the tokenizer's files; None for variants that need none.

    Raises: CheckpointError if the tokenizer is missing or does not fit.
    """

    def __init__(self, model: HarmonModel, variant: Variant, folder: Path | None = None) -> None:
        self.model, self.variant = model, variant
        self.template = read_template(model.config, folder)

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.model.schedule_table.device

    @torch.no_grad()
    def text_to_image(
        self, prompts: Sequence[str], size: tuple[int, int], options: SampleOptions
    ) -> list[Image.Image]:
        """One picture per prompt; `size` is (height, width) in pixels.

        Raises: ConfigError if the sides are no multiples of the autoencoder's stride.
        """
        grid = self._grid(size)
        return [
            self._picture(
                read_prefix(self.model, self.template.instruction(f"Generate an image: {prompt}")),
                grid,
                options,
                index,
            )
            for index, prompt in enumerate(prompts)
        ]

    @torch.no_grad()
    def reconstruct(
        self, images: Sequence[Image.Image], prompts: Sequence[str], options: SampleOptions
    ) -> list[Image.Image]:
        """Image -> understanding embeddings -> image, both at the size of training.

        As in the official sampler the instruction follows the template without the newline of training, and
        the pass without guidance sees no image.
        """
        results = []
        for index, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
            latents, grid = self._latents(image)
            ids = self.template.instruction(prompt)
            prefix = read_prefix(self.model, ids, embed_image(self.model, latents, grid))
            results.append(self._picture(prefix, grid, options, index))
        return results

    @torch.no_grad()
    def edit(
        self, images: Sequence[Image.Image], prompts: Sequence[str], options: SampleOptions
    ) -> list[Image.Image]:
        """Harmon was never trained to edit. Raises: ConfigError."""
        raise ConfigError(
            "harmon cannot edit: no release was trained for it; use reconstruct or text_to_image"
        )

    @torch.no_grad()
    def understand(self, images: Sequence[Image.Image]) -> Tensor:
        """[num_images, dim] fp32: mean over the understanding embeddings of each image."""
        pooled = [
            embed_image(self.model, *self._latents(image)).to(torch.float32).mean(dim=0) for image in images
        ]
        dim = self.model.config.llm.hidden_size
        return torch.stack(pooled) if pooled else torch.empty(0, dim, device=self.device)

    def _latents(self, image: Image.Image) -> tuple[Tensor, tuple[int, int]]:
        """Latents [h * w, channels] of an image at the size of training, and their grid."""
        spec = self.variant.understanding
        pixels = to_tensor(stretched(image), spec).to(self.device)
        with torch.autocast(self.device.type, enabled=False):
            latents = self.model.vae.encode(pixels[None])[0]
        return latents, (spec.max_size // spec.stride,) * 2

    def _grid(self, size: tuple[int, int]) -> tuple[int, int]:
        stride = self.model.config.vae.stride
        if any(side <= 0 or side % stride for side in size):
            raise ConfigError(f"picture of {size[0]}x{size[1]}: sides must be multiples of {stride} pixels")
        return size[0] // stride, size[1] // stride

    def _picture(
        self, prefix: Prefix, grid: tuple[int, int], options: SampleOptions, index: int
    ) -> Image.Image:
        """Sample and decode picture number `index` of this call."""
        model, mar = self.model, self.model.config.mar
        prefixes = [prefix]
        if options.text_guidance > 1:
            prefixes.append(read_prefix(model, self.template.instruction(UNCONDITIONAL)))
        sample = torch.tensor([options.first_index + index], device=self.device)
        tokens = grid[0] * grid[1]
        randomness = Randomness.of(options.seed, sample, tokens, mar.vae_embed_dim, mar.num_sampling_steps)
        plan, latents = Plan(options.steps, options.text_guidance), randomness.initial
        for step in picture_steps(Canvas(model, prefixes, grid), randomness, plan):
            latents = step.after
        with torch.autocast(self.device.type, enabled=False):
            return to_image(model.vae.decode(latents[None], grid)[0])
