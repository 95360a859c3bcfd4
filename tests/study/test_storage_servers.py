"""Several workers on one storage: a real PostgreSQL, and SQLite; passwords are written nowhere."""

import json
import time
from pathlib import Path

import optuna
import pytest
import sqlalchemy as sa

from asesearch.errors import StudyError
from asesearch.search.runner import run_trials
from asesearch.study.opening import check_to_search
from asesearch.study.privileges import is_denied
from asesearch.study.storage import IDENTITY
from asesearch.study.study import Study
from asesearch.study.urls import parse_url, with_driver
from tests.processes import Child
from tests.search.fake_search import FakeBench, make_config, work
from tests.study import open_at_once, postgresql


@pytest.fixture(scope="module")
def port():
    postgresql.skip_where_missing()
    with postgresql.server() as port:
        yield port


def identities(url):
    """Identity of each study in a storage, by name."""
    text = (
        with_driver(parse_url(url))
        .render_as_string(hide_password=False)
        .replace("{", "{{")
        .replace("}", "}}")
    )
    storage = optuna.storages.RDBStorage(text)
    try:
        return {
            s.study_name: s.user_attrs[IDENTITY]
            for s in optuna.get_all_study_summaries(storage=storage)
        }
    finally:
        storage.remove_session()
        storage.engine.dispose()


def opened_at_once(cases, processes=4):
    code, out, err = Child(open_at_once.main, processes, cases).ended(120 + 60 * len(cases))
    assert code == 0, err
    return json.loads(out), err


def check_fresh(tmp_path, urls):
    """Four processes at once on each empty database, two of them workers of one study and two of
    another."""
    cases = [
        [(str(tmp_path / f"{i}" / name), url) for name in ("one", "two")]
        for i, url in enumerate(urls)
    ]
    codes, errors = opened_at_once(cases)
    assert codes == [[0] * 4] * len(urls), errors
    for case in cases:
        found = {
            Path(run).name: json.loads((Path(run) / "study.json").read_text())["id"]
            for run, _ in case
        }
        assert identities(case[0][1]) == found and len(set(found.values())) == 2


ROUNDS = [1, pytest.param(10, marks=pytest.mark.slow)]


@pytest.mark.thorough
@pytest.mark.parametrize("rounds", ROUNDS)
def test_workers_that_open_a_fresh_sqlite_file_at_once(tmp_path, rounds):
    check_fresh(tmp_path, [f"sqlite:///{tmp_path}/{i}.db" for i in range(rounds)])


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [2, 10])
def test_workers_that_open_a_fresh_postgresql_database_at_once(tmp_path, port, rounds):
    check_fresh(tmp_path, [postgresql.new_database(port, f"{rounds}-{i}") for i in range(rounds)])


def files_with(folder, texts):
    found = [
        p
        for p in folder.rglob("*")
        if p.is_file() and any(t.encode() in p.read_bytes() for t in texts)
    ]
    return found + [p for p in folder.rglob("*") if any(t in p.name for t in texts)]


@pytest.mark.thorough
def test_two_workers_on_an_empty_database_one_killed_and_resumed(tmp_path, port, monkeypatch):
    url = postgresql.new_database(port, "study")
    search = {"num_trials": 8, "storage": url}
    workers = [Child(work, search, tmp_path / "run", die_at) for die_at in (2, None)]
    codes, _, ends = zip(*(w.ended() for w in workers), strict=True)
    assert codes[0] in (-9, 0) and codes[1] == 0, ends
    monkeypatch.setenv("PGPASSWORD", postgresql.PASSWORD)
    study = Study.open(tmp_path / "run")  # the storage is on record, libpq finds the password
    records = study.records()
    schedules = [r.schedule.merged() for r in records]
    assert 8 <= len(records) <= 9 and len(set(schedules)) == len(schedules)
    config = make_config(num_trials=len(records) + 2)  # --storage forgotten
    run_trials(Study(config, tmp_path / "run"), FakeBench(config=config))
    assert len(study.records()) == len(records) + 2 and not (tmp_path / "run" / "study.db").exists()
    assert not files_with(tmp_path, [postgresql.PASSWORD, postgresql.IN_URL, "w%2F0"])
    assert not any(w in "".join(ends) for w in (postgresql.PASSWORD, postgresql.IN_URL))
    for trial in study.optuna.get_trials():
        assert postgresql.PASSWORD not in str(trial)
    noted = str(study.optuna._storage.get_study_system_attrs(study.optuna._study_id))
    assert all(f"{r.schedule}, sampled by" in noted for r in records)
    assert identities(url) == {
        "fake": json.loads((tmp_path / "run" / "study.json").read_text())["id"]
    }


