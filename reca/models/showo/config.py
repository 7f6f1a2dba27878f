"""Show-o's architecture as data, the released variants, and a tiny one of each kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from reca.errors import CheckpointError
from reca.images import ImageSpec
from reca.models.family import Variant

TASKS = ("reconstruction", "image_to_text", "text_to_image")
IGNORED = -100
"""The label of a token that no loss counts."""


@dataclass(frozen=True, slots=True)
class PhiConfig:
    """The language model, under the names of phi-1.5's own configuration.

    Attributes:
        partial_rotary_factor: share of each head that is rotated.
    """

    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_hidden_layers: int = 24
    num_attention_heads: int = 32
    layer_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    partial_rotary_factor: float = 0.5

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """Channels of one head that are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)


@dataclass(frozen=True, slots=True)
class ClipConfig:
    """The understanding encoder of the CLIP variants, under CLIP's names."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 336
    patch_size: int = 14

    @property
    def num_tokens(self) -> int:
        """Patches of one image; the class token is not among them."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True, slots=True)
class MagvitConfig:
    """The image tokenizer; every list is by level, highest resolution first.

    Attributes:
        encoder_channels, decoder_channels: channels of each level.
        encoder_blocks, decoder_blocks: residual blocks of each level.
        bits: binary channels of a code; the codebook has 2 ** bits entries.
    """

    encoder_channels: tuple[int, ...] = (128, 256, 256, 512, 512)
    encoder_blocks: tuple[int, ...] = (4, 3, 4, 3, 4)
    decoder_channels: tuple[int, ...] = (128, 128, 256, 256, 512)
    decoder_blocks: tuple[int, ...] = (4, 4, 3, 4, 3)
    bits: int = 13

    @property
    def stride(self) -> int:
        """Pixels per code along one side."""
        return 1 << (len(self.encoder_channels) - 1)

    @classmethod
    def from_official(cls, official: Mapping[str, Any]) -> MagvitConfig:
        """From the configuration of both halves: base channels, multiples and block counts."""
        encoder, decoder = official["encoder"], official["decoder"]
        return cls(
            encoder_channels=tuple(encoder["ch"] * multiple for multiple in encoder["ch_mult"]),
            encoder_blocks=tuple(encoder["num_res_blocks"]),
            decoder_channels=tuple(decoder["ch"] * multiple for multiple in decoder["ch_mult"]),
            decoder_blocks=tuple(decoder["num_res_blocks"]),
            bits=encoder["z_channels"],
        )


