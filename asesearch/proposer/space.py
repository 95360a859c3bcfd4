"""The search space: Optuna parameters to `Point` and back.

Noise-easy space: `depth at data`, `depth at noise` and, for the intervals between, how far up from
the one at noise to the one at data (`between 1`, `between 2`, …, in [0, 1], sorted on reading).
Every noise-easy schedule over the space's intervals has parameters, no combination is invalid,
and budgets are covered evenly, which independent sorted depths would not do (their mean hardly
varies). Free-form space: one depth per interval (`depth t 0-100`, …). Where several samplers
compete, the parameter `sampler` names one. Studies of earlier releases go on with the short names
that these had: `high`, `low`, `u1`, …, and `d0`, `d1`, ….
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial

from asesearch.errors import ScheduleError
from asesearch.point import Point
from asesearch.sampler import Sampler
from asesearch.schedule import ExitSchedule

SAMPLER = "sampler"  # name of the parameter
SHORT_ENDS = ("high", "low")


def has_short_names(study: optuna.Study) -> bool:
    """Whether a study was begun by a release whose parameters had short names: it goes on with
    them."""
    short = {SHORT_ENDS[0], "d0"}
    return any(
        short & {*trial.params, *trial.system_attrs.get("fixed_params", {})}
        for trial in study.get_trials(deepcopy=False)
    )


@dataclass(frozen=True)
class Space:
    """Schedules of `num_intervals` equal intervals with depths in min_exit_depth…depth, under one
    sampler or several.

    Attributes:
        depth: blocks of the network.
        samplers: the study's own first; at least one.
        num_train_timesteps: number of diffusion timesteps.
        num_intervals: of a schedule.
        noise_easy: whether depths may only fall towards noise.
        min_exit_depth: fewest blocks of any interval.
        interval_power: interval i ends at num_train_timesteps·(i/num_intervals)^interval_power: 1
            makes equal intervals, 2 short ones near data, where the calls of a quadratic grid lie.
        short_names: whether parameters have the names of earlier releases; see `has_short_names`.

    Raises:
        ScheduleError: an empty range of depths, no sampler, or an interval without a timestep.
    """

    depth: int
    samplers: tuple[Sampler, ...]
    num_train_timesteps: int = 1000
    num_intervals: int = 10
    noise_easy: bool = True
    min_exit_depth: int = 1
    short_names: bool = False
    interval_power: float = 1.0

    def __post_init__(self) -> None:
        if not self.samplers:
            raise ScheduleError(
                "a space needs at least one sampler; got none; give the study's own"
            )
        if not 1 <= self.min_exit_depth <= self.depth:
            fix = "raise it" if self.min_exit_depth < 1 else "lower it"
            raise ScheduleError(
                f"min_exit_depth must lie in 1…{self.depth}; got {self.min_exit_depth}; {fix}"
            )
        if self.num_intervals > self.num_train_timesteps:
            raise ScheduleError(
                f"num_intervals must be at most {self.num_train_timesteps}; got "
                f"{self.num_intervals}; lower it"
            )
        if any(a >= b for a, b in pairwise(self.boundaries)):
            raise ScheduleError(
                f"each of {self.num_intervals} intervals must have a timestep; got "
                f"interval_power {self.interval_power:g}, which leaves one without; lower it, or "
                "num_intervals"
            )

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Of the intervals, from 0 to num_train_timesteps."""
        count = self.num_intervals
        end = self.num_train_timesteps
        if self.interval_power == 1.0:
            return tuple(i * end // count for i in range(count + 1))
        return tuple(round(end * (i / count) ** self.interval_power) for i in range(count + 1))

    def schedule(self, exit_depths: Sequence[int]) -> ExitSchedule:
        """The schedule of one depth per interval, data side first."""
        return ExitSchedule(
            self.depth, self.num_train_timesteps, self.boundaries, tuple(exit_depths)
        )

    @property
    def _ends(self) -> tuple[str, str]:
        """Parameters of the depths at data and at noise."""
        return SHORT_ENDS if self.short_names else ("depth at data", "depth at noise")

    @property
    def _between(self) -> list[str]:
        """Parameters of the intervals between."""
        name = "u{}" if self.short_names else "between {}"
        return [name.format(i) for i in range(1, self.num_intervals - 1)]

    @property
    def _each(self) -> list[str]:
        """Parameters of the intervals of a free-form space."""
        if self.short_names:
            return [f"d{i}" for i in range(self.num_intervals)]
        return [f"depth t {a}-{b}" for a, b in pairwise(self.boundaries)]

    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's distribution of each parameter, in the order they are suggested."""
        more: dict[str, BaseDistribution] = {}
        if len(self.samplers) > 1:
            more[SAMPLER] = CategoricalDistribution(tuple(map(str, self.samplers)))
        depths = IntDistribution(self.min_exit_depth, self.depth)
        if not self.noise_easy:
            return dict.fromkeys(self._each, depths) | more
        ends = self._ends if self.num_intervals > 1 else self._ends[:1]
        shares: dict[str, BaseDistribution] = {
            name: FloatDistribution(0.0, 1.0) for name in self._between
        }
        return dict.fromkeys(ends, depths) | shares | more

    def decode(self, params: dict[str, Any]) -> Point:
        """The point that a set of parameters stands for."""
        if not self.noise_easy:
            depths = [int(params[name]) for name in self._each]
        else:
            data, noise = self._ends
            ends = [int(params[data]), int(params.get(noise, params[data]))]
            high = max(ends)
            low = min(ends)
            inner = sorted((float(params[name]) for name in self._between), reverse=True)
            depths = [high, *(low + int((high - low) * u + 0.5) for u in inner), low][
                : self.num_intervals
            ]
        sampler = self.samplers[0]
        if len(self.samplers) > 1:
            sampler = Sampler.from_string(params[SAMPLER])
        return Point(self.schedule(depths), sampler)

    def misfit(self, params: dict[str, Any]) -> str | None:
        """Why parameters, which need not be all, lie outside the space; None where they do not."""
        allowed = self.distributions()
        for name, value in params.items():
            if name not in allowed:
                return f"the space's parameters are {', '.join(map(repr, allowed))}; got {name!r}"
            if not _contains(allowed[name], value):
                return f"{name!r} must {_range(allowed[name])}; got {str(value)[:40]!r}"
        return None

    def point_of(self, trial: FrozenTrial) -> Point | None:
        """The point of a trial that is queued or in flight; None while it has none yet, or where it
        lies outside the space."""
        params = trial.system_attrs.get("fixed_params", {}) | trial.params
        if set(params) != set(self.distributions()) or self.misfit(params) is not None:
            return None
        return self.decode(params)

    def encode(self, point: Point) -> dict[str, Any]:
        """Parameters of a point: `decode(encode(point)) == point`.

        Raises:
            ScheduleError: the point lies outside the space, and why.
        """
        schedule = point.schedule
        if point.sampler not in self.samplers:
            raise ScheduleError(
                f"the space's samplers are {', '.join(map(str, self.samplers))}; got "
                f"{point.sampler}; add it to search.samplers"
            )
        if (schedule.depth, schedule.num_train_timesteps) != (self.depth, self.num_train_timesteps):
            raise ScheduleError(
                f"the space is for {self.depth} blocks and {self.num_train_timesteps} timesteps; "
                f"got {schedule.depth} and {schedule.num_train_timesteps}; use "
                f"rescaled({self.depth})"
            )
        depths = [int(d) for d in schedule.exit_depth_at(self.boundaries[:-1])]
        if Point(self.schedule(depths), point.sampler) != point:
            own, write = f"{self.num_intervals} equal intervals", ""
            if self.interval_power != 1.0:
                own = f"intervals between {', '.join(map(str, self.boundaries))}"
                ends = " ".join(map(str, self.boundaries))
                write = f'write it with their ends ("DEPTHS @ {ends}"), '
            raise ScheduleError(
                f"the space has {own}; got boundaries {schedule.boundaries}; {write}set "
                "num_intervals and interval_power, or leave the schedule out"
            )
        if min(depths) < self.min_exit_depth:
            raise ScheduleError(
                f"depths must be at least {self.min_exit_depth}; got {schedule}; lower "
                "min_exit_depth"
            )
        chosen = {SAMPLER: str(point.sampler)} if len(self.samplers) > 1 else {}
        if not self.noise_easy:
            return dict(zip(self._each, depths, strict=True)) | chosen
        if not schedule.is_noise_easy:
            raise ScheduleError(f"the space is noise-easy; got {schedule}; set noise_easy = false")
        high = depths[0]
        low = depths[-1]
        span = max(1, high - low)
        params: dict[str, Any] = dict(zip(self._ends, (high, low), strict=True))
        if self.num_intervals == 1:
            del params[self._ends[1]]
        shares = [(d - low) / span for d in depths[1:-1]]
        return params | dict(zip(self._between, shares, strict=True)) | chosen

    def suggest(self, trial: optuna.Trial) -> Point:
        """Let the trial's proposer choose the parameters; the point they stand for."""
        params: dict[str, Any] = {}
        for name, dist in self.distributions().items():
            if isinstance(dist, IntDistribution):
                params[name] = trial.suggest_int(name, dist.low, dist.high)
            elif isinstance(dist, FloatDistribution):
                params[name] = trial.suggest_float(name, dist.low, dist.high)
            elif isinstance(dist, CategoricalDistribution):
                params[name] = trial.suggest_categorical(name, dist.choices)
        return self.decode(params)


def _contains(dist: BaseDistribution, value: Any) -> bool:
    """Whether a distribution has a value; JSON's and users' may be anything."""
    if isinstance(value, str) and not isinstance(dist, CategoricalDistribution):
        return False
    try:
        return bool(dist._contains(dist.to_internal_repr(value)))
    except (ValueError, TypeError, OverflowError):
        return False


def _range(dist: BaseDistribution) -> str:
    """What values of a distribution must do, in words."""
    if isinstance(dist, CategoricalDistribution):
        return f"be one of {', '.join(map(str, dist.choices))}"
    assert isinstance(dist, IntDistribution | FloatDistribution)
    kind = "be an integer" if isinstance(dist, IntDistribution) else "lie"
    return f"{kind} in {dist.low:g}…{dist.high:g}"
