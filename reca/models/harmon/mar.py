"""The masked autoencoder: an encoder of visible latents and buffers, a decoder of the whole canvas.

Rows of a sample are [buffers; tokens in raster order]; samples are packed one after another. Masked tokens
are absent from the encoder, so their number may differ from sample to sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reca.layers.norm import LayerNorm
from reca.layers.segments import Segments
from reca.layers.stream import Stream
from reca.models.harmon.config import MarConfig
from reca.models.harmon.dropout import UNDERSTANDING, BlockDropout, DrawnDropout, Dropout
from reca.models.harmon.transformer import NORM_EPS, MarBlock


def resized_positions(table: Tensor, buffers: int, side: int, grid: tuple[int, int]) -> Tensor:
    """[buffers + h * w, dim]: a learned table over `side` x `side` positions, resized bilinearly to `grid`.

    Args:
        table: [1, buffers + side^2, dim]; the rows of the buffers stay as they are.
    """
    if grid == (side, side):
        return table[0]
    image = table[0, buffers:].unflatten(0, (side, side)).permute(2, 0, 1)[None]
    # fp32: interpolation of bf16 tables is neither exact nor available everywhere
    resized = F.interpolate(image.to(torch.float32), grid, mode="bilinear", align_corners=False)
    return torch.cat([table[0, :buffers], resized[0].flatten(1).t().to(table.dtype)])


class MarStack(nn.Module):
    """What encoder and decoder share: a learned table of positions, blocks, and a last norm.

    Args:
        config: the architecture.
        part: `encoder` or `decoder`.
    """

    def __init__(self, config: MarConfig, part: str) -> None:
        super().__init__()
        encoder = part == "encoder"
        dim = config.encoder_embed_dim
        self.config, self.part = config, part
        depth = config.encoder_depth if encoder else config.decoder_depth
        heads = config.encoder_num_heads if encoder else config.decoder_num_heads
        rows = config.buffer_size + config.learned_side**2
        self.position_table = nn.Parameter(0.02 * torch.randn(1, rows, dim))
        self.blocks = nn.ModuleList(MarBlock(dim, heads, config.mlp_ratio) for _ in range(depth))
        self.norm = LayerNorm(dim, eps=NORM_EPS)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """[buffers + h * w, dim]: the table, resized to `grid`."""
        return resized_positions(self.position_table, self.config.buffer_size, self.config.learned_side, grid)

    def run(
        self, hidden: Tensor, segments: Segments, dropout: Dropout | None, passes: tuple[int, ...]
    ) -> Tensor:
        """Blocks and norm over packed rows [rows, dim] of all samples, once for each of `passes`."""
        masks = dropout.over(passes) if isinstance(dropout, DrawnDropout) else dropout
        stream = Stream(hidden)
        for index, block in enumerate(self.blocks):
            stream = block(stream, segments, self._of_block(masks, index, passes))
        return stream.read(self.norm)[0]

    def _of_block(self, masks: Dropout | None, index: int, passes: tuple[int, ...]) -> BlockDropout | None:
        if masks is None:
            return None
        rates = self.config.attn_dropout, self.config.proj_dropout
        return BlockDropout(masks, *rates, f"{self.part}_blocks.{index}", passes)


class MarEncoder(MarStack):
    """Latent tokens and buffers -> embeddings; it encodes whole images to understand, and visible tokens."""

    def __init__(self, config: MarConfig) -> None:
        super().__init__(config, "encoder")
        dim = config.encoder_embed_dim
        self.buffer_token = nn.Parameter(0.02 * torch.randn(1, dim))
        self.embed = nn.Linear(config.vae_embed_dim, dim)
        # fp32 under autocast: it begins the residual stream
        self.input_norm = nn.LayerNorm(dim, eps=NORM_EPS)

    def forward(
        self,
        latents: Tensor,
        rows: Tensor,
        grid: tuple[int, int],
        segments: Segments,
        dropout: Dropout | None = None,
        passes: tuple[int, ...] = (UNDERSTANDING,),
    ) -> Tensor:
        """Encode some tokens of each image, several times over if there are several passes.

        Args:
            latents: [images, h * w, channels] fp32.
            rows: [rows] int64, index into [buffers; tokens of all images]: the rows of each segment.
            grid: (h, w).
            segments: of the rows, pass by pass.
            dropout, passes: see `run`.

        Returns: [rows, dim], buffers of each segment first.
        """
        shared, own = self.positions(grid).tensor_split((self.config.buffer_size,))
        # buffers and tokens are the same in every segment, so they are normalised once
        embedded = (self.embed(latents.to(self.embed.weight.dtype)) + own).flatten(0, 1)
        normed = self.input_norm(torch.cat([self.buffer_token + shared, embedded]))
        return self.run(normed.index_select(0, rows), segments, dropout, passes)


class MarDecoder(MarStack):
    """Embeddings of buffers and visible tokens -> a condition for every token of the canvas."""

    def __init__(self, config: MarConfig) -> None:
        super().__init__(config, "decoder")
        dim = config.decoder_embed_dim
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.embed = nn.Linear(config.encoder_embed_dim, dim)
        self.output_table = nn.Parameter(0.02 * torch.randn(1, config.learned_side**2, dim))

    def forward(
        self,
        encoded: Tensor,
        rows: Tensor,
        grid: tuple[int, int],
        segments: Segments,
        dropout: Dropout | None = None,
    ) -> Tensor:
        """Decode packed canvases.

        Args:
            encoded: [rows, dim] of buffers and visible tokens.
            rows: [rows] int64, where they lie in the canvases.
            segments: buffers + h * w rows per sample.

        Returns: [samples * (buffers + h * w), dim], buffers first, without output positions.
        """
        samples = len(segments.query_lengths)
        embedded = self.embed(encoded)
        canvas = self.mask_token[0].to(embedded.dtype).expand(segments.query_rows, -1)
        canvas = canvas.index_copy(0, rows, embedded)
        placed = canvas.unflatten(0, (samples, -1)) + self.positions(grid)
        return self.run(placed.flatten(0, 1), segments, dropout, (UNDERSTANDING,))

    def output_positions(self, grid: tuple[int, int]) -> Tensor:
        """[h * w, dim]: what is added to the decoder's tokens to condition the diffusion head."""
        return resized_positions(self.output_table, 0, self.config.learned_side, grid)


def encoder_rows(buffers: int, parts: Sequence[Tensor]) -> Tensor:
    """[rows] int64, index into [buffers; tokens]: the buffers before each of `parts`, indices of tokens."""
    device = parts[0].device if parts else None
    shared = torch.arange(buffers, device=device)
    rows = [piece for part in parts for piece in (shared, part + buffers)]
    return torch.cat(rows) if rows else shared[:0]
