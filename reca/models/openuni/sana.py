"""SANA and its autoencoder: built by diffusers from local values, linear attention kept in fp32."""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
from diffusers.models.transformers.sana_transformer import GLUMBConv, SanaTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from reca.kernels import Impl, depthwise_glu, linear_attention
from reca.models.openuni.config import AutoencoderConfig, SanaConfig

_EPS = 1e-15


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
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        if attn.norm_q is not None and attn.norm_k is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        heads = (rows.unflatten(-1, (attn.heads, -1)) for rows in (query, key, value.to(query.dtype)))
        mixed = linear_attention(*heads, eps=_EPS, impl=self.kernels)
        out: Tensor = attn.to_out[0](mixed.flatten(2).to(value.dtype))
        return out


class MixFeedForward(GLUMBConv):  # type: ignore[misc]
    """Diffusers' feed-forward block with its parameters, over token rows instead of channel planes.

        y = point(value * silu(gate)),    [value; gate] = depthwise3x3(silu(inverted(x)))

    Source: arXiv 2410.10629, section 2.2.
    """

    kernels: Impl = "auto"

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[images, dim, h, w] -> the same shape; tokens lie channels last in memory, so nothing is copied."""
        inverted, depth, point = self.conv_inverted, self.conv_depth, self.conv_point
        rows = F.linear(hidden_states.permute(0, 2, 3, 1), inverted.weight.flatten(1), inverted.bias)
        gated = depthwise_glu(rows, depth.weight, depth.bias, activate=True, impl=self.kernels)
        out = F.linear(gated, point.weight.flatten(1))
        return out.permute(0, 3, 1, 2)


def build_sana(config: SanaConfig) -> SanaTransformer2DModel:
    """The diffusion transformer with random weights on the default device."""
    sana: SanaTransformer2DModel = SanaTransformer2DModel(**config.arguments())
    for module in sana.transformer_blocks:
        block = cast(Any, module)
        block.attn1.set_processor(LinearAttention())
        # The parameters and their names stay those of diffusers; only the forward is ours.
        block.ff.__class__ = MixFeedForward
    return sana


class DeepCompressionAutoencoder(nn.Module):
    """Pixels <-> latents, at a 32nd of the size; deterministic. No gradient passes through it.

    It runs in the dtype of its weights with autocast off: its own linear attention is fp32 in part.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.scaling_factor = config.scaling_factor
        self.autoencoder = AutoencoderDC(**config.arguments())

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
