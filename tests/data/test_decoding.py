"""Decoding: expected pixels or a reason, whatever the file is like."""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin

from reca.images import (
    ImageRejected,
    load_image,
    to_rgb,
)

LIMIT = 100_000_000


def picture(width: int = 61, height: int = 47, mode: str = "RGB") -> Image.Image:
    """Smooth colours with some noise: compresses like a photograph, and no two regions are equal."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    waves = [np.sin(x / 7 + k) + np.cos(y / 5 - k) for k in range(4)]
    noise = np.random.default_rng(3).normal(0, 6, (height, width, 4))
    pixels = (np.stack(waves, -1) * 50 + 120 + noise).clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels, "RGBA").convert(mode)


def encoded(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def loaded(data: bytes) -> np.ndarray:
    return np.asarray(load_image(data, max_pixels=LIMIT))


def reason_of(data: bytes | Path) -> str:
    with pytest.raises(ImageRejected) as caught:
        load_image(data, max_pixels=LIMIT)
    return caught.value.reason


# Sound files of every kind


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "GIF", "WEBP"])
def test_lossless_formats_give_their_pixels(file_format: str) -> None:
    image = picture(mode="L" if file_format == "GIF" else "RGB")
    options = {"lossless": True} if file_format == "WEBP" else {}
    assert np.array_equal(loaded(encoded(image, file_format, **options)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpegs_stay_close_to_the_picture(mode: str, progressive: bool) -> None:
    image = picture().convert(mode)
    got = loaded(encoded(image, "JPEG", quality=97, subsampling=0, progressive=progressive)).astype(int)
    assert np.abs(got - np.asarray(image.convert("RGB")).astype(int)).mean() < 3


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    values = np.array([[0, 128, 32768, 65535]], dtype=np.uint16)
    assert loaded(encoded(Image.fromarray(values), "PNG"))[0, :, 0].tolist() == [0, 0, 128, 255]


def test_one_bit_images_are_black_and_white() -> None:
    image = Image.new("1", (9, 5))
    image.putpixel((4, 2), 1)
    got = loaded(encoded(image, "PNG"))
    assert got[2, 4].tolist() == [255, 255, 255] and got.sum() == 3 * 255


@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette", "RGB key", "L key"])
def test_transparency_lies_on_white(kind: str) -> None:
    if kind in ("RGBA", "LA"):
        image = Image.new("RGBA", (8, 6), (200, 0, 0, 0)).convert(kind)
        options: dict[str, object] = {}
    elif kind == "palette":
        image = Image.new("P", (8, 6), 1)
        image.putpalette([0, 0, 0, 200, 0, 0])
        options = {"transparency": 1}
    else:
        image = Image.new(kind.split()[0], (8, 6), (200, 0, 0) if kind == "RGB key" else 77)
        options = {"transparency": (200, 0, 0) if kind == "RGB key" else 77}
    assert (loaded(encoded(image, "PNG", **options)) == 255).all()


def test_half_transparent_pixels_are_blended_with_white() -> None:
    image = Image.new("RGBA", (4, 4), (0, 100, 255, 51))
    assert loaded(encoded(image, "PNG"))[0, 0].tolist() == [204, 224, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied(orientation: int, file_format: str) -> None:
    upright = np.zeros((16, 32, 3), dtype=np.uint8)
    upright[:8, :16] = 255  # white in the upper left corner only
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, 3),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = (
        {"lossless": True} if file_format == "WEBP" else {"quality": 95} if file_format == "JPEG" else {}
    )
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), file_format, exif=exif, **options)
    assert np.abs(loaded(data).astype(int) - upright).max() < 8


def test_broken_exif_does_not_cost_the_image() -> None:
    image = picture()
    data = encoded(image, "JPEG", exif=b"Exif\0\0MM\0*garbage that is no directory at all", quality=95)
    assert loaded(data).shape == (47, 61, 3)


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP"])
def test_the_first_frame_of_an_animation_is_taken(file_format: str) -> None:
    first, second = Image.new("RGB", (12, 10), (255, 0, 0)), Image.new("RGB", (12, 10), (0, 0, 255))
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = encoded(first, file_format, save_all=True, append_images=[second], duration=40, **options)
    assert loaded(data)[5, 5].tolist() == [255, 0, 0]


def test_pictures_after_the_first_of_a_multi_picture_file_are_ignored() -> None:
    frames = [picture(), Image.new("RGB", (61, 47))]
    data = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:], quality=95)
    assert np.array_equal(loaded(data), loaded(encoded(frames[0], "JPEG", quality=95)))


def test_the_content_decides_the_format_not_the_name(tmp_path: Path) -> None:
    path = tmp_path / "really-a-png.jpg"
    path.write_bytes(encoded(picture(), "PNG"))
    assert np.array_equal(np.asarray(load_image(path, max_pixels=LIMIT)), np.asarray(picture()))


@pytest.mark.parametrize("tail", [b"\0" * 999, b"\xff\xda\xff\xd9 video \xff\xda"])
def test_data_after_the_end_of_a_jpeg_is_ignored(tail: bytes) -> None:
    data = encoded(picture(), "JPEG")
    assert np.array_equal(loaded(data + tail), loaded(data))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_picture_that_ends_in_mid_grey_is_not_taken_for_a_cut_one(
    mode: str, options: dict[str, object]
) -> None:
    image = picture(95, 63)
    image.paste((128, 128, 128), (0, 30, 95, 63))
    assert loaded(encoded(image.convert(mode), "JPEG", **options))[-1, -1].tolist() == [128] * 3


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (700, 1)])
def test_the_smallest_images_are_accepted(size: tuple[int, int]) -> None:
    assert load_image(encoded(picture(*size), "PNG"), max_pixels=LIMIT).size == size


# Files that must be refused


CUTTABLE = {
    "jpeg": encoded(picture(), "JPEG"),
    "progressive jpeg": encoded(picture(), "JPEG", progressive=True),
    "cmyk jpeg": encoded(picture().convert("CMYK"), "JPEG"),
    "png": encoded(picture(), "PNG"),
    "palette png": encoded(picture().convert("P"), "PNG"),
    "webp": encoded(picture(), "WEBP"),
    "lossless webp": encoded(picture(), "WEBP", lossless=True),
    "gif": encoded(picture(mode="L"), "GIF"),
    "bmp": encoded(picture(), "BMP"),
}


@pytest.mark.parametrize("kind", CUTTABLE)
def test_a_cut_file_gives_its_pixels_or_a_reject_never_grey(kind: str) -> None:
    data = CUTTABLE[kind]
    whole = loaded(data)
    rejected = 0
    for offset in [*range(0, len(data), len(data) // 20), *range(len(data) - 16, len(data))]:
        try:
            assert np.array_equal(loaded(data[:offset]), whole), f"cut at {offset} of {len(data)}"
        except ImageRejected:
            rejected += 1
    assert rejected >= 20


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("part", [0.6, 0.75, 0.9])
def test_a_cut_jpeg_with_a_forged_end_is_refused(mode: str, part: float) -> None:
    data = encoded(picture(mode=mode), "JPEG")
    assert reason_of(data[: int(len(data) * part)] + b"\xff\xd9") == (
        "the JPEG data stops early; what is missing would be grey"
    )


@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_a_download_filled_up_with_zeros_is_refused(kind: str) -> None:
    data = CUTTABLE[kind]
    cut = int(len(data) * 0.8)  # beyond the headers
    reason_of(data[:cut] + bytes(8 * len(data)))


def test_flipped_bits_of_a_png_are_noticed() -> None:
    data = CUTTABLE["png"]
    for offset in range(60, len(data) - 20, len(data) // 25):
        reason_of(data[:offset] + bytes([data[offset] ^ 4]) + data[offset + 1 :])


def test_pillow_is_left_as_it_was() -> None:
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, PngImagePlugin.MAX_TEXT_CHUNK
    reason_of(CUTTABLE["jpeg"][:900])
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, PngImagePlugin.MAX_TEXT_CHUNK)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    row = zlib.compress(bytes(width + 1))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", row) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [13_000, 60_000])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(
    side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    assert "decompression bomb" in reason_of(png_header(side, side))


def test_our_own_limit_holds_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(picture(61, 47), "PNG")
    assert load_image(data, max_pixels=61 * 47).size == (61, 47)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageRejected, match="61x47 pixels exceed max_pixels=2866"):
        load_image(data, max_pixels=61 * 47 - 1)


def test_a_text_bomb_is_refused() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "a" * 80_000_000, zip=True)
    data = encoded(picture(), "PNG", pnginfo=info)
    assert len(data) < 200_000
    assert "Decompressed data too large" in reason_of(data)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "the file is empty"),
        (
            b"<!DOCTYPE html><html>404</html>",
            "not a JPEG, PNG, WebP, GIF or BMP image (starts with b'<!DOCTYPE ht')",
        ),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not a JPEG"),
        (b"\xff\xd8\xff", "not a JPEG"),
        (bytes(4096), "not a JPEG"),
    ],
)
def test_what_is_no_image_is_refused_with_its_beginning(data: bytes, expected: str) -> None:
    assert reason_of(data).startswith(expected)


def test_a_missing_file_is_a_reject_like_any_other(tmp_path: Path) -> None:
    assert reason_of(tmp_path / "gone.jpg") == "cannot be read: No such file or directory"
    assert reason_of(tmp_path) == "cannot be read: Is a directory"


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_a_range_are_refused(mode: str) -> None:
    with pytest.raises(ImageRejected, match="no defined range"):
        to_rgb(Image.new(mode, (4, 4)))


def test_a_reject_survives_the_way_back_from_a_worker_process() -> None:
    copy = pickle.loads(pickle.dumps(ImageRejected("the file is empty")))
    assert isinstance(copy, ImageRejected) and copy.reason == str(copy) == "the file is empty"
