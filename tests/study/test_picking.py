"""Picking a point: by confirmed scores, within budgets, or not at all."""

import dataclasses
import pickle
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest

from asesearch.errors import ConfigError, StudyError
from asesearch.point import Point
from asesearch.sampler import Sampler
from asesearch.schedule import ExitSchedule
from asesearch.score import EvaluationResult
from asesearch.study.answers import answers
from asesearch.study.directory import SampleFiles
from asesearch.study.picking import (
    pick,
    pick_and_tell,
    pick_nearest,
    told_difference,
    within_quality,
)
from asesearch.study.records import Confirmation, StudyResults, TrialRecord, left_out, select
from tests.search.fake_search import OWN, PROTOCOL

FEWER = Sampler("unipc", 5)


def point(depths, sampler=OWN):
    return Point(ExitSchedule.from_string(depths, 6), sampler)


def record(number, value, time, depths, origin="tpe"):
    quality = EvaluationResult(PROTOCOL, (value - 0.1, value + 0.1))
    return TrialRecord(number, origin, point(depths), "complete", quality, time, time, time)


RECORDS = (
    record(0, 5.0, 1.0, "6", "full"),
    record(1, 5.1, 0.8, "6 5"),
    record(2, 5.6, 0.6, "6 3"),
    record(3, 9.0, 0.3, "2 1"),
    TrialRecord(4, "tpe", point("1"), "failed", failure="diverged"),
)


def results(confirmations=(), records=RECORDS, config=None):
    return StudyResults("fake", config or {}, tuple(records), tuple(confirmations), (), {})


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


def test_a_study_of_flops_goes_by_them_whatever_its_times():
    """Times of two latency tables: those of the trial that runs the least are the longest."""
    odd = [
        dataclasses.replace(r, time_frac=1.1 - r.time_frac) if r.time_frac else r for r in RECORDS
    ]
    found = results(records=odd, config={"search": {"cost": "flops"}})
    assert (
        [r.number for r in found.front()] == [3, 2, 1, 0] == [r.number for r in results().front()]
    )
    assert [r.number for r in results(records=odd).front()] == [0]
    assert [r.number for r in select(found.front(), found.full, 2)] == [0, 3, 1]
    assert pick(found, "best-within", time_frac=0.7).number == 2
    short = "within the FLOPs budget 0.1; the nearest is trial 3 with 9 at 0.300 of the FLOPs"
    with pytest.raises(StudyError, match=short):
        pick(found, "best-within", time_frac=0.1)
    measured = results([confirmed(0, 5.2, 1.0), confirmed(2, 5.3, 0.4)], odd, found.config)
    with pytest.raises(StudyError, match="within the time budget 0.1; the nearest .* of the time"):
        pick(measured, "best-within", time_frac=0.1)


def test_confirmed_figures_count_where_there_are_any():
    fresh = [confirmed(0, 5.2, 1.0), confirmed(1, 5.0, 0.85), confirmed(2, 7.0, 0.62)]
    assert pick(results(fresh), "best-quality").number == 1
    # 2 was too good on the search's seeds
    assert pick(results(fresh), "fastest-within", "+20%").number == 1
    assert pick(results(fresh), "best-within", time_frac=0.7).number == 2  # 3 is not confirmed


def test_budgets_that_nothing_meets_name_the_nearest():
    nearest = (
        r"within the quality budget '4'; the nearest is trial 0 with 5 at 1.000 .*; --or-nearest"
    )
    with pytest.raises(StudyError, match=nearest):
        pick(results(), "fastest-within", "4")
    with pytest.raises(StudyError, match="the nearest is trial 3 with 9 at 0.300 of the time"):
        pick(results(), "best-within", time_frac=0.1)
    with pytest.raises(StudyError, match="no evaluated schedule"):
        pick(StudyResults("fake", {}, (), (), (), {}), "best-quality")


def test_an_early_exit_is_picked_where_full_depth_in_fewer_steps_would_be():
    fewer = dataclasses.replace(record(5, 5.2, 0.25, "6", "full unipc-5"), point=point("6", FEWER))
    exits = record(6, 5.4, 0.2, "6 4")
    found = results(records=(*RECORDS, fewer, exits))
    assert pick(found, "best-within", time_frac=0.3).number == 5
    assert pick(found, "best-within", time_frac=0.3, early_exit=True).number == 6
    assert pick(found, "best-quality", early_exit=True).number == 1
    # 2 and 3 are dominated by full depth in fewer steps, so they are no points of the front
    assert pick(found, "fastest-within", "+100%", early_exit=True).number == 6
    assert pick_nearest(found, "fastest-within", "+100%", early_exit=True) == (exits, "")


