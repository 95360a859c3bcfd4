"""Storages and directories that a search can't go on in: refused before anything is paid for, with
what is really wrong."""

import json
import os
import re
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from asesearch.errors import StudyError
from asesearch.search.runner import run_trials
from asesearch.study.changes import is_in_use, other_inputs
from asesearch.study.directory import is_whole
from asesearch.study.identity import StudyFile
from asesearch.study.opening import check_to_search
from asesearch.study.storage import storage_errors
from asesearch.study.study import Study
from asesearch.study.urls import parse_url
from asesearch.study.workers import worked_s
from tests.search.fake_search import FakeBench, make_config
from tests.study.test_storage import snapshot

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 2700\n"


def refused(url, run_dir):
    with pytest.raises(StudyError) as caught:
        check_to_search(make_config(storage=url), run_dir)
    return str(caught.value)


def begun(run_dir, **search):
    config = make_config(num_trials=1, **search)
    study = Study(config, run_dir)
    run_trials(study, FakeBench(config=config))
    return config


WRONG = {
    "gone/s.db": "the folder .*gone does not exist; make it",
    "folder": "folder is a folder; name a file in it",
    "text.db": r"text\.db is no SQLite database; name another file",
    "file:new.db?mode=ro&uri=true": "with mode=ro a search can't write its trials; leave mode out",
    "file:new.db?mode=rw&uri=true": "with mode=rw a search can't make the file; leave mode out",
}


