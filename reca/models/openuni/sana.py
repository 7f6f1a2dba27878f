"""SANA and its autoencoder: built by diffusers from local values, linear attention kept in fp32."""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from reca.models.openuni.config import AutoencoderConfig, SanaConfig

_EPS = 1e-15


class LinearAttention:
    """Attention of latent tokens with relu features, in the place of diffusers' own processor.

        out_i = relu(q_i) sum_j relu(k_j)^T v_j / (relu(q_i) . sum_j relu(k_j) + 1e-15)

    In fp32 also under autocast, where the official processor would fall to bf16; and without the copy of the
    values that it pads to sum the keys. Source: arXiv 2410.10629, section 2.2.
    """

    def __call__(
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
        with torch.autocast(hidden_states.device.type, enabled=False):
            q, k, v = (
                rows.to(torch.float32).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
                for rows in (F.relu(query), F.relu(key), value)
            )  # each [images, heads, tokens, head_dim]
            weights = q @ k.sum(dim=2)[..., None]
            mixed = (q @ (k.mT @ v)) / (weights + _EPS)
        out: Tensor = attn.to_out[0](mixed.transpose(1, 2).flatten(2).to(value.dtype))
        return out


def build_sana(config: SanaConfig) -> SanaTransformer2DModel:
    """The diffusion transformer with random weights on the default device."""
    sana: SanaTransformer2DModel = SanaTransformer2DModel(**config.arguments())
    for module in sana.transformer_blocks:
        block = cast(Any, module)
        block.attn1.set_processor(LinearAttention())
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
