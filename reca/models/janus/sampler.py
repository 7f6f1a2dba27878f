"""Pictures from Janus-Pro: one code after another, with guidance against a prompt of which only the length is
known.

One picture is made at a time, its two passes as one batch: a picture depends on its prompt, its index and the
seed, and has the same bits whatever else is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from reca.errors import ConfigError
from reca.images import to_image, to_tensor
from reca.layers.attention import attention
from reca.layers.implementation import common_arithmetic
from reca.layers.rotary import rotary_table
from reca.layers.segments import Segments
from reca.layers.stream import Stream
from reca.models.family import SampleOptions, Variant
from reca.models.janus.batch import hide
from reca.models.janus.model import JanusModel
from reca.models.janus.tokenizer import IMAGE, read_tokenizer
from reca.randomness import RandomSource


@dataclass(frozen=True, slots=True)
class Generated:
    """One picture as codes.

    Attributes:
        codes: [codes] int64.
        logits: [codes, vocabulary of codes] fp32, guided.
    """

    codes: Tensor
    logits: Tensor


class Continuation:
    """Prompts of one length that are continued together, with the keys and values of all rows so far.

    Args:
        model: the model.
        passes: number of prompts.
        capacity: most rows of each.
    """

    def __init__(self, model: JanusModel, passes: int, capacity: int) -> None:
        text = model.config.text
        self.model, self.passes, self.length = model, passes, 0
        shape = (text.num_hidden_layers, passes, capacity, text.num_attention_heads, text.head_dim)
        self._keys, self._values = (
            torch.empty(shape, dtype=model.activation_dtype, device=model.embed_tokens.weight.device)
            for _ in range(2)
        )

    def advance(self, rows: Tensor) -> Tensor:
        """Append rows to every pass.

        Args:
            rows: [passes * n, dim], pass by pass.

        Returns: [passes, dim]: the last row of each pass after the last norm.
        """
        model, passes, device = self.model, self.passes, rows.device
        start, stop = self.length, self.length + rows.shape[0] // passes
        positions = torch.arange(start, stop, device=device).repeat(passes)
        rotation = rotary_table(
            positions, model.config.text.head_dim, model.config.text.rope_theta, rows.dtype
        )
        segments = Segments.of([stop - start] * passes, [stop] * passes, is_causal=True).to(device)
        stream = Stream(rows)
        for index, layer in enumerate(model.blocks()):
            query, key, value, rows = layer.project(stream, rotation)
            for cache, new in ((self._keys[index], key), (self._values[index], value)):
                cache[:, start:stop] = new.unflatten(0, (passes, -1))
            key, value = (cache[index, :, :stop].flatten(0, 1) for cache in (self._keys, self._values))
            attended = attention(query.to(value.dtype), key, value, segments, backend=layer.attention_backend)
            stream = layer.finish(rows, attended)
        self.length = stop
        output: Tensor = model.norm(stream.rows.unflatten(0, (passes, -1))[:, -1])
        return output


def generate(model: JanusModel, prompts: Tensor, guidance: float, uniforms: Tensor | None) -> Generated:
    """The codes of one picture.

        logits = without + guidance * (full - without)

    Args:
        model: the model.
        prompts: [passes, rows, dim] embedded; the full prompt, then the hidden one where guidance acts.
        guidance: classifier-free guidance scale.
        uniforms: [codes] fp32 in [0, 1), one for each code, which is drawn from the softmax of its logits;
            None takes the likeliest code.
    """
    num_codes = model.config.num_codes
    continuation = Continuation(model, len(prompts), prompts.shape[1] + num_codes - 1)
    hidden = continuation.advance(prompts.flatten(0, 1))
    codes, guided = list[Tensor](), list[Tensor]()
    for index in range(num_codes):
        logits = model.generation_head(hidden).to(torch.float32)
        full, without = logits[0], logits[-1]
        guided.append(without + guidance * (full - without) if len(prompts) > 1 else full)
        if uniforms is None:
            codes.append(guided[-1].argmax(dim=-1, keepdim=True))
        else:
            cumulative = guided[-1].softmax(dim=-1).cumsum(dim=-1)
            passed = cumulative <= uniforms[index] * cumulative[-1]
            codes.append(passed.sum(dim=-1, keepdim=True))
        if index < num_codes - 1:
            row = model.embed_codes(codes[-1]).to(model.activation_dtype)
            hidden = continuation.advance(row.expand(len(prompts), -1))
    return Generated(torch.cat(codes), torch.stack(guided))


def embed_prompts(
    model: JanusModel, prompt: Sequence[int], understanding: Tensor | None, pad: int, *, guided: bool
) -> Tensor:
    """[passes, rows, dim]: a prompt and, for guidance, one of which only length and ends are known.

    Args:
        model: the model.
        prompt: ids, IMAGE where the understanding embeddings go.
        understanding: [patches, dim]; None without an image.
        pad: token that hides.
        guided: whether guidance acts.
    """
    passes = [prompt, hide(prompt, pad)] if guided else [prompt]
    ids = torch.tensor(passes, device=model.embed_tokens.weight.device)
    embedded: Tensor = model.embed_tokens(ids.clamp(min=0)).to(model.activation_dtype)
    if understanding is not None:
        rows = [row for row, token in enumerate(prompt) if token == IMAGE]
        embedded[0, rows] = understanding.to(embedded.dtype)
    return embedded


class JanusSampler:
    """The `Sampler` of a Janus-Pro; of the options it reads `text_guidance`, `seed` and `first_index`.

    The hidden prompt knows neither text nor image, so that one scale guides by both.

    Args:
        model: with weights; the weights may go on being trained between calls.
        variant: pixels of both encoders.
        folder: of the weights, with the tokenizer's file; None for variants that need none.

    Raises: CheckpointError if the tokenizer is missing or does not fit.
    """

    def __init__(self, model: JanusModel, variant: Variant, folder: Path | None = None) -> None:
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
        """One picture per prompt; `size` is (height, width) in pixels.

        Raises: ConfigError for any other size than the model's own.
        """
        side = self.model.config.image_size
        if size != (side, side):
            raise ConfigError(
                f"picture of {size[0]}x{size[1]}: Janus-Pro makes {side}x{side} pixels only; ask for that"
            )
        ids = (self.tokenizer.text_to_image(prompt) for prompt in prompts)
        return [self._picture(prompt, None, options, index) for index, prompt in enumerate(ids)]

    @torch.no_grad()
    def reconstruct(
        self, images: Sequence[Image.Image], prompts: Sequence[str], options: SampleOptions
    ) -> list[Image.Image]:
        """Image -> understanding embeddings of its central square -> image."""
        pictures = []
        for index, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
            ids = self.tokenizer.reconstruction(prompt)
            pictures.append(self._picture(ids, self._embeddings(image), options, index))
        return pictures

    def edit(
        self, images: Sequence[Image.Image], prompts: Sequence[str], options: SampleOptions
    ) -> list[Image.Image]:
        """Not possible: Janus-Pro was never trained to change a picture. Raises ConfigError."""
        raise ConfigError(
            "Janus-Pro cannot edit: it was never trained to follow an instruction on a picture; "
            "use `reconstruct`, or a family that edits, such as bagel"
        )

    @torch.no_grad()
    def understand(self, images: Sequence[Image.Image]) -> Tensor:
        """[num_images, dim] fp32: mean over patches of the aligner's output."""
        pooled = [self._embeddings(image).to(torch.float32).mean(dim=0) for image in images]
        dim = self.model.config.text.hidden_size
        return torch.stack(pooled) if pooled else torch.empty(0, dim, device=self.device)

    def _embeddings(self, image: Image.Image) -> Tensor:
        """[patches, dim] of an image's central square."""
        pixels = to_tensor(image, self.variant.understanding).to(self.device)
        patches = Segments.of([self.model.config.vision.num_tokens]).to(self.device)
        with self._arithmetic():
            embeddings: Tensor = self.model.aligner(self.model.vision(pixels[None], patches))
            return embeddings

    def _arithmetic(self) -> AbstractContextManager[object]:
        return common_arithmetic(self.model.lm_head.weight, self.model.vision.patch_embedding.weight)

    def _picture(
        self, prompt: Sequence[int], understanding: Tensor | None, options: SampleOptions, index: int
    ) -> Image.Image:
        """Sample and decode picture number `index` of this call."""
        config, pad = self.model.config, self.tokenizer.special.pad
        samples = torch.tensor([options.first_index + index], device=self.device)
        uniforms = RandomSource(options.seed).uniform("sampler/code", samples, config.num_codes)[0]
        with self._arithmetic():
            rows = embed_prompts(self.model, prompt, understanding, pad, guided=options.text_guidance != 1)
            generated = generate(self.model, rows, options.text_guidance, uniforms)
        grid = config.code_grid
        return to_image(self.model.vq.decode(generated.codes[None], grid, grid)[0])
