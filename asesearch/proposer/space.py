"""The search space: Optuna parameters to `ExitSchedule` and back.

Noise-easy space: the depth at the data end (`high`), the depth at the noise end (`low`) and, for
the intervals between, how far down from one to the other (`u1`, `u2`, …, in [0, 1], sorted on
reading). Every noise-easy schedule over equal intervals has parameters, no combination is invalid,
and budgets are covered evenly, which independent sorted depths would not do (their mean hardly
varies). Free-form space: one depth an interval (`d0`, `d1`, …). Where several ways of sampling
compete, the parameter `sampler` names one.
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
from asesearch.schedule import ExitSchedule

SAMPLER = "sampler"  # name of the parameter


@dataclass(frozen=True)
class Space:
    """Schedules of `num_intervals` equal intervals with depths in min_exit_depth…depth, and ways of
    sampling.

    Attributes:
        samplers: "SOLVER-STEPS" of each way of sampling, the study's own first; empty = no choice.

    Raises:
        ScheduleError: an empty range of depths.
    """

    depth: int
    num_train_timesteps: int = 1000
    num_intervals: int = 10
    noise_easy: bool = True
    min_exit_depth: int = 1
    samplers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
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
            more[SAMPLER] = CategoricalDistribution(self.samplers)
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

    def decode(self, params: dict[str, Any]) -> ExitSchedule:
        """The schedule that a set of parameters stands for."""
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
        return ExitSchedule.uniform_intervals(depths, self.depth, self.num_train_timesteps)

    def sampler(self, params: dict[str, Any]) -> str:
        """The way of sampling that a set of parameters names; empty where there is no choice."""
        return str(params[SAMPLER]) if len(self.samplers) > 1 else ""

    def encode(self, schedule: ExitSchedule, sampler: str = "") -> dict[str, Any]:
        """Parameters of a point: `decode(encode(s))` runs the same blocks at every timestep.

        Args:
            schedule: any in the space.
            sampler: one of `samplers`; the first if empty.

        Raises:
            ScheduleError: the schedule lies outside the space, and why.
        """
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
        if same.merged() != schedule.merged():
            raise ScheduleError(
                f"the space has {self.num_intervals} equal intervals; got boundaries "
                f"{schedule.boundaries}; set num_intervals"
            )
        if min(depths) < self.min_exit_depth:
            raise ScheduleError(
                f"depths must be at least {self.min_exit_depth}; got {schedule}; lower "
                "min_exit_depth"
            )
        chosen = {SAMPLER: sampler or self.samplers[0]} if len(self.samplers) > 1 else {}
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

    def suggest(self, trial: optuna.Trial) -> tuple[ExitSchedule, str]:
        """Let the trial's proposer choose the parameters; the schedule and the way of sampling they
        stand for."""
        params: dict[str, Any] = {}
        for name, dist in self.distributions().items():
            if isinstance(dist, IntDistribution):
                params[name] = trial.suggest_int(name, dist.low, dist.high)
            elif isinstance(dist, FloatDistribution):
                params[name] = trial.suggest_float(name, dist.low, dist.high)
            elif isinstance(dist, CategoricalDistribution):
                params[name] = trial.suggest_categorical(name, dist.choices)
        return self.decode(params), self.sampler(params)
