"""The study: resumes after any kill, never loses or repeats a trial, refuses what is not
comparable."""

import gc
import json
import sqlite3
import threading
import time
import weakref
from dataclasses import replace

import numpy as np
import optuna
import pytest
import torch

from asesearch.config import MAY_CHANGE, StudyConfig
from asesearch.errors import ScheduleError, StudyError
from asesearch.files import write_json
from asesearch.point import Point
from asesearch.report.tables import label
from asesearch.sampler import Sampler
from asesearch.schedule import ExitSchedule
from asesearch.search.asking import Asker
from asesearch.search.promotion import num_explored
from asesearch.search.runner import Runner, run_trials
from asesearch.search.setup import make_problem, make_space, warm_starts
from asesearch.search.warmup import warm_up
from asesearch.study.difficulty import DifficultyMap
from asesearch.study.front import non_dominated
from asesearch.study.records import RECORD, REPEAT, TrialRecord
from asesearch.study.study import Study
from tests.processes import Child
from tests.search.fake_search import (
    DEPTH,
    LOW_FIDELITY,
    OWN,
    FakeBench,
    make_config,
    scores,
    work,
)

PROPOSERS = ["tpe", "nsga2", "gp", "random"]

HALF = Sampler("ddim", 25)


def run(config, run_dir, **bench):
    study = Study(config, run_dir)
    fake = FakeBench(config=config, **bench)
    run_trials(study, fake)
    return study, fake


def trials_of(study):
    return [(r.origin, r.schedule, r.quality and r.quality.values) for r in study.records()]


@pytest.mark.thorough
@pytest.mark.parametrize("proposer", PROPOSERS)
def test_contract_of_every_proposer(proposer, tmp_path):
    config = make_config(proposer=proposer, num_trials=6)
    study, bench = run(config, tmp_path)
    records = study.records()
    assert len(records) == 6 and len(bench.tried) == 6
    assert [r.origin for r in records[:2]] == ["full", "6 6 3 3"] and records[0].schedule.is_full
    assert all(r.origin == proposer for r in records[2:])
    assert len({r.point for r in records}) == 6  # nothing is paid for twice
    assert all(r.schedule.is_noise_easy for r in records)
    again, _ = run(config, tmp_path / "again")
    assert trials_of(again) == trials_of(study)  # same file, same seed: same trials
    other, _ = run(make_config(proposer=proposer, num_trials=4, seed=1), tmp_path / "other")
    assert trials_of(other)[2:] != trials_of(study)[2:4]


@pytest.mark.thorough
def test_free_form_space_gives_other_shapes(tmp_path):
    study, _ = run(make_config(noise_easy=False, proposer="random", num_trials=12), tmp_path)
    assert not all(r.schedule.is_noise_easy for r in study.records())


@pytest.mark.thorough
@pytest.mark.parametrize("proposer", ["tpe", "nsga2"])
def test_resumed_search_proposes_what_an_uninterrupted_one_does(proposer, tmp_path):
    config = make_config(proposer=proposer, num_trials=11)
    straight, _ = run(config, tmp_path / "straight")
    run(make_config(proposer=proposer, num_trials=9), tmp_path / "parts")
    resumed, bench = run(config, tmp_path / "parts")
    assert len(bench.tried) == 2 and trials_of(resumed) == trials_of(straight)


@pytest.mark.thorough
@pytest.mark.parametrize("die_at", [0, 3])
def test_kill_9_loses_the_trial_in_flight_only(tmp_path, die_at):
    search = {"num_trials": 6}
    process = Child(work, search, tmp_path / "killed", die_at)
    assert process.ended()[0] == -9
    left = Study.open(tmp_path / "killed")
    assert len(left.records()) == die_at
    resumed, bench = run(make_config(**search), tmp_path / "killed")
    straight, _ = run(make_config(**search), tmp_path / "straight")
    assert len(bench.tried) == 6 - die_at
    assert trials_of(resumed) == trials_of(straight)
    states = [t.state for t in resumed.optuna.get_trials()]
    assert optuna.trial.TrialState.RUNNING not in states  # no zombie is left


def test_interrupt_leaves_no_open_trial(tmp_path):
    study = Study(make_config(), tmp_path)
    bench = FakeBench()

    def interrupt(record):
        if record.number == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_trials(study, bench, interrupt)
    assert all(
        t.state.is_finished() or t.state == optuna.trial.TrialState.WAITING
        for t in study.optuna.get_trials()
    )
    resumed, _ = run(make_config(), tmp_path)
    assert len(resumed.records()) == 8
    # the trial on record when the interrupt came keeps its scores for the proposer
    assert all(t.values is not None for t in resumed.optuna.get_trials())


