"""Harmon: a masked autoregressive autoencoder around a Qwen2.5, with diffusion of each latent token."""

from __future__ import annotations

from reca.models.family import Family
from reca.models.harmon.checkpoint import load, save
from reca.models.harmon.config import VARIANTS
from reca.models.harmon.example import example
from reca.models.harmon.model import HarmonModel
from reca.models.harmon.parity import reproduce
from reca.models.harmon.processor import TASKS, HarmonProcessor
from reca.models.harmon.sampler import HarmonSampler

FAMILY = Family(
    name="harmon",
    variants=VARIANTS,
    build=HarmonModel,
    processor=HarmonProcessor,
    load=load,
    save=save,
    sampler=HarmonSampler,
    reproduce=reproduce,
    example=example,
    tasks=TASKS,
    fp32_parts=("vae",),
)
