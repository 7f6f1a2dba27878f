"""Folders and tar files, friendly and hostile."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from reca.data.sources import ImageFolder, TarSource, open_source, split_source
from reca.data.tar import read_index
from reca.errors import ConfigError, DataError
from reca.images import ImageRejected, load_image

MakeJpeg = Callable[..., bytes]
WriteTar = Callable[..., Path]


def names(source: ImageFolder | TarSource) -> list[str]:
    return [source.name(item) for item in range(len(source))]


def tree(folder: Path) -> list[tuple[str, int, int]]:
    """Every path below a folder with its size and time of change."""
    return sorted(
        (str(p.relative_to(folder)), p.lstat().st_size, p.lstat().st_mtime_ns) for p in folder.rglob("*")
    )


def entry(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


# Folders


def test_a_folder_is_read_recursively_in_sorted_order(tmp_path: Path) -> None:
    for name in (
        "b.JPG",
        "a/z.webp",
        "a/ü 写真.jpeg",
        "c.png",
        "notes.txt",
        ".hidden.jpg",
        ".git/x.jpg",
        "d.gif",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    source = open_source(tmp_path)
    assert names(source) == ["a/z.webp", "a/ü 写真.jpeg", "b.JPG", "c.png"]
    assert [source.read(item).decode() for item in range(4)] == names(source)


def test_linked_folders_are_followed_and_loops_end(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "1.jpg").write_bytes(b"1")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "loop").symlink_to(folder)
    assert names(open_source(folder)) == ["linked/1.jpg"]


def test_pipes_and_broken_links_are_counted_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "broken.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "1.jpg").write_bytes(b"1")
    source = open_source(tmp_path)
    assert names(source) == ["1.jpg"]
    assert dict(source.ignored) == {"not a regular file": 1, "broken link or unreadable": 1}


def test_names_are_printable_whatever_the_file_system_holds(tmp_path: Path) -> None:
    (tmp_path / "\x1b[31mred.jpg").write_bytes(b"1")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.jpg")).write_bytes(b"2")
    source = open_source(tmp_path)
    assert all(name.isprintable() and name.encode() for name in names(source))
    assert sorted(source.read(item) for item in range(2)) == [b"1", b"2"]


def test_a_file_that_vanishes_is_a_reject(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_bytes(b"1")
    source = open_source(tmp_path)
    (tmp_path / "1.jpg").unlink()
    with pytest.raises(ImageRejected, match="cannot be read: No such file"):
        source.read(0)


def test_a_file_of_absurd_size_is_a_reject(tmp_path: Path) -> None:
    with (tmp_path / "1.jpg").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ImageRejected, match="1099511627776 bytes exceed"):
        open_source(tmp_path).read(0)


def test_the_fingerprint_follows_names_and_sizes_but_not_the_place(tmp_path: Path) -> None:
    def folder(name: str, files: dict[str, bytes]) -> str:
        (tmp_path / name).mkdir()
        for file, data in files.items():
            (tmp_path / name / file).write_bytes(data)
        return open_source(tmp_path / name).fingerprint()

    base = folder("0", {"a.jpg": b"1", "b.jpg": b"22"})
    assert folder("1", {"b.jpg": b"22", "a.jpg": b"1"}) == base
    assert folder("2", {"a.jpg": b"1", "b.jpg": b"2"}) != base
    assert folder("3", {"a.jpg": b"1", "c.jpg": b"22"}) != base
    assert folder("4", {"a.jpg": b"1"}) != base


# What cannot be opened


def test_messages_of_what_cannot_be_opened_name_the_cure(tmp_path: Path, write_tar: WriteTar) -> None:
    with pytest.raises(ConfigError, match="no training images: give --data PATH"):
        open_source(None)
    with pytest.raises(DataError, match="gone does not exist; expected a folder"):
        open_source(tmp_path / "gone")
    with pytest.raises(DataError, match=r"holds no images \(\.jpg, \.jpeg, \.png, \.webp\)$"):
        open_source(tmp_path)
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(DataError, match="holds no images"):
        open_source(tmp_path)
    with pytest.raises(DataError, match=r"notes\.txt is not a folder or an uncompressed \.tar"):
        open_source(tmp_path / "notes.txt")
    write_tar(tmp_path / "a.tar", [("../1.jpg", b"1"), ("1.txt", b"1")])
    with pytest.raises(
        DataError, match=r"1 tar files with no images .*ignored: 1 unsafe name, 1 not an image"
    ):
        open_source(tmp_path)
    (tmp_path / "1.jpg").write_bytes(b"1")
    with pytest.raises(DataError, match="holds 1 images beside 1 tar files"):
        open_source(tmp_path)
    with pytest.raises(DataError, match="reca ships no images named 'fotos'"):
        open_source("package:fotos")
    with pytest.raises(DataError, match="reca ships no images named"):
        open_source("package:../data")


def test_the_photographs_that_ship_are_found() -> None:
    source = open_source("package:photos")
    assert len(source) > 0
    load_image(source.read(0), max_pixels=10**8)


# Tar files


def test_members_are_read_in_place(tmp_path: Path, write_tar: WriteTar, make_jpeg: MakeJpeg) -> None:
    pictures = {f"{k:03}.jpg": make_jpeg(k) for k in range(7)}
    entries = [item for k, v in pictures.items() for item in ((k, v), (k[:3] + ".json", b"{}"))]
    path = write_tar(tmp_path / "s.tar", entries)
    before = tree(tmp_path)
    source = open_source(path)
    assert names(source) == [f"s.tar/{name}" for name in pictures]
    assert [source.read(item) for item in reversed(range(7))] == list(pictures.values())[::-1]
    assert dict(source.ignored) == {"not an image": 7}
    assert tree(tmp_path) == before


@pytest.mark.parametrize("format_name", ["USTAR_FORMAT", "GNU_FORMAT", "PAX_FORMAT"])
def test_long_and_foreign_names_are_read_in_every_dialect(
    tmp_path: Path, write_tar: WriteTar, format_name: str
) -> None:
    wanted = ["d" * 90 + "/" + "e" * 60 + "/1.jpg", "写真/ü.jpg", "plain.jpg"]
    if format_name != "USTAR_FORMAT":
        wanted.append("x" * 300 + ".jpg")
    entries = [(name, str(k).encode()) for k, name in enumerate(wanted)]
    source = open_source(write_tar(tmp_path / "s.tar", entries, format=getattr(tarfile, format_name)))
    assert names(source) == [f"s.tar/{name}" for name in wanted]
    assert [source.read(k) for k in range(len(wanted))] == [data for _, data in entries]


def test_equal_names_in_two_shards_stay_apart(tmp_path: Path, write_tar: WriteTar) -> None:
    (tmp_path / "b").mkdir()
    write_tar(tmp_path / "a.tar", [("1.jpg", b"first")])
    write_tar(tmp_path / "b" / "a.tar", [("1.jpg", b"second")])
    source = open_source(tmp_path)
    assert {source.name(k): source.read(k) for k in range(2)} == {
        "a.tar/1.jpg": b"first",
        "b/a.tar/1.jpg": b"second",
    }


def test_repeated_names_in_one_tar_all_count(tmp_path: Path, write_tar: WriteTar) -> None:
    source = open_source(write_tar(tmp_path / "a.tar", [("1.jpg", b"x"), ("1.jpg", b"yy"), ("1.jpg", b"")]))
    assert names(source) == ["a.tar/1.jpg", "a.tar/1.jpg#2", "a.tar/1.jpg#3"]
    assert [source.read(k) for k in range(3)] == [b"x", b"yy", b""]


def test_hostile_entries_are_counted_and_nothing_is_written(tmp_path: Path, write_tar: WriteTar) -> None:
    outside = tmp_path / "run" / "data"
    outside.mkdir(parents=True)
    sparse = tarfile.TarInfo("sparse.jpg")
    sparse.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "s.jpg"}
    huge = tarfile.TarInfo("huge.jpg")
    huge.pax_headers = {"comment": "x" * 2_000_000}
    path = write_tar(
        outside / "evil.tar",
        [
            ("../escape.jpg", b"1"),
            ("a/../../escape.jpg", b"1"),
            ("/absolute.jpg", b"1"),
            entry("soft.jpg", tarfile.SYMTYPE, "/etc/passwd"),
            entry("hard.jpg", tarfile.LNKTYPE, "../escape.jpg"),
            entry("char.jpg", tarfile.CHRTYPE),
            entry("block.jpg", tarfile.BLKTYPE),
            entry("pipe.jpg", tarfile.FIFOTYPE),
            entry("folder.jpg", tarfile.DIRTYPE),
            entry("old.jpg", tarfile.GNUTYPE_SPARSE),
            entry("odd.jpg", b"Z"),
            sparse,
            huge,
            ("good..name/1.jpg", b"good"),
        ],
        format=tarfile.PAX_FORMAT,
    )
    before = tree(tmp_path)
    source = open_source(path)
    assert names(source) == ["evil.tar/good..name/1.jpg"] and source.read(0) == b"good"
    assert dict(source.ignored) == {
        "unsafe name": 3,
        "link": 2,
        "device": 2,
        "pipe": 1,
        "sparse file": 2,
        "unknown kind of entry": 1,
        "extension header too large": 1,
    }
    assert tree(tmp_path) == before


def test_a_tar_cut_anywhere_keeps_its_readable_prefix(
    tmp_path: Path, write_tar: WriteTar, make_jpeg: MakeJpeg
) -> None:
    pictures = [(f"{k}.jpg", make_jpeg(k)) for k in range(5)]
    data = write_tar(tmp_path / "whole.tar", pictures, format=tarfile.GNU_FORMAT).read_bytes()
    ends = [member.offset + member.size for member in read_index(tmp_path / "whole.tar").members]
    for offset in range(0, ends[-1], ends[-1] // 100):
        path = tmp_path / "cut.tar"
        path.write_bytes(data[:offset])
        index = read_index(path)
        assert len(index.members) == sum(end <= offset for end in ends), offset
        on_a_border = offset == 0 or any(-(-end // 512) * 512 == offset for end in ends)
        assert sum(index.ignored.values()) <= 1
        in_padding = any(end <= offset < -(-end // 512) * 512 for end in ends)
        assert sum(index.ignored.values()) == (0 if on_a_border or in_padding else 1), offset


def test_garbage_in_the_middle_ends_the_readable_part(tmp_path: Path, write_tar: WriteTar) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{k}.jpg", bytes([k]) * 700) for k in range(4)])
    data = bytearray(path.read_bytes())
    header = data.index(b"2.jpg")
    data[header + 130] ^= 1
    path.write_bytes(data)
    source = open_source(path)
    assert names(source) == ["a.tar/0.jpg", "a.tar/1.jpg"]
    assert dict(source.ignored) == {"cut or damaged tar header": 1}


@pytest.mark.parametrize("size", [b"-0000000001\0", b"\xff" * 12, b"\x80" + b"\xff" * 11, b"zzzzzzzzzzz\0"])
def test_impossible_sizes_end_the_walk_instead_of_turning_it_back(
    tmp_path: Path, write_tar: WriteTar, size: bytes
) -> None:
    path = write_tar(tmp_path / "a.tar", [("0.jpg", b"0"), ("1.jpg", b"1"), ("2.jpg", b"2")])
    data = bytearray(path.read_bytes())
    start = 1024
    data[start + 124 : start + 136] = size
    checksum = sum(data[start : start + 148]) + 8 * 32 + sum(data[start + 156 : start + 512])
    data[start + 148 : start + 156] = b"%06o\0 " % checksum
    path.write_bytes(data)
    index = read_index(path)
    assert [member.name for member in index.members] == ["0.jpg"]
    assert sum(index.ignored.values()) == 1


def test_a_damaged_extension_header_costs_only_its_member(tmp_path: Path, write_tar: WriteTar) -> None:
    named = tarfile.TarInfo("first.jpg")
    named.pax_headers = {"comment": "a"}
    path = write_tar(tmp_path / "a.tar", [named, ("second.jpg", b"2")], format=tarfile.PAX_FORMAT)
    data = path.read_bytes().replace(b"13 comment=a\n", b"99 comment=a\n")
    path.write_bytes(data)
    source = open_source(path)
    assert names(source) == ["a.tar/second.jpg"]
    assert dict(source.ignored) == {"damaged extension header": 1}


def test_a_hundred_thousand_empty_members_are_indexed_quickly(tmp_path: Path) -> None:
    block = bytearray(tarfile.TarInfo("0.txt").tobuf(tarfile.USTAR_FORMAT))
    path = tmp_path / "many.tar"
    last = tarfile.TarInfo("last.jpg")
    path.write_bytes(bytes(block) * 100_000 + last.tobuf(tarfile.USTAR_FORMAT) + bytes(1024))
    start = time.monotonic()
    source = open_source(path)
    assert time.monotonic() - start < 20
    assert names(source) == ["many.tar/last.jpg"] and source.ignored["not an image"] == 100_000


def test_a_compressed_tar_is_no_tar(tmp_path: Path, write_tar: WriteTar) -> None:
    plain = write_tar(tmp_path / "a.tar", [("1.jpg", b"1")]).read_bytes()
    (tmp_path / "a.tar").write_bytes(gzip.compress(plain))
    with pytest.raises(DataError, match=r"no images .*ignored: 1 cut or damaged tar header"):
        open_source(tmp_path / "a.tar")
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(plain))
    with pytest.raises(DataError, match=r"unpack \.tar\.gz"):
        open_source(tmp_path / "b.tar.gz")


def test_a_shard_replaced_in_use_stops_the_run(tmp_path: Path, write_tar: WriteTar) -> None:
    path = write_tar(tmp_path / "a.tar", [("1.jpg", b"old")])
    source = open_source(path)
    status = path.stat()
    write_tar(path, [("1.jpg", b"new")])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(DataError, match=r"a\.tar changed while it was in use") as caught:
        source.read(0)
    assert not isinstance(caught.value, ImageRejected)


def test_tars_written_by_streaming_tools_are_read(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w|", format=tarfile.GNU_FORMAT) as archive:
        info = tarfile.TarInfo("./folder/1.jpg")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"abc"))
    (tmp_path / "a.tar").write_bytes(buffer.getvalue())
    source = open_source(tmp_path)
    assert names(source) == ["a.tar/folder/1.jpg"] and source.read(0) == b"abc"


# Held-out images


def test_held_out_images_leave_the_training_set(photos: Path) -> None:
    source = open_source(photos)
    train, held_out = split_source(source, ["07.jpg", "02.jpg"])
    assert [held_out.name(k) for k in range(len(held_out))] == ["07.jpg", "02.jpg"]
    assert held_out.read(0) == source.read(7)
    trained = [train.name(k) for k in range(len(train))]
    assert trained == [name for name in names(source) if name not in ("07.jpg", "02.jpg")]
    assert [train.read(k) for k in range(9)] == [(photos / name).read_bytes() for name in trained]
    assert len({source.fingerprint(), train.fingerprint(), held_out.fingerprint()}) == 3
    assert split_source(source, ["07.jpg", "02.jpg"])[0].fingerprint() == train.fingerprint()


def test_a_split_that_cannot_be_made_says_why(photos: Path) -> None:
    source = open_source(photos)
    with pytest.raises(DataError, match=r"held-out image '7.jpg' is not in the data; did you mean '07.jpg'"):
        split_source(source, ["7.jpg"])
    with pytest.raises(DataError, match="all 11 images are held out"):
        split_source(source, [f"{k:02}.jpg" for k in range(11)])
    train, held_out = split_source(source, [])
    assert len(train) == 11 and len(held_out) == 0
