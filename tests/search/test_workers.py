"""Several workers at one study: nobody dies beside a long trial, nothing is paid for twice, nothing
paid for is lost."""

import errno
import json
import os
import re
import signal
import sqlite3
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import optuna
import pytest
import torch
from optuna.trial import TrialState

from asesearch import locks
from asesearch.errors import EvaluationError, StudyError, TrainingDiverged, WriteError
from asesearch.evaluation.cost import LatencyTable
from asesearch.files import write_json
from asesearch.locks import try_lock, waited_lock
from asesearch.point import Point
from asesearch.proposer.proposer import num_exploring
from asesearch.report import opinions
from asesearch.schedule import ExitSchedule
from asesearch.score import EvaluationResult
from asesearch.search import confirmation
from asesearch.search.confirmation import confirm
from asesearch.search.fleet import WORKER, Fleet
from asesearch.search.latency import Conditions, shared_table
from asesearch.search.runner import Runner, run_trials
from asesearch.study import records, workers
from asesearch.study.interrupts import beating
from asesearch.study.records import EXPLORATION, EXPLORES, RECORD, select
from asesearch.study.storage import ask
from asesearch.study.study import Study
from asesearch.study.workers import Others, Worker, most_at_once, worked_s
from tests.processes import Child
from tests.search.fake_search import OWN, FakeBench, SharedBench, make_config, work
from tests.search.test_study import ready

# threads share one list of filters
pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
LADDER = {
    "promotion": {"num_samples": 20, "repeats": 2, "always": 1, "threshold": 0.3, "explore": 5}
}
SHORT = {
    "confirm": {
        "max_points": 3,
        "num_samples": 50,
        "repeats": 2,
        "time_images": 4,
        "time_repeats": 2,
    }
}


def paid(run_dir):
    return (run_dir / "paid").read_text().splitlines()


def tried(run_dir):
    return [line for line in paid(run_dir) if line.startswith("trial")]


def search_in_threads(config, run_dir, count, until=None):
    """Each thread is a worker with a bench of its own; errors are given back.

    The full network's trial goes on until `until` is true, or a minute has passed.
    """
    errors = []

    class Held(SharedBench):
        def try_point(self, point, folder):
            begun = time.monotonic()
            while (
                point.schedule.is_full
                and point.sampler == OWN
                and not until()
                and time.monotonic() < begun + 60
            ):
                time.sleep(0.02)
            return super().try_point(point, folder)

    def work():
        try:
            study = Study(config, run_dir)
            bench = Held(run_dir, config=config)
            run_trials(study, bench)
            confirm(study, bench)
        except BaseException as error:
            errors.append(error)

    Study(config, run_dir)
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


@pytest.fixture
def no_weights(monkeypatch):
    monkeypatch.setattr(confirmation, "_network", lambda *_: None)


def check_shared(config, run_dir, num_trials):
    """What must hold of any study that several workers made."""
    results = Study.open(run_dir).results()
    lines = paid(run_dir)
    # trials, confirmations, latency: each once
    assert {line: n for line, n in Counter(lines).items() if n > 1} == {}
    assert lines.count("latency") == 1
    assert len(results.records) == num_trials == sum(line.startswith("trial") for line in lines)
    wanted = {r.number for r in select(results.front(), results.full, config.confirm.max_points)}
    confirmed = {c.number for c in results.confirmations}
    assert wanted <= confirmed and len(wanted) > 1
    assert sum(line.startswith("confirmation") for line in lines) == len(confirmed)


@pytest.mark.thorough
@pytest.mark.parametrize("proposer", ["difficulty", "tpe"])
def test_a_second_worker_goes_on_beside_a_long_trial_of_the_full_network(
    tmp_path, no_weights, proposer, caplog
):
    config = make_config(SHORT, proposer=proposer, num_trials=7, samplers=["ddim-25"])

    def others_are_done():  # all but the full network, under this sampler and the other
        return "waiting for trial" in caplog.text and len(tried(tmp_path)) == 5

    assert search_in_threads(config, ready(tmp_path), 2, others_are_done) == []
    check_shared(config, tmp_path, 7)
    assert [line for line in tried(tmp_path)[:5] if "full" in line or line == "trial 6"] == []
    origins = Counter(r.origin for r in Study.open(tmp_path).records())
    # proposals take no warm start's place
    assert origins == {"full": 1, "6 6 3 3": 1, "full ddim-25": 1, proposer: 4}
    # said once, with the trial's number
    assert len(re.findall(r"waiting for trial \d", caplog.text)) <= 2


@pytest.mark.thorough
def test_a_worker_waits_where_all_that_is_left_is_in_anothers_hands(tmp_path, no_weights, caplog):
    config = make_config(SHORT, num_intervals=1, warm_start=[], num_trials=6)  # the whole space

    def others_are_done():
        return "waiting for" in caplog.text and len(tried(tmp_path)) == 5

    assert search_in_threads(config, tmp_path, 2, others_are_done) == []
    check_shared(config, tmp_path, 6)


def in_process(search, run_dir, **how):
    return Child(partial(work, **how), search, run_dir, None, SHORT)


@pytest.mark.slow
@pytest.mark.parametrize("proposer", ["difficulty", "tpe"])
def test_four_processes_at_one_study(tmp_path, proposer):
    search = {"proposer": proposer, "num_trials": 16, "samplers": ["ddim-25"]}
    config = make_config(SHORT, **search)
    Study(config, ready(tmp_path))
    found = [in_process(search, tmp_path, full_s=15.0, trial_s=0.3) for _ in range(4)]
    for process in found:
        code, _, err = process.ended()
        assert code == 0 and "Traceback" not in err, err
    check_shared(config, tmp_path, 16)


