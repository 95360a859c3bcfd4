"""What a schedule must be, and how texts and plain data are read; every error names the rule, the
value and the fix."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np

from asesearch.errors import ScheduleError
from asesearch.files import loads, once

FORMAT = "asesearch.exit_schedule"
VERSION = 1

#: Blocks used per tenth of t, data side first, and the depth they were made for (paper, Table 5).
#: The U-ViT schedules count decoder blocks only (6 in U-ViT-S/4).
PUBLISHED: dict[str, tuple[int, tuple[int, ...]]] = {
    "D2-DiT": (28, (28, 28, 25, 25, 22, 22, 19, 19, 16, 16)),
    "D3-DiT": (28, (28, 28, 24, 24, 20, 20, 16, 16, 12, 12)),
    "D4-DiT": (28, (28, 28, 26, 24, 20, 18, 12, 10, 8, 8)),
    "D7-DiT": (28, (28, 28, 24, 21, 18, 15, 10, 10, 8, 8)),
    "D1-U-ViT": (6, (6, 6, 4, 4, 2, 2, 2, 2, 1, 1)),
    "D2-U-ViT": (6, (5, 5, 4, 4, 2, 2, 1, 1, 1, 1)),
    "D3-U-ViT": (6, (3, 3, 2, 2, 2, 2, 1, 1, 1, 1)),
    "D6-U-ViT": (6, (2, 2, 2, 2, 1, 1, 1, 1, 1, 1)),
}

#: Larger numbers are refused where they are read: no depth or timestep comes near.
LIMIT = 10**9


def require(ok: bool, rule: str, value: object, fix: str) -> None:
    if not ok:
        raise ScheduleError(f"{rule}; got {shown(value)}; {fix}")


def shown(value: object) -> str:
    """A value, or words about it, as a message shows it: one line of at most 80 characters."""
    try:
        text = value if isinstance(value, str) else repr(value)
    except (ValueError, RecursionError):  # an integer too long for Python to write, or deep lists
        return f"a very long {type(value).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:50]}… ({len(text)} characters)"


def quoted(value: object) -> object:
    """A value for `require`, which takes a text for words about it."""
    return repr(value) if isinstance(value, str) else value


def integers(values: Iterable[Any], name: str) -> tuple[int, ...]:
    out = []
    for value in values:
        ok = not isinstance(value, bool) and isinstance(value, (int, np.integer))
        require(ok, f"{name} must be integers", quoted(value), "write them without point or quotes")
        require(abs(value) < LIMIT, f"{name} must be below 10^9", value, "give a smaller number")
        out.append(int(value))
    return tuple(out)


def numbers(text: str, whole: str) -> tuple[int, ...]:
    """The integers in a text, separated by spaces or commas; `whole` is what an error shows.

    Raises:
        ScheduleError: no integers, or something else beside them.
    """
    parts = text.replace(",", " ").split()
    require(
        bool(parts) and all(re.fullmatch("[0-9]+", part) for part in parts),
        'a schedule is integers separated by spaces ("12 9 6"), where intervals are unequal with '
        'their ends ("12 9 @ 0 300 1000"), "full", or a published name',
        repr(whole),
        f"the published names are {', '.join(PUBLISHED)}",
    )
    for part in parts:
        require(
            len(part.lstrip("0")) < 10,
            "numbers of a schedule must be below 10^9",
            part,
            "correct it",
        )
    return tuple(int(part) for part in parts)


def require_depth(depth: int) -> None:
    """Refuse a network without blocks."""
    require(
        depth >= 1, "depth must be at least 1", depth, "give the number of blocks of the network"
    )


def equal_intervals(count: int, depth: int, num_train_timesteps: int) -> tuple[int, ...]:
    """Boundaries of `count` equal intervals, rounded down to whole timesteps.

    Raises:
        ScheduleError: no interval, or more than there are timesteps.
    """
    integers((depth, num_train_timesteps), "depth and num_train_timesteps")
    require(count >= 1, "exit_depths must not be empty", "none", "give one depth per interval")
    require(
        count <= num_train_timesteps,
        f"at most one interval a timestep ({num_train_timesteps})",
        f"{count} intervals",
        "give fewer exit_depths",
    )
    return tuple(i * num_train_timesteps // count for i in range(count + 1))


def checked_parts(
    depth: Any, num_train_timesteps: Any, boundaries: Iterable[Any], exit_depths: Iterable[Any]
) -> dict[str, Any]:
    """The parts of an `ExitSchedule` as plain integers and tuples, by name.

    Raises:
        ScheduleError: naming the rule that is broken, the value and the fix.
    """
    (depth, end) = integers((depth, num_train_timesteps), "depth and num_train_timesteps")
    bounds = integers(boundaries, "boundaries")
    depths = integers(exit_depths, "exit_depths")
    require_depth(depth)
    require(end >= 1, "num_train_timesteps must be at least 1", end, "DiT uses 1000")
    require(
        len(depths) >= 1, "exit_depths must not be empty", depths, "give one depth per interval"
    )
    require(
        len(bounds) == len(depths) + 1,
        "boundaries must have one entry more than exit_depths",
        f"{len(bounds)} boundaries for {len(depths)} exit_depths",
        "list both ends of every interval",
    )
    require(
        bounds[0] == 0 and bounds[-1] == end,
        f"boundaries must run from 0 to num_train_timesteps = {end}",
        f"{bounds[0]} … {bounds[-1]}",
        "begin with 0 and end with the number of diffusion timesteps",
    )
    require(
        all(a < b for a, b in pairwise(bounds)),
        "boundaries must strictly increase",
        next((f"{a} before {b}" for a, b in pairwise(bounds) if a >= b), ""),
        "remove empty intervals",
    )
    for value in depths:
        require(
            1 <= value <= depth,
            f"exit_depths must lie in 1…{depth} (the depth of the network)",
            value,
            "raise it" if value < 1 else "lower it, or rescale the schedule with rescaled(depth)",
        )
    return {
        "depth": depth,
        "num_train_timesteps": end,
        "boundaries": bounds,
        "exit_depths": depths,
    }


def checked_data(data: object) -> dict[str, Any]:
    """The parts of an `ExitSchedule` in what `ExitSchedule.to_dict` gave, by name.

    Raises:
        ScheduleError: another format or version, or a missing or unknown key.
    """
    require(
        isinstance(data, dict),
        "a schedule must be a JSON object",
        type(data).__name__,
        "write it with to_json",
    )
    assert isinstance(data, dict)
    require(
        data.get("format") == FORMAT,
        f"format must be {FORMAT!r}",
        quoted(data.get("format")),
        "write it with to_json",
    )
    version = data.get("version")
    require(
        type(version) is int,
        "version must be an integer",
        quoted(version),
        f"this release writes {VERSION}, without point or quotes",
    )
    require(
        version == VERSION,
        f"this release reads version {VERSION} of the schedule format",
        version,
        "install the asesearch release that wrote it",
    )
    keys = {"format", "version", "depth", "num_train_timesteps", "boundaries", "exit_depths"}
    require(
        set(data) == keys,
        f"keys must be {sorted(keys)}",
        sorted(map(str, data)),
        "write it with to_json",
    )
    lists = all(isinstance(data[k], (list, tuple)) for k in ("boundaries", "exit_depths"))
    require(lists, "boundaries and exit_depths must be lists", data, "write it with to_json")
    return {
        "depth": data["depth"],
        "num_train_timesteps": data["num_train_timesteps"],
        "boundaries": tuple(data["boundaries"]),
        "exit_depths": tuple(data["exit_depths"]),
    }


def parsed(text: str) -> Any:
    """What a JSON text holds.

    Raises:
        ScheduleError: not JSON, a key twice, nested too deep, or an integer that Python refuses to
            read.
    """
    try:
        return loads(text, object_pairs_hook=once)
    except ValueError as error:
        reason = str(error)
        if reason.startswith("Exceeds the limit"):  # Python's own, of more than 4,300 digits
            reason = "an integer is too long"
        raise ScheduleError(
            f"a schedule must be JSON; got {shown(repr(text))} ({reason}); write it with to_json"
        ) from error
