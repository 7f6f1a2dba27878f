"""OpenUni: queries behind a frozen language model tell SANA what to draw, by flow matching."""

from __future__ import annotations

from reca.models.family import Family
from reca.models.openuni.batch import OpenUniProcessor
from reca.models.openuni.checkpoint import load, save
from reca.models.openuni.config import VARIANTS
from reca.models.openuni.example import example
from reca.models.openuni.model import OpenUniModel
from reca.models.openuni.parity import reproduce
from reca.models.openuni.sampler import OpenUniSampler

FAMILY = Family(
    name="openuni",
    variants=VARIANTS,
    build=OpenUniModel,
    processor=OpenUniProcessor,
    load=load,
    save=save,
    sampler=OpenUniSampler,
    reproduce=reproduce,
    example=example,
)