@pytest.mark.slow
def test_a_stopped_worker_that_goes_on_keeps_its_score(tmp_path):
    search = {"num_trials": 4, "proposer": "random"}
    config = make_config(SHORT, **search)
    Study(config, tmp_path)
    how = {"full_s": 3.0, "trial_s": 0.1, "heartbeat_s": 1}

    def wait_for_trials(count):
        while not (tmp_path / "paid").exists() or len(tried(tmp_path)) < count:
            time.sleep(0.1)

    first = in_process(search, tmp_path, **how)
    wait_for_trials(1)
    os.kill(first.pid, signal.SIGSTOP)
    second = in_process(search, tmp_path, **how)
    try:
        # the second does the rest, and ends the first's trial for want of any sign of life
        wait_for_trials(4)
        until = time.monotonic() + 60
        while (state := Study.open(tmp_path).optuna.get_trials()[0].state) == TrialState.RUNNING:
            assert time.monotonic() < until
            time.sleep(0.1)
        assert state == TrialState.FAIL
        os.kill(first.pid, signal.SIGCONT)
        for process in (second, first):
            code, _, err = process.ended()
            assert code == 0 and "Traceback" not in err, err
    finally:
        first.kill()
    check_shared(config, tmp_path, 4)


# -- who lives ------------------------------------------------------------------------------------


def test_a_worker_lives_as_long_as_it_holds_its_lock(tmp_path):
    worker = Worker(tmp_path)
    others = Others(tmp_path, "me")
    assert others.at_work() == []
    with worker.at_work("searching"):
        assert others.alive(worker.mark, 0) is True
        assert (
            others.alive({**worker.mark, "host": "another"}, 0) is True and "pid" not in worker.mark
        )
        assert (
            len(others.at_work()) == len(others.at_work("searching")) == 1
            and others.at_work("confirming") == []
        )
        assert Others(tmp_path, worker.id).at_work() == []  # not one's own
    assert others.alive(worker.mark, 0) is False and others.at_work() == []


@pytest.mark.thorough
def test_a_worker_under_another_kernel_is_judged_by_its_signs(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "GRACE_S", 0.3)
    worker = Worker(tmp_path)
    others = Others(tmp_path, "me")
    elsewhere = {**worker.mark, "boot": "another kernel"}
    assert others.alive(elsewhere, 0) is None  # no sign at all: the database must tell
    with worker.at_work("searching"):
        for _ in range(3):
            assert others.alive(elsewhere, 0) is True
            time.sleep(0.2)
            worker.beat()
    assert others.alive(elsewhere, 0) is True
    time.sleep(0.4)
    assert others.alive(elsewhere, 0) is False


def test_marks_of_earlier_releases_and_of_the_last_moment(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "GRACE_S", 0.2)
    others = Others(tmp_path, "me")
    assert others.alive("this-host:1", 0) is None
    assert others.alive(None, 1) is True
    time.sleep(0.3)
    assert others.alive(None, 1) is False and others.alive(None, 2) is True  # each by its own time


@pytest.mark.parametrize("mark", ["a live worker", "dead", "host:99999999"])
def test_only_a_dead_workers_trial_is_released(tmp_path, mark):
    study = Study(make_config(num_trials=3), tmp_path)
    other = Worker(tmp_path)
    attrs = {WORKER: mark if ":" in mark else other.mark}
    study.optuna.add_trial(optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs=attrs))
    with other.at_work("searching"):
        if mark != "dead":
            Runner(study, FakeBench()).fleet.release_dead()
    if mark == "dead":
        Runner(study, FakeBench()).fleet.release_dead()
    state = study.optuna.get_trials()[0].state
    assert state == (TrialState.FAIL if mark == "dead" else TrialState.RUNNING)


@pytest.mark.parametrize("stopped", [False, True])
def test_a_worker_without_a_heartbeat_lives_while_it_gives_other_signs(
    tmp_path, monkeypatch, stopped
):
    """Its database may have been away; one that is stopped holds its lock, and gives none."""
    monkeypatch.setattr(workers, "GRACE_S", 0.3)
    study = Study(make_config(num_trials=3), tmp_path)
    other = Worker(tmp_path)
    attrs = {WORKER: other.mark}
    study.optuna.add_trial(optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs=attrs))
    monkeypatch.setattr(Study, "stale_trials", lambda study: {1})
    fleet = Runner(study, FakeBench()).fleet
    with other.at_work("searching"):
        for _ in range(3):
            fleet.release_dead()
            time.sleep(0.2)
            if not stopped:
                other.beat()
        fleet.release_dead()
    state = study.optuna.get_trials()[0].state
    assert state == (TrialState.FAIL if stopped else TrialState.RUNNING)


def test_a_trial_without_a_heartbeat_is_stale(tmp_path):
    study = Study(make_config(num_trials=3), tmp_path)
    trial = ask(study.optuna)
    with beating(study.optuna, trial):
        pass
    assert study.stale_trials() == set()
    with sqlite3.connect(tmp_path / "study.db") as database:
        database.execute("update trial_heartbeats set heartbeat = '2020-01-01 00:00:00'")
    assert study.stale_trials() == {trial._trial_id}


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["complete", "failed", "told"])
def test_a_worker_taken_for_dead_keeps_its_score(tmp_path, kind):
    """Another ends its trial while it is at it: just before, or between record and score."""
    config = make_config(num_trials=4, warm_start=["6 6 3 1"])
    study = Study(config, tmp_path)
    seen = []

    class Slow(FakeBench):
        def try_point(self, point, folder):
            if point.schedule.exit_depths[-1] == 1 and not seen:
                seen.append(point)
                if kind != "told":
                    Study(config, tmp_path).optuna.tell(running(study), state=TrialState.FAIL)
            return super().try_point(point, folder)

    bench = Slow(fails=1 if kind == "failed" else None, config=config)
    runner = Runner(study, bench)
    if kind == "told":
        values = runner.ledger.values

        def late(record):
            if record.schedule.exit_depths[-1] == 1:
                Study(config, tmp_path).optuna.tell(running(study), state=TrialState.FAIL)
            return values(record)

        runner.ledger.values = late
    with study.worker.at_work("searching"):
        runner.run()
    records = study.records()
    assert len(records) == 4 == len(bench.tried)
    mine = next(r for r in records if r.point == seen[0])
    assert mine.state == ("failed" if kind == "failed" else "complete") and mine.origin == "6 6 3 1"
    assert study.record(mine.number) == mine and len({r.number for r in records}) == 4


