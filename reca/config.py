"""The training configuration: frozen, typed, complete; one schema for Python, YAML and the command line.

A recipe is a function returning a `TrainConfig`; YAML files and dotted `key=value` arguments override it.
Every field
is read somewhere (a test looks), none is read from the environment, and an invalid combination fails here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]

TASKS = ("reconstruction", "image_to_text", "text_to_image")
"""What one microbatch can train, and the name of its loss term."""


class Section(BaseModel):
    """Base of every part of the configuration: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class StreamConfig(Section):
    """A stream of samples: where they come from and how they are grouped into steps.

    Attributes:
        path: what to read; the kinds are those of the class that inherits.
        images: most images of one pack.
        tokens: a pack is closed once it holds this many sequence tokens; None closes by `images` alone.
        max_tokens: a pack never holds more than this many tokens.
        max_sample_tokens: a longer sample is rejected and counted.
        packs: packs of one optimizer step, filled one after the other, as so many GPUs would fill theirs.
        micro_images: images of one microbatch; None runs each pack as one. Gradients do not depend on it.
    """

    path: str | None = None
    images: Positive = 8
    tokens: Positive | None = None
    max_tokens: Positive = 36_864
    max_sample_tokens: Positive = 16_384
    packs: Positive = 1
    micro_images: Positive | None = None

    @model_validator(mode="after")
    def _consistent(self) -> StreamConfig:
        if self.tokens is not None and self.tokens > self.max_tokens:
            raise ValueError(f"tokens={self.tokens} must not exceed max_tokens={self.max_tokens}")
        if self.max_sample_tokens > self.max_tokens:
            raise ValueError(
                f"max_sample_tokens={self.max_sample_tokens} must not exceed max_tokens={self.max_tokens}"
            )
        return self


class DataConfig(StreamConfig):
    """The images that are reconstructed; `workers` and `max_pixels` hold for every stream.

    Attributes:
        path: folder of images (recursive) or of WebDataset tar files; a tar file; `package:photos` are the
            shipped ones.
        prompts: file with one reconstruction instruction per line; None uses the templates that ship with
            reca.
        prompt_dropout: probability that a sample is trained without its instruction.
        images, tokens, max_tokens, max_sample_tokens, packs, micro_images: as in StreamConfig.
        workers: loader processes of each stream; 0 decodes in the training process. The sample order does not
            depend on it.
        max_pixels: images with more pixels are rejected before they are decoded.
    """

    prompts: Path | None = None
    prompt_dropout: Fraction = 0.1
    workers: NonNegative = 2
    max_pixels: Positive = 64_000_000


class ConversationConfig(StreamConfig):
    """Conversations about images, mixed into every step as image-to-text microbatches.

    Attributes:
        path: JSON or JSONL file of entries {image, conversations: [{from: human|gpt, value}]}, as LLaVA's.
        root: folder that the entries' images lie below; None takes that of `path`. Nothing outside is read.
        images, tokens, max_tokens, max_sample_tokens, packs, micro_images: as in StreamConfig.
    """

    root: Path | None = None


class CaptionConfig(StreamConfig):
    """Captioned images, mixed into every step as text-to-image microbatches.

    Attributes:
        path: folder of images (recursive), each with its caption in a .txt file of the same name beside it.
        dropout: probability that a sample is trained without its caption, for classifier-free guidance.
        images, tokens, max_tokens, max_sample_tokens, packs, micro_images: as in StreamConfig.
    """

    dropout: Fraction = 0.1


