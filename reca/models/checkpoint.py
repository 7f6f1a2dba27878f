"""Official weights in and out: streamed tensor by tensor, strict, bit-identical on the way back.

A family states, as data, where each official tensor lives in its own model: a `Slot` is a run of rows of one
parameter or buffer, so that tensors which are separate in the official file may be fused here. Reading fills
a model that was built on the meta device tensor by tensor; host memory stays near the size of the model.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from reca.errors import CheckpointError
from reca.files import open_atomic, write_safetensors

_LISTED = 10
PICKLED = (".bin", ".pth", ".pt", ".ckpt")
"""Suffixes of files that `torch.save` wrote; they are read with `weights_only=True`, which runs no code."""
# A mapped file counts as resident memory until it is closed, so it is opened anew after this many bytes.
_MAPPED_BYTES = 16 << 20
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one official tensor lives: rows `start:stop` of a parameter or buffer.

    Attributes:
        parameter: dotted name in the model.
        start, stop: rows along the first dimension; None is the end.
        shape: the official shape where it differs from the rows' by a reshape.
        is_computed: the model computes these values itself: on reading only the shape is checked, the file's
            values (perhaps of lower precision) are left; on writing they are written.
        is_tied: a second name of rows that another slot fills: on reading it may be missing, and only its
            shape is checked; on writing it is written.
    """

    parameter: str
    start: int = 0
    stop: int | None = None
    shape: tuple[int, ...] | None = None
    is_computed: bool = False
    is_tied: bool = False

    def rows(self, tensor: Tensor) -> Tensor:
        """The slot's view of its parameter, in our shape."""
        whole = self.start == 0 and self.stop is None
        return tensor if whole else tensor[self.start : self.stop]

    def official(self, tensor: Tensor) -> Tensor:
        """The slot's view of its parameter, in the official shape."""
        rows = self.rows(tensor)
        return rows if self.shape is None else rows.reshape(self.shape)