FITS = {"depth at data": 5, "depth at noise": 4, "between 1": 0.0, "between 2": 0.0}


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"depth at data": 9}, "'depth at data' must be an integer in 1…6; got '9'"),
        ({"depth at noise": 3.5}, "'depth at noise' must be an integer in 1…6; got '3.5'"),
        ({"depth at noise": "3.0"}, "'depth at noise' must be an integer in 1…6; got '3.0'"),
        ({"between 1": float("inf")}, "'between 1' must lie in 0…1; got 'inf'"),
        ({"between 2": None}, "'between 2' must lie in 0…1; got 'None'"),
        ({"sampler": "ddim-3"}, "'sampler' must be one of ddim-50, ddim-25; got 'ddim-3'"),
        ({"depth": 3}, "'sampler'; got 'depth'"),
    ],
)
@pytest.mark.parametrize("proposer", ["difficulty", "random"])
def test_a_queued_trial_outside_the_space_fails_alone(tmp_path, caplog, proposer, change, why):
    config = make_config(num_trials=5, proposer=proposer, samplers=["ddim-25"])
    study = Study(config, ready(tmp_path))
    study.optuna.enqueue_trial({**FITS, "sampler": "ddim-25", **change})
    study.optuna.enqueue_trial({**FITS, "sampler": "ddim-25"})  # the negative control
    bench = FakeBench(config=config)
    run_trials(study, bench)
    assert len(study.records()) == 5 == len(bench.tried)
    first, second, *_ = study.optuna.get_trials()
    assert (first.state, second.state) == (TrialState.FAIL, TrialState.COMPLETE)
    assert study.record(1).schedule.exit_depths == (5, 4, 4, 4)
    said = [r.getMessage() for r in caplog.records if "queued" in r.getMessage()]
    assert len(said) == 1 and said[0].startswith("trial 0 was queued and has failed: ")
    assert f"{why}; queue another" in said[0]


def running(study):
    return next(t.number for t in study.optuna.get_trials() if t.state == TrialState.RUNNING)


def test_a_trial_that_two_workers_were_given_is_paid_for_once(tmp_path):
    """A database may give one queued trial to two workers; the second, refused, ends it."""
    config = make_config(num_trials=3)
    study = Study(config, tmp_path)

    class Given(FakeBench):
        def try_point(self, point, folder):
            if point.schedule.is_full:
                Study(config, tmp_path).optuna.tell(running(study), state=TrialState.FAIL)
            return super().try_point(point, folder)

    bench = Given(config=config)
    runner = Runner(study, bench)
    other = Runner(Study(config, tmp_path), bench)
    keep = runner.ledger.keep

    def kept(number, record):
        with other.fleet.claim(record.schedule) as free:
            assert not free  # nobody else can begin it before it is on record
        keep(number, record)

    runner.ledger.keep = kept
    with study.worker.at_work("searching"):
        runner.run()
    assert [r.origin for r in study.records() if r.schedule.is_full] == ["full"] and len(
        bench.tried
    ) == 3


@pytest.mark.parametrize(
    "error", [OSError(37, "No locks available"), OSError(95, "Operation not supported")]
)
def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, error):
    import fcntl

    def refuse(*_):
        raise error

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(
        StudyError, match=f"need file locks.*{error.strerror}.*file system that has them"
    ) as caught:
        run_trials(Study(make_config(), tmp_path), FakeBench())
    assert "\n" not in str(caught.value)


def test_locks_without_effect_are_noticed(tmp_path, monkeypatch):
    import fcntl

    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    with pytest.raises(StudyError, match="given to a second"):
        run_trials(Study(make_config(), tmp_path), FakeBench())


def test_who_waits_for_a_lock_says_so_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(locks, "SAY_S", 0.2)
    got = []

    def wait():
        with waited_lock(tmp_path / "a.lock", "makes tea"):
            got.append(1)

    thread = threading.Thread(target=wait)
    with try_lock(tmp_path / "a.lock") as mine:
        assert mine
        thread.start()
        time.sleep(0.6)
        assert got == []
    thread.join()
    assert got == [1] and caplog.text.count("waiting for another worker, which makes tea") == 1


