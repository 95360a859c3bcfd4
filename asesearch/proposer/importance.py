"""What each interval is worth, asked of the quality model after the search."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from asesearch.point import Point
from asesearch.proposer.belief import one_thread
from asesearch.proposer.problem import Problem
from asesearch.proposer.quality_model import QualityModel
from asesearch.study.importance import Importance
from asesearch.study.records import TrialRecord


def importance(problem: Problem, records: Sequence[TrialRecord]) -> Importance | None:
    """How much the score is expected to change where one interval alone runs half of its blocks.

    The model is asked for schedules that no trial need have tried, all in one joint posterior, so
    that the standard deviations are those of differences from the full network. Where the study's
    own sampler makes no call nothing changes, and both are 0: the model is not asked to know that.

    Args:
        problem: of the study.
        records: its trials.

    Returns:
        None where nothing is learned yet, half of the blocks is not less than all, or the scores
        are not all positive, so that they have no logarithm.
    """
    space = problem.space
    observations = problem.observations(records)
    scores = [q for r in records if (q := r.quality) is not None]
    positive = all(q.value > (q.std_error or 0.0) for q in scores)
    exit_depth = max(space.min_exit_depth, space.depth // 2)
    if not scores or not positive or exit_depth >= space.depth:
        return None
    own = space.samplers[0]
    points = [problem.full]
    for i in range(space.num_intervals):
        depths = [space.depth] * space.num_intervals
        depths[i] = exit_depth
        points.append(Point(space.schedule(depths), own))
    with one_thread():
        mean, cov = QualityModel(problem.encoder, observations).posterior(points)
    called = problem.calls[0] > 0
    variance = np.diag(cov)[1:] + cov[0, 0] - 2 * cov[0, 1:]
    return Importance(
        str(own),
        problem.boundaries,
        exit_depth,
        space.depth,
        tuple(np.where(called, mean[1:] - mean[0], 0.0).tolist()),
        tuple(np.where(called, np.sqrt(np.maximum(variance, 0.0)), 0.0).tolist()),
        tuple(1 - problem.cost_frac(p) for p in points[1:]),
        len(observations),
    )