_OFFICIAL_TOKENS = {
    "pad": "[PAD]",
    "soi": "<|soi|>",
    "eoi": "<|eoi|>",
    "t2i": "<|t2i|>",
    "mmu": "<|mmu|>",
    "sot": "<|sot|>",
    "eot": "<|eot|>",
    "codes": "image_token_offset",
    "mask": "mask_token_id",
}


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Ids of the tokens that frame images and tasks; image code c has id `codes` + c."""

    pad: int = 50_295
    soi: int = 50_296
    eoi: int = 50_297
    t2i: int = 50_300
    mmu: int = 50_301
    sot: int = 50_256
    eot: int = 50_256
    codes: int = 50_305
    mask: int = 58_497


# The Vicuna system line in phi-1.5's tokens; only the image-to-text sequences of the CLIP variants hold it.
_SYSTEM = (
    *(32, 8537, 1022, 257, 11040, 2836, 290, 281, 11666, 4430, 8796, 13, 383, 8796),
    *(3607, 7613, 11, 6496, 11, 290, 23507, 7429, 284, 262, 2836, 338, 2683, 13),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShowoConfig:
    """One Show-o.

    Attributes:
        phi, magvit: language model and image tokenizer.
        clip: understanding encoder; None understands images by their own codes.
        resolution: side in pixels of the images that are generated.
        vocab_size: rows of the embedding and of the output layer.
        special: ids of special tokens.
        max_text: text positions of a sequence (officially `max_seq_length`).
        text_block: fixed length of the text block of a reconstruction in the CLIP variants.
        system_ids: tokens before the image in image-to-text sequences of the CLIP variants.
        down_scale: the image that conditions a reconstruction is shrunk by this factor (VQ variants).
        resize_back: and then enlarged to its old size, which blurs it.
        clip_mean_std: normalise a reconstruction's CLIP input as CLIP was trained. Officially it keeps the
            [-1, 1] of generation: the tower sees half the contrast it knows.
        train_condition: let the reconstruction loss reach embeddings and projector in the CLIP variants too.
            Officially it does not.
        generation_text: text positions of a sampling sequence.
        tokenizer: where text becomes ids.
    """

    phi: PhiConfig = PhiConfig()
    magvit: MagvitConfig = MagvitConfig()
    clip: ClipConfig | None = ClipConfig()
    resolution: int = 512
    vocab_size: int = 58_498
    special: SpecialTokens = SpecialTokens()
    max_text: int = 576
    text_block: int = 128
    system_ids: tuple[int, ...] = _SYSTEM
    down_scale: int = 2
    resize_back: bool = False
    clip_mean_std: bool = False
    train_condition: bool = False
    generation_text: int = 128
    tokenizer: Literal["phi", "bytes"] = "phi"

    def __post_init__(self) -> None:
        codes = self.special.codes + self.codebook_size
        if codes > self.special.mask or self.special.mask >= self.vocab_size:
            raise ValueError(
                f"ShowoConfig: codes end at {codes}; mask={self.special.mask} must follow them, "
                f"below vocab_size={self.vocab_size}"
            )
        if self.resolution % (self.magvit.stride * (1 if self.clip else self.down_scale)):
            raise ValueError(f"ShowoConfig: resolution={self.resolution} is no multiple of a code's stride")

    @property
    def codebook_size(self) -> int:
        """Number of image codes."""
        return 1 << self.magvit.bits

    @property
    def num_codes(self) -> int:
        """Codes of one generated image."""
        return (self.resolution // self.magvit.stride) ** 2

    @property
    def num_given(self) -> int:
        """Codes of the image that conditions a reconstruction (VQ variants)."""
        return self.num_codes if self.resize_back else self.num_codes // self.down_scale**2

    @property
    def max_chat(self) -> int:
        """Most tokens of a conversation; longer ones are cut."""
        if self.clip is None:
            return self.max_text
        return self.max_text - (self.clip.num_tokens - self.num_codes) - len(self.system_ids)

    @classmethod
    def from_official(cls, official: Mapping[str, Any], **changes: Any) -> ShowoConfig:
        """From the configuration that a parity pack states.

        Raises: CheckpointError if a part is missing or asks for arithmetic that no release has.
        """
        try:
            phi, ids, training = official["phi_config"], official["special_token_ids"], official["training"]
            for key, value in (("hidden_act", "gelu_new"), ("tie_word_embeddings", False)):
                if phi[key] != value:
                    raise CheckpointError(f"phi_config: {key}={phi[key]!r} is not supported, only {value!r}")
            clip = official.get("clip_config")
            known = {
                "phi": PhiConfig(**{name: phi[name] for name in PhiConfig.__dataclass_fields__}),
                "clip": clip and ClipConfig(**{name: clip[name] for name in ClipConfig.__dataclass_fields__}),
                "resolution": official["dataset"]["preprocessing"]["resolution"],
                "vocab_size": official["model"]["showo"]["vocab_size"],
                "special": SpecialTokens(**{name: ids[key] for name, key in _OFFICIAL_TOKENS.items()}),
                "max_text": official["dataset"]["preprocessing"]["max_seq_length"],
                "text_block": official.get("recon_text_block_len", 128),
                "system_ids": (0,) * official.get("system_prompt_len", 0),
                "down_scale": training.get("down_scale", 2),
                "resize_back": training.get("resize_back", False),
                "generation_text": official["dataset"]["preprocessing"]["max_seq_length"],
            }
        except KeyError as error:
            raise CheckpointError(
                f"config: key {error} is missing; use the pack's own configuration"
            ) from error
        return cls(**{**known, **changes})


def _pixels(resolution: int) -> ImageSpec:
    """Officially images are stretched to the square, bicubic and antialiased."""
    return ImageSpec(max_size=resolution, min_size=resolution, stride=16, fit="squash")


def _variant(config: ShowoConfig, *weights: str) -> Variant:
    seen = config.clip.image_size if config.clip else config.resolution // config.down_scale
    stride = config.clip.patch_size if config.clip else config.magvit.stride
    understanding = ImageSpec(max_size=seen, min_size=seen, stride=stride, fit="squash")
    return Variant(
        config=config, understanding=understanding, target=_pixels(config.resolution), weights=weights
    )


_TINY = ShowoConfig(
    phi=PhiConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4),
    magvit=MagvitConfig((32, 32, 32, 32, 32), (1, 1, 1, 1, 1), (32, 32, 32, 32, 32), (1, 1, 1, 1, 1), bits=6),
    clip=ClipConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
    ),
    resolution=64,
    vocab_size=331,
    special=SpecialTokens(256, 257, 258, 259, 260, 261, 261, codes=266, mask=330),
    max_text=160,
    text_block=512,
    system_ids=tuple(b"Be helpful."),
    tokenizer="bytes",
)
_TINY_VQ = ShowoConfig(
    phi=_TINY.phi,
    magvit=_TINY.magvit,
    clip=None,
    resolution=64,
    vocab_size=331,
    special=_TINY.special,
    max_text=512,
    tokenizer="bytes",
)

VARIANTS: Mapping[str, Variant] = {
    "clip-256": _variant(
        ShowoConfig(resolution=256), "showlab/show-o-w-clip-vit", "sanaka87/Show-o-RecA", "showlab/magvitv2"
    ),
    "clip-512": _variant(
        ShowoConfig(),
        "showlab/show-o-w-clip-vit-512x512",
        "sanaka87/Show-o-512x512-RecA",
        "showlab/magvitv2",
    ),
    "vq-256": _variant(
        ShowoConfig(clip=None, resolution=256, max_text=381), "showlab/show-o", "showlab/magvitv2"
    ),
    "vq-512": _variant(ShowoConfig(clip=None, max_text=381), "showlab/show-o-512x512", "showlab/magvitv2"),
    "vq-512-blur": _variant(
        ShowoConfig(clip=None, max_text=381, down_scale=8, resize_back=True),
        "Gen-Verse/HermesFlow",
        "showlab/magvitv2",
    ),
    "tiny-clip": _variant(_TINY),
    "tiny-vq": _variant(_TINY_VQ),
}
