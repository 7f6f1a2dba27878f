"""`reca plan`: its keys, its table, and how mistakes end."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from reca import cli

Run = Callable[..., tuple[int, str, str]]
KEYS = {
    "gpu",
    "gpu_hours",
    "images_per_second",
    "peak_memory_gb",
    "fits",
    "min_tflop_per_image",
    "executed_tflop_per_image",
    "trained_parameters",
    "basis",
}


@pytest.fixture
def reca(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Call the console script in this process, in an empty folder; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["reca", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        output = capsys.readouterr()
        return int(end.value.code or 0), output.out, output.err

    return call


def test_the_document_has_the_keys_of_the_contract_and_stdout_nothing_else(reca: Run) -> None:
    code, out, err = reca(
        "plan", "janus-smoke", "--gpu", "rtx-4090", "steps=7", "optim.warmup_steps=0", "--json"
    )
    document = json.loads(out)
    assert code == 0 and document.keys() >= KEYS
    assert document["gpu"] == "rtx-4090" and document["steps"] == 7 and document["fits"] is True
    assert document["basis"].startswith("predicted")
    assert document["gpu_hours"] == pytest.approx(7 * document["seconds_per_step"] / 3600)
    assert document["images_per_second"] == pytest.approx(4 / document["seconds_per_step"])
    assert document["launches_per_step"] > 2 * document["microbatches"][0]["launches"]
    assert "counting reconstruction" in err


def test_launches_are_given_with_and_without_operators_by_family(reca: Run) -> None:
    mixed = ("image_to_text.images=3", "loss_weights.image_to_text=1")
    code, out, _ = reca("plan", "janus-smoke", "--gpu", "h200", "--launches", "--json", *mixed)
    document = json.loads(out)["launches"]
    assert code == 0 and document["official"] is None  # only the released variant was counted
    parts = {part["name"]: part for part in document["parts"]}
    assert [*parts] == ["reconstruction", "image_to_text", "optimizer"]
    for part in parts.values():
        is_step = part["name"] == "optimizer"
        assert is_step or part["auto"]["launches"] < 0.6 * part["reference"]["launches"]
        assert is_step or part["auto"]["gb"] < part["reference"]["gb"]
        families = {family["family"]: family for family in part["families"]}
        launches = [max(f["auto"]["launches"], f["reference"]["launches"]) for f in families.values()]
        assert launches == sorted(launches, reverse=True)
    step = document["step"]["auto"]["launches"]
    assert step == sum(part["times"] * part["auto"]["launches"] for part in parts.values())
    assert step == json.loads(out)["launches_per_step"]
    for part in parts.values():  # families leave nothing out
        assert part["auto"]["launches"] == sum(f["auto"]["launches"] for f in part["families"])


def test_the_step_is_the_same_whichever_operators_the_recipe_chose(reca: Run) -> None:
    found = []
    for chosen in ("auto", "reference"):
        _, out, _ = reca(
            "plan", "janus-smoke", "--gpu", "h200", "--launches", "--json", f"compute.kernels={chosen}"
        )
        found.append(json.loads(out))
    assert found[0]["launches"] == found[1]["launches"]
    assert found[0]["launches_per_step"] < found[1]["launches_per_step"]


def test_people_see_the_official_step_beside_ours_where_it_was_counted(
    reca: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reca.recipes.plan.launches import OFFICIAL

    official = {"janus/tiny": OFFICIAL["showo/clip-512"]}
    monkeypatch.setattr("reca.commands.plan_launches.OFFICIAL", official)
    _, out, _ = reca("plan", "janus-smoke", "--gpu", "h200", "--launches")
    assert "6,284 launches, 334 GB (operands of all but products)" in out
    assert "whole step" in out and "optimizer, by operator" in out and "all others" in out
    assert "samples of the official work" in out
    _, plain, _ = reca("plan", "janus-smoke", "--gpu", "h200")
    assert "by operator" not in plain


def test_our_microbatches_are_as_many_as_the_samples_of_the_official_work_fill() -> None:
    from reca.recipes.plan.launches import OFFICIAL, Compared, PartLaunches, Work, same_samples

    parts = [
        PartLaunches(name, samples, 5, Compared(Work(launches, 0), Work(launches // 2, 0)), {})
        for name, samples, launches in (
            ("reconstruction", 1, 100),
            ("image_to_text", 4, 20),
            ("image_to_text", 1, 9),
            ("optimizer", 0, 8),
        )
    ]
    assert same_samples(parts, OFFICIAL["showo/clip-512"]) == Compared(Work(220, 0), Work(110, 0))


def test_families_join_operators_that_differ_in_place_or_direction_only() -> None:
    from reca.recipes.plan.launches import family

    assert family("aten::mul_") == family("aten::mul") == "mul"
    assert family("reca::rms_norm_backward") == family("reca::rms_norm") == "reca rms_norm"
    assert family("reca_profiling::attention_backward") == "attention"
    assert family("aten::_scaled_dot_product_flash_attention_for_cpu") == "attention"


def test_people_get_a_table_that_calls_the_time_predicted(reca: Run) -> None:
    code, out, _ = reca("plan", "janus-smoke", "--gpu", "h200")
    assert code == 0
    lines = out.splitlines()
    assert all("PREDICTED" in line for line in lines if "second" in line and "predicted" not in line)
    assert any("trained weights" in line for line in lines)
    assert "It fits." in lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("janus-smoke", "--gpu", "h20"), "unknown GPU 'h20'; did you mean 'h200'"),
        (("bagle-7b", "--gpu", "h200"), "unknown recipe 'bagle-7b'; did you mean 'bagel-7b'"),
        (("janus-smoke", "--gpu", "h200", "--gpus", "2"), "`reca train` runs on one GPU so far"),
        (("janus-smoke", "--gpu", "h200", "steps=0"), "steps"),
    ],
)
def test_mistakes_end_with_2_and_their_cure(reca: Run, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = reca("plan", *arguments)
    assert code == 2 and out == ""
    assert message in err


def test_what_is_too_large_is_said_with_what_would_help(reca: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from reca.profiling.roofline import DEVICES, Device

    small = Device(1.0, 100, 10, 1.0)
    monkeypatch.setattr("reca.recipes.plan.DEVICES", {**DEVICES, "h200": small})
    code, out, _ = reca("plan", "janus-smoke", "--gpu", "h200")
    assert code == 0
    assert "It does NOT fit." in out
    assert "no option of this version makes it fit" in out