@dataclass(frozen=True, slots=True)
class Stored:
    """What a file says of one tensor, without reading it."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


def find_shards(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint: a file itself, the shards of an index, or all files of a folder.

    Raises: CheckpointError if there are none, or if the index names a file that is missing.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: expected weights as a safetensors file or a folder of them, found nothing there"
        )
    indexes = sorted(path.glob("*.safetensors.index.json"))
    if not indexes:
        shards = sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
        if not shards:
            raise CheckpointError(
                f"{path}: expected *.safetensors files, found none; give the folder of a release"
            )
        return shards
    try:
        names = sorted(set(json.loads(indexes[0].read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{indexes[0]}: expected an index with a weight_map, got {error!r}") from error
    missing = [name for name in names if not (path / name).is_file() or Path(name).name != name]
    if missing:
        raise CheckpointError(
            f"{indexes[0]} names {_listed(missing)}, not found beside it; copy the missing shards"
        )
    return [path / name for name in names]


def read_header(shards: Sequence[Path]) -> dict[str, Stored]:
    """Name -> shape and dtype of every tensor in some files. Raises CheckpointError for a broken file."""
    header: dict[str, Stored] = {}
    for shard in shards:
        if shard.suffix in PICKLED:
            header |= {n: Stored(shard, tuple(t.shape), t.dtype) for n, t in read_pickled(shard).items()}
            continue
        try:
            with safe_open(shard, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    view = file.get_slice(name)
                    if view.get_dtype() not in _DTYPES:
                        raise CheckpointError(
                            f"{shard}: {name} has dtype {view.get_dtype()}, expected one of {[*_DTYPES]}"
                        )
                    if name in header:
                        raise CheckpointError(
                            f"{name} is in {header[name].file} and in {shard}; name one of the files"
                        )
                    header[name] = Stored(shard, tuple(view.get_shape()), _DTYPES[view.get_dtype()])
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{shard}: not a complete safetensors file ({error}); copy it again"
            ) from error
    return header


def read_pickled(path: Path) -> dict[str, Tensor]:
    """The flat state dict of a file that `torch.save` wrote, mapped from the file where its format allows.

    A state dict under the key `model` or `state_dict` is taken; what lies beside it is left out.

    Raises: CheckpointError if it is missing, broken, holds anything but tensors by name, or would run code.
    """
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before torch 1.6 cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise CheckpointError(f"{path}: not a readable file of tensors ({reason}); copy it again") from error
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(entry, Tensor) for entry in content.values()):
        raise CheckpointError(
            f"{path}: expected tensors by name, got {type(content).__name__} of other things"
        )
    return content


def read_tensors(header: Mapping[str, Stored], names: Sequence[str]) -> dict[str, Tensor]:
    """Some tensors of a checkpoint, by name, as the files hold them."""
    tensors: dict[str, Tensor] = {}
    for shard in sorted({header[name].file for name in names}):
        inside = [name for name in names if header[name].file == shard]
        tensors |= {name: tensor.clone() for name, tensor in _stream(shard, inside)}
    return tensors


def load_slots(
    model: nn.Module,
    slots: Mapping[str, Slot],
    path: Path,
    *,
    device: torch.device,
    frozen_dtype: torch.dtype | None = None,
    trained_dtype: torch.dtype | None = torch.float32,
    ignored: tuple[str, ...] = (),
) -> dict[str, torch.dtype]:
    """Fill the parameters named by `slots` from an official checkpoint, tensor by tensor.

    Everything is checked against the files' headers before anything is read. Parameters on the meta device
    come to life on `device`; host memory grows by little more than one tensor beyond the model.

    Args:
        model: usually built under `torch.device("meta")`.
        slots: official name -> place; the slots of one parameter must tile its rows.
        path: safetensors file, or folder of them with or without an index; or one file of `torch.save`.
        frozen_dtype: floating dtype of parameters that are not trained and of buffers; None keeps the file's.
        trained_dtype: the same for parameters with `requires_grad`.
        ignored: beginnings of names in the file that this model has no use for.

    Returns: official name -> dtype in the file, which `save_slots` takes to write the same bits back.
    Raises: CheckpointError listing what is missing, unexpected and misshapen.
    """
    tensors = named_tensors(model)
    _check_tiling(slots, tensors)
    header = {
        n: e for n, e in read_header(find_shards(path)).items() if not (ignored and n.startswith(ignored))
    }
    _check_header(path, header, slots, tensors)
    by_file: dict[Path, list[str]] = {}
    for name, slot in slots.items():
        if not slot.is_computed and not slot.is_tied:
            by_file.setdefault(header[name].file, []).append(name)
    alive: dict[str, Tensor] = {}
    for shard, names in by_file.items():
        for name, tensor in _stream(shard, names):
            slot = slots[name]
            if slot.parameter not in alive:
                old = tensors[slot.parameter]
                dtype = trained_dtype if old.requires_grad else frozen_dtype
                kept = dtype is None or not tensor.is_floating_point()
                alive[slot.parameter] = _materialise(
                    model, slot.parameter, tensor.dtype if kept else dtype, device
                )
            rows = slot.rows(alive[slot.parameter])
            rows.copy_(tensor.reshape(rows.shape))
    return {name: header[name].dtype for name in slots if name in header}


def _stream(shard: Path, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of one file; each is valid until the next is asked for."""
    if shard.suffix in PICKLED:
        content = read_pickled(shard)
        yield from ((name, content[name]) for name in names)
        return
    position = 0
    while position < len(names):
        mapped = 0
        with safe_open(shard, framework="pt") as file:
            while position < len(names) and mapped < _MAPPED_BYTES:
                tensor = file.get_tensor(names[position])
                mapped += tensor.nbytes
                yield names[position], tensor
                position += 1
                del tensor


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by dotted name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@torch.no_grad()
def _materialise(model: nn.Module, name: str, dtype: torch.dtype | None, device: torch.device) -> Tensor:
    """Uninitialised memory in place of one parameter or buffer; what to train stays as it was."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    old = getattr(owner, leaf)
    new = torch.empty(old.shape, dtype=dtype, device=device)
    if isinstance(old, nn.Parameter):
        setattr(owner, leaf, nn.Parameter(new, requires_grad=old.requires_grad))
    else:
        setattr(owner, leaf, new)
    return new


def _check_tiling(slots: Mapping[str, Slot], tensors: Mapping[str, Tensor]) -> None:
    """A mistake in a family's table is a bug, whatever the file holds."""
    covered: dict[str, list[tuple[int, int]]] = {}
    for slot in slots.values():
        if slot.parameter not in tensors:
            raise ValueError(f"slots name {slot.parameter!r}, which the model does not have")
        if slot.is_tied:
            continue
        num_rows = tensors[slot.parameter].shape[0] if tensors[slot.parameter].ndim else 1
        covered.setdefault(slot.parameter, []).append(
            (slot.start, num_rows if slot.stop is None else slot.stop)
        )
    for name, runs in covered.items():
        end = 0
        for start, stop in sorted(runs):
            if start != end:
                raise ValueError(f"slots of {name!r} must tile its rows, got {sorted(runs)}")
            end = stop
        if end != (tensors[name].shape[0] if tensors[name].ndim else 1):
            raise ValueError(
                f"slots of {name!r} must tile all {tensors[name].shape[0]} rows, got {sorted(runs)}"
            )


