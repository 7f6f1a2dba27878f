"""What a run has learnt, on photographs that it never trains on: numbers and a contact sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from reca.data.sources import Source
from reca.images import ImageRejected, ImageSpec, load_image, resize
from reca.models.family import SampleOptions, Sampler
from reca.recipes.metrics import cycle_similarity, psnr, retrieval_rank, ssim
from reca.sheet import contact_sheet, write_png

_CELL = 192  # pixels of a picture on the contact sheet


@dataclass(frozen=True, slots=True)
class Measured:
    """How near reconstructions are to their inputs.

    Attributes:
        psnr, ssim, cycle, rank: one value per picture; see `reca.recipes.metrics`.
    """

    psnr: tuple[float, ...]
    ssim: tuple[float, ...]
    cycle: tuple[float, ...]
    rank: tuple[float, ...]

    def metrics(self, names: Sequence[str]) -> dict[str, float]:
        """Means under plain names, single values under `metric/picture`."""
        values = {
            "psnr": self.psnr,
            "ssim": self.ssim,
            "understanding_cycle": self.cycle,
            "retrieval_rank": self.rank,
        }
        means = {metric: sum(row) / len(row) for metric, row in values.items()}
        singles = {
            f"{metric}/{name}": value
            for metric, row in values.items()
            for name, value in zip(names, row, strict=True)
        }
        return means | singles


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Called by the engine as `evaluate(step, folder)`; deterministic, and equal for a resumed run.

    Attributes:
        sampler: pictures from the model as it is now.
        understanding, target: what the model sees of a photograph, and what it is to reconstruct.
        source: held-out photographs.
        max_pixels: larger photographs are rejected.
        options: how pictures are sampled.
    """

    sampler: Sampler
    understanding: ImageSpec
    target: ImageSpec
    source: Source
    max_pixels: int
    options: SampleOptions

    def __call__(self, step: int, folder: Path) -> dict[str, float]:
        """Reconstruct every held-out photograph and write the contact sheet `step-N.png`; return metrics.

        A photograph that cannot be read is left out. Raises DiskError if the pictures cannot be written.
        """
        photos = self._photos()
        if not photos:
            return {}
        inputs = list(photos.values())
        names = [Path(name).stem for name in photos]
        targets = [resize(photo, self.target) for photo in inputs]
        pictures = self.sampler.reconstruct(inputs, [instruction()] * len(inputs), self.options)
        measured = self.measure(inputs, targets, pictures)
        first = folder / f"step-{0:08d}"
        if step == 0:
            for index, picture in enumerate(pictures):
                write_png(first / f"{index:03d}.png", picture)
        columns: dict[str, Sequence[Image.Image]] = {
            "input": targets,
            "understanding view": [resize(photo, self.understanding) for photo in inputs],
        }
        if step > 0 and (before := _read_pictures(first, len(pictures))):
            columns["reconstruction at step 0"] = before
        columns[f"reconstruction at step {step}"] = pictures
        captions = [
            f"{name}   PSNR {value:.1f} dB   cycle {cosine:.2f}"
            for name, value, cosine in zip(names, measured.psnr, measured.cycle, strict=True)
        ]
        rows = list(zip(*columns.values(), strict=True))
        sheet = contact_sheet(rows, columns=tuple(columns), captions=captions, cell=_CELL)
        write_png(folder / f"step-{step:08d}.png", sheet)
        return measured.metrics(names)

    def measure(
        self, inputs: Sequence[Image.Image], targets: Sequence[Image.Image], pictures: Sequence[Image.Image]
    ) -> Measured:
        """Compare with the targets in pixels, and with the inputs in the model's own understanding."""
        seen, seen_again = self.sampler.understand(inputs).cpu(), self.sampler.understand(pictures).cpu()
        pairs = [
            (_pixels(picture), _pixels(target)) for picture, target in zip(pictures, targets, strict=True)
        ]
        return Measured(
            psnr=tuple(float(psnr(*pair)) for pair in pairs),
            ssim=tuple(float(ssim(*pair)) for pair in pairs),
            cycle=tuple(cycle_similarity(seen, seen_again).tolist()),
            rank=tuple(float(rank) for rank in retrieval_rank(seen, seen_again).tolist()),
        )

    def _photos(self) -> Mapping[str, Image.Image]:
        photos = {}
        for item in range(len(self.source)):
            try:
                photos[self.source.name(item)] = load_image(
                    self.source.read(item), max_pixels=self.max_pixels
                )
            except ImageRejected:
                continue
        return photos


def instruction() -> str:
    """The instruction of every evaluation: the first of those that ship with reca."""
    prompts = Path(str(resources.files("reca.assets"))) / "prompts" / "reconstruction.txt"
    return prompts.read_text(encoding="utf-8").splitlines()[0]


def _pixels(picture: Image.Image) -> Tensor:
    """[1, 3, height, width] fp32 in [-1, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1


def _read_pictures(folder: Path, count: int) -> list[Image.Image]:
    """The pictures of step 0, or none if any of them is missing or cannot be read."""
    try:
        return [load_image(folder / f"{index:03d}.png", max_pixels=1 << 26) for index in range(count)]
    except ImageRejected:
        return []
