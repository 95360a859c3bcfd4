"""The plan of a search, counted out by hand."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from asesearch.config import parse_study
from asesearch.point import Point
from asesearch.sampler import Sampler
from asesearch.schedule import ExitSchedule
from asesearch.score import EvaluationResult
from asesearch.search import plan
from asesearch.study.records import Confirmation, StudyResults, TrialRecord, select
from tests.search.fake_search import OWN, PROTOCOL

STUDY = {
    "name": "planned",
    "backbone": {"checkpoint": "shipped:fashion-mnist-dit"},
    "data": {"kind": "fashion-mnist"},
    "elastic": {"num_steps": 20},
    "map": {"num_bins": 2, "num_images": 3},
    "train": {"num_steps": 10},
    "evaluation": {"extractor": "fashion-cnn", "num_samples": 10, "repeats": 2},
    "search": {"num_trials": 6, "proposer": "difficulty"},
    "promotion": {"num_samples": 2, "repeats": 2},
    "confirm": {
        "max_points": 2,
        "num_samples": 4,
        "repeats": 2,
        "time_images": 3,
        "time_repeats": 1,
    },
}


@pytest.fixture
def bench(monkeypatch):
    """A step takes 2 s, an image 1 s in ten calls; half of the samplers call five times."""
    monkeypatch.setattr(plan, "Trainer", lambda *_: None)
    monkeypatch.setattr(plan, "seconds_per_step", lambda _: 2.0)
    monkeypatch.setattr(plan, "elastic_depths", lambda _: None)
    config = parse_study(STUDY, "test")
    tuning = None, config.train.model_copy(update={"num_steps": 30})
    return SimpleNamespace(
        config=config,
        samplers={Sampler("ddim", 10): range(10), Sampler("unipc", 5): range(5)},
        own_sampler=Sampler("ddim", 10),
        decoder=None,
        batch_size=10,
        costs=SimpleNamespace(full_call_ms=1000.0),
        full=None,
        trials=SimpleNamespace(tuning=lambda _: tuning),
        backbone=None,
        data=None,
        diffusion=None,
    )


def test_what_a_search_is_expected_to_take(bench):
    found = plan.make_plan(bench)
    # at 0.65 of the blocks and, in the mean, three quarters of the calls, an image takes 0.4875 s
    full = 30 * 2 + 20 + 4
    warm_up = 20 * 2 + 2 * 3 * 3 * 0.1
    explored = 3 * 4 * 0.4875
    tuned = 2 * (10 * 2 * 0.65 + (20 + 4) * 0.4875)
    confirmed = 8 * (1 + 2 * 0.4875) + 2 * (1 + 0.4875) * 2 * 3
    assert (
        found.expected_s
        == pytest.approx(full + warm_up + explored + tuned + confirmed)
        == pytest.approx(214.7)
    )
    # the bound: all five beside the full network tuned, at its cost
    assert found.total_s == pytest.approx(
        full + warm_up + 5 * (10 * 2 + 24) + 8 * 3 + 2 * 2 * 2 * 3
    )


def test_guidance_doubles_the_calls_of_images_and_none_of_the_map(bench):
    plain = plan.make_plan(bench)
    bench.config = bench.config.with_options("sampling", cfg_scale=2.0)
    bench.costs.full_call_ms *= 2  # of twice the batch
    guided = plan.make_plan(bench)
    assert (guided.image_s, guided.map_s) == (2 * plain.image_s, plain.map_s)
    assert plain.map_s == pytest.approx(2 * 3 * 3 * 0.1)


def test_with_a_budget_the_plan_is_what_is_expected(bench):
    bench.config = bench.config.with_options("search", budget="10m")
    found = plan.make_plan(bench)
    assert found.expected_s == found.total_s and 500 < found.total_s <= 600


def on_record(config, numbers, confirmed=(), seconds=None):
    """A study with these trials, each further one faster and worse; 0 is the full network."""
    records = tuple(
        TrialRecord(
            n,
            "tpe" if n else "full",
            Point(ExitSchedule.from_string(f"6 {6 - n}", 6), OWN),
            "complete",
            EvaluationResult(PROTOCOL, (5.0 + 0.1 * n, 5.1 + 0.1 * n)),
            1 - 0.1 * n,
        )
        for n in numbers
    )
    how = config.confirm
    protocol = replace(PROTOCOL, num_samples=how.num_samples)
    quality = EvaluationResult(protocol, (5.0,) * how.repeats)
    found = tuple(Confirmation(n, quality, 1 - 0.1 * n, 0.0) for n in confirmed)
    warm_up = {"seconds": seconds or {}}
    return StudyResults("planned", {}, records, found, (), {}, warm_up=warm_up)


def test_what_is_on_record_takes_no_time(bench):
    whole = plan.make_plan(bench)
    made = {"elastic": 40.0, "map": 1.8}
    begun = plan.make_plan(bench, on_record(bench.config, range(4), seconds=made))
    assert (begun.elastic_s, begun.map_s, begun.full_s, begun.num_trials) == (0, 0, 0, 2)
    assert begun.search_s == pytest.approx(2 * whole.trial_s)
    assert begun.confirm_s == whole.confirm_s  # two trials more may change the front
    assert begun.total_s == pytest.approx(
        whole.total_s - whole.elastic_s - whole.map_s - whole.full_s - 3 * whole.trial_s
    )
    # the exploration phase, three of five, is over
    tuned = 2 * (10 * 2 * 0.65 + (20 + 4) * 0.4875)
    assert begun.expected_s == pytest.approx(
        tuned + 8 * (1 + 2 * 0.4875) + 2 * (1 + 0.4875) * 2 * 3
    )
    assert "2 trials" in begun.line() and "warm-up" not in begun.line()
    # without the full network it is yet to be tried
    assert plan.make_plan(bench, on_record(bench.config, [1])).full_s == whole.full_s


def test_a_finished_study_has_nothing_left(bench):
    made = {"elastic": 40.0, "map": 1.8}
    found = on_record(bench.config, range(6), seconds=made)
    left = plan.make_plan(bench, found)
    assert left.search_s == 0 and left.total_s == left.confirm_s > 0
    front = [0, *(r.number for r in select(found.front(), found.full, 2)[1:])]
    part = plan.make_plan(bench, on_record(bench.config, range(6), front[:-1], made))
    assert 0 < part.total_s < left.total_s
    done = plan.make_plan(bench, on_record(bench.config, range(6), front, made))
    assert done.total_s == done.expected_s == 0
    assert done.line() == "nothing is left to do: all is on record"
    fewer = bench.config.with_options("search", num_trials=3)
    bench.config = fewer  # than are on record
    assert plan.make_plan(bench, on_record(fewer, range(6), front, made)).num_trials == 0


def test_what_was_worked_is_taken_off_the_budget(bench):
    bench.config = bench.config.with_options("search", budget="10m")
    found = on_record(bench.config, range(4), seconds={"elastic": 40.0, "map": 1.8})
    left = plan.make_plan(bench, found, worked_s=400.0)
    assert left.budget_s == 200 and left.total_s <= 200
    assert left.num_trials < plan.make_plan(bench, found).num_trials
