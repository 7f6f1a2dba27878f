"""Show-o: one transformer that reads text causally and fills in masked image codes."""

from __future__ import annotations

from reca.models.family import Family
from reca.models.showo.checkpoint import load, save
from reca.models.showo.config import TASKS, VARIANTS
from reca.models.showo.example import example
from reca.models.showo.model import ShowoModel
from reca.models.showo.parity import reproduce
from reca.models.showo.processor import ShowoProcessor
from reca.models.showo.sampler import ShowoSampler

FAMILY = Family(
    name="showo",
    variants=VARIANTS,
    build=ShowoModel,
    processor=ShowoProcessor,
    load=load,
    save=save,
    sampler=ShowoSampler,
    reproduce=reproduce,
    example=example,
    tasks=TASKS,
    fp32_parts=("magvit",),
)
