"""Harmon's architecture as frozen values, read from the official configuration keys, and its variants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from reca.images import ImageSpec
from reca.models.autoencoder import AutoencoderKLConfig
from reca.models.family import Variant
from reca.models.official import entry, pick, require


@dataclass(frozen=True, slots=True)
class LLMConfig:
    """A Qwen2 decoder with tied embeddings, under the official names."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int = 151_936
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads or self.head_dim % 2:
            raise ValueError(
                f"LLMConfig: hidden_size={self.hidden_size} must give an even width to each of "
                f"{self.num_attention_heads} heads"
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


@dataclass(frozen=True, slots=True)
class MarConfig:
    """The masked autoregressive encoder and decoder and the diffusion head, under the official names.

    Attributes:
        img_size: pixels of the grid that the learned position tables cover; other grids resize them.
        mask_ratio_min: lower end of the truncated normal that mask ratios are drawn from.
        attn_dropout, proj_dropout: of attention probabilities; after projection, GELU and second MLP layer.
        buffer_size: buffer tokens.
        diffloss_d, diffloss_w: residual blocks and width of the diffusion head.
        diffusion_batch_mul: noise levels per masked token.
        num_sampling_steps: denoising steps per sampled token.
    """

    encoder_embed_dim: int
    encoder_depth: int
    encoder_num_heads: int
    decoder_embed_dim: int
    decoder_depth: int
    decoder_num_heads: int
    diffloss_d: int
    diffloss_w: int
    img_size: int = 256
    vae_stride: int = 16
    vae_embed_dim: int = 16
    mlp_ratio: int = 4
    mask_ratio_min: float = 0.7
    class_num: int = 1000
    attn_dropout: float = 0.1
    proj_dropout: float = 0.1
    buffer_size: int = 64
    diffusion_batch_mul: int = 4
    num_sampling_steps: int = 100

    def __post_init__(self) -> None:
        if self.encoder_embed_dim != self.decoder_embed_dim:
            raise ValueError(
                f"MarConfig: encoder and decoder share one width, got {self.encoder_embed_dim} "
                f"and {self.decoder_embed_dim}"
            )

    @property
    def learned_side(self) -> int:
        """Latents along one edge of the learned position tables."""
        return self.img_size // self.vae_stride


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Ids of the chat template's special tokens; the defaults are Qwen2.5's."""

    im_start: int = 151_644
    im_end: int = 151_645
    endoftext: int = 151_643


_KL16 = AutoencoderKLConfig(ch_mult=(1, 1, 2, 2, 4))


@dataclass(frozen=True, slots=True)
class HarmonConfig:
    """Everything that shapes a Harmon.

    Attributes:
        release: stem of the official weight file.
        vae_scale: factor of the latents.
        grad_scale: factor of the gradient through the understanding embeddings; the values stay.
        image_index: ids of a prompt before the understanding embeddings of its image.
        tokenizer: `files` reads the tokenizer beside the weights; `bytes` takes UTF-8 bytes as ids, for
            variants that ship none.
    """

    llm: LLMConfig
    mar: MarConfig
    vae: AutoencoderKLConfig = _KL16
    special: SpecialTokens = SpecialTokens()
    release: str = "harmon"
    vae_scale: float = 0.2325
    grad_scale: float = 0.1
    image_index: int = 3
    tokenizer: Literal["files", "bytes"] = "files"

    @classmethod
    def from_official(cls, official: Mapping[str, Any]) -> Self:
        """Read a configuration under the official keys, e.g. a parity pack's `config`.

        Raises: CheckpointError naming the first key that is missing or cannot be honoured.
        """
        llm, mar = entry(official, "llm", "config"), dict(entry(official, "mar", "config"))
        require(llm, "tie_word_embeddings", True)
        require(llm, "use_sliding_window", False)
        require(mar, "patch_size", 1)
        mar["num_sampling_steps"] = int(entry(mar, "num_sampling_steps", "mar"))
        special = official.get("special_ids", {})
        return cls(
            llm=LLMConfig(**pick(LLMConfig, llm, "llm")),
            mar=MarConfig(**pick(MarConfig, mar, "mar")),
            special=SpecialTokens(
                **{name: special[name] for name in SpecialTokens.__dataclass_fields__ if name in special}
            ),
            vae_scale=float(entry(official, "vae_scale", "config")),
            grad_scale=float(entry(official, "grad_scale", "config")),
        )


def _variant(config: HarmonConfig, side: int, weights: tuple[str, ...] = ()) -> Variant:
    spec = ImageSpec(max_size=side, min_size=side, stride=config.mar.vae_stride, fit="squash")
    return Variant(config=config, understanding=spec, target=spec, weights=weights)


_CONFIG_05B = HarmonConfig(
    llm=LLMConfig(896, 4864, 24, 14, 2),
    mar=MarConfig(768, 12, 12, 768, 12, 12, diffloss_d=6, diffloss_w=1024),
    release="harmon_0.5b",
)
_CONFIG_15B = HarmonConfig(
    llm=LLMConfig(1536, 8960, 28, 12, 2),
    mar=MarConfig(1280, 20, 16, 1280, 20, 16, diffloss_d=12, diffloss_w=1536),
    release="harmon_1.5b",
)
_HUB_05B = ("wusize/harmon (harmon_0.5b.pth, kl16.ckpt)", "sanaka87/Harmon-0.5B-RecA")
_HUB_15B = ("wusize/harmon (harmon_1.5b.pth, kl16.ckpt)", "sanaka87/Harmon-1.5B-RecA")

VARIANTS: Mapping[str, Variant] = {
    "0.5b": _variant(_CONFIG_05B, 512, _HUB_05B),
    "1.5b": _variant(_CONFIG_15B, 512, _HUB_15B),
    # the same weights at the size of the learned position tables
    "0.5b-256": _variant(_CONFIG_05B, 256, _HUB_05B),
    "1.5b-256": _variant(_CONFIG_15B, 256, _HUB_15B),
    "tiny": _variant(
        HarmonConfig(
            llm=LLMConfig(64, 160, 3, 4, 2, vocab_size=264),
            mar=MarConfig(
                48,
                2,
                4,
                48,
                2,
                4,
                diffloss_d=2,
                diffloss_w=64,
                img_size=64,
                class_num=10,
                buffer_size=4,
                num_sampling_steps=5,
            ),
            vae=AutoencoderKLConfig(ch=32, ch_mult=(1, 1, 1, 1, 1), num_res_blocks=1),
            special=SpecialTokens(256, 257, 258),
            release="harmon_tiny",
            image_index=6,  # <|im_start|> and the bytes of "user\n"
            tokenizer="bytes",
        ),
        128,
    ),
}
