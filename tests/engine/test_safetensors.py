"""safetensors: streamed out bit for bit, and strict reading of what strangers wrote."""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reca.errors import CheckpointError
from reca.files import publish_dir, read_safetensors, verify_dir, write_safetensors


def some_tensors() -> dict[str, torch.Tensor]:
    values = torch.arange(15.0)
    return {
        "odd": values.view(3, 5).bfloat16(),
        "transposed": values.view(3, 5).T,
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.empty(0, 4),
        "mask": values > 7,
        "ids": values.long(),
        "slice": values[3:7].half(),
        "trained": torch.nn.Parameter(values),
        "tiny": values.to(torch.float8_e4m3fn),
    }


def test_tensors_round_trip_through_our_reader_and_the_library(tmp_path: Path) -> None:
    path, tensors = tmp_path / "a.safetensors", some_tensors()
    write_safetensors(path, tensors, {"format": "pt"})
    for found in (read_safetensors(path), load_file(path)):
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
            assert torch.equal(found[name].float(), tensor.detach().float())


def test_tensors_longer_than_one_piece_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reca.files.tensors._PIECE", 24)
    monkeypatch.setattr("reca.files.atomic._OVERLAP", 16)
    with publish_dir(tmp_path / "out") as staging:
        write_safetensors(staging / "a.safetensors", some_tensors())
    verify_dir(tmp_path / "out")
    found = read_safetensors(tmp_path / "out" / "a.safetensors")
    assert all(torch.equal(found[n].float(), t.detach().float()) for n, t in some_tensors().items())


def test_equal_tensors_give_equal_bytes_in_any_order(tmp_path: Path) -> None:
    tensors = some_tensors()
    write_safetensors(tmp_path / "a", tensors)
    write_safetensors(tmp_path / "b", dict(reversed(tensors.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_dtype_without_a_name_in_the_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"'phase' is torch\.complex64"):
        write_safetensors(tmp_path / "a", {"phase": torch.ones(2, dtype=torch.complex64)})
    assert os.listdir(tmp_path) == []


def packed(header: bytes | Mapping[str, object], payload: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + payload


def entry(dtype: str, shape: list[object], start: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


GOOD = entry("F32", [2], 0, 8)
MALFORMED = {
    "no bytes": b"",
    "seven bytes": b"\0" * 7,
    "header of 2^62 bytes": packed({"a": GOOD}, b"\0" * 8, length=1 << 62),
    "header longer than the file": packed({"a": GOOD}, length=500),
    "header above the limit": packed(json.dumps({"a": GOOD}).encode() + b" " * (17 << 20), b"\0" * 8),
    "header is not JSON": packed(b"{'a'"),
    "header is a list": packed(b"[]"),
    "header is not UTF-8": packed(b'{"\xff\xfe": 1}'),
    "header nested 100,000 deep": packed(b'{"a":' * 100_000),
    "half a surrogate in a name": packed(b'{"\\ud800":' + json.dumps(GOOD).encode() + b"}", b"\0" * 8),
    "name twice": packed(b'{"a":%b,"a":%b}' % ((json.dumps(GOOD).encode(),) * 2), b"\0" * 8),
    "overlap": packed({"a": GOOD, "b": entry("F32", [2], 4, 12)}, b"\0" * 12),
    "hole": packed({"a": GOOD, "b": entry("F32", [2], 12, 20)}, b"\0" * 20),
    "shared bytes": packed({"a": GOOD, "b": GOOD}, b"\0" * 8),
    "payload cut": packed({"a": GOOD}, b"\0" * 7),
    "payload too long": packed({"a": GOOD}, b"\0" * 9),
    "end before start": packed({"a": entry("F32", [2], 8, 0)}, b"\0" * 8),
    "negative offset": packed({"a": entry("F32", [2], -8, 0)}, b"\0" * 8),
    "negative size": packed({"a": entry("F32", [-2], 0, 8)}, b"\0" * 8),
    "sizes that overflow": packed({"a": entry("F32", [1 << 62, 8], 0, 8)}, b"\0" * 8),
    "dtype unknown": packed({"a": entry("F33", [2], 0, 8)}, b"\0" * 8),
    "dtype that torch lacks": packed({"a": entry("F6_E2M3", [8], 0, 6)}, b"\0" * 6),
    "dtype of another size": packed({"a": entry("F64", [2], 0, 8)}, b"\0" * 8),
    "entry is a number": packed({"a": 3}),
    "entry without offsets": packed({"a": {"dtype": "F32", "shape": [2]}}, b"\0" * 8),
    "metadata that is no text": packed({"__metadata__": {"a": 3}, "a": GOOD}, b"\0" * 8),
    "an archive of torch.save": b"PK\x03\x04" + b"\0" * 60,
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_safetensors_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / "stranger.safetensors"
    path.write_bytes(MALFORMED[name])
    before = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        read_safetensors(path)
    assert time.process_time() - before < 1
    assert str(path) in str(caught.value) and caught.value.exit_code == 4


def test_a_well_formed_file_of_the_same_maker_is_read(tmp_path: Path) -> None:
    path = tmp_path / "stranger.safetensors"
    path.write_bytes(packed({"a": GOOD}, struct.pack("<2f", 1.5, -2.0)))
    assert read_safetensors(path)["a"].tolist() == [1.5, -2.0]


@pytest.mark.parametrize("name", ["missing", "folder"])
def test_a_safetensors_file_that_cannot_be_opened_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match=name):
        read_safetensors(tmp_path / name)
