"""The miniature: an encoder that sees, a trunk that reads and answers, an expert that draws."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from reca.kernels import masked_token_loss
from reca.models.miniature.batch import (
    EncoderBatch,
    GenerationBatch,
    LanguageBatch,
    MiniatureBatch,
    MiniatureDraws,
)
from reca.models.miniature.config import MiniatureConfig
from reca.models.miniature.encoder import Encoder, Projector
from reca.models.miniature.generator import FlowGenerator, MaskedGenerator, Memory
from reca.models.miniature.transformer import Block, Trunk
from reca.objectives.flow_matching import shifted_time
from reca.profiling import span
from reca.randomness import RandomSource
from reca.types import LossTerms
from reca.world.language import IGNORED, IMAGE_TOKENS, PAD
from reca.world.scenes import NUM_CELLS

PARTS = ("encoder", "projector", "trunk", "generator")


class MiniatureModel(nn.Module):
    """The whole model. Of a new one only the generator is trained; `train_only` chooses other parts.

    Args:
        config: the architecture.

    Attributes:
        world: identity of the world it was taught in; empty where nothing was taught.
        timestep_shift: shift of the training times (flow only).
    """

    def __init__(self, config: MiniatureConfig) -> None:
        super().__init__()
        self.config = config
        self.timestep_shift = 1.0
        self.world = ""
        self.encoder = Encoder(config)
        self.projector = Projector(config)
        self.trunk = Trunk(config)
        kind = MaskedGenerator if config.generator == "masked" else FlowGenerator
        self.generator: MaskedGenerator | FlowGenerator = kind(config)
        self.train_only("generator")

    def train_only(self, *parts: str) -> None:
        """Freeze everything but these of `PARTS`."""
        for name in PARTS:
            self.get_submodule(name).requires_grad_(name in parts)

    def start_generator(self) -> None:
        """Copy the trunk's blocks into the generation expert, which then starts from a reader."""
        self.generator.expert.layers.load_state_dict(self.trunk.layers.state_dict())

    def blocks(self) -> Sequence[nn.Module]:
        """The units to shard, recompute and compile. A block hands out keys inside, so there is none."""
        return []

    def draw(self, batch: MiniatureBatch, random: RandomSource) -> MiniatureDraws:
        """Which samples lose their condition, and which codes are masked or how noisy the latents are."""
        ids, term = batch.sample_ids, batch.term
        if isinstance(batch, LanguageBatch):
            return MiniatureDraws(counts={term: (batch.labels != IGNORED).sum()})
        if isinstance(batch, EncoderBatch):
            return MiniatureDraws(counts={term: ids.new_full((), batch.codes.numel())})
        assert isinstance(batch, GenerationBatch)
        uniform = random.uniform(f"{term}/generation", ids, 2 + NUM_CELLS)
        is_given = uniform[:, 0] >= batch.dropout
        if isinstance(self.generator, FlowGenerator):
            noise = random.normal(f"{term}/noise", ids, NUM_CELLS * self.config.latent_dim)
            return MiniatureDraws(
                counts={term: ids.new_full((), batch.codes.numel())},
                is_given=is_given,
                noise=noise.view(len(ids), NUM_CELLS, -1),
                time=shifted_time(uniform[:, 1], self.timestep_shift),
            )
        rank = uniform[:, 2:].argsort(dim=1).argsort(dim=1)
        # Every number of hidden cells, as it occurs while they are filled in one by one.
        is_masked = rank <= (uniform[:, 1:2] * NUM_CELLS).long()
        return MiniatureDraws(counts={term: is_masked.sum()}, is_given=is_given, is_masked=is_masked)

    def forward(self, batch: MiniatureBatch, draws: MiniatureDraws) -> LossTerms:
        """The batch's own term, summed over what its draws count."""
        if isinstance(batch, EncoderBatch):
            assert batch.pixels is not None
            return {batch.term: self.encoder.probe_loss(self.encoder(batch.pixels), batch.codes)}
        if isinstance(batch, LanguageBatch):
            with span("read"):
                hidden, _ = self.trunk(self.embed(batch))
            with span("loss"):
                head = self.trunk.head.weight
                return {batch.term: masked_token_loss(hidden.flatten(0, 1), head, batch.labels.flatten())}
        assert isinstance(batch, GenerationBatch) and draws.is_given is not None
        memory, is_visible = self.read(batch)
        is_visible = is_visible & (draws.is_given[:, None] | is_first(is_visible))
        with span("predict"):
            if isinstance(self.generator, FlowGenerator):
                assert draws.noise is not None and draws.time is not None
                loss = self.generator.loss(batch.codes, draws.noise, draws.time, memory, is_visible)
            else:
                assert draws.is_masked is not None
                loss = self.generator.loss(batch.codes, draws.is_masked, memory, is_visible)
        return {batch.term: loss}

    def embed(self, batch: MiniatureBatch) -> Tensor:
        """[n, length, dim]: words, with the picture's embeddings in their places."""
        words: Tensor = self.trunk.words(batch.tokens)
        seen = batch.embeddings
        if batch.pixels is not None:
            with span("understand"):
                seen = self.projector(self.encoder(batch.pixels))
        if seen is None:
            return words
        if batch.rotation is not None:
            seen = seen @ batch.rotation
        return torch.cat([words[:, :1], seen, words[:, 1 + IMAGE_TOKENS :]], dim=1)

    def read(self, batch: MiniatureBatch) -> tuple[Memory, Tensor]:
        """The trunk's keys and values of what is given, and which of them are no padding, [n, length].

        Without gradients where the trunk is frozen.
        """
        is_trained = next(self.trunk.parameters()).requires_grad
        with span("read"), nullcontext() if is_trained else torch.no_grad():
            _, memory = self.trunk(self.embed(batch))
        return memory, batch.tokens != PAD

    def flops(self, batch: MiniatureBatch) -> int:
        """Least FLOPs of forward + backward, matrices of trunk and generator only (the rest is small)."""
        block = sum(p.numel() for p in Block(self.config).parameters() if p.ndim == 2)
        read = 2 * batch.tokens.numel() * block * self.config.layers
        if isinstance(batch, EncoderBatch):
            return 6 * len(batch.sample_ids) * NUM_CELLS * block
        if isinstance(batch, LanguageBatch):
            return 3 * read
        return read + 6 * len(batch.sample_ids) * NUM_CELLS * block * self.config.layers


def is_first(is_visible: Tensor) -> Tensor:
    """[n, length] bool: START alone, what is left of a condition that is dropped."""
    return torch.arange(is_visible.shape[1], device=is_visible.device).expand_as(is_visible) == 0
