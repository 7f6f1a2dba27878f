"""Pixels: decoding that refuses what it cannot trust, resizing as the models were trained, tensors.

Pure functions over Pillow images and torch tensors. Nothing here changes a global of Pillow: a cut file is
rejected, never completed with grey, and a decompression bomb is refused before a pixel of it is decoded.
"""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from reca.errors import DataError

Fit = Literal["native", "center_crop", "squash"]
Filter = Literal["bicubic", "bilinear", "lanczos"]

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}
_JPEG_FILL = (128, 128, 128)
_JPEG_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")  # not a stuffed byte, a restart or a fill byte
_ORIENTATION_TAG = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageRejected(DataError):
    """One image that cannot be used. `reason` is a short sentence without the image's name."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __reduce__(self) -> tuple[type[ImageRejected], tuple[str]]:
        return ImageRejected, (self.reason,)


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """How an image becomes pixels for one encoder; travels with the weights.

    Attributes:
        max_size: longest side in pixels; the side of the square for `center_crop` and `squash`.
        min_size: smaller images are enlarged to this shortest side; `max_size` wins where both conflict.
        stride: both sides are multiples of it.
        fit: `native` keeps the aspect ratio, `center_crop` takes the central square, `squash` stretches.
        filter: Pillow's antialiased filter.
        mean, std: per channel, of pixels in [0, 1]; 0.5 and 0.5 give [-1, 1].
        max_pixels: largest resized area for `native`; None sets no bound.
    """

    max_size: int
    min_size: int
    stride: int
    fit: Fit = "native"
    filter: Filter = "bicubic"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.min_size <= self.max_size or self.stride <= 0:
            raise ValueError(
                f"ImageSpec: expected 0 < min_size <= max_size and stride > 0, "
                f"got min_size={self.min_size}, max_size={self.max_size}, stride={self.stride}"
            )
        if self.fit not in ("native", "center_crop", "squash") or self.filter not in _FILTERS:
            raise ValueError(f"ImageSpec: unknown fit={self.fit!r} or filter={self.filter!r}")
        if self.max_size % self.stride:
            raise ValueError(
                f"ImageSpec: max_size={self.max_size} must be a multiple of stride={self.stride}"
            )
        if min(self.std) <= 0:
            raise ValueError(f"ImageSpec: std must be positive, got {self.std}")


def load_image(source: Path | bytes, *, max_pixels: int) -> Image.Image:
    """Decode one image file to 8-bit RGB, turned upright.

    The content decides the format, not the name; of an animation the first frame is taken. EXIF orientation
    is applied (nothing official says so: there, such photographs lie on their side). Transparency is pasted
    on white.

    Args:
        source: path or the bytes of a JPEG, PNG, WebP, GIF or BMP file.
        max_pixels: images with more pixels are rejected from their header, before anything is decoded.

    Returns: RGB image.
    Raises: ImageRejected with the reason, whatever is wrong with the file.
    """
    try:
        data = source if isinstance(source, bytes) else source.read_bytes()
    except OSError as error:
        raise ImageRejected(f"cannot be read: {error.strerror or error}") from error
    if not data:
        raise ImageRejected("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            Image.init()  # registers Pillow's decoders; without it some of `_FORMATS` are unknown
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise ImageRejected(f"{width}x{height} pixels exceed max_pixels={max_pixels}")
                orientation = _orientation(image)
                image.load()
                rgb = to_rgb(image)
                _refuse_damage(image.format, data, rgb)
    except ImageRejected:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ImageRejected("more pixels than Pillow decodes safely (a decompression bomb?)") from error
    except UnidentifiedImageError as error:
        raise ImageRejected(f"not a JPEG, PNG, WebP, GIF or BMP image (starts with {data[:12]!r})") from error
    except Exception as error:  # hostile files make decoders fail in every way; none may end a run
        raise ImageRejected(f"cannot be decoded: {str(error)[:200] or type(error).__name__}") from error
    return rgb.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else rgb


def _refuse_damage(file_format: str | None, data: bytes, rgb: Image.Image) -> None:
    """Reject what Pillow completes silently: cut JPEG data (with grey), damaged PNG data (with black)."""
    if file_format == "PNG":
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            image.verify()
    elif file_format in ("JPEG", "MPO"):
        end = _jpeg_end(data)
        if end is None:
            raise ImageRejected("the JPEG data has no end marker; the file was cut or overwritten")
        if rgb.getpixel((rgb.width - 1, rgb.height - 1)) != _JPEG_FILL:
            return
        # Bytes put before the marker change nothing in a complete picture, and the grey of an incomplete one.
        longer = data[:end] + b"\x5a" * 4096 + data[end:]
        with Image.open(io.BytesIO(longer), formats=("JPEG",)) as image:
            if to_rgb(image).tobytes() != rgb.tobytes():
                raise ImageRejected("the JPEG data stops early; what is missing would be grey")


def _jpeg_end(data: bytes) -> int | None:
    """Offset of the first picture's end marker: segments carry their length, scans end at a marker."""
    position = 2
    while (marker := _JPEG_MARKER.search(data, position)) is not None:
        if marker[0] == b"\xff\xd9":
            return marker.start()
        position = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2])
    return None


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8; broken metadata around sound pixels counts as upright."""
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB; anything transparent is pasted on white; 16-bit grey is scaled, not clipped.

    Raises: ImageRejected for pixel modes without a defined range (32-bit integer, float).
    """
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageRejected(
            f"pixel mode {image.mode} has no defined range; save the image with 8 or 16 bits per channel"
        )
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGB", rgba.size, (255, 255, 255))
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    return image.convert("RGB")