def test_a_database_without_an_encoding(tmp_path, port):
    url = postgresql.new_database(
        port, "ascii", "encoding 'SQL_ASCII' lc_collate 'C' lc_ctype 'C' template template0"
    )
    config = make_config(num_trials=2, storage=url)
    run_trials(Study(config, tmp_path), FakeBench(config=config))
    assert len(Study.open(tmp_path, url).records()) == 2


def test_a_look_ahead_at_a_begun_study(tmp_path, port):
    config = make_config(num_trials=1, storage=postgresql.new_database(port, "ahead"))
    assert check_to_search(config, tmp_path / "run") is None
    run_trials(Study(config, tmp_path / "run"), FakeBench(config=config))
    before = [p.read_bytes() for p in sorted(tmp_path.rglob("*.json"))]
    begun = check_to_search(config, tmp_path / "run")
    assert begun is not None and len(begun.get_trials()) == 1
    changed = make_config({"train": {"lr": 3e-4}}, storage=config.search.storage)
    with pytest.raises(StudyError, match=r"begun with other settings.*train\.lr"):
        check_to_search(changed, tmp_path / "run")
    assert [p.read_bytes() for p in sorted(tmp_path.rglob("*.json"))] == before


def test_the_advice_to_copy_names_drivers_that_are_here(tmp_path, port):
    """SQLAlchemy's own for PostgreSQL is another than the package's extra brings."""
    Study(make_config(storage=postgresql.new_database(port, "from")), tmp_path)
    to = postgresql.new_database(port, "to")
    with pytest.raises(StudyError, match="copy_study") as caught:
        Study(make_config(storage=to), tmp_path)
    command = str(caught.value).partition("copy_study(")[2]
    for name in ("from", "to"):
        driven = with_driver(parse_url(postgresql.url_of(port, name, "").replace(":@", "@")))
        assert driven.drivername != "postgresql"
        assert f"{name}_storage='{driven}'" in command


def test_a_password_of_the_former_release_is_taken_out_of_study_json(tmp_path, port):
    url = postgresql.new_database(port, "former")
    config = make_config(storage=url).model_dump(mode="json")
    (tmp_path / "study.json").write_text(json.dumps({"version": 1, "config": config}))
    assert files_with(tmp_path, [postgresql.IN_URL])
    Study(make_config(), tmp_path)  # on record with its password, without --storage
    assert not files_with(tmp_path, [postgresql.IN_URL, postgresql.PASSWORD])
    on_record = json.loads((tmp_path / "study.json").read_text())["storage"]["url"]
    assert on_record == postgresql.url_of(port, "former", "").replace(":@", "@")


def test_a_password_in_the_query(tmp_path, port):
    postgresql.new_database(port, "query")
    Study(
        make_config(
            storage=f"postgresql:///query?host=127.0.0.1&port={port}&user=owner&password={postgresql.IN_URL}"
        ),
        tmp_path,
    )
    assert not files_with(tmp_path, [postgresql.IN_URL, postgresql.PASSWORD])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("/refused", "/nosuch"), 'database "nosuch" does not exist.*check that the server runs'),
        ((postgresql.IN_URL, "wr0ng"), "password authentication failed for user"),
        (("owner", "nobody"), "password authentication failed for user"),
    ],
)
def test_a_server_that_refuses_is_one_line_at_once(tmp_path, port, change, reason):
    url = postgresql.url_of(port, "refused").replace(*change)
    begun = time.monotonic()
    with pytest.raises(StudyError, match=reason) as caught:
        Study(make_config(storage=url), tmp_path)
    assert "\n" not in str(caught.value) and "wr0ng" not in str(caught.value)
    assert postgresql.IN_URL not in str(caught.value) and postgresql.PASSWORD not in str(
        caught.value
    )
    assert time.monotonic() - begun < 30


