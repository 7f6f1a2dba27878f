"""How many FLOPs a step cannot do without."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from reca.models.openuni.batch import OpenUniBatch
from reca.models.openuni.config import AutoencoderConfig, OpenUniConfig, VisionConfig


def minimum_flops(config: OpenUniConfig, batch: OpenUniBatch) -> int:
    """Least FLOPs of forward + backward of one microbatch as it is given; a multiply-add is 2."""
    return sum(flop_parts(config, batch).values())


def flop_parts(config: OpenUniConfig, batch: OpenUniBatch) -> Mapping[str, int]:
    """The same by part of the model.

    `vision` and `autoencoder` are 0 where the batch brings embeddings and latents. `prompts` is the frozen
    prefix, forward only; of the last layer only keys and values. `queries` are its trained-through rows:
    forward and gradient of activations. `connector` and `sana` are trained: gradients of inputs and weights,
    but none towards captions' absent inputs, latents and times. Attention counts 4 forward, 10 backward per
    query, key and channel (scores are recomputed); causal pairs count only where they are visible.
    """
    is_encoded = batch.prompts.vision is None or batch.embeddings is not None
    return {
        "vision": 0 if is_encoded else batch.num_images * vision_flops(config),
        "autoencoder": batch.num_images * encoder_flops(config.autoencoder, batch.latent_shape)
        if batch.latents is None
        else 0,
        **_language_model(config, batch),
        "connector": batch.num_images * connector_flops(config),
        "sana": batch.num_images * sana_flops(config, batch.latent_shape[1] * batch.latent_shape[2]),
    }


def vision_flops(config: OpenUniConfig) -> int:
    """Forward of one image through the understanding encoder and its aligner."""
    vision: VisionConfig = config.vision
    dim, rows = vision.hidden_size, vision.num_patches + 1
    layer = 2 * rows * dim * (4 * dim + 2 * vision.intermediate_size) + 4 * rows**2 * dim
    embed = 2 * vision.num_patches * 3 * vision.patch_size**2 * dim
    out = config.llm.hidden_size
    return vision.num_hidden_layers * layer + embed + 2 * vision.num_embeddings * (4 * dim + out) * out


def encoder_flops(config: AutoencoderConfig, latent_shape: tuple[int, int, int]) -> int:
    """Forward of one image through the autoencoder's encoder."""
    widths, last = config.encoder_block_out_channels, len(config.encoder_block_out_channels) - 1
    pixels = prod(latent_shape[1:]) << 2 * last
    total = 2 * 9 * 3 * widths[0] * pixels
    for stage, (kind, dim, depth) in enumerate(
        zip(config.encoder_block_types, widths, config.encoder_layers_per_block, strict=True)
    ):
        scales = len(config.encoder_qkv_multiscales[stage])
        if kind == "ResBlock":
            per_pixel = 2 * 9 * dim * dim
        else:
            kernels = sum(
                3 * dim * (size**2 + config.attention_head_dim)
                for size in config.encoder_qkv_multiscales[stage]
            )
            attention = (1 + scales) * 2 * dim * config.attention_head_dim
            mlp = 2 * 4 * dim * dim + 2 * 4 * dim * 9 + 4 * dim * dim
            per_pixel = 3 * dim * dim + kernels + attention + (1 + scales) * dim * dim + mlp
        total += 2 * depth * per_pixel * pixels
        if stage < last:
            pixels //= 4
            total += 2 * 9 * dim * widths[stage + 1] * pixels
    return total + 2 * 9 * widths[-1] * config.latent_channels * pixels


def _language_model(config: OpenUniConfig, batch: OpenUniBatch) -> dict[str, int]:
    llm, layout = config.llm, batch.prompts.layout
    dim, layers, queries = llm.hidden_size, llm.num_hidden_layers, config.num_queries
    key_value = 2 * dim * llm.num_key_value_heads * llm.head_dim
    matrices = 2 * dim * dim + key_value + 3 * dim * llm.intermediate_size
    lengths = layout.lengths
    prompt_pairs = sum(rows * (rows + 1) // 2 for rows in lengths)
    query_pairs = sum(rows * queries + queries * (queries + 1) // 2 for rows in lengths)
    rows, query_rows = sum(lengths), queries * len(lengths)
    return {
        "prompts": (layers - 1) * (2 * rows * matrices + 4 * prompt_pairs * dim) + 2 * rows * key_value,
        "queries": layers * (4 * query_rows * matrices + 14 * query_pairs * dim),
    }


def connector_flops(config: OpenUniConfig) -> int:
    """Forward and backward of one sample's queries through connector and projector."""
    connector, rows = config.connector, config.num_queries
    dim = connector.hidden_size
    layer = 6 * rows * dim * (4 * dim + 2 * connector.intermediate_size) + 14 * rows**2 * dim
    return connector.num_hidden_layers * layer + 6 * rows * dim * config.sana.caption_channels


def sana_flops(config: OpenUniConfig, tokens: int) -> int:
    """Forward and backward of one image through SANA."""
    sana, rows = config.sana, config.num_queries
    dim, hidden = sana.width, int(sana.mlp_ratio * sana.width)
    cross = sana.num_cross_attention_heads * sana.cross_attention_head_dim
    linear_attention = 2 * dim * sana.attention_head_dim
    feed_forward = 3 * dim * hidden + 2 * hidden * 9
    block = 6 * tokens * (4 * dim * dim + linear_attention + 2 * dim * cross + feed_forward)
    block += 6 * rows * 2 * dim * cross + 14 * tokens * rows * cross
    caption = 6 * rows * dim * (sana.caption_channels + dim)
    time = 4 * 256 * dim + 6 * 7 * dim * dim
    ends = (4 + 6) * tokens * sana.in_channels * dim
    return sana.num_layers * block + caption + time + ends
