"""Picking a point: by confirmed figures, within budgets, or not at all."""

import dataclasses

import pytest

from asesearch.errors import ConfigError, StudyError
from asesearch.evaluation.results import EvaluationResult
from asesearch.schedule import ExitSchedule
from asesearch.search.picking import pick, within_quality
from asesearch.search.records import Confirmation, StudyResults, TrialRecord, select
from tests.search.fake_search import PROTOCOL


def record(number, value, time, depths, origin="tpe"):
    quality = EvaluationResult(PROTOCOL, (value - 0.1, value + 0.1))
    return TrialRecord(number, origin, ExitSchedule.from_string(depths, 6), "complete", quality, time, time, time)


RECORDS = (
    record(0, 5.0, 1.0, "6", "full"),
    record(1, 5.1, 0.8, "6 5"),
    record(2, 5.6, 0.6, "6 3"),
    record(3, 9.0, 0.3, "2 1"),
    TrialRecord(4, "tpe", ExitSchedule.from_string("1", 6), "failed", failure="diverged"),
)


def results(confirmations=()):
    return StudyResults("fake", {}, RECORDS, tuple(confirmations), (), {})


def confirmed(number, value, time):
    return Confirmation(number, EvaluationResult(PROTOCOL, (value - 0.2, value + 0.2)), time, 0.01)


@pytest.mark.parametrize(
    ("mode", "quality", "time", "number"),
    [
        ("best-quality", None, None, 0),
        ("fastest-within", "5.7", None, 2),
        ("fastest-within", "+3%", None, 1),
        ("best-within", None, 0.7, 2),
        ("best-within", None, 1.0, 0),
    ],
)
def test_modes(mode, quality, time, number):
    assert pick(results(), mode, quality, time).number == number


def test_confirmed_figures_count_where_there_are_any():
    fresh = [confirmed(0, 5.2, 1.0), confirmed(1, 5.0, 0.85), confirmed(2, 7.0, 0.62)]
    assert pick(results(fresh), "best-quality").number == 1
    assert pick(results(fresh), "fastest-within", "+20%").number == 1  # 2 was too good on the search's seeds
    assert pick(results(fresh), "best-within", time_frac=0.7).number == 2  # 3 is not confirmed


def test_budgets_that_nothing_meets_name_the_nearest():
    with pytest.raises(StudyError, match="the best is 5 "):
        pick(results(), "fastest-within", "4")
    with pytest.raises(StudyError, match="the fastest takes 0.300"):
        pick(results(), "best-within", time_frac=0.1)
    with pytest.raises(StudyError, match="no evaluated schedule"):
        pick(StudyResults("fake", {}, (), (), (), {}), "best-quality")


@pytest.mark.parametrize(
    ("mode", "quality", "time"),
    [("best", None, None), ("fastest-within", None, None), ("best-quality", "5", None), ("best-within", None, None)],
)
def test_wrong_questions_are_refused(mode, quality, time):
    with pytest.raises(ConfigError):
        pick(results(), mode, quality, time)


def test_quality_budgets():
    full, near = EvaluationResult(PROTOCOL, (5.0, 5.4)), EvaluationResult(PROTOCOL, (5.1, 5.8))
    assert within_quality("5.5", near, full) and not within_quality("5.4", near, full)
    assert within_quality("+5%", near, full) and not within_quality("+4%", near, full)
    # paired by repeat: 0.25 apart, standard error of the two differences (0.1, 0.4) is 0.15
    assert within_quality("1.7se", near, full) and not within_quality("1.6se", near, full)
    with pytest.raises(ConfigError, match="got 'lots'"):
        within_quality("lots", near, full)


@pytest.mark.parametrize(
    ("differences", "within"),  # mean, times 4.303 standard errors of 0.1 / √3: the interval reaches 0.2484 either way
    [((0.14, 0.24, 0.34), True), ((0.16, 0.26, 0.36), False), ((-0.9, -1.0, -1.1), True), ((0.0, 0.0, 0.0), True)],
)
def test_not_worse_at_95_percent(differences, within):
    protocol = dataclasses.replace(PROTOCOL, seeds=(0, 100, 200))
    values = (5.0, 5.4, 4.1)
    full = EvaluationResult(protocol, values)
    near = EvaluationResult(protocol, tuple(v + d for v, d in zip(values, differences, strict=True)))
    assert within_quality("ci", near, full) is within and within_quality(" ci ", near, full) is within


def test_the_fastest_that_is_not_worse_is_picked():
    assert pick(results(), "fastest-within", "ci").number == 0  # equal spreads: each difference is exact
    wide = [dataclasses.replace(r, quality=EvaluationResult(PROTOCOL, (5.0, 5.9))) if r.number == 2 else r for r in RECORDS]
    assert pick(StudyResults("fake", {}, tuple(wide), (), (), {}), "fastest-within", "ci").number == 2


@pytest.mark.parametrize("budget", ["1se", "ci"])
def test_a_spread_needs_repeats(budget):
    once = EvaluationResult(dataclasses.replace(PROTOCOL, seeds=(0,)), (5.0,))
    with pytest.raises(ConfigError, match="got one.*raise evaluation.repeats"):
        within_quality(budget, once, once)


def test_confirmation_leaves_out_what_is_worth_nothing():
    full = record(0, 10.0, 1.0, "6", "full")
    front = tuple(record(i, v, 0.1 * i, "6 3") for i, v in enumerate((35.0, 19.0, 17.0, 15.0, 13.0, 11.0), 1))
    chosen = select((*front, full), full, 3)
    assert [r.number for r in chosen] == [0, 2, 4, 6]  # the fastest has 3.5 times the full network's figure
    assert [r.number for r in select((front[0], full), full, 3)] == [0, 1]  # but nothing else is there