@pytest.mark.thorough
def test_a_diverging_schedule_is_recorded_and_the_search_goes_on(tmp_path):
    study, bench = run(make_config(warm_start=["6 6 3 1"], num_trials=9), tmp_path, fails=1)
    failed = [r for r in study.records() if r.state == "failed"]
    assert failed and failed[0].origin == "6 6 3 1" and "not finite at step 3" in failed[0].failure
    assert failed[0].quality is None and len(study.records()) == 9
    assert len({s.merged() for s in bench.tried}) == 9  # a failed schedule is not tried again
    assert not study.trial_dir(failed[0].schedule).exists()
    assert all(r.state == "complete" for r in study.results().front())


def gpu_is_full():
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("allocate", "told"),
    [
        (lambda: torch.empty(1 << 50), "can't allocate memory: you tried to allocate 4503599627"),
        (lambda: np.ones(1 << 56), "Unable to allocate"),
        (gpu_is_full, "CUDA out of memory. Tried"),
    ],
)
def test_a_schedule_without_memory_is_recorded_and_the_search_goes_on(tmp_path, allocate, told):
    class Full(FakeBench):
        def try_point(self, point, folder):
            if str(point.schedule) == "6 6 3 1":
                allocate()
            return super().try_point(point, folder)

    study = Study(make_config(warm_start=["6 6 3 1"], num_trials=6), tmp_path)
    run_trials(study, Full())
    failed = [r for r in study.records() if r.state == "failed"]
    assert len(failed) == 1 and len(study.records()) == 6
    assert failed[0].failure.startswith("out of memory: ") and told in failed[0].failure
    assert "enforce" not in failed[0].failure


@pytest.mark.thorough
def test_what_a_schedule_without_memory_held_is_freed_at_once(tmp_path):
    held = []

    class Full(FakeBench):
        def try_point(self, point, folder):
            if point.schedule.is_full:
                return super().try_point(point, folder)
            if held:
                found.append(held[-1]() is None)
            network = torch.nn.Linear(1, 1)
            network.__dict__["forward"] = network.forward  # as accelerate leaves it
            held.append(weakref.ref(network))
            gpu_is_full()

    found = []
    study = Study(make_config(num_trials=4), tmp_path)
    gc.disable()
    try:
        with pytest.raises(StudyError, match="without memory"):
            run_trials(study, Full())
    finally:
        gc.enable()
    assert found == [True]


class Crowded(FakeBench):
    """Another program takes the memory while trials after the first `fits` are sampled; schedules
    in `large` never fit."""

    fits = 99
    large = ()

    def try_point(self, point, folder):
        done = super().try_point(point, folder)
        (folder / "training.safetensors").write_bytes(b"x")
        if len(self.tried) > self.fits or point.schedule in self.large:
            gpu_is_full()
        return done


@pytest.mark.thorough
def test_memory_that_another_program_takes_ends_the_search_and_costs_nothing(tmp_path):
    config = make_config(num_trials=8, keep_weights="all")
    study = Study(config, tmp_path)
    bench = Crowded(config=config)
    bench.fits = 3
    told = "^2 trials in a row failed without memory, .*: out of memory: CUDA out of memory. Tried"
    with pytest.raises(StudyError, match=told):
        run_trials(study, bench)
    failed = [r for r in study.records() if r.state == "failed"]
    assert len(failed) == 2 and len(bench.tried) == 5
    for record in failed:  # whole weights, or a checkpoint, for the next try
        left = {path.name for path in study.trial_dir(record.schedule).iterdir()}
        assert left == {"weights.safetensors", "training.safetensors"}
    # still taken: what failed before is tried, and one that is new
    bench.tried.clear()
    bench.fits = 0
    with pytest.raises(StudyError, match="^3 trials in a row failed without memory"):
        run_trials(Study(config, tmp_path), bench)
    assert bench.tried[:2] == [r.schedule for r in failed] and len(bench.tried) == 3
    bench.tried.clear()
    bench.fits = 99
    run_trials(Study(config, tmp_path), bench)
    records = study.records()
    assert [r.state for r in records] == ["complete"] * 8
    assert bench.tried[:2] == [r.schedule for r in failed]
    tried = {r.point: r.origin for r in records}
    assert all(tried[r.point] == r.origin for r in failed)


@pytest.mark.thorough
def test_a_schedule_that_never_fits_is_tried_once_a_run_and_holds_nothing_up(tmp_path):
    config = make_config(num_trials=6)
    study, before = run(config, tmp_path / "before")
    bench = Crowded(config=config)
    bench.large = [r.schedule for r in study.records()[2:4]]
    study = Study(config, tmp_path / "after")
    with pytest.raises(StudyError, match="without memory"):
        run_trials(study, bench)
    for _ in range(2):
        bench.tried.clear()
        run_trials(Study(config, tmp_path / "after"), bench)
        states = [(r.schedule in bench.large, r.state) for r in study.records()]
        assert sorted(states) == [(False, "complete")] * 4 + [(True, "failed")] * 2
        assert [s in bench.large for s in bench.tried[:2]] == [True, True]
        assert all(s not in bench.large for s in bench.tried[2:])
    assert len(bench.tried) == 2  # the last run had nothing else to do


