"""Official weights: streamed in, strict, and written back bit for bit."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reca.errors import CheckpointError, DiskError
from reca.files.atomic import Sink
from reca.models.checkpoint import Slot, find_shards, load_slots, read_header, save_slots

CPU = torch.device("cpu")
SLOTS = {
    "q.weight": Slot("qkv.weight", 0, 3),
    "k.weight": Slot("qkv.weight", 3, 5),
    "v.weight": Slot("qkv.weight", 5),
    "conv.weight": Slot("project.weight", shape=(2, 3, 1, 1)),
    "scale": Slot("scale"),
    "steps": Slot("steps"),
    "table": Slot("table", is_computed=True),
}


class Toy(nn.Module):
    """Fused rows, a reshaped weight, a frozen parameter, an integer buffer and a computed table."""

    steps: Tensor
    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(3, 7, bias=False)
        self.project = nn.Linear(3, 2, bias=False).requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("steps", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("table", torch.arange(4.0))


def official(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "q.weight": (3, 3),
        "k.weight": (2, 3),
        "v.weight": (2, 3),
        "conv.weight": (2, 3, 1, 1),
        "scale": (),
    }
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return {**tensors, "steps": torch.tensor([5, 6]), "table": torch.arange(4.0).to(dtype)}


def on_meta() -> Toy:
    with torch.device("meta"):
        model = Toy()
    model.table = torch.arange(4.0)
    return model


def write(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, path)
    return path


def test_fused_and_reshaped_parameters_come_to_life_from_meta(tmp_path: Path) -> None:
    tensors, model = official(torch.float32), on_meta()
    load_slots(model, SLOTS, write(tmp_path / "w.safetensors", tensors), device=CPU)
    assert torch.equal(model.qkv.weight, torch.cat([tensors[f"{n}.weight"] for n in "qkv"]))
    assert torch.equal(model.project.weight, tensors["conv.weight"][..., 0, 0])
    assert torch.equal(model.scale, tensors["scale"])
    assert torch.equal(model.steps, tensors["steps"])
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["scale", "qkv.weight"]


def test_trained_parameters_are_fp32_and_frozen_ones_what_is_asked(tmp_path: Path) -> None:
    path = write(tmp_path / "w.safetensors", official())
    model = on_meta()
    load_slots(model, SLOTS, path, device=CPU)
    assert (model.qkv.weight.dtype, model.project.weight.dtype) == (torch.float32, torch.bfloat16)
    load_slots(model, SLOTS, path, device=CPU, trained_dtype=None, frozen_dtype=torch.float16)
    assert (model.qkv.weight.dtype, model.project.weight.dtype) == (torch.bfloat16, torch.float16)
    assert model.steps.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_a_round_trip_gives_the_same_bits_and_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors, model = official(dtype), on_meta()
    tensors["conv.weight"] = tensors["conv.weight"].float()
    stored = load_slots(model, SLOTS, write(tmp_path / "in.safetensors", tensors), device=CPU)
    assert model.qkv.weight.dtype == torch.float32
    save_slots(model, SLOTS, tmp_path / "out.safetensors", dtypes=stored)
    back = load_file(tmp_path / "out.safetensors")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype, name
        assert torch.equal(back[name], tensor), name


_STATUS = """
import sys, torch
from pathlib import Path
from torch import nn
from reca.models.checkpoint import Slot, load_slots, save_slots

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))
"""
_MEASURE = """
with torch.device("meta"):
    model = nn.ModuleList(nn.Linear(1024, 2048, bias=False) for _ in range(16))
rows = {0: (0, 1024), 1: (1024, 2048)}
slots = {f"{i}.{half}": Slot(f"{i}.weight", *rows[half]) for i in range(16) for half in rows}
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
load_slots(model, slots, Path(sys.argv[1]), device=torch.device("cpu"))
print((status("VmHWM") - before) / sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_loading_costs_little_more_host_memory_than_the_model_itself(tmp_path: Path) -> None:
    halves = {f"{i}.{half}": torch.ones(1024, 1024) for i in range(16) for half in (0, 1)}
    path = write(tmp_path / "w.safetensors", halves)
    command = [sys.executable, "-P", "-c", _STATUS + _MEASURE, str(path)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert 0.9 < float(result.stdout) < 1.2


def test_an_export_may_fix_one_dtype_for_all_floating_tensors(tmp_path: Path) -> None:
    save_slots(Toy(), SLOTS, tmp_path / "out.safetensors", dtypes=torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in load_file(tmp_path / "out.safetensors").items()}
    assert dtypes.pop("steps") == torch.int64
    assert set(dtypes.values()) == {torch.bfloat16}


def test_values_that_the_model_computes_are_checked_but_not_taken(tmp_path: Path) -> None:
    model = on_meta()
    wrong = official() | {"table": torch.full((4,), 9.0)}
    load_slots(model, SLOTS, write(tmp_path / "w.safetensors", wrong), device=CPU)
    assert torch.equal(model.table, torch.arange(4.0))
    with pytest.raises(CheckpointError, match=r"table: expected \[4\], got \[5\]"):
        load_slots(
            model, SLOTS, write(tmp_path / "v.safetensors", wrong | {"table": torch.ones(5)}), device=CPU
        )


def test_shards_are_found_with_and_without_an_index(tmp_path: Path) -> None:
    tensors = official(torch.float32)
    first = {name: tensors.pop(name) for name in ("k.weight", "table")}
    write(tmp_path / "a.safetensors", first)
    write(tmp_path / "b.safetensors", tensors)
    model = on_meta()
    load_slots(model, SLOTS, tmp_path, device=CPU)
    assert torch.equal(model.qkv.weight[3:5], first["k.weight"])
    write(tmp_path / "other.safetensors", {"stranger": torch.ones(1)})
    index = dict.fromkeys(first, "a.safetensors") | dict.fromkeys(tensors, "b.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    load_slots(on_meta(), SLOTS, tmp_path, device=CPU)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"b\.safetensors, not found beside it"):
        load_slots(on_meta(), SLOTS, tmp_path, device=CPU)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"weights": {}}'])
def test_a_broken_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="expected an index with a weight_map"):
        find_shards(tmp_path)


def test_an_index_may_not_point_outside_its_folder(tmp_path: Path) -> None:
    write(tmp_path / "w.safetensors", official())
    (tmp_path / "sub").mkdir()
    index = {"weight_map": {"q.weight": "../w.safetensors"}}
    (tmp_path / "sub" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"\.\./w\.safetensors"):
        find_shards(tmp_path / "sub")


def test_a_tensor_in_two_files_is_ambiguous(tmp_path: Path) -> None:
    for name in ("ema.safetensors", "model.safetensors"):
        write(tmp_path / name, official())
    with pytest.raises(CheckpointError, match=r"ema\.safetensors and in .*model\.safetensors; name one"):
        load_slots(on_meta(), SLOTS, tmp_path, device=CPU)


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="found none"):
        find_shards(tmp_path)
    with pytest.raises(CheckpointError, match="found nothing there"):
        find_shards(tmp_path / "nowhere")


