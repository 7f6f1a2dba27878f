"""How many FLOPs a step cannot do without."""

from __future__ import annotations

from reca.layers.segments import Segments
from reca.models.janus.batch import GenerationBatch, ImageToTextBatch, JanusBatch
from reca.models.janus.config import JanusConfig, VisionConfig, VQConfig


def minimum_flops(config: JanusConfig, batch: JanusBatch) -> int:
    """Least FLOPs of forward + backward of one microbatch; a multiply-add is 2.

    Counted: every matrix of the language model on the rows (forward, gradient of the input, gradient of the
    weight), in the last layer queries, output and gated block on the rows that predict something only; the
    heads on labelled rows; attention with 14 per query, visible key and channel (4 forward, 10 backward:
    scores are recomputed); the embedding of codes; and the forward pass of the frozen encoders over what the
    batch does not bring along as codes.
    """
    text, layout = config.text, batch.layout
    dim, wide, layers = text.hidden_size, text.intermediate_size, text.num_hidden_layers
    rows, tails = sum(layout.lengths), sum(layout.tails)
    total = 6 * rows * (4 * dim * dim + 3 * dim * wide) * (layers - 1)
    total += 6 * (rows * 2 * dim * dim + tails * (2 * dim * dim + 3 * dim * wide))
    total += 14 * dim * (_pairs(layout.samples) * (layers - 1) + _pairs(layout.ends))
    images, seen = len(batch.pixels), len(batch.seen)
    aligner = config.vision.hidden_size * dim + dim * dim
    total += seen * (vision_flops(config.vision) + 2 * config.vision.num_tokens * aligner)
    if config.train_aligner:
        total += 2 * seen * config.vision.num_tokens * (aligner + dim * dim)
    if isinstance(batch, ImageToTextBatch):
        return total + 6 * len(batch.labels) * dim * text.vocab_size
    assert isinstance(batch, GenerationBatch)
    total += 6 * tails * dim * (dim + config.vq.num_embeddings)
    total += 6 * images * (config.num_codes - 1) * dim * (dim + config.vq.embed_dim)
    return total + (images * vq_flops(config.vq, config.image_size) if batch.codes is None else 0)


def _pairs(segments: Segments) -> int:
    """Query-key pairs of causal segments."""
    lengths = zip(segments.query_lengths, segments.key_lengths, strict=True)
    return sum(q * k - q * (q - 1) // 2 for q, k in lengths)


def vision_flops(config: VisionConfig) -> int:
    """Forward of one image through the understanding encoder."""
    rows, dim = config.num_tokens, config.hidden_size
    layer = 2 * rows * (4 * dim * dim + 2 * dim * config.intermediate_size) + 4 * rows * rows * dim
    return config.num_hidden_layers * layer + 2 * rows * dim * 3 * config.patch_size**2


def vq_flops(config: VQConfig, side: int) -> int:
    """Forward of one square image through the encoder, and its comparison with the codebook."""
    channels, last = config.base_channels, len(config.widths) - 1
    total = 2 * side * side * 9 * 3 * channels
    for level, width in enumerate(config.widths):
        for _ in range(config.num_res_blocks):
            shortcut = channels * width if channels != width else 0
            total += 2 * side * side * (9 * width * (channels + width) + shortcut)
            total += _attention_flops(side * side, width) if level == last else 0
            channels = width
        if level < last:
            side //= 2
            total += 2 * side * side * 9 * width * width
    cells = side * side
    total += 2 * cells * 4 * 9 * channels**2 + _attention_flops(cells, channels)
    total += 2 * cells * config.latent_channels * (9 * channels + config.embed_dim)
    return total + 2 * cells * config.embed_dim * config.num_embeddings


def _attention_flops(cells: int, channels: int) -> int:
    return 8 * cells * channels**2 + 4 * cells * cells * channels
