"""Janus-Pro: one language model that reads SigLIP embeddings and writes the codes of a VQ autoencoder."""

from __future__ import annotations

from reca.models.family import Family
from reca.models.janus.batch import TASKS, JanusProcessor
from reca.models.janus.checkpoint import load, save
from reca.models.janus.codebook import examine
from reca.models.janus.config import VARIANTS
from reca.models.janus.example import example
from reca.models.janus.model import JanusModel
from reca.models.janus.parity import reproduce
from reca.models.janus.sampler import JanusSampler

FAMILY = Family(
    name="janus",
    variants=VARIANTS,
    build=JanusModel,
    processor=JanusProcessor,
    load=load,
    save=save,
    sampler=JanusSampler,
    reproduce=reproduce,
    example=example,
    tasks=TASKS,
    examine=examine,
    fp32_parts=("vq",),
)
