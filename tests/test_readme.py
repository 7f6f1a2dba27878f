"""The README's lines about kernels run as they stand, with tensors of the shapes that it states."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from reca.kernels import OPERATORS
from reca.kernels.testing import make_normal

README = Path(__file__).resolve().parents[1] / "README.md"
ROWS, DIM, INNER, VOCABULARY, CHANNELS = 6, 32, 40, 50, 8


def snippets() -> list[str]:
    text = README.read_text("utf-8")
    section = text[text.index("<!-- kernels:") : text.index("<!-- /kernels -->")]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def normal(*shape: int) -> torch.Tensor:
    return make_normal(*shape, seed=sum(shape))


def tensors() -> dict[str, Any]:
    angles = normal(ROWS, 4)
    schedule = torch.rand(10, 8, generator=torch.Generator().manual_seed(0)) + 0.1
    flat = {name: normal(64).abs() for name in ("weight", "gradient", "m", "v")}
    rows = {name: normal(ROWS, DIM) for name in ("branch", "residual", "shift", "scale", "gate")}
    latents = {name: normal(ROWS, CHANNELS) for name in ("clean", "noise", "velocity")}
    heads = {f"image_{name}": normal(2, 5, 3, 8) for name in ("query", "key", "value")}
    return {
        **flat,
        **rows,
        **latents,
        **heads,
        "hidden": normal(ROWS, DIM).requires_grad_(True),
        "labels": torch.tensor([3, -100, 0, 7, 49, 1]),
        "lm_head": nn.Linear(DIM, VOCABULARY, bias=False),
        "norm": nn.LayerNorm(DIM),
        "qkv": normal(ROWS, 8 * 8),
        "q_weight": normal(8),
        "k_weight": normal(8),
        "cos": angles.cos(),
        "sin": angles.sin(),
        "gate_up": nn.Linear(DIM, 2 * INNER, bias=False),
        "down": nn.Linear(INNER, DIM, bias=False),
        "fc1": nn.Linear(DIM, INNER),
        "fc2": nn.Linear(INNER, DIM),
        "features": normal(3, DIM),
        "image_rows": torch.tensor([1, 4, 5]),
        "time": torch.tensor([0.2, 0.7]),
        "image_of_token": torch.tensor([0, 0, 0, 1, 1, 1]),
        "project": nn.Linear(CHANNELS, DIM),
        "to_velocity": nn.Linear(DIM, CHANNELS),
        "mask": torch.ones(ROWS),
        "timestep": torch.tensor([0, 3, 9, 1, 2, 5]),
        "schedule": schedule,
        "output": normal(ROWS, 2 * CHANNELS),
        "step": torch.tensor(5),
        "sample_ids": torch.tensor([11, 12]),
        "bounds": torch.tensor([0, 2, ROWS]),
        "lengths": (2, ROWS - 2),
        "packed_qkv": normal(ROWS, 3, 2, 16),
        "pixels": normal(2, 3, 3, 12),
        "depthwise": nn.Conv2d(12, 12, 3, groups=12),
        "markers": normal(4, 64),
        "lr": torch.tensor(1e-3),
        "updates": torch.tensor(0.0),
    }


@pytest.mark.parametrize("snippet", snippets(), ids=lambda text: text.split("import ")[1].split("\n")[0])
def test_the_lines_of_the_readme_run(snippet: str) -> None:
    given = tensors()
    if "quantize_nf4" in snippet:
        given["lm_head"] = nn.Linear(64, VOCABULARY, bias=False)  # NF4 has a scale for each 64 weights
    exec(compile(snippet, "README.md", "exec"), given)
    for name in ("loss", "hidden", "normed", "few", "gated", "attended", "placed", "latents"):
        if isinstance(given.get(name), torch.Tensor):
            assert torch.isfinite(given[name]).all(), name
    assert len(snippet.splitlines()) <= 7


def test_every_operator_is_on_the_page() -> None:
    text = README.read_text("utf-8")
    table = text[text.index("## Kernels alone") : text.index("<details>")]
    public = {"adaln_modulation": "layer_norm_modulate", "adamw": "adamw_"}
    for operator in OPERATORS:
        assert f"`{public.get(operator, operator)}`" in table, operator


def test_the_launches_on_the_page_are_those_of_the_results_file() -> None:
    text = README.read_text("utf-8")
    table = text[text.index("<!-- launches -->") : text.index("<!-- /launches -->")]
    lines = (README.parent / "benchmarks/results/launches/results.jsonl").read_text("utf-8").splitlines()
    rows = [row.split("|") for row in table.splitlines()[3:]]
    assert len(rows) == len(lines)
    for row, line in zip(rows, lines, strict=True):
        counted = json.loads(line)["launches"]
        work = counted["official"]["ours_for_the_same_samples"] if row[2].strip() else counted["parts"][0]
        for cell, kernels in zip(row[3:5], ("reference", "auto"), strict=True):
            assert cell.strip() == f"{work[kernels]['launches']:,}, {work[kernels]['gb']:,.0f} GB"