def test_a_lock_of_a_user_who_lets_nobody_open_it_is_named_and_kills_no_worker(
    tmp_path, monkeypatch
):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    other = Worker(tmp_path)
    with other.at_work(workers.SEARCHING):
        monkeypatch.setattr(locks.FileLock, "acquire", refuse)
        others = Others(tmp_path, "mine")
        assert others.alive(other.mark, 0) is True  # by its signs
        assert len(others.at_work()) == 1
        lock = next((tmp_path / "workers").glob("*.lock"))
        with (
            pytest.raises(WriteError, match=rf"{lock.name}: Permission denied; .* umask 002, and"),
            try_lock(lock),
        ):
            pass
        with (
            pytest.raises(WriteError, match=rf"to {tmp_path}: Permission denied; choose a folder"),
            try_lock(tmp_path / "new.lock"),
        ):
            pass


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.EMFILE, r"ulimit -n"),
        (errno.EIO, "whether its disk or server works"),
        (errno.ESTALE, "whether its disk or server works"),
        (errno.ENOSPC, "make room there"),
        (errno.EPERM, "umask 002"),
    ],
)
def test_only_who_may_not_open_a_lock_is_told_of_the_umask(tmp_path, monkeypatch, number, fix):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks.FileLock, "acquire", refuse)
    lock = tmp_path / f"{'a' * 240}.lock"
    lock.touch()
    told = f"{os.strerror(number)}; .*{fix}"
    with pytest.raises(WriteError, match=told) as caught, try_lock(lock):
        pass
    assert len(str(caught.value)) <= 300 and ("umask" in str(caught.value)) == (fix == "umask 002")


# -- the exploration phase -
# -------------------------------------------------------------------------


@pytest.mark.thorough
def test_turns_that_change_are_waited_for_and_one_that_is_stuck_is_not(tmp_path, monkeypatch):
    """Sixty workers at a server far away take minutes, one after the other."""
    monkeypatch.setattr("asesearch.search.fleet.TURN_S", 2.0)
    fleet = SimpleNamespace(study=SimpleNamespace(run_dir=tmp_path))
    inside = []
    most = []

    def propose(_=None):
        with Fleet.turn(fleet):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.5)
            inside.pop()

    with ThreadPoolExecutor(6) as pool:  # the last waits for two and a half seconds
        list(pool.map(propose, range(6)))
    assert most == [1] * 6
    with try_lock(tmp_path / "locks" / "turn.lock") as held:
        assert held
        begun = time.monotonic()
        propose()
    assert 2.0 < time.monotonic() - begun < 8.0


@pytest.mark.thorough
def test_exactly_as_many_proposals_look_around_as_the_study_says(tmp_path):
    class Slow(SharedBench):
        def try_low_fidelity(self, point):
            time.sleep(0.1)
            return super().try_low_fidelity(point)

    config = make_config(LADDER, proposer="difficulty", num_trials=12)
    errors = []

    def work():
        try:
            run_trials(Study(config, tmp_path), Slow(tmp_path, config=config))
        except BaseException as error:
            errors.append(error)

    Study(config, ready(tmp_path))
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    records = Study.open(tmp_path).records()
    everything = [t.user_attrs.get(RECORD) for t in Study.open(tmp_path).optuna.get_trials()]
    looked = [
        r
        for r in everything
        if r is not None and json.loads(r)["low_fidelity"]["reason"] == EXPLORATION
    ]
    assert len(looked) == 5 and len(records) == 12
    assert all(
        json.loads(r)["state"] == "stopped" and json.loads(r)["origin"] == "difficulty"
        for r in looked
    )


def test_in_flight_proposals_are_counted_by_number():
    def trial(number, state=TrialState.RUNNING, record=None, fixed=False, **attrs):
        attrs |= (
            {} if record is None else {RECORD: json.dumps({"low_fidelity": {"reason": record}})}
        )
        made = optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs=attrs)
        made.number = number
        made.state = state
        made.system_attrs = {"fixed_params": {}} if fixed else {}
        return made

    trials = [
        trial(0, fixed=True),  # a warm start
        trial(1, TrialState.PRUNED, EXPLORATION),
        trial(2, TrialState.COMPLETE, "among the first"),
        trial(3),  # not said yet
        trial(4, **{EXPLORES: True}),
        trial(5, **{EXPLORES: False}),
        trial(6, TrialState.FAIL),  # killed
        trial(8),
        trial(9, TrialState.PRUNED, EXPLORATION),
    ]
    assert num_exploring(trials, 7) == 4  # 1, 3, 4, 9
    assert num_exploring(trials, 3) == 2 and num_exploring(trials, 10) == 5


# -- failures ------------------------------------------------------------------------------------


class Failing(FakeBench):
    """Trials fail as long as `broken` says so."""

    broken = "all"

    def try_point(self, point, folder):
        if self.broken == "all" or (self.broken == "full" and point.schedule.is_full):
            self.tried.append(point.schedule)
            raise TrainingDiverged("the images hold NaN; give others")
        return super().try_point(point, folder)


@pytest.mark.thorough
@pytest.mark.parametrize("search", [{"num_trials": 6}, {"budget": "1h"}])
def test_a_failed_full_network_stops_the_search_and_is_tried_again(tmp_path, search):
    config = make_config(warm_start=[], num_intervals=1, **search)
    bench = Failing(config=config)
    bench.broken = "full"
    for _ in range(2):
        bench.tried.clear()
        with pytest.raises(
            StudyError,
            match="full network's trial failed.*the images hold NaN; give others.*tries this one",
        ):
            run_trials(Study(config, tmp_path), bench)
        assert [s.is_full for s in bench.tried] == [True]  # nothing else was paid for
    bench.broken = ""
    study = Study(config, tmp_path)
    run_trials(study, bench)
    assert study.results().full is not None and len(study.records()) == 6
    assert all(r.state == "complete" for r in study.records())


@pytest.mark.thorough
def test_a_study_whose_every_trial_fails_stops_at_once(tmp_path):
    config = make_config(num_trials=9)
    study = Study(config, tmp_path)
    bench = Failing(config=config)
    # the full network is another worker's
    with Runner(Study(config, tmp_path), bench).fleet.claim(ExitSchedule.full(6)):
        with pytest.raises(
            StudyError,
            match="all 3 trials so far failed.*: the images hold NaN; give others; put that right",
        ):
            run_trials(study, bench)
        assert len(bench.tried) == 3
    bench.broken = ""
    run_trials(study, bench)
    # tried again, too
    assert "6 6 3 3" in {r.origin for r in study.records() if r.state == "complete"}


