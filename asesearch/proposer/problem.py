"""What can be tried, what it costs, and what is on record of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from asesearch.point import Point
from asesearch.proposer.encoder import Encoder, ErrorMap
from asesearch.proposer.pareto import (
    stand_ins,
)
from asesearch.proposer.quality_model import Level, Observation
from asesearch.proposer.space import Space
from asesearch.sampler import Sampler
from asesearch.schedule import ExitSchedule
from asesearch.score import EvaluationResult
from asesearch.study.records import (
    TrialRecord,
)

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Problem:
    """What can be tried, and what it costs.

    Attributes:
        space: of schedules.
        samplers: sampler -> timesteps of its network calls, those of the space in the same order.
        call_costs: sampler -> (calls, depth) cost of each network call at exit depths 1…depth.
        full_cost: of the whole sampling with the full network under the study's own sampler, in the
            same unit.
        difficulty_map: errors by timestep and exit depth.
    """

    space: Space
    samplers: dict[Sampler, tuple[float, ...]]
    call_costs: dict[Sampler, Array]
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
        return self.space.boundaries

    @cached_property
    def calls(self) -> npt.NDArray[np.int64]:
        """(samplers, intervals) network calls in each interval."""
        rows = self._intervals.values()
        return np.stack([np.bincount(row, minlength=self.space.num_intervals) for row in rows])

    @cached_property
    def _intervals(self) -> dict[Sampler, npt.NDArray[np.int64]]:
        """Sampler -> (calls,) interval of each network call."""
        edges = self.boundaries[1:-1]
        return {s: np.searchsorted(edges, t, side="right") for s, t in self.samplers.items()}

    @cached_property
    def interval_costs(self) -> Array:
        """(samplers, intervals, depth) cost of an interval's network calls at each exit depth."""
        space = self.space
        out = np.zeros((len(self.samplers), space.num_intervals, space.depth))
        for i, (sampler, row) in enumerate(self._intervals.items()):
            np.add.at(out[i], row, self.call_costs[sampler])
        return out

    @cached_property
    def full(self) -> Point:
        """The full network under the study's own sampler."""
        space = self.space
        schedule = ExitSchedule.full(space.depth, space.num_train_timesteps)
        return Point(schedule, space.samplers[0])

    def cost_frac(self, point: Point) -> float:
        """Cost of sampling, over the full network's."""
        depths = point.schedule.exit_depth_at(self.samplers[point.sampler])
        costs = self.call_costs[point.sampler][np.arange(len(depths)), depths - 1]
        return float(costs.sum() / self.full_cost)

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
