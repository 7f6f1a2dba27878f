"""BAGEL: a mixture of transformers that generates by flow matching on latents of the FLUX autoencoder."""

from __future__ import annotations

from reca.models.bagel.batch import BagelProcessor
from reca.models.bagel.checkpoint import load, save
from reca.models.bagel.config import VARIANTS
from reca.models.bagel.example import example
from reca.models.bagel.model import BagelModel
from reca.models.bagel.parity import reproduce
from reca.models.bagel.sampler import BagelSampler
from reca.models.family import Family

FAMILY = Family(
    name="bagel",
    variants=VARIANTS,
    build=BagelModel,
    processor=BagelProcessor,
    load=load,
    save=save,
    sampler=BagelSampler,
    reproduce=reproduce,
    example=example,
    fp32_parts=("vae",),
)
