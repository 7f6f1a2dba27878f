"""Every kernel compiled for six architectures without a GPU, held against a golden file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from reca.kernels import OPERATORS
from reca.kernels.offline import ARCHITECTURES, CASES, SHARED_LIMIT, compile_all, narrow_products
from reca.kernels.offline_cases import NARROW_ACCESS

GOLDEN = Path(__file__).with_name("golden_compile.json")
GROWTH = 1.10
WATCHED = ("registers", "shared_bytes", "instructions")
PROGRAM = """
import dataclasses, json, sys
from reca.kernels.offline import compile_all
json.dump([dataclasses.asdict(row) for row in compile_all(map(int, sys.argv[1:]))], sys.stdout)
"""


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """All compiled kernels; in processes whose Triton compiles instead of interpreting, one per core."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    halves = (ARCHITECTURES[::2], ARCHITECTURES[1::2])
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", PROGRAM, *map(str, half)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for half in halves
    ]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    return [row for output in outputs for row in json.loads(output)]


def key(row: dict[str, Any]) -> str:
    return f"{row['kernel']}@sm_{row['architecture']}"


def complaints(rows: list[dict[str, Any]], golden: dict[str, dict[str, int]]) -> Iterator[str]:
    """One line for everything that grew by more than a tenth, is new, or is gone."""
    measured = {key(row): row for row in rows}
    for name in sorted(golden.keys() ^ measured.keys()):
        yield f"{name} is {'gone' if name in golden else 'new'}"
    for name in sorted(golden.keys() & measured.keys()):
        for field in WATCHED:
            before, now = golden[name][field], measured[name][field]
            # A handful is noise of register allocation, not growth.
            if now > max(GROWTH * before, before + 8):
                yield f"{name}: {field} grew from {before} to {now}"


def test_every_kernel_was_compiled_for_every_architecture(rows: list[dict[str, Any]]) -> None:
    assert {row["architecture"] for row in rows} == set(ARCHITECTURES)
    assert {row["kernel"].split("/")[0] for row in rows} == set(CASES)
    assert {
        operator for operator in OPERATORS if not any(case.startswith(operator) for case in CASES)
    } == set()


def test_no_kernel_spills(rows: list[dict[str, Any]]) -> None:
    assert [key(row) for row in rows if row["spills"]] == []


def test_shared_memory_fits_every_architecture(rows: list[dict[str, Any]]) -> None:
    over = [key(row) for row in rows if row["shared_bytes"] > 1024 * SHARED_LIMIT[row["architecture"]]]
    assert over == []


def test_every_kernel_moves_16_bytes_per_access_unless_it_says_why(rows: list[dict[str, Any]]) -> None:
    narrow = [row for row in rows if not (row["loads_128"] and row["stores_128"])]
    assert [key(row) for row in narrow if row["kernel"].split("/")[0] not in NARROW_ACCESS] == []


def test_offsets_that_grow_with_the_input_are_64_bits_wide(rows: list[dict[str, Any]]) -> None:
    assert [key(row) for row in rows if row["narrow_products"]] == []


def test_nothing_grew_beyond_the_golden_file(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    lines = [f'"{key(row)}": {json.dumps({field: row[field] for field in WATCHED})}' for row in rows]
    candidate = tmp_path / GOLDEN.name
    body = ",\n".join(sorted(lines))
    candidate.write_text(f'{{"triton": "{version("triton")}", "kernels": {{\n{body}\n}}}}\n')
    stored = json.loads(GOLDEN.read_text())
    if stored["triton"] != version("triton"):
        pytest.skip(f"the golden file was made with Triton {stored['triton']}, this is {version('triton')}")
    found = list(complaints(rows, stored["kernels"]))
    assert found == [], f"if this is meant, replace {GOLDEN.name} by {candidate}"


def test_the_gate_sees_growth_and_missing_kernels() -> None:
    golden = {"a@sm_90": {"registers": 100, "shared_bytes": 0, "instructions": 500}}
    row = {"kernel": "a", "architecture": 90, "registers": 100, "shared_bytes": 0, "instructions": 500}
    assert list(complaints([row], golden)) == []
    assert list(complaints([row | {"registers": 111}], golden)) == ["a@sm_90: registers grew from 100 to 111"]
    assert list(complaints([row | {"kernel": "b"}], golden)) == ["a@sm_90 is gone", "b@sm_90 is new"]


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("%0 = arith.extsi %stride : i32 to i64\n%1 = arith.muli %0, %row : i64", 0),
        ("%c = arith.constant 2 : i32\n%0 = arith.muli %stride, %c : i32", 0),
        ("%0 = tt.splat %stride : i32 -> tensor<8xi32>\n%1 = arith.muli %0, %rows : tensor<8xi32>", 1),
        ("%0 = arith.muli %pid, %stride : i32 loc(#loc3)", 1),
    ],
)
def test_the_gate_sees_offsets_of_32_bits(body: str, found: int) -> None:
    header = "tt.func public @kernel(%x: !tt.ptr<f32>, %stride: i32 {tt.divisibility = 16 : i32}) {"
    assert narrow_products(f"{header}\n{body}\n}}") == found


@pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="this process compiles")
def test_a_process_whose_triton_interprets_refuses_to_compile() -> None:
    with pytest.raises(
        RuntimeError, match=r"^compile_all: Triton interprets in this process.*unset TRITON_INT"
    ):
        compile_all()
