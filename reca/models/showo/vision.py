"""CLIP's vision tower as Show-o uses it: patches of the last layer but one. Frozen."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from reca.kernels import Impl, add_layer_norm, gelu_mlp
from reca.layers.implementation import activation_dtype
from reca.models.showo.config import ClipConfig

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class VisionTower(nn.Module):
    """Pixels -> the patches' hidden states before the last layer, which is held but never run."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config = config
        self.kernels: Impl = "auto"
        fixed = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "attn_implementation": "sdpa"}
        settings: dict[str, Any] = {**asdict(config), **fixed}
        model = CLIPVisionModel(CLIPVisionConfig(**settings))
        # transformers before 5.4 wraps the tower once more
        self.tower: Any = getattr(model, "vision_model", model)
        with torch.device("cpu"):  # computed, never loaded: not on meta either
            self.tower.embeddings.position_ids = torch.arange(config.num_tokens + 1)[None]
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """[batch, 3, image_size, image_size] -> [batch, num_tokens, hidden_size] without the class token."""
        tower = self.tower
        hidden = tower.pre_layrnorm(tower.embeddings(pixels.to(tower.pre_layrnorm.weight.dtype)))
        deltas: tuple[Tensor, ...] = ()
        for layer in tower.encoder.layers[:-1]:
            hidden, deltas = self._advance(layer, hidden, deltas)
        for delta in deltas:
            hidden = hidden + delta
        patches: Tensor = hidden[:, 1:]
        return patches

    def _advance(
        self, layer: Any, hidden: Tensor, deltas: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(residual stream, what the MLP adds to it); each sum is formed by the norm that reads it."""
        attention, mlp, dtype = layer.self_attn, layer.mlp, activation_dtype(layer.mlp.fc1.weight)
        hidden, normed = self._norm(layer.layer_norm1, hidden, deltas, dtype)
        query, key, value = (
            project(normed).unflatten(-1, (self.config.num_attention_heads, -1)).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        hidden, normed = self._norm(layer.layer_norm2, hidden, (attention.out_proj(attended),), dtype)
        weights = (mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias)
        fed = gelu_mlp(normed, *(w.to(dtype) for w in weights), approximate="sigmoid", impl=self.kernels)
        return hidden, (fed,)

    def _norm(
        self, norm: nn.LayerNorm, hidden: Tensor, deltas: tuple[Tensor, ...], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        summed, normed = add_layer_norm(
            hidden, deltas, norm.weight, norm.bias, eps=norm.eps, dtype=dtype, impl=self.kernels
        )
        return summed, normed

    def resize(self, pixels: Tensor) -> Tensor:
        """Images in [-1, 1] at the tower's size: bilinear without antialiasing, as officially."""
        size = self.config.image_size
        return F.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False)


def as_clip(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1] -> CLIP's own normalisation."""
    mean, std = (pixels.new_tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return ((pixels + 1) / 2 - mean) / std
