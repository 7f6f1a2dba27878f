"""A whole run: what it writes, in which order, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import ToyLoader, ToyModel, toy_config, toy_job

from reca.config import CheckpointConfig, ComputeConfig, OptimConfig, SampleConfig
from reca.engine.checkpoint import load_checkpoint
from reca.engine.loop import run
from reca.engine.metrics import peak_flops, peak_of
from reca.errors import ConfigError
from reca.files import RunLock


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_step_is_logged_with_the_agreed_keys(tmp_path: Path) -> None:
    run(toy_job(tmp_path))
    logged = rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in logged] == list(range(1, 21))
    assert set(logged[0]) == {
        "step",
        "loss",
        "loss/reconstruction",
        "lr",
        "grad_norm",
        "images_per_second",
        "tokens_per_second",
        "mfu",
        "data_wait",
        "peak_memory_gb",
    }
    assert logged[0]["lr"] == 0.0 and logged[3]["lr"] == pytest.approx(3e-2)
    for row in logged:
        assert row["tokens_per_second"] == pytest.approx(3 * row["images_per_second"])
        assert 0.0 <= row["data_wait"] <= 1.0
        assert 0.01 < row["peak_memory_gb"] < 1000
        assert row["mfu"] is None


def test_training_lowers_the_loss_on_held_out_samples(tmp_path: Path) -> None:
    summary = run(toy_job(tmp_path, toy_config(steps=60)))
    assert summary["after"]["error"] < 0.9 * summary["before"]["error"]


def test_evaluations_come_before_the_first_step_at_every_interval_and_after_the_last(tmp_path: Path) -> None:
    run(toy_job(tmp_path, toy_config(sample=SampleConfig(every=8))))
    assert [row["step"] for row in rows(tmp_path / "evaluations.jsonl")] == [0, 8, 16, 20]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir())[0] == "00000000.txt"
    run(toy_job(tmp_path / "rare", toy_config(sample=SampleConfig(every=None))))
    assert [row["step"] for row in rows(tmp_path / "rare" / "evaluations.jsonl")] == [0, 20]


def test_the_average_is_evaluated_and_the_weights_are_trained(tmp_path: Path) -> None:
    model = ToyModel()
    seen: list[torch.Tensor] = []

    def evaluate(step: int, samples: Path) -> Mapping[str, float]:
        assert not torch.is_grad_enabled()
        seen.append(model.head.weight.detach().clone())
        return {"error": float("nan")}

    summary = run(toy_job(tmp_path, model=model, evaluate=evaluate))
    saved = load_checkpoint(tmp_path / summary["checkpoint"])
    assert torch.equal(seen[-1], saved.ema["head.weight"])
    assert torch.equal(model.head.weight, saved.model["head.weight"])
    assert not torch.equal(saved.ema["head.weight"], saved.model["head.weight"])
    assert summary["after"] == {"error": None}


def test_checkpoints_hold_trained_tensors_only_and_the_newest_are_kept(tmp_path: Path) -> None:
    config = toy_config(steps=11, checkpoint=CheckpointConfig(every=4, keep=2))
    run(toy_job(tmp_path, config))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000008",
        "step-00000011",
    ]
    saved = load_checkpoint(tmp_path / "checkpoints" / "step-00000011")
    trained = {name for name, p in ToyModel().named_parameters() if p.requires_grad}
    assert set(saved.model) == set(saved.ema) == trained
    assert saved.meta["updates"] == 11


def test_without_an_average_none_is_saved(tmp_path: Path) -> None:
    summary = run(toy_job(tmp_path, toy_config(optim=OptimConfig(lr=1e-3))))
    assert load_checkpoint(tmp_path / summary["checkpoint"]).ema == {}


def test_the_summary_says_what_was_done(tmp_path: Path) -> None:
    summary = run(toy_job(tmp_path))
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    evaluations = rows(tmp_path / "evaluations.jsonl")
    assert summary["before"] == {"error": evaluations[0]["error"]}
    assert summary["after"] == {"error": evaluations[-1]["error"]}
    assert (summary["status"], summary["steps"], summary["images"], summary["rejected"]) == (
        "finished",
        20,
        120,
        5,
    )
    assert summary["checkpoint"] == "checkpoints/step-00000020"
    assert summary["notes"] == [] and summary["seconds"] > 0


def test_progress_is_told_at_each_logged_step(tmp_path: Path) -> None:
    seen: list[Mapping[str, Any]] = []
    run(toy_job(tmp_path, toy_config(log_every=6), on_progress=seen.append))
    assert [(record["step"], record["steps"]) for record in seen] == [(6, 20), (12, 20), (18, 20)]
    assert seen[0]["seconds"] <= seen[1]["seconds"] <= seen[2]["seconds"]


def test_two_runs_of_one_seed_are_equal_and_another_seed_differs(tmp_path: Path) -> None:
    losses = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(toy_job(tmp_path / name, toy_config(seed=seed, steps=4, optim=OptimConfig(lr=1e-3))))
        losses.append([row["loss"].hex() for row in rows(tmp_path / name / "metrics.jsonl")])
    assert losses[0] == losses[1] != losses[2]


def test_recomputing_and_bf16_run_from_the_configuration(tmp_path: Path) -> None:
    model = ToyModel()
    calls: list[torch.dtype] = []
    model.first[0].register_forward_hook(lambda module, args, output: calls.append(output.dtype))
    config = toy_config(steps=1, optim=OptimConfig(), compute=ComputeConfig(precision="bf16", recompute=True))
    run(toy_job(tmp_path, config, model=model))
    # Evaluations run each block once; the step runs two microbatches, each forward and again for backward.
    assert calls == [torch.bfloat16] * (1 + 2 * 2 + 1)
    assert "forward" not in vars(model.first)


def test_a_folder_in_use_is_refused_and_the_loader_is_closed(tmp_path: Path) -> None:
    job = toy_job(tmp_path)
    with RunLock(tmp_path), pytest.raises(ConfigError, match="is in use by"):
        run(job)
    assert job.loader.closed  # type: ignore[attr-defined]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock"]


def test_an_error_of_the_loader_passes_and_closes_it(tmp_path: Path) -> None:
    class Broken(ToyLoader):
        def __next__(self) -> Any:
            raise KeyError("broken")

    loader = Broken()
    with pytest.raises(KeyError, match="broken"):
        run(toy_job(tmp_path, loader=loader))
    assert loader.closed


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_a_device_is_refused_with_the_cure(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"torch sees no CUDA device; see `reca doctor` or set compute.device=auto"
    ):
        run(toy_job(tmp_path, toy_config(compute=ComputeConfig(device="cuda"))))


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA B200", 2250.0),
    ],
)
def test_peaks_are_found_by_the_drivers_names(name: str, tflops: float) -> None:
    assert peak_of(name) == tflops * 1e12


def test_an_unknown_device_and_a_cpu_have_no_peak() -> None:
    assert peak_of("Radeon") is None
    assert peak_flops(torch.device("cpu")) is None
