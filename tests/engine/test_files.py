"""The file layer: files and folders appear whole or not at all, and failures are typed errors."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from reca.errors import CheckpointError, ConfigError, DiskError
from reca.files import (
    CRASH_POINTS,
    MANIFEST,
    JsonLines,
    RunLock,
    at_crash_points,
    publish_dir,
    remove_dir,
    sweep_staging,
    verify_dir,
    write_atomic,
    write_json,
    write_safetensors,
    write_text,
)
from reca.files import lock as lock_module
from reca.files.faults import crash_point


def fail_at(wanted: str, code: int) -> Callable[[str, Path], None]:
    """A hook that raises the OSError `code` at the crash point `wanted`."""

    def hook(name: str, path: Path) -> None:
        if name == wanted:
            raise OSError(code, os.strerror(code))

    return hook


@pytest.fixture
def strict_umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# Single files


def test_a_failed_write_leaves_the_old_content_and_no_temporary(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    write_text(path, "old")
    for point in ("write.created", "write.chunk", "write.synced"):
        with at_crash_points(fail_at(point, errno.ENOSPC)), pytest.raises(DiskError):
            write_text(path, "new")
        assert path.read_text() == "old" and os.listdir(tmp_path) == ["notes.txt"]
    write_text(path, "néw")
    assert path.read_bytes() == "néw".encode()


@pytest.mark.parametrize(
    ("code", "cure"),
    [
        (errno.ENOSPC, "free some space or keep fewer checkpoints"),
        (errno.EDQUOT, "free some of your quota"),
        (errno.EIO, "check the disk"),
        (errno.EACCES, "choose a folder that you may write to"),
        (errno.EROFS, "choose a folder on a writable file system"),
    ],
)
def test_an_error_of_the_disk_names_path_needed_and_free_bytes_and_the_cure(
    tmp_path: Path, code: int, cure: str
) -> None:
    path = tmp_path / "weights.bin"
    with at_crash_points(fail_at("write.chunk", code)), pytest.raises(DiskError) as caught:
        write_atomic(path, b"x" * 1234)
    message = str(caught.value)
    assert caught.value.exit_code == 7
    assert f"cannot write {path}: {os.strerror(code)} (needed 1,234 bytes, " in message
    assert re.search(r", [\d,]+ free\); ", message) and cure in message


def test_a_path_below_a_file_and_a_path_that_is_no_file_are_refused(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "x")
    with pytest.raises(DiskError, match="a part of the path is a file"):
        write_text(tmp_path / "file" / "below", "x")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(DiskError, match="not a regular file"):
            write_text(path, "x")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_link_is_followed_and_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "store" / "weights")
    write_text(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "store" / "weights").read_text() == "x"


@pytest.mark.usefixtures("strict_umask")
def test_modes_follow_the_umask(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.safetensors", {"x": torch.ones(3)})
    with publish_dir(tmp_path / "out") as staging:
        write_text(staging / "b", "x")
    JsonLines(tmp_path / "c.jsonl").close()
    files = ("a.safetensors", "out/b", f"out/{MANIFEST}", "c.jsonl")
    assert {mode(tmp_path / name) for name in files} == {0o640}
    assert mode(tmp_path / "out") == 0o750


def test_json_is_readable_and_refuses_what_json_cannot_hold(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"naïve": [1, 0.1]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"naïve": [1, 0.1]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "b.json", {"loss": float("nan")})
    assert os.listdir(tmp_path) == ["a.json"]


def test_an_unknown_crash_point_is_a_bug(tmp_path: Path) -> None:
    crash_point("write.tea", tmp_path)
    with at_crash_points(lambda name, path: None), pytest.raises(ValueError, match=r"write\.tea"):
        crash_point("write.tea", tmp_path)
    assert len(set(CRASH_POINTS)) == len(CRASH_POINTS)


# Folders


def test_a_published_folder_verifies_and_holds_everything(tmp_path: Path) -> None:
    with publish_dir(tmp_path / "out", manifest={"step": 3}) as staging:
        write_text(staging / "a.txt", "through the layer")
        (staging / "sub").mkdir()
        (staging / "sub" / "b.txt").write_text("by another writer")
        assert not (tmp_path / "out").exists()
    manifest = verify_dir(tmp_path / "out")
    assert manifest["step"] == 3 and manifest["files"].keys() == {"a.txt", "sub/b.txt"}
    assert os.listdir(tmp_path) == ["out"]


def test_a_file_that_was_changed_after_it_was_written_is_hashed_anew(tmp_path: Path) -> None:
    with publish_dir(tmp_path / "out") as staging:
        write_text(staging / "a", "first")
        with (staging / "a").open("a") as file:
            file.write(" and second")
        write_text(staging / "b", "first")
        write_text(staging / "b", "other")
    verify_dir(tmp_path / "out")


def test_an_error_while_filling_publishes_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), publish_dir(tmp_path / "out") as staging:
        write_text(staging / "a", "x")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_an_existing_folder_is_never_overwritten_unless_asked(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with publish_dir(tmp_path / "out") as staging:  # an empty one is no loss
        write_text(staging / "a", "old")
    with (
        pytest.raises(ConfigError, match=r"out exists; choose another folder"),
        publish_dir(tmp_path / "out"),
    ):
        pass
    with publish_dir(tmp_path / "out", replace=True) as staging:
        write_text(staging / "b", "new")
    assert verify_dir(tmp_path / "out")["files"].keys() == {"b"} and os.listdir(tmp_path) == ["out"]


def test_a_failed_replacement_puts_the_old_folder_back(tmp_path: Path) -> None:
    with publish_dir(tmp_path / "out") as staging:
        write_text(staging / "a", "old")
    hook = fail_at("publish.replaced", errno.EIO)
    with (
        at_crash_points(hook),
        pytest.raises(DiskError),
        publish_dir(tmp_path / "out", replace=True) as staging,
    ):
        write_text(staging / "b", "new")
    assert verify_dir(tmp_path / "out")["files"].keys() == {"a"} and os.listdir(tmp_path) == ["out"]


def test_reserved_keys_of_the_manifest_are_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="must not set files"),
        publish_dir(tmp_path / "x", manifest={"files": 1}),
    ):
        pass


def test_no_byte_of_a_manifest_can_change_unseen(tmp_path: Path) -> None:
    with publish_dir(tmp_path / "out", manifest={"step": 3}) as staging:
        write_text(staging / "a", "x")
    path = tmp_path / "out" / MANIFEST
    text = path.read_bytes()
    for offset, byte in enumerate(text):
        for other in (byte ^ 1, 0x20, 0x0A):
            if other != byte:
                path.write_bytes(text[:offset] + bytes([other]) + text[offset + 1 :])
                with pytest.raises(CheckpointError, match=MANIFEST):
                    verify_dir(tmp_path / "out")
    path.write_bytes(text)
    verify_dir(tmp_path / "out")


def test_a_link_in_a_published_folder_is_refused(tmp_path: Path) -> None:
    with publish_dir(tmp_path / "out") as staging:
        write_text(staging / "a", "x")
    (tmp_path / "out" / "a").rename(tmp_path / "a")
    (tmp_path / "out" / "a").symlink_to(tmp_path / "a")
    with pytest.raises(CheckpointError, match="neither a file nor a folder"):
        verify_dir(tmp_path / "out")


def test_sweeping_removes_what_the_dead_left_and_spares_the_living(tmp_path: Path) -> None:
    dead = [".staging-step-00000003-17-0123abcd", ".removed-step-00000001-17-0123abcd"]
    for name in dead:
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "file").write_text("x")
    (tmp_path / ".notes.txt.17-0123abcd.tmp").write_text("x")
    for name in (".replaced-kept-17-0123abcd", ".replaced-lost-17-0123abcd", "kept", "mine", ".hidden"):
        (tmp_path / name).mkdir()
    with publish_dir(tmp_path / "new") as staging:
        swept = sweep_staging(tmp_path)
        write_text(staging / "a", "x")
    assert sorted(os.listdir(tmp_path)) == [".hidden", "kept", "lost", "mine", "new"]
    assert len(swept) == 5 and sweep_staging(tmp_path) == [] and sweep_staging(tmp_path / "absent") == []


def test_half_a_removal_does_not_keep_the_name(tmp_path: Path) -> None:
    with publish_dir(tmp_path / "out") as staging:
        write_text(staging / "a", "x")
    with at_crash_points(fail_at("remove.entry", errno.EIO)), pytest.raises(DiskError):
        remove_dir(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    sweep_staging(tmp_path)
    assert os.listdir(tmp_path) == []


# The lock of a run


def test_a_held_folder_is_refused_and_a_released_one_is_not(tmp_path: Path) -> None:
    with (
        RunLock(tmp_path / "run"),
        pytest.raises(ConfigError, match=rf"in use by process {os.getpid()} on .*; end that run or choose"),
        RunLock(tmp_path / "run"),
    ):
        pass
    with RunLock(tmp_path / "run"):
        pass


def test_a_file_system_without_locks_warns_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(lock_module.fcntl, "flock", no_locks)
    with pytest.warns(UserWarning, match="let only one run use this folder"), RunLock(tmp_path):
        pass


# Lines


def test_lines_after_the_checkpoint_and_a_torn_line_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    lines.append({"run": "begins"})
    for step in range(1, 6):
        lines.append({"step": step, "loss": 0.1 * step})
    lines.close()
    with path.open("a") as file:
        file.write('{"step": 2, "lo')

    lines = JsonLines(path)
    assert lines.truncate_after(3) == 3 and lines.truncate_after(3) == 0
    lines.append({"step": 4, "loss": 0.25})
    lines.sync()
    lines.close()
    lines.close()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert records[0] == {"run": "begins"}
    assert [(r["step"], r["loss"].hex()) for r in records[1:]] == [
        (step, loss.hex()) for step, loss in ((1, 0.1), (2, 0.2), (3, 0.1 * 3), (4, 0.25))
    ]


def test_a_line_torn_just_before_its_end_is_dropped_too(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    lines = JsonLines(path)
    assert lines.truncate_after(2) == 1
    lines.append({"step": 2})
    lines.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_numbers_without_a_json_form_become_null(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "m.jsonl")
    lines.append(
        {"step": 1, "loss": float("nan"), "norms": [float("inf"), 2.0], "terms": {"a": -float("inf")}}
    )
    lines.close()
    expected = {"step": 1, "loss": None, "norms": [None, 2.0], "terms": {"a": None}}
    assert json.loads((tmp_path / "m.jsonl").read_text()) == expected


def test_a_line_that_does_not_fit_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = JsonLines(tmp_path / "m.jsonl")
    lines.append({"step": 1})
    real_write = os.write

    def half_then_full(descriptor: int, data: bytes) -> int:
        if len(data) < 14:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real_write(descriptor, data[: len(data) // 2])

    monkeypatch.setattr("reca.files.lines.os.write", half_then_full)
    with pytest.raises(DiskError, match=r"m\.jsonl: No space left on device \(needed 21 bytes"):
        lines.append({"step": 2, "a": 12})
    monkeypatch.undo()
    lines.append({"step": 3})
    lines.close()
    assert (tmp_path / "m.jsonl").read_text() == '{"step": 1}\n{"step": 3}\n'