# -- confirmation --------------------------------------------------------------------------------


def searched(run_dir, num_trials=8, **sections):
    config = make_config({**SHORT, **sections}, num_trials=num_trials)
    study = Study(config, run_dir)
    bench = SharedBench(run_dir, config=config)
    run_trials(study, bench)
    return study, bench


def confirmed_points(run_dir):
    return [line for line in paid(run_dir) if line.startswith("confirmation")]


@pytest.mark.thorough
def test_workers_share_the_confirmation_out(tmp_path, no_weights):
    study, _ = searched(tmp_path)
    done = []

    def work():
        found = confirm(
            Study(study.config, tmp_path), SharedBench(tmp_path, config=study.config, trial_s=0.5)
        )
        done.append([c.number for c in found])

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results = study.results()
    wanted = [r.number for r in select(results.front(), results.full, 3)]
    assert done == [wanted] * 3 and len(wanted) == 4  # each worker ends when all is confirmed
    assert len(confirmed_points(tmp_path)) == 4 == len(set(confirmed_points(tmp_path)))
    assert {c.number for c in results.confirmations} == set(wanted)


@pytest.mark.thorough
def test_points_that_are_not_worth_confirming_are_named(tmp_path, no_weights, monkeypatch, caplog):
    study, bench = searched(tmp_path)
    results = study.results()
    ratios = {r.number: r.quality.value / results.full.quality.value for r in results.front()}
    worst = max(ratios, key=ratios.get)
    others = max(ratio for number, ratio in ratios.items() if number != worst)
    assert ratios[worst] > others
    monkeypatch.setattr(records, "REFERENCE_QUALITY", (ratios[worst] + others) / 2)
    assert worst not in {c.number for c in confirm(study, bench)}
    said = f"not confirmed, with more than 2 times the full network's score: trial {worst}"
    assert caplog.text.count(said) == 1
    # negative control: where it is confirmed, nothing is said
    caplog.clear()
    monkeypatch.setattr(records, "REFERENCE_QUALITY", 2 * ratios[worst])
    confirm(study, bench)
    assert "not confirmed" not in caplog.text


@pytest.mark.thorough
def test_what_a_dead_worker_was_confirming_is_left_to_the_next(tmp_path, no_weights):
    study, bench = searched(tmp_path)

    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    bench.measured_time = die
    with pytest.raises(Killed):
        confirm(study, bench)
    assert [c.number for c in study.results().confirmations] == [0]  # the full network's is kept
    again = SharedBench(tmp_path, config=study.config)
    found = confirm(study, again)
    assert len(found) == 4 and Counter(confirmed_points(tmp_path)).most_common(1)[0][1] == 2


@pytest.mark.thorough
def test_a_confirmation_of_another_point_than_its_trials_is_left_out(tmp_path, no_weights, caplog):
    """As after an older storage was restored, whose trials went on in another way."""
    study, bench = searched(tmp_path)
    before = confirm(study, bench)
    first, second, *_ = (c.number for c in before if c.number)
    paths = {n: tmp_path / f"confirmations/{n}.json" for n in (first, second)}
    stored = {n: json.loads(path.read_text()) for n, path in paths.items()}
    assert Point.from_dict(stored[first]["point"]) == study.record(first).point
    write_json(paths[first], {**stored[first], "point": stored[second]["point"]})
    write_json(
        tmp_path / "confirmations/77.json",
        {**stored[first], "confirmations": [], "failed": {"77": "its images were not finite"}},
    )
    del stored[second]["point"]  # of an earlier release: taken as it is
    write_json(paths[second], stored[second])
    assert [c.number for c in study.results().confirmations] == sorted(
        c.number for c in before if c.number != first
    )
    assert f"but trial {first} is {study.record(first).point}, as after an older" in caplog.text
    assert "but trial 77 is not on record, as after an older storage" in caplog.text
    assert [c.number for c in confirm(study, bench)] == [c.number for c in before]
    assert len(confirmed_points(tmp_path)) == len(before) + 1  # the others are taken as they are


@pytest.mark.thorough
def test_confirmations_under_other_settings_are_kept_for_when_these_return(
    tmp_path, no_weights, caplog
):
    study, bench = searched(tmp_path)
    before = confirm(study, bench)
    assert confirm(study, bench) == before and len(confirmed_points(tmp_path)) == 4  # nothing twice
    config = study.config.model_copy(
        update={"confirm": study.config.confirm.model_copy(update={"num_samples": 70})}
    )
    study = Study(config, tmp_path)
    after = confirm(study, SharedBench(tmp_path, config=config))
    assert len(confirmed_points(tmp_path)) == 8
    assert {c.quality.protocol.num_samples for c in before} == {50}
    assert {c.quality.protocol.num_samples for c in after} == {70}
    # those of before are out of sight, and come back with their settings
    assert {c.quality.protocol.num_samples for c in study.results().confirmations} == {70}
    assert caplog.text.count("what was confirmed before is set aside in") == 1
    back = Study(config.model_copy(update={"confirm": bench.config.confirm}), tmp_path)
    assert confirm(back, bench) == before and len(confirmed_points(tmp_path)) == 8
    assert list(back.results().confirmations) == sorted(before, key=lambda c: c.number)
    assert confirm(study, SharedBench(tmp_path, config=config)) == after


