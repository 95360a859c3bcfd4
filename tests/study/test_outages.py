"""A database server that is away for a while: waited for, said once, nothing paid for twice."""

import logging
import random
import signal
import socket
import threading
import time
from dataclasses import replace
from itertools import count

import optuna
import pytest
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState
from sqlalchemy import create_engine
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from asesearch.errors import StudyError
from asesearch.search.runner import run_trials
from asesearch.study import interrupts, outages, silence, workers
from asesearch.study.interrupts import WholeCalls, undisturbed
from asesearch.study.outages import Outage, is_away, reason_of
from asesearch.study.records import RECORD
from asesearch.study.study import Study
from asesearch.study.urls import with_driver
from tests.search.fake_search import FakeBench, make_config
from tests.study import postgresql


@pytest.fixture(scope="module")
def server():
    postgresql.skip_where_missing()
    with postgresql.restartable() as server:
        yield server


class Crashing(FakeBench):
    """The server is away when its second trial has been evaluated, and comes back by itself."""

    away_s = 1.5

    def __init__(self, server, comes_back=True, **how):
        super().__init__(**how)
        self.server = server
        self.comes_back = comes_back

    def try_point(self, point, folder):
        found = super().try_point(point, folder)
        if len(self.tried) == 2:
            self.server.stop()
            if self.comes_back:
                threading.Timer(self.away_s, self.server.start).start()
        return found


@pytest.mark.thorough
def test_a_search_outlasts_a_crash_of_its_server(tmp_path, server, caplog):
    """Which comes just before a score is put on record."""
    config = make_config(num_trials=5, storage=postgresql.new_database(server.port, "crash"))
    bench = Crashing(server, config=config)
    study = Study(config, tmp_path)
    run_trials(study, bench)
    assert len(study.records()) == 5 == len(set(bench.tried)) == len(bench.tried)
    assert {t.state for t in study.trials()} == {TrialState.COMPLETE}
    lines = [r.getMessage() for r in caplog.records if "storage" in r.getMessage()]
    where = postgresql.url_of(server.port, "crash", "").replace(":@", "@")
    assert len(lines) == 2 and all("\n" not in line for line in lines)
    assert lines[0].startswith(f"the study's storage {where} does not answer (")
    assert lines[0].endswith("; waiting up to 10 minutes for it: see that its server runs")
    assert lines[1] == f"the study's storage {where} answers again"


@pytest.mark.thorough
def test_a_server_that_stays_away_ends_the_search_in_one_line(tmp_path, server, monkeypatch):
    """Which is waited for once, not again for what ends the trial."""
    monkeypatch.setattr(outages, "PATIENCE_S", 2.0)
    config = make_config(num_trials=5, storage=postgresql.new_database(server.port, "gone"))
    bench = Crashing(server, comes_back=False, config=config)
    study = Study(config, tmp_path)
    begun = time.monotonic()
    try:
        with pytest.raises(StudyError, match="can't be used: .*the same command resumes") as caught:
            run_trials(study, bench)
        took = time.monotonic() - begun
    finally:
        server.start()
    assert "\n" not in str(caught.value) and 2.0 < took < 12.0
    run_trials(Study(config, tmp_path), FakeBench(config=config))
    assert len(study.records()) == 5


def test_a_login_that_is_refused_later_is_not_waited_for(tmp_path, server, monkeypatch):
    """Nor a database that is gone, nor a table; only the server itself."""
    url = postgresql.new_database(server.port, "login")
    storage = Study(make_config(storage=url), tmp_path).optuna._storage._backend
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it waits"))
    driven = with_driver(make_url(url))
    for other in (driven.set(password="wr0ng"), driven.set(database="nosuch")):
        storage.engine.dispose()
        arguments = storage.engine.dialect.create_connect_args(other)
        with monkeypatch.context() as patch:
            patch.setattr(
                storage.engine.pool,
                "_invoke_creator",
                lambda _, to=arguments: storage.engine.dialect.connect(*to[0], **to[1]),
            )
            with pytest.raises(StorageInternalError):
                storage.get_all_studies()
    storage.engine.dispose()
    with storage.engine.begin() as connection:
        connection.exec_driver_sql("drop table study_directions cascade")
    with pytest.raises(StorageInternalError):
        storage.get_all_studies()


