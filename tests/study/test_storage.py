"""The study's storage and identity: no trial of another study, none lost, nothing written by
reading."""

import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import optuna
import pytest

from asesearch.errors import StudyError
from asesearch.schedule import ExitSchedule
from asesearch.search.runner import Runner, run_trials
from asesearch.study import urls
from asesearch.study.changes import is_in_use
from asesearch.study.storage import IDENTITY, look
from asesearch.study.study import Study
from asesearch.study.urls import parse_url, secrets, shown
from tests.search.fake_search import FakeBench, make_config

# -- URLs ----------------------------------------------------------------------------------------

MEMORY = [
    "sqlite://",
    "sqlite:///",
    "sqlite:///:memory:",
    "sqlite:///file::memory:",
    "sqlite:///file::memory:?uri=true",
    "sqlite:///file::memory:?cache=shared&uri=true",
    "sqlite:///file:name?mode=memory&cache=shared&uri=true",
    "sqlite+pysqlite:///:memory:",
]


@pytest.mark.parametrize("url", MEMORY)
def test_a_storage_in_memory_is_refused(tmp_path, url):
    with pytest.raises(StudyError, match=r"must outlive the process; got .*leave --storage out"):
        Study(make_config(storage=url), tmp_path / "run")
    assert not (tmp_path / "run" / "study.json").exists()


@pytest.mark.parametrize(("umask", "mode"), [(0o002, 0o664), (0o022, 0o644), (0o077, 0o600)])
def test_the_umask_decides_who_may_write_to_a_study(tmp_path, umask, mode):
    """Of a folder that a group shares, SQLite would let the first of it alone write."""
    before = os.umask(umask)
    try:
        Study(make_config(), tmp_path / "run")
    finally:
        os.umask(before)
    assert (tmp_path / "run/study.db").stat().st_mode & 0o777 == mode


SECRETS = [
    ("postgresql://user:pa%24%24w%C3%B6rd%40x@host/db", ["pa$$wörd@x"]),
    ("postgresql:///db?host=host&user=user&password=pa%24%24", ["pa$$"]),
    ("postgresql://user@host/db?sslmode=verify-full&sslpassword=of-the-key", ["of-the-key"]),
    ("mysql+pymysql://user:one@host/db?passwd=two&ssl_key=/a/file", ["one", "two"]),
]


@pytest.mark.parametrize(("text", "hidden"), SECRETS)
def test_a_url_is_shown_and_recorded_without_what_is_secret(text, hidden):
    url = urls.raw_url(text)
    assert sorted(secrets(url)) == sorted(hidden)
    assert not any(word in shown(url) for word in hidden)
    kept = urls.raw_url(shown(url))  # what is left still reads as the same place
    assert (kept.host, kept.database, kept.username) == (url.host, url.database, url.username)
    assert set(url.query) - set(kept.query) <= {"password", "sslpassword", "passwd"}


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://user:s3cret@x@host/db",  # @ not written %40
        "postgresql://user:s3cret@host:port/db",
        "postgresql://user:a@s3cret:x@host/db",
        "user:s3cret@host/db",
        "postgresql:/user:s3cret@host/db",
        "nosuchdb://user:s3cret@host/db",
        "host=localhost user=boss password=s3cret",
        r"host=localhost PASSWORD = 'a \' s3cret' sslpassword=a\ s3cret",
        "passwd='s3cret",
        "postgresql+nosuch://user:s3cret@host/db?password=s3cret",
    ],
)
def test_a_url_that_is_none_is_refused_without_its_password(text):
    with pytest.raises(StudyError) as caught:
        parse_url(text)
    assert "s3cret" not in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.__cause__ is None or "s3cret" not in str(caught.value.__cause__)


def no_drivers(monkeypatch, *names):
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)  # then `import NAME` raises ImportError


def test_a_missing_driver_is_named_with_what_to_install(monkeypatch):
    no_drivers(monkeypatch, "psycopg", "psycopg2", "MySQLdb", "pymysql")
    for url in ("postgresql://u:s3cret@host/db", "postgres://u:s3cret@host/db"):
        with pytest.raises(
            StudyError, match=r"postgresql://u@host/db .*psycopg\b.* pip install 'asesearch\[post"
        ) as caught:
            parse_url(url)
        assert "s3cret" not in str(caught.value)
    with pytest.raises(StudyError, match="driver is not installed .*pip install pymysql"):
        parse_url("mysql://u@host/db")