def official_shapes(slots: Mapping[str, Slot], tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Official name -> official shape of every slot."""
    shapes = {}
    for name, slot in slots.items():
        rows = slot.rows(tensors[slot.parameter])
        shapes[name] = tuple(rows.shape) if slot.shape is None else slot.shape
    return shapes


def _check_header(
    path: Path, header: Mapping[str, Stored], slots: Mapping[str, Slot], tensors: Mapping[str, Tensor]
) -> None:
    """Compare names and shapes; one error lists all that differs and its likely cause."""
    shapes = official_shapes(slots, tensors)
    missing = [name for name, slot in slots.items() if name not in header and not slot.is_tied]
    unexpected = [name for name in header if name not in slots]
    misshapen = [
        f"{name}: expected {list(shape)}, got {list(header[name].shape)}"
        for name, shape in shapes.items()
        if name in header and header[name].shape != shape
    ]
    if not missing and not unexpected and not misshapen:
        return
    # families share some names; another variant, or missing shards, leave one of the two lists short
    if sum(name in header for name in slots) < min(len(missing), len(unexpected)):
        cause = "these are weights of another family, or in a converted format; give the official files"
    elif misshapen:
        cause = "another variant of this family; choose the variant that the file belongs to"
    elif unexpected:
        cause = "a variant with other layers or parts; choose the variant that the file belongs to"
    else:
        cause = "the checkpoint is incomplete; copy it again, with all its shards"
    found = [
        f"{len(names)} {what} ({_listed(names)})"
        for names, what in ((missing, "missing"), (unexpected, "unexpected"), (misshapen, "misshapen"))
        if names
    ]
    raise CheckpointError(
        f"{path}: of {len(slots)} expected tensors {'; '.join(found)}.\nLikely cause: {cause}."
    )


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f", and {more} more" if more > 0 else "")


def save_slots(
    model: nn.Module,
    slots: Mapping[str, Slot],
    path: Path,
    *,
    dtypes: Mapping[str, torch.dtype] | torch.dtype | None = None,
    key: str | None = None,
    extra: Mapping[str, Tensor] | None = None,
) -> None:
    """Write one official file: every slot under its official name, atomically; the suffix gives the format.

    Host memory grows by the tensors that are cast; a file of `torch.save` also takes a copy of those that lie
    on a device or are rows of a larger one: at most once the size of the file.

    Args:
        dtypes: what `load_slots` returned, so that unchanged tensors come back bit for bit; or one dtype for
            all floating tensors; None keeps the model's own.
        key: under which a file of `torch.save` holds its tensors; None puts them at the top.
        extra: tensors of the official file that no slot holds; they are written as they are.

    Raises: DiskError if the file cannot be written.
    """
    tensors = named_tensors(model)
    _check_tiling(slots, tensors)
    official = {name: slot.official(tensors[slot.parameter].detach()) for name, slot in slots.items()}
    if isinstance(dtypes, torch.dtype):
        dtypes = {name: dtypes for name, tensor in official.items() if tensor.is_floating_point()}
    for name, dtype in (dtypes or {}).items():
        if official[name].dtype != dtype:
            # On the host: a cast copy of the trained half does not fit beside a full accelerator.
            official[name] = official[name].to("cpu", dtype)
    official |= extra or {}
    if path.suffix in PICKLED:
        content = {name: _alone(tensor) for name, tensor in official.items()}
        _write_pickled(path, content if key is None else {key: content})
        return
    write_safetensors(path, official, {"format": "pt"})


def _alone(tensor: Tensor) -> Tensor:
    """The tensor on the host as all of its storage: torch.save writes whole storages, shared ones once."""
    tensor = tensor.to("cpu").contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _write_pickled(path: Path, content: Mapping[str, Any]) -> None:
    with open_atomic(path) as sink:
        try:
            torch.save(content, cast("IO[bytes]", sink))
        except RuntimeError as error:
            # torch hides what the file system said behind an error of its own
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
