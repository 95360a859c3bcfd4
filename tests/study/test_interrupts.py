"""Ctrl-C amid Optuna's storage: the call ends first, nothing stays open, no thread is left."""

import signal
import sqlite3
import threading
from itertools import count

import optuna
import pytest
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import loading

from asesearch.errors import StudyError
from asesearch.search.runner import run_trials
from asesearch.study import storage
from asesearch.study.interrupts import WholeCalls, beating, undisturbed
from asesearch.study.study import Study
from tests.search.fake_search import FakeBench, make_config


def ctrl_c():
    signal.raise_signal(signal.SIGINT)


def after(monkeypatch, owner, name, number=1):
    """Ctrl-C amid a call of a method: before its body, the `number`th time."""
    method = getattr(owner, name)
    calls = count(1)

    def interrupted(*args, **kwargs):
        if next(calls) == number:
            ctrl_c()
        return method(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)


@pytest.mark.parametrize(("kind", "written"), [(WholeCalls, {"a": 1}), (RDBStorage, {})])
def test_a_call_that_ctrl_c_comes_amid_is_done_first(tmp_path, monkeypatch, kind, written):
    """Optuna's own storage, the negative control, is cut short."""
    study = optuna.create_study(storage=kind(f"sqlite:///{tmp_path}/a.db"))
    trial = study.ask()
    after(monkeypatch, optuna.storages._rdb.models.TrialModel, "find_or_raise_by_id")
    with pytest.raises(KeyboardInterrupt):
        trial.set_user_attr("a", 1)
    assert study.trials[0].user_attrs == written


def test_every_call_of_the_storage_is_whole():
    wrapped = {"create_new_trial", "set_trial_state_values", "_set_trial_param", "get_all_trials"}
    assert all(hasattr(getattr(WholeCalls, name), "__wrapped__") for name in wrapped)
    assert not any(hasattr(getattr(RDBStorage, name), "__wrapped__") for name in wrapped)


def interrupted_search(run_dir, monkeypatch, number):
    """A search that Ctrl-C interrupts while the rows of a query are read."""
    config = make_config(proposer="random")
    with monkeypatch.context() as patch:
        patch.setattr(storage, "BUSY_WAIT_S", 0.2)
        study = Study(config, run_dir)
        after(patch, loading, "instances", number)
        run_trials(study, FakeBench(config=config))


NUMBERS = [54, 55, 56, 57]


@pytest.mark.parametrize("number", NUMBERS)
def test_a_search_that_is_interrupted_amid_a_query_ends_its_trial_at_once(
    tmp_path, monkeypatch, number
):
    with pytest.raises(KeyboardInterrupt):
        interrupted_search(tmp_path / "run", monkeypatch, number)
    states = [t.state for t in Study.open(tmp_path / "run").optuna.get_trials()]
    assert states and TrialState.RUNNING not in states
    with sqlite3.connect(tmp_path / "run" / "study.db", timeout=0) as other:
        other.execute("begin exclusive")  # nothing holds a lock


def test_with_optunas_own_storage_it_would_fail(tmp_path, monkeypatch):
    """The negative control: the open cursor locks the database for the call that ends the trial."""
    monkeypatch.setattr(storage, "WholeCalls", RDBStorage)
    reasons = []
    # which query it is depends on how often a busy machine lets the heartbeat read
    for number in (*NUMBERS, *range(NUMBERS[-1] + 1, NUMBERS[-1] + 40)):
        try:
            interrupted_search(tmp_path / str(number), monkeypatch, number)
        except (KeyboardInterrupt, StudyError) as error:
            reasons.append(str(error))
        if any("database is locked" in reason for reason in reasons):
            break
    assert any("database is locked" in reason for reason in reasons), reasons


def test_a_database_that_was_away_hears_the_next_heartbeat(tmp_path, monkeypatch):
    """Optuna's own thread ends at the first error, and the worker is taken for dead."""
    with storage.experimental():
        kept = WholeCalls(f"sqlite:///{tmp_path}/a.db", heartbeat_interval=60)
    study = optuna.create_study(storage=kept)
    beats = []
    heard = threading.Event()

    def record(storage, trial_id):
        beats.append(trial_id)
        if len(beats) == 1:
            raise StorageInternalError("away") from OperationalError("select 1", {}, OSError())
        heard.set()

    monkeypatch.setattr(WholeCalls, "record_heartbeat", record)
    monkeypatch.setattr(WholeCalls, "get_heartbeat_interval", lambda storage: 0.01)
    trial = storage.ask(study)
    with beating(study, trial):
        assert heard.wait(20)
    assert set(beats) == {trial._trial_id} and len(beats) > 1


@pytest.mark.parametrize("name", ["start", "join"])
def test_ctrl_c_amid_the_heartbeat_leaves_no_thread(tmp_path, monkeypatch, name):
    """A thread that nobody ends would keep the process from ending."""
    with storage.experimental():
        kept = WholeCalls(f"sqlite:///{tmp_path}/a.db", heartbeat_interval=60)
    study = optuna.create_study(storage=kept)
    trial = storage.ask(study)
    before = threading.active_count()
    after(monkeypatch, threading.Thread, name)
    with pytest.raises(KeyboardInterrupt), beating(study, trial):
        assert name == "join" and threading.active_count() == before + 1
    assert threading.active_count() == before


def test_ctrl_c_comes_at_the_end_and_the_handler_is_as_it_was():
    handler = signal.getsignal(signal.SIGINT)
    done = []
    with pytest.raises(KeyboardInterrupt), undisturbed(), undisturbed():
        ctrl_c()
        done.append("the rest")
    assert done and signal.getsignal(signal.SIGINT) is handler
    with pytest.raises(KeyboardInterrupt), undisturbed():
        ctrl_c()
        raise ValueError  # Ctrl-C takes its place
    with undisturbed():
        pass


def test_other_threads_and_ignored_signals_are_left_alone(monkeypatch):
    seen = []

    def other():
        with undisturbed():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with undisturbed():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