@pytest.mark.parametrize(
    ("missing", "driver"), [((), "psycopg"), (("psycopg2",), "psycopg"), (("psycopg",), "psycopg2")]
)
def test_postgresql_takes_the_driver_that_is_here(monkeypatch, missing, driver):
    for name in {"psycopg", "psycopg2"} - set(missing):
        monkeypatch.setitem(sys.modules, name, sqlite3)  # something that can be imported
    no_drivers(monkeypatch, *missing)
    for scheme in ("postgresql", "postgres"):
        assert (
            urls.with_driver(parse_url(f"{scheme}://u@host/db")).drivername
            == f"postgresql+{driver}"
        )


def test_a_named_driver_that_is_missing_is_not_replaced_in_silence(monkeypatch):
    no_drivers(monkeypatch, "psycopg2")
    monkeypatch.setitem(sys.modules, "psycopg", sqlite3)
    with pytest.raises(
        StudyError, match=r"psycopg2-binary, or write postgresql://… for the driver that is here"
    ):
        parse_url("postgresql+psycopg2://u@host/db")
    no_drivers(monkeypatch, "psycopg")
    with pytest.raises(StudyError, match=r"pip install psycopg2-binary$"):
        parse_url("postgresql+psycopg2://u@host/db")
    with pytest.raises(StudyError, match="asynchronous driver; write sqlite://"):
        monkeypatch.setitem(sys.modules, "aiosqlite", sqlite3)
        parse_url("sqlite+aiosqlite:////a/b.db")


def test_sqlite_paths_that_can_not_be_used_are_named(tmp_path):
    (tmp_path / "folder").mkdir()
    for path, why in (
        ("gone/s.db", "gone does not exist; make it"),
        ("folder", "is a folder; name a file"),
    ):
        with pytest.raises(StudyError, match=why):
            Study(make_config(storage=f"sqlite:///{tmp_path}/{path}"), tmp_path / "run")
    with pytest.raises(StudyError, match="three slashes"):
        parse_url("sqlite://study.db")


# -- identity ------------------------------------------------------------------------------------


def run(config, run_dir, **bench):
    study = Study(config, run_dir)
    fake = FakeBench(config=config, **bench)
    run_trials(study, fake)
    return study, fake


def on_record(run_dir):
    return json.loads((run_dir / "study.json").read_text())


def test_a_forgotten_storage_is_the_one_on_record(tmp_path, monkeypatch):
    url = f"sqlite:///{tmp_path}/s.db"
    first, _ = run(make_config(num_trials=2, storage=url), tmp_path / "run")
    second, bench = run(make_config(num_trials=3), tmp_path / "run")
    assert len(bench.tried) == 1 and len(second.records()) == 3
    assert not (tmp_path / "run" / "study.db").exists()
    assert on_record(tmp_path / "run")["storage"]["url"] == f"sqlite:///{tmp_path}/s.db"
    assert len(Study.open(tmp_path / "run").records()) == 3
    third, bench = run(make_config(num_trials=4, storage=url), tmp_path / "run")
    assert len(bench.tried) == 1 and len(third.records()) == 4