@pytest.mark.thorough
def test_further_training_seeds_are_trained_beside_what_is_confirmed(tmp_path, no_weights):
    study, bench = searched(tmp_path)
    before = confirm(study, bench)
    how = study.config.confirm.model_copy(update={"training_seeds": 3})
    config = study.config.model_copy(update={"confirm": how})
    study = Study(config, tmp_path)
    after = confirm(study, SharedBench(tmp_path, config=config))
    assert [c.quality for c in after] == [c.quality for c in before]
    assert {len(c.retrained) for c in after} == {2}
    # one confirmation of each before, and two scores more of each since
    assert len(confirmed_points(tmp_path)) == 3 * len(before)
    seeds = Counter(line for line in paid(tmp_path) if line.startswith("training seed"))
    schedules = {str(r.schedule) for r in study.records() if r.number in {c.number for c in after}}
    assert set(seeds) == {f"training seed {k} of {s}" for k in (1, 2) for s in schedules}
    assert not list(tmp_path.glob("trials/*/training-seed-*"))  # no weights are left
    assert list(study.results().confirmations) == sorted(after, key=lambda c: c.number)
    assert confirm(study, bench) == after and len(confirmed_points(tmp_path)) == 3 * len(before)


@pytest.mark.thorough
def test_a_kill_between_training_seeds_loses_none_that_was_scored(tmp_path, no_weights):
    sections = {"confirm": {**SHORT["confirm"], "training_seeds": 3}}
    study, bench = searched(tmp_path, **sections)

    class Killed(BaseException):
        pass

    tuned = bench.tuned

    def die(schedule, folder, training_seed):
        if training_seed == 2:
            raise Killed
        return tuned(schedule, folder, training_seed)

    bench.tuned = die
    with pytest.raises(Killed):
        confirm(study, bench)
    [full] = study.results().confirmations
    assert len(full.retrained) == 1
    found = confirm(study, SharedBench(tmp_path, config=study.config))
    assert found[0].retrained[0] == full.retrained[0] and len(found[0].retrained) == 2


@pytest.mark.thorough
def test_a_training_seed_that_diverges_is_on_record_and_stops_nothing(tmp_path, no_weights, caplog):
    sections = {"confirm": {**SHORT["confirm"], "training_seeds": 3}}
    study, bench = searched(tmp_path, **sections)
    tuned = bench.tuned

    def diverge(schedule, folder, training_seed):
        if training_seed == 1 and not schedule.is_full:
            raise TrainingDiverged("the loss is not finite at step 7; lower lr")
        return tuned(schedule, folder, training_seed)

    bench.tuned = diverge
    made = confirm(study, bench)
    assert "under training seed 1: the loss is not finite at step 7; lower lr" in caplog.text
    full, *points = made
    assert points and all(isinstance(q, EvaluationResult) for q in full.retrained)
    for c in points:
        assert c.retrained[0] == "the loss is not finite at step 7; lower lr"
        assert c.trained.values == (c.quality.value, c.retrained[1].value)
        paired = [c.quality.value - full.quality.value]
        paired += [c.retrained[1].value - full.retrained[1].value]  # seed 2 with seed 2
        assert c.trained_minus(full)[0] == pytest.approx(sum(paired) / 2)
    assert list(study.results().confirmations) == sorted(made, key=lambda c: c.number)
    before = len(paid(tmp_path))
    assert confirm(study, bench) == made and len(paid(tmp_path)) == before  # not tried again
    table = opinions.retrained(study.results()).set_index("number")
    assert set(table.loc[[c.number for c in points], "training_seeds"]) == {2}
    assert set(table.loc[[c.number for c in points], "failed_seeds"]) == {1}
    assert len(opinions.failed_seeds(study.results())) == len(points)


def test_a_point_whose_images_fail_is_named_and_stops_nothing(tmp_path, no_weights, caplog):
    study, bench = searched(tmp_path)
    full, *points = select(study.results().front(), study.results().full, 3)
    measured = bench.confirmed

    def fail(net, point):
        if point == points[0].point:
            raise EvaluationError("12 of 50 images are not finite; lower the guidance")
        return measured(net, point)

    bench.confirmed = fail
    made = confirm(study, bench)
    numbers = [c.number for c in made]
    assert numbers[0] == full.number and points[0].number not in numbers and len(numbers) > 1
    told = f"trial {points[0].number} is not confirmed: 12 of 50 images are not finite"
    assert told in caplog.text
    caplog.clear()
    before = len(paid(tmp_path))
    assert confirm(study, bench) == made and len(paid(tmp_path)) == before  # not tried again
    assert told in caplog.text


@pytest.mark.thorough
def test_a_point_without_memory_is_named_and_confirmed_by_the_next_run(
    tmp_path, no_weights, caplog
):
    study, bench = searched(tmp_path)
    full, first, second, *_ = select(study.results().front(), study.results().full, 3)
    measured = bench.confirmed
    tries = Counter()
    fits = {first.number: 99, second.number: 2}  # the second's second try finds memory
    numbers = {r.point: r.number for r in study.records()}

    def confirmed(net, point):
        number = numbers[point]
        tries[number] += 1
        if tries[number] < fits.get(number, 1):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return measured(net, point)

    bench.confirmed = confirmed
    made = confirm(study, bench)
    assert first.number not in {c.number for c in made} and len(made) == 3
    assert tries[first.number] == tries[second.number] == 2
    told = f"trial {first.number} is not confirmed: out of memory: CUDA out of memory"
    assert caplog.text.count(told) == 1
    assert not (tmp_path / "confirmations" / f"{first.number}.json").exists()
    fits.clear()
    caplog.clear()
    assert first.number in {c.number for c in confirm(study, bench)}
    assert "memory" not in caplog.text
    # without the full network there is nothing to compare with
    fits[full.number] = 99
    tries.clear()
    how = study.config.confirm.model_copy(update={"num_samples": 70})
    study = Study(study.config.model_copy(update={"confirm": how}), tmp_path)
    bench.config = study.config
    with pytest.raises(StudyError, match="^the full network can't be confirmed, .*: out of memory"):
        confirm(study, bench)
    assert dict(tries) == {full.number: 2}


