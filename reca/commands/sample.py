"""`reca sample`, `reconstruct` and `edit`: pictures from a run or from official weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from reca.config import DataConfig
from reca.data.prompts import choose_prompt, load_prompts
from reca.errors import ConfigError, DataError
from reca.images import ImageRejected, load_image, resize
from reca.models.family import SampleOptions
from reca.randomness import RandomSource
from reca.recipes.api import load
from reca.recipes.assemble import Loaded, sample_options
from reca.recipes.resolve import read_config
from reca.sheet import contact_sheet, write_png

_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")


def sample_prompts(
    source: str,
    prompts: Sequence[str],
    *,
    model: str | None,
    out: Path,
    size: str | None,
    options: Mapping[str, Any],
    device: str,
) -> dict[str, Any]:
    """Draw each prompt. Returns the paths of the PNG files and of the contact sheet.

    Args:
        source: run folder, or folder of official weights.
        size: `HEIGHTxWIDTH` in pixels; None takes the largest square of the target.
        options: `steps`, `text_guidance`, `image_guidance`, `seed`; None takes the run's or the default.

    Raises: ConfigError, CheckpointError, DiskError.
    """
    loaded = load(source, model, device=device)
    side = loaded.variant.target.max_size
    pictures = loaded.sampler().text_to_image(
        prompts, _parse_size(size) or (side, side), _options(source, options)
    )
    return _write(out, "sample", pictures, [[picture] for picture in pictures], prompts)


def reconstruct_images(
    source: str,
    paths: Sequence[Path],
    prompt: str | None,
    *,
    model: str | None,
    out: Path,
    options: Mapping[str, Any],
    device: str,
) -> dict[str, Any]:
    """Reconstruct each image from its understanding embeddings; the sheet shows both views and the result.

    Args: as of `sample_prompts`; `prompt` None draws one of the shipped instructions for each image.
    Raises: ConfigError, CheckpointError, DataError, DiskError.
    """
    images = [_read(path) for path in paths]
    loaded = load(source, model, device=device)
    chosen = _options(source, options)
    templates, random = load_prompts(None), RandomSource(chosen.seed)
    prompts = [prompt or choose_prompt(templates, 0.0, random, i) or "" for i in range(len(images))]
    pictures = loaded.sampler().reconstruct(images, prompts, chosen)
    rows = [[*_views(loaded, image), picture] for image, picture in zip(images, pictures, strict=True)]
    titles = ("input", "understanding view", "reconstruction")
    return _write(out, "reconstruction", pictures, rows, [path.name for path in paths], titles)


def edit_images(
    source: str,
    paths: Sequence[Path],
    prompt: str,
    *,
    model: str | None,
    out: Path,
    options: Mapping[str, Any],
    device: str,
) -> dict[str, Any]:
    """Edit each image by one instruction. Arguments and errors as of `reconstruct_images`."""
    images = [_read(path) for path in paths]
    loaded = load(source, model, device=device)
    pictures = loaded.sampler().edit(images, [prompt] * len(images), _options(source, options))
    rows = [[_views(loaded, image)[0], picture] for image, picture in zip(images, pictures, strict=True)]
    return _write(out, "edit", pictures, rows, [path.name for path in paths], ("input", "edited"))


def _options(source: str, given: Mapping[str, Any]) -> SampleOptions:
    """A run's own options, or the defaults, with what was given on the command line."""
    config = Path(source) / "config.yaml"
    base = sample_options(read_config(config)) if config.is_file() else SampleOptions()
    return replace(base, **{name: value for name, value in given.items() if value is not None})


def _parse_size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ConfigError(f"--size must look like HEIGHTxWIDTH in pixels, as in 512x768; got {text!r}")
    return int(match[1]), int(match[2])


def _read(path: Path) -> Image.Image:
    try:
        return load_image(path, max_pixels=DataConfig().max_pixels)
    except ImageRejected as reject:
        raise DataError(f"{path}: {reject.reason}; give a JPEG, PNG or WebP file") from reject


def _views(loaded: Loaded, image: Image.Image) -> tuple[Image.Image, Image.Image]:
    return resize(image, loaded.variant.target), resize(image, loaded.variant.understanding)


def _write(
    out: Path,
    stem: str,
    pictures: Sequence[Image.Image],
    rows: Sequence[Sequence[Image.Image]],
    captions: Sequence[str],
    titles: Sequence[str] = (),
) -> dict[str, Any]:
    paths = [out / f"{stem}-{number:03d}.png" for number in range(len(pictures))]
    for path, picture in zip(paths, pictures, strict=True):
        write_png(path, picture)
    sheet = out / f"{stem}-sheet.png"
    write_png(sheet, contact_sheet(rows, columns=titles, captions=captions))
    return {"images": [str(path) for path in paths], "sheet": str(sheet)}
