"""Conversations about images: what is read, what is refused, and that nothing outside is ever opened."""

from __future__ import annotations

import json
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reca.data.llava import MAX_ENTRY_BYTES, Conversations
from reca.errors import DataError
from reca.images import ImageRejected

MakeJpeg = Callable[..., bytes]


def chat(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(texts)]


def entry(image: Any = "1.jpg", *texts: str) -> dict[str, Any]:
    return {"id": 7, "image": image, "conversations": chat(*(texts or ("<image>\nWhat?", "A cat.")))}


GOOD = entry()


@pytest.fixture
def root(tmp_path: Path, make_jpeg: MakeJpeg) -> Path:
    """An image folder with two pictures, beside a secret."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    (folder / "1.jpg").write_bytes(make_jpeg(1))
    (folder / "sub" / "2.jpg").write_bytes(make_jpeg(2))
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    return folder


def raw(line: Any) -> bytes:
    return line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()


def write(folder: Path, *entries: Any, name: str = "mix.jsonl") -> Path:
    """JSONL of the entries; one that is text or bytes becomes the line as it is."""
    path = folder.parent / name
    path.write_bytes(b"\n".join(raw(e) for e in entries))
    return path


def refusal(source: Conversations, item: int) -> str:
    """Why an item is rejected, by its image or by its text."""
    with pytest.raises(ImageRejected) as error:
        source.read(item)
        source.text(item)
    return error.value.reason


# What is read


@pytest.mark.parametrize(
    "layout", ["jsonl", "jsonl with a BOM", "list", "pretty list", "list in one line each"]
)
def test_entries_give_image_bytes_and_turns(root: Path, layout: str, make_jpeg: MakeJpeg) -> None:
    entries = [
        entry("1.jpg", '<image>\nIs "it" [a {cat?', "Ja, 猫 \\ ]}"),
        entry("sub/2.jpg", "<image>\na", "b", "c", "d"),
    ]
    text = {
        "jsonl": "\n\n".join(json.dumps(e) for e in entries) + "\n",
        "jsonl with a BOM": "\ufeff" + "\r\n".join(json.dumps(e, ensure_ascii=False) for e in entries),
        "list": json.dumps(entries),
        "pretty list": " \n" + json.dumps(entries, indent=2, ensure_ascii=False),
        "list in one line each": "[\n" + ",\n".join(json.dumps(e) for e in entries) + "\n]\n",
    }[layout]
    source = Conversations(write(root, text), root)
    assert [source.text(k) for k in range(len(source))] == [
        (('Is "it" [a {cat?', "Ja, 猫 \\ ]}"),),
        (("a", "b"), ("c", "d")),
    ]
    assert [source.read(k) for k in range(2)] == [make_jpeg(1), make_jpeg(2)]
    assert not source.ignored


def test_names_count_lines_of_jsonl_and_elements_of_a_list(root: Path) -> None:
    source = Conversations(write(root, GOOD, "", "{", GOOD), root)
    assert [source.name(k) for k in range(len(source))] == ["mix.jsonl:1", "mix.jsonl:3", "mix.jsonl:4"]
    source = Conversations(write(root, json.dumps([GOOD, 3, "x", [GOOD], GOOD]), name="mi\nx.json"), root)
    assert [source.name(k) for k in range(len(source))] == [f"mi\\nx.json:{k}" for k in range(1, 6)]
    assert source.text(0) == source.text(4)


def test_entries_without_an_image_are_ignored_and_counted(root: Path) -> None:
    text_only = {"conversations": chat("Hello", "Hi")}
    source = Conversations(write(root, text_only, GOOD, text_only | {"image": None}), root)
    assert [source.name(k) for k in range(len(source))] == ["mix.jsonl:2"]
    assert source.ignored == {"entries without an image": 2}


@pytest.mark.parametrize(
    "question", ["<image>\nWhat?", "What?\n<image>", "<image>What?", " <image>\r\n What?\n"]
)
def test_the_placeholder_goes_with_its_newline(root: Path, question: str) -> None:
    source = Conversations(write(root, entry("1.jpg", question, " as it is\n")), root)
    assert source.text(0) == (("What?", " as it is\n"),)


def test_images_lie_beside_the_file_unless_a_root_is_given(root: Path, make_jpeg: MakeJpeg) -> None:
    beside = Conversations(write(root, entry("images/1.jpg")))
    assert beside.read(0) == make_jpeg(1)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(json_values, texts, texts), min_size=1, max_size=4),
    st.booleans(),
    st.sampled_from(["lines", None, 1]),
)
def test_any_valid_file_comes_back_entry_by_entry(
    root: Path, rows: list[tuple[Any, str, str]], ascii_only: bool, layout: Any
) -> None:
    entries = [{"more": junk} | entry("1.jpg", "<image>" + q, a) for junk, q, a in rows]
    if layout == "lines":
        text = "\n".join(json.dumps(e, ensure_ascii=ascii_only) for e in entries)
    else:
        text = json.dumps(entries, ensure_ascii=ascii_only, indent=layout)
    source = Conversations(write(root, text), root)
    assert [source.text(k) for k in range(len(source))] == [((q.strip(), a),) for _, q, a in rows]
    assert not source.ignored


# What is refused


BAD: list[tuple[Any, str]] = [
    (entry(""), "`image` must be the path of one image, got ''"),
    (entry(["1.jpg", "2.jpg"]), "`image` must be the path of one image"),
    (entry("gone.jpg"), "image gone.jpg cannot be read: No such file or directory"),
    (entry("sub"), "not a regular file"),
    (entry("x" * 5000), "cannot be read: File name too long"),
    (entry("\ud800.jpg"), "half a character ('\\ud800')"),
    (entry("1.jpg", "What?", "A cat."), "must hold <image> once; found 0"),
    (entry("1.jpg", "<image><image>", "A cat."), "must hold <image> once; found 2"),
    (entry("1.jpg", "What?", "<image>"), "must hold <image> once; found 1"),
    (entry("1.jpg", "a", "b", "<image>", "d"), "must hold <image> once; found 1"),
    (entry("1.jpg", "<image>", "\udfff"), "half a character ('\\udfff')"),
    (entry("1.jpg", "<image>", "x" * 65_536), "a text of 65543 characters; the limit is 65536"),
    (entry("1.jpg", "<image>"), "each followed by its answer"),
    (entry("1.jpg") | {"conversations": []}, "`conversations` must be a list"),
    (entry("1.jpg") | {"conversations": {"from": "human"}}, "`conversations` must be a list"),
    (entry("1.jpg") | {"conversations": ["a", "b"]}, "turn 1 of the conversation must be from 'human'"),
    (
        entry("1.jpg") | {"conversations": chat("<image>", "b")[::-1]},
        "turn 1 of the conversation must be",
    ),
    (
        entry("1.jpg") | {"conversations": [*chat("<image>"), {"from": "gpt"}]},
        "turn 2 of the conversation has no",
    ),
    ({"image": "1.jpg"}, "`conversations` must be a list"),
    ("[1, 2]", "the entry must be an object, got list"),
    ("{'image': 1}", "the entry is not valid JSON"),
    ('{"image": "1.jpg", "score": NaN}', "the entry is not valid JSON: NaN is no JSON number"),
    ('{"image": "1.jpg", "score": -Infinity}', "-Infinity is no JSON number"),
    ('{"n": ' + "1" * 5000 + "}", "the entry is not valid JSON"),
    (b'{"image": "\xff.jpg"}', "the entry is not UTF-8 text"),
    ("{" * 100_000, "the entry is n"),
    ('{"a":' * 100_000 + "1" + "}" * 100_000, "the entry is nested too deeply"),
]


@pytest.mark.parametrize(("line", "reason"), BAD)
@pytest.mark.parametrize("is_list", [False, True])
def test_a_bad_entry_is_rejected_by_name_and_its_neighbours_are_not(
    root: Path, line: Any, reason: str, is_list: bool
) -> None:
    lines = [raw(GOOD), raw(line), raw(GOOD)]
    if is_list and (lines[1].count(b"{") != lines[1].count(b"}") or lines[1].startswith(b"{'")):
        lines[1], reason = b"{'image': [}]", "the entry is not valid JSON"  # else it has no end in a list
    start = time.process_time()
    source = Conversations(
        write(root, b"[" + b",".join(lines) + b"]" if is_list else b"\n".join(lines)), root
    )
    assert [source.name(k) for k in range(len(source))] == [f"mix.jsonl:{k}" for k in (1, 2, 3)]
    assert reason in refusal(source, 1)
    assert source.text(0) == source.text(2) == (("What?", "A cat."),)
    assert time.process_time() - start < 2


@pytest.mark.parametrize("is_list", [False, True])
@pytest.mark.parametrize("filling", [b"a", b'\\"', b"[{"])
def test_an_entry_of_a_hundred_megabytes_costs_neither_time_nor_memory(
    root: Path, is_list: bool, filling: bytes
) -> None:
    size = 100 * 2**20 if filling == b"a" else 4 * 2**20
    good, path = json.dumps(GOOD).encode(), root.parent / "long"
    long = b'{"image": "' + filling * (size // len(filling)) + b'"}'
    path.write_bytes(
        b"[" + good + b",\n" + long + b",\n" + good + b"]" if is_list else b"\n".join([good, long, good])
    )
    start = time.process_time()
    source = Conversations(path, root)
    assert refusal(source, 1) == f"the entry is longer than {MAX_ENTRY_BYTES} bytes"
    assert len(source) == 3 and source.text(2) == (("What?", "A cat."),)
    assert time.process_time() - start < 2


def test_a_string_that_never_ends_costs_one_pass(root: Path) -> None:
    path = write(root, b"[" + json.dumps(GOOD).encode() + b', {"image": "' + b'\\"' * 10**6)
    start = time.process_time()
    source = Conversations(path, root)
    assert time.process_time() - start < 2
    assert len(source) == 2 and "longer than" in refusal(source, 1)


def test_of_a_cut_file_the_whole_entries_are_used(root: Path) -> None:
    text = json.dumps([GOOD, GOOD])
    for end in range(len(json.dumps([GOOD])), len(text)):
        source = Conversations(write(root, text[:end]), root)
        assert source.text(0) == (("What?", "A cat."),)
        assert source.ignored == {"list without an end (the file was cut)": 1}
        if len(source) == 2 and not text[:end].endswith("}"):
            assert "the entry is not valid JSON" in refusal(source, 1)
    assert Conversations(write(root, text + text), root).ignored == {"text after the end of the list": 1}


# Nothing outside the image folder is opened

opened: list[str] | None = None


def _note_open(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and opened is not None and isinstance(arguments[0], str | bytes | os.PathLike):
        opened.append(os.path.realpath(os.fsdecode(arguments[0])))


@pytest.fixture
def watch() -> Iterator[Callable[[], list[str]]]:
    """Every path that this process opens from now on, with links resolved."""
    global opened
    if opened is None:
        sys.addaudithook(_note_open)
    opened = []
    yield lambda: list(opened or ())
    opened = []


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ("../secret.jpg", "must be a path below the image folder"),
        ("sub/../../secret.jpg", "must be a path below the image folder"),
        ("{outside}/secret.jpg", "must be a path below the image folder"),
        ("1.jpg\0.png", "must be a path below the image folder"),
        ("link.jpg", "image link.jpg leads out of the image folder"),
        ("folder/secret.jpg", "image folder/secret.jpg leads out of the image folder"),
        ("loop.jpg", "cannot be read: Too many levels of symbolic links"),
        ("pipe.jpg", "not a regular file"),
        ("\x1b[31m/../x", "image \\x1b[31m/../x must be"),
    ],
)
def test_no_path_leads_out_of_the_image_folder(
    root: Path, image: str, reason: str, watch: Callable[[], list[str]]
) -> None:
    (root / "link.jpg").symlink_to("../secret.jpg")
    (root / "folder").symlink_to(root.parent)
    (root / "loop.jpg").symlink_to("loop.jpg")
    os.mkfifo(root / "pipe.jpg")
    path = write(root, entry(image.format(outside=root.parent)))
    source = Conversations(path, root)
    start, descriptors = time.process_time(), len(os.listdir("/proc/self/fd"))
    with pytest.raises(ImageRejected) as error:
        source.read(0)
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert reason in error.value.reason and time.process_time() - start < 2
    assert str(path) in watch()  # the hook works
    assert str(root.parent / "secret.jpg") not in watch()


def test_links_inside_the_image_folder_are_followed(root: Path, make_jpeg: MakeJpeg) -> None:
    (root / "link.jpg").symlink_to("sub/2.jpg")
    (root.parent / "alias").symlink_to(root)
    source = Conversations(write(root, entry("link.jpg")), root.parent / "alias")
    assert source.read(0) == make_jpeg(2)


# The file


def test_the_fingerprint_is_of_what_is_said_and_not_of_where(root: Path) -> None:
    one = Conversations(write(root, GOOD), root).fingerprint()
    other = Conversations(write(root, GOOD, name="other.jsonl"), root.parent).fingerprint()
    changed = Conversations(write(root, entry("1.jpg", "<image>\nWhat?", "A dog.")), root).fingerprint()
    assert one == other != changed


def test_only_places_are_held_in_memory(root: Path) -> None:
    source = Conversations(write(root, *[entry("1.jpg", "<image>" + "x" * 500, "y" * 500)] * 300), root)
    sent = pickle.dumps(source)
    assert len(sent) < 300 * 24 + 1000
    assert pickle.loads(sent).text(299) == source.text(299)


def test_a_file_that_changes_while_it_is_used_ends_the_run(root: Path) -> None:
    path = write(root, GOOD, GOOD)
    source = Conversations(path, root)
    write(root, GOOD)
    with pytest.raises(DataError, match=r"mix\.jsonl changed while it was in use"):
        source.read(0)
    path.unlink()
    assert "cannot be read: No such file" in refusal(source, 0)


def test_files_that_cannot_be_used_say_why(root: Path) -> None:
    for name, content, message in (
        ("empty.json", "", "is empty; expected a JSON list, or one JSON object per line"),
        ("page.json", "<html>", "must be a JSON list, or hold one JSON object per line"),
        ("none.json", "[]", "holds no entry with an image$"),
        ("text.json", '[{"conversations": []}]', "ignored: 1 entries without an image"),
    ):
        with pytest.raises(DataError, match=message):
            Conversations(write(root, content, name=name), root)
    with pytest.raises(DataError, match=r"cannot read .*gone\.json: No such file"):
        Conversations(root / "gone.json")
    with pytest.raises(DataError, match=r"gone is not a folder; give the one that the images of mix\.jsonl"):
        Conversations(write(root, GOOD), root / "gone")
