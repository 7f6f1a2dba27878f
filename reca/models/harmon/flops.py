"""How many FLOPs a step cannot do without."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from reca.models.autoencoder import AutoencoderKLConfig
from reca.models.harmon.batch import GenerationBatch, ImageToTextBatch
from reca.models.harmon.config import HarmonConfig, LLMConfig
from reca.models.harmon.diffusion import NUM_STEPS
from reca.models.harmon.head import TIME_FEATURES

_LINEAR = 6  # per entry of a matrix and row: forward, gradient of the input, gradient of the weight
_ATTENTION = 14  # per query, key and channel: 4 forward, 10 backward, where scores are recomputed


def minimum_flops(config: HarmonConfig, batch: GenerationBatch | ImageToTextBatch) -> int:
    """Least FLOPs of forward + backward of one microbatch; a multiply-add is 2.

    Counted are matrices and attention of everything that is trained, on the rows that lead to the loss: no
    padding, masked tokens alone in the diffusion head, after the last layer of the language model only rows
    that are read. The frozen autoencoder counts where the batch brings pixels; latents may be held ready.
    """
    mar, llm = config.mar, config.llm
    frozen = encoder_flops(config.vae, batch.images.tokens) if batch.images.kind == "pixels" else 0
    width, encoded = mar.encoder_embed_dim, batch.encoding.segments.query_lengths
    total = batch.num_images * frozen
    total += _llm(llm, batch.sequences.segments.query_lengths, _read(batch), batch)
    total += _mar(width, mar.mlp_ratio, mar.encoder_depth, encoded)
    total += _bridge(sum(encoded), width, llm.hidden_size)
    if isinstance(batch, ImageToTextBatch):
        return total + _LINEAR * batch.labels.shape[0] * llm.hidden_size * llm.vocab_size
    visible = sum(encoded[-batch.num_images :])
    total += _bridge(visible, width, llm.hidden_size)
    total += _LINEAR * visible * width * width  # embedding of the decoder
    total += _mar(width, mar.mlp_ratio, mar.decoder_depth, batch.canvas_segments.query_lengths)
    return total + _head(config, sum(batch.num_masked))


def encoder_flops(config: AutoencoderKLConfig, latents: int) -> int:
    """Forward of one image of `latents` latent tokens through the autoencoder's encoder."""
    widths = [config.ch * multiple for multiple in (1, *config.ch_mult)]
    width, pixels = widths[-1], latents * config.stride**2
    total = 2 * 9 * config.in_channels * config.ch * pixels
    for level, (before, after) in enumerate(itertools.pairwise(widths)):
        shortcut = before * after if before != after else 0
        blocks = 9 * (before * after + (2 * config.num_res_blocks - 1) * after * after) + shortcut
        total += 2 * blocks * pixels
        if level < len(config.ch_mult) - 1:
            pixels //= 4
            total += 2 * 9 * after * after * pixels
    # attention follows each block of the last level, and stands between the two in the middle
    attention = 8 * width * width * pixels + 4 * width * pixels * pixels
    total += (config.num_res_blocks + 1) * attention + 2 * 4 * 9 * width * width * pixels
    out = 2 * config.z_channels
    return total + 2 * (9 * width + out) * out * pixels


def _read(batch: GenerationBatch | ImageToTextBatch) -> int:
    readout = batch.sequences.readout
    return int((readout.queries if readout.rows is None else readout.rows).shape[0])


def _mar(width: int, mlp_ratio: int, depth: int, lengths: Sequence[int]) -> int:
    matrices = (4 + 2 * mlp_ratio) * width * width
    pairs = sum(length * length for length in lengths)
    return depth * (_LINEAR * sum(lengths) * matrices + _ATTENTION * pairs * width)


def _bridge(rows: int, width: int, dim: int) -> int:
    return _LINEAR * rows * (width * dim + dim * dim)


def _llm(llm: LLMConfig, lengths: Sequence[int], read: int, batch: GenerationBatch | ImageToTextBatch) -> int:
    """Causal: attention counts the pairs that see one another."""
    dim, heads = llm.hidden_size, llm.num_attention_heads * llm.head_dim
    key_value = 2 * dim * llm.num_key_value_heads * llm.head_dim
    matrices = 2 * dim * heads + key_value + 3 * dim * llm.intermediate_size
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    layer = _LINEAR * sum(lengths) * matrices + _ATTENTION * pairs * heads
    segments = batch.sequences.readout.segments
    last_pairs = sum(
        q * k - q * (q - 1) // 2 for q, k in zip(segments.query_lengths, segments.key_lengths, strict=True)
    )
    last = (
        _LINEAR * (sum(lengths) * key_value + read * (matrices - key_value)) + _ATTENTION * last_pairs * heads
    )
    return (llm.num_hidden_layers - 1) * layer + last


def _head(config: HarmonConfig, masked: int) -> int:
    mar = config.mar
    width, rows = mar.diffloss_w, masked * mar.diffusion_batch_mul
    times = min(rows, NUM_STEPS)
    per_row = mar.diffloss_d * 5 * width * width + 2 * width * width + 2 * mar.vae_embed_dim * width
    total = _LINEAR * (rows * per_row + masked * mar.encoder_embed_dim * width)
    # neither noised latents nor features of the time need a gradient
    total += 4 * rows * mar.vae_embed_dim * width
    return total + times * (4 * TIME_FEATURES + _LINEAR * width) * width
