"""Counter-based random numbers in plain torch: what the kernels regenerate, word for word.

Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): four 32-bit words are
a pure function of a 64-bit key and four 32-bit counters, so nothing that is drawn from it has to be stored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from reca.kernels._checks import FLOATS, check_dtype, check_shape

_WORD = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_TO_UNIT = 4.6566127342e-10  # 2^-31, the constant of Triton's uint_to_uniform_float
_SMALLEST = 1.0e-7  # Triton's guard before the logarithm

Words = tuple[Tensor, Tensor, Tensor, Tensor]
Word = TypeVar("Word", Tensor, int)


@dataclass(frozen=True, slots=True)
class PhiloxNoise:
    """Standard normal noise of token rows, named by its coordinates instead of stored.

        counter of element d of row i = ((rows_i * dim + d) // 4, step, low and high word of its sample id)

    Attributes:
        key: 64-bit Philox key, as an unsigned or a signed integer.
        step: scalar int64 on the device of the tokens, so that a captured graph can advance it.
        samples: [images] int64, the sample id of each image.
        rows: [tokens] int64, the row of each token within its sample.
    """

    key: int
    step: Tensor
    samples: Tensor
    rows: Tensor


NoiseArguments = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, int]
"""(noise, samples, rows, step, key) as operators carry them: the first alone, or the others."""


def noise_arguments(noise: Tensor | PhiloxNoise) -> NoiseArguments:
    """Given or regenerated noise in the form that schemas know."""
    if isinstance(noise, Tensor):
        return noise.detach(), None, None, None, 0
    return None, noise.samples, noise.rows, noise.step, signed_key(noise.key)


def check_noise(
    operator: str, noise: Tensor | PhiloxNoise, tokens: int, dim: int, num_images: int
) -> dict[str, Tensor]:
    """The tensors of `noise` by name. Raises ValueError or TypeError unless they fit [tokens, dim] rows."""
    if isinstance(noise, Tensor):
        check_shape(operator, "noise", noise, (tokens, dim), "[tokens, dim] like clean")
        check_dtype(operator, "noise", noise, FLOATS)
        return {"noise": noise}
    if dim % 4:
        raise ValueError(
            f"{operator}: dim must be a multiple of 4 for Philox noise, got {dim}; pass a tensor"
        )
    tensors = {"noise.step": noise.step, "noise.samples": noise.samples, "noise.rows": noise.rows}
    shapes = ((), (num_images,), (tokens,))
    legends = ("a scalar on the device", "one sample id per image", "the row of each token in its sample")
    for (name, tensor), shape, legend in zip(tensors.items(), shapes, legends, strict=True):
        check_shape(operator, name, tensor, shape, legend)
        check_dtype(operator, name, tensor, (torch.int64,))
    return tensors


def signed_key(key: int) -> int:
    """The same 64 bits as a signed integer, which schemas and launchers carry."""
    return key - (1 << 64) if key >= 1 << 63 else key


def philox4x32(key: int, c0: Word, c1: Word, c2: Word, c3: Word) -> tuple[Word, Word, Word, Word]:
    """Four words of Philox 4x32-10; counters and words are integers, or int64 tensors, that hold uint32s."""
    k0, k1 = key & _WORD, (key >> 32) & _WORD
    for _ in range(10):
        # int64 products wrap modulo 2^64, which keeps all 64 bits of an unsigned 32 x 32 product; what lies
        # above a word is cut off where the word is multiplied.
        a, b = c0 * _ROUND_A, c2 * _ROUND_B
        c0, c1, c2, c3 = ((b >> 32) ^ c1 ^ k0) & _WORD, b, ((a >> 32) ^ c3 ^ k1) & _WORD, a
        k0, k1 = (k0 + _KEY_A) & _WORD, (k1 + _KEY_B) & _WORD
    return c0, c1 & _WORD, c2, c3 & _WORD


def uniform_of(word: Tensor) -> Tensor:
    """uint32 in int64 -> fp32 in [0, 1): the sign bit folds, as in Triton."""
    return torch.where(word > 0x7FFFFFFF, _WORD - word, word).to(torch.float32) * _TO_UNIT


def normals_of(words: Words) -> Words:
    """Box-Muller: four uint32 in int64 -> four standard normals, fp32."""
    normals: list[Tensor] = []
    for radius_word, angle_word in (words[:2], words[2:]):
        radius = torch.sqrt(-2.0 * torch.log(uniform_of(radius_word).clamp_min(_SMALLEST)))
        angle = (2.0 * math.pi) * uniform_of(angle_word)
        normals += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return normals[0], normals[1], normals[2], normals[3]


def element_words(key: int, step: Tensor, offset: int, count: int) -> Tensor:
    """[count] int64: one uint32 per element; element p takes word p % 4 of counter (p // 4, step, 0).

    The first and third counter are the low and high half of p // 4, p counts from `offset`, a multiple of 4.
    """
    blocks = torch.arange((count + 3) // 4, dtype=torch.int64, device=step.device) + offset // 4
    words = philox4x32(key, blocks & _WORD, step.expand_as(blocks), blocks >> 32, torch.zeros_like(blocks))
    return torch.stack(words, dim=-1).flatten()[:count]


def rounding_words(key: int, step: Tensor, offset: int, count: int) -> Tensor:
    """[count] int64: 16 random bits per element, the lower half of `element_words`."""
    return element_words(key, step, offset, count) & 0xFFFF


def normal_rows(key: int, step: Tensor, sample: Tensor, rows: Tensor, dim: int) -> Tensor:
    """[tokens, dim] fp32 standard normal; `sample` and `rows` are [tokens] int64, dim % 4 == 0."""
    blocks = torch.arange(dim // 4, dtype=torch.int64, device=rows.device) + rows[:, None] * (dim // 4)
    low, high = sample[:, None] & _WORD, (sample[:, None] >> 32) & _WORD
    words = philox4x32(key, blocks, step.expand_as(low), low, high)
    return torch.stack(normals_of(words), dim=-1).flatten(1)


def given_or_drawn(
    noise: Tensor | None,
    samples: Tensor | None,
    rows: Tensor | None,
    step: Tensor | None,
    key: int,
    images: Tensor | None,
    dim: int,
) -> Tensor:
    """[tokens, dim]: the noise itself, or what its coordinates stand for; NaN for an image out of range."""
    if noise is not None:
        return noise
    assert samples is not None
    assert rows is not None
    assert step is not None
    assert images is not None
    inside = (images >= 0) & (images < samples.shape[0])
    # No images, no tokens: nothing is picked from an empty list.
    sample = samples[images.clamp(0, max(samples.shape[0] - 1, 0))]
    return torch.where(inside[:, None], normal_rows(key, step, sample, rows, dim), torch.nan)
