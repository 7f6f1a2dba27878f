"""What a picture is conditioned on, as caches of keys and values; and its velocity against them.

A context grows block by block, each at the next rotary position: an image (ViT tokens, or autoencoder
latents at time 0) shares one position among all its rows, a text takes one per row. Keys are kept
unrotated. Rotary attention depends on differences only, so a context is rotated once per picture, relative
to the block that is generated, whose own rows then need no rotation in any step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reca.images import patchify
from reca.layers.attention import attention
from reca.layers.rotary import apply_rotary, rotary_table
from reca.layers.segments import Segments
from reca.models.bagel.batch import grid_positions
from reca.models.bagel.model import BagelModel
from reca.models.bagel.transformer import MARKERS


@dataclass(frozen=True, slots=True)
class Context:
    """Rows that a picture sees, in order.

    Attributes:
        keys, values: per layer [rows, kv_heads, head_dim]; keys are normalised but not rotated.
        positions: [rows] int64, rotary position of each row.
        next_position: of the block that comes next.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    positions: Tensor
    next_position: int

    @classmethod
    def empty(cls, model: BagelModel) -> Context:
        """The context of a picture that is conditioned on nothing."""
        llm, weight = model.config.llm, model.embed_tokens.weight
        rows = weight.new_empty(0, llm.num_key_value_heads, llm.head_dim)
        positions = torch.empty(0, dtype=torch.int64, device=weight.device)
        return cls((rows,) * llm.num_hidden_layers, (rows,) * llm.num_hidden_layers, positions, 0)

    @property
    def length(self) -> int:
        """Rows of the context."""
        return self.positions.shape[0]

    def rotated(self, model: BagelModel, origin: int) -> tuple[Tensor, ...]:
        """Keys of all layers, rotated by their position counted from `origin`."""
        rotation = _rotation(model, self.positions - origin)
        return tuple(apply_rotary(keys, *rotation) for keys in self.keys)


def _rotation(model: BagelModel, positions: Tensor) -> tuple[Tensor, Tensor]:
    return rotary_table(positions, model.config.llm.head_dim, model.config.llm.rope_theta)


def with_text(model: BagelModel, context: Context, text_ids: Sequence[int]) -> Context:
    """The context followed by `<bos> ids <eos>`, causal."""
    special = model.config.special
    ids = [special.bos_token_id, *text_ids, special.eos_token_id]
    embedded = model.embed_tokens(torch.tensor(ids, device=context.positions.device))
    positions = torch.arange(len(ids), device=context.positions.device) + context.next_position
    return _extend(model, context, embedded, None, positions, is_causal=True)


def with_image(model: BagelModel, context: Context, pixels: Tensor) -> Context:
    """The context followed by an image for the understanding encoder: [3, height, width] in [-1, 1]."""
    encoded = model.connector(encode_image(model, pixels))
    positions = _patch_positions(model, pixels)
    encoded = encoded + model.vision_positions[positions].to(encoded.dtype)
    start, end = _markers(model).chunk(2)
    rows = torch.cat([start, encoded.to(start.dtype), end])
    shared = torch.full((rows.shape[0],), context.next_position, device=rows.device)
    return _extend(model, context, rows, None, shared, is_causal=False)


def with_latents(model: BagelModel, context: Context, latents: Tensor) -> Context:
    """The context followed by an image as clean latents, [z, height, width] of the autoencoder, at time 0."""
    patch = model.config.latent_patch_size
    rows, columns = latents.shape[-2] // patch, latents.shape[-1] // patch
    grid = latent_grid(model, rows, columns)
    embedded = _embed_latents(model, patchify(latents, patch), torch.zeros(1, device=grid.device), grid)
    shared = torch.full((embedded.shape[0] + MARKERS,), context.next_position, device=grid.device)
    return _extend(model, context, _markers(model), embedded, shared, is_causal=False)


def encode_image(model: BagelModel, pixels: Tensor) -> Tensor:
    """[patches, vision dim]: one image, [3, height, width] in [-1, 1], after the understanding encoder."""
    patches = patchify(pixels, model.config.vision.patch_size)
    segments = Segments.of([patches.shape[0]]).to(pixels.device)
    encoded: Tensor = model.vision(patches, _patch_positions(model, pixels), segments)
    return encoded


def latent_grid(model: BagelModel, rows: int, columns: int) -> Tensor:
    """[rows * columns] int64: positions of an image's latent tokens in the position table."""
    return grid_positions(rows, columns, model.config.max_latent_size).to(model.latent_positions.device)