@pytest.mark.thorough
def test_the_one_file_of_earlier_releases_is_read(tmp_path, no_weights):
    study, bench = searched(tmp_path)
    made = confirm(study, bench)
    parts = [
        json.loads(path.read_text()) for path in sorted((tmp_path / "confirmations").glob("*.json"))
    ]
    for path in (tmp_path / "confirmations").glob("*.json"):
        path.unlink()
    old = {
        "settings": parts[0]["settings"],
        "confirmations": [c for p in parts for c in p["confirmations"]],
    }
    write_json(tmp_path / "confirmations.json", old)
    assert len(study.results().confirmations) == 4
    assert confirm(study, bench) == made and len(confirmed_points(tmp_path)) == 4
    write_json(tmp_path / "confirmations.json", {**old, "settings": {"protocol": "another"}})
    assert len(confirm(study, bench)) == 4 and len(confirmed_points(tmp_path)) == 8
    assert not (tmp_path / "confirmations.json").exists()


# -- latency -------------------------------------------------------------------------------------

HERE = Conditions("cpu", 8, "float32", False)


def table(**changes):
    return replace(
        LatencyTable(8, "cpu", 1, "float32", (1.0, 2.0), (0.1, 0.1), 3, "float32", False), **changes
    )


def test_all_workers_have_one_latency_table(tmp_path):
    made = []
    got = []

    def measure():
        time.sleep(0.2)
        made.append(1)
        return table(median_ms=(1.0, 2.0 + len(made)))

    threads = [
        threading.Thread(
            target=lambda: got.append(shared_table(tmp_path, HERE, measure, one_only=True))
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and len(got) == 3 and {t.median_ms for t in got} == {(1.0, 3.0)}


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (
            replace(HERE, device="NVIDIA H100"),
            "from one kind of device; .* is of cpu, 8 images.*has NVIDIA H100, 8 images.*"
            'of that kind.*cost = "flops"',
        ),
        (
            replace(HERE, batch_size=16),
            "come from one batch size; .*8 images per call.*16 images per call.*size back to 8",
        ),
        (replace(HERE, precision="bf16"), "one arithmetic; .*float32.*bf16.*set .sampling. back"),
        (replace(HERE, guided=True), "of guided sampling"),
        (replace(HERE, compile=True), "float32, and this worker has .*float32, compiled blocks"),
    ],
)
def test_a_table_of_other_conditions_is_not_taken(tmp_path, now, words):
    first = shared_table(tmp_path, HERE, table, one_only=True)
    with pytest.raises(StudyError, match=words):
        shared_table(tmp_path, now, lambda: pytest.fail("measured"), one_only=True)
    other = table(median_ms=(5.0, 6.0))
    for _ in range(2):  # where FLOPs are searched for, one beside it
        assert shared_table(tmp_path, now, lambda: other, one_only=False) == other
    assert shared_table(tmp_path, HERE, lambda: pytest.fail("measured"), one_only=False) == first


def test_a_table_of_other_threads_serves_and_says_so(tmp_path, caplog):
    own = torch.get_num_threads()
    shared_table(tmp_path, HERE, lambda: table(threads=own), one_only=True)
    assert caplog.text == ""
    other = table(threads=own + 63)
    write_json(tmp_path / "latency.json", other.to_dict())
    assert shared_table(tmp_path, HERE, table, one_only=True) == other
    assert f"with {own + 63} CPU threads, this process has {own}: predicted times" in caplog.text


def test_a_study_of_time_on_another_device_is_refused_before_the_warm_up(tmp_path):
    data = table().to_dict() | {"device": "Tesla T4", "batch_size": 10}
    write_json(tmp_path / "latency.json", data)
    config = make_config(num_trials=2)
    bench = SharedBench(tmp_path, config=config)
    with pytest.raises(StudyError, match="Tesla T4.*cpu"):
        run_trials(Study(config, tmp_path), bench)
    assert bench.tried == [] and not (tmp_path / "paid").exists()


def test_tables_of_earlier_releases_are_used_where_they_fit(tmp_path):
    old = {
        k: v for k, v in table().to_dict().items() if k not in ("precision", "guided", "compile")
    }
    write_json(tmp_path / "latency.json", old)
    assert shared_table(
        tmp_path, HERE, lambda: pytest.fail("measured"), one_only=True
    ).median_ms == (1.0, 2.0)
    with pytest.raises(StudyError, match="images per call"):
        shared_table(tmp_path, replace(HERE, batch_size=4), table, one_only=True)


def test_a_damaged_table_is_measured_again(tmp_path):
    for text in ("", "{", "[]", '{"device": "cpu"}'):
        (tmp_path / "latency.json").write_text(text)
        assert shared_table(tmp_path, HERE, table, one_only=True) == table()


# -- budget --------------------------------------------------------------------------------------


