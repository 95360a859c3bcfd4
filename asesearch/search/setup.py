"""What follows from a study file and its network before anything runs: space, proposer, warm
starts."""

from __future__ import annotations

import optuna

from asesearch.config import SearchConfig, StudyConfig
from asesearch.errors import ScheduleError
from asesearch.point import Point
from asesearch.proposer.problem import Problem
from asesearch.proposer.space import Space
from asesearch.schedule import ExitSchedule
from asesearch.search.workbench import Workbench
from asesearch.study.difficulty import DifficultyMap
from asesearch.study.storage import experimental


def make_proposer(config: SearchConfig, seed: int) -> optuna.samplers.BaseSampler:
    """The Optuna sampler of a study file, where it is one of Optuna's own."""
    with experimental():
        if config.proposer == "tpe":
            return optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=8, multivariate=True, constant_liar=True
            )
        if config.proposer == "nsga2":
            return optuna.samplers.NSGAIISampler(seed=seed, population_size=10)
        if config.proposer == "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=8)
        return optuna.samplers.RandomSampler(seed=seed)


def make_space(config: StudyConfig, bench: Workbench) -> Space:
    """The study's search space for its network."""
    search = config.search
    num_timesteps = config.diffusion.num_train_timesteps
    return Space(
        bench.backbone.depth,
        tuple(bench.samplers),
        num_timesteps,
        search.num_intervals,
        search.noise_easy,
        bench.min_exit_depth,
        interval_power=search.interval_power,
    )


def make_problem(space: Space, bench: Workbench, difficulty_map: DifficultyMap) -> Problem:
    """What the quality model needs to know of the study."""
    costs = {sampler: bench.costs.of_calls(sampler) for sampler in bench.samplers}
    full_cost = float(costs[bench.own_sampler][:, -1].sum())
    return Problem(space, bench.samplers, costs, full_cost, difficulty_map)


def warm_starts(config: StudyConfig, bench: Workbench) -> dict[str, Point]:
    """Points to try first, by origin: the full network, the study's schedules, and the full network
    under other samplers.

    Raises:
        ScheduleError: an unknown name, or a schedule outside the space.
    """
    space = make_space(config, bench)
    depth = bench.backbone.depth
    num_timesteps = config.diffusion.num_train_timesteps
    full = ExitSchedule.full(depth, num_timesteps)
    own, *others = bench.samplers
    out: dict[str, Point] = {}
    for name in dict.fromkeys(("full", *config.search.warm_start)):
        try:
            schedule = (
                full if name == "full" else ExitSchedule.from_string(name, depth, num_timesteps)
            )
            out[name] = Point(schedule, own)
            space.encode(out[name])
        except ScheduleError as error:
            raise ScheduleError(
                f"warm start {name!r} does not fit the search space: {error}"
            ) from error
    return out | {f"full {sampler}": Point(full, sampler) for sampler in others}
