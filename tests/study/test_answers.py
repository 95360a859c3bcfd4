"""Which point to take: by hand-made fronts whose answers are known."""

import dataclasses

import pytest

from asesearch.errors import ConfigError, StudyError
from asesearch.score import EvaluationResult
from asesearch.study.answers import answers, indistinguishable, knee
from asesearch.study.picking import scored_points
from asesearch.study.records import StudyResults
from tests.search.fake_search import PROTOCOL
from tests.study.test_picking import RECORDS, confirmed, record, results


def test_the_three_questions():
    fast, best, bend = answers(results(), "+5%", 0.7)
    assert (fast.point.record.number, best.point.record.number) == (1, 2)  # 5.1 and 5.6 of 5.0
    assert fast.shortfall == best.shortfall == "" and fast.full_score == 5.0
    # 1.0, 0.71 + 0.025, 0.43 + 0.15, 0 + 1.0 of the ranges of time and score
    assert bend.point.record.number == 2
    assert fast.to_dict()["speed_up"] == pytest.approx(1 / 0.8) and not fast.point.confirmed
    assert "fastest with quality within +5%: trial 1, 6 5 under ddim-50" in str(fast)
    assert "0.800x the time, 1.25x as fast (by the search, predicted)" in str(fast)


def test_a_study_of_flops_claims_no_time_before_one_is_measured():
    odd = tuple(dataclasses.replace(r, time_frac=0.5) for r in RECORDS[:4])
    found = answers(results(records=odd, config={"search": {"cost": "flops"}}), time_frac=0.7)
    assert [a.point.record.number for a in found[:2]] == [1, 2]
    text = str(found[1])
    assert text.startswith("best quality within 0.7x the FLOPs: trial 2, ")
    assert "at 0.600x the FLOPs (by the search)" in text and "time" not in text
    data = found[1].to_dict()
    assert (data["time_frac"], data["speed_up"], data["flops_frac"]) == (None, None, 0.6)


def test_confirmed_scores_come_first_and_a_missed_budget_is_said():
    found = answers(results([confirmed(0, 5.0, 1.0), confirmed(2, 7.0, 0.65)]), "+1%", 0.5)
    assert [a.point.record.number for a in found[:2]] == [0, 2]
    assert "the nearest is trial 2" in found[1].shortfall and found[1].shortfall in str(found[1])
    assert found[1].to_dict()["question"] == "nearest to the best quality within 0.5x the time"
    assert "\nnearest to the best quality within 0.5x the time: trial 2, " in str(found[1])
    assert found[0].question == "fastest with quality within +1%" and not found[0].shortfall
    assert all(a.point.confirmed for a in found)


def test_a_time_that_block_calls_cannot_explain_is_not_claimed():
    """Block calls of trial 2 are 0.6, its measured time 0.5 ± 0.01 and then 0.5 ± 0.1."""
    sound = confirmed(2, 5.1, 0.5)
    for spread, time in ((0.01, 0.6), (0.1, 0.5)):
        again = dataclasses.replace(sound, measured_time_spread=spread)
        fast = answers(results([confirmed(0, 5.0, 1.0), again]), "+5%", 0.7)[0]
        assert fast.to_dict()["time_frac"] == time
        assert fast.to_dict()["measured_time_frac"] == 0.5
        said = "0.500 measured is better than its block calls can explain" in str(fast)
        assert said == (time == 0.6) and f"{time:.3f}x the time" in str(fast)
        # a budget that only the disturbed clock meets
        within = answers(results([confirmed(0, 5.0, 1.0), again]), "+5%", 0.55)[1]
        assert bool(within.shortfall) == (time == 0.6)
    predicted = answers(results(), "+5%", 0.7)[0]
    assert predicted.to_dict()["measured_time_frac"] is None


def test_what_can_not_be_told_apart():
    """Two repeats with differences 0.3 and 0.1: mean 0.2, margin 12.7 times 0.1."""
    noisy = dataclasses.replace(
        RECORDS[1], quality=EvaluationResult(PROTOCOL, (5.2, 5.2)), time_frac=0.8
    )
    points = scored_points(results(records=(RECORDS[0], noisy, RECORDS[3])))
    by_number = {p.record.number: p for p in points}
    assert indistinguishable(by_number[0], points) == (1,)
    assert indistinguishable(by_number[3], points) == ()  # the same spread in both repeats
    once = dataclasses.replace(PROTOCOL, seeds=(0,))
    single = [
        dataclasses.replace(p, quality=EvaluationResult(once, (p.quality.value,))) for p in points
    ]
    assert indistinguishable(single[0], single) is None
    told = answers(results(records=(RECORDS[0], noisy, RECORDS[3])), "+5%", 0.7)
    assert told[0].same == (0,) and "not told apart from trial 0" in str(told[0])
    assert "differs from every other point at 95 % confidence" in str(told[1])


def test_of_one_point_nothing_is_said_to_differ():
    (fast, *_) = answers(results(records=RECORDS[:1]), "+5%", 0.7)
    assert fast.alone and fast.same == ()
    assert str(fast).endswith("; no other point has a score of that kind")
    once = dataclasses.replace(PROTOCOL, seeds=(0,))
    one = dataclasses.replace(RECORDS[0], quality=EvaluationResult(once, (5.0,)))
    (fast, *_) = answers(results(records=(one,)), "+5%", 0.7)
    assert fast.same is None and str(fast).endswith("; one repeat: nothing can be told apart")


def test_early_exits_alone():
    fewer = dataclasses.replace(record(5, 4.0, 0.2, "6", "full unipc-5"))
    found = answers(results(records=(*RECORDS, fewer)), "+5%", 0.7, early_exit=True)
    assert all(a.point.early or a.shortfall for a in found)


def test_nothing_to_pick_from_and_wrong_budgets():
    with pytest.raises(StudyError, match="no evaluated schedule"):
        answers(StudyResults("fake", {}, (), (), (), {}))
    with pytest.raises(StudyError, match="no evaluated schedule"):
        knee([])
    with pytest.raises(ConfigError, match="a quality budget is"):
        answers(results(), "about 5")