@pytest.mark.parametrize(
    ("password", "text", "said"),
    [
        ("p", "port 1 failed for up", "port 1 failed for up"),
        ("p", "can't reach x://u:p@host, password=p", "can't reach x://u:***@host, password=***"),
        ("1", "port 15 of u:1@host:15", "port 15 of u:***@host:15"),
        ("pass", "no pass, no u:pass@host", "no ***, no u:***@host"),
    ],
)
def test_a_short_password_is_masked_where_it_stands_as_one(password, text, said):
    error = OperationalError(None, None, OSError(text))
    assert reason_of(error, make_url(f"postgresql://u:{password}@host/x")) == said


@pytest.mark.parametrize(
    ("text", "away"),
    [
        ("connection failed: Connection refused\n\tIs the server running", True),
        ("Verbindungsaufbau abgelehnt", True),
        ("FATAL:  the database system is starting up", True),
        ("FATAL:  sorry, too many clients already", True),
        ('FATAL:  password authentication failed for user "owner"', False),
        ('FATAL:  database "y" does not exist', False),
        ("fe_sendauth: no password supplied", False),
        ('FATAL:  no pg_hba.conf entry for host "10.0.0.7"', False),
        ("(1045, \"Access denied for user 'owner'@'host'\")", False),
        ("(2003, \"Can't connect to MySQL server on 'host'\")", True),
    ],
)
def test_what_is_waited_for_at_a_connection(text, away):
    error = StorageInternalError("at a commit")
    error.__cause__ = OperationalError(None, None, OSError(text))
    assert is_away(error) is away
    error.__cause__ = OperationalError("select 1", {}, OSError(text))  # the answer to a query
    assert not is_away(error)
    assert not Outage(make_url("sqlite:///a.db")).wait(error)


def refused():
    return OperationalError(None, None, OSError("Connection refused"))


def test_ctrl_c_ends_the_waiting_and_nothing_waits_after_it(tmp_path, monkeypatch):
    storage = WholeCalls(f"sqlite:///{tmp_path}/a.db")
    storage.outage.has_server = True
    calls = count(1)

    def connect(*_):
        next(calls)
        raise refused()

    monkeypatch.setattr(storage, "scoped_session", connect)
    monkeypatch.setattr(time, "sleep", lambda _: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        storage.get_all_studies()
    with pytest.raises(OperationalError):
        storage.get_all_studies()
    assert next(calls) == 3


def test_pauses_grow_and_end(monkeypatch, caplog):
    now = [0.0]
    pauses = []

    def sleep(seconds):
        pauses.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    outage = Outage(make_url("postgresql+psycopg://owner:s3cret@host/name"))
    while outage.wait(refused()):
        pass
    assert pauses[:4] == [0.5, 1.0, 2.0, 4.0] and max(pauses) == 15.0
    assert 600 <= sum(pauses) < 615 and len(caplog.records) == 1
    assert "postgresql://owner@host/name does not answer (Connection refused)" in caplog.text
    assert not outage.wait(refused())  # in vain once is enough, until a call gets through
    outage.over()
    assert outage.wait(refused()) and len(caplog.records) == 3


@pytest.mark.thorough
@pytest.mark.parametrize("seed", [0, 1])
def test_an_answer_that_is_lost_costs_no_trial(tmp_path, monkeypatch, caplog, seed):
    """At every sixth commit the server does what it is told, and the connection breaks."""
    caplog.set_level(logging.ERROR)
    monkeypatch.setattr(outages, "PAUSE_S", 0.0)
    monkeypatch.setattr(workers, "GRACE_S", 0.3)
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.05)))
    config = make_config(num_trials=6)
    study = Study(config, tmp_path)
    study.optuna._storage._backend.outage.has_server = True
    commit = Session.commit
    draw = random.Random(seed)
    lost_at = []
    main = threading.current_thread()

    def lost(session):
        commit(session)
        if threading.current_thread() is main and draw.random() < 1 / 6:
            lost_at.append(1)
            raise OperationalError(None, None, OSError("lost"), connection_invalidated=True)

    bench = FakeBench(config=config)
    with monkeypatch.context() as patch:
        patch.setattr(Session, "commit", lost)
        run_trials(study, bench)
    assert len(lost_at) > 10
    assert len(study.records()) == 6 == len(bench.tried) == len(set(bench.tried))
    done = [t.state for t in study.trials() if RECORD in t.user_attrs]
    assert set(done) == {TrialState.COMPLETE}


