"""Files appear whole or not at all."""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from asesearch.deployment.writing import check_bundle_dir, whole_folder
from asesearch.errors import AseSearchError, ConfigError, WriteError
from asesearch.files import (
    check_room,
    check_utf8,
    check_writable,
    file_sha256,
    printable,
    read_text,
    real_path,
    replacing,
    share_room,
    some,
    warn_once,
    why_not,
    write_json,
)
from asesearch.report.folder import write_folder


@pytest.mark.parametrize("shared", [False, True])
def test_a_failed_write_leaves_what_was_there(tmp_path, shared):
    path = tmp_path / "deep" / "file"
    with replacing(path, shared=shared) as part:
        part.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(path, shared=shared) as part:
        part.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize(("umask", "mode"), [(0o002, 0o664), (0o022, 0o644), (0o077, 0o600)])
def test_the_umask_decides_who_may_read_weights(tmp_path, umask, mode):
    path = tmp_path / "weights.safetensors"
    path.touch(0o600)  # as they were before
    before = os.umask(umask)
    try:
        with replacing(path) as part:
            save_file({"a": torch.zeros(1)}, part)
        with whole_folder(tmp_path / "bundle") as folder:
            (folder / "deep").mkdir()
            save_file({"a": torch.zeros(1)}, folder / "deep/parity.safetensors")
            (folder / "library.so").touch(0o700)
    finally:
        os.umask(before)
    written = [path, folder.parent / "bundle/deep/parity.safetensors"]
    assert [p.stat().st_mode & 0o777 for p in written] == [mode, mode]
    assert (tmp_path / "bundle/library.so").stat().st_mode & 0o777 == mode | 0o700
    assert len([p for p in tmp_path.rglob("*") if p.is_file()]) == 3


def test_two_processes_write_one_file_and_what_killed_ones_left_goes_after_a_day(tmp_path):
    path = tmp_path / "file"
    with replacing(path, shared=True) as one, replacing(path, shared=True) as two:
        one.write_text("one")
        two.write_text("two")
    assert path.read_text() == "one"
    others = [tmp_path / name for name in ("file.0000000a.part", "file.part", "file.mine.part")]
    for left in (*others, tmp_path / "file.0000000b.part"):
        left.write_text("half")
        if left.name != "file.0000000a.part":  # which another process writes now
            os.utime(left, (0, 0))
    write_json(path, {})
    assert {p.name for p in tmp_path.iterdir()} == {"file", *(p.name for p in others)}


def test_unwritable_is_one_line_that_names_the_file(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    for write in (check_writable, lambda p: write_json(p, {})):
        with pytest.raises(
            WriteError, match=r"can't write to .*\.json.*: .*; choose a folder"
        ) as caught:
            write(tmp_path / "file" / "x.json")
        assert isinstance(caught.value, AseSearchError) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("file/x", "Not a directory; choose a folder"),
        ("file/deep/x", "Not a directory; choose a folder"),
        ("folder", "it is a folder; give the name of a file"),
        ("a" * 250, "File name too long; a file system takes names of 255 bytes"),
        ("new/" + "a" * 256 + "/x", "File name too long"),
        ("/".join(["a" * 200] * 25), "File name too long"),
        ("/proc/nope/x", "No such file or directory"),
        ("dangling/x", "choose a folder"),
    ],
)
def test_what_can_t_be_written_is_known_before_and_leaves_nothing(tmp_path, path, reason):
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(WriteError) as caught:
        check_writable(tmp_path / path)
    said = str(caught.value)
    assert reason in said and "\n" not in said and len(said) < 400
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("shared", [False, True])
def test_no_name_passes_the_check_that_is_too_long_while_it_is_written(tmp_path, shared):
    passed = []
    for length in (240, 241, 242, 246, 255):
        path = tmp_path / ("a" * length)
        try:
            check_writable(path)
        except WriteError as error:
            assert "File name too long" in str(error)
            continue
        with replacing(path, shared=shared) as part:
            part.write_text("whole")
        passed.append(length)
    assert passed == [240, 241] and len(list(tmp_path.iterdir())) == len(passed)


def test_a_bundles_name_passes_the_check_only_if_it_can_be_overwritten(tmp_path):
    longest = 255 - len(f".{2**22}.old.part")  # with the largest number of a process
    check_bundle_dir(tmp_path / ("a" * longest))
    with pytest.raises(WriteError, match="File name too long"):
        check_bundle_dir(tmp_path / ("a" * (longest + 1)))


def test_a_folder_is_checked_with_the_longest_name_in_it(tmp_path):
    for path in (tmp_path, tmp_path / "new", tmp_path / "new" / ".." / "other"):
        check_writable(path, f"trials/{'a' * 100}/weights")
    check_writable(tmp_path / ("a" * 200), "weights")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(WriteError, match=r"can't write to .*/new: File name too long"):
        check_writable(tmp_path / "new", "a" * 256)
    with pytest.raises(WriteError, match="Not a directory"):
        (tmp_path / "file").touch()
        check_writable(tmp_path / "file", "weights")