def resized_size(width: int, height: int, spec: ImageSpec) -> tuple[int, int]:
    """(height, width) in pixels that a source of `width` x `height` gets under `spec`.

    `native`: scale = max(min(max_size / long, 1), min_size / short); each side is rounded, then
    to the nearest multiple of the stride; an area above `max_pixels`, then a side above `max_size`, rescale
    that size again.

    Source: MaxLongEdgeMinShortEdgeResize of BAGEL; all roundings are half to even.
    """
    if width <= 0 or height <= 0:
        raise ValueError(f"resized_size: expected positive sides, got {width}x{height}")
    if spec.fit != "native":
        return spec.max_size, spec.max_size

    def scaled(w: int, h: int, scale: float) -> tuple[int, int]:
        return _to_stride(round(w * scale), spec.stride), _to_stride(round(h * scale), spec.stride)

    scale = max(min(spec.max_size / max(width, height), 1.0), spec.min_size / min(width, height))
    w, h = scaled(width, height, scale)
    if spec.max_pixels is not None and w * h > spec.max_pixels:
        w, h = scaled(w, h, spec.max_pixels / (w * h))
    if max(w, h) > spec.max_size:
        w, h = scaled(w, h, spec.max_size / max(w, h))
    return h, w


def _to_stride(side: int, stride: int) -> int:
    return max(stride, round(side / stride) * stride)


def resize(image: Image.Image, spec: ImageSpec) -> Image.Image:
    """One antialiased Pillow resize to `resized_size`, after cropping if `spec` crops."""
    height, width = resized_size(image.width, image.height, spec)
    box = None
    if spec.fit == "center_crop":
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
    if box is None and image.size == (width, height):
        return image
    cropped = image if box is None else image.crop(box)
    return cropped.resize((width, height), _FILTERS[spec.filter])


def to_tensor(image: Image.Image, spec: ImageSpec) -> Tensor:
    """[3, height, width] fp32: the resized image, (pixel / 255 - mean) / std. `image` is RGB."""
    pixels = torch.from_numpy(np.array(resize(image, spec))).permute(2, 0, 1).to(torch.float32).div_(255)
    mean, std = torch.tensor(spec.mean)[:, None, None], torch.tensor(spec.std)[:, None, None]
    return ((pixels - mean) / std).contiguous()


def to_image(tensor: Tensor) -> Image.Image:
    """RGB image of [3, height, width] pixels in [-1, 1]; values outside are clamped, fractions truncated."""
    if tensor.ndim != 3 or tensor.shape[0] != 3:
        raise ValueError(f"to_image: expected [3, height, width], got {list(tensor.shape)}")
    scaled = (tensor.detach().to("cpu", torch.float32) * 0.5 + 0.5).clamp(0, 1) * 255
    return Image.fromarray(scaled.to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


def patchify(pixels: Tensor, patch: int) -> Tensor:
    """[channels, height, width] -> [rows * cols, patch * patch * channels].

    Tokens in raster order; inside a token (row, column, channel), channel fastest.
    """
    channels, height, width = pixels.shape
    if height % patch or width % patch:
        raise ValueError(f"patchify: sides {height}x{width} must be multiples of patch={patch}")
    grid = pixels.reshape(channels, height // patch, patch, width // patch, patch)
    return grid.permute(1, 3, 2, 4, 0).reshape(-1, patch * patch * channels)


def unpatchify(tokens: Tensor, rows: int, cols: int, patch: int) -> Tensor:
    """Inverse of `patchify`: tokens -> [channels, rows * patch, cols * patch]."""
    if tokens.ndim != 2 or tokens.shape[0] != rows * cols or tokens.shape[1] % (patch * patch):
        raise ValueError(
            f"unpatchify: expected [{rows * cols}, multiple of {patch * patch}] for {rows}x{cols} tokens, "
            f"got {list(tokens.shape)}"
        )
    grid = tokens.reshape(rows, cols, patch, patch, -1)
    return grid.permute(4, 0, 2, 1, 3).reshape(-1, rows * patch, cols * patch)