class OptimConfig(Section):
    """AdamW, its schedule, clipping and the average of the weights.

    Attributes:
        lr: peak learning rate.
        schedule: `constant` or `cosine` (to `min_lr`) after `warmup_steps` of linear warm-up from exactly 0.
        betas, eps: decays of AdamW's two moments, and what is added to the root of the second.
        weight_decay: decoupled decay of the trained tensors with two or more dimensions.
        decay_vectors: also decay tensors with fewer dimensions (biases, norms).
        no_decay: parts of names; a tensor whose name contains one of them is not decayed.
        clip_norm: largest global gradient norm; None switches clipping off.
        ema: decay of the exponential moving average of the trained tensors; None keeps no average.
        weights: of linear layers and convolutions under bf16: `exact` keeps all bits of their fp32 masters,
            `bf16` only what the step reads, rounded up or down at random so that the mean is the master.
        gradients: sums of the gradients of those weights: `fp32`, or `bf16`, exact for one microbatch a step.
        moments: of AdamW: `fp32`, or `8bit` for all tensors of two or more dimensions, in blocks of 256.
        max_bad_steps: consecutive steps with a non-finite loss or gradient that are skipped before the run
            aborts.
    """

    lr: Annotated[float, Field(gt=0)] = 4e-5
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-15
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    decay_vectors: bool = False
    no_decay: tuple[str, ...] = ()
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: NonNegative = 0
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    weights: Literal["exact", "bf16"] = "exact"
    gradients: Literal["fp32", "bf16"] = "fp32"
    moments: Literal["fp32", "8bit"] = "fp32"
    max_bad_steps: Positive = 5

    @model_validator(mode="after")
    def _consistent(self) -> OptimConfig:
        if self.schedule == "constant" and self.min_lr > 0:
            raise ValueError(
                "min_lr would be ignored by schedule=constant; use schedule=cosine or drop min_lr"
            )
        if self.weight_decay == 0 and (self.decay_vectors or self.no_decay):
            raise ValueError(
                "decay_vectors and no_decay would be ignored by weight_decay=0; set it or drop them"
            )
        return self


