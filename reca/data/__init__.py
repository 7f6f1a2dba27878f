"""Images in, steps out: sources, prompts, order, packing and the resumable loader."""

from reca.data.loader import PackingLoader, Reject, build_loader
from reca.data.prompts import load_prompts
from reca.data.sources import ImageFolder, Source, TarSource, open_source, split_source

__all__ = [
    "ImageFolder",
    "PackingLoader",
    "Reject",
    "Source",
    "TarSource",
    "build_loader",
    "load_prompts",
    "open_source",
    "split_source",
]