def test_an_unexpected_error_is_not_swallowed(tmp_path):
    bench = FakeBench()
    bench.try_point = lambda point, folder: 1 / 0
    study = Study(make_config(), tmp_path)
    with pytest.raises(ZeroDivisionError):
        run_trials(study, bench)
    assert study.records() == [] and all(t.state.is_finished() for t in study.optuna.get_trials())


@pytest.mark.thorough
def test_two_workers_share_a_study(tmp_path):
    search = {"num_trials": 10}
    Study(make_config(**search), tmp_path)
    workers = [Child(work, search, tmp_path) for _ in range(2)]
    for worker in workers:
        code, _, err = worker.ended()
        assert code == 0, err
    records = Study.open(tmp_path).records()
    schedules = [r.point for r in records]
    # nothing is paid for twice
    assert 10 <= len(records) <= 11 and len(set(schedules)) == len(schedules)
    assert {r.origin for r in records} == {"full", "6 6 3 3", "tpe"}


def test_a_schedule_in_another_workers_hands_is_left_to_it(tmp_path):
    study = Study(make_config(num_trials=3), tmp_path)
    bench = FakeBench()
    here = Runner(study, bench)
    other = Runner(Study(study.config, tmp_path), bench)
    with (
        other.fleet.claim(ExitSchedule.full(6)) as mine,
        here.fleet.claim(ExitSchedule.full(6)) as ours,
    ):
        assert mine and not ours
        assert here._one_trial() == "taken"  # the first warm start
        assert bench.tried == [] and study.records() == []
    run_trials(study, bench)  # the claim was given back
    assert [r.origin for r in study.records()][:2] == ["full", "6 6 3 3"] and len(bench.tried) == 3


def test_larger_budget_continues_and_a_smaller_one_does_nothing(tmp_path):
    run(make_config(num_trials=6), tmp_path)
    _, bench = run(make_config(num_trials=4), tmp_path)
    assert bench.tried == []
    study, bench = run(make_config(num_trials=9), tmp_path)
    assert len(bench.tried) == 3 and len(study.records()) == 9


@pytest.mark.thorough
def test_an_exhausted_space_ends_the_search(tmp_path, monkeypatch, caplog):
    """It has cost hours, and goes on with the confirmation."""
    monkeypatch.setattr("asesearch.search.runner.MAX_REFUSED_IN_A_ROW", 20)
    config = make_config(num_intervals=1, warm_start=[], num_trials=50)
    study = Study(config, tmp_path)
    run_trials(study, FakeBench())
    assert len(study.records()) == 6  # every depth, once
    assert "as good as exhausted, and the search ends with 6 schedules" in caplog.text
    # with time to spare
    timed, _ = run(make_config(num_intervals=1, warm_start=[], budget="1h"), tmp_path / "timed")
    assert len(timed.records()) == 6


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("train", "lr", 3e-4),
        ("sampling", "num_steps", 7),
        ("evaluation", "num_samples", 77),
        ("search", "num_intervals", 5),
        ("data", "kind", "image-folder"),
        ("backbone", "kind", "uvit"),
    ],
)
def test_a_change_that_breaks_comparability_is_refused_by_name(tmp_path, section, field, value):
    config = make_config(num_trials=1)
    run(config, tmp_path)
    before = (tmp_path / "study.json").read_bytes()
    part = getattr(config, section).model_copy(update={field: value})
    with pytest.raises(StudyError, match=rf"{section}\.{field}: .* -> .*undo the change"):
        Study(config.model_copy(update={section: part}), tmp_path)
    assert (tmp_path / "study.json").read_bytes() == before


def test_weights_that_changed_behind_the_same_path_are_refused(tmp_path):
    run(make_config(num_trials=2), tmp_path)
    with pytest.raises(StudyError, match="weights"):
        run(make_config(num_trials=3), tmp_path, weights="others")


def test_every_field_that_may_change_exists():
    fields = StudyConfig.model_json_schema()["$defs"]
    names = {
        "search": "SearchConfig",
        "train": "TrainConfig",
        "elastic": "ElasticConfig",
        "sampling": "SamplingConfig",
        "data": "DataConfig",
    }
    for name in MAY_CHANGE:
        section, _, field = name.partition(".")
        if section in names:
            assert field in fields[names[section]]["properties"]