def test_a_link_that_leads_to_itself_is_named_by_whoever_writes_there(tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    assert real_path(loop / "x") == loop / "x"
    assert real_path(tmp_path / "a" / ".." / "b") == tmp_path / "b"
    with pytest.raises(WriteError, match="Too many levels of symbolic links"):
        check_writable(loop / "x")


def test_a_full_disk_is_known_before(tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(WriteError, match="No space left on device; make room there"):
        check_writable(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


FULL = "No space left on device"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, FULL, "part"),
        SafetensorError(f"Error while serializing: I/O error: {FULL} (os error {errno.ENOSPC})"),
    ],
    ids=["system", "safetensors"],
)
def test_every_writer_tells_a_full_disk_in_the_same_words(tmp_path, error):
    def fail(_=None):
        raise error

    def write_file():
        with replacing(tmp_path / "w.safetensors"):
            fail()

    def write_folder_of_a_bundle():
        with whole_folder(tmp_path / "bundle"), replacing(tmp_path / "bundle.part" / "w"):
            fail()

    writers = [write_file, write_folder_of_a_bundle]
    if isinstance(error, OSError):
        writers.append(lambda: write_folder(tmp_path / "page", "report", fail))
    for write in writers:
        with pytest.raises(WriteError) as caught:
            write()
        said = re.fullmatch(rf"can't write to {tmp_path}/(.*): (.*)", str(caught.value))
        assert said is not None and said[1] in ("w.safetensors", "bundle", "page")
        assert said[2] == f"{FULL}; make room there, or choose another folder"


def test_an_array_that_numpy_could_write_in_part_is_told_to_make_room(tmp_path):
    with pytest.raises(WriteError) as caught, replacing(tmp_path / "a.npy"):
        raise OSError("819200 requested and 1984 written")
    why = "only a part of it could be written; make room there, or choose another folder"
    assert str(caught.value) == f"can't write to {tmp_path}/a.npy: {why}"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ENAMETOOLONG, errno.EACCES, None])
@pytest.mark.parametrize("length", [20, 150, 4000])
def test_a_line_on_what_can_t_be_written_is_short(number, length):
    error = OSError(number, os.strerror(number)) if number else SafetensorError("much " * 100)
    told = why_not(Path("/" + "a" * length), error)
    assert len(told) <= 300 and told.startswith(f"can't write to /{'a' * min(length, 90)}")
    assert (os.strerror(number) if number else "much much much") in told


def test_a_file_system_that_tells_no_size_has_room(tmp_path, monkeypatch):
    """As a tmpfs without a limit, a ramfs, and FUSE without statfs."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(total=0, used=0, free=0))
    check_room(tmp_path, 10**9, "a file")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
    with pytest.raises(WriteError, match="takes 1,000.0 MB; got 0.0 MB of free space"):
        check_room(tmp_path, 10**9, "a file")


def test_two_paths_share_room_whether_they_are_there_or_not(tmp_path):
    assert share_room(tmp_path / "deep" / "file", tmp_path)
    assert not share_room(tmp_path / "file", Path("/proc/nowhere"))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_text_is_read_by_its_byte_order_mark(tmp_path, encoding):
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    (tmp_path / "x").write_bytes(f"{mark}é\r\nÆ\n".encode(encoding))
    assert read_text(tmp_path / "x") == "é\r\nÆ\n"


def test_checking_leaves_nothing_and_json_round_trips(tmp_path):
    check_writable(tmp_path / "x.json")
    assert list(tmp_path.iterdir()) == []
    write_json(tmp_path / "x.json", {"a": [1, None]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [1, None]}
    assert (
        file_sha256(tmp_path / "x.json")
        == hashlib.sha256((tmp_path / "x.json").read_bytes()).hexdigest()
    )


def test_names_are_shown_on_one_line():
    assert printable("a\nb\x1b[31m\u202ec\udce9") == r"a\nb\x1b[31m\u202ec\udce9"
    assert printable(" é…\u2009%.jpg") == " é…\u2009%.jpg"
    with pytest.raises(ConfigError, match=r"can't read no\\nwhere: "):
        read_text("no\nwhere")


def test_some_of_many_names_are_told_and_how_many_more_there_are():
    assert some([]) == "" and some(["a", "b", "c"]) == "a, b, c"
    assert some([f"a{i}\n" for i in range(1500)]) == r"a0\n, a1\n, a2\n and 1,497 more"
    assert some("abcdef", 5) == "a, b, c, d, e and 1 more"


def test_a_warning_comes_once_from_whom_it_is_of(caplog):
    one, two = logging.getLogger("asesearch.one"), logging.getLogger("asesearch.two")
    for log in (one, one, two):
        warn_once(log, "100 % of it is damaged")
    told = [(record.name, record.getMessage()) for record in caplog.records]
    assert told == [(log.name, "100 % of it is damaged") for log in (one, two)]


def test_a_locale_that_is_not_utf_8_is_told_apart_from_a_name_that_is_not(monkeypatch):
    check_utf8("é", "weights", ConfigError)
    with pytest.raises(ConfigError, match=r"weights must be UTF-8; got \\udcff; rename it"):
        check_utf8("\udcff", "weights", ConfigError)
    # as the é comes out under LC_ALL=C, where file names are taken for ASCII
    monkeypatch.setattr(os, "fsencode", lambda text: text.encode("ascii", "surrogateescape"))
    with pytest.raises(ConfigError, match=r"locale.*; got \\udcc3\\udca9; set LC_ALL=C\.UTF-8"):
        check_utf8("\udcc3\udca9", "weights", ConfigError)


def test_a_relative_path_that_leads_nowhere_says_from_where(tmp_path, monkeypatch):
    """A study file's paths are of the working directory, which may be another than is thought."""
    from asesearch.backbones.files import read_checkpoint
    from asesearch.data.folder import list_folder
    from asesearch.errors import CheckpointError, DataError

    monkeypatch.chdir(tmp_path)
    from_here = re.escape(f" (from the working directory {tmp_path}); check the path")
    with pytest.raises(CheckpointError, match=f"no checkpoint at net.safetensors{from_here}, or"):
        read_checkpoint(Path("net.safetensors"))
    with pytest.raises(DataError, match=f"no image folder images{from_here}"):
        list_folder(Path("images"))
    with pytest.raises(CheckpointError, match=r"net.safetensors; check the path"):
        read_checkpoint(tmp_path / "net.safetensors")