def test_a_password_that_is_missing_later_is_asked_for(tmp_path, port, monkeypatch):
    monkeypatch.delenv("PGPASSWORD", raising=False)
    monkeypatch.setenv("PGPASSFILE", str(tmp_path / "none"))
    url = postgresql.new_database(port, "later")
    Study(make_config(storage=url), tmp_path)
    for use in (Study.open, lambda path: Study(make_config(), path)):
        with pytest.raises(
            StudyError, match="keeps no password: give --storage again with it, or set PGPASSWORD"
        ):
            use(tmp_path)
    with pytest.raises(StudyError, match="; study.json keeps no password: set PGPASSWORD or"):
        Study.open(tmp_path, takes_storage=False)  # as `compare`
    assert Study.open(tmp_path, storage=url).records() == []


def test_a_password_that_was_never_given_is_asked_for(tmp_path, port, monkeypatch):
    """And not whether the server runs, which has just asked for it."""
    monkeypatch.delenv("PGPASSWORD", raising=False)
    monkeypatch.setenv("PGPASSFILE", str(tmp_path / "none"))
    url = postgresql.url_of(port, "postgres", "").replace(":@", "@")
    with pytest.raises(StudyError, match="supplied; set PGPASSWORD or ~/.pgpass$"):
        check_to_search(make_config(storage=url), tmp_path / "run")


def as_guest(port, name, *statements):
    """An empty database in which a role may do what it is let; its URL."""
    import psycopg

    postgresql.new_database(port, name)
    how = {"password": postgresql.PASSWORD, "autocommit": True}
    where = f"host=127.0.0.1 port={port} user=owner dbname={name}"
    with psycopg.connect(where, **how) as connection:
        for statement in (f"create role {name} login password 'a'", *statements):
            connection.execute(statement)
    return f"postgresql://{name}:a@127.0.0.1:{port}/{name}"


@pytest.mark.parametrize(
    ("name", "statements", "why"),
    [
        ("guest", ["revoke create on schema public from public"], "create tables in the schema"),
        ("hidden", ["revoke all on schema public from public"], "create tables in any schema"),
        ("standby", ["alter role standby set default_transaction_read_only = on"], "is on, as on"),
    ],
)
def test_a_role_that_may_not_make_tables_is_refused_ahead(tmp_path, port, name, statements, why):
    url = as_guest(port, name, *statements)
    with pytest.raises(StudyError, match=f"can't be used: its .*{why}") as caught:
        check_to_search(make_config(storage=url), tmp_path / "run")
    assert len(str(caught.value)) <= 300
    if name == "guest":
        with pytest.raises(
            StudyError, match=r"permission denied .*; let that user .* \(GRANT\), or"
        ):
            Study(make_config(storage=url), tmp_path / "run")


def test_a_role_that_may_not_write_in_the_tables_is_refused_ahead(tmp_path, port):
    url = as_guest(port, "reader", "grant all on schema public to public")
    owners = postgresql.url_of(port, "reader")
    Study(make_config(storage=owners), tmp_path / "run")
    grants = [
        "grant insert, update on all tables in schema public to reader",
        "grant usage on all sequences in schema public to reader",
    ]
    engine = sa.create_engine(with_driver(parse_url(owners)))
    with engine.connect() as connection:
        connection.exec_driver_sql("grant select on all tables in schema public to reader")
        for statement in grants:
            connection.commit()
            with pytest.raises(StudyError, match="'reader' may not write to the table"):
                check_to_search(make_config(storage=url), tmp_path / "run")
            connection.exec_driver_sql(statement)
        connection.commit()
    engine.dispose()
    assert check_to_search(make_config(storage=url), tmp_path / "run") is not None
    config = make_config(num_trials=1, storage=url)
    run_trials(Study(config, tmp_path / "run"), FakeBench(config=config))


@pytest.mark.parametrize(
    ("text", "denied"),
    [
        ("permission denied for schema public", True),
        ("permission denied for table trials", True),
        ("(1142, \"INSERT command denied to user 'u'@'h' for table 'trials'\")", True),
        ('connection to server on socket "/run/.s.PGSQL.5432" failed: Permission denied', False),
        ("could not open file base/5/1259: Permission denied", False),
        ('private key file "/home/u/key": Permission denied', False),
    ],
)
def test_only_missing_rights_of_sql_are_told_to_be_given(text, denied):
    assert is_denied(RuntimeError(text), text) is denied


def test_no_server_is_one_line(tmp_path):
    with pytest.raises(StudyError, match="refused.*check that the server runs") as caught:
        Study(make_config(storage="postgresql://u:s3cret@127.0.0.1:9/db"), tmp_path)
    assert "s3cret" not in str(caught.value) and "\n" not in str(caught.value)
