"""What a family of models offers to the rest of reca: one value, `FAMILY`, in each family's `__init__`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from torch import Tensor, nn

from reca.images import ImageSpec
from reca.kernels import Impl
from reca.types import Batch, Processor

Tensors = Iterable[tuple[str, Tensor]]
"""A stream of named tensors; whole state dicts are never held twice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOptions:
    """How pictures are sampled. A per-image seed gives the same picture whatever the batch.

    Attributes:
        steps: points of the time grid (steps - 1 evaluations for an Euler sampler).
        text_guidance, image_guidance: classifier-free guidance scales; 1 switches one off.
        guidance_interval: guidance acts at times t with interval[0] < t <= interval[1].
        renorm: how the guided velocity's norm is pulled back: `global`, `channel` or `text_channel`.
        renorm_min: smallest renorm factor; 1 switches renorm off.
        shift: timestep shift.
        seed: seed of the starting noise.
        first_index: number of the first picture of a call; the noise belongs to (seed, number), so a list
            of many may be sampled in parts.
    """

    steps: int = 50
    text_guidance: float = 4.0
    image_guidance: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    renorm: str = "global"
    renorm_min: float = 0.0
    shift: float = 3.0
    seed: int = 0
    first_index: int = 0


class Sampler(Protocol):
    """Pictures from a model. All methods run without gradients and return RGB images in the order asked."""

    def text_to_image(
        self, prompts: Sequence[str], size: tuple[int, int], options: SampleOptions
    ) -> list[Image.Image]:
        """One picture per prompt; `size` is (height, width) in pixels."""
        ...

    def reconstruct(
        self, images: Sequence[Image.Image], prompts: Sequence[str], options: SampleOptions
    ) -> list[Image.Image]:
        """Image -> understanding embeddings -> image, at the target size of each input."""
        ...

    def edit(
        self, images: Sequence[Image.Image], prompts: Sequence[str], options: SampleOptions
    ) -> list[Image.Image]:
        """Pictures that follow the instruction and keep the rest of the input."""
        ...

    def understand(self, images: Sequence[Image.Image]) -> Tensor:
        """[num_images, dim] fp32: mean-pooled embeddings of the model's own understanding encoder."""
        ...


@dataclass(frozen=True, slots=True)
class Variant:
    """One size of a family: the architecture, the pixels it was trained on, and where its weights are
    published.

    Attributes:
        config: the family's own frozen configuration.
        understanding: pixels of the understanding encoder; its size is RecA's information bottleneck.
        target: pixels of the image to be reconstructed.
        weights: hub ids of the released checkpoint, for messages; nothing is fetched.
    """

    config: Any
    understanding: ImageSpec
    target: ImageSpec
    weights: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Pack:
    """A parity pack: configuration, inputs and expected tensors of one case of the official code.

    Attributes:
        folder: where it lies, with its weights.
        description: its `pack.json`.
        inputs, expected: name -> tensor.
        kernels: the implementation of the operators with which it is to be reproduced.
    """

    folder: Path
    description: Mapping[str, Any]
    inputs: Mapping[str, Tensor]
    expected: Mapping[str, Tensor]
    kernels: Impl = "auto"

    @property
    def kind(self) -> str:
        """What the pack exercises, e.g. `train` or `sampler`; without a kind, its case."""
        return str(self.description.get("kind", self.description.get("case", "")))


@dataclass(frozen=True, slots=True)
class Reproduction:
    """What an implementation got for a pack.

    Attributes:
        tensors: name in `expected` -> tensor.
        not_formed: name in `expected` -> why this implementation never forms that tensor.
    """

    tensors: Mapping[str, Tensor]
    not_formed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Family:
    """The one value that a family's package exports as `FAMILY`.

    Attributes:
        name: as in `family/variant`.
        variants: name -> Variant.
        build: (variant config) -> model on the default device (`torch.device("meta")` before loading).
        processor: (variant, folder of the weights, which holds tokenizer files) -> Processor of
            reconstruction; of another task of `tasks` with `task=...`.
        load: (model on meta, path of official weights, device, dtype of frozen weights, trained_dtype=fp32)
            -> None; strict, shard by shard; a dtype of None keeps the file's.
        save: (model, folder, source=None) -> None; writes the official files through the file layer, with the
            dtypes, configuration and tokenizer of `source`, the release that the model came from.
        sampler: (model, variant, folder of the tokenizer) -> Sampler.
        reproduce: (pack) -> Reproduction; runs the maths of a parity pack.
        example: (variant, task, number of samples) -> microbatch of typical size; needs neither data nor
            tokenizer.
        tasks: what it trains, by the names of the loss terms.
        examine: (loaded model, variant) -> notes for the run's record, found before training.
        fp32_parts: names of frozen parts that `load` keeps in fp32 whatever it is asked for.
    """

    name: str
    variants: Mapping[str, Variant]
    build: Callable[[Any], nn.Module]
    processor: Callable[..., Processor]
    load: Callable[..., None]
    save: Callable[..., None]
    sampler: Callable[..., Sampler]
    reproduce: Callable[[Pack], Reproduction]
    example: Callable[[Variant, str, int], Batch]
    tasks: tuple[str, ...] = ("reconstruction",)
    examine: Callable[[Any, Variant], tuple[str, ...]] = lambda model, variant: ()
    fp32_parts: tuple[str, ...] = ()
