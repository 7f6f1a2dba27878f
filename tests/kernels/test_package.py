"""The package: what it exports, what importing it costs, and how launches are chosen and recorded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import reca.kernels
from reca.kernels import _launch
from reca.kernels._launch import (
    TABLE,
    as_rows,
    ceil_div,
    launch,
    launch_config,
    next_power_of_two,
    record_launches,
    rows_per_program,
    tile_shape,
)

FOLDER = Path(reca.kernels.__file__).parent


def test_every_operator_has_its_folder_its_table_and_a_function() -> None:
    folders = {path.parent.name for path in FOLDER.glob("*/op.py")}
    assert set(reca.kernels.OPERATORS) == folders
    assert set(TABLE) == folders
    for name in reca.kernels.OPERATORS:
        files = {path.name for path in (FOLDER / name).glob("*.py")}
        assert files >= {"__init__.py", "kernel.py", "op.py", "reference.py"}


def test_importing_the_kernels_needs_neither_triton_nor_a_device() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, reca.kernels as k\n"
        "assert not torch.cuda.is_initialized()\n"
        "x = torch.ones(2, 3); assert float(k.flow_matching_loss(x, x, x, torch.ones(2))) == 2.0"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


def test_every_entry_of_the_launch_table_gives_its_reason_and_the_last_one_always_holds() -> None:
    for entries in TABLE.values():
        assert all(entry.reason.startswith(("arithmetic: ", "measured: ")) for entry in entries)
        last = entries[-1]
        assert (last.max_width, last.architectures, last.itemsize) == (_launch.ANY_WIDTH, (), None)


def test_the_first_entry_that_holds_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    configs = [_launch.LaunchConfig(tile=1 << n, warps=4) for n in range(4)]
    entries = (
        _launch.Entry(64, configs[0], "arithmetic: x", architectures=(90,)),
        _launch.Entry(64, configs[1], "arithmetic: x", itemsize=4),
        _launch.Entry(64, configs[2], "arithmetic: x"),
        _launch.Entry(_launch.ANY_WIDTH, configs[3], "arithmetic: x"),
    )
    monkeypatch.setitem(TABLE, "toy", entries)
    assert launch_config("toy", 90, torch.bfloat16, 64) is configs[0]
    assert launch_config("toy", 80, torch.float32, 64) is configs[1]
    assert launch_config("toy", 80, torch.bfloat16, 64) is configs[2]
    assert launch_config("toy", 90, torch.bfloat16, 65) is configs[3]


@pytest.mark.parametrize(("n", "power"), [(0, 1), (1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_powers_of_two(n: int, power: int) -> None:
    assert next_power_of_two(n) == power


def test_tiles_hold_at_most_their_elements_and_whole_rows_where_they_fit() -> None:
    assert tile_shape(2048, 64) == (32, 64)
    assert tile_shape(2048, 65) == (16, 128)
    assert tile_shape(2048, 5000) == (1, 2048)


def test_rows_per_program_balance_the_multiprocessors_and_stay_bounded() -> None:
    assert rows_per_program(1, 90) == 1
    assert rows_per_program(32768, 90) == 128
    assert rows_per_program(1 << 30, 90) == _launch.MAX_ROWS_PER_PROGRAM
    assert rows_per_program(300, 0) == next_power_of_two(ceil_div(300, 216))


def test_rows_are_copied_only_where_their_layout_demands_it() -> None:
    x = torch.zeros(4, 6)
    assert as_rows(x[:, 1:4]).data_ptr() == x[:, 1:4].data_ptr()
    assert as_rows(x.view(2, 2, 6)).data_ptr() == x.data_ptr()
    assert as_rows(x.t()).stride(-1) == 1


def test_recorded_launches_are_remembered_and_not_made() -> None:
    x = torch.zeros(3, device="meta")
    with record_launches(90) as recording:
        assert _launch.architecture_of(x) == 90
        launch(None, (2,), x, 7, warps=4, TILE=64)
        launch(None, (0,), x, 7, warps=4, TILE=64)
    (made,) = recording.launches
    assert (made.arguments[1], made.constants, made.warps) == (7, {"TILE": 64}, 4)
    assert _launch.architecture_of(x) == 0