@pytest.mark.thorough
def test_weights_off_the_front_are_deleted_and_the_full_networks_kept(tmp_path):
    study, _ = run(make_config(num_trials=8), tmp_path)
    results = study.results()
    kept = {
        r.number
        for r in results.records
        if (study.trial_dir(r.schedule) / "weights.safetensors").exists()
    }
    assert kept == {r.number for r in results.front()} | {results.full.number}
    assert len(kept) < 8
    everything, _ = run(make_config(num_trials=5, keep_weights="all"), tmp_path / "all")
    assert all(
        (everything.trial_dir(r.schedule) / "weights.safetensors").exists()
        for r in everything.records()
    )


@pytest.mark.thorough
def test_weights_of_a_study_of_flops_are_kept_by_them(tmp_path):
    """Whatever the latency tables say, of which it may have several."""

    class TwoTables(FakeBench):
        def fracs(self, point):
            time, *others = super().fracs(point)
            return (time if len(self.tried) % 2 else 0.1 * time, *others)

    config = make_config(proposer="random", num_trials=8, cost="flops")
    study = Study(config, tmp_path)
    run_trials(study, TwoTables(config=config))
    results = study.results()
    costs = [(r.flops_frac, r.quality.value) for r in results.records]
    by_flops = {results.records[i].number for i in non_dominated(costs)}
    times = [(r.time_frac, r.quality.value) for r in results.records]
    assert by_flops != {results.records[i].number for i in non_dominated(times)}
    assert {r.number for r in results.front()} == by_flops
    kept = {
        r.number
        for r in results.records
        if (study.trial_dir(r.schedule) / "weights.safetensors").exists()
    }
    assert kept == by_flops | {0}
    assert kept == {r.number for r in results.records if results.has_weights(r)}


def test_records_round_trip_and_are_stored_in_the_trials(tmp_path):
    study, _ = run(make_config(num_trials=4), tmp_path)
    for trial in study.optuna.get_trials():
        record = TrialRecord.from_dict(json.loads(trial.user_attrs[RECORD]), OWN)
        assert TrialRecord.from_dict(json.loads(json.dumps(record.to_dict())), HALF) == record
        assert trial.values == [record.quality.value, record.time_frac] and record.versions["torch"]


def test_a_record_of_an_earlier_release_has_the_studys_own_sampler():
    """An empty sampler stood for it, and a record of the first releases had none."""
    record = TrialRecord(3, "full", Point(ExitSchedule.full(6), HALF), "failed", failure="why")
    for old in ({**record.to_dict(), "sampler": ""}, record.to_dict()):
        if old["sampler"]:
            del old["sampler"]
        assert TrialRecord.from_dict(old, OWN).point == Point(ExitSchedule.full(6), OWN)


def enqueued_by_hand(config, run_dir, *points):
    """A study that is begun, with points in its queue by Optuna's own means."""
    study = Study(config, run_dir)
    for point in points:
        study.optuna.enqueue_trial(make_space(config, FakeBench(config=config)).encode(point))


def test_a_warm_start_that_is_enqueued_by_hand_is_that_warm_start(tmp_path):
    config = make_config(proposer="random", num_trials=5, samplers=["ddim-25"])
    warm = warm_starts(config, FakeBench(config=config))
    other = ExitSchedule.from_string("5 5 4 2", DEPTH)
    by_hand = [Point(other, OWN), *reversed(warm.values())]
    enqueued_by_hand(config, tmp_path, *by_hand)
    study, bench = run(config, tmp_path)
    records = study.records()
    assert [r.point for r in records[:4]] == by_hand and len(bench.tried) == 5
    assert [r.origin for r in records[:4]] == ["random", *reversed(warm)]
    assert study.results().full.number == 3


@pytest.mark.thorough
@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_a_full_network_that_an_earlier_release_took_for_a_proposal(
    tmp_path, monkeypatch, threshold
):
    """Complete it counts as what it is, stopped at its low-fidelity score it is tried again."""
    sections = {"promotion": {**LADDER["promotion"], "threshold": threshold, "always": 2}}
    config = make_config(sections, proposer="random", num_trials=4)
    full = Point(ExitSchedule.full(DEPTH), OWN)
    others = [Point(ExitSchedule.from_string(text, DEPTH), OWN) for text in ("5 5 4 2", "4 4 4 1")]
    enqueued_by_hand(config, ready(tmp_path), *others, full)
    with monkeypatch.context() as earlier:
        earlier.setattr(Asker, "origin_of", lambda *_: None)
        study, _ = run(config, tmp_path)
    left = study.optuna.get_trials()[2].user_attrs[RECORD]
    stopped = threshold == 1.0
    assert json.loads(left)["origin"] == "random"
    assert json.loads(left)["state"] == ("stopped" if stopped else "complete")
    study, bench = run(config, tmp_path)
    assert [s.is_full for s in bench.tried] == [True] * stopped and bench.low_tried == []
    results = study.results()
    assert results.full.point == full and results.full.number == (4 if stopped else 2)
    assert len(results.records) == 4 and label(results.full, results) == "full network"