@pytest.mark.thorough
def test_a_relative_storage_is_found_from_any_working_directory(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    config = make_config(num_trials=2, storage="sqlite:///s.db")
    run(config, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "b")
    assert len(Study.open(tmp_path / "run").records()) == 2
    for again in (config, make_config(num_trials=2)):
        _, bench = run(again, tmp_path / "run")
        assert bench.tried == []
    # b/s.db, another study's
    run(make_config(num_trials=1, storage="sqlite:///s.db"), tmp_path / "other")
    _, bench = run(config, tmp_path / "run")
    assert (
        bench.tried == []
        and on_record(tmp_path / "run")["storage"]["url"] == f"sqlite:///{tmp_path}/a/s.db"
    )


def test_a_storage_without_the_study_is_refused_and_left_as_it_is(tmp_path):
    run(make_config(num_trials=2), tmp_path / "run")
    before = (tmp_path / "run" / "study.json").read_bytes()
    with pytest.raises(
        StudyError, match=r"has its trials in .*run/study\.db, and .*new\.db does not.*copy_study"
    ):
        Study(make_config(storage=f"sqlite:///{tmp_path}/new.db"), tmp_path / "run")
    assert not (tmp_path / "new.db").exists()
    assert (tmp_path / "run" / "study.json").read_bytes() == before


@pytest.mark.thorough
def test_a_moved_storage_carries_the_study(tmp_path):
    run(make_config(num_trials=2), tmp_path / "run")
    with pytest.raises(StudyError, match="copy_study") as caught:
        Study(make_config(storage=f"sqlite:///{tmp_path}/new.db"), tmp_path / "run")
    command = str(caught.value).partition("python -c ")[2].strip('"')
    subprocess.run([sys.executable, "-W", "ignore", "-c", command], check=True, cwd=tmp_path)
    (tmp_path / "run" / "study.db").unlink()
    moved, bench = run(
        make_config(num_trials=3, storage=f"sqlite:///{tmp_path}/new.db"), tmp_path / "run"
    )
    assert len(moved.records()) == 3 and len(bench.tried) == 1
    assert on_record(tmp_path / "run")["storage"]["url"].endswith("/new.db")


def test_two_studies_of_one_name_do_not_mix(tmp_path):
    url = f"sqlite:///{tmp_path}/s.db"
    one, _ = run(make_config(num_trials=2, storage=url), tmp_path / "one")
    with pytest.raises(StudyError, match="another study named 'fake'.*another name"):
        Study(make_config(storage=url), tmp_path / "two")
    run(make_config({"name": "other"}, num_trials=1, storage=url), tmp_path / "two")
    assert len(Study.open(tmp_path / "one").records()) == 2
    assert len(Study.open(tmp_path / "two").records()) == 1
    assert on_record(tmp_path / "one")["id"] != on_record(tmp_path / "two")["id"]


def test_a_lost_database_is_not_begun_again_in_silence(tmp_path):
    run(make_config(num_trials=2), tmp_path)
    (tmp_path / "study.db").unlink()
    with pytest.raises(StudyError, match="was lost or replaced.*restore the storage"):
        Study(make_config(), tmp_path)
    with pytest.raises(StudyError, match="holds no study named 'fake'"):
        Study.open(tmp_path)
    assert not (tmp_path / "study.db").exists()


def test_a_failed_beginning_binds_nothing(tmp_path):
    with pytest.raises(StudyError):
        Study(make_config(storage="sqlite:////nowhere/s.db"), tmp_path)
    study, _ = run(make_config(num_trials=1, storage=f"sqlite:///{tmp_path}/s.db"), tmp_path)
    assert len(study.records()) == 1


def former(run_dir, storage=None):
    """Make a study directory what the release before identities left."""
    data = on_record(run_dir)
    url = storage or data["storage"]["url"]
    config = {**data["config"], "search": {**data["config"]["search"], "storage": url}}
    (run_dir / "study.json").write_text(json.dumps({"version": 1, "config": config}, indent=1))
    database = run_dir / "study.db" if url is None else Path(url.removeprefix("sqlite:///"))
    with sqlite3.connect(database) as connection:
        connection.execute("delete from study_user_attributes where key = ?", (IDENTITY,))
    connection.close()


@pytest.mark.parametrize("own", [True, False])
def test_a_study_of_the_former_release_is_adopted(tmp_path, own):
    url = None if own else f"sqlite:///{tmp_path}/s.db"
    run(make_config(num_trials=2, storage=url), tmp_path / "run")
    former(tmp_path / "run")
    before = snapshot(tmp_path)
    assert len(Study.open(tmp_path / "run").records()) == 2  # reading adopts nothing
    assert snapshot(tmp_path) == before
    study, bench = run(make_config(num_trials=3), tmp_path / "run")
    assert len(bench.tried) == 1 and len(study.records()) == 3
    data = on_record(tmp_path / "run")
    assert (
        data["version"] == 2
        and study.optuna.user_attrs[IDENTITY] == data["id"]
        and len(data["id"]) == 32
    )


def test_a_later_format_is_refused(tmp_path):
    (tmp_path / "study.json").write_text(json.dumps({"version": 3, "config": {}}))
    with pytest.raises(StudyError, match="has version 3; this release reads 1 and 2"):
        Study(make_config(), tmp_path)


# -- changed inputs ------------------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize(
    "change",
    [
        {"train": {"lr": 3e-4}},
        {"search": {"num_intervals": 5}},
        {"name": "another"},
        {"sampling": {"num_steps": 7}},
    ],
)
def test_a_change_before_anything_is_on_record_is_taken_over(tmp_path, change, caplog):
    first = Study(make_config(), tmp_path)
    space_of = FakeBench(config=first.config)
    Runner(first, space_of).asker.enqueue_warm_start(
        [], []
    )  # a trial that waits, in the former space
    (tmp_path / "latency.json").write_text("{}")
    data = make_config().model_dump(mode="json")
    for key, value in change.items():
        data[key] = value if isinstance(value, str) else {**data[key], **value}
    data["search"]["warm_start"] = []
    config = type(first.config).model_validate(data)
    study, bench = run(config, tmp_path)
    assert "nothing was on record yet" in caplog.text
    assert len(study.records()) == 8 and on_record(tmp_path)["config"]["name"] == config.name
    assert not (tmp_path / "latency.json").exists()
    assert optuna.get_all_study_names(study.optuna._storage) == [config.name]
    with pytest.raises(StudyError, match="was begun with other settings"):
        Study(make_config(), tmp_path)