@pytest.mark.parametrize("path", WRONG)
def test_a_look_ahead_tries_the_path_of_a_sqlite_storage(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.db").write_text("no database" * 100)
    before = snapshot(tmp_path)
    with pytest.raises(StudyError, match=WRONG[path]):
        check_to_search(make_config(storage=f"sqlite:///{path}"), tmp_path / "run")
    assert snapshot(tmp_path) == before
    for url in ("sqlite:///new.db", None):  # None: in the study directory, which is not there yet
        assert check_to_search(make_config(storage=url), tmp_path / "run") is None


def test_a_look_ahead_knows_how_long_a_path_sqlite_takes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = r"name .* at most 247 bytes, .*-journal.* got {}: n+…; choose a shorter one$"
    for path, why in (
        ("n" * 248 + ".db", name.format(251)),
        ("n" * 300 + ".db", name.format(303)),
        (f"{'n' * 250}/{'n' * 250}/s.db", "path .* at most 504 bytes, which is SQLite's limit; "),
    ):
        assert re.search(why, refused(f"sqlite:///{path}", tmp_path / "run"))
    assert check_to_search(make_config(storage=f"sqlite:///{'n' * 244}.db"), tmp_path) is None


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs /proc, where no file is made")
def test_a_look_ahead_tries_to_make_a_new_database(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: True)  # as root has it everywhere
    why = refused("sqlite:////proc/new.db", tmp_path / "run")
    assert "no file can be made in /proc (" in why and why.endswith("; name another place")


@pytest.mark.parametrize("item", ["s.db", "."])
def test_a_look_ahead_refuses_what_may_not_be_written(tmp_path, monkeypatch, item):
    (tmp_path / "s.db").touch()
    locked = tmp_path / item
    monkeypatch.setattr(os, "access", lambda path, mode: path != locked)
    assert f"you may not write to the {'file' if item == 's.db' else 'folder'} {locked}" in refused(
        f"sqlite:///{tmp_path}/s.db", tmp_path / "run"
    )


@pytest.mark.parametrize("key", ["url", "given"])
def test_a_storage_on_record_that_is_no_text_is_named(tmp_path, key):
    StudyFile(make_config(), "0" * 32, "sqlite:////a/s.db", settled=True).write(tmp_path)
    data = json.loads((tmp_path / "study.json").read_text())
    data["storage"][key] = float("nan")
    (tmp_path / "study.json").write_text(json.dumps(data))
    with pytest.raises(StudyError, match=r"study\.json has a storage whose URL is no text; "):
        StudyFile.read(tmp_path)


@pytest.mark.parametrize(
    ("parameters", "why"),
    [
        ("timeout=abc", "could not convert string to float: 'abc'"),
        ("timeout=1&timeout=2", r"float\(\) argument must be .* not 'tuple'"),
        ("mode=ro", "'mode' are not accepted by the pysqlite driver"),
    ],
)
def test_parameters_of_a_url_that_its_driver_does_not_take(parameters, why):
    with pytest.raises(StudyError, match=f"must be what its driver takes; got .*{why}"):
        parse_url(f"sqlite:///s.db?{parameters}")
    assert parse_url("sqlite:////a/s.db?timeout=3").query == {"timeout": "3"}


def test_a_url_that_is_not_utf_8_is_refused_without_its_password():
    for url in ("sqlite:///\udce9.db", "postgresql://u:s3cret\udce9@host/db"):
        with pytest.raises(StudyError, match="a storage URL must be UTF-8; got .*; correct") as no:
            parse_url(url)
        assert "s3cret" not in str(no.value) and str(no.value).isprintable()


@pytest.mark.thorough
def test_a_study_saved_by_an_editor_with_a_byte_order_mark_is_read(tmp_path):
    config = begun(tmp_path)
    path = tmp_path / "study.json"
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert Study.open(tmp_path).config == config and check_to_search(config, tmp_path) is not None


def test_what_was_lost_or_damaged_is_named(tmp_path):
    config = begun(tmp_path)
    study = Study.open(tmp_path)
    database = (tmp_path / "study.db").read_bytes()
    (tmp_path / "study.db").write_bytes(database[: len(database) // 2])
    for use in (lambda: check_to_search(config, tmp_path), lambda: Study.open(tmp_path)):
        with pytest.raises(StudyError, match=r"study\.db is damaged, so its trials can't be read"):
            use()
    (tmp_path / "study.db").write_bytes(database)
    (tmp_path / "inputs.json").write_text("null")
    with pytest.raises(StudyError, match=r"inputs\.json: it holds no object; .* remove it"):
        other_inputs(study.optuna, tmp_path, {"weights": "a"})
    (tmp_path / "study.json").unlink()
    for use in (lambda: check_to_search(config, tmp_path), lambda: Study.open(tmp_path)):
        with pytest.raises(StudyError, match=r"study\.json was lost.*restore it from a copy"):
            use()


def test_a_studys_own_database_that_is_none_any_more_is_not_another_file(tmp_path):
    begun(tmp_path)
    for content, why in (
        (bytes(9000), r"study\.db is damaged, .*; restore it from a copy, or search into another"),
        (
            LFS,
            r"study\.db is a Git LFS pointer .* 2,700 bytes were not fetched; run `git lfs pull`",
        ),
    ):
        (tmp_path / "study.db").write_bytes(content)
        with pytest.raises(StudyError, match=why):
            Study.open(tmp_path)


ANOTHERS = {
    "alembic_version holds 'cbc13b556ace'": (
        "create table alembic_version(version_num varchar(32) primary key)",
        "insert into alembic_version values ('cbc13b556ace')",
    ),
    "tables studies and trials are another": (
        "create table studies(id integer primary key, title text)",
        "create table trials(id integer primary key)",
    ),
}


@pytest.mark.parametrize("why", ANOTHERS)
def test_the_database_of_another_program_is_refused_and_left_as_it_is(tmp_path, why):
    path = tmp_path / "another.db"
    with closing(sqlite3.connect(path)) as database, database:
        for statement in ANOTHERS[why]:
            database.execute(statement)
    before = path.read_bytes()
    for use in (check_to_search, Study):
        with pytest.raises(StudyError, match=f"{why}.*; give asesearch a database of its own"):
            use(make_config(storage=f"sqlite:///{path}"), tmp_path / "run")
    assert path.read_bytes() == before


def test_a_study_whose_database_another_program_uses_too_is_refused(tmp_path):
    config = begun(tmp_path)
    with closing(sqlite3.connect(tmp_path / "study.db")) as database, database:
        database.execute("insert into alembic_version values ('cbc13b556ace')")
    for use in (lambda: check_to_search(config, tmp_path), lambda: Study.open(tmp_path)):
        with pytest.raises(StudyError, match="must hold one row.*'cbc13b556ace', 'v"):
            use()


def test_a_study_in_wal_mode_is_read_where_sqlite_may_make_no_files(tmp_path, monkeypatch):
    begun(tmp_path)
    with closing(sqlite3.connect(tmp_path / "study.db")) as database:
        database.execute("pragma journal_mode = wal")
    real = sqlite3.connect

    class Refused(sqlite3.Connection):  # as in a folder that may only be read
        def execute(self, *_):
            raise sqlite3.OperationalError("unable to open database file")

    def connect(path, **options):
        return real(path, **options, **({"factory": Refused} if options.get("uri") else {}))

    monkeypatch.setattr(sqlite3, "connect", connect)
    assert len(Study.open(tmp_path).records()) == 1
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.R_OK)
    with pytest.raises(StudyError, match=r"you may not read the file .*study\.db; change its perm"):
        Study.open(tmp_path)


def test_json_that_is_damaged_in_the_database_is_one_line(tmp_path):
    begun(tmp_path)
    with closing(sqlite3.connect(tmp_path / "study.db")) as database, database:
        database.execute("update trial_user_attributes set value_json = '{'")
    with pytest.raises(StudyError, match=r"study\.db is damaged: .* JSON; got '\{'; restore it"):
        Study.open(tmp_path).records()
    with pytest.raises(json.JSONDecodeError), storage_errors("sqlite:////a.db"):
        json.loads("{")  # of another file, which is not the database's fault


def test_weights_that_may_not_be_read_are_not_called_damaged(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"x")
    assert not is_whole(path, "made again")
    with monkeypatch.context() as patch:
        patch.setattr(
            type(path), "open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "no"))
        )
        with pytest.raises(StudyError, match="check its permissions"):
            is_whole(path, "made again")


def test_a_folder_that_may_not_be_read_is_not_an_empty_one(tmp_path, monkeypatch):
    begun(tmp_path)
    study = Study.open(tmp_path)
    (tmp_path / "locks").mkdir(exist_ok=True)
    scan = os.scandir
    for name, use in (
        ("confirmations", study.results),
        ("workers", lambda: worked_s(tmp_path)),
        ("locks", lambda: is_in_use(tmp_path)),
    ):

        def refuse(folder, name=name):
            if os.path.basename(folder) == name:
                raise PermissionError(13, "Permission denied")
            return scan(folder)

        with monkeypatch.context() as patch:
            patch.setattr(os, "scandir", refuse)
            with pytest.raises(
                StudyError, match=f"^can't read .*{name}: Permission denied; check its permissions$"
            ):
                use()
        use()  # nor is one that isn't there an error


# -- copies of a study directory -----------------------------------------------------------------


def test_a_copied_directory_does_not_take_over_the_storage_of_the_original(tmp_path):
    url = f"sqlite:///{tmp_path}/s.db"
    config = begun(tmp_path / "one", storage=url)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    before = snapshot(tmp_path)
    for use in (check_to_search, Study):
        with pytest.raises(StudyError, match="of .*two and .*one one is a copy of the other"):
            use(config, tmp_path / "two")
    assert {k: v for k, v in snapshot(tmp_path).items() if "lock" not in k} == {
        k: v for k, v in before.items() if "lock" not in k
    }
    assert len(Study.open(tmp_path / "two").records()) == 1  # reading it is no harm
    assert check_to_search(config, tmp_path / "one") is not None
    (tmp_path / "one").rename(tmp_path / "kept")
    Study(config, tmp_path / "two")
    with pytest.raises(StudyError, match="of .*kept and .*two one is a copy of the other"):
        Study(config, tmp_path / "kept")


def test_of_two_copies_the_one_that_was_searched_last_goes_on(tmp_path):
    """Else each would be refused and send to the other."""
    one, two, kept = (tmp_path / name for name in ("one", "two", "kept"))
    config = begun(one, storage=f"sqlite:///{tmp_path}/s.db")
    for last, other in ((two, one), (one, two)):
        shutil.rmtree(two, ignore_errors=True)
        shutil.copytree(one, two)
        other.rename(kept)
        Study(config, last)
        kept.rename(other)
        Study(config, last)
        for use in (check_to_search, Study):
            with pytest.raises(StudyError, match=f"continued in {last}; search there"):
                use(config, other)


def test_one_directory_under_several_paths_is_no_copy(tmp_path):
    config = begun(tmp_path / "one", storage=f"sqlite:///{tmp_path}/s.db")
    (tmp_path / "mounted").symlink_to(tmp_path / "one")
    Study(config, tmp_path / "mounted")
    (tmp_path / "one").rename(tmp_path / "moved")
    assert len(Study(config, tmp_path / "moved").records()) == 1


@pytest.mark.parametrize("same", [True, False])
def test_a_directory_that_is_mounted_twice_is_known_by_what_is_written_in_it(
    tmp_path, monkeypatch, same
):
    """Device and inode tell nothing: a second mount may have others, and the roots of two volumes
    the same inode."""
    config = begun(tmp_path / "one", storage=f"sqlite:///{tmp_path}/s.db")
    if same:
        (tmp_path / "two").symlink_to(tmp_path / "one")
    else:
        shutil.copytree(tmp_path / "one", tmp_path / "two")
    monkeypatch.setattr(Path, "samefile", lambda *_: False)
    if same:
        Study(config, tmp_path / "two")
    else:
        with pytest.raises(StudyError, match="is a copy of the other"):
            Study(config, tmp_path / "two")
    assert not list(tmp_path.rglob(".same-*"))


def test_a_copy_with_its_own_database_is_a_study_of_its_own(tmp_path):
    config = begun(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert len(Study(config, tmp_path / "two").records()) == 1
    assert len(Study(config, tmp_path / "one").records()) == 1


def test_a_path_with_a_nul_is_refused_as_one(tmp_path):
    with pytest.raises(StudyError, match="has no NUL characters"):
        parse_url("sqlite:///a%00b.db")
