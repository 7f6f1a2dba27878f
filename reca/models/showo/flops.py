"""How many FLOPs a step cannot do without."""

from __future__ import annotations

from reca.models.showo.batch import ImageToTextBatch, MaskedBatch, ShowoBatch
from reca.models.showo.config import ClipConfig, MagvitConfig, ShowoConfig
from reca.models.showo.transformer import Plan


def minimum_flops(config: ShowoConfig, batch: ShowoBatch) -> int:
    """Least FLOPs of forward + backward of one microbatch; a multiply-add is 2.

    Counted: every matrix of the language model on the rows that reach a loss (forward, gradient of the input,
    gradient of the weight), the last layer's queries, output and MLP and the output layer on the rows that
    predict something, attention with 14 per query, key and channel (4 forward, 10 backward: scores are
    recomputed), the projector, and the forward pass of the frozen encoders over what the batch does not bring
    along as codes.
    """
    phi, lengths = config.phi, batch.layout.lengths
    dim, wide, layers = phi.hidden_size, phi.intermediate_size, phi.num_hidden_layers
    if isinstance(batch, MaskedBatch):
        chosen = predicting = sum(batch.num_masked) + len(batch.frame_rows)
        chosen_pairs = pairs(batch.plan)
    elif isinstance(batch, ImageToTextBatch):
        chosen, predicting = len(batch.chosen.rows), len(batch.labels)
        chosen_pairs = pairs(batch.chosen.plan)
    else:
        raise TypeError(f"minimum_flops: expected a batch of one of the tasks, got {type(batch).__name__}")
    rows = sum(lengths)
    total = 6 * rows * (4 * dim * dim + 2 * dim * wide) * (layers - 1)
    total += 6 * (rows * 2 * dim * dim + chosen * (2 * dim * dim + 2 * dim * wide))
    total += 14 * dim * (pairs(batch.layout.plan) * (layers - 1) + chosen_pairs)
    total += 6 * predicting * dim * config.vocab_size
    return total + _encoders(config, batch)


def pairs(plan: Plan) -> int:
    """Query-key pairs of all segments."""
    total = 0
    for view in (plan.full, plan.causal):
        for q, k in zip(view.segments.query_lengths, view.segments.key_lengths, strict=True):
            total += q * k - (q * (q - 1) // 2 if view.segments.is_causal else 0)
    return total


def _encoders(config: ShowoConfig, batch: ShowoBatch) -> int:
    """Forward of the frozen encoders; the projector of a reconstruction is not trained."""
    images, total = len(batch.sample_ids), 0
    if config.clip is not None and len(batch.vision_rows):
        tokens, dim = images * config.clip.num_tokens, config.phi.hidden_size
        projector = config.clip.hidden_size * dim + dim * dim
        is_trained = isinstance(batch, ImageToTextBatch)
        total += images * clip_flops(config.clip) + 2 * tokens * projector
        total += 2 * tokens * (projector + dim * dim) if is_trained else 0
    sides = []
    if isinstance(batch, MaskedBatch) and batch.codes is None:
        sides.append(config.resolution)
    if len(batch.given_rows) and batch.given is None:
        codes = len(batch.given_rows) // images
        sides.append(round(codes**0.5) * config.magvit.stride)
    return total + images * sum(magvit_flops(config.magvit, side) for side in sides)


def clip_flops(config: ClipConfig) -> int:
    """Forward of one image through all layers but the last."""
    rows, dim = config.num_tokens + 1, config.hidden_size
    layer = 2 * rows * (4 * dim * dim + 2 * dim * config.intermediate_size) + 4 * rows * rows * dim
    return (config.num_hidden_layers - 1) * layer + 2 * config.num_tokens * dim * 3 * config.patch_size**2


def magvit_flops(config: MagvitConfig, side: int) -> int:
    """Forward of one square image through the encoder's convolutions and its attention."""
    widths, total, channels = config.encoder_channels, 0, config.encoder_channels[0]
    total += 2 * side * side * 9 * 3 * channels
    for level, width in enumerate(widths):
        for _ in range(config.encoder_blocks[level]):
            shortcut = channels * width if channels != width else 0
            total += 2 * side * side * (9 * width * (channels + width) + shortcut)
            channels = width
        if level < len(widths) - 1:
            side //= 2
            total += 2 * side * side * 9 * width * width
    cells = side * side
    total += 2 * cells * (4 * 9 * channels**2 + 4 * channels**2) + 4 * cells * cells * channels
    return total + 2 * cells * config.bits * (9 * channels + config.bits)