@pytest.mark.parametrize(
    ("question", "number", "words"),
    [
        (("fastest-within", "+10%"), 1, ""),
        (
            ("fastest-within", "+1%"),
            1,
            "no early-exit schedule is within the quality budget '+1%' over the full network's 5 "
            "(5.05); the nearest is trial 1 with 5.1 at 0.800 of the time (6 5 under ddim-50); "
            "taking it",
        ),
        (
            ("fastest-within", "4.5"),
            1,
            "no early-exit schedule is within the quality budget '4.5'; the nearest is trial 1 "
            "with 5.1 at 0.800 of the time (6 5 under ddim-50); taking it",
        ),
        (
            ("best-within", None, 0.2),
            3,
            "no early-exit schedule is within the time budget 0.2; the nearest is trial 3 with 9 "
            "at 0.300 of the time (2 1 under ddim-50); taking it",
        ),
    ],
)
def test_the_nearest_is_taken_and_said(question, number, words):
    record, said = pick_nearest(results(), *question, early_exit=True)
    assert (record.number, said) == (number, words)
    if words:
        with pytest.raises(StudyError, match="--or-nearest takes it"):
            pick(results(), *question, early_exit=True)


def test_a_front_of_full_depth_alone():
    """Exits that are dominated are counted in the words; their weights may be gone."""
    fewer = dataclasses.replace(record(1, 4.0, 0.2, "6", "full unipc-5"), point=point("6", FEWER))
    found = results(
        [confirmed(0, 5.2, 1.0), confirmed(1, 4.4, 0.21)], (RECORDS[0], fewer, *RECORDS[3:])
    )
    record_, said = pick_nearest(found, "fastest-within", "+25%", early_exit=True)
    assert record_ == fewer
    assert said == (
        "no early-exit schedule is on the front (1 have a score and are dominated); of full "
        "depth there is trial 1 with 4.4 at 0.210 of the time (6 under unipc-5); taking it"
    )
    _, said = pick_nearest(found, "fastest-within", "4.3", early_exit=True)
    assert said.endswith(
        "no point of full depth is within the quality budget '4.3'; the nearest is trial 1 with "
        "4.4 at 0.210 of the time (6 under unipc-5); taking it"
    )
    with pytest.raises(StudyError, match="no early-exit schedule is on the front.*--or-nearest"):
        pick(found, "fastest-within", "+25%", early_exit=True)
    none_tried = results(records=RECORDS[:1])
    record_, said = pick_nearest(none_tried, "best-within", time_frac=0.5, early_exit=True)
    assert record_.number == 0 and said.startswith(
        "no early-exit schedule is on the front; no point of full depth is within the time budget"
    )


def test_unconfirmed_exits_are_taken_with_words_alone():
    """Killed while the front was confirmed: of the confirmed points none exits early."""
    found = results([confirmed(0, 5.2, 1.0)])
    record_, said = pick_nearest(found, "fastest-within", "+15%", early_exit=True)
    assert record_.number == 2  # by the search's scores alone: 5.6 of 5
    assert said == (
        "no early-exit schedule is confirmed; by the search's scores there is trial 2 with 5.6 at "
        "0.600 of the time (6 3 under ddim-50); taking it"
    )
    with pytest.raises(StudyError, match="no early-exit schedule is confirmed"):
        pick(found, "fastest-within", "+15%", early_exit=True)
    # where full depth will do, confirmed scores alone count
    assert pick(found, "best-quality").number == 0


@pytest.mark.parametrize("budget", ["+5%", "1se"])
def test_a_full_network_without_a_score(budget):
    """Neither tried nor confirmed: a relative budget has nothing to be measured against, a score as
    budget has."""
    unscored = results(records=RECORDS[1:])
    unconfirmed = results([confirmed(1, 5.3, 0.85), confirmed(2, 6.0, 0.62)])
    for found, kind in ((unscored, "score"), (unconfirmed, "confirmed score")):
        with pytest.raises(StudyError, match=f"the full network has no {kind} to measure"):
            pick(found, "fastest-within", budget)
        record_, said = pick_nearest(found, "fastest-within", budget)
        assert record_.number == 1 and f"to measure the quality budget {budget!r}" in said
        assert pick(found, "fastest-within", "6.5").number == 2


