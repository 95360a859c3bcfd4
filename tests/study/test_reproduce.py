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
