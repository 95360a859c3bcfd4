"""The low-fidelity score decides: the same point under the same records goes up with a good one and
not with a bad one."""

import json
from dataclasses import replace

import numpy as np
import pytest

from asesearch.config import changed_fields
from asesearch.point import Point
from asesearch.proposer.belief import FrontBelief, judge
from asesearch.proposer.problem import Problem
from asesearch.proposer.space import Space
from asesearch.schedule import ExitSchedule
from asesearch.score import EvaluationResult
from asesearch.search.promotion import run_trial
from asesearch.study.records import LowFidelity, TrialRecord
from tests.proposer.test_quality_model import FakeMap
from tests.search.fake_search import (
    DEPTH,
    LOW_FIDELITY,
    OWN,
    PROTOCOL,
    FakeBench,
    make_config,
    scores,
)

POINT = Point(ExitSchedule.from_string("6 5 3 2", DEPTH), OWN)
OTHERS = [
    "6 6 6 6",
    "6 6 6 3",
    "6 6 3 3",
    "6 4 4 2",
    "5 5 3 1",
    "6 6 5 4",
    "4 4 2 2",
    "5 3 3 3",
    "6 3 2 1",
]
KERNEL = replace(LOW_FIDELITY, metric="kid")


def as_frechet(values):
    """Twice the fine-tuned score."""
    return EvaluationResult(LOW_FIDELITY, tuple(2 * v for v in values))


def as_kernel(values):
    """Kernel distances: the best of them below zero."""
    return EvaluationResult(KERNEL, tuple(0.01 * (v - 12) for v in values))


def ladder(low_fidelity):
    """A bench, a problem, and records with scores of both kinds."""
    promotion = {"num_samples": 20, "repeats": 2, "always": 0, "threshold": 0.5, "explore": 0}
    config = make_config({"promotion": promotion}, proposer="difficulty", num_trials=20)
    bench = FakeBench(config=config)
    records = []
    for number, text in enumerate(OTHERS):
        schedule = ExitSchedule.from_string(text, DEPTH)
        point = Point(schedule, OWN)
        values = scores(point)
        rung = LowFidelity(low_fidelity(values), True, None, "")
        origin = "full" if schedule.is_full else "difficulty"
        fracs = dict.fromkeys(("time_frac", "flops_frac", "block_frac"), schedule.block_frac())
        done = TrialRecord(
            number,
            origin,
            point,
            "complete",
            EvaluationResult(PROTOCOL, values),
            low_fidelity=rung,
            **fracs,
        )
        records.append(done)
    space = Space(DEPTH, (OWN,), 1000, 4)
    costs = bench.of_calls(OWN)
    full_cost = float(costs[:, -1].sum())
    problem = Problem(
        space, bench.samplers, {OWN: costs}, full_cost, FakeMap(error=0.05, depth=DEPTH)
    )
    return bench, problem, records


@pytest.mark.parametrize("low_fidelity", [as_frechet, as_kernel])
def test_the_measured_score_decides(tmp_path, monkeypatch, low_fidelity):
    fair = scores(POINT)
    ends = {}
    for name, factor in (("good", 0.6), ("bad", 2.5)):
        bench, problem, records = ladder(low_fidelity)
        measured = low_fidelity(tuple(factor * v for v in fair))
        monkeypatch.setattr(bench, "try_low_fidelity", lambda point, m=measured: (m, 0.5, 1.0))
        trial = TrialRecord(9, "difficulty", POINT, "")
        ended = run_trial(bench, trial, tmp_path / name, records, problem)
        assert ended.low_fidelity.quality == measured
        ends[name] = ended.state, bench.tried
    assert ends == {"good": ("complete", [POINT.schedule]), "bad": ("stopped", [])}


def test_a_promoted_point_that_had_no_memory_is_promoted_again(tmp_path, monkeypatch):
    bench, problem, records = ladder(as_frechet)
    rung = LowFidelity(as_frechet(scores(POINT)), True, 0.7, "on the front")
    told = "out of memory: CUDA out of memory"
    records.append(TrialRecord(9, "tpe", POINT, "failed", low_fidelity=rung, failure=told))
    monkeypatch.setattr("asesearch.search.promotion._decide", None)
    ended = run_trial(bench, TrialRecord(10, "tpe", POINT, ""), tmp_path, records, problem)
    assert ended.state == "complete" and ended.low_fidelity == rung and bench.low_tried == []


def test_kernel_distances_below_zero_inform_the_model():
    bench, problem, records = ladder(as_kernel)
    assert (
        min(r.low_fidelity.quality.value for r in records)
        < 0
        < max(r.low_fidelity.quality.value for r in records)
    )
    point = POINT
    fair = scores(POINT)
    likely = [
        judge(problem, records, point, as_kernel(tuple(f * v for v in fair)))
        for f in (0.6, 1.0, 2.5)
    ]
    assert all(np.isfinite(likely)) and likely[0] > likely[1] > likely[2]
    belief = FrontBelief(problem, records)
    means, _ = belief.model.posterior([r.point for r in records], "low")
    assert np.corrcoef(means, [r.low_fidelity.quality.value for r in records])[0, 1] > 0.9


def test_scores_of_other_protocols_do_not_pass_for_each_other():
    """What a record says of its metric comes back from its JSON."""
    rung = LowFidelity(
        EvaluationResult(replace(LOW_FIDELITY, metric="frechet-pca-5"), (1.0, 2.0)), True, None, ""
    )
    read = LowFidelity.from_dict(json.loads(json.dumps(rung.to_dict())))
    assert read == rung and read.quality.protocol.num_components == 5
    assert LOW_FIDELITY.num_components is None and KERNEL.num_components is None


@pytest.mark.parametrize(
    ("sections", "changed"),
    [
        ({"train": {"num_steps": 7}}, ["train.num_steps: 200 -> 7"]),
        (
            {"train": {"num_steps": 0, "lr": 1.0}},
            ["train.lr: 0.0001 -> 1.0", "train.num_steps: 200 -> 0"],
        ),
        ({"elastic": {"num_steps": 5}}, None),
        ({"promotion": {"metric": "kid"}}, None),
        ({"train": {"checkpoint_every": 7, "compile": True}}, []),
        ({"sampling": {"compile": True}}, ["sampling.compile: False -> True"]),
        ({"data": {"kind": "fashion-mnist", "flip": True}}, []),  # which it has no use for
        ({"data": {"kind": "fashion-mnist", "split": "test"}}, None),
    ],
)
def test_settings_that_scores_depend_on_may_not_change(sections, changed):
    found = changed_fields(make_config(), make_config(sections))
    assert bool(found) if changed is None else found == changed


def test_what_no_elastic_weights_depend_on_may_change():
    was = make_config({"elastic": {"num_steps": 5}})
    changes = {"checkpoint_every": 7, "compile": True}
    assert changed_fields(was, make_config({"elastic": {"num_steps": 5, **changes}})) == []
    assert changed_fields(was, make_config({"elastic": {"num_steps": 6, **changes}})) == [
        "elastic.num_steps: 5 -> 6"
    ]
    assert changed_fields(make_config(), make_config({"elastic": changes}))


def test_the_low_fidelity_metric_of_a_study_may_not_change():
    was, now = ({"promotion": {"metric": m, "num_samples": 20}} for m in ("auto", "kid"))
    assert changed_fields(make_config(was), make_config(now)) == [
        "promotion.metric: 'auto' -> 'kid'"
    ]
