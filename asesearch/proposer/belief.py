"""What the trials on record say of the front, and of one point's place on it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from asesearch.point import Point
from asesearch.proposer.encoder import Inputs
from asesearch.proposer.pareto import (
    expected_hypervolume_improvement,
    probability_on_front,
)
from asesearch.proposer.problem import Problem
from asesearch.proposer.quality_model import Level, QualityModel
from asesearch.score import EvaluationResult
from asesearch.study.records import (
    REFERENCE_QUALITY,
    REFERENCE_TIME,
    LowFidelity,
    TrialRecord,
)

Array = npt.NDArray[np.float64]


class FrontBelief:
    """What the trials on record say of the front of one level's scores.

    Args:
        problem: what can be tried.
        records: trials on record.
        pending: points in flight: their scores are drawn along with those of evaluated points, so
            that no second worker finds an improvement where the first is already at work.
        num_draws: joint draws of the scores on the front.
        seed: of the draws; the same for all questions.
        level: whose front is asked for; scores of both levels inform it.
    """

    def __init__(
        self,
        problem: Problem,
        records: Sequence[TrialRecord],
        pending: Sequence[Point] = (),
        num_draws: int = 64,
        seed: int = 0,
        level: Level = "high",
    ) -> None:
        self.problem = problem
        self._draws = num_draws
        self._seed = seed
        self.level = level
        found = problem.observations(records)
        self.model = QualityModel(problem.encoder, found)
        self.evaluated = [o.point for o in found if o.level == level]
        self.known = [*self.evaluated, *pending]
        self._inputs = problem.encoder.encode(self.known)
        self._costs = np.array([problem.cost_frac(p) for p in self.known])
        best, _ = self.model.posterior([problem.full], level)
        self.reference = (REFERENCE_TIME, float(best[0]) + math.log(REFERENCE_QUALITY))

    def improvement(self, inputs: Inputs, costs: Array) -> Array:
        """(n,) expected enlargement of the dominated area, relative cost times log score, by a
        score of each point."""
        rng = np.random.default_rng(self._seed)
        draws = self.model.conditional_draws(rng, self._inputs, inputs, self._draws, self.level)
        return expected_hypervolume_improvement(
            self._costs, draws[0], costs, draws[1], draws[2], self.reference
        )

    def probability(self, point: Point) -> float:
        """That a point is on the front, and better than twice the full network's score.

        A point whose score is on record is compared with the others.
        """
        key = self.problem.key(point)
        others = [i for i, p in enumerate(self.known) if self.problem.key(p) != key]
        inputs = self.problem.encoder.encode([self.known[i] for i in others])
        costs = self._costs[others]
        asked = self.problem.encoder.encode([point])
        cost = np.array([self.problem.cost_frac(point)])
        rng = np.random.default_rng(self._seed)
        draws = self.model.conditional_draws(rng, inputs, asked, 4 * self._draws, self.level)
        return float(
            probability_on_front(costs, draws[0], cost, draws[1], draws[2], self.reference[1])[0]
        )


def judge(
    problem: Problem,
    records: Sequence[TrialRecord],
    point: Point,
    low_fidelity: EvaluationResult | None = None,
) -> float:
    """Probability that a point belongs to the front of high-fidelity scores, its low-fidelity score
    included.

    Args:
        problem: what can be tried.
        records: trials on record.
        point: the one to be judged.
        low_fidelity: its score under the elastic weights.
    """
    if low_fidelity is not None:
        rung = LowFidelity(low_fidelity, promoted=False, probability=None, reason="")
        records = [*records, TrialRecord(-1, "", point, "stopped", low_fidelity=rung)]
    with one_thread():
        return FrontBelief(problem, records).probability(point)


def one_thread() -> threadpool_limits:
    """Linear algebra on one thread: these matrices are small, and on a busy machine threads that
    wait for each other take a hundred times as long.
    """
    return threadpool_limits(1, user_api="blas")
