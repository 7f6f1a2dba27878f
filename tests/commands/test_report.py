"""The report is complete, self-contained and safe to open."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from reca.commands.report import read_jsonl, write_report
from reca.errors import ConfigError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "my run"
    (folder / "samples").mkdir(parents=True)
    (folder / "config.yaml").write_text("recipe: toy  # recipe toy\ndata: <script>alert(1)</script>\n")
    (folder / "run.json").write_text(json.dumps({"recipe": "toy<b>", "versions": {"torch": "2"}}))
    rows = [{"step": i, "loss": 1.0 / i, "lr": 1e-3, "peak_memory_gb": None} for i in range(1, 5)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluations = [{"step": 0, "psnr": 8.25}, {"step": 4, "psnr": 16.5}]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evaluations))
    Image.new("RGB", (4, 4), "red").save(folder / "samples" / "step-00000004.png")
    return folder


def test_the_page_shows_before_and_after_and_loads_nothing(run: Path) -> None:
    page = write_report(run).read_text()
    assert "8.25" in page and "16.5" in page and "<svg" in page and "data:image/png;base64" in page
    assert 'src="http' not in page and "<script" not in page and "<link" not in page


def test_text_of_the_run_is_escaped(run: Path) -> None:
    page = write_report(run).read_text()
    assert "&lt;script&gt;" in page and "toy&lt;b&gt;" in page


def test_an_unfinished_run_says_how_far_it_came(run: Path) -> None:
    assert "not finished; 4 steps logged so far" in write_report(run).read_text()


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st')
    assert read_jsonl(path) == [{"step": 1}]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a run folder"):
        write_report(tmp_path)
