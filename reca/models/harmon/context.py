"""Pictures in the making: what the language model has read, and the condition of every token against it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reca.layers.attention import attention
from reca.layers.rotary import rotary_table
from reca.layers.segments import Segments
from reca.layers.stream import Stream
from reca.models.harmon.batch import encoding
from reca.models.harmon.mar import encoder_rows
from reca.models.harmon.model import HarmonModel


@dataclass(frozen=True, slots=True)
class Prefix:
    """What a picture is conditioned on.

    Attributes:
        keys, values: per layer [rows, kv_heads, head_dim]; keys are rotated.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def length(self) -> int:
        """Rows of the prefix."""
        return self.keys[0].shape[0]


def embed_image(model: HarmonModel, latents: Tensor, grid: tuple[int, int]) -> Tensor:
    """[h * w + buffers, dim]: understanding embeddings of latents [h * w, channels], buffers last."""
    whole = encoding(model.config, 1, grid).to(latents.device)
    _, embedded = model.understand(latents[None], whole.whole, grid, whole, None)
    return embedded.roll(-model.config.mar.buffer_size, dims=0)


def read_prefix(model: HarmonModel, token_ids: Sequence[int], image: Tensor | None = None) -> Prefix:
    """Read a prompt; an image's embeddings, if any, stand after its first `image_index` ids."""
    device = model.embed_tokens.weight.device
    hidden = model.embed_tokens(torch.tensor(token_ids, dtype=torch.int64, device=device))
    if image is not None:
        split = model.config.image_index
        hidden = torch.cat([hidden[:split].to(image.dtype), image, hidden[split:].to(image.dtype)])
    llm, rows = model.config.llm, hidden.shape[0]
    rotation = rotary_table(torch.arange(rows, device=device), llm.head_dim, llm.rope_theta, hidden.dtype)
    segments = Segments.of([rows], is_causal=True).to(device)
    stream, keys, values = Stream(hidden), list[Tensor](), list[Tensor]()
    for index, layer in enumerate(model.decoder_layers()):
        query, key, value, hidden = layer.project(stream, rotation)
        keys.append(key)
        values.append(value)
        if index < llm.num_hidden_layers - 1:
            attended = attention(query, key, value, segments, backend=layer.attention_backend)
            stream = layer.finish(hidden, attended)
    return Prefix(tuple(keys), tuple(values))


class Canvas:
    """One picture against several prefixes at once: the passes of guidance are one batch.

    The encoder sees no prompt, so it runs once for all passes.

    Args:
        model: the model.
        prefixes: one per pass.
        grid: (h, w) of latents.
    """

    def __init__(self, model: HarmonModel, prefixes: Sequence[Prefix], grid: tuple[int, int]) -> None:
        self.model, self.prefixes, self.grid = model, prefixes, grid

    def condition(self, tokens: Tensor, visible: Tensor) -> Tensor:
        """What the diffusion head is told about every token.

        Args:
            tokens: [h * w, channels] fp32 latents; only visible ones are looked at.
            visible: [n] int64, their positions, ascending.

        Returns: [passes, h * w, width].
        """
        model, device = self.model, tokens.device
        buffers, count, passes = model.config.mar.buffer_size, visible.shape[0], len(self.prefixes)
        encoded = model.encoder(
            tokens[None],
            encoder_rows(buffers, [visible]),
            self.grid,
            Segments.of([buffers + count]).to(device),
        )
        hidden = self._read(model.proj_in(encoded).roll(-buffers, dims=0))
        # back to buffers first, pass by pass
        returned = model.proj_out(hidden).unflatten(0, (passes, -1)).roll(buffers, dims=1)
        whole = buffers + self.grid[0] * self.grid[1]
        own = torch.cat([torch.arange(buffers, device=device), visible + buffers])
        rows = torch.cat([index * whole + own for index in range(passes)])
        segments = Segments.of([whole] * passes).to(device)
        canvas = model.decoder((encoded + returned).flatten(0, 1), rows, self.grid, segments)
        tokens_only = canvas.unflatten(0, (passes, -1))[:, buffers:]
        conditions: Tensor = tokens_only + model.decoder.output_positions(self.grid)
        return conditions

    def _read(self, rows: Tensor) -> Tensor:
        """[passes * rows, dim]: normed hidden states of the same rows after each prefix."""
        model, llm, count, passes = self.model, self.model.config.llm, rows.shape[0], len(self.prefixes)
        lengths = [prefix.length for prefix in self.prefixes]
        positions = torch.cat([torch.arange(length, length + count) for length in lengths]).to(rows.device)
        rotation = rotary_table(positions, llm.head_dim, llm.rope_theta, rows.dtype)
        segments = Segments.of([count] * passes, [length + count for length in lengths], is_causal=True)
        segments, stream = segments.to(rows.device), Stream(rows.repeat(passes, 1))
        for index, layer in enumerate(model.decoder_layers()):
            query, key, value, hidden = layer.project(stream, rotation)
            keys = self._after([prefix.keys[index] for prefix in self.prefixes], key)
            values = self._after([prefix.values[index] for prefix in self.prefixes], value)
            attended = attention(query, keys, values, segments, backend=layer.attention_backend)
            stream = layer.finish(hidden, attended)
        normed: Tensor = model.norm(stream.rows)
        return normed

    def _after(self, prefixes: Sequence[Tensor], rows: Tensor) -> Tensor:
        """What the rows of each pass see, pass by pass."""
        pairs = zip(prefixes, rows.chunk(len(prefixes)), strict=True)
        return torch.cat([piece.to(rows.dtype) for pair in pairs for piece in pair])
