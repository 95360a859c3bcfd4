"""Where proposals come from: optima of every budget, random points, and variations of good ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from asesearch.proposer.encoder import NUM_WEIGHTS, Inputs
from asesearch.proposer.pareto import (
    optimal_schedules,
)
from asesearch.proposer.problem import Problem
from asesearch.proposer.quality_model import QualityModel

Array = npt.NDArray[np.float64]
# dynamic programmes per sampler: by the map, without it; schedules of each
WEIGHT_DRAWS = 15
BLIND_DRAWS = 6
MAX_BUDGETS = 40


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
        intervals = np.arange(problem.space.num_intervals)
        costs = problem.interval_costs[rows[:, :1], intervals, rows[:, 1:] - 1]
        return np.asarray(costs.sum(axis=1) / problem.full_cost)

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