def test_points_that_left_the_front_lost_their_weights():
    fresh = [confirmed(0, 5.2, 1.0), confirmed(2, 5.0, 0.62)]
    better = record(5, 5.05, 0.55, "6 2")
    left = results(fresh, (*RECORDS, better), {"search": {"keep_weights": "front"}})
    kept = results(fresh, (*RECORDS, better), {"search": {"keep_weights": "all"}})
    assert pick(left, "best-quality").number == 0
    assert pick(kept, "best-quality").number == 2


@pytest.mark.parametrize(
    ("mode", "quality", "time"),
    [
        ("best", None, None),
        ("fastest-within", None, None),
        ("best-quality", "5", None),
        ("best-within", None, None),
        ("fastest-within", "5%", None),
        ("fastest-within", "1.2.3", None),
        ("fastest-within", "+5", None),
        ("fastest-within", "", None),
    ],
)
def test_wrong_questions_are_refused(mode, quality, time):
    for choose in (pick, pick_nearest):
        with pytest.raises(ConfigError):
            choose(results(), mode, quality, time)


def test_quality_budgets():
    full = EvaluationResult(PROTOCOL, (5.0, 5.4))
    near = EvaluationResult(PROTOCOL, (5.1, 5.8))
    assert within_quality("5.5", near, full) and not within_quality("5.4", near, full)
    assert within_quality("+5%", near, full) and not within_quality("+4%", near, full)
    assert within_quality(" +4.9 % ".replace(" %", "%"), near, full) and within_quality(
        "5.45", near, None
    )
    below = EvaluationResult(PROTOCOL, (-0.98, -0.98)), EvaluationResult(PROTOCOL, (-1.0, -1.0))
    # kernel distances may be negative
    assert within_quality("+2%", *below) and not within_quality("+1%", *below)
    # paired by repeat: 0.25 apart, standard error of the two differences (0.1, 0.4) is 0.15
    assert within_quality("1.7se", near, full) and not within_quality("1.6se", near, full)
    with pytest.raises(ConfigError, match="got 'lots'"):
        within_quality("lots", near, full)


@pytest.mark.parametrize(
    # mean, times 4.303 standard errors of 0.1 / √3: the interval reaches 0.2484 either way
    ("differences", "within"),
    [
        ((0.14, 0.24, 0.34), True),
        ((0.16, 0.26, 0.36), False),
        ((-0.9, -1.0, -1.1), True),
        ((0.0, 0.0, 0.0), True),
    ],
)
def test_not_worse_at_95_percent(differences, within):
    protocol = dataclasses.replace(PROTOCOL, seeds=(0, 100, 200))
    values = (5.0, 5.4, 4.1)
    full = EvaluationResult(protocol, values)
    near = EvaluationResult(
        protocol, tuple(v + d for v, d in zip(values, differences, strict=True))
    )
    assert (
        within_quality("ci", near, full) is within and within_quality(" ci ", near, full) is within
    )


def test_the_fastest_that_is_not_worse_is_picked():
    # equal spreads: each difference is exact
    assert pick(results(), "fastest-within", "ci").number == 0
    wide = [
        dataclasses.replace(r, quality=EvaluationResult(PROTOCOL, (5.0, 5.9)))
        if r.number == 2
        else r
        for r in RECORDS
    ]
    assert (
        pick(StudyResults("fake", {}, tuple(wide), (), (), {}), "fastest-within", "ci").number == 2
    )


@pytest.mark.parametrize("budget", ["1se", "ci"])
def test_a_spread_needs_repeats(budget):
    once = EvaluationResult(dataclasses.replace(PROTOCOL, seeds=(0,)), (5.0,))
    with pytest.raises(ConfigError, match="got one.*raise evaluation.repeats"):
        within_quality(budget, once, once)


def test_confirmation_leaves_out_what_is_worth_nothing():
    full = record(0, 10.0, 1.0, "6", "full")
    front = tuple(
        record(i, v, 0.1 * i, "6 3") for i, v in enumerate((35.0, 19.0, 17.0, 15.0, 13.0, 11.0), 1)
    )
    chosen = select((*front, full), full, 3)
    # the fastest has 3.5 times the full network's score
    assert [r.number for r in chosen] == [0, 2, 4, 6]
    assert [r.number for r in left_out((*front, full), full)] == [1]
    # but nothing else is there
    assert left_out((front[0], full), full) == []
    assert [r.number for r in select((front[0], full), full, 3)] == [0, 1]