@pytest.mark.parametrize(
    ("storage", "rule"),
    [
        ("not a url", "must be a database URL"),
        ("sqlite:///a\0b.db", r"no NUL characters; got 'sqlite:///a\\x00b.db'; correct it"),
        ("sqlite:////nowhere/at/all/study.db", "can't be used"),
        ("nosuchdb://host/name", "can't be used"),
    ],
)
def test_unusable_storage_is_one_line(tmp_path, storage, rule):
    with pytest.raises(StudyError, match=rule) as caught:
        Study(make_config(storage=storage), tmp_path)
    assert "\n" not in str(caught.value)


def test_a_broken_database_is_one_line_and_kept(tmp_path):
    (tmp_path / "study.db").write_bytes(b"not a database, but something of the user's")
    with pytest.raises(StudyError, match="can't be used.*is no SQLite database"):
        Study(make_config(), tmp_path)
    assert (tmp_path / "study.db").read_bytes().startswith(b"not a database")


def test_a_busy_database_is_waited_for_and_then_named(tmp_path, monkeypatch):
    run(make_config(num_trials=2), tmp_path)
    monkeypatch.setattr("asesearch.study.storage.BUSY_WAIT_S", 0.1)
    study = Study(make_config(num_trials=3), tmp_path)
    holder = sqlite3.connect(tmp_path / "study.db", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StudyError, match="can't be used: .*locked.*no other program holds it"):
        run_trials(study, FakeBench())
    holder.close()
    resumed, _ = run(make_config(num_trials=3), tmp_path)
    assert len(resumed.records()) == 3


def test_a_password_is_not_shown(tmp_path):
    with pytest.raises(StudyError) as caught:
        Study(make_config(storage="nosuchdb://user:secret@host/name"), tmp_path)
    assert "secret" not in str(caught.value)


def test_a_password_does_not_travel(tmp_path):
    storage = f"sqlite:///file:{tmp_path}/shared.db?uri=true&key=secret"
    study = Study(make_config(storage=storage), tmp_path / "run")
    assert "secret" not in json.dumps(study.results().config) + json.dumps(study.config.shareable())


def test_opening_what_is_no_study(tmp_path):
    with pytest.raises(StudyError, match="study.json is missing"):
        Study.open(tmp_path)
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(StudyError, match="can't read .*study.json.*restore it"):
        Study.open(tmp_path)


def test_warm_starts_outside_the_space_are_refused_before_anything_runs():
    with pytest.raises(ScheduleError, match="warm start '6 5 4' does not fit.*4 equal intervals"):
        warm_starts(make_config(warm_start=["6 5 4"]), FakeBench())
    with pytest.raises(ScheduleError, match="warm start '6 7' does not fit.* lie in 1…6.*got 7"):
        warm_starts(make_config(warm_start=["6 7"]), FakeBench())
    with pytest.raises(ScheduleError, match="published names"):
        warm_starts(make_config(warm_start=["D9"]), FakeBench())


def test_published_schedules_are_rescaled_to_the_network():
    starts = warm_starts(make_config(num_intervals=10, warm_start=["full", "D3-DiT"]), FakeBench())
    assert list(starts) == ["full", "D3-DiT"]
    assert starts["D3-DiT"] == Point(ExitSchedule.published("D3-DiT", 6), OWN)


def test_non_dominated_against_brute_force():
    points = [(1, 5), (2, 3), (2, 3), (3, 3), (4, 1), (5, 2), (0.5, 9)]
    assert non_dominated(points) == [0, 1, 4, 6]


@pytest.mark.thorough
# two threads share one list of filters
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_reading_while_another_thread_searches(tmp_path):
    study = Study(make_config(num_trials=6), tmp_path)
    thread = threading.Thread(target=run_trials, args=(study, FakeBench()))
    thread.start()
    seen = 0
    while thread.is_alive():
        now = len(Study.open(tmp_path).records())
        assert now >= seen
        seen = now
    assert len(Study.open(tmp_path).records()) == 6


# -- warm-up, rungs, samplers, budget ----------------------------------------------------


def ready(run_dir):
    """A study directory whose difficulty map is made already."""
    error = [[float((DEPTH - d) ** 2) / (1 + i) for d in range(1, DEPTH + 1)] for i in range(4)]
    table = tuple(map(tuple, error))
    spread = tuple(tuple(0.1 * e for e in row) for row in error)
    found = DifficultyMap(
        1000, (0, 250, 500, 750, 1000), table, spread, table, spread, 16, "fake", "0", "w", "w"
    )
    write_json(run_dir / "map.json", found.to_dict())
    return run_dir