class ComputeConfig(Section):
    """How the step is executed.

    Attributes:
        device: `auto` takes CUDA when there is one.
        precision: `fp32`, or `bf16`: weights and activations in bf16, masters of the trained ones and losses
            in fp32 (`optim.weights` has more).
        recompute: recompute each of `model.blocks()` in the backward pass instead of storing its activations.
        attention: back end of `attention()`; `auto` chooses by capability, `reca doctor` explains the choice.
        kernels: of the operators in `reca.kernels`: `fused` is Triton, `reference` plain torch that autograd
            differentiates, `auto` takes the first on CUDA and explicit plain torch elsewhere.
        threads: CPU threads; None leaves torch's default. Bitwise resumption needs the same number.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    recompute: bool = False
    attention: Literal[
        "auto", "reference", "sdpa", "varlen", "flex", "flash2", "flash3", "flash4", "xformers"
    ] = "auto"
    kernels: Literal["auto", "fused", "reference"] = "auto"
    threads: Positive | None = None


class SampleConfig(Section):
    """Pictures made while training, and how pictures are made from the finished run.

    Attributes:
        every: steps between evaluations; step 0 and the last step are always evaluated. None evaluates only
            those two.
        images: held-out photographs to reconstruct.
        steps: points of the sampler's time grid.
        text_guidance, image_guidance: classifier-free guidance scales; 1 switches one off.
        shift: timestep shift of the sampler.
    """

    every: Positive | None = None
    images: NonNegative = 4
    steps: Annotated[int, Field(ge=2)] = 50
    text_guidance: Annotated[float, Field(ge=1)] = 1.0
    image_guidance: Annotated[float, Field(ge=1)] = 1.0
    shift: Annotated[float, Field(gt=0)] = 3.0


class CheckpointConfig(Section):
    """When checkpoints are written and how many are kept.

    Attributes:
        every: steps between checkpoints; the last step is always saved.
        keep: newest checkpoints that are kept; the last good one is never deleted.
    """

    every: Positive = 250
    keep: Positive = 2


class WorldConfig(Section):
    """The miniature world, and what of its model is trained; the scenes come from the seed, not from files.

    Attributes:
        stage: `encoder` learns to name the cells of a picture, `language` to read captions, `alignment` to
            read pictures alike, `base` to draw from sparse captions; `arm` is post-training.
        held_out: colours and shapes, as in "purple circle", that no sparse caption ever names together.
        images: scenes of one optimizer step.
        pool: different scenes that a generator is trained on; the other stages see no scene twice.
        prompts, samples: prompts of each category, and pictures of each prompt, that a score is made of; two
            scenes for each prompt test reading and reconstruction.
        gate: what the stage has to reach, else the run ends with an error: the share of cells (`encoder`) or
            descriptions (`language`, `alignment`) that are right, or the largest gain of the score over the
            last quarter of the steps (`base`). None asks nothing.
    """

    stage: Literal["encoder", "language", "alignment", "base", "arm"]
    held_out: tuple[str, ...] = (
        "purple circle",
        "yellow square",
        "cyan triangle",
        "red cross",
        "green ring",
        "blue diamond",
    )
    images: Positive = 128
    pool: Positive = 20_480
    prompts: Annotated[int, Field(ge=2, le=500)] = 150
    samples: Positive = 2
    gate: Fraction | None = None


class TrainConfig(Section):
    """Everything that defines a training run.

    Attributes:
        recipe: name of the recipe this came from.
        model: `family/variant`.
        weights: folder or file of the starting weights; None needs a recipe that ships them.
        image_to_text, text_to_image: further streams, whose microbatches join those of `data` in every step;
            None leaves the task out.
        loss_weights: loss term -> weight; a name that the model does not yield is an error, and so is a
            stream without a positive weight.
        normalize: `global` divides each term's sum by its count over all microbatches; `microbatch` by each
            one's own.
        timestep_shift: shift of the training timesteps; None takes the family's published value.
        world: the miniature world instead of `data`; the stage or the arm then sets the shares of the losses.
        arm: what is added to sparse captions in the world's stage `arm`, one of ARMS.
        log_every: steps between lines of metrics.jsonl.
    """

    recipe: str
    model: str
    weights: str | None = None
    data: DataConfig = DataConfig()
    image_to_text: ConversationConfig | None = None
    text_to_image: CaptionConfig | None = None
    optim: OptimConfig = OptimConfig()
    compute: ComputeConfig = ComputeConfig()
    sample: SampleConfig = SampleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    loss_weights: dict[str, Annotated[float, Field(ge=0)]] = {"reconstruction": 1.0}
    normalize: Literal["global", "microbatch"] = "global"
    timestep_shift: Annotated[float, Field(gt=0)] | None = None
    world: WorldConfig | None = None
    arm: str | None = None
    steps: Positive = 1000
    seed: NonNegative = 0
    log_every: Positive = 1

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.optim.warmup_steps > self.steps:
            raise ValueError(
                f"optim.warmup_steps={self.optim.warmup_steps} must not exceed steps={self.steps}"
            )
        for name in ("weights", "gradients"):
            if self.compute.precision == "fp32" and getattr(self.optim, name) == "bf16":
                raise ValueError(
                    f"optim.{name}=bf16 would be ignored by compute.precision=fp32; "
                    "set compute.precision=bf16, or drop it"
                )
        if not any(self.loss_weights.values()):
            raise ValueError("loss_weights must hold at least one positive weight")
        for task in TASKS:
            if task in self.tasks and not self.loss_weights.get(task):
                raise ValueError(
                    f"{task} is trained, so it needs a weight: set loss_weights.{task}=1{_drop(task)}"
                )
            if task not in self.tasks and task in self.loss_weights:
                raise ValueError(
                    f"loss_weights.{task} would be ignored: nothing trains it; set {task}.path, "
                    f"or drop the weight with loss_weights.{task}=null"
                )
        return self

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks of every step, in the order of its microbatches."""
        further = {"image_to_text": self.image_to_text, "text_to_image": self.text_to_image}
        return (TASKS[0], *(task for task, stream in further.items() if stream is not None))


def _drop(task: str) -> str:
    return "" if task == TASKS[0] else f", or leave it out with {task}=null"
