"""Contact sheets show every picture in its cell, whatever its size and name."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from reca.sheet import contact_sheet, write_png


def test_every_picture_fills_its_cell_in_its_place() -> None:
    rows = [
        [Image.new("RGB", (2, 1), "red"), Image.new("RGB", (3, 3), "blue")],
        [Image.new("RGB", (4, 8), "lime")],
    ]
    sheet = contact_sheet(rows, columns=("a", "b"), captions=("first", "second"), cell=32)
    colours = [
        sheet.getpixel(place) for place in ((9, 45), (39, 59), (49, 45), (79, 75), (9, 103), (23, 133))
    ]
    red, blue, lime = (255, 0, 0), (0, 0, 255), (0, 255, 0)
    assert colours == [red, red, blue, blue, lime, lime]
    assert sheet.size == (2 * 40 + 8, 26 + 2 * (32 + 18 + 8))


def test_pictures_of_any_shape_fit_the_sheet() -> None:
    wide, tall = Image.new("RGB", (400, 100), (1, 2, 3)), Image.new("RGB", (10, 40), (4, 5, 6))
    sheet = contact_sheet([[wide, tall], [tall, wide]], columns=("one", "two"), captions=("a", "b"), cell=192)
    counts = {colour: count for count, colour in sheet.getcolors(1 << 20) or []}
    assert counts[(1, 2, 3)] == 2 * 192 * 48 and counts[(4, 5, 6)] == 2 * 48 * 192


def test_names_beyond_ascii_are_drawn_without_failing() -> None:
    contact_sheet([[Image.new("RGB", (4, 4))]], captions=("naïve 照片 \u202e",))


def test_an_empty_sheet_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one picture"):
        contact_sheet([[]])


def test_a_png_is_written_whole(tmp_path: Path) -> None:
    write_png(tmp_path / "deep" / "sheet.png", Image.new("RGB", (3, 2), "red"))
    with Image.open(tmp_path / "deep" / "sheet.png") as image:
        assert (image.size, image.getpixel((2, 1))) == ((3, 2), (255, 0, 0))
