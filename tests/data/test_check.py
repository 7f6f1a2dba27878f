"""`reca data check` and `reca data preview`, with a variant of known sizes in place of a real one."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from rich.console import Console

from reca.commands import data as command
from reca.config import DataConfig
from reca.data import load_prompts
from reca.errors import ConfigError, DataError
from reca.images import ImageSpec

MakeJpeg = Callable[..., bytes]
VARIANT = SimpleNamespace(
    understanding=ImageSpec(max_size=28, min_size=28, stride=14),
    target=ImageSpec(max_size=64, min_size=32, stride=16),
)


@pytest.fixture(autouse=True)
def variant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "get_variant", lambda name: (None, VARIANT))


@pytest.fixture
def folder(tmp_path: Path, make_jpeg: MakeJpeg) -> Path:
    path = tmp_path / "set"
    path.mkdir()
    (path / "a [bold].jpg").write_bytes(make_jpeg(0, width=64, height=64))
    (path / "b.jpg").write_bytes(make_jpeg(0, width=64, height=64))
    (path / "c.jpg").write_bytes(make_jpeg(1, width=20, height=40))
    (path / "d.jpg").write_bytes(make_jpeg(2, width=900, height=300))
    (path / "empty.jpg").write_bytes(b"")
    (path / "page.png").write_bytes(b"<html>")
    return path


@pytest.mark.parametrize("workers", [0, 2])
def test_check_counts_explains_and_estimates(folder: Path, workers: int) -> None:
    text = command._prompt_tokens(None)
    result = command.check(str(folder), "toy/s", DataConfig(workers=workers, images=3))
    assert (result["images"], result["usable"]) == (6, 4)
    assert {row["name"]: row["reason"][:14] for row in result["rejected"]} == {
        "empty.jpg": "the file is em",
        "page.png": "not a JPEG, PN",
    }
    assert result["duplicates"] == [["a [bold].jpg", "b.jpg"]]
    assert result["enlarged"] == 1
    assert {k: n for k, n in result["short_sides"].items() if n} == {"1-255": 3, "256-511": 1}
    # 64x64 -> 2x2 and 4x4 tokens; 20x40 -> 1x2 and 2x4; 900x300 -> 2x1 and 4x1
    assert result["tokens"]["most"] - text == 20 and result["tokens"]["least"] - text == 6
    assert result["tokens"]["mean"] == pytest.approx(text + (20 + 20 + 10 + 6) / 4, abs=0.05)
    assert (result["steps_per_epoch"], result["images_per_step"]) == (2, 2.0)
    assert json.loads(json.dumps(result)) == result


def test_check_counts_steps_of_several_packs(folder: Path) -> None:
    limits = {"workers": 0, "images": 1}
    steps = [command.check(str(folder), "toy/s", DataConfig(**limits, packs=n)) for n in (1, 3)]
    assert [result["steps_per_epoch"] for result in steps] == [4, 2]


def test_check_lists_samples_that_are_too_long(folder: Path) -> None:
    text = command._prompt_tokens(None)
    limits = DataConfig(workers=0, max_sample_tokens=text + 19, max_tokens=text + 19)
    result = command.check(str(folder), "toy/s", limits)
    assert result["usable"] == 2 and result["steps_per_epoch"] == 2
    reason = f"about {text + 20} tokens exceed max_sample_tokens={text + 19}"
    assert {"name": "b.jpg", "reason": reason} in result["rejected"]


def test_check_of_nothing_usable_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"none of the 1 images in .* can be used; 1\.jpg: the file is empty"):
        command.check(str(tmp_path), "toy/s", DataConfig(workers=0))
    with pytest.raises(DataError, match=r"none of the 1 images in .* can be used; 1\.jpg: the file is empty"):
        command.preview(str(tmp_path), "toy/s", tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()


def test_check_of_conversations_counts_their_words_and_their_understanding_view(
    folder: Path, tmp_path: Path
) -> None:
    turns = [{"from": "human", "value": "<image>\nwhat is it"}, {"from": "gpt", "value": "a red cat"}]
    entries = [
        {"image": "b.jpg", "conversations": turns},
        {"image": "b.jpg", "conversations": [turns[0], {"from": "gpt", "value": "cat"}]},
        {"image": "missing.jpg", "conversations": turns},
        {"conversations": turns},
    ]
    (tmp_path / "talk.json").write_text(json.dumps(entries))
    result = command.check(
        str(tmp_path / "talk.json"), "toy/s", DataConfig(workers=0), task="image_to_text", root=folder
    )
    assert (result["images"], result["usable"], result["task"]) == (3, 2, "image_to_text")
    assert [row["name"] for row in result["rejected"]] == ["talk.json:3"]
    assert sum(result["ignored"].values()) == 1
    assert result["duplicates"] == []  # the same picture, but other words
    # 2x2 tokens of the understanding view, markers, and 1.3 tokens for each of 6 or 4 words
    assert (result["tokens"]["most"], result["tokens"]["least"]) == (
        4 + command._MARKERS + 8,
        4 + command._MARKERS + 5,
    )


def test_check_of_captions_counts_their_words_and_the_target_view(folder: Path) -> None:
    (folder / "b.txt").write_text("a red cat")
    (folder / "c.txt").write_text("  ")
    result = command.check(str(folder), "toy/s", DataConfig(workers=0), task="text_to_image")
    assert (result["images"], result["usable"]) == (2, 1)
    assert [row["reason"] for row in result["rejected"]] == ["caption c.txt is empty"]
    assert result["tokens"]["most"] == 16 + command._MARKERS + 4


def test_a_task_or_a_root_that_means_nothing_is_a_configuration_error(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown task 'image_to_txt'; .*image_to_text"):
        command.check(str(folder), "toy/s", task="image_to_txt")
    with pytest.raises(ConfigError, match="--root would be ignored"):
        command.check(str(folder), "toy/s", root=folder)


def test_the_report_for_people_shows_names_as_they_are(folder: Path) -> None:
    result = command.check(str(folder), "toy/s", DataConfig(workers=0))
    result["rejected"] += [{"name": f"{k}.jpg", "reason": "[red]no"} for k in range(30)]
    buffer = io.StringIO()
    command.render_check(result, Console(file=buffer, width=120))
    text = buffer.getvalue()
    assert "a [bold].jpg = b.jpg" in text and "[red]no" in text
    assert "6, 4 usable, 32 rejected" in text and "... and 12 more rows; --json lists all" in text


def test_preview_shows_both_views_of_usable_images(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "sheets" / "preview.png"
    result = command.preview(str(folder), "toy/s", out, images=3)
    assert [row["name"] for row in result["images"]] == ["a [bold].jpg", "c.jpg", "b.jpg"]
    assert result["images"][1] == {"name": "c.jpg", "understanding": (14, 28), "target": (32, 64)}
    assert [row["name"] for row in result["rejected"]] == ["empty.jpg"]
    with Image.open(out) as sheet:
        views = [sheet.crop((8 + k * 264, 44, 8 + k * 264 + 256, 300)) for k in range(2)]
    # 28x28 pixels enlarged without smoothing show fewer colours than 64x64 smooth ones
    assert len(set(views[0].get_flattened_data())) <= 28 * 28
    assert len(set(views[1].get_flattened_data())) > 28 * 28


def test_an_unknown_model_is_a_configuration_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="unknown model family 'bagle'; did you mean 'bagel'"):
        command.check(str(folder), "bagle/7b")


# The instructions that ship, and those of users


def test_the_shipped_instructions_are_many_different_and_of_every_length() -> None:
    prompts = load_prompts(None)
    assert len(prompts) >= 320
    plain = {"".join(c for c in prompt.lower() if c.isalnum()) for prompt in prompts}
    assert len(plain) == len(prompts)
    words = sorted(len(prompt.split()) for prompt in prompts)
    assert words[0] >= 2 and words[-1] <= 45
    assert 14 <= sum(words) / len(words) <= 22
    assert sum(n <= 6 for n in words) >= 20 and sum(n >= 25 for n in words) >= 20


def test_no_shipped_instruction_is_another_with_a_word_exchanged() -> None:
    sets = [frozenset(prompt.lower().split()) for prompt in load_prompts(None) if len(prompt.split()) > 4]
    closest = max(len(a & b) / len(a | b) for k, a in enumerate(sets) for b in sets[:k])
    assert closest < 0.6
    openings = [" ".join(prompt.lower().split()[:3]) for prompt in load_prompts(None)]
    assert max(openings.count(opening) for opening in openings) <= 4


def test_prompt_files_that_cannot_be_used_say_why(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    with pytest.raises(DataError, match=r"cannot read the prompts in .*prompts\.txt: No such file"):
        load_prompts(path)
    path.write_text("\n \n")
    with pytest.raises(DataError, match="holds no instructions; write one per line"):
        load_prompts(path)
    path.write_bytes(b"caf\xe9\n")
    with pytest.raises(DataError, match="must be UTF-8 text with one instruction per line"):
        load_prompts(path)
    path.write_text("x" * 2_001)
    with pytest.raises(DataError, match="an instruction of 2001 characters; the limit is 2000"):
        load_prompts(path)
