"""Streams that are full or closed, and paths that are not UTF-8: one line, before any work."""

import io
import json
import os
import sys

import pytest

from asesearch import cli
from asesearch.cli import streams
from asesearch.cli.printing import print_json
from asesearch.errors import AseSearchError, WriteError
from asesearch.files import check_utf8, check_weights_file

FULL = "/dev/full"
needs_full = pytest.mark.skipif(not os.path.exists(FULL), reason=f"no {FULL} here")


@needs_full
@pytest.mark.parametrize("args", [["--version"], ["--help"], ["pick", "--help"]])
def test_results_that_can_not_be_written_are_one_line(monkeypatch, capsys, args):
    with open(FULL, "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        monkeypatch.setattr(sys, "argv", ["asesearch", *args])
        monkeypatch.setattr(sys, "stderr", sys.stderr)  # `guard` replaces both
        with pytest.raises(SystemExit) as caught:
            cli.main()
    assert caught.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("error: can't write the results to stdout: No space left")
    assert said.count("\n") == 1


@needs_full
@pytest.mark.parametrize("buffering", [1, -1])
def test_no_probe_of_a_full_stdout_loses_the_error(monkeypatch, buffering):
    with open(FULL, "w", encoding="utf-8", buffering=buffering) as full:
        monkeypatch.setattr(sys, "stdout", streams.Results(full))
        with pytest.raises(WriteError, match="can't write the results to stdout"):
            print_json({"front": []})


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252", "utf-8"])
def test_an_encoding_that_lacks_letters_loses_no_results(monkeypatch, encoding):
    """JSON stays JSON, and the help, which has an ellipsis and more, is printed."""
    data = {"report": "日本/rep", "time": "0.5 ×", "bad": "\udcff", "emoji": "🙂"}
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    monkeypatch.setattr(sys, "stderr", sys.stderr)  # `guard` replaces both
    streams.guard()
    print_json(data)
    sys.stdout.flush()
    found = json.loads(raw.getvalue().decode(encoding))
    assert {**found, "bad": ""} == {**data, "bad": ""} and found["bad"] in ("\udcff", "\\udcff")
    monkeypatch.setattr(sys, "argv", ["asesearch", "latents", "--help"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 0 and b"--vae" in raw.getvalue()


@needs_full
@pytest.mark.parametrize("stream", ["full", None])
def test_what_is_only_told_may_get_lost(monkeypatch, capsys, stream):
    with open(FULL, "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", sys.stdout)
        monkeypatch.setattr(sys, "stderr", stream and full)
        streams.guard()
        print("told", file=sys.stderr, flush=True)
        assert sys.stderr.writable() and sys.stderr.encoding == "utf-8"
        print("result")
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), full.fileno())  # so that it can be closed
        sys.stderr.close()
    assert capsys.readouterr().out == "result\n"


@pytest.mark.parametrize(
    "command",
    [
        ("search", "STUDY", "--out", "BAD"),
        ("report", "BAD"),
        ("train", "STUDY", "--out", "w.safetensors", "--run-dir", "BAD"),
        ("train", "STUDY", "--out", "BAD.safetensors"),
        ("map", "STUDY", "--weights", "BAD", "--out", "m"),
    ],
)
def test_a_path_that_is_not_utf_8_is_refused(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    bad = os.fsdecode(b"a\xff")
    (tmp_path / "s.toml").write_text(
        'name = "a"\nbackbone.checkpoint = "shipped:fashion-mnist-dit"\n'
        'data = { kind = "fashion-mnist", split = "test" }\n'
    )
    args = [a.replace("STUDY", "s.toml").replace("BAD", bad) for a in command]
    monkeypatch.setattr(sys, "argv", ["asesearch", *args])
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    with pytest.raises(SystemExit) as caught:
        cli.main()
    said = capsys.readouterr().err
    assert caught.value.code == 1 and r"must be UTF-8; got " in said and r"a\udcff" in said
    assert said.count("\n") == 1 and sorted(os.listdir()) == ["s.toml"]


def test_other_paths_are_utf_8(tmp_path):
    check_utf8("Bilder/Äpfel", "weights", AseSearchError)
    check_weights_file(tmp_path / "Äpfel.safetensors")
