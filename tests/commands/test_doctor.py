"""`reca doctor` tells what is there, why not the rest, and survives whatever is broken."""

from __future__ import annotations

import importlib
import json
import subprocess
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from reca.commands import doctor
from reca.layers.attention_backends import BACKENDS, import_failure


@pytest.fixture
def fresh_imports() -> Iterator[None]:
    """Import outcomes are asked again, and forgotten afterwards."""
    import_failure.cache_clear()
    yield
    import_failure.cache_clear()


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=150_754_820_096)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def shown(capsys: pytest.CaptureFixture[str], report: dict[str, Any]) -> str:
    doctor.render(report)
    return capsys.readouterr().out


def test_the_report_is_json_and_names_every_section() -> None:
    report = json.loads(json.dumps(doctor.collect()))
    assert list(report) == ["machine", "versions", "attention", "kernels", "packages", "profilers", "disk"]
    assert report["versions"]["torch"] == torch.__version__
    assert report["versions"]["python"].startswith("3.")
    assert report["machine"]["cores"] >= 1
    assert report["machine"]["ram_gb"] > 0.1
    assert 0 < report["disk"]["free_gb"] <= report["disk"]["total_gb"]
    assert set(report["profilers"]) == {"nsys", "ncu"}


@pytest.mark.usefixtures("without_gpu")
def test_without_a_gpu_every_backend_has_a_verdict_and_auto_is_sdpa(
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = doctor.collect()
    assert set(report["attention"]) == {"cpu fp32"}
    choice = report["attention"]["cpu fp32"]
    assert choice["auto"] == "sdpa"
    assert choice["why_not"].keys() == BACKENDS.keys() - {"counted"}
    assert choice["why_not"]["sdpa"] is None
    assert choice["why_not"]["varlen"] == "needs a CUDA device, got cpu"
    assert report["machine"]["gpus"] == []
    assert report["kernels"]["why_not_fused"] == "needs a CUDA device; the reference runs instead"
    text = shown(capsys, report)
    assert "attention, cpu fp32: auto takes sdpa" in text
    assert "varlen     no: needs a CUDA device, got cpu" in text
    assert "sdpa       usable" in text
    assert f"gpu        none: {report['machine']['why_no_gpu']}" in text


@pytest.mark.usefixtures("with_gpu")
def test_with_a_gpu_its_name_memory_and_choice_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    report = doctor.collect()
    assert report["machine"]["gpus"] == [
        {"name": "NVIDIA H200", "compute_capability": "9.0", "memory_gb": 150.8}
    ]
    assert report["machine"]["why_no_gpu"] is None
    assert report["attention"]["cuda bf16"]["why_not"]["varlen"] is None
    assert report["attention"]["cuda bf16"]["auto"] in ("flash3", "flash4", "varlen")
    assert "gpu 0      NVIDIA H200, 150.8 GB, compute 9.0" in shown(capsys, report)


@pytest.mark.parametrize(
    ("cuda", "reason"),
    [
        (None, "this torch is built without CUDA"),
        ("13.0", "torch is built for CUDA 13.0 but finds no usable device or driver"),
    ],
)
@pytest.mark.usefixtures("without_gpu")
def test_a_missing_gpu_has_a_reason(monkeypatch: pytest.MonkeyPatch, cuda: str | None, reason: str) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert doctor.collect()["machine"]["why_no_gpu"] == reason


@pytest.mark.usefixtures("fresh_imports", "without_gpu")
def test_a_broken_package_is_a_line_of_the_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.import_module

    def some_are_broken(name: str, package: str | None = None) -> ModuleType:
        if name == "bitsandbytes":
            raise OSError("libcudart.so.13: cannot open shared object file\ntry again")
        if name == "flash_attn.flash_attn_interface":
            raise ImportError("undefined symbol: _ZN3c10")
        if name in ("triton", "xformers", "xformers.ops"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", some_are_broken)
    report = doctor.collect()
    broken = "bitsandbytes is broken: OSError: libcudart.so.13: cannot open shared object file"
    assert report["packages"]["bitsandbytes"]["why_not"] == broken
    assert report["packages"]["xformers"] == {"version": None, "why_not": "xformers is not installed"}
    undefined = "flash_attn.flash_attn_interface is broken: ImportError: undefined symbol: _ZN3c10"
    assert report["attention"]["cpu fp32"]["why_not"]["flash2"] == undefined
    assert report["kernels"]["why_not_fused"] == "triton is not installed"
    assert f"bitsandbytes  no: {broken}" in shown(capsys, report)


@pytest.mark.usefixtures("fresh_imports")
def test_broken_kernels_do_not_end_the_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_kernels(module: str) -> str | None:
        return "reca.kernels is broken: ImportError: x" if module == "reca.kernels" else None

    monkeypatch.setattr(doctor, "import_failure", no_kernels)
    report = doctor.collect()
    assert report["kernels"] == {
        "operators": [],
        "auto": "none",
        "why_not_fused": "reca.kernels is broken: ImportError: x",
    }
    text = shown(capsys, report)
    assert "operators  none" in text
    assert "flash-attn    unknown version, usable" in text


def test_the_kernels_are_counted_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    from reca.kernels import OPERATORS

    report = doctor.collect()
    assert report["kernels"]["operators"] == list(OPERATORS)
    assert f"operators  {len(OPERATORS)}: {OPERATORS[0]}" in shown(capsys, report)


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (SimpleNamespace(stdout="575.57.08\n575.57.08\n"), "575.57.08"),
        (SimpleNamespace(stdout=""), None),
        (subprocess.TimeoutExpired("nvidia-smi", 10), None),
        (subprocess.CalledProcessError(9, "nvidia-smi"), None),
        (OSError("exec format error"), None),
    ],
)
def test_a_driver_tool_that_fails_only_hides_the_driver(
    monkeypatch: pytest.MonkeyPatch, outcome: Any, expected: str | None
) -> None:
    def run(*args: Any, **kwargs: Any) -> Any:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(doctor.shutil, "which", lambda tool: f"/usr/bin/{tool}")
    monkeypatch.setattr(doctor.subprocess, "run", run)
    report = doctor.collect()
    assert report["machine"]["driver"] == expected
    assert report["profilers"]["nsys"] == "/usr/bin/nsys"
