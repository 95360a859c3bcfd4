"""The proposer that knows the network: schedules that are optimal under what the difficulty map and
the trials say together.

`quality_model` holds what is believed, `pareto` what is optimal under it; here are the candidates,
and the choice of the one that is expected to push the front furthest. Nothing is kept between
proposals: all follows from the seed and the trials on record, those in flight included.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState
from scipy.stats import qmc
from threadpoolctl import threadpool_limits

from asesearch.point import Point
from asesearch.proposer.pareto import (
    expected_hypervolume_improvement,
    optimal_schedules,
    probability_on_front,
    stand_ins,
)
from asesearch.proposer.quality_model import (
    NUM_WEIGHTS,
    Encoder,
    ErrorMap,
    Inputs,
    Level,
    Observation,
    QualityModel,
)
from asesearch.proposer.space import Space
from asesearch.sampler import Sampler
from asesearch.schedule import ExitSchedule
from asesearch.score import EvaluationResult
from asesearch.study.records import (
    EXPLORATIONS,
    EXPLORES,
    RECORD,
    REFERENCE_QUALITY,
    REFERENCE_TIME,
    REPEAT,
    LowFidelity,
    TrialRecord,
)

Array = npt.NDArray[np.float64]
NAME = "difficulty"  # the proposer's, in study files and as origin of its trials
# trials besides the full network's that are spread over budgets before improvement decides
NUM_INITIAL = 1
# dynamic programmes a sampler: by the map, without it; schedules of each
WEIGHT_DRAWS = 15
BLIND_DRAWS = 6
MAX_BUDGETS = 40
RANDOM_CANDIDATES = 200
MUTANTS = 200
REFINED = 20
ROUNDS = 2


@dataclass(frozen=True)
class Problem:
    """What can be tried, and what it costs.

    Attributes:
        space: of schedules.
        samplers: sampler -> timesteps of its network calls, those of the space in the same order.
        cost_table: (depth,) cost of one network call at exit depths 1…depth.
        full_cost: of the whole sampling with the full network under the study's own sampler, in the
            same unit.
        difficulty_map: errors by timestep and exit depth.
    """

    space: Space
    samplers: dict[Sampler, tuple[float, ...]]
    cost_table: Array
    full_cost: float
    difficulty_map: ErrorMap

    def __post_init__(self) -> None:
        assert tuple(self.samplers) == self.space.samplers

    @cached_property
    def encoder(self) -> Encoder:
        """Points to model inputs."""
        return Encoder(self.difficulty_map, self.space.num_train_timesteps, self.samplers)

    @cached_property
    def boundaries(self) -> tuple[int, ...]:
        """Of the space's intervals."""
        count = self.space.num_intervals
        end = self.space.num_train_timesteps
        return tuple(i * end // count for i in range(count + 1))

    @cached_property
    def calls(self) -> npt.NDArray[np.int64]:
        """(samplers, intervals) network calls in each interval."""
        edges = self.boundaries[1:-1]
        rows = [np.searchsorted(edges, times, side="right") for times in self.samplers.values()]
        return np.stack([np.bincount(row, minlength=self.space.num_intervals) for row in rows])

    @cached_property
    def full(self) -> Point:
        """The full network under the study's own sampler."""
        space = self.space
        schedule = ExitSchedule.full(space.depth, space.num_train_timesteps)
        return Point(schedule, space.samplers[0])

    def cost_frac(self, point: Point) -> float:
        """Cost of sampling, over the full network's."""
        return float(
            self.cost_table[point.schedule.exit_depth_at(self.samplers[point.sampler]) - 1].sum()
            / self.full_cost
        )

    def depths_of(self, schedule: ExitSchedule) -> tuple[int, ...]:
        """Exit depth in each of the space's intervals."""
        return tuple(schedule.exit_depth_at(self.boundaries[:-1]).tolist())

    def row(self, point: Point) -> tuple[int, ...]:
        """A row of `Candidates`: the sampler's index, and the exit depth of each interval."""
        return (self.space.samplers.index(point.sampler), *self.depths_of(point.schedule))

    @cached_property
    def _stand_ins(self) -> npt.NDArray[np.int64]:
        """(samplers, intervals) of each sampler."""
        return np.stack([stand_ins(calls) for calls in self.calls])

    def keys(self, rows: npt.NDArray[np.int64]) -> list[tuple[int, ...]]:
        """Equal for rows that run the same blocks at the same calls: depths that a sampler never
        asks for do not count."""
        depths = np.take_along_axis(rows[:, 1:], self._stand_ins[rows[:, 0]], axis=1)
        return [tuple(key) for key in np.column_stack((rows[:, 0], depths)).tolist()]

    def key(self, point: Point) -> tuple[int, ...]:
        """Of one point; see `keys`."""
        return self.keys(np.array([self.row(point)], dtype=np.int64))[0]

    def observations(self, records: Sequence[TrialRecord]) -> list[Observation]:
        """Scores on record, one per point and level (the latest)."""
        latest: dict[Level, dict[Point, EvaluationResult]] = {"low": {}, "high": {}}
        for record in records:
            if record.point.sampler in self.samplers:
                if record.low_fidelity is not None:
                    latest["low"][record.point] = record.low_fidelity.quality
                if record.quality is not None:
                    latest["high"][record.point] = record.quality
        return [
            Observation(point, level, *score)
            for level, found in latest.items()
            for point, score in zip(found, _log_scores(list(found.values())), strict=True)
        ]


def _log_scores(found: list[EvaluationResult]) -> list[tuple[float, float]]:
    """Logs and their standard errors; where a score may not be positive (kernel distances),
    scores over their mean size."""
    values = np.array([q.value for q in found])
    errors = np.array([math.nan if q.std_error is None else q.std_error for q in found])
    if (values > np.nan_to_num(errors)).all():
        values, errors = np.log(values), errors / values
    else:
        typical = float(np.abs(values).mean()) or 1.0
        values = values / typical
        errors = errors / typical
    return list(zip(values.tolist(), errors.tolist(), strict=True))


class FrontBelief:
    """What the trials on record say of the front of one level's figures.

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
        """That a point is on the front, and better than twice the full network's figure.

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


class Candidates:
    """Rows (sampler's index, exit depth of each interval), no two alike in what they run, none with
    a key to be left out."""

    def __init__(self, problem: Problem, left_out: set[tuple[int, ...]]) -> None:
        self.problem = problem
        self._seen = set(left_out)
        self.rows = np.zeros((0, problem.space.num_intervals + 1), int)

    def add(self, sampler: int, depths: npt.ArrayLike) -> None:
        """Schedules (n, intervals) of one sampler."""
        table = np.asarray(depths, dtype=np.int64).reshape(-1, self.problem.space.num_intervals)
        self.extend(np.column_stack((np.full(len(table), sampler), table)).tolist())

    def extend(self, rows: Iterable[Sequence[int]]) -> None:
        """Rows of any samplers."""
        table = np.array(list(rows), dtype=np.int64).reshape(-1, self.rows.shape[1])
        new = []
        for i, key in enumerate(self.problem.keys(table)):
            if key not in self._seen:
                self._seen.add(key)
                new.append(i)
        self.rows = np.concatenate((self.rows, table[new]))

    def costs(self, start: int = 0) -> Array:
        """(n,) relative costs of the rows from `start`."""
        rows = self.rows[start:]
        problem = self.problem
        return np.asarray(
            (problem.calls[rows[:, 0]] * problem.cost_table[rows[:, 1:] - 1]).sum(axis=1)
            / problem.full_cost
        )

    def inputs(self, start: int = 0) -> Inputs:
        """Model inputs of the rows from `start`."""
        rows = self.rows[start:]
        problem = self.problem
        at = [np.flatnonzero(rows[:, 0] == i) for i in range(len(problem.samplers))]
        encode = problem.encoder.encode_depths
        parts = [
            encode(rows[a, 1:], problem.boundaries, sampler)
            for a, sampler in zip(at, problem.samplers, strict=True)
        ]
        return Inputs.join(parts).take(np.argsort(np.concatenate(at)))

    # -- where they come from --------------------------------------------------------------------

    def add_optimal(self, model: QualityModel, rng: np.random.Generator) -> None:
        """Optimal schedules at every budget under the weights believed in, under draws of them, and
        without the map."""
        mean = np.maximum(model.weights()[0], 0.0)
        drawn = np.vstack((mean, model.draw_weights(rng, WEIGHT_DRAWS)))
        slopes = rng.normal(0, 1.5, (BLIND_DRAWS, 1)) * np.linspace(-1, 1, NUM_WEIGHTS)
        blind = np.exp(slopes + rng.normal(0, 0.5, (BLIND_DRAWS, NUM_WEIGHTS)))
        problem = self.problem
        errors_of = problem.encoder.interval_errors
        for i, sampler in enumerate(problem.samplers):
            by_map = errors_of(drawn, sampler, problem.boundaries, model.shape)
            by_depth = errors_of(blind, sampler, problem.boundaries, "depth")
            for errors in (*by_map, *by_depth):
                found = self.optimal(errors, i)
                keep = np.unique(np.linspace(0, len(found) - 1, MAX_BUDGETS).round().astype(int))
                self.add(i, [found[k] for k in keep])

    def optimal(self, errors: Array, sampler: int) -> list[tuple[int, ...]]:
        """`optimal_schedules` of the space under one sampler."""
        space = self.problem.space
        calls = self.problem.calls[sampler]
        return optimal_schedules(
            errors, calls, noise_easy=space.noise_easy, min_exit_depth=space.min_exit_depth
        )

    def add_random(self, rng: np.random.Generator, count: int) -> None:
        """Schedules drawn from the space as a random search draws them."""
        space = self.problem.space
        rows = []
        for _ in range(count):
            params = {name: _draw(dist, rng) for name, dist in space.distributions().items()}
            rows.append(self.problem.row(space.decode(params)))
        self.extend(rows)

    def add_mutants(
        self, parents: npt.NDArray[np.int64], rng: np.random.Generator, count: int
    ) -> None:
        """Parents changed by up to three blocks over a run of intervals, and now and then in their
        sampler."""
        if not len(parents):
            return
        space = self.problem.space
        width = self.problem.space.num_intervals
        rows = parents[rng.integers(len(parents), size=count)]
        ends = np.sort(rng.integers(width + 1, size=(count, 2)), axis=1)
        place = np.arange(width)
        inside = (place >= ends[:, :1]) & (place <= ends[:, 1:])
        change = rng.integers(1, 4, size=count) * rng.choice([-1, 1], size=count)
        depths = np.clip(rows[:, 1:] + inside * change[:, None], space.min_exit_depth, space.depth)
        # what was deepened lifts the intervals towards data, what was thinned lowers those towards
        # noise
        if space.noise_easy:
            up = np.maximum.accumulate(depths[:, ::-1], axis=1)[:, ::-1]
            depths = np.where(change[:, None] > 0, up, np.minimum.accumulate(depths, axis=1))
        other = rng.random(count) < 0.2
        sampler = np.where(other, rng.integers(len(space.samplers), size=count), rows[:, 0])
        self.extend(np.column_stack((sampler, depths)).tolist())


def _draw(dist: BaseDistribution, rng: np.random.Generator) -> Any:
    """A uniform value of a depth, a share or a choice."""
    if isinstance(dist, CategoricalDistribution):
        return dist.choices[int(rng.integers(len(dist.choices)))]
    if isinstance(dist, IntDistribution):
        return int(rng.integers(dist.low, dist.high + 1))
    return rng.random()


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
            record = json.loads(trial.user_attrs[RECORD])
            rung = record.get("low_fidelity", record.get("cheap"))  # of earlier releases
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
        space: of schedules.
        samplers: sampler -> timesteps of its network calls; the first is the study's own.
        cost_table: see `Problem`.
        full_cost: see `Problem`.
        difficulty_map: errors by timestep and exit depth.
        seed: of all random choices.
        num_draws: see `FrontBelief`.
        explore: so many proposals first follow the front of low-fidelity scores; see
            `config.PromotionConfig`.
    """

    def __init__(
        self,
        space: Space,
        samplers: dict[Sampler, tuple[float, ...]],
        cost_table: npt.ArrayLike,
        full_cost: float,
        difficulty_map: ErrorMap,
        *,
        seed: int = 0,
        num_draws: int = 64,
        explore: int = 0,
    ) -> None:
        self.problem = Problem(
            space, samplers, np.asarray(cost_table, dtype=np.float64), full_cost, difficulty_map
        )
        self.seed = seed
        self.num_draws = num_draws
        self.explore = explore
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
        schedule = ExitSchedule.uniform_intervals(row[1:], space.depth, space.num_train_timesteps)
        return space.encode(Point(schedule, space.samplers[row[0]]))

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
        pending = []
        space = self.problem.space
        for t in trials:
            params = t.system_attrs.get("fixed_params", {}) | t.params
            if (
                not t.state.is_finished()
                and RECORD not in t.user_attrs
                and set(space.distributions()) <= set(params)
            ):
                pending.append(space.decode(params))
        ended = sum(
            t.state == TrialState.COMPLETE or RECORD in t.user_attrs or REPEAT in t.user_attrs
            for t in trials
        )
        return records, pending, np.random.default_rng([self.seed, ended, len(pending)])

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
            self.problem.row(Point(p.schedule, sampler))
            for p in pending
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
