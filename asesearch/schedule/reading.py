"""Schedules from files."""

from __future__ import annotations

import os

from asesearch.errors import ScheduleError
from asesearch.files import read_text
from asesearch.schedule.checks import parsed, require
from asesearch.schedule.exit_schedule import ExitSchedule


def read_schedule(
    path: str | os.PathLike[str], depth: int, num_train_timesteps: int = 1000
) -> ExitSchedule:
    """A schedule for a network of `depth` blocks from a JSON file.

    The file holds what `to_json` gives, a string for `from_string`, or plain depths over equal
    intervals: `[12, 9, 6]`.

    Raises:
        ScheduleError: unreadable, another form, or a schedule for another depth or number of
            timesteps.
    """
    text = read_text(path, ScheduleError)
    try:
        data = parsed(text)
        if isinstance(data, str):
            return ExitSchedule.from_string(data, depth, num_train_timesteps)
        if isinstance(data, list):
            return ExitSchedule.uniform_intervals(data, depth, num_train_timesteps)
        require(
            isinstance(data, dict) and "format" in data,
            "a schedule file holds what to_json gives, or plain depths: [12, 9, 6]",
            data,
            "write one of these",
        )
        found = ExitSchedule.from_dict(data)
        fixes = []
        if found.depth != depth:
            fixes.append(f"rescale it: ExitSchedule.from_json(text).rescaled({depth})")
        if found.num_train_timesteps != num_train_timesteps:
            fixes.append(f"write its boundaries for {num_train_timesteps} timesteps")
        require(
            (found.depth, found.num_train_timesteps) == (depth, num_train_timesteps),
            f"the network has {depth} blocks and {num_train_timesteps} timesteps",
            f"a schedule for {found.depth} and {found.num_train_timesteps}",
            ", and ".join(fixes),
        )
    except ScheduleError as error:
        raise ScheduleError(f"{path}: {error}") from error
    return found


def schedule_from_text(text: str, depth: int, num_train_timesteps: int = 1000) -> ExitSchedule:
    """A schedule as users name it: a JSON file, or what `ExitSchedule.from_string` reads.

    Args:
        text: a path that ends in .json (see `read_schedule`), or a string for `from_string`.
        depth: blocks of the network that may be dropped.
        num_train_timesteps: number of diffusion timesteps.

    Raises:
        ScheduleError: see `read_schedule` and `ExitSchedule.from_string`.
    """
    if text.lower().endswith(".json"):
        return read_schedule(text, depth, num_train_timesteps)
    return ExitSchedule.from_string(text, depth, num_train_timesteps)