LADDER = {
    "promotion": {"num_samples": 20, "repeats": 2, "always": 2, "threshold": 0.5, "explore": 0}
}


@pytest.mark.thorough
def test_a_schedule_that_is_held_without_a_trial_is_proposed_once(tmp_path):
    """As the full network's is while a worker tunes it during the warm-up; by the formula it is the
    best there is under any sampler."""
    config = make_config(
        {"promotion": {**LADDER["promotion"], "explore": 5}},
        proposer="difficulty",
        num_trials=14,
        samplers=["dpm++2m-5"],
    )
    study = Study(config, ready(tmp_path))
    bench = FakeBench(config=config)
    here = Runner(study, bench)
    made = warm_up(bench, tmp_path)
    here.asker.problem = make_problem(here.fleet.space, bench, made.difficulty_map)
    other = Runner(Study(config, tmp_path), bench)
    with other.fleet.claim(ExitSchedule.full(6)) as mine:
        outcomes = [here._one_trial() for _ in range(12)]
    assert mine and outcomes == ["taken", *["tried"] * 11]
    assert not any(s.is_full for s in (*bench.tried, *bench.low_tried))


@pytest.mark.thorough
def test_difficulty_proposer_resumes_and_repeats_like_any_other(tmp_path):
    config = make_config(proposer="difficulty", num_trials=9)
    straight, bench = run(config, ready(tmp_path / "straight"))
    assert len(bench.tried) == 9 and len({r.point for r in straight.records()}) == 9
    assert all(r.schedule.is_noise_easy for r in straight.records())
    run(make_config(proposer="difficulty", num_trials=6), ready(tmp_path / "parts"))
    resumed, bench = run(config, tmp_path / "parts")
    assert len(bench.tried) == 3 and trials_of(resumed) == trials_of(straight)


class Surprising(FakeBench):
    """Low-fidelity scores that contradict the difficulty map: schedules of odd depth near data have
    three times their figure."""

    def try_low_fidelity(self, point):
        quality, seconds, gflops = super().try_low_fidelity(point)
        odd = point.schedule.exit_depths[0] % 2
        return (
            replace(quality, values=tuple((3 if odd else 1) * v for v in quality.values)),
            seconds,
            gflops,
        )


@pytest.mark.thorough
@pytest.mark.parametrize("proposer", ["difficulty", "tpe"])
def test_only_promising_schedules_are_fine_tuned(tmp_path, proposer):
    config = make_config(
        {"promotion": {**LADDER["promotion"], "threshold": 0.8}}, proposer=proposer, num_trials=12
    )
    study = Study(config, ready(tmp_path))
    bench = Surprising(config=config)
    run_trials(study, bench)
    records = study.records()
    stopped = [r for r in records if r.state == "stopped"]
    assert len(records) == 12 and stopped and len(bench.tried) == 12 - len(stopped)
    # no low-fidelity score is paid for twice
    assert len({(s.merged()) for s in bench.low_tried}) == len(bench.low_tried)
    for r in records:
        assert (
            r.low_fidelity is not None
            and r.low_fidelity.quality.protocol == LOW_FIDELITY
            and r.seconds["low_fidelity"] == 0.5
        )
    for r in stopped:
        assert (
            r.quality is None
            and r.low_fidelity.probability < 0.8
            and "threshold 0.8" in r.low_fidelity.reason
        )
        assert r.time_frac == pytest.approx(r.schedule.block_frac(bench.samplers[OWN]))
    returned = [r for r in records if r.state == "complete" and "again" in r.low_fidelity.reason]
    judged = [
        r
        for r in records
        if r.state == "complete" and r.low_fidelity.probability is not None and r not in returned
    ]
    assert judged and min(r.low_fidelity.probability for r in judged) >= 0.8
    assert bool(returned) == (proposer == "difficulty")  # which alone returns to what it stopped
    warm = [r for r in records if r.origin != proposer]
    assert [r.low_fidelity.reason for r in warm] == ["a warm start"] * 2
    # low-fidelity scores are on no front and no value of Optuna's
    assert not {r.number for r in stopped} & {r.number for r in study.results().front()}
    trials = {t.number: t for t in study.optuna.get_trials()}
    assert {trials[r.number].state for r in stopped} == {optuna.trial.TrialState.PRUNED}
    assert all(trials[r.number].values is None for r in stopped)