def test_a_shortfall_of_time_names_the_points_that_were_not_confirmed():
    far = record(5, 11.0, 0.2, "1")
    records = (*RECORDS[:4], far)
    fresh = [confirmed(n, r.quality.value, r.time_frac) for n, r in enumerate(RECORDS[:4])]
    made = results(fresh, records)
    taken, said = pick_nearest(made, "best-within", time_frac=0.25)
    assert taken.number == 3
    assert "not confirmed, and so not picked from (--trial takes one): trial 5 with 11 at" in said
    assert said.index("trial 5") < said.index("the nearest is trial 3")
    with pytest.raises(StudyError, match="not confirmed.*trial 5"):
        pick(made, "best-within", time_frac=0.25, early_exit=True)
    for budget, told in ((0.15, False), (0.35, False), (0.2, True)):  # not where it is too slow
        _, said = pick_nearest(made, "best-within", time_frac=budget)
        assert ("not confirmed" in said) == told


def test_points_still_to_be_confirmed_are_named_once():
    fresh = [confirmed(n, RECORDS[n].quality.value, RECORDS[n].time_frac) for n in (0, 1, 2)]
    made = results(fresh, RECORDS[:4], {"confirm": {"max_points": 8}})
    assert [r.number for r in made.unconfirmed] == [3]
    _, lines = pick_and_tell(made, "best-within", time_frac=0.4, or_nearest=True)
    assert "still to be confirmed by the same `asesearch search`, trial 3, and not" in lines[0]
    assert "\n".join(lines).count("trial 3") == 1 and "the nearest is trial 2" in lines[1]
    with pytest.raises(StudyError) as error:
        pick(made, "best-within", time_frac=0.4)
    assert str(error.value).count("trial 3") == 1


def test_a_pick_says_between_what_its_loss_lies():
    full = Confirmation(0, EvaluationResult(PROTOCOL, (5.0, 5.2)), 1.0, 0.0)
    early = Confirmation(1, EvaluationResult(PROTOCOL, (5.4, 5.3)), 0.8, 0.01)
    found = results((full, early))
    taken = pick(found, "fastest-within", "ci")
    assert taken.number == 1  # for two repeats show little
    end = 0.25 + 12.706 * 0.15
    told = told_difference(found, taken)
    assert f"minus the full network's 5.1 lies between {0.5 - end:+.3g} and {end:+.3g}" in told
    assert told_difference(found, found.full) == ""
    assert told_difference(results(), RECORDS[3]) != ""  # by the search's scores


def test_what_is_nearly_a_question_is_refused_with_the_fix():
    for how, words in (
        (
            ("fastest-within", 7.5),
            "quality budget is text: .*; got 7.5; write it in quotes, as '7.5'",
        ),
        (("best-within", None, "0.7"), "above 0 and at most 1; got '0.7'; give a number"),
        (("best-within", None, 2.0), "above 0 and at most 1; got 2.0"),
        (("best-within", None, 0), "got 0;"),
        (("best-within", None, -1.0), "got -1.0;"),
        (("best-within", None, float("nan")), "got nan;"),
        (("best-within", None, True), "got True;"),
        (("fastest-within", ["7.5"] * 99), r"got \['7.5', .*; write one of these"),
        (("fastest-within", True), "got True; write one of these"),
    ):
        for ask in (pick, pick_nearest):
            with pytest.raises(ConfigError, match=words) as caught:
                ask(results(), *how)
            assert len(str(caught.value)) <= 300
    with pytest.raises(ConfigError, match=r"got SimpleNamespace; give those of Study.results\(\)"):
        pick(SimpleNamespace(), "best-quality")
    for wrong in (2.0, 0, "0.7"):
        with pytest.raises(ConfigError, match="above 0 and at most 1"):
            answers(results(), time_frac=wrong)
    with pytest.raises(ConfigError, match="quality budget is text"):
        answers(results(), 7.5)


@pytest.mark.parametrize("budget", [np.float32(0.75), np.float64(0.75), Fraction(3, 4)])
def test_a_time_budget_is_any_real_number(budget):
    assert pick(results(), "best-within", time_frac=budget) == pick(
        results(), "best-within", time_frac=0.75
    )
    assert [a.question for a in answers(results(), time_frac=budget)] == [
        a.question for a in answers(results(), time_frac=0.75)
    ]


def test_results_with_images_can_be_pickled_and_compared(tmp_path):
    np.savez(tmp_path / "samples.npz", images=np.zeros((2, 1, 8, 8), np.uint8))
    found = dataclasses.replace(results(), samples=SampleFiles({1: tmp_path / "samples.npz"}))
    assert found.samples[1].shape == (2, 1, 8, 8)  # and is held
    again = pickle.loads(pickle.dumps(found))
    assert again.records == found.records and np.array_equal(again.samples[1], found.samples[1])
    assert found == found and found != again  # they hold arrays, which are not compared
