"""The search space: Optuna parameters to `Point` and back.

Noise-easy space: the depth at the data end (`high`), the depth at the noise end (`low`) and, for
the intervals between, how far down from one to the other (`u1`, `u2`, …, in [0, 1], sorted on
reading). Every noise-easy schedule over equal intervals has parameters, no combination is invalid,
and budgets are covered evenly, which independent sorted depths would not do (their mean hardly
varies). Free-form space: one depth per interval (`d0`, `d1`, …). Where several samplers compete,
the parameter `sampler` names one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from asesearch.errors import ScheduleError
from asesearch.point import Point
from asesearch.sampler import Sampler
from asesearch.schedule import ExitSchedule

SAMPLER = "sampler"  # name of the parameter


@dataclass(frozen=True)
class Space:
    """Schedules of `num_intervals` equal intervals with depths in min_exit_depth…depth, under one
    sampler or several.

    Attributes:
        depth: blocks of the network.
        samplers: the study's own first; at least one.
        num_train_timesteps: number of diffusion timesteps.
        num_intervals: of a schedule, all of the same length.
        noise_easy: whether depths may only fall towards noise.
        min_exit_depth: fewest blocks of any interval.

    Raises:
        ScheduleError: an empty range of depths, or no sampler.
    """

    depth: int
    samplers: tuple[Sampler, ...]
    num_train_timesteps: int = 1000
    num_intervals: int = 10
    noise_easy: bool = True
    min_exit_depth: int = 1

    def __post_init__(self) -> None:
        if not self.samplers:
            raise ScheduleError(
                "a space needs at least one sampler; got none; give the study's own"
            )
        if not 1 <= self.min_exit_depth <= self.depth:
            raise ScheduleError(
                f"min_exit_depth must lie in 1…{self.depth}; got {self.min_exit_depth}; lower it"
            )
        if self.num_intervals > self.num_train_timesteps:
            raise ScheduleError(
                f"num_intervals must be at most {self.num_train_timesteps}; got "
                f"{self.num_intervals}; lower it"
            )

    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's distribution of each parameter, in the order they are suggested."""
        more: dict[str, BaseDistribution] = {}
        if len(self.samplers) > 1:
            more[SAMPLER] = CategoricalDistribution(tuple(map(str, self.samplers)))
        depths = IntDistribution(self.min_exit_depth, self.depth)
        if not self.noise_easy:
            return {f"d{i}": depths for i in range(self.num_intervals)} | more
        ends: dict[str, BaseDistribution] = {"high": depths}
        if self.num_intervals > 1:
            ends["low"] = depths
        return (
            ends
            | {f"u{i}": FloatDistribution(0.0, 1.0) for i in range(1, self.num_intervals - 1)}
            | more
        )

    def decode(self, params: dict[str, Any]) -> Point:
        """The point that a set of parameters stands for."""
        if not self.noise_easy:
            depths = [int(params[f"d{i}"]) for i in range(self.num_intervals)]
        else:
            ends = [int(params["high"]), int(params.get("low", params["high"]))]
            high = max(ends)
            low = min(ends)
            inner = sorted(
                (float(params[f"u{i}"]) for i in range(1, self.num_intervals - 1)), reverse=True
            )
            depths = [high, *(low + int((high - low) * u + 0.5) for u in inner), low][
                : self.num_intervals
            ]
        sampler = self.samplers[0]
        if len(self.samplers) > 1:
            sampler = Sampler.from_string(params[SAMPLER])
        schedule = ExitSchedule.uniform_intervals(depths, self.depth, self.num_train_timesteps)
        return Point(schedule, sampler)

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
        starts = [
            i * self.num_train_timesteps // self.num_intervals for i in range(self.num_intervals)
        ]
        depths = [int(d) for d in schedule.exit_depth_at(starts)]
        same = ExitSchedule.uniform_intervals(depths, self.depth, self.num_train_timesteps)
        if Point(same, point.sampler) != point:
            raise ScheduleError(
                f"the space has {self.num_intervals} equal intervals; got boundaries "
                f"{schedule.boundaries}; set num_intervals"
            )
        if min(depths) < self.min_exit_depth:
            raise ScheduleError(
                f"depths must be at least {self.min_exit_depth}; got {schedule}; lower "
                "min_exit_depth"
            )
        chosen = {SAMPLER: str(point.sampler)} if len(self.samplers) > 1 else {}
        if not self.noise_easy:
            return {f"d{i}": d for i, d in enumerate(depths)} | chosen
        if not schedule.is_noise_easy:
            raise ScheduleError(f"the space is noise-easy; got {schedule}; set noise_easy = false")
        high = depths[0]
        low = depths[-1]
        span = max(1, high - low)
        params: dict[str, Any] = (
            {"high": high, "low": low} if self.num_intervals > 1 else {"high": high}
        )
        return (
            params
            | {f"u{i}": (depths[i] - low) / span for i in range(1, self.num_intervals - 1)}
            | chosen
        )

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
