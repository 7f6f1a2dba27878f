"""SANA and its autoencoder: built by diffusers from local values, linear attention kept in fp32.

Parameters and their names are those of diffusers; the forwards below are ours, and call our operators.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers.models.attention_processor import Attention, SanaMultiscaleLinearAttention
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.sana_transformer import (
    GLUMBConv,
    SanaModulatedNorm,
    SanaTransformer2DModel,
    SanaTransformerBlock,
)
from torch import Tensor, nn
from torch.nn import functional as F

from reca.kernels import (
    Impl,
    add_layer_norm_modulate,
    depthwise_glu,
    group_gate_residual,
    linear_attention,
    rms_norm,
)
from reca.layers.implementation import activation_dtype
from reca.models.openuni.config import AutoencoderConfig, SanaConfig

_EPS = 1e-15


def project(rows: Tensor, *layers: Any) -> tuple[Tensor, ...]:
    """What linear layers of one width make of the same rows, as one product; slices of its columns."""
    weight = torch.cat([layer.weight for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    return F.linear(rows, weight, bias).chunk(len(layers), dim=-1)


class LinearAttention(nn.Module):
    """Attention of latent tokens with relu features, in the place of diffusers' own processor.

        out_i = relu(q_i) sum_j relu(k_j)^T v_j / (relu(q_i) . sum_j relu(k_j) + 1e-15)

    In fp32 also under autocast, where the official processor would fall to bf16; and without the copy of the
    values that it pads to sum the keys. Source: arXiv 2410.10629, section 2.2.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Impl = "auto"

    def forward(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """[images, tokens, dim] -> [images, tokens, dim]; only self-attention without a mask exists."""
        query, key, value = project(hidden_states, attn.to_q, attn.to_k, attn.to_v)
        if attn.norm_q is not None and attn.norm_k is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        heads = (rows.unflatten(-1, (attn.heads, -1)) for rows in (query, key, value.to(query.dtype)))
        mixed = linear_attention(*heads, eps=_EPS, impl=self.kernels)
        out: Tensor = attn.to_out[0](mixed.flatten(2).to(value.dtype))
        return out


class CrossAttention(nn.Module):
    """Attention of latent tokens over a caption of equal length for all images, as one batch."""

    def forward(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """[images, tokens, dim], [images, queries, dim] -> [images, tokens, dim]; no mask exists."""
        query = attn.to_q(hidden_states)
        key, value = project(encoder_hidden_states, attn.to_k, attn.to_v)
        if attn.norm_q is not None and attn.norm_k is not None:
            query, key = attn.norm_q(query).to(value.dtype), attn.norm_k(key).to(value.dtype)
        heads = (rows.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for rows in (query, key, value))
        mixed = F.scaled_dot_product_attention(*heads)
        out: Tensor = attn.to_out[0](mixed.transpose(1, 2).flatten(2))
        return out


class MixFeedForward(GLUMBConv):  # type: ignore[misc]
    """Diffusers' feed-forward block with its parameters, over token rows instead of channel planes.

        y = point(value * silu(gate)),    [value; gate] = depthwise3x3(silu(inverted(x)))

    In the autoencoder a norm and the residual add follow.

    Source: arXiv 2410.10629, section 2.2.
    """

    kernels: Impl = "auto"

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[images, dim, h, w] -> the same shape; tokens lie channels last in memory, so nothing is copied."""
        inverted, depth, point = self.conv_inverted, self.conv_depth, self.conv_point
        rows = F.linear(hidden_states.permute(0, 2, 3, 1), inverted.weight.flatten(1), inverted.bias)
        gated = depthwise_glu(rows, depth.weight, depth.bias, activate=True, impl=self.kernels)
        out = F.linear(gated, point.weight.flatten(1))
        if self.norm is not None:
            out = self.norm(out)
        out = out.permute(0, 3, 1, 2)
        return out + hidden_states if self.residual_connection else out


class MultiscaleAttention(nn.Module):
    """Linear attention of the autoencoder, in the place of diffusers' own processor.

    Queries, keys and values come once from the pixels and once from their neighbourhoods; heads are
    [query; key; value]. Sums are fp32, as officially but for grids of at most 32 pixels.

    Source: arXiv 2410.10733, section 3.2.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Impl = "auto"

    def forward(self, attn: SanaMultiscaleLinearAttention, hidden_states: Tensor) -> Tensor:
        """[images, dim, h, w] -> the same shape, residual added; channels last in memory."""
        rows = hidden_states.movedim(1, -1)  # [images, h, w, dim]
        weight = torch.cat([layer.weight for layer in (attn.to_q, attn.to_k, attn.to_v)])
        planes = F.linear(rows, weight).movedim(-1, 1)
        scales = torch.cat([planes, *(scale(planes) for scale in attn.to_qkv_multiscale)], dim=1)
        heads = scales.movedim(1, -1).flatten(1, 2).unflatten(-1, (-1, 3, attn.attention_head_dim))
        mixed = linear_attention(*heads.unbind(3), eps=attn.eps, impl=self.kernels)
        out = attn.norm_out(attn.to_out(mixed.flatten(2).view(*rows.shape[:3], -1)))
        return hidden_states + out.movedim(-1, 1)


class Block(SanaTransformerBlock):  # type: ignore[misc]
    """Linear attention, attention over the caption and the feed-forward block, modulated by the time.

        x <- x + gate_1 attn(norm(x) (1 + scale_1) + shift_1)
        x <- x + cross(x, caption)
        x <- x + gate_2 ff(norm(x) (1 + scale_2) + shift_2)

    Source: arXiv 2410.10629, section 2.2.
    """

    kernels: Impl = "auto"

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None,
        timestep: Tensor,
        height: int,
        width: int,
    ) -> Tensor:
        """Advance [images, tokens, dim]; `timestep` [images, 6 * dim] is the time's part of modulation."""
        dtype, impl = activation_dtype(self.attn1.to_q.weight), self.kernels
        modulation = self.scale_shift_table + timestep.unflatten(1, (6, -1))  # [images, 6, dim]
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation.chunk(6, dim=1)
        # the table makes the residual stream fp32 from the first block on
        stream = hidden_states.to(modulation.dtype)
        stream, normed = add_layer_norm_modulate(
            stream, None, shift_1, scale_1, eps=self.norm1.eps, dtype=dtype, impl=impl
        )
        stream = group_gate_residual(self.attn1(normed), gate_1, stream, impl=impl)
        crossed = self.attn2(stream.to(dtype), encoder_hidden_states=encoder_hidden_states.to(dtype))
        stream, normed = add_layer_norm_modulate(
            stream, crossed, shift_2, scale_2, eps=self.norm2.eps, dtype=dtype, impl=impl
        )
        mixed = self.ff(normed.unflatten(1, (height, width)).permute(0, 3, 1, 2))
        return group_gate_residual(mixed.flatten(2).transpose(1, 2), gate_2, stream, impl=impl)


class ModulatedNorm(SanaModulatedNorm):  # type: ignore[misc]
    """The last norm, modulated by a table and the time."""

    kernels: Impl = "auto"

    def forward(self, hidden_states: Tensor, temb: Tensor, scale_shift_table: Tensor) -> Tensor:
        """[images, tokens, dim] -> the same shape, in the dtype of the modulation."""
        modulation = scale_shift_table + temb[:, None]  # [images, 2, dim]
        stream = hidden_states.to(modulation.dtype)
        _, out = add_layer_norm_modulate(
            stream, None, *modulation.chunk(2, dim=1), eps=self.norm.eps, impl=self.kernels
        )
        return out


class BiasedRMSNorm(RMSNorm):  # type: ignore[misc]
    """Diffusers' norm of the last axis with its parameters, in one pass where it launches seven."""

    kernels: Impl = "auto"

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., dim] -> the same shape, in the dtype of the weight."""
        rows = hidden_states.to(self.weight.dtype)
        normed = rms_norm(rows, self.weight, eps=self.eps, rounds_quotient=True, impl=self.kernels)
        return normed if self.bias is None else normed + self.bias


def adopt(model: nn.Module) -> None:
    """Give what SANA and its autoencoder have in common our forwards."""
    for module in [*model.modules()]:
        if type(module) is RMSNorm and module.weight is not None:
            module.__class__ = BiasedRMSNorm
        elif type(module) is GLUMBConv:
            module.__class__ = MixFeedForward
        elif type(module) is SanaMultiscaleLinearAttention:
            module.processor = MultiscaleAttention()


def build_sana(config: SanaConfig) -> SanaTransformer2DModel:
    """The diffusion transformer with random weights on the default device."""
    sana: SanaTransformer2DModel = SanaTransformer2DModel(**config.arguments())
    for module in sana.transformer_blocks:
        block = cast(Any, module)
        block.__class__ = Block
        block.attn1.set_processor(LinearAttention())
        block.attn2.set_processor(CrossAttention())
    sana.norm_out.__class__ = ModulatedNorm
    adopt(sana)
    return sana


class DeepCompressionAutoencoder(nn.Module):
    """Pixels <-> latents, at a 32nd of the size; deterministic. No gradient passes through it.

    It runs in the dtype of its weights with autocast off: its own linear attention is fp32 in part.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.scaling_factor = config.scaling_factor
        self.autoencoder = AutoencoderDC(**config.arguments())
        adopt(self.autoencoder)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """[images, 3, height, width] in [-1, 1] -> scaled latents [images, channels, h, w] fp32."""
        weight: Tensor = self.autoencoder.encoder.conv_in.weight
        with torch.autocast(pixels.device.type, enabled=False):
            latents: Tensor = self.autoencoder.encode(pixels.to(weight.dtype), return_dict=False)[0]
        return latents.to(torch.float32) * self.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents [images, channels, h, w] -> [images, 3, height, width] fp32, about [-1, 1]."""
        weight: Tensor = self.autoencoder.decoder.conv_in.weight
        with torch.autocast(latents.device.type, enabled=False):
            scaled = (latents / self.scaling_factor).to(weight.dtype)
            pixels: Tensor = self.autoencoder.decode(scaled, return_dict=False)[0]
        return pixels.to(torch.float32)