@pytest.mark.thorough
def test_the_proposer_looks_around_before_anything_is_fine_tuned(tmp_path):
    config = make_config(
        {"promotion": {**LADDER["promotion"], "explore": 5}}, proposer="difficulty", num_trials=14
    )
    study, bench = run(config, ready(tmp_path))
    first = [
        TrialRecord.from_dict(json.loads(t.user_attrs[RECORD]), OWN)
        for t in study.optuna.get_trials()
    ][:7]
    # warm starts, then the exploration phase
    assert [r.state for r in first] == ["complete"] * 2 + ["stopped"] * 5
    assert {r.low_fidelity.reason for r in first[2:]} == {"the exploration phase"}
    assert len(study.records()) == 14
    assert (
        sum(r.state == "complete" and r.origin == "difficulty" for r in study.records())
        >= LADDER["promotion"]["always"]
    )
    assert len(set(bench.low_tried)) == len(bench.low_tried)


def test_no_more_than_half_of_the_trials_look_around():
    assert (
        num_explored(
            make_config({"promotion": {"explore": 9}}, proposer="difficulty", num_trials=10)
        )
        == 5
    )
    assert (
        num_explored(
            make_config({"promotion": {"explore": 9}}, proposer="difficulty", num_trials=40)
        )
        == 9
    )
    assert (
        num_explored(make_config({"promotion": {"explore": 9}}, proposer="tpe", num_trials=40)) == 0
    )


def proposed_again(proposer, run_dir, **promotion):
    """A study whose first stopped schedule is proposed again, under other settings of the
    promotion."""
    config = make_config(LADDER, proposer=proposer, num_trials=12)
    study, bench = run(config, ready(run_dir))
    stopped = next(r for r in study.records() if r.state == "stopped")
    study.optuna.enqueue_trial(make_space(config, bench).encode(stopped.point))
    larger, bench = run(
        make_config(
            {"promotion": {**LADDER["promotion"], **promotion}}, proposer=proposer, num_trials=13
        ),
        run_dir,
    )
    (again,) = (r for r in larger.records() if r.point == stopped.point)
    return stopped, again, larger, bench


@pytest.mark.thorough
@pytest.mark.parametrize("proposer", ["random", "tpe"])
def test_what_is_proposed_again_by_chance_is_stopped_again_and_costs_nothing(tmp_path, proposer):
    stopped, again, study, bench = proposed_again(proposer, tmp_path)
    assert again == stopped and again.low_fidelity.probability < 0.1
    assert stopped.schedule not in bench.tried and stopped.schedule not in bench.low_tried
    # another schedule took the place
    assert len(study.records()) == 13 and len(bench.low_tried) == 1
    repeat = next(
        t for t in study.optuna.get_trials() if t.user_attrs.get(REPEAT) == stopped.number
    )
    assert repeat.state == optuna.trial.TrialState.PRUNED and RECORD not in repeat.user_attrs


@pytest.mark.thorough
def test_what_is_proposed_again_goes_up_where_it_is_judged_better_now(tmp_path):
    stopped, again, _, bench = proposed_again("random", tmp_path, threshold=0.0)
    assert (
        again.state == "complete"
        and again.number > stopped.number
        and stopped.schedule in bench.tried
    )
    assert again.low_fidelity.reason.startswith("proposed again: on the front with probability")
    assert (
        again.low_fidelity.quality == stopped.low_fidelity.quality
        and stopped.schedule not in bench.low_tried
    )
    # what it cost then is still on record
    assert again.seconds["low_fidelity"] == 0.5 and again.gflops["low_fidelity"] == 1.0
    assert again.quality.values == scores(stopped.point)


@pytest.mark.thorough
def test_the_difficulty_proposers_own_return_is_the_judgement(tmp_path):
    config = make_config(
        {"promotion": {**LADDER["promotion"], "threshold": 1.0}},
        proposer="difficulty",
        num_trials=9,
    )
    study = Study(config, ready(tmp_path))
    bench = Surprising(config=config)
    run_trials(study, bench)
    first = [
        TrialRecord.from_dict(json.loads(t.user_attrs[RECORD]), OWN)
        for t in study.optuna.get_trials()
        if RECORD in t.user_attrs
    ]
    stopped = {r.point: r for r in first if r.state == "stopped"}
    returned = [
        r
        for r in study.records()
        if r.low_fidelity.reason == "proposed again in the light of later trials"
    ]
    assert returned and len(set(bench.low_tried)) == len(bench.low_tried)
    for r in returned:
        before = stopped[r.point]
        assert (
            r.state == "complete"
            and r.low_fidelity.probability == before.low_fidelity.probability < 1.0
        )
        assert r.low_fidelity.quality == before.low_fidelity.quality and r.number > before.number


