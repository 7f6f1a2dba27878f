"""How many FLOPs a step cannot do without."""

from __future__ import annotations

from reca.models.bagel.config import BagelConfig
from reca.models.bagel.transformer import MARKERS, Layout


def minimum_flops(config: BagelConfig, layout: Layout) -> int:
    """Least FLOPs of forward + backward of one microbatch; a multiply-add is 2.

    Counted: the matrices of the generation expert, the latent projections and the time embedding (forward,
    gradient of the input, gradient of the weight), attention of the latents (4 forward, 10 backward per
    query, key and channel: scores are recomputed), and the forward pass of the two markers per image. Not
    counted: ViT, image, text and autoencoder, which nothing trained ever changes, so that an exact
    implementation may hold them ready.
    """
    llm = config.llm
    width, images = llm.num_attention_heads * llm.head_dim, len(layout.latent_lengths)
    expert = expert_parameters(config)
    key_value = 2 * llm.hidden_size * llm.num_key_value_heads * llm.head_dim
    rows = sum(layout.latent_lengths)
    total = 6 * rows * expert * llm.num_hidden_layers
    # noised latents and time features need no gradient of their own
    total += (4 + 6) * rows * config.latent_dim * llm.hidden_size
    total += images * (4 * 256 + 6 * llm.hidden_size) * llm.hidden_size
    pairs = sum(q * k for q, k in zip(layout.latents.query_lengths, layout.latents.key_lengths, strict=True))
    total += 14 * pairs * width * llm.num_hidden_layers
    marker_rows = MARKERS * images
    marker_pairs = MARKERS * sum(layout.markers.key_lengths)
    total += (2 * marker_rows * expert + 4 * marker_pairs * width) * (llm.num_hidden_layers - 1)
    return total + 2 * marker_rows * key_value


def expert_parameters(config: BagelConfig) -> int:
    """Entries of the matrices of one expert in one layer."""
    llm = config.llm
    heads = 2 * llm.num_attention_heads + 2 * llm.num_key_value_heads
    return llm.hidden_size * (heads * llm.head_dim + 3 * llm.intermediate_size)
