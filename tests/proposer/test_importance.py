"""What an interval is worth: signs, times, and that trials narrow it down."""

from dataclasses import replace

import numpy as np
import pytest

from asesearch.proposer.importance import importance
from asesearch.schedule import ExitSchedule
from asesearch.study.importance import Importance
from tests.proposer.test_proposer import (
    CALLS,
    DEPTH,
    FULL,
    A,
    FakeMap,
    Truth,
    make_problem,
    record,
    score,
    some_records,
)


def test_importance_follows_the_truth_and_trials_narrow_it_down():
    agreement = []
    for seed in range(4):
        problem = make_problem(FakeMap(seed))
        few, many = (importance(problem, some_records(n, seed)) for n in (2, 40))
        truth = Truth(seed)
        halved = [[DEPTH // 2 if j == i else DEPTH for j in range(10)] for i in range(10)]
        wanted = np.array([truth(replace_depths(d)) for d in halved]) - truth(FULL)
        agreement.append(np.corrcoef(wanted, many.log_change)[0, 1])
        assert (np.abs(np.array(many.log_change) - wanted) < 4 * np.array(many.log_std)).all()
        assert np.mean(many.log_std) < np.mean(few.log_std)
    assert np.mean(agreement) > 0.8
    assert many.exit_depth == DEPTH // 2 and many.depth == DEPTH and many.num_scores == 40
    assert len(many.log_change) == len(many.boundaries) - 1 == 10
    # half the blocks of a tenth of the calls, where a call costs 0.5 + blocks
    np.testing.assert_allclose(sum(many.time_saved), 6 / 12.5)


def replace_depths(depths):
    return replace(FULL, schedule=ExitSchedule.uniform_intervals(depths, DEPTH))


def test_it_reads_back():
    found = importance(make_problem(), some_records(3))
    assert Importance.from_dict(found.to_dict()) == found


@pytest.mark.parametrize("value", [-0.1, 0.0])
def test_scores_without_a_logarithm_have_none(value):
    records = [replace(r, quality=score(value, 0)) for r in some_records(2)]
    assert importance(make_problem(), records) is None
    assert importance(make_problem(), []) is None
    assert importance(make_problem(), [record(FULL, 1.0, "failed")]) is None


def test_an_interval_without_a_call_is_worth_nothing():
    """Eight calls in ten intervals: what two of them run changes no image."""
    calls = tuple(c for c in CALLS if not (300 <= c < 400 or 600 <= c < 700))
    problem = make_problem(samplers={A: calls})
    found = importance(problem, some_records(12, calls=calls))
    silent = problem.calls[0] == 0
    assert list(np.flatnonzero(silent)) == [3, 6]
    for values in (found.log_change, found.log_std):
        values = np.array(values)
        assert (values[silent] == 0).all() and (values[~silent] != 0).all()
