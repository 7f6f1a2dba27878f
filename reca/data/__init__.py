"""Images in, steps out: sources, texts, order, packing, mixtures and the resumable loader."""

from reca.data.captions import CaptionFolder
from reca.data.llava import Conversations
from reca.data.loader import PackingLoader, Reject, build_loader
from reca.data.mixture import MixtureLoader, build_text_loader, open_texts
from reca.data.prompts import load_prompts
from reca.data.sources import ImageFolder, Source, TarSource, TextSource, open_source, split_source

__all__ = [
    "CaptionFolder",
    "Conversations",
    "ImageFolder",
    "MixtureLoader",
    "PackingLoader",
    "Reject",
    "Source",
    "TarSource",
    "TextSource",
    "build_loader",
    "build_text_loader",
    "load_prompts",
    "open_source",
    "open_texts",
    "split_source",
]
