"""Janus-Pro's step at full size, without memory: what it executes against what it cannot do without."""

from __future__ import annotations

import functools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from reca.kernels import masked_token_loss
from reca.layers.attention import set_attention_backend
from reca.models.janus import model as model_module
from reca.models.janus.batch import (
    ChatExample,
    GenerationExample,
    JanusBatch,
    collate_chats,
    collate_generation,
)
from reca.models.janus.config import IGNORED, VARIANTS, JanusConfig
from reca.models.janus.flops import vision_flops, vq_flops
from reca.models.janus.model import JanusModel
from reca.models.janus.tokenizer import IMAGE
from reca.randomness import RandomSource
from reca.types import _map_tensors

RANDOM = RandomSource(seed=3, step=7)


def full_batches(config: JanusConfig) -> list[JanusBatch]:
    """One reconstruction with an instruction of 24 tokens; one conversation of 60 and 100 tokens."""
    blank = torch.zeros(3, 384, 384)
    prompt = (1, 2, 3, 4, *(IMAGE,) * 576, 5, *(7,) * 24, 6)
    one = GenerationExample(prompt=prompt, pixels=blank, num_tokens=1182, is_reconstruction=True)
    ids = (*(1,) * 5, *(IMAGE,) * 576, *(7,) * 60, *(8,) * 100)
    labels = (*(IGNORED,) * 641, *(8,) * 100)
    said = ChatExample(ids=ids, labels=labels, pixels=blank)
    return [collate_generation(config, 0, [one], [0]), collate_chats(config, 0, [said], [0])]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["pro-1b", "pro-7b"])
def test_full_size_steps_read_nothing_on_the_host_and_execute_little_more_than_the_minimum(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config: JanusConfig = VARIANTS[variant].config
    # the fused head is one operator that no counter looks into
    monkeypatch.setattr(
        model_module, "masked_token_loss", functools.partial(masked_token_loss, impl="reference")
    )
    for real in full_batches(config):
        with FakeTensorMode() as mode:  # a host read of any value raises here
            model = JanusModel(config)
            set_attention_backend(model, "reference")  # the only back end whose products are all counted
            batch = _map_tensors(real, mode.from_tensor)
            draws = model.draw(batch, RANDOM)
            with FlopCounterMode(display=False) as counter, torch.autocast("cpu", torch.bfloat16):
                model(batch, draws)[batch.term].backward()
        # unfused attention forms the scores that the causal mask hides, and stores all of them
        assert 0.99 * model.flops(real) < counter.get_total_flops() <= 1.05 * model.flops(real)


def test_the_least_flops_are_those_of_the_definition() -> None:
    config: JanusConfig = VARIANTS["pro-1b"].config
    with torch.device("meta"):
        model = JanusModel(config)
    aligner = 2 * 576 * (1024 * 2048 + 2048 * 2048)
    assert abs((vision_flops(config.vision) + aligner) / 389e9 - 1) < 2e-3
    assert abs(vq_flops(config.vq, 384) / 313e9 - 1) < 2e-3
    # the definition's 10,407 counts hidden scores, and all rows of the last layer
    assert 0.95 < model.flops(full_batches(config)[0]) / 10_407e9 < 1
