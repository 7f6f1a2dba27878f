"""Janus-Pro's architecture as frozen values, read from the official configuration keys, and its variants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from reca.errors import CheckpointError
from reca.images import ImageSpec
from reca.models.family import Variant
from reca.models.official import entry, pick

IGNORED = -100
"""Label of a token that is not predicted."""

_GROUPS = 32


@dataclass(frozen=True, slots=True)
class TextConfig:
    """The Llama decoder; every head has its own keys and values."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e4

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads or self.head_dim % 2:
            raise ValueError(
                f"TextConfig: hidden_size={self.hidden_size} must give an even width to each of "
                f"{self.num_attention_heads} heads"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """The SigLIP encoder."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    mlp_ratio: float = 4.0
    layer_norm_eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def intermediate_size(self) -> int:
        """Width of the feed-forward block."""
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def num_tokens(self) -> int:
        """Patches of an image, each one understanding embedding."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True, slots=True)
class VQConfig:
    """The VQ autoencoder; the last level has attention after each residual block."""

    embed_dim: int = 8
    num_embeddings: int = 16_384
    latent_channels: int = 256
    base_channels: int = 128
    channel_multiplier: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2

    def __post_init__(self) -> None:
        if not self.channel_multiplier or self.base_channels % _GROUPS:
            raise ValueError(
                f"VQConfig: base_channels={self.base_channels} must be a multiple of {_GROUPS} groups, and "
                f"channel_multiplier={self.channel_multiplier} must not be empty"
            )

    @property
    def stride(self) -> int:
        """Pixels along one edge of a code."""
        return 1 << (len(self.channel_multiplier) - 1)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, from full to lowest resolution."""
        return tuple(self.base_channels * multiple for multiple in self.channel_multiplier)


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Ids of the tokens that a sequence is framed with; they differ between releases."""

    bos: int
    eos: int
    pad: int
    boi: int
    eoi: int
    image_placeholder: int


@dataclass(frozen=True, slots=True)
class JanusConfig:
    """Everything that shapes a Janus-Pro.

    Attributes:
        special: ids of the special tokens, for variants that ship no tokenizer: they take UTF-8 bytes as ids.
            None looks them up, by name, in the tokenizer beside the weights.
        train_aligner: also train the aligner, which defines the space of understanding embeddings.
    """

    text: TextConfig
    vision: VisionConfig
    vq: VQConfig
    special: SpecialTokens | None = None
    train_aligner: bool = False

    @property
    def image_size(self) -> int:
        """Side of the square images that are understood and generated, in pixels."""
        return self.vision.image_size

    @property
    def code_grid(self) -> int:
        """Codes along one edge of an image."""
        return self.image_size // self.vq.stride

    @property
    def num_codes(self) -> int:
        """Codes of one image."""
        return self.code_grid**2

    @classmethod
    def from_official(cls, official: Mapping[str, Any], *, train_aligner: bool = False) -> Self:
        """Read a configuration under the official keys, e.g. a parity pack's `config`.

        Raises: CheckpointError naming the first key that is missing or cannot be honoured.
        """
        parts = ("text_config", "vision_config", "vq_config")
        text, vision, vq = (dict(entry(official, part, "config")) for part in parts)
        if "rope_parameters" in text:
            text["rope_theta"] = entry(text["rope_parameters"], "rope_theta", "text_config.rope_parameters")
        vq["channel_multiplier"] = tuple(entry(vq, "channel_multiplier", "vq_config"))
        heads = entry(text, "num_attention_heads", "text_config")
        for part, where, required in (
            (text, "text_config", {"num_key_value_heads": heads, "hidden_act": "silu"}),
            (text, "text_config", {"attention_bias": False, "mlp_bias": False}),
            (vision, "vision_config", {"hidden_act": "gelu", "use_qk_norm": False}),
            (vision, "vision_config", {"attention_bias": True, "depth": 2}),
            (vq, "vq_config", {"num_hidden_layers": 2, "double_latent": False}),
        ):
            for key, value in required.items():
                if part.get(key, value) != value:
                    raise CheckpointError(
                        f"{where}: {key}={part[key]!r} is not supported; every release has {value!r}"
                    )
        special = official.get("special")
        return cls(
            text=TextConfig(**pick(TextConfig, text, "text_config")),
            vision=VisionConfig(**pick(VisionConfig, vision, "vision_config")),
            vq=VQConfig(**pick(VQConfig, vq, "vq_config")),
            special=None if special is None else SpecialTokens(**special),
            train_aligner=train_aligner,
        )


def _released(hidden: int, intermediate: int, layers: int, heads: int) -> JanusConfig:
    return JanusConfig(
        text=TextConfig(hidden, intermediate, layers, heads, vocab_size=102_400),
        vision=VisionConfig(
            hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=384, patch_size=16
        ),
        vq=VQConfig(),
    )


def _square(size: int, stride: int) -> ImageSpec:
    return ImageSpec(max_size=size, min_size=size, stride=stride, fit="center_crop")


_PIXELS = _square(384, 16)  # one tensor feeds both encoders

VARIANTS: Mapping[str, Variant] = {
    "pro-1b": Variant(
        config=_released(2048, 5632, 24, 16),
        understanding=_PIXELS,
        target=_PIXELS,
        weights=("deepseek-community/Janus-Pro-1B", "deepseek-ai/Janus-Pro-1B"),
    ),
    "pro-7b": Variant(
        config=_released(4096, 11_008, 30, 32),
        understanding=_PIXELS,
        target=_PIXELS,
        weights=("deepseek-community/Janus-Pro-7B", "deepseek-ai/Janus-Pro-7B"),
    ),
    "tiny": Variant(
        config=JanusConfig(
            text=TextConfig(
                hidden_size=64,
                intermediate_size=160,
                num_hidden_layers=3,
                num_attention_heads=4,
                vocab_size=264,
            ),
            vision=VisionConfig(
                hidden_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=32,
                patch_size=8,
                mlp_ratio=2.0,
            ),
            vq=VQConfig(
                num_embeddings=128,
                latent_channels=16,
                base_channels=32,
                channel_multiplier=(1, 1, 1),
                num_res_blocks=1,
            ),
            special=SpecialTokens(bos=256, eos=257, pad=258, boi=259, eoi=260, image_placeholder=261),
        ),
        understanding=_square(32, 8),
        target=_square(32, 8),
    ),
}
