"""Pictures from BAGEL: Euler steps along the velocity, with guidance by text and by image.

One picture is made at a time, its guidance passes as one batch: a picture depends on its prompt, its index
and the seed, and has the same bits whatever else is asked for. At 4096 latent tokens a batch would gain
nothing.
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

from reca.errors import ConfigError, nearest
from reca.images import ImageSpec, resize, resized_size, to_image, to_tensor, unpatchify
from reca.layers.implementation import common_arithmetic
from reca.models.bagel.context import (
    Canvas,
    Context,
    encode_image,
    latent_grid,
    with_image,
    with_latents,
    with_text,
)
from reca.models.bagel.model import BagelModel
from reca.models.bagel.tokenizer import read_tokenizer
from reca.models.family import SampleOptions, Variant
from reca.objectives.flow_matching import shifted_time
from reca.randomness import RandomSource

RENORMS = ("global", "channel", "text_channel")


@dataclass(frozen=True, slots=True)
class Conditions:
    """The contexts of the guidance passes.

    Attributes:
        full: everything given.
        without_text: the same before the text.
        without_image: the text alone; None where no image is given, since the pass would repeat `full`.
    """

    full: Context
    without_text: Context
    without_image: Context | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One Euler step.

    Attributes:
        time: where it started.
        before, after: [tokens, latent_dim] fp32, latents.
        velocity: the guided velocity.
        full, without_text, without_image: the velocities it was made of; None where guidance did not act.
        num_passes: evaluations of the model.
    """

    time: float
    before: Tensor
    after: Tensor
    velocity: Tensor
    full: Tensor
    without_text: Tensor | None
    without_image: Tensor | None
    num_passes: int


def time_grid(points: int, shift: float) -> Tensor:
    """[points] fp32 on the CPU: from 1 (noise) to 0 (data), moved towards noise by `shift`."""
    return shifted_time(torch.linspace(1, 0, points), shift)


def guide(full: Tensor, without_text: Tensor, without_image: Tensor | None, options: SampleOptions) -> Tensor:
    """Combine the velocities of one picture.

        a = v_text + s_text (v - v_text)
        b = v_img + s_img (a - v_img)           only with image guidance; otherwise b = a
        b * clamp(|v| / (|b| + 1e-8), renorm_min, 1)

    `global` takes norms over the whole picture, `channel` over each token; `text_channel` renormalises a, per
    token, and leaves b as it is.

    Args:
        full, without_text, without_image: [tokens, dim] fp32; the last is None without image guidance.

    Returns: [tokens, dim] fp32.
    """
    guided = without_text + options.text_guidance * (full - without_text)
    if options.renorm == "text_channel":
        guided = guided * _renorm(full, guided, options, over_tokens=False)
    if without_image is not None:
        guided = without_image + options.image_guidance * (guided - without_image)
    if options.renorm != "text_channel":
        guided = guided * _renorm(full, guided, options, over_tokens=options.renorm == "global")
    return guided


def _renorm(full: Tensor, guided: Tensor, options: SampleOptions, *, over_tokens: bool) -> Tensor:
    axes = (0, 1) if over_tokens else (1,)
    norms = [torch.linalg.vector_norm(velocity, dim=axes, keepdim=True) for velocity in (full, guided)]
    factor: Tensor = (norms[0] / (norms[1] + 1e-8)).clamp(min=options.renorm_min, max=1.0)
    return factor


def trajectory(
    model: BagelModel, conditions: Conditions, noise: Tensor, grid: Tensor, options: SampleOptions
) -> Iterator[Step]:
    """The steps from noise to data of one picture; passes whose weight is zero are not run.

    Args:
        conditions: contexts of the passes.
        noise: [tokens, latent_dim] fp32, latents at time 1.
        grid: [tokens] int64, positions of the latent tokens.
    """
    if options.renorm not in RENORMS:
        raise ConfigError(f"unknown renorm {options.renorm!r}; {nearest(options.renorm, RENORMS)}")
    times = time_grid(options.steps, options.shift)
    # fp32 on both sides, as the official comparison: a time on the edge of the interval is fragile.
    low, high = torch.tensor(options.guidance_interval, dtype=torch.float32)
    guided_steps = ((times > low) & (times <= high) & (options.text_guidance > 1)).tolist()
    # Without an image v_img equals v: its pass is spared, but it counts, for text guidance grows by it.
    by_image = options.image_guidance > 1
    contexts = [conditions.full, conditions.without_text]
    contexts += [conditions.without_image] if by_image and conditions.without_image is not None else []
    plain = Canvas(model, contexts[:1], grid)
    canvas = Canvas(model, contexts, grid) if any(guided_steps[:-1]) else plain
    latents = noise
    for index, is_guided in enumerate(guided_steps[:-1]):
        used = canvas if is_guided else plain
        velocities = used.velocity(latents, times[index : index + 1].to(grid.device))
        full, without_text, without_image = velocities[0], None, None
        velocity = full
        if is_guided:
            without_text = velocities[1]
            without_image = velocities[-1 if conditions.without_image else 0] if by_image else None
            velocity = guide(full, without_text, without_image, options)
        after = latents - velocity * float(times[index] - times[index + 1])
        yield Step(
            float(times[index]),
            latents,
            after,
            velocity,
            full,
            without_text,
            without_image,
            used.num_passes,
        )
        latents = after


