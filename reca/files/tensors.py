"""safetensors in and out: streamed, atomic, and strict about what is read.

Layout (github.com/huggingface/safetensors): 8 bytes little-endian header length, JSON header, payload without
holes. The library's own writer ignores the umask and replaces links and devices; its reader is used to read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reca.errors import CheckpointError
from reca.files.atomic import write_chunks

if TYPE_CHECKING:
    from torch import Tensor

_PIECE = 64 << 20  # bytes that leave the device at a time: what a save costs in host memory
_MAX_HEADER = 16 << 20  # far above the largest known model; a hostile header costs no more than this
_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}


def _code(name: str, tensor: Tensor) -> str:
    code = _DTYPES.get(str(tensor.dtype).removeprefix("torch."))
    if code is None:
        raise TypeError(f"write_safetensors: {name!r} is {tensor.dtype}, which safetensors cannot hold")
    return code


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, list[str], int]:
    """The length and JSON header, the names in the order of the payload, and the bytes of the payload."""
    specs = {
        name: (tensor.element_size(), tensor.nbytes, _code(name, tensor), list(tensor.shape))
        for name, tensor in tensors.items()
    }
    # Wide dtypes first, as in the library: every tensor is then aligned to its own element size.
    ordered = sorted(specs, key=lambda name: (-specs[name][0], name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in ordered:
        _, size, code, shape = specs[name]
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, ordered, offset


def _pieces(header: bytes, tensors: Iterator[Tensor]) -> Iterator[bytes | memoryview]:
    import torch

    yield header
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        step = _PIECE // tensor.element_size()
        for start in range(0, flat.numel(), step):
            yield flat[start : start + step].cpu().view(torch.uint8).numpy().data


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors of any device to one safetensors file, whole or not at all.

    Equal inputs give equal bytes, whatever the order of the mapping. It costs 64 MiB of host memory.

    Raises: DiskError if the file system refuses; TypeError for a dtype that the format does not know.
    """
    header, ordered, payload = _header(tensors, metadata or {})
    # One at a time: a mapping may make its tensors only when it is asked for them.
    write_chunks(path, _pieces(header, (tensors[name] for name in ordered)), len(header) + payload)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _checked_header(path: Path) -> None:
    """Refuse absurd lengths and duplicate names; the library checks all the rest."""
    with path.open("rb") as file:
        size = path.stat().st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise ValueError(f"header of {length:,} bytes in a file of {size:,}")
        json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_unique)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU, mapped from the file rather than copied.

    Raises: CheckpointError, naming the file, for whatever is not a well-formed safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        _checked_header(path)
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, ValueError, TypeError, KeyError, RecursionError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} is not a usable safetensors file: {error}; fetch or copy it again"
        ) from error