def _patch_positions(model: BagelModel, pixels: Tensor) -> Tensor:
    rows, columns = (side // model.config.vision.patch_size for side in pixels.shape[-2:])
    return grid_positions(rows, columns, model.config.vit_max_num_patch_per_side).to(pixels.device)


def _markers(model: BagelModel) -> Tensor:
    """[2, dim]: the tokens before and after an image."""
    special = model.config.special
    ids = torch.tensor(
        [special.start_of_image, special.end_of_image], device=model.embed_tokens.weight.device
    )
    embedded: Tensor = model.embed_tokens(ids)
    return embedded


def _embed_latents(model: BagelModel, tokens: Tensor, time: Tensor, grid: Tensor) -> Tensor:
    """[tokens, dim]: projected latents, their time, their position."""
    embedded: Tensor = model.vae2llm(tokens.to(model.vae2llm.weight.dtype))
    embedded = embedded + model.time_embedder(time)
    return embedded + model.latent_positions[grid].to(embedded.dtype)


def _extend(
    model: BagelModel,
    context: Context,
    understanding: Tensor,
    latents: Tensor | None,
    positions: Tensor,
    *,
    is_causal: bool,
) -> Context:
    """Append one block; latents, if any, lie between its first and its last understanding row."""
    segments = Segments.of([len(positions)], [context.length + len(positions)], is_causal=is_causal)
    segments, rotation = segments.to(positions.device), _rotation(model, positions)
    keys, values = [], []
    for layer, old_keys, old_values in zip(
        model.blocks(), context.rotated(model, 0), context.values, strict=True
    ):
        query, key, value = layer.und.project(understanding)
        if latents is not None:
            parts = zip((query, key, value), layer.gen.project(latents), strict=True)
            query, key, value = (_around(outer, inner) for outer, inner in parts)
        keys.append(key)
        values.append(value)
        if layer.is_last:
            break
        attended = attention(
            apply_rotary(query, *rotation),
            _joined(old_keys, apply_rotary(key, *rotation)),
            _joined(old_values, value),
            segments,
            backend=layer.attention_backend,
        )
        if latents is not None:
            latents = layer.gen.finish(latents, attended[1:-1])
            attended = torch.cat([attended[:1], attended[-1:]])
        understanding = layer.und.finish(understanding, attended)
    return Context(
        tuple(_joined(*pair) for pair in zip(context.keys, keys, strict=True)),
        tuple(_joined(*pair) for pair in zip(context.values, values, strict=True)),
        torch.cat([context.positions, positions]),
        context.next_position + (len(positions) if is_causal else 1),
    )


def _joined(old: Tensor, new: Tensor) -> Tensor:
    """An empty context has the dtype of the weights, what follows that of the activations."""
    return torch.cat([old.to(new.dtype), new])


def _around(outer: Tensor, inner: Tensor) -> Tensor:
    return torch.cat([outer[:1], inner, outer[1:]])


class Canvas:
    """One picture in the making, against several contexts at once: the passes of guidance are one batch.

    Args:
        model: the model.
        contexts: one per pass.
        grid: [tokens] int64, positions of the picture's latent tokens.
    """

    def __init__(self, model: BagelModel, contexts: Sequence[Context], grid: Tensor) -> None:
        self.model, self.grid, self.num_passes = model, grid, len(contexts)
        # Per layer and pass; counted from the picture's own position, so that its rows are never rotated.
        rotated = [context.rotated(model, context.next_position) for context in contexts]
        self._keys = list(zip(*rotated, strict=True))
        self._values = list(zip(*(context.values for context in contexts), strict=True))
        num_tokens = grid.shape[0]
        visible = [context.length + MARKERS + num_tokens for context in contexts]
        self._markers = Segments.of([MARKERS] * self.num_passes, visible).to(grid.device)
        self._latents = Segments.of([num_tokens] * self.num_passes, visible).to(grid.device)

    def velocity(self, noised: Tensor, time: Tensor) -> Tensor:
        """Velocity of every pass.

        Args:
            noised: [tokens, latent_dim] fp32.
            time: [1] fp32.

        Returns: [passes, tokens, latent_dim] fp32.
        """
        model, passes = self.model, self.num_passes
        latents = _embed_latents(model, noised, time, self.grid).repeat(passes, 1)
        understanding = _markers(model).repeat(passes, 1)
        for index, layer in enumerate(model.blocks()):
            query, key, value = layer.gen.project(latents)
            und_query, und_key, und_value = layer.und.project(understanding)
            keys = _visible(self._keys[index], und_key, key)
            values = _visible(self._values[index], und_value, value)
            backend = layer.attention_backend
            latents = layer.gen.finish(
                latents, attention(query, keys, values, self._latents, backend=backend)
            )
            if not layer.is_last:
                attended = attention(und_query, keys, values, self._markers, backend=backend)
                understanding = layer.und.finish(understanding, attended)
        velocity: Tensor = model.llm2vae(model.norm_gen(latents))
        return velocity.to(torch.float32).view(passes, -1, velocity.shape[-1])


def _visible(contexts: Sequence[Tensor], markers: Tensor, latents: Tensor) -> Tensor:
    """What the rows of each pass see, pass by pass: [context, markers, latents]."""
    parts = zip(contexts, markers.chunk(len(contexts)), latents.chunk(len(contexts)), strict=True)
    return torch.cat([piece.to(latents.dtype) for part in parts for piece in part])
