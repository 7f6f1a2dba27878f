"""The miniature: the smallest family, for a world that can be scored exactly; the one to read first."""

from __future__ import annotations

from reca.models.family import Family
from reca.models.miniature.batch import example
from reca.models.miniature.checkpoint import load, save
from reca.models.miniature.config import TASKS, VARIANTS
from reca.models.miniature.model import MiniatureModel
from reca.models.miniature.parity import reproduce
from reca.models.miniature.processor import MiniatureProcessor
from reca.models.miniature.sampler import MiniatureSampler

FAMILY = Family(
    name="miniature",
    variants=VARIANTS,
    build=MiniatureModel,
    processor=MiniatureProcessor,
    load=load,
    save=save,
    sampler=MiniatureSampler,
    reproduce=reproduce,
    example=example,
    tasks=TASKS,
)