class BagelSampler:
    """The `Sampler` of a BAGEL.

    Args:
        model: with weights; the weights may go on being trained between calls.
        variant: pixels of both encoders.
        folder: of the weights, with the tokenizer's files; None for variants that need none.

    Raises: CheckpointError if the tokenizer is missing or does not fit.
    """

    def __init__(self, model: BagelModel, variant: Variant, folder: Path | None = None) -> None:
        self.model = model
        self.variant = variant
        self.tokenizer = read_tokenizer(model.config, folder)

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.model.latent_positions.device

    @torch.no_grad()
    def text_to_image(
        self, prompts: Sequence[str], size: tuple[int, int], options: SampleOptions
    ) -> list[Image.Image]:
        """One picture per prompt; `size` is (height, width) in pixels.

        Raises: ConfigError if the sides are no multiples of a latent token's, or exceed the position table.
        """
        images = []
        for index, prompt in enumerate(prompts):
            with self._arithmetic():
                empty = Context.empty(self.model)
                text = with_text(self.model, empty, self.tokenizer.encode(prompt))
            images.append(self._picture(Conditions(text, empty), size, options, index))
        return images

    @torch.no_grad()
    def reconstruct(
        self, images: Sequence[Image.Image], prompts: Sequence[str], options: SampleOptions
    ) -> list[Image.Image]:
        """Image -> understanding embeddings, at the size of training -> image, at the input's target size."""
        results = []
        for index, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
            with self._arithmetic():
                pixels = to_tensor(image, self.variant.understanding).to(self.device)
                seen = with_image(self.model, Context.empty(self.model), pixels)
            size = resized_size(*image.size, self.variant.target)
            results.append(self._picture(self._conditions(seen, prompt), size, options, index))
        return results

    @torch.no_grad()
    def edit(
        self, images: Sequence[Image.Image], prompts: Sequence[str], options: SampleOptions
    ) -> list[Image.Image]:
        """Pictures that follow the instruction, from latents and understanding embeddings of the input.

        As in the official editor the understanding encoder sees the input at up to its full table of
        positions, not at the size of training.
        """
        vision, target = self.model.config.vision, self.variant.target
        detailed = ImageSpec(vision.image_size, self.variant.understanding.min_size, vision.patch_size)
        results = []
        for index, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
            resized = resize(image, target)
            latents = self._encode(to_tensor(resized, target).to(self.device), options, index)
            with self._arithmetic():
                seen = with_latents(self.model, Context.empty(self.model), latents)
                seen = with_image(self.model, seen, to_tensor(resized, detailed).to(self.device))
            size = (resized.height, resized.width)
            results.append(self._picture(self._conditions(seen, prompt), size, options, index))
        return results

    @torch.no_grad()
    def understand(self, images: Sequence[Image.Image]) -> Tensor:
        """[num_images, dim] fp32: mean over patches of the connector's output, at the size of training."""
        pooled = []
        for image in images:
            pixels = to_tensor(image, self.variant.understanding).to(self.device)
            with self._arithmetic():
                embeddings = self.model.connector(encode_image(self.model, pixels))
            pooled.append(embeddings.to(torch.float32).mean(dim=0))
        dim = self.model.config.llm.hidden_size
        return torch.stack(pooled) if pooled else torch.empty(0, dim, device=self.device)

    def _arithmetic(self) -> AbstractContextManager[object]:
        return common_arithmetic(self.model.vae2llm.weight, self.model.embed_tokens.weight)

    def _conditions(self, images: Context, prompt: str) -> Conditions:
        ids = self.tokenizer.encode(prompt)
        with self._arithmetic():
            text = with_text(self.model, Context.empty(self.model), ids)
            return Conditions(with_text(self.model, images, ids), images, text)

    def _encode(self, pixels: Tensor, options: SampleOptions, index: int) -> Tensor:
        """[z, h, w] fp32: latents of a posterior that is sampled, also here."""
        stride, channels = self.model.config.vae.stride, self.model.config.vae.z_channels
        shape = (1, channels, pixels.shape[-2] // stride, pixels.shape[-1] // stride)
        samples = torch.tensor([options.first_index + index], device=self.device)
        noise = RandomSource(options.seed).normal("sampler/posterior", samples, math.prod(shape))
        with torch.autocast(self.device.type, enabled=False):
            return self.model.vae.encode(pixels[None].to(self._vae_dtype), noise.view(shape))[0].float()

    @property
    def _vae_dtype(self) -> torch.dtype:
        return next(self.model.vae.parameters()).dtype

    def _picture(
        self, conditions: Conditions, size: tuple[int, int], options: SampleOptions, index: int
    ) -> Image.Image:
        """Sample and decode picture number `index` of this call."""
        model, stride = self.model, self.model.config.latent_stride
        largest = model.config.max_latent_size * stride
        if any(side <= 0 or side % stride or side > largest for side in size):
            raise ConfigError(
                f"picture of {size[0]}x{size[1]}: sides must be multiples of {stride} up to {largest} pixels"
            )
        rows, columns = size[0] // stride, size[1] // stride
        samples = torch.tensor([options.first_index + index], device=self.device)
        shape = (rows * columns, model.config.latent_dim)
        latents = RandomSource(options.seed).normal("sampler/noise", samples, math.prod(shape)).view(shape)
        with self._arithmetic():
            for step in trajectory(model, conditions, latents, latent_grid(model, rows, columns), options):
                latents = step.after
        latent = unpatchify(latents, rows, columns, model.config.latent_patch_size)
        with torch.autocast(self.device.type, enabled=False):
            return to_image(model.vae.decode(latent[None].to(self._vae_dtype))[0])