@pytest.mark.thorough
def test_a_space_of_stopped_schedules_ends_the_search(tmp_path, monkeypatch, caplog):
    """Stopped again and again is nothing new: the search must not go round for ever."""
    monkeypatch.setattr("asesearch.search.runner.MAX_REFUSED_IN_A_ROW", 15)
    sections = {"promotion": {**LADDER["promotion"], "always": 0, "threshold": 1.0}}
    config = make_config(sections, proposer="random", num_intervals=1, warm_start=[], num_trials=50)
    study = Study(config, ready(tmp_path))
    bench = FakeBench(config=config)
    run_trials(study, bench)
    assert "as good as exhausted" in caplog.text
    assert 4 <= len(study.records()) == len(bench.low_tried) <= 6 and len(bench.tried) < 6


@pytest.mark.thorough
def test_the_rest_of_a_trials_time_is_kept_when_it_comes_again(tmp_path):
    """What was spent beside the parts: of the stopped trial and of the one in its place,
    together."""

    class Slow(FakeBench):
        def try_low_fidelity(self, point):
            time.sleep(0.05)
            return *super().try_low_fidelity(point)[:1], 0.01, 1.0

        def try_point(self, point, folder):
            time.sleep(0.05)
            return replace(super().try_point(point, folder), seconds={"finetune": 0.01})

    def search(num_trials, **promotion):
        ladder = {"promotion": {**LADDER["promotion"], **promotion}}
        study = Study(make_config(ladder, proposer="random", num_trials=num_trials), tmp_path)
        run_trials(study, bench := Slow(config=study.config))
        return study, bench

    ready(tmp_path)
    for num_trials in range(6, 17, 2):
        study, bench = search(num_trials)
        if any(r.state == "stopped" for r in study.records()):
            break
    stopped = next(r for r in study.records() if r.state == "stopped")
    study.optuna.enqueue_trial(make_space(study.config, bench).encode(stopped.point))
    study, _ = search(num_trials + 1, threshold=0.0)
    again = next(r for r in study.records() if r.point == stopped.point)
    assert again.state == "complete" and stopped.seconds["other"] > 0.04
    assert again.seconds["other"] > stopped.seconds["other"] + 0.04


@pytest.mark.parametrize(("second", "counted"), [(7.25, 0.0), (8.5, 8.5)])
def test_a_fine_tuning_is_counted_once_and_a_second_one_again(tmp_path, second, counted):
    """Another sampler's trial of a schedule finds its weights, or they were deleted and are made
    again."""

    class Timed(FakeBench):
        def try_point(self, point, folder):
            took = 7.25 if point.sampler == OWN else second
            parts = {
                "seconds": {"finetune": took, "sample": 1.5},
                "gflops": {"finetune": 4.0, "sample": 1.0},
            }
            return replace(super().try_point(point, folder), losses=[3.0, 2.0], **parts)

    config = make_config(samplers=["ddim-25"], warm_start=[], num_trials=2)
    study = Study(config, tmp_path)
    run_trials(study, Timed(config=config))
    own, other = study.records()
    assert (own.sampler, other.sampler) == (OWN, HALF) and own.schedule == other.schedule
    assert (
        own.seconds["finetune"] == 7.25
        and own.losses == (3.0, 2.0)
        and own.gflops["finetune"] == 4.0
    )
    assert other.seconds["finetune"] == counted and other.seconds["sample"] == 1.5
    assert other.gflops.get("finetune", 0.0) == (4.0 if counted else 0.0) and bool(
        other.losses
    ) == bool(counted)


@pytest.mark.thorough
def test_kill_9_on_the_ladder(tmp_path):
    search = {"num_trials": 9, "proposer": "difficulty"}
    process = Child(work, search, ready(tmp_path / "killed"), 3, LADDER)
    assert process.ended()[0] == -9
    resumed, _ = run(make_config(LADDER, **search), tmp_path / "killed")
    straight, _ = run(make_config(LADDER, **search), ready(tmp_path / "straight"))
    assert trials_of(resumed) == trials_of(straight)


@pytest.mark.thorough
@pytest.mark.parametrize("proposer", ["difficulty", "tpe", "nsga2", "gp", "random"])
def test_ways_of_sampling_compete_with_schedules(tmp_path, proposer):
    config = make_config(proposer=proposer, num_trials=9, samplers=["ddim-25"])
    study, _ = run(config, ready(tmp_path))
    records = study.records()
    assert [r.origin for r in records[:3]] == ["full", "6 6 3 3", "full ddim-25"]
    half = records[2]
    assert (
        half.sampler == HALF
        and half.time_frac == pytest.approx(0.5)
        and half.quality.value == pytest.approx(6.25)
    )
    assert {r.sampler for r in records} == {OWN, HALF}
    points = [r.point for r in records]
    assert len(set(points)) == len(points)
    assert study.results().full.number == 0
    before = trials_of(study)
    resumed, bench = run(
        make_config(proposer=proposer, num_trials=10, samplers=["ddim-25"]), tmp_path
    )
    assert len(bench.tried) == 1 and trials_of(resumed)[:9] == before
