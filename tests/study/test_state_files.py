"""Files of a study directory that a power cut left empty or half written: made again, or named in
one line."""

import json
import os
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from asesearch.cli import app
from asesearch.errors import AseSearchError
from asesearch.files import replacing
from tests.study.test_storage import snapshot
from tests.test_cli import ARGS, STUDY, call

LADDER = """
[elastic]
num_steps = 3
batch_size = 8
[map]
num_bins = 2
num_images = 4
[promotion]
num_samples = 70
repeats = 2
explore = 0
threshold = 0.0
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("state")
    (folder / "scratch.toml").write_text(STUDY.format(backbone=ARGS))
    call(
        "train",
        folder / "scratch.toml",
        "--out",
        folder / "net.safetensors",
        "--run-dir",
        folder / "train",
    )
    text = STUDY.format(backbone=f'checkpoint = "{folder}/net.safetensors"') + LADDER
    (folder / "tiny.toml").write_text(
        text.replace("num_trials = 3", 'num_trials = 2\nkeep_weights = "all"')
    )
    with pytest.MonkeyPatch.context() as patch:
        without_figures(patch)
        call("search", folder / "tiny.toml", "--out", folder / "run", "--report", folder / "report")
    return folder


def without_figures(monkeypatch):
    """Drawing takes seconds, and nothing of the study."""
    monkeypatch.setattr("asesearch.report.page.drawings", lambda results: [])


def empty(path):
    path.write_bytes(b"")


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def noise(path):
    path.write_bytes(os.urandom(300))


def folder(path):
    path.unlink()
    path.mkdir()


def attempt(*args):
    """Exit code and stderr of a command; a traceback fails the test, as does `Aborted!`."""
    result = CliRunner().invoke(app, [str(a) for a in args])
    error = result.exception
    if isinstance(error, AseSearchError):
        assert "\n" not in str(error), error
        return 1, str(error)
    assert error is None or isinstance(error, SystemExit), repr(error)
    assert "Aborted" not in result.stderr
    return result.exit_code, result.stderr


def commands(place, run):
    return {
        "report": ("report", run, "--out", run.parent / "report"),
        "export": ("export", run, "--trial", 1, "--out", run.parent / "bundle"),
        "evaluate": ("evaluate", run, "--trial", 1, "--check"),
        "search": (
            "search",
            place / "tiny.toml",
            "--out",
            run,
            "--report",
            run.parent / "report",
            "--trials",
            3,
        ),
    }


#: By file: the commands that end well without it, by making it again or doing without; all others
#: name it.
FILES = {
    "study.json": "",
    "study.db": "",
    "inputs.json": "report export",
    "environment.json": "report export evaluate search",
    "latency.json": "report export evaluate search",
    "map.json": "report export evaluate search",
    "warm-up.json": "report export evaluate search",
    "confirmations/0.json": "report export evaluate search",
    "elastic.safetensors": "report export evaluate search",
    "weights.safetensors": "report",
    "samples.npz": "report export evaluate search",
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", [empty, half, noise, folder])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_made_again_or_named(place, tmp_path, caplog, name, damage):
    run = tmp_path / "run"
    shutil.copytree(place / "run", run)
    # trial 1's folder; the full network's is "3"
    record = next(p for p in (run / "trials").iterdir() if p.name != "3")
    path = record / name if name in ("weights.safetensors", "samples.npz") else run / name
    damage(path)
    for command, args in commands(place, run).items():
        caplog.clear()
        code, said = attempt(*args)
        said += caplog.text
        well = command in FILES[name].split() and damage is not folder
        assert code == 0 or (not well and name in said), (command, said)
        if well:
            assert code == 0, (command, said)


@pytest.mark.slow
def test_what_is_made_again_is_whole(place, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(place / "run", run)
    names = (
        "latency.json",
        "map.json",
        "elastic.safetensors",
        "confirmations/0.json",
        "environment.json",
    )
    for name in names:
        empty(run / name)
    call(*commands(place, run)["search"])
    for name in names[:2] + names[3:]:
        assert json.loads((run / name).read_text())
    again = load_file(run / names[2])
    before = load_file(place / "run" / names[2])
    assert again.keys() == before.keys() and all(
        np.array_equal(again[k], before[k]) for k in before
    )
    call("report", run, "--out", tmp_path / "report")


@pytest.mark.thorough
def test_weights_of_another_trial_are_not_taken_for_its_own(place, tmp_path, caplog):
    run = tmp_path / "run"
    shutil.copytree(place / "run", run)
    own = next(p for p in (run / "trials").iterdir() if p.name != "3") / "weights.safetensors"
    right = load_file(own)
    shutil.copy(run / "trials" / "3" / "weights.safetensors", own)
    code, said = attempt("export", run, "--trial", 1, "--out", tmp_path / "bundle")
    assert (
        code == 1
        and "damaged, or another schedule's" in said
        and "was fine-tuned for 3 3 3 3, not" in caplog.text
    )
    assert not (tmp_path / "bundle").exists()
    (run / "confirmations" / "1.json").unlink()
    call(*commands(place, run)["search"])
    again = load_file(own)
    assert all(np.array_equal(again[k], right[k]) for k in right)


@pytest.mark.thorough
def test_reading_commands_change_nothing(place, tmp_path, monkeypatch):
    without_figures(monkeypatch)
    run = tmp_path / "study" / "run"
    shutil.copytree(place / "run", run)
    shutil.rmtree(run / "locks")
    before = snapshot(run)
    call("report", run, "--out", tmp_path / "report")
    call("export", run, "--trial", 1, "--out", tmp_path / "bundle")
    call("export", run, "--pick", "best-quality", "--out", tmp_path / "b", "--dry-run")
    call("evaluate", run, "--trial", 1, "--check")
    call("evaluate", run)
    assert snapshot(run) == before and [p.name for p in run.parent.iterdir()] == ["run"]


def test_a_file_is_on_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    calls = []
    sync = os.fsync
    replace = os.replace
    monkeypatch.setattr(
        os,
        "fsync",
        lambda handle: calls.append(os.readlink(f"/proc/self/fd/{handle}")) or sync(handle),
    )
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append("replace") or replace(a, b))
    with replacing(tmp_path / "a.json") as part:
        part.write_text("{}")
    assert calls == [str(part), "replace", str(tmp_path)]


def test_a_full_disk_is_seen_before_the_old_file_is_gone(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(AseSearchError, match="No space left"), replacing(tmp_path / "a") as part:
        part.write_text("new")
    assert (tmp_path / "a").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_study_without_its_database_is_named(place, tmp_path):
    shutil.copytree(place / "run", tmp_path / "run")
    (tmp_path / "run" / "study.db").unlink()
    code, said = attempt("report", tmp_path / "run", "--out", tmp_path / "report")
    assert code == 1 and "study.db" in said and "restore the storage" in said
    assert not (tmp_path / "run" / "study.db").exists()
