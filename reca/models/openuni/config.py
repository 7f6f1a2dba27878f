"""OpenUni's architecture as frozen values, read from the official configuration keys, and its variants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from reca.images import ImageSpec
from reca.models.family import Variant
from reca.models.official import entry, pick, require


@dataclass(frozen=True, slots=True)
class LLMConfig:
    """The frozen language model, a Qwen2.5, under the official names."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int = 151_674
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
class VisionConfig:
    """The frozen understanding encoder, an InternViT.

    Attributes:
        drop_path_rate: stochastic depth of the last layer; earlier layers have proportionally less. The
            official program runs the frozen encoder in training mode, where the published InternVL3-1B
            drops 0.1; that looks unintended, and 0 gives each image the embeddings it has in use.
    """

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 448
    patch_size: int = 14
    layer_norm_eps: float = 1e-6
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        if self.image_size % (2 * self.patch_size):
            raise ValueError(
                f"VisionConfig: image_size={self.image_size} must be a multiple of two patches of "
                f"{self.patch_size}, for each embedding is made of 2 x 2"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def patches_per_side(self) -> int:
        """Patches along one edge of an image."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of an image, without the class token."""
        return self.patches_per_side**2

    @property
    def num_embeddings(self) -> int:
        """Understanding embeddings of an image: one for 2 x 2 patches."""
        return self.num_patches // 4


@dataclass(frozen=True, slots=True)
class ConnectorConfig:
    """The bidirectional encoder over query states."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    layer_norm_eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True, slots=True)
class SanaConfig:
    """The diffusion transformer, under the names of diffusers; see `SanaTransformer2DModel`."""

    num_attention_heads: int
    attention_head_dim: int
    num_layers: int
    num_cross_attention_heads: int
    cross_attention_head_dim: int
    in_channels: int = 32
    caption_channels: int = 2304
    mlp_ratio: float = 2.5
    sample_size: int = 16
    qk_norm: str | None = None

    @property
    def width(self) -> int:
        """Channels of a latent token inside the transformer."""
        return self.num_attention_heads * self.attention_head_dim

    def arguments(self) -> dict[str, Any]:
        """Arguments of `SanaTransformer2DModel`; those that all releases share are written out."""
        shared = {
            "out_channels": self.in_channels,
            "cross_attention_dim": self.width,
            "dropout": 0.0,
            "attention_bias": False,
            "patch_size": 1,
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
            "interpolation_scale": None,
        }
        return {**asdict(self), **shared}


@dataclass(frozen=True, slots=True)
class AutoencoderConfig:
    """The deep-compression autoencoder, under the names of diffusers; see `AutoencoderDC`."""

    latent_channels: int = 32
    attention_head_dim: int = 32
    encoder_block_types: tuple[str, ...] = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    decoder_block_types: tuple[str, ...] = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    encoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    decoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    encoder_layers_per_block: tuple[int, ...] = (2, 2, 2, 3, 3, 3)
    decoder_layers_per_block: tuple[int, ...] = (3, 3, 3, 3, 3, 3)
    encoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
    decoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
    scaling_factor: float = 0.41407

    @property
    def stride(self) -> int:
        """Pixels along one edge of a latent."""
        return int(2 ** (len(self.encoder_block_out_channels) - 1))

    def arguments(self) -> dict[str, Any]:
        """Arguments of `AutoencoderDC`; those that all releases share are written out."""
        shared = {
            "in_channels": 3,
            "upsample_block_type": "interpolate",
            "downsample_block_type": "Conv",
            "decoder_norm_types": "rms_norm",
            "decoder_act_fns": "silu",
        }
        return {**asdict(self), **shared}


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Ids of the tokens around turns and images; the defaults are InternVL3's."""

    im_start: int = 151_644  # <|im_start|>
    im_end: int = 151_645  # <|im_end|>
    start_of_image: int = 151_665  # <img>
    end_of_image: int = 151_666  # </img>
    image: int = 151_667  # <IMG_CONTEXT>


@dataclass(frozen=True, slots=True)
class OpenUniConfig:
    """Everything that shapes an OpenUni.

    Attributes:
        num_queries: meta-queries behind every prompt, the rows of SANA's caption.
        tokenizer: `files` reads the tokenizer beside the weights; `bytes` takes UTF-8 bytes as ids, for
            variants that ship none.
    """

    llm: LLMConfig
    vision: VisionConfig
    connector: ConnectorConfig
    sana: SanaConfig
    autoencoder: AutoencoderConfig
    num_queries: int = 256
    special: SpecialTokens = SpecialTokens()
    tokenizer: Literal["files", "bytes"] = "files"

    def __post_init__(self) -> None:
        if self.connector.hidden_size != self.llm.hidden_size:
            raise ValueError(
                f"OpenUniConfig: the connector reads query states, so its hidden_size="
                f"{self.connector.hidden_size} must equal the language model's {self.llm.hidden_size}"
            )
        if self.sana.in_channels != self.autoencoder.latent_channels:
            raise ValueError(
                f"OpenUniConfig: sana.in_channels={self.sana.in_channels} must equal "
                f"autoencoder.latent_channels={self.autoencoder.latent_channels}"
            )

    @classmethod
    def from_official(cls, official: Mapping[str, Any]) -> Self:
        """Read a configuration under the official keys, e.g. a parity pack's `config`.

        Raises: CheckpointError naming the first key that is missing or cannot be honoured.
        """
        lmm = entry(official, "lmm", "config")
        require(official, "proj_type", "enc_proj")
        for key, value in (("select_layer", -1), ("downsample_ratio", 0.5), ("ps_version", "v2")):
            require(lmm, key, value)
        llm, vision = (entry(lmm, part, "lmm") for part in ("llm_config", "vision_config"))
        for key, value in (("tie_word_embeddings", False), ("hidden_act", "silu")):
            require(llm, key, value)
        for key, value in (("qkv_bias", True), ("qk_normalization", False), ("norm_type", "layer_norm")):
            require(vision, key, value)
        special = official.get("special", {})
        names = ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")
        return cls(
            llm=LLMConfig(**pick(LLMConfig, llm, "llm_config")),
            vision=VisionConfig(**{**pick(VisionConfig, vision, "vision_config"), "drop_path_rate": 0.0}),
            connector=ConnectorConfig(
                **pick(ConnectorConfig, entry(official, "connector", "config"), "connector")
            ),
            sana=SanaConfig(**pick(SanaConfig, entry(official, "transformer", "config"), "transformer")),
            autoencoder=autoencoder_from_official(entry(official, "vae", "config")),
            num_queries=entry(official, "num_queries", "config"),
            special=SpecialTokens(*(special[name] for name in names)) if special else SpecialTokens(),
        )


def autoencoder_from_official(official: Mapping[str, Any]) -> AutoencoderConfig:
    """Read the autoencoder's `config.json`. Raises CheckpointError as `OpenUniConfig.from_official`."""
    for key, value in (("upsample_block_type", "interpolate"), ("downsample_block_type", "Conv")):
        require(official, key, value)
    return AutoencoderConfig(**_frozen(pick(AutoencoderConfig, official, "vae")))


def _frozen(value: Any) -> Any:
    """JSON lists as tuples, also inside."""
    if isinstance(value, dict):
        return {key: _frozen(entry) for key, entry in value.items()}
    return tuple(_frozen(entry) for entry in value) if isinstance(value, list) else value


_LLM_1B = LLMConfig(896, 4864, 24, 14, 2)
_LLM_2B = LLMConfig(1536, 8960, 28, 12, 2)
_CONNECTOR_1B = ConnectorConfig(896, 3072, 6, 14)
_CONNECTOR_2B = ConnectorConfig(1536, 8960, 6, 24)
_UNDERSTANDING = ImageSpec(max_size=448, min_size=448, stride=14, fit="center_crop", filter="bilinear")
_DC_AE = "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers"


def _target(size: int, stride: int = 32) -> ImageSpec:
    return ImageSpec(max_size=size, min_size=size, stride=stride, fit="center_crop")


VARIANTS: Mapping[str, Variant] = {
    "b-512": Variant(
        config=OpenUniConfig(
            llm=_LLM_1B,
            vision=VisionConfig(),
            connector=_CONNECTOR_1B,
            sana=SanaConfig(36, 32, 28, 16, 72),
            autoencoder=AutoencoderConfig(),
        ),
        understanding=_UNDERSTANDING,
        target=_target(512),
        weights=(
            "wusize/openuni",
            "sanaka87/OpenUni-1-0.6B-RecA",
            "OpenGVLab/InternVL3-1B",
            "Efficient-Large-Model/Sana_600M_512px_diffusers",
            _DC_AE,
        ),
    ),
    "l-512": Variant(
        config=OpenUniConfig(
            llm=_LLM_2B,
            vision=VisionConfig(),
            connector=_CONNECTOR_2B,
            sana=SanaConfig(70, 32, 20, 20, 112),
            autoencoder=AutoencoderConfig(),
        ),
        understanding=_UNDERSTANDING,
        target=_target(512),
        weights=(
            "wusize/openuni",
            "sanaka87/OpenUni-RecA",
            "OpenGVLab/InternVL3-2B",
            "Efficient-Large-Model/Sana_1600M_512px_diffusers",
            _DC_AE,
        ),
    ),
    "l-1024": Variant(
        config=OpenUniConfig(
            llm=_LLM_2B,
            vision=VisionConfig(),
            connector=_CONNECTOR_2B,
            # SANA-1.5: queries and keys are normalised over all channels, as its published converter says
            sana=SanaConfig(70, 32, 20, 20, 112, sample_size=32, qk_norm="rms_norm_across_heads"),
            autoencoder=AutoencoderConfig(),
        ),
        understanding=_UNDERSTANDING,
        target=_target(1024),
        weights=(
            "wusize/openuni",
            "OpenGVLab/InternVL3-2B",
            "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers",
            _DC_AE,
        ),
    ),
    "tiny": Variant(
        config=OpenUniConfig(
            llm=LLMConfig(48, 96, 2, 4, 2, vocab_size=264),
            vision=VisionConfig(32, 64, 2, 2, image_size=56),
            connector=ConnectorConfig(48, 96, 2, 4),
            sana=SanaConfig(4, 16, 3, 2, 32, in_channels=8, caption_channels=40, sample_size=8, qk_norm=None),
            autoencoder=AutoencoderConfig(
                latent_channels=8,
                attention_head_dim=8,
                encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock", "EfficientViTBlock"),
                decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock", "EfficientViTBlock"),
                encoder_block_out_channels=(8, 16, 16, 32),
                decoder_block_out_channels=(8, 16, 16, 32),
                encoder_layers_per_block=(1, 1, 1, 1),
                decoder_layers_per_block=(1, 1, 1, 1),
                encoder_qkv_multiscales=((), (), (5,), (5,)),
                decoder_qkv_multiscales=((), (), (5,), (5,)),
            ),
            num_queries=8,
            special=SpecialTokens(256, 257, 258, 259, 260),
            tokenizer="bytes",
        ),
        understanding=ImageSpec(max_size=56, min_size=56, stride=14, fit="center_crop", filter="bilinear"),
        target=_target(64, stride=8),
    ),
}
