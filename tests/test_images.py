"""Pixels as the official code makes them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from reca.images import (
    ImageSpec,
    patchify,
    resize,
    resized_size,
    to_image,
    to_rgb,
    to_tensor,
    unpatchify,
)

PACK = Path(__file__).parent / "data" / "parity" / "bagel" / "preprocess"
SPECS = {
    "small_vae": ImageSpec(64, 32, 16, max_pixels=1_806_336),
    "small_vit": ImageSpec(28, 28, 14, max_pixels=1_806_336),
    "small_vit_infer": ImageSpec(98, 28, 14, max_pixels=1_806_336),
    "reca_vae": ImageSpec(1024, 512, 16, max_pixels=1_806_336),
    "reca_vit": ImageSpec(224, 224, 14, max_pixels=1_806_336),
    "infer_vit": ImageSpec(980, 224, 14, max_pixels=1_806_336),
}


@pytest.mark.parity
@pytest.mark.parametrize("case", range(5))
def test_pixels_are_those_of_the_official_transforms(case: int) -> None:
    inputs, expected = load_file(PACK / "inputs.safetensors"), load_file(PACK / "expected.safetensors")
    rgb = to_rgb(Image.fromarray(inputs[f"image_uint8.{case}"].numpy()))
    assert torch.equal(torch.from_numpy(np.array(rgb)), expected[f"rgb.{case}"])
    resized = resize(rgb, SPECS["small_vae"])
    for name, image, spec in (
        ("vae", rgb, "small_vae"),
        ("vit", rgb, "small_vit"),
        ("infer_vae", resized, "small_vae"),
        ("infer_vit", resized, "small_vit_infer"),
    ):
        got, want = to_tensor(image, SPECS[spec]), expected[f"{name}.{case}"]
        assert got.shape == want.shape and (got - want).abs().max() <= 1e-6, name


@pytest.mark.parity
@pytest.mark.parametrize("name", ["reca_vae", "reca_vit", "infer_vit"])
def test_sizes_are_those_of_the_official_transforms(name: str) -> None:
    inputs, expected = load_file(PACK / "inputs.safetensors"), load_file(PACK / "expected.safetensors")
    got = [resized_size(int(w), int(h), SPECS[name]) for w, h in inputs["source_sizes_wh"]]
    assert got == [(int(h), int(w)) for h, w in expected[f"sizes.{name}"]]


def test_a_large_area_is_scaled_down_to_max_pixels() -> None:
    spec = ImageSpec(max_size=1024, min_size=512, stride=16, max_pixels=500_000)
    # 1024 * 500_000 / 1024^2 = 488 = 30.5 strides, which rounds to the even 30
    assert resized_size(1024, 1024, spec) == (480, 480)


@pytest.mark.parametrize("size", [(1, 9000), (9000, 1), (1, 1), (3, 5)])
def test_extreme_shapes_keep_within_the_bounds(size: tuple[int, int]) -> None:
    for spec in SPECS.values():
        height, width = resized_size(*size, spec)
        assert height % spec.stride == width % spec.stride == 0
        assert spec.stride <= min(height, width) and max(height, width) <= spec.max_size
        assert to_tensor(Image.new("RGB", size, (10, 20, 30)), spec).shape == (3, height, width)


def test_center_crop_takes_the_central_square() -> None:
    image = Image.new("RGB", (90, 30), (255, 0, 0))
    image.paste((0, 255, 0), (30, 0, 60, 30))
    spec = ImageSpec(max_size=16, min_size=16, stride=8, fit="center_crop")
    expected = torch.tensor([-1.0, 1.0, -1.0])[:, None, None].expand(3, 16, 16)
    assert torch.equal(to_tensor(image, spec), expected)


def test_squash_stretches_the_whole_image() -> None:
    image = Image.new("RGB", (90, 30), (255, 0, 0))
    image.paste((0, 0, 255), (45, 0, 90, 30))
    pixels = to_tensor(image, ImageSpec(max_size=16, min_size=16, stride=8, fit="squash"))
    assert pixels.shape == (3, 16, 16)
    assert torch.equal(pixels[:, 0, 0], torch.tensor([1.0, -1.0, -1.0]))
    assert torch.equal(pixels[:, -1, -1], torch.tensor([-1.0, -1.0, 1.0]))


def test_normalisation_uses_mean_and_std_of_each_channel() -> None:
    spec = ImageSpec(8, 8, 8, mean=(0.25, 0.5, 0.0), std=(0.5, 0.25, 1.0))
    pixels = to_tensor(Image.new("RGB", (8, 8), (255, 0, 51)), spec)
    assert torch.allclose(pixels[:, 0, 0], torch.tensor([1.5, -2.0, 0.2]))


def test_the_filter_changes_the_pixels() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (47, 61, 3), dtype=np.uint8)
    image, spec = Image.fromarray(noise), SPECS["small_vae"]
    outcomes = {f: to_tensor(image, replace(spec, filter=f)) for f in ("bicubic", "bilinear", "lanczos")}
    assert not torch.equal(outcomes["bicubic"], outcomes["bilinear"])
    assert not torch.equal(outcomes["bicubic"], outcomes["lanczos"])


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_size": 64},
        {"stride": 0},
        {"stride": 7},
        {"fit": "pad"},
        {"filter": "nearest"},
        {"std": (1.0, 0.0, 1.0)},
    ],
)
def test_impossible_specs_are_refused(wrong: dict[str, object]) -> None:
    fields = {"max_size": 32, "min_size": 16, "stride": 8} | wrong
    with pytest.raises(ValueError, match="ImageSpec"):
        ImageSpec(**fields)  # type: ignore[arg-type]


def test_patchify_puts_channels_innermost_and_unpatchify_inverts_it() -> None:
    pixels = torch.arange(3 * 4 * 6, dtype=torch.float32).view(3, 4, 6)
    tokens = patchify(pixels, 2)
    assert tokens.shape == (6, 12)
    assert torch.equal(tokens[1], pixels[:, 0:2, 2:4].permute(1, 2, 0).flatten())
    assert torch.equal(unpatchify(tokens, 2, 3, 2), pixels)
    with pytest.raises(ValueError, match="multiples of patch=4"):
        patchify(pixels, 4)
    with pytest.raises(ValueError, match="expected \\[5, multiple of 4\\]"):
        unpatchify(tokens, 1, 5, 2)


def test_to_image_clamps_and_truncates() -> None:
    column = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0])
    image = to_image(column.expand(3, 1, 5))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 127, 255, 255]
    with pytest.raises(ValueError, match=r"\[3, height, width\]"):
        to_image(torch.zeros(1, 3, 4, 4))
