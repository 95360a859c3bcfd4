"""Names in a study directory fit a file system, and those of earlier releases are found again."""

import os
import stat
from pathlib import Path

import numpy as np
import pytest

from asesearch.errors import WriteError
from asesearch.schedule import ExitSchedule
from asesearch.study.directory import check_study_dir
from asesearch.study.study import Study

RNG = np.random.default_rng(0)
MANY = ExitSchedule.uniform_intervals(RNG.integers(1, 13, 1000).tolist(), 12)
TWENTY = ExitSchedule.uniform_intervals([12, 11] * 10, 12)


def at(run_dir):
    """A study that knows nothing but its directory."""
    study = object.__new__(Study)
    study.run_dir = run_dir
    return study


def test_a_thousand_intervals_have_a_folder_and_a_lock(tmp_path):
    folder = at(tmp_path).trial_dir(MANY)
    folder.mkdir(parents=True)
    (folder / "weights.safetensors.4194304.part").touch()
    (tmp_path / f"{folder.name}.lock").touch()
    other = ExitSchedule.uniform_intervals(
        [*MANY.exit_depths[:-1], MANY.exit_depths[-1] % 12 + 1], 12
    )
    assert at(tmp_path).trial_dir(other) != folder
    assert folder.name.startswith("-".join(map(str, MANY.merged().exit_depths[:10])))


def test_folders_of_earlier_releases_are_found(tmp_path):
    name = "-".join(["12-11"] * 10) + "_at_" + "-".join(str(50 * i) for i in range(1, 20))
    assert at(tmp_path).trial_dir(TWENTY).name != name
    (tmp_path / "trials" / name).mkdir(parents=True)
    assert at(tmp_path).trial_dir(TWENTY).name == name and len(name) > 100
    assert (
        at(tmp_path).trial_dir(ExitSchedule.from_string("12 12 9 6", 12)).name
        == "12-9-6_at_500-750"
    )


def test_a_path_that_sqlite_can_t_open_is_refused_and_no_shorter_one(tmp_path):
    """At the limit a real database opens; one byte more is refused."""
    import sqlite3

    size = 512 - len("/study.db-journal")
    base = tmp_path.resolve()
    while size - len(str(base)) > 120:
        base = base / ("a" * 100)
    longest = base / ("b" * (size - len(str(base)) - 1))
    check_study_dir(longest, None)
    assert list(tmp_path.iterdir()) == []
    longest.mkdir(parents=True)
    connection = sqlite3.connect(longest / "study.db")
    connection.execute("create table t(a)")
    connection.close()
    longer = longest.with_name(longest.name + "b")
    with pytest.raises(WriteError, match="at most 504 bytes.*got 505"):
        check_study_dir(longer, None)
    check_study_dir(longer, "postgresql://host/name")


@pytest.mark.parametrize(
    ("mode", "umask", "owner", "refused"),
    [
        (0o2775, 0o022, 12_345, True),
        (0o2775, 0o002, 12_345, False),
        (0o2755, 0o022, 12_345, False),  # the group may not write there
        (0o2775, 0o022, 54_321, False),  # nobody else has written there
        (0o2775, 0o022, 0, False),  # a volume that Kubernetes made for a pod's group
    ],
    ids=["shared", "umask 002", "not shared", "alone", "root's"],
)
def test_who_would_shut_the_group_out_is_refused(
    tmp_path, monkeypatch, mode, umask, owner, refused
):
    """The files of a user with umask 022 would end the others' searches in mid-work."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    run_dir.chmod(mode)
    look = Path.lstat

    def lstat(path):
        found = list(look(path))
        found[stat.ST_UID] = owner
        return os.stat_result(found)

    monkeypatch.setattr(Path, "lstat", lstat)
    monkeypatch.setattr(os, "geteuid", lambda: 54_321)
    before = os.umask(umask)
    try:
        check_study_dir(run_dir, None)
    except WriteError as error:
        assert refused and len(str(error)) <= 300
        assert "permissions 0644 and shut the others out; set umask 002" in str(error)
    else:
        assert not refused
    finally:
        os.umask(before)
    assert list(run_dir.iterdir()) == []
