"""The proposer that knows the network: schedules that are optimal under what the difficulty map and
the trials say together.

`encoder` and `quality_model` hold what is believed of scores, `belief` what of the front, `pareto`
what is optimal under it, `candidates` where points come from; here is the choice of the one that is
expected to push the front furthest. Nothing is kept between proposals: all follows from the seed
and the trials on record, those in flight included.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial
from scipy.stats import qmc

from asesearch.point import Point
from asesearch.proposer.belief import FrontBelief, one_thread
from asesearch.proposer.candidates import Candidates
from asesearch.proposer.problem import Problem
from asesearch.proposer.quality_model import Level, QualityModel
from asesearch.schedule import ExitSchedule
from asesearch.study.records import (
    EXPLORATIONS,
    EXPLORES,
    RECORD,
    TrialRecord,
    num_ended,
    rung_in,
)

Array = npt.NDArray[np.float64]
NAME = "difficulty"  # the proposer's, in study files and as origin of its trials
# trials besides the full network's that are spread over budgets before improvement decides
NUM_INITIAL = 1
RANDOM_CANDIDATES = 200
MUTANTS = 200
REFINED = 20
ROUNDS = 2


def num_exploring(trials: Sequence[FrozenTrial], number: int) -> int:
    """How many proposals belong to the exploration phase: those on record, and those in flight that
    began before a trial.

    The order of their numbers decides, so that any number of workers have the same count: a
    proposal in flight that has not said yet whether it explores is counted as if.

    Args:
        trials: of the study.
        number: of the trial that is to know.
    """
    count = 0
    for trial in trials:
        if RECORD in trial.user_attrs:
            rung = rung_in(json.loads(trial.user_attrs[RECORD]))
            count += rung is not None and rung["reason"] in EXPLORATIONS
        elif (
            not trial.state.is_finished()
            and trial.number < number
            and "fixed_params" not in trial.system_attrs
        ):
            count += bool(trial.user_attrs.get(EXPLORES, True))
    return count


class DifficultySampler(optuna.samplers.BaseSampler):
    """An Optuna sampler for two objectives, quality and relative cost, over `Space` and, where
    there are several, samplers.

    Args:
        problem: what can be tried, and what it costs.
        seed: of all random choices.
        num_draws: see `FrontBelief`.
        explore: so many proposals first follow the front of low-fidelity scores; see
            `config.PromotionConfig`.
        busy: schedules that another worker is at without a trial in flight.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        seed: int = 0,
        num_draws: int = 64,
        explore: int = 0,
        busy: Collection[ExitSchedule] = (),
    ) -> None:
        self.problem = problem
        self.seed = seed
        self.num_draws = num_draws
        self.explore = explore
        self.busy = busy
        self.explores = False  # whether the last proposal belongs to the exploration phase

    # -- what Optuna asks ------------------------------------------------------------------------

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """All parameters, unless the trial's are given."""
        space = self.problem.space.distributions()
        return {} if set(space) <= set(trial.system_attrs.get("fixed_params", {})) else space

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The next point's parameters; none where the space holds nothing new."""
        if not search_space:
            return {}
        records, pending, rng = self._on_record(study, trial)
        self.explores = num_exploring(study.get_trials(deepcopy=False), trial.number) < self.explore
        with one_thread():
            row = self._choose(records, pending, rng)
        if row is None:
            return {}
        space = self.problem.space
        return space.encode(Point(space.schedule(row[1:]), space.samplers[row[0]]))

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """A random value."""
        *_, rng = self._on_record(study, trial)
        seed = int(rng.integers(2**31)) ^ zlib.crc32(param_name.encode()) >> 1
        return optuna.samplers.RandomSampler(seed=seed).sample_independent(
            study, trial, param_name, param_distribution
        )

    def _on_record(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> tuple[list[TrialRecord], list[Point], np.random.Generator]:
        """Trials on record, points in flight, and a generator that follows from the seed and their
        numbers."""
        trials = [t for t in study.get_trials(deepcopy=False) if t.number != trial.number]
        records = [
            TrialRecord.from_dict(json.loads(t.user_attrs[RECORD]), self.problem.space.samplers[0])
            for t in trials
            if RECORD in t.user_attrs
        ]
        open_ = [t for t in trials if not t.state.is_finished() and RECORD not in t.user_attrs]
        points = map(self.problem.space.point_of, open_)
        pending = [point for point in points if point is not None]
        seed = [self.seed, num_ended(trials), len(pending)]
        return records, pending, np.random.default_rng(seed)

    # -- choosing --------------------------------------------------------------------------------

    def _choose(
        self, records: list[TrialRecord], pending: list[Point], rng: np.random.Generator
    ) -> tuple[int, ...] | None:
        """The best candidate's row; None if there is none."""
        looked = len(
            self._keys(
                self._rows(records, lambda r: r.low_fidelity is not None and r.origin == NAME)
            )
        ) + len(pending)
        level: Level = "low" if self.explores else "high"
        belief = FrontBelief(
            self.problem, records, pending, self.num_draws, int(rng.integers(2**31)), level
        )
        tried = [self.problem.row(p) for p in belief.known]
        gone = self._rows(records, lambda r: r.state == "failed")
        # a schedule in flight is another worker's under every sampler
        busy = {
            self.problem.row(Point(schedule, sampler))
            for schedule in (*(p.schedule for p in pending), *self.busy)
            for sampler in self.problem.samplers
        }
        left_out = {self.problem.key(p) for p in belief.known} | self._keys(gone) | self._keys(busy)
        begun = looked + sum(not p.schedule.is_full for p in belief.evaluated)
        early = begun < NUM_INITIAL or not belief.evaluated  # there is nothing to improve upon
        if early and (row := self._first(belief.model, begun, left_out)):
            return row
        pool = Candidates(self.problem, left_out)
        pool.add_optimal(belief.model, rng)
        if level == "high":
            pool.extend(sorted(self._rows(records, lambda r: r.state == "stopped")))
        pool.add_random(rng, RANDOM_CANDIDATES)
        pool.add_mutants(
            np.array(tried, dtype=np.int64).reshape(-1, pool.rows.shape[1]), rng, MUTANTS
        )
        if not len(pool.rows):
            return None
        scores = self._scores(belief, pool)
        for _ in range(ROUNDS):
            start = len(pool.rows)
            pool.add_mutants(pool.rows[np.argsort(-scores, kind="stable")[:REFINED]], rng, MUTANTS)
            scores = np.concatenate((scores, self._scores(belief, pool, start)))
        return tuple(pool.rows[int(scores.argmax())].tolist())

    def _rows(
        self, records: list[TrialRecord], which: Callable[[TrialRecord], bool]
    ) -> set[tuple[int, ...]]:
        """Points on record that a condition holds for."""
        return {
            self.problem.row(r.point)
            for r in records
            if r.point.sampler in self.problem.samplers and which(r)
        }

    def _keys(self, rows: set[tuple[int, ...]]) -> set[tuple[int, ...]]:
        return set(
            self.problem.keys(
                np.array(sorted(rows), dtype=np.int64).reshape(-1, len(self.problem.boundaries))
            )
        )

    def _scores(self, belief: FrontBelief, pool: Candidates, start: int = 0) -> Array:
        return belief.improvement(pool.inputs(start), pool.costs(start))

    def _first(
        self, model: QualityModel, index: int, left_out: set[tuple[int, ...]]
    ) -> tuple[int, ...] | None:
        """Before there is a front: optimal schedules by the prior, their costs spread evenly."""
        samplers = self.problem.space.samplers
        sampler = index % len(samplers)
        pool = Candidates(self.problem, left_out)
        weights = np.maximum(model.weights()[0], 1e-3)
        errors = self.problem.encoder.interval_errors(
            weights, samplers[sampler], self.problem.boundaries, model.shape
        )
        pool.add(sampler, pool.optimal(errors, sampler))
        if not len(pool.rows):
            return None
        costs = pool.costs()
        shift = np.random.default_rng(self.seed).random()
        sequence = qmc.Halton(1, scramble=False).fast_forward(index + 1)
        place = (sequence.random()[0, 0] + shift / 4) % 1.0
        # the fastest quarter is seldom worth a trial
        target = costs.max() - (costs.max() - costs.min()) * 0.75 * place
        return tuple(pool.rows[int(np.abs(costs - target).argmin())].tolist())
