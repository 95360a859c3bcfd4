"""The proposer that knows the network: its answers in a real study, and what they are worth against
random search."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from asesearch.point import Point
from asesearch.proposer.belief import FrontBelief, judge
from asesearch.proposer.candidates import Candidates
from asesearch.proposer.problem import Problem
from asesearch.proposer.proposer import DifficultySampler
from asesearch.proposer.space import Space
from asesearch.sampler import Sampler
from asesearch.schedule import ExitSchedule
from asesearch.score import EvaluationResult, Protocol
from asesearch.study.records import RECORD, LowFidelity, TrialRecord
from tests.proposer.test_quality_model import (
    CALLS,
    CHAIN,
    DEPTH,
    A,
    FakeMap,
    Truth,
    some_points,
)

SPACE = Space(DEPTH, (A,), CHAIN, 10)
FULL = Point(ExitSchedule.full(DEPTH), A)


def score(value, noise=0.02, repeats=2):
    protocol = Protocol(
        "frechet", "fake", "0", 100, "fake", 100, "0", tuple(range(repeats)), "ddim", 15, 1.0
    )
    return EvaluationResult(protocol, (value * (1 - noise), value * (1 + noise))[:repeats])


def record(point, value, state="complete", low_fidelity=None, **how):
    rung = (
        None
        if low_fidelity is None
        else LowFidelity(score(low_fidelity), state != "stopped", None, "")
    )
    return TrialRecord(
        0,
        "",
        point,
        state,
        score(value, **how) if state == "complete" else None,
        low_fidelity=rung,
    )


def make_problem(difficulty_map=None, space=SPACE, samplers=None, depth=DEPTH):
    samplers = samplers or {A: CALLS}
    table = 0.5 + np.arange(1.0, depth + 1)
    return Problem(
        space,
        samplers,
        {s: np.tile(table, (len(calls), 1)) for s, calls in samplers.items()},
        len(CALLS) * table[-1],
        difficulty_map or FakeMap(error=0.05, depth=depth),
    )


def make_sampler(problem, seed=0):
    return DifficultySampler(problem, seed=seed)


def some_records(count, seed=0, depth=DEPTH, calls=CALLS):
    rng = np.random.default_rng(seed)
    truth = Truth(seed, depth, samplers={A: calls})
    points = [Point(ExitSchedule.full(depth), A), *some_points(rng, count, A, depth)][:count]
    return [record(p, math.exp(truth(p))) for p in points]


def propose(problem, records, pending=(), seed=0):
    """The next point."""
    row = make_sampler(problem)._choose(records, list(pending), np.random.default_rng(seed))
    return row and Point(
        ExitSchedule.uniform_intervals(row[1:], problem.space.depth), problem.space.samplers[row[0]]
    )


def search(optuna_sampler, problem, truth, count, seed=0, storage=None, noise=0.02):
    """A two-objective study that begins with the full network; (cost, true log score) of each
    trial, and the study."""
    study = optuna.create_study(
        storage=storage, directions=["minimize"] * 2, sampler=optuna_sampler
    )
    study.enqueue_trial(problem.space.encode(problem.full))
    rng = np.random.default_rng([seed, 5])
    found = []

    def objective(trial):
        point = problem.space.suggest(trial)
        found.append((problem.cost_frac(point), truth(point)))
        value = math.exp(found[-1][1] + noise * rng.normal())
        trial.set_user_attr(RECORD, json.dumps(record(point, value).to_dict()))
        return value, found[-1][0]

    study.optimize(objective, n_trials=count)
    return found, study


def hypervolumes(found):
    """After each trial: true area between the front and (1.1 of the full network's cost, twice its
    score)."""
    out = []
    for n in range(1, len(found) + 1):
        area = 0.0
        best = 2.0
        for cost, log_quality in sorted(found[:n]):
            quality = math.exp(log_quality - found[0][1])
            if quality < best and cost < 1.1:
                area = area + (1.1 - cost) * (best - quality)
                best = quality
        out.append(area)
    return np.array(out)


# -- in a study ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "noise_easy"), [("memory", True), ("sqlite", False)])
def test_a_real_study_of_two_objectives(backend, noise_easy, tmp_path):
    problem = make_problem(space=Space(DEPTH, (A,), CHAIN, 10, noise_easy, min_exit_depth=2))
    storage = f"sqlite:///{tmp_path}/study.db" if backend == "sqlite" else None
    found, study = search(make_sampler(problem), problem, Truth(), 7, storage=storage)
    points = [problem.space.decode(t.params) for t in study.trials]
    schedules = [p.schedule for p in points]
    assert schedules[0].is_full and len(set(points)) == 7
    assert all(min(s.exit_depths) >= 2 for s in schedules)
    assert not noise_easy or all(s.is_noise_easy for s in schedules)
    assert (
        all(t.state == TrialState.COMPLETE for t in study.trials) and hypervolumes(found)[-1] > 0.1
    )


@pytest.mark.thorough
def test_same_trials_in_a_fresh_process(tmp_path):
    code = (
        "from tests.proposer.test_proposer import *\n"
        "found, study = search(make_sampler(make_problem(), 3), make_problem(), Truth(), 6)\n"
        "print(json.dumps([t.params for t in study.trials]))"
    )
    root = Path(__file__).parents[2]
    env = {"PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    output = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=env, capture_output=True, check=True
    ).stdout
    _, study = search(make_sampler(make_problem(), 3), make_problem(), Truth(), 6)
    assert json.loads(output) == [t.params for t in study.trials]


def test_nothing_is_kept_between_proposals():
    problem = make_problem()
    truth = Truth()
    straight, _ = search(make_sampler(problem), problem, truth, 6)
    found, study = search(make_sampler(problem), problem, truth, 4)
    study.sampler = make_sampler(problem)
    assert study.sampler.problem is problem  # and what was worked out of it
    assert (
        problem.cost_frac(problem.space.decode(study.ask(problem.space.distributions()).params))
        == straight[4][0]
    )


def test_warm_starts_are_respected():
    problem = make_problem()
    study = optuna.create_study(directions=["minimize"] * 2, sampler=make_sampler(problem))
    wanted = Point(ExitSchedule.published("D3-DiT", DEPTH), A)
    study.enqueue_trial(problem.space.encode(wanted))
    assert problem.space.suggest(study.ask()) == wanted
    study.enqueue_trial({"depth at data": 9})  # the others are the proposer's choice
    assert study.ask(problem.space.distributions()).params["depth at data"] == 9


def test_trials_in_flight_change_the_next_proposal():
    problem = make_problem()
    truth = Truth()
    _, study = search(make_sampler(problem), problem, truth, 5)
    asked = []
    for _ in range(4):  # four workers at once
        study.sampler = make_sampler(problem)
        asked.append(problem.space.suggest(study.ask()))
    assert len(set(asked)) == 4
    records = some_records(6)
    first = propose(problem, records)
    second = propose(problem, records, [first])
    depths = [problem.depths_of(p.schedule) for p in (first, second)]
    distance = np.abs(np.subtract(*depths)).sum()
    assert distance >= 3  # not the neighbour of what another worker tries


def test_workers_that_start_at_once_spread_out():
    problem = make_problem()
    pending = [FULL]
    costs = []
    for _ in range(4):
        chosen = propose(problem, [], pending)
        pending.append(chosen)
        costs.append(problem.cost_frac(pending[-1]))
    assert np.diff(sorted(costs)).min() > 0.05


def test_proposals_over_unequal_intervals_stay_in_the_space():
    space = Space(DEPTH, (A,), CHAIN, 10, interval_power=2.0)
    problem = make_problem(space=space)
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=make_sampler(problem))
    points = [space.suggest(study.ask()) for _ in range(3)]
    assert all(p.schedule.boundaries == space.boundaries for p in points)
    # costs of candidates are those of the points
    pool = Candidates(problem, set())
    pool.extend([problem.row(p) for p in points])
    assert pool.costs() == pytest.approx([problem.cost_frac(p) for p in points])


@pytest.mark.parametrize("noise_easy", [True, False])
def test_an_exhausted_space_gives_repeats(noise_easy):
    space = Space(2, (A,), CHAIN, 2, noise_easy)
    problem = make_problem(space=space, depth=2)
    depths = [(1, 1), (2, 1), (2, 2), *([] if noise_easy else [(1, 2)])]
    points = [Point(ExitSchedule.uniform_intervals(d, 2), A) for d in depths]
    records = [record(p, 5.0 - i) for i, p in enumerate(points)]
    assert propose(problem, records) is None
    assert propose(problem, records[1:]) == points[0]  # the last one left is found
    study = optuna.create_study(directions=["minimize"] * 2, sampler=make_sampler(problem))
    for entry in records:
        study.enqueue_trial(space.encode(entry.point))
        trial = study.ask()
        assert space.suggest(trial) == entry.point
        trial.set_user_attr(RECORD, json.dumps(entry.to_dict()))
        study.tell(trial, [1.0, 1.0])
    assert space.suggest(study.ask()) in set(points)


def test_what_failed_is_left_out_and_what_was_stopped_may_return():
    problem = make_problem()
    records = some_records(8)
    first = propose(problem, records)
    assert propose(problem, [*records, record(first, 0, state="failed")]) != first
    better = [
        *records,
        record(first, 0, state="stopped", low_fidelity=0.01),
        record(Point(FULL.schedule, Sampler("gone", 5)), 0, state="stopped", low_fidelity=3.0),
    ]
    assert propose(problem, better) not in {r.point for r in records}
    pool = Candidates(problem, set())
    pool.extend(make_sampler(problem)._rows(better, lambda r: r.state == "stopped"))
    assert pool.rows.tolist() == [list(problem.row(first))]


def test_depths_that_a_sampler_never_asks_for_make_no_other_point():
    # three: intervals 9, 4 and 0
    samplers = {
        Sampler("ddim", 10): tuple(range(950, 0, -100)),
        Sampler("ddim", 3): (950.0, 450.0, 50.0),
    }
    problem = make_problem(space=Space(DEPTH, tuple(samplers), CHAIN, 10), samplers=samplers)
    one = (1, *((8,) * 4), *((5,) * 5), 3)
    other = (1, 8, 7, 6, 6, *((5,) * 4), 4, 3)
    assert problem.keys(np.array([one, other])) == [one[:1] + (8, 8, 8, 8, 5, 5, 5, 5, 5, 3)] * 2
    rows = [(0, *one[1:]), (0, *other[1:])]
    assert problem.keys(np.array(rows)) == rows  # ten calls see the difference
    pool = Candidates(problem, {problem.keys(np.array([one]))[0]})
    pool.extend([other, *rows])
    assert pool.rows.tolist() == [list(r) for r in rows]


@pytest.mark.thorough
def test_several_samplers_compete():
    samplers = {Sampler("ddim", 15): CALLS, Sampler("ddim", 8): CALLS[::2]}
    space = Space(DEPTH, tuple(samplers), CHAIN, 10)
    problem = make_problem(space=space, samplers=samplers)
    truth = Truth(samplers=samplers)
    found, study = search(make_sampler(problem), problem, truth, 12)
    used = [t.params["sampler"] for t in study.trials]
    # half the calls at the same score: a bargain
    assert used[0] == "ddim-15" and used.count("ddim-8") > 4
    assert min(c for c, _ in found) < 0.4 and problem.cost_frac(
        Point(FULL.schedule, Sampler("ddim", 8))
    ) == pytest.approx(8 / 15)
    assert "sampler" not in make_sampler(make_problem()).infer_relative_search_space(
        study, study.trials[0]
    )
    with pytest.raises(AssertionError):
        make_problem(samplers=samplers)


# -- judging -------------------------------------------------------------------------------------


def test_a_good_low_fidelity_score_speaks_for_a_point():
    problem = make_problem()
    truth = Truth()
    rng = np.random.default_rng(0)
    points = [FULL, *some_points(rng, 12)]
    records = [record(p, math.exp(truth(p)), low_fidelity=2 * math.exp(truth(p))) for p in points]
    point = Point(ExitSchedule.published("D3-DiT", DEPTH), A)
    fair = 2 * math.exp(truth(point))
    good = judge(problem, records, point, score(0.7 * fair))
    bad = judge(problem, records, point, score(3 * fair))
    assert bad < 0.1 < 0.5 < good
    assert 0 <= judge(problem, [], point) <= 1
    shallow = Point(ExitSchedule.uniform_intervals([1], DEPTH), A)
    dominated = [record(shallow, math.exp(truth(points[0])) / 2)]
    assert judge(problem, [*records, *dominated], point) < 0.2


def test_a_point_with_a_dear_figure_is_compared_with_the_others():
    problem = make_problem()
    records = some_records(10)
    belief = FrontBelief(problem, records)
    values = [r.quality.value for r in records]
    costs = [problem.cost_frac(p) for p in belief.known]
    on = [
        i
        for i in range(10)
        if not any(c <= costs[i] and v < values[i] for c, v in zip(costs, values, strict=True))
    ]
    likely = [belief.probability(p) for p in belief.known]
    beaten = [p for i, p in enumerate(likely) if i not in on]
    assert likely[0] > 0.9 and beaten and max(beaten) < 0.5


# -- odd records ---------------------------------------------------------------------------------


def assert_new(point, problem, records):
    """A point of the space that is not on record and takes no more time than the full
    network."""
    depths = point.schedule.exit_depths
    assert len(depths) == problem.space.num_intervals and point.sampler in problem.space.samplers
    assert min(depths) >= 1 and max(depths) <= problem.space.depth
    assert point.schedule.is_noise_easy or not problem.space.noise_easy
    assert point not in {r.point for r in records}
    assert problem.cost_frac(point) <= 1


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_few_records(count):
    problem = make_problem()
    records = some_records(count)
    proposed = propose(problem, records)
    assert_new(proposed, problem, records)
    assert propose(problem, records) == proposed


def test_figures_that_have_no_logarithm_or_no_spread():
    problem = make_problem()
    records = some_records(6)
    # kernel distances may be negative
    kernel = [record(r.point, r.quality.value - 15, noise=0.0) for r in records]
    assert min(r.quality.value for r in kernel) < 0
    once = [record(r.point, r.quality.value, repeats=1) for r in records]
    zero = [record(r.point, 0.0) for r in records]
    for odd in (kernel, once, zero):
        assert_new(propose(problem, odd), problem, odd)
        assert all(math.isfinite(o.log_quality) for o in problem.observations(odd))
    assert all(math.isnan(o.std_error) for o in problem.observations(once))


def test_the_latest_figure_of_a_point_counts_and_foreign_samplers_do_not():
    problem = make_problem()
    foreign = Point(FULL.schedule, Sampler("foreign", 5))
    records = [record(FULL, 2.0), record(foreign, 3.0), record(FULL, 4.0, low_fidelity=8.0)]
    found = {o.level: o for o in problem.observations(records)}
    assert len(problem.observations(records)) == 2
    assert math.exp(found["high"].log_quality) == pytest.approx(4) and math.exp(
        found["low"].log_quality
    ) == pytest.approx(8)
    assert found["high"].std_error == pytest.approx(0.02)


# -- speed: bounds are generous, for a busy machine ------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "steps", "noise_easy", "count", "limit_s"),
    [
        (28, 250, True, 30, 4.0),
        (28, 250, False, 30, 4.0),
        (6, 50, True, 30, 3.0),
        (12, 15, True, 300, 8.0),
    ],
)
def test_a_proposal_is_quick(depth, steps, noise_easy, count, limit_s):
    calls = tuple(np.linspace(999, 0, steps).round().tolist())
    problem = make_problem(
        space=Space(depth, (A,), CHAIN, 10, noise_easy), samplers={A: calls}, depth=depth
    )
    records = some_records(count, depth=depth, calls=calls)
    begun = time.process_time()
    proposed = propose(problem, records)
    assert time.process_time() - begun < limit_s
    assert_new(proposed, problem, records)


def test_ten_thousand_candidates_are_scored_in_seconds():
    problem = make_problem()
    rng = np.random.default_rng(0)
    belief = FrontBelief(problem, some_records(30))
    pool = Candidates(problem, set())
    pool.add(0, np.sort(rng.integers(1, DEPTH + 1, (12_000, 10)), axis=1)[:, ::-1])
    assert len(pool.rows) > 10_000 and len(set(map(tuple, pool.rows.tolist()))) == len(pool.rows)
    begun = time.process_time()
    scores = belief.improvement(pool.inputs(), pool.costs())
    assert time.process_time() - begun < 3.0
    assert np.isfinite(scores).all() and scores.min() >= 0 and scores.max() > 0


# -- worth ---------------------------------------------------------------------------------------


def regrets(seeds, count, **maps):
    """Hypervolume after each trial (seeds, count) of random search and of the proposer under each
    kind of map."""
    out = {name: [] for name in ("random", *maps)}
    for seed in seeds:
        samplers = {"random": optuna.samplers.RandomSampler(seed=seed)}
        samplers |= {
            name: make_sampler(make_problem(FakeMap(seed, **how)), seed)
            for name, how in maps.items()
        }
        for name, sampler in samplers.items():
            found, _ = search(sampler, make_problem(), Truth(seed), count, seed)
            out[name].append(hypervolumes(found))
    return {name: np.array(curves) for name, curves in out.items()}


def trials_to_reach(curves, levels):
    """Trials until each curve is at its level; all and one more if it never is."""
    return [
        int(np.argmax(c >= v)) + 1 if c.max() >= v else len(c) + 1
        for c, v in zip(curves, levels, strict=True)
    ]


MAPS = {
    "good": {"error": 0.05},
    "rough": {"error": 0.5},
    "reversed": {"reverse": True},
    "shuffled": {"shuffle": True},
}


def test_a_good_map_saves_trials():
    """On one landscape; the slow test has more of them."""
    random = regrets([2], 21)["random"]
    good = regrets([2], 8, good=MAPS["good"])["good"]
    assert trials_to_reach(good, random[:, -1])[0] <= 8


@pytest.mark.slow
def test_a_good_map_saves_trials_and_an_adversarial_one_costs_none():
    random = regrets(range(3), 21)["random"]
    good = regrets(range(3), 11, good=MAPS["good"])["good"]
    reached = trials_to_reach(good, random[:, -1])
    assert np.median(reached) <= 10 and good[:, -1].mean() > random[:, -1].mean()
    found = regrets(range(2), 14, reversed=MAPS["reversed"])
    assert found["reversed"][:, -1].mean() > 0.98 * found["random"][:, -1].mean()


@pytest.mark.slow
def test_regret_over_many_landscapes():
    found = regrets(range(12), 21, **MAPS)
    reached = {name: trials_to_reach(found[name], found["random"][:, -1]) for name in MAPS}
    print(
        {
            name: np.round(curves.mean(axis=0)[[3, 5, 10, 20]], 3).tolist()
            for name, curves in found.items()
        },
        reached,
    )
    assert np.median(reached["good"]) <= 10 and np.median(reached["rough"]) <= 12
    for name in MAPS:
        assert found[name][:, -1].mean() >= found["random"][:, -1].mean()
