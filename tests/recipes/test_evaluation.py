"""What an evaluation measures, writes and reads back."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from reca.images import ImageSpec, resize
from reca.models.family import SampleOptions
from reca.recipes.evaluation import Evaluation, instruction

TARGET = ImageSpec(max_size=24, min_size=24, stride=8, fit="center_crop")
VIEW = ImageSpec(max_size=8, min_size=8, stride=4, fit="center_crop")


def _photo(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8))


def _encoded(photo: Image.Image) -> bytes:
    buffer = io.BytesIO()
    photo.save(buffer, format="PNG")
    return buffer.getvalue()


class Photos:
    """A source in memory."""

    def __init__(self, **files: bytes) -> None:
        self.files = files
        self.ignored: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.files)

    def read(self, item: int) -> bytes:
        return list(self.files.values())[item]

    def name(self, item: int) -> str:
        return f"{list(self.files)[item]}.png"

    def fingerprint(self) -> str:
        return ""


class Painter:
    """A sampler that answers with `picture(input)` and understands the mean colour."""

    def __init__(self, picture) -> None:
        self.picture = picture
        self.prompts: list[str] = []

    def reconstruct(self, images, prompts, options):
        self.prompts += prompts
        return [self.picture(image) for image in images]

    def understand(self, images):
        pixels = [np.array(image, dtype=np.float32).mean((0, 1)) - 127.5 for image in images]
        return torch.from_numpy(np.stack(pixels))


def _evaluation(painter: Painter, **files: bytes) -> Evaluation:
    return Evaluation(
        sampler=painter,
        understanding=VIEW,
        target=TARGET,
        source=Photos(**files),
        max_pixels=10_000,
        options=SampleOptions(steps=2),
    )


def test_a_perfect_reconstruction_has_perfect_scores(tmp_path):
    painter = Painter(lambda image: resize(image, TARGET))
    flat = Image.new("RGB", (30, 30), (255, 0, 0))
    metrics = _evaluation(painter, red=_encoded(flat), noise=_encoded(_photo(0)))(0, tmp_path)
    assert metrics["psnr/red"] == float("inf")
    assert metrics["ssim"] == pytest.approx(1.0)
    assert metrics["understanding_cycle/red"] == pytest.approx(1.0)
    assert metrics["retrieval_rank"] == 1.0
    assert painter.prompts == [instruction()] * 2


def test_the_rank_says_which_input_a_picture_looks_like(tmp_path):
    red, blue = Image.new("RGB", (24, 24), (255, 0, 0)), Image.new("RGB", (24, 24), (0, 0, 255))
    always_red = Painter(lambda image: red)
    metrics = _evaluation(always_red, red=_encoded(red), blue=_encoded(blue))(0, tmp_path)
    assert (metrics["retrieval_rank/red"], metrics["retrieval_rank/blue"]) == (1.0, 2.0)


def test_means_stand_beside_the_value_of_every_picture(tmp_path):
    painter = Painter(lambda image: Image.new("RGB", (24, 24), (90, 120, 200)))
    metrics = _evaluation(painter, a=_encoded(_photo(1)), b=_encoded(_photo(2)))(0, tmp_path)
    for name in ("psnr", "ssim", "understanding_cycle", "retrieval_rank"):
        assert metrics[name] == pytest.approx((metrics[f"{name}/a"] + metrics[f"{name}/b"]) / 2)


def test_later_sheets_show_the_pictures_of_step_0_even_in_a_new_process(tmp_path):
    files = {"a": _encoded(_photo(1)), "b": _encoded(_photo(2))}
    _evaluation(Painter(lambda image: Image.new("RGB", (24, 24), (255, 0, 0))), **files)(0, tmp_path)
    _evaluation(Painter(lambda image: Image.new("RGB", (24, 24), (0, 0, 255))), **files)(7, tmp_path)
    first, later = (Image.open(tmp_path / f"step-{step:08d}.png") for step in (0, 7))
    assert later.width > first.width
    colours = {colour for _, colour in later.getcolors(1 << 20)}
    assert {(255, 0, 0), (0, 0, 255)} <= colours


def test_without_step_0_a_sheet_shows_only_what_there_is(tmp_path):
    files = {"a": _encoded(_photo(1))}
    blue = Painter(lambda image: Image.new("RGB", (24, 24), (0, 0, 255)))
    _evaluation(blue, **files)(7, tmp_path)
    assert (255, 0, 0) not in {
        colour for _, colour in Image.open(tmp_path / "step-00000007.png").getcolors(1 << 20)
    }
    assert not (tmp_path / "step-00000000").exists()


def test_the_same_model_gives_the_same_bytes(tmp_path):
    files = {"a": _encoded(_photo(1))}
    for folder in ("one", "two"):
        _evaluation(Painter(lambda image: resize(image, TARGET)), **files)(0, tmp_path / folder)
    one, two = (tmp_path / folder / "step-00000000.png" for folder in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_a_photograph_that_cannot_be_read_is_left_out(tmp_path):
    painter = Painter(lambda image: resize(image, TARGET))
    metrics = _evaluation(painter, broken=b"no image", fine=_encoded(_photo(3)))(0, tmp_path)
    assert "psnr/fine" in metrics and "psnr/broken" not in metrics


def test_nothing_held_out_gives_no_metrics_and_no_picture(tmp_path):
    assert _evaluation(Painter(lambda image: image))(0, tmp_path) == {}
    assert list(tmp_path.iterdir()) == []
