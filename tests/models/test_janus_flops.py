"""Janus-Pro's step at full size: what it cannot do without."""

from __future__ import annotations

import torch

from reca.models.janus.config import VARIANTS, JanusConfig
from reca.models.janus.example import example
from reca.models.janus.flops import vision_flops, vq_flops
from reca.models.janus.model import JanusModel


def test_the_least_flops_are_those_of_the_definition() -> None:
    config: JanusConfig = VARIANTS["pro-1b"].config
    with torch.device("meta"):
        model = JanusModel(config)
    aligner = 2 * 576 * (1024 * 2048 + 2048 * 2048)
    assert abs((vision_flops(config.vision) + aligner) / 389e9 - 1) < 2e-3
    assert abs(vq_flops(config.vq, 384) / 313e9 - 1) < 2e-3
    # the definition's 10,407 counts hidden scores, and all rows of the last layer
    assert 0.95 < model.flops(example(VARIANTS["pro-1b"], "reconstruction", 1)) / 10_407e9 < 1