def test_a_trial_that_had_been_ended_is_ended_once(tmp_path, monkeypatch):
    """The negative control: Optuna refuses to end it a second time."""
    study = optuna.create_study(storage=WholeCalls(f"sqlite:///{tmp_path}/a.db"))
    study._storage._backend.outage.has_server = True
    monkeypatch.setattr(time, "sleep", lambda _: None)
    commit = Session.commit
    trial = study.ask()
    lost = []

    def end(session):
        ended = bool(session.dirty)
        commit(session)
        if ended and not lost:
            lost.append(1)
            raise OperationalError(None, None, OSError("lost"), connection_invalidated=True)

    monkeypatch.setattr(Session, "commit", end)
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
        study.tell(trial, 1.0)
    assert lost and study.trials[0].state == TrialState.COMPLETE


# -- a server that is silent ---------------------------------------------------------------------


def watched(monkeypatch, **limits):
    """A watch with short limits over one connection, and the other end of that."""
    for name, seconds in {"SILENT_S": 0.05, "HURRY_S": 0.1, "POLL_S": 0.01, **limits}.items():
        monkeypatch.setattr(silence, name, seconds)
    outage = Outage(make_url("postgresql+psycopg://owner@host/name"))
    watch = silence.Watch(create_engine("sqlite://"), outage)
    ours, theirs = socket.socketpair()
    watch._connected(ours, None)
    return watch, ours, theirs


@pytest.mark.parametrize(
    ("waits", "patience_s", "lines"), [(True, 0.3, 1), (False, 60.0, 0), (True, -1.0, 0)]
)
def test_a_call_without_an_answer_is_said_and_cut(monkeypatch, caplog, waits, patience_s, lines):
    """After the patience; sooner where it does not wait, or where nothing waits any more."""
    monkeypatch.setattr(outages, "PATIENCE_S", patience_s)
    watch, ours, theirs = watched(monkeypatch, AT_ONCE_S=0.3)
    with theirs, ours, watch.over(waits=waits):
        ours.settimeout(20)
        assert ours.recv(1) == b""
    watch.end.set()
    assert len(caplog.records) == lines == caplog.text.count("does not answer (no answer for")


def test_an_answer_that_comes_late_is_taken(monkeypatch, caplog):
    watch, ours, theirs = watched(monkeypatch)
    late = threading.Timer(0.3, theirs.send, [b"x"])
    with theirs, ours, watch.over(waits=True):
        late.start()
        assert ours.recv(1) == b"x"
    watch._outage.over()
    watch.end.set()
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 2 and "does not answer" in said[0] and "answers again" in said[1]


def test_ctrl_c_ends_a_call_without_an_answer(monkeypatch):
    """And without a socket a second one does, a while later."""
    watch, ours, theirs = watched(monkeypatch, SILENT_S=60.0)
    monkeypatch.setattr(interrupts, "HURRY_S", 0.1)
    begun = time.monotonic()
    with theirs, ours, pytest.raises(KeyboardInterrupt):
        main = threading.main_thread().ident
        threading.Timer(0.05, signal.pthread_kill, [main, signal.SIGINT]).start()
        with undisturbed(watch._outage), watch.over(waits=True):
            ours.settimeout(20)
            assert ours.recv(1) == b""
    watch.end.set()
    with pytest.raises(KeyboardInterrupt), undisturbed(watch._outage):
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.2)
        pytest.fail("it goes on")
    assert time.monotonic() - begun < 15


@pytest.mark.thorough
def test_a_search_outlasts_a_server_that_is_stopped(tmp_path, server, monkeypatch, caplog):
    """Its processes, as the machine of one that swaps does: TCP goes on."""
    monkeypatch.setattr(silence, "SILENT_S", 1.0)
    config = make_config(num_trials=4, storage=postgresql.new_database(server.port, "stopped"))
    bench = Crashing(server, config=config)
    bench.away_s = 4.0
    bench.server = replace(server, stop=server.pause, start=server.go_on)
    study = Study(config, tmp_path)
    run_trials(study, bench)
    assert len(study.records()) == 4 == len(bench.tried)
    lines = [r.getMessage() for r in caplog.records if "storage" in r.getMessage()]
    assert "does not answer (no answer for" in lines[0] and "answers again" in lines[1]