def test_other_weights_before_anything_is_on_record_are_taken_over(tmp_path):
    config = make_config(num_trials=1)
    study = Study(config, tmp_path)
    study.check_inputs(FakeBench(config=config, weights="first").identity)
    _, bench = run(config, tmp_path, weights="second")
    assert len(bench.tried) == 1
    with pytest.raises(StudyError, match="begun with other weights"):
        run(config, tmp_path, weights="first")


def test_another_worker_is_not_overruled(tmp_path):
    config = make_config()
    study = Study(config, tmp_path)
    study.check_inputs(FakeBench(config=config, weights="first").identity)
    with Runner(study, FakeBench()).fleet.claim(ExitSchedule.full(6)):
        assert is_in_use(tmp_path)
        with pytest.raises(StudyError, match="another worker is at the study"):
            study.check_inputs(FakeBench(config=config, weights="second").identity)
        with pytest.raises(StudyError, match="another worker is at the study"):
            Study(make_config({"train": {"lr": 1e-3}}), tmp_path)
    assert not is_in_use(tmp_path)


# -- reading -------------------------------------------------------------------------------------


def snapshot(folder):
    """Every path below a folder, with its content's hash and time of change."""
    return {
        str(p.relative_to(folder)): (
            hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "",
            p.stat().st_mtime_ns,
        )
        for p in sorted(folder.rglob("*"))
    }


def test_reading_changes_nothing(tmp_path):
    run(make_config(num_trials=2), tmp_path)
    shutil.rmtree(tmp_path / "locks")
    before = snapshot(tmp_path)
    study = Study.open(tmp_path)
    assert len(study.results().records) == 2 and study.record(1).origin == "6 6 3 3"
    assert snapshot(tmp_path) == before
    with pytest.raises(Exception, match="readonly|internal|commit"):
        study.optuna.set_user_attr("a", 1)
    assert snapshot(tmp_path) == before


def test_a_database_with_an_unfinished_write_is_read_from_a_copy(tmp_path):
    run(make_config(num_trials=2), tmp_path / "run")
    crash = (
        "import os, sqlite3, sys\n"
        "c = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "c.execute('PRAGMA cache_size = 1')\n"
        "c.execute('BEGIN IMMEDIATE')\n"
        "c.execute('create table big (x)')\n"
        "for _ in range(200): c.execute('insert into big values (zeroblob(4000))')\n"
        "c.execute('delete from trial_user_attributes')\n"
        "c.execute('create table other as select * from big')\n"
        "os._exit(9)\n"
    )
    subprocess.run([sys.executable, "-c", crash, str(tmp_path / "run" / "study.db")], check=False)
    assert (tmp_path / "run" / "study.db-journal").stat().st_size > 512  # a hot journal
    before = snapshot(tmp_path)
    study = Study.open(tmp_path / "run")
    assert len(study.records()) == 2
    assert snapshot(tmp_path) == before
    # where it may be written, SQLite mends it
    resumed, _ = run(make_config(num_trials=3), tmp_path / "run")
    assert len(resumed.records()) == 3 and not (tmp_path / "run" / "study.db-journal").exists()


# -- another release of Optuna -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "fix"),
    [
        ("v2.6.0.a", "optuna storage upgrade --storage sqlite:///"),
        ("v9.1.0.a", "pip install -U optuna"),
    ],
)
def test_tables_of_another_optuna_are_named_and_left_alone(tmp_path, schema, fix):
    run(make_config(num_trials=1), tmp_path)
    with sqlite3.connect(tmp_path / "study.db") as connection:
        connection.execute("update alembic_version set version_num = ?", (schema,))
        connection.execute("update version_info set library_version = '1.2.3'")
    connection.close()
    before = (tmp_path / "study.db").read_bytes()
    for use in (Study.open, lambda path: Study(make_config(), path)):
        with pytest.raises(
            StudyError, match=rf"Optuna 1\.2\.3 with tables of version {schema}.*{fix}"
        ) as caught:
            use(tmp_path)
        assert optuna.__version__ in str(caught.value) and "\n" not in str(caught.value)
    assert (tmp_path / "study.db").read_bytes() == before


def test_strange_paths(tmp_path):
    run_dir = tmp_path / "a b%20c?d#e{f}é"
    run(make_config(num_trials=1), run_dir)
    assert len(Study.open(run_dir).records()) == 1
    assert sorted(os.listdir(tmp_path)) == [run_dir.name]
    assert look(parse_url(f"sqlite:///{tmp_path}/none.db"), "fake", read_only=True).study_id is None