def test_wall_time_is_the_union_of_all_workers_times(tmp_path):
    def worker(name, times, earlier_s=0.0):
        state = {
            "host": "h",
            "pid": 1,
            "boot": "b",
            "doing": "",
            "earlier_s": earlier_s,
            "times": times,
        }
        write_json(tmp_path / "workers" / f"{name}.json", state)

    assert worked_s(tmp_path) == 0.0 == most_at_once(tmp_path)
    worker("a", [[1000, 1060], [2000, 2030]])
    assert worked_s(tmp_path) == 90  # not the time between two runs
    worker("z", [[1060, 1060]])  # one after the other are not at once
    assert most_at_once(tmp_path) == 1
    worker("b", [[1030, 1100], [2010, 2020]])
    assert worked_s(tmp_path) == 130 and most_at_once(tmp_path) == 2
    worker("c", [[5000, 5001]], earlier_s=7.0)
    worker("d", [[5000, 5001]], earlier_s=7.0)  # begun in the same second
    assert worked_s(tmp_path) == 138
    (tmp_path / "workers" / "e.json").write_text("")  # a power cut
    assert worked_s(tmp_path) == 138


@pytest.mark.thorough
def test_time_in_which_a_worker_was_stopped_does_not_count(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "PAUSE_S", 0.5)
    worker = Worker(tmp_path)
    with worker.at_work("searching"):
        time.sleep(0.3)
        worker.beat()
        assert 0.3 <= worked_s(tmp_path) < 0.5
        time.sleep(0.8)
        worker.beat()
    assert worked_s(tmp_path) < 0.7


@pytest.mark.parametrize("offset_s", [4000.0, -4000.0, 0.0])
def test_a_wrong_clock_counts_no_time_twice_and_hides_no_worker(
    tmp_path, monkeypatch, caplog, offset_s
):
    """By the clocks of their machines, the two would have worked one after the other."""
    first = Worker(tmp_path)
    second = Worker(tmp_path)
    others = Others(tmp_path, first.id)
    right = time.time
    begun = time.monotonic()
    with first.at_work("searching"), monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: right() + offset_s)
        with second.at_work("searching"):
            patch.undo()
            time.sleep(0.5)
            first.beat()
            second.beat()
            assert len(others.at_work()) == 1
            state = json.loads((tmp_path / "workers" / f"{second.id}.json").read_text())
            assert abs(state["times"][-1][1] - right()) < 5
            # under another kernel the file's age tells, not its content: of an earlier release
            state = state | {"boot": "another kernel", "times": [[right() + offset_s] * 2]}
            write_json(tmp_path / "workers" / "elsewhere.json", state)
            assert len(others.at_work()) == 2
            os.utime(tmp_path / "workers" / "elsewhere.json", (right() - 4000,) * 2)
            assert len(others.at_work()) == 1
            (tmp_path / "workers" / "elsewhere.json").unlink()
    assert 0.5 <= worked_s(tmp_path) < time.monotonic() - begun + 0.1
    side = "ahead of" if offset_s > 0 else "behind"
    assert caplog.text.count(f"is 4000 s {side} that of the file system") == bool(offset_s)


class Timed(FakeBench):
    """A trial takes a tenth of a second, and says so."""

    def try_point(self, point, folder):
        time.sleep(0.1)
        return replace(super().try_point(point, folder), seconds={"finetune": 0.1})


@pytest.mark.thorough
@pytest.mark.parametrize("num_workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_budget_is_of_wall_time_and_leaves_room_for_the_confirmation(tmp_path, num_workers):
    """An image takes a thousandth of a second, so that 2,000 timed ones of a point and of the full
    network take 2.3 to 4 s.

    Two workers share two points and more out; with one point, which one must do, they have as long
    as one.
    """
    confirm = {
        "max_points": 1,
        "num_samples": 2,
        "repeats": 1,
        "time_images": 400,
        "time_repeats": 4,
    }
    config = make_config({"confirm": confirm}, budget="8s", proposer="random", num_trials=1)
    benches = [Timed(config=config) for _ in range(num_workers)]
    Study(config, tmp_path)
    threads = [
        threading.Thread(target=lambda b=b: run_trials(Study(config, tmp_path), b)) for b in benches
    ]
    begun = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.monotonic() - begun
    records = Study.open(tmp_path).records()
    longest_s = max(sum(r.seconds.values()) for r in records)  # long on a busy machine
    assert 3.3 < took < 6.8 + longest_s
    assert len(records) >= 2  # more than num_trials; on a quiet machine 5 and more
    again = Timed(config=config)
    run_trials(Study(config, tmp_path), again)
    assert again.tried == []


def test_time_of_an_earlier_release_counts(tmp_path):
    # each of whose trials says that it took a second
    run_trials(Study(make_config(num_trials=5), tmp_path), FakeBench())
    for path in (tmp_path / "workers").iterdir():
        path.unlink()  # which earlier releases did not have
    config = make_config(
        {"confirm": {"max_points": 1, "num_samples": 2, "repeats": 1}}, budget="5s"
    )
    bench = FakeBench(config=config)
    for _ in range(2):
        run_trials(Study(config, tmp_path), bench)
        assert bench.tried == [] and 5 <= worked_s(tmp_path) < 8


def test_timing_is_a_part_of_the_confirmation():
    from asesearch.search.budget import confirmation_s

    config = make_config(
        {"confirm": {"num_samples": 10, "repeats": 2, "time_images": 5, "time_repeats": 3}}
    )
    # 20 images of the full network and 10 of a point at half its time: 30 times 0.1 s; four rounds
    # (one not counted) of five
    # images of each: 20 * 1.5 = 30 times 0.1 s
    assert confirmation_s(config, 0.1, [0.5]) == pytest.approx(2.0 + 1.0 + 3.0)
    assert confirmation_s(config, 0.1, [0.5], full=False) == pytest.approx(4.0)
    assert confirmation_s(config, 0.1, []) == pytest.approx(2.0)
    assert confirmation_s(config, 0.1, [0.5] * 4, num_workers=2) == pytest.approx((2.0 + 16.0) / 2)
    # a point is one worker's
    assert confirmation_s(config, 0.1, [0.5], num_workers=8) == pytest.approx(4.0)