def test_a_cut_file_is_refused_before_the_model_is_touched(tmp_path: Path) -> None:
    path = write(tmp_path / "w.safetensors", official())
    path.write_bytes(path.read_bytes()[:-1])
    model = on_meta()
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        load_slots(model, SLOTS, path, device=CPU)
    assert model.qkv.weight.is_meta


def test_an_unknown_dtype_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "w.safetensors", {"scale": torch.ones(2).to(torch.float8_e4m3fn)})
    with pytest.raises(CheckpointError, match="scale has dtype F8_E4M3"):
        read_header([path])


def test_all_differences_and_their_likely_cause_are_in_one_error(tmp_path: Path) -> None:
    tensors = official()
    del tensors["k.weight"]
    tensors["extra"] = torch.ones(1)
    tensors["q.weight"] = torch.ones(4, 3)
    model = on_meta()
    with pytest.raises(CheckpointError) as caught:
        load_slots(model, SLOTS, write(tmp_path / "w.safetensors", tensors), device=CPU)
    text = str(caught.value)
    assert "of 7 expected tensors 1 missing (k.weight); 1 unexpected (extra); 1 misshapen" in text
    assert "q.weight: expected [3, 3], got [4, 3]" in text
    assert "another variant" in text
    assert model.qkv.weight.is_meta


def test_the_likely_cause_follows_what_differs(tmp_path: Path) -> None:
    cases = {
        "another family": {"stranger": torch.ones(1)},
        "other layers": official() | {"extra": torch.ones(1)},
        "incomplete": {name: tensor for name, tensor in official().items() if name != "scale"},
    }
    for cause, tensors in cases.items():
        with pytest.raises(CheckpointError, match=cause):
            load_slots(on_meta(), SLOTS, write(tmp_path / f"{cause}.safetensors", tensors), device=CPU)


def test_long_lists_show_ten_names_and_the_rest_as_a_count(tmp_path: Path) -> None:
    tensors = official() | {f"extra.{i:02d}": torch.ones(1) for i in range(13)}
    with pytest.raises(CheckpointError, match=r"13 unexpected \(.*extra\.09, and 3 more\)") as caught:
        load_slots(on_meta(), SLOTS, write(tmp_path / "w.safetensors", tensors), device=CPU)
    assert "extra.10" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q.weight": Slot("qkv.weight", 0, 2)}, "must tile its rows"),
        ({"v.weight": Slot("qkv.weight", 5, 6)}, "must tile all 7 rows"),
        ({"q.weight": Slot("nowhere")}, "which the model does not have"),
    ],
)
def test_a_mistake_in_the_table_of_slots_is_a_programming_error(
    tmp_path: Path, change: dict[str, Slot], message: str
) -> None:
    path = write(tmp_path / "w.safetensors", official())
    with pytest.raises(ValueError, match=message):
        load_slots(on_meta(), SLOTS | change, path, device=CPU)


_MEASURE_SAVING = """
model = nn.ModuleList(nn.Linear(1024, 2048, bias=False) for _ in range(16))
rows = {0: (0, 1024), 1: (1024, 2048)}
whole = {f"{i}": Slot(f"{i}.weight") for i in range(16)}
halves = {f"{i}.{half}": Slot(f"{i}.weight", *rows[half]) for i in range(16) for half in rows}
for slots in (whole, halves):
    path = Path(sys.argv[1]) / "w.pth"
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    save_slots(model, slots, path)
    print((status("VmHWM") - before) / path.stat().st_size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_a_pickled_file_costs_at_most_one_copy_of_the_rows_of_larger_tensors(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-c", _STATUS + _MEASURE_SAVING, str(tmp_path)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    whole, halves = map(float, result.stdout.split())
    assert whole < 0.1 and 0.9 < halves < 1.1


def test_rows_of_one_parameter_are_pickled_as_tensors_of_their_own(tmp_path: Path) -> None:
    save_slots(Toy(), SLOTS, tmp_path / "w.pth")
    for tensor in torch.load(tmp_path / "w.pth", weights_only=True).values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_a_disk_that_fills_up_while_pickling_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "w.pth"
    save_slots(Toy(), SLOTS, path)
    before = path.read_bytes()

    def full(sink: Sink, chunk: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Sink, "write", full)
    with pytest.raises(DiskError, match=r"w\.pth: No space left on device .*free some space"):
        save_slots(Toy(), SLOTS, path)
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == ["w.pth"]
