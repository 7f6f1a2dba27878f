"""Contact sheets: pictures in rows and columns with captions, on white."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from reca.files import write_atomic

_MARGIN, _CAPTION, _FONT_SIZE = 8, 18, 12


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]],
    *,
    columns: Sequence[str] = (),
    captions: Sequence[str] = (),
    cell: int = 256,
) -> Image.Image:
    """Draw pictures in a grid; each is scaled to fill its cell, small ones with visible pixels.

    Args:
        rows: pictures of each row; rows may be of different length.
        columns: title above each column.
        captions: line of text above each row.
        cell: pixels along the longest side of a picture.
    """
    if not rows or not any(rows):
        raise ValueError("contact_sheet: expected at least one picture")
    width = max(len(row) for row in rows) * (cell + _MARGIN) + _MARGIN
    heights = [max(_scaled(image, cell)[1] for image in row) for row in rows]
    top = _MARGIN + (_CAPTION if columns else 0)
    sheet = Image.new("RGB", (width, top + sum(heights) + len(rows) * (_CAPTION + _MARGIN)), (255, 255, 255))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT_SIZE)
    for number, title in enumerate(columns):
        draw.text((_MARGIN + number * (cell + _MARGIN), _MARGIN), title, fill=(0, 0, 0), font=font)
    for number, (row, height) in enumerate(zip(rows, heights, strict=True)):
        if number < len(captions):
            draw.text((_MARGIN, top), _drawable(captions[number]), fill=(90, 90, 90), font=font)
        for column, image in enumerate(row):
            size = _scaled(image, cell)
            sampling = Image.Resampling.NEAREST if max(image.size) < cell else Image.Resampling.LANCZOS
            sheet.paste(image.resize(size, sampling), (_MARGIN + column * (cell + _MARGIN), top + _CAPTION))
        top += height + _CAPTION + _MARGIN
    return sheet


def _scaled(image: Image.Image, cell: int) -> tuple[int, int]:
    scale = cell / max(image.size)
    return max(1, round(image.width * scale)), max(1, round(image.height * scale))


def _drawable(text: str) -> str:
    """Pillow's built-in font knows ASCII only."""
    return text.encode("ascii", "replace").decode()


def write_png(path: Path, image: Image.Image) -> None:
    """Write a PNG file, whole or not at all. Raises DiskError."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())
