"""BAGEL's architecture as frozen values, read from the official configuration keys, and its variants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from reca.images import ImageSpec
from reca.models.bagel.vae import VAEConfig
from reca.models.family import Variant
from reca.models.official import entry, pick, require


@dataclass(frozen=True, slots=True)
class LLMConfig:
    """The mixture of transformers: two parameter sets of one Qwen2 shape, under the official names."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads or self.head_dim % 2:
            raise ValueError(
                f"LLMConfig: hidden_size={self.hidden_size} must give an even width to each of "
                f"{self.num_attention_heads} heads"
            )
        if self.hidden_size % 4:
            raise ValueError(
                f"LLMConfig: hidden_size={self.hidden_size} must be a multiple of 4 (position tables)"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"LLMConfig: num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_official(cls, official: Mapping[str, Any]) -> Self:
        """Read `llm_config.json`; keys that the code overrides after loading are ignored."""
        return cls(**pick(cls, official, "llm_config"))


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """The SigLIP-NaViT encoder; `num_layers` are those that are built."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    layer_norm_eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def positions_per_side(self) -> int:
        """Learned positions along one edge of the table."""
        return self.image_size // self.patch_size

    @property
    def patch_dim(self) -> int:
        """Values of one RGB patch."""
        return 3 * self.patch_size**2

    @classmethod
    def from_official(cls, official: Mapping[str, Any]) -> Self:
        """Read `vit_config.json`, which counts one layer more than the official code builds."""
        layers = {"num_layers": entry(official, "num_hidden_layers", "vit_config") - 1}
        return cls(**pick(cls, {**official, **layers}, "vit_config"))


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Ids of the tokens around a text and around an image; the defaults are Qwen2.5's."""

    bos_token_id: int = 151_644  # <|im_start|>
    eos_token_id: int = 151_645  # <|im_end|>
    start_of_image: int = 151_652  # <|vision_start|>
    end_of_image: int = 151_653  # <|vision_end|>


@dataclass(frozen=True, slots=True)
class BagelConfig:
    """Everything that shapes a BAGEL.

    Attributes:
        latent_patch_size: VAE latents along one edge of a latent token.
        max_latent_size: latent tokens along one edge of the largest image.
        vit_max_num_patch_per_side: edge of the sine-cosine table of ViT tokens; positions are row * edge +
            column.
        tokenizer: `files` reads the tokenizer beside the weights; `bytes` takes UTF-8 bytes as ids, for
            variants that ship none.
    """

    llm: LLMConfig
    vision: VisionConfig
    vae: VAEConfig
    latent_patch_size: int = 2
    max_latent_size: int = 64
    vit_max_num_patch_per_side: int = 70
    special: SpecialTokens = SpecialTokens()
    tokenizer: Literal["files", "bytes"] = "files"

    def __post_init__(self) -> None:
        if self.vit_max_num_patch_per_side != self.vision.positions_per_side:
            raise ValueError(
                "BagelConfig: both position tables of ViT tokens share one index: vit_max_num_patch_per_side="
                f"{self.vit_max_num_patch_per_side} must equal image_size / patch_size = "
                f"{self.vision.positions_per_side}"
            )

    @property
    def latent_dim(self) -> int:
        """Values of one latent token."""
        return self.vae.z_channels * self.latent_patch_size**2

    @property
    def latent_stride(self) -> int:
        """Pixels along one edge of a latent token."""
        return self.vae.stride * self.latent_patch_size

    @classmethod
    def from_official(cls, official: Mapping[str, Any]) -> Self:
        """Read a configuration under the official keys, e.g. a parity pack's `config`.

        Raises: CheckpointError naming the first key that is missing or cannot be honoured.
        """
        vae = {**entry(official, "vae_config", "config")}
        vae["ch_mult"] = tuple(entry(vae, "ch_mult", "vae_config"))
        require(official, "vit_rope", False)
        require(official, "vit_select_layer", -2)
        require(official, "interpolate_pos", False)
        require(official, "connector_act", "gelu_pytorch_tanh")
        return cls(
            llm=LLMConfig.from_official(entry(official, "llm_config", "config")),
            vision=VisionConfig.from_official(entry(official, "vit_config", "config")),
            vae=VAEConfig(**pick(VAEConfig, vae, "vae_config")),
            latent_patch_size=entry(official, "latent_patch_size", "config"),
            max_latent_size=entry(official, "max_latent_size", "config"),
            vit_max_num_patch_per_side=entry(official, "vit_max_num_patch_per_side", "config"),
            special=SpecialTokens(**official.get("special_tokens", {})),
        )


_LLM_7B = LLMConfig(
    hidden_size=3584,
    intermediate_size=18_944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    vocab_size=152_064,
)
_VISION_7B = VisionConfig(
    hidden_size=1152,
    intermediate_size=4304,
    num_layers=26,
    num_attention_heads=16,
    image_size=980,
    patch_size=14,
)
_MAX_PIXELS = 14 * 14 * 9 * 1024

VARIANTS: Mapping[str, Variant] = {
    "7b-mot": Variant(
        config=BagelConfig(llm=_LLM_7B, vision=_VISION_7B, vae=VAEConfig()),
        # 224 px on purpose: what the generator is told about the image is a bottleneck
        understanding=ImageSpec(max_size=224, min_size=224, stride=14, max_pixels=_MAX_PIXELS),
        target=ImageSpec(max_size=1024, min_size=512, stride=16, max_pixels=_MAX_PIXELS),
        weights=("ByteDance-Seed/BAGEL-7B-MoT", "sanaka87/BAGEL-RecA"),
    ),
    "tiny": Variant(
        config=BagelConfig(
            llm=LLMConfig(
                hidden_size=64,
                intermediate_size=160,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=264,
            ),
            vision=VisionConfig(
                hidden_size=48,
                intermediate_size=96,
                num_layers=2,
                num_attention_heads=4,
                image_size=56,
                patch_size=14,
            ),
            vae=VAEConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, z_channels=4),
            max_latent_size=8,
            vit_max_num_patch_per_side=4,
            special=SpecialTokens(256, 257, 258, 259),
            tokenizer="bytes",
        ),
        understanding=ImageSpec(max_size=56, min_size=56, stride=14),
        target=ImageSpec(max_size=64, min_size=32, stride=8),
    ),
    # Weights for it ship with reca; `python -m reca.recipes.quickstart_base` makes them.
    "quickstart": Variant(
        config=BagelConfig(
            llm=LLMConfig(
                hidden_size=128,
                intermediate_size=320,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=768,
            ),
            vision=VisionConfig(
                hidden_size=96,
                intermediate_size=256,
                num_layers=3,
                num_attention_heads=4,
                image_size=32,
                patch_size=4,
            ),
            vae=VAEConfig(
                ch=64,  # fewer would leave one channel to each of the 32 groups, whose norm erases brightness
                ch_mult=(1, 1, 1),
                num_res_blocks=0,  # only those in the middle: encoding is a third of the step even so
                z_channels=4,
                scale_factor=1.0,
                shift_factor=0.0,
            ),
            max_latent_size=8,
            vit_max_num_patch_per_side=8,
            special=SpecialTokens(0, 1, 2, 3),
        ),
        understanding=ImageSpec(max_size=32, min_size=32, stride=4, fit="center_crop"),
        target=ImageSpec(max_size=64, min_size=64, stride=8, fit="center_crop"),
    ),
}
