"""Kernels that one microbatch would launch on a GPU, counted under fake tensors at full size; a ceiling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from reca.kernels import Impl
from reca.layers.attention import set_attention_backend
from reca.layers.implementation import set_kernels
from reca.models import get_variant
from reca.models.bagel.batch import BagelExample
from reca.models.bagel.batch import collate as collate_bagel
from reca.models.bagel.model import BagelModel
from reca.models.showo.batch import MaskedExample, collate_masked
from reca.models.showo.model import ShowoModel
from reca.profiling.launches import LaunchCounter
from reca.randomness import RandomSource
from reca.types import Batch, _map_tensors

PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
Case = tuple[Callable[[], nn.Module], Batch]


def bagel_7b() -> Case:
    """One image of 1024 x 1024 with an instruction of 24 tokens, its latents given."""
    config = get_variant("bagel/7b-mot")[1].config
    latents, ids = torch.zeros(32, 128, 128), (7,) * 24
    one = BagelExample(torch.zeros(256, 588), (16, 16), ids, latents, (64, 64), "moments")
    return lambda: BagelModel(config), collate_bagel(config, [one], [0])


def showo_clip_512() -> Case:
    """One sample with 652 of 1024 codes masked, its codes given, its pixels seen by the vision tower."""
    config = get_variant("showo/clip-512")[1].config
    pixels = torch.zeros(3, config.resolution, config.resolution)
    codes = torch.zeros(config.num_codes, dtype=torch.int64)
    one = MaskedExample(
        text=(7,) * 30,
        pixels=pixels,
        num_masked=652,
        is_reconstruction=True,
        num_tokens=0,
        codes=codes,
        given=None,
    )
    return lambda: ShowoModel(config), collate_masked(config, [one], [0])


def count(case: Case, kernels: Impl) -> LaunchCounter:
    """Forward and backward of a microbatch: weights as stored under bf16, attention as on a GPU."""
    build, real = case
    with FakeTensorMode() as mode:
        model: Any = build()
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad or isinstance(module, PRODUCTS):
                    parameter.data = parameter.data.to(torch.bfloat16)
        set_attention_backend(model, "counted")
        set_kernels(model, kernels)
        batch = _map_tensors(real, mode.from_tensor)
        draws = model.draw(batch, RandomSource(0, 1))
        with LaunchCounter() as counter:
            with torch.autocast("cpu", torch.bfloat16):
                (loss,) = model(batch, draws).values()
            loss.backward()
    return counter


# 1,601 and 1,198 when this was written; before the operators were wired in over 6,800 and 3,500.
@pytest.mark.slow
@pytest.mark.parametrize(("case", "ceiling"), [(bagel_7b, 1_650), (showo_clip_512, 1_250)])
def test_a_microbatch_launches_no_more_kernels_than_this(case: Callable[[], Case], ceiling: int) -> None:
    plain, wired = (count(case(), impl).kernels for impl in ("reference", "auto"))
    print(f"{case.__name__}: {plain} kernels in plain torch, {wired} with operators")
    assert wired <= ceiling
    assert wired < plain / 2
