"""Janus-Pro under RecA: understanding embeddings of an image in, its codes out, one after another."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reca.kernels import Impl, masked_token_loss
from reca.layers.mlp import MLP
from reca.layers.norm import RMSNorm
from reca.layers.rotary import rotary_table
from reca.layers.stream import Stream
from reca.models.janus.batch import GenerationBatch, ImageToTextBatch, JanusBatch
from reca.models.janus.config import JanusConfig
from reca.models.janus.flops import minimum_flops
from reca.models.janus.transformer import DecoderLayer, Layout
from reca.models.janus.vision import VisionEncoder
from reca.models.janus.vq import VQModel
from reca.profiling import span
from reca.randomness import RandomSource
from reca.types import Draws, LossTerms


class GenerationHead(nn.Module):
    """Hidden rows -> logits of codes: linear, exact GELU, linear."""

    def __init__(self, dim: int, num_codes: int) -> None:
        super().__init__()
        self.proj_out = nn.Linear(dim, dim)
        self.vision_head = nn.Linear(dim, num_codes)

    def project(self, hidden: Tensor) -> Tensor:
        """[rows, dim] -> [rows, dim]: what the last layer is applied to."""
        return F.gelu(self.proj_out(hidden))

    def forward(self, hidden: Tensor) -> Tensor:
        """[rows, dim] -> [rows, codes]."""
        logits: Tensor = self.vision_head(self.project(hidden))
        return logits


class JanusModel(nn.Module):
    """The whole model: the language model and all that generates codes are trained.

    Frozen: SigLIP, the VQ autoencoder and, unless the configuration says otherwise, the aligner.

    Args:
        config: the architecture.
    """

    def __init__(self, config: JanusConfig) -> None:
        super().__init__()
        text, dim = config.text, config.text.hidden_size
        self.config = config
        self.kernels: Impl = "auto"
        self.vision = VisionEncoder(config.vision)
        self.aligner = MLP(config.vision.hidden_size, dim, dim, approximate="none")
        self.vq = VQModel(config.vq)
        self.embed_tokens = nn.Embedding(text.vocab_size, dim)
        self.layers = nn.ModuleList(
            DecoderLayer(text, is_last=index == text.num_hidden_layers - 1)
            for index in range(text.num_hidden_layers)
        )
        self.norm = RMSNorm(dim, text.rms_norm_eps)
        self.lm_head = nn.Linear(dim, text.vocab_size, bias=False)
        self.generation_embeddings = nn.Embedding(config.vq.num_embeddings, config.vq.embed_dim)
        self.generation_aligner = MLP(config.vq.embed_dim, dim, dim, approximate="none")
        self.generation_head = GenerationHead(dim, config.vq.num_embeddings)
        self.aligner.requires_grad_(config.train_aligner)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)

    @property
    def activation_dtype(self) -> torch.dtype:
        """Of the residual stream: that of frozen weights."""
        return self.vision.patch_embedding.weight.dtype

    def blocks(self) -> Sequence[DecoderLayer]:
        """The decoder layers, in order of execution."""
        return list(self.layers)  # type: ignore[arg-type]

    def flops(self, batch: JanusBatch) -> int:
        """Least FLOPs of forward + backward of this microbatch; see `minimum_flops`."""
        return minimum_flops(self.config, batch)

    def draw(self, batch: JanusBatch, random: RandomSource) -> Draws:
        """Nothing of the step is random; crops and dropped instructions belong to the preparation."""
        count = len(batch.labels) if isinstance(batch, ImageToTextBatch) else sum(batch.layout.tails)
        return Draws(
            counts={batch.term: torch.full((), count, dtype=torch.float32, device=batch.sample_ids.device)}
        )

    def forward(self, batch: JanusBatch, draws: Draws) -> LossTerms:
        """The batch's own term: cross entropy, summed over predicted tokens; fp32."""
        codes = self.target_codes(batch)
        hidden = self.embed(batch, codes)
        with span("predict"):
            stream = self.transform(hidden, batch.layout)
        with span("loss"):
            dtype = self.activation_dtype
            if isinstance(batch, ImageToTextBatch):
                hidden = self.norm(stream.rows.index_select(0, batch.predicting)).to(dtype)
                loss = masked_token_loss(
                    hidden, self.lm_head.weight.to(dtype), batch.labels, impl=self.kernels
                )
            else:
                hidden, last = (
                    self.generation_head.project(self.norm(stream.rows)),
                    self.generation_head.vision_head,
                )
                weight, bias = last.weight.to(dtype), last.bias.to(dtype)
                loss = masked_token_loss(hidden.to(dtype), weight, codes.flatten(), bias, impl=self.kernels)
            return {batch.term: loss}

    @torch.no_grad()
    def target_codes(self, batch: JanusBatch) -> Tensor:
        """[images, codes] int64 of the images to be generated; empty for image to text."""
        if not isinstance(batch, GenerationBatch):
            return batch.sample_ids.new_empty(0, 1)
        with span("encode_target"):
            return self.vq.encode(batch.pixels) if batch.codes is None else batch.codes

    def understand(self, batch: JanusBatch) -> Tensor:
        """[seen images * patches, dim]: what the language model is shown of the images."""
        pixels = batch.pixels
        if len(batch.seen) < len(pixels):
            pixels = torch.stack([pixels[index] for index in batch.seen]) if batch.seen else pixels[:0]
        with span("understand"), nullcontext() if self.config.train_aligner else torch.no_grad():
            embeddings: Tensor = self.aligner(self.vision(pixels, batch.patches))
            return embeddings

    def embed(self, batch: JanusBatch, codes: Tensor) -> Tensor:
        """[rows, dim]: embeddings of texts, of images that are understood, and of all codes but the last."""
        dtype = self.activation_dtype
        rows = [F.embedding(batch.text_ids, self.embed_tokens.weight, padding_idx=batch.pad_id)]
        if batch.seen:
            rows.append(self.understand(batch))
        if len(codes):
            rows.append(self.embed_codes(codes[:, :-1].flatten()))
        return torch.cat([part.to(dtype) for part in rows]).index_select(0, batch.order)

    def embed_codes(self, codes: Tensor) -> Tensor:
        """[rows] int64 -> [rows, dim]; the table is not that of the autoencoder."""
        embedded: Tensor = self.generation_aligner(self.generation_embeddings(codes))
        return embedded

    def transform(self, hidden: Tensor, layout: Layout) -> Stream:
        """All layers: [rows, dim] -> [tail rows, dim], before the last norm."""
        text = self.config.text
        rotation = rotary_table(layout.positions, text.head_dim, text.rope_theta, hidden.dtype)
        stream = Stream(hidden)
        for layer in self.layers:
            stream = layer(stream, layout, rotation)
        return stream
