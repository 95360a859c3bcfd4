"""Files appear whole or not at all."""

import hashlib
import json

import pytest

from asesearch.errors import AseSearchError, WriteError
from asesearch.files import check_writable, file_sha256, replacing, write_json


@pytest.mark.parametrize("shared", [False, True])
def test_a_failed_write_leaves_what_was_there(tmp_path, shared):
    path = tmp_path / "deep" / "file"
    with replacing(path, shared=shared) as part:
        part.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(path, shared=shared) as part:
        part.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["file"]


def test_unwritable_is_one_line_that_names_the_file(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    for write in (check_writable, lambda p: write_json(p, {})):
        with pytest.raises(WriteError, match=r"can't write to .*\.json.*: .*; choose a folder") as caught:
            write(tmp_path / "file" / "x.json")
        assert isinstance(caught.value, AseSearchError) and "\n" not in str(caught.value)


def test_checking_leaves_nothing_and_json_round_trips(tmp_path):
    check_writable(tmp_path / "x.json")
    assert list(tmp_path.iterdir()) == []
    write_json(tmp_path / "x.json", {"a": [1, None]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [1, None]}
    assert file_sha256(tmp_path / "x.json") == hashlib.sha256((tmp_path / "x.json").read_bytes()).hexdigest()
