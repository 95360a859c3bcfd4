"""Whether a score measured again is the one on record."""

from dataclasses import replace

import pytest

from asesearch.errors import EvaluationError
from asesearch.score import EvaluationResult
from asesearch.study.reproduce import compare
from tests.search.fake_search import PROTOCOL

RECORDED = EvaluationResult(PROTOCOL, (10.0, 20.0))


@pytest.mark.parametrize(
    ("again", "reproduced", "largest"),
    [
        ((10.0, 20.0), True, 0.0),
        ((10.05, 20.0), True, 0.005),
        ((9.95, 20.0), True, -0.005),
        ((10.0, 20.3), False, 0.015),
        ((9.8, 20.0), False, -0.02),
        ((10.2, 19.6), False, 0.02),  # on average they agree
    ],
)
def test_every_repeat_must_agree_within_one_percent(again, reproduced, largest):
    found = compare(RECORDED, EvaluationResult(PROTOCOL, again))
    assert found["reproduced"] is reproduced and found[
        "largest_relative_difference"
    ] == pytest.approx(largest)
    assert (found["recorded"], found["again"]) == ([10.0, 20.0], list(again))


def test_scores_of_other_protocols_are_not_compared():
    with pytest.raises(EvaluationError, match="num_samples"):
        compare(RECORDED, EvaluationResult(replace(PROTOCOL, num_samples=7), (10.0, 20.0)))


def test_a_score_of_zero_is_compared_without_a_division_by_it():
    once = EvaluationResult(replace(PROTOCOL, seeds=(0,)), (0.0,))
    assert compare(once, once)["reproduced"]
    found = compare(once, replace(once, values=(-1e-3,)))
    assert (found["reproduced"], found["largest_relative_difference"]) == (False, -1.0)


def test_a_kid_near_zero_may_differ_by_a_tenth_of_its_standard_error():
    """Of 2.5e-5 here, so by 2.5e-6."""
    kid = replace(PROTOCOL, metric="kid")
    recorded = EvaluationResult(kid, (2.0e-5, -3.0e-5))

    def again(*values):
        return compare(recorded, EvaluationResult(kid, values))

    assert again(2.1e-5, -2.9e-5)["reproduced"]
    assert again(2.1e-5, -2.9e-5)["largest_relative_difference"] == pytest.approx(0.004)
    assert not again(2.3e-5, -3.0e-5)["reproduced"]
    assert not again(-3.0e-5, 2.0e-5)["reproduced"]  # other seeds
    large = EvaluationResult(kid, (0.05, 0.0501))
    assert compare(large, replace(large, values=(0.0504, 0.0501)))["reproduced"]
    assert not compare(large, replace(large, values=(0.0506, 0.0501)))["reproduced"]
