"""`ExitSchedule`: how many blocks run at each noise level. No torch in here.

Source: Moon et al., "A Simple Early Exiting Framework for Accelerated Sampling in Diffusion
Models", ICML 2024, section 3.2 and Table 5.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from asesearch.errors import ScheduleError
from asesearch.files import read_text

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

#: The longest `ExitSchedule.slug`, in bytes.
SLUG_BYTES = 100


def _require(ok: bool, rule: str, value: object, fix: str) -> None:
    if not ok:
        raise ScheduleError(f"{rule}; got {_shown(value)}; {fix}")


def _shown(value: object) -> str:
    """A value, or words about it, as a message shows it: one line of at most 80 characters."""
    try:
        text = value if isinstance(value, str) else repr(value)
    except (ValueError, RecursionError):  # an integer too long for Python to write, or deep lists
        return f"a very long {type(value).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:50]}… ({len(text)} characters)"


def _integers(values: Iterable[Any], name: str) -> tuple[int, ...]:
    out = []
    for value in values:
        ok = not isinstance(value, bool) and isinstance(value, (int, np.integer))
        shown = repr(value) if isinstance(value, str) else value
        _require(ok, f"{name} must be integers", shown, "write them without point or quotes")
        _require(abs(value) < LIMIT, f"{name} must be below 10^9", value, "give a smaller number")
        out.append(int(value))
    return tuple(out)


def _numbers(text: str, whole: str) -> tuple[int, ...]:
    """The integers in a text, separated by spaces or commas; `whole` is what an error shows.

    Raises:
        ScheduleError: no integers, or something else beside them.
    """
    parts = text.replace(",", " ").split()
    _require(
        bool(parts) and all(re.fullmatch("[0-9]+", part) for part in parts),
        'a schedule is integers separated by spaces ("12 9 6"), where intervals are unequal with '
        'their ends ("12 9 @ 0 300 1000"), "full", or a published name',
        repr(whole),
        f"the published names are {', '.join(PUBLISHED)}",
    )
    for part in parts:
        _require(
            len(part.lstrip("0")) < 10,
            "numbers of a schedule must be below 10^9",
            part,
            "correct it",
        )
    return tuple(int(part) for part in parts)


@dataclass(frozen=True)
class ExitSchedule:
    """Blocks run (`exit_depths`) on each interval of the diffusion timesteps.

    Attributes:
        depth: blocks of the network that may be dropped (all of DiT's, the decoder's in a U-ViT).
        num_train_timesteps: number of diffusion timesteps; t lies in [0, num_train_timesteps), 0 =
            data.
        boundaries: strictly increasing, from 0 to num_train_timesteps; interval i is
            [boundaries[i], boundaries[i+1]).
        exit_depths: one count in 1…depth per interval, data side first.

    Raises:
        ScheduleError: naming the rule that is broken, the value and the fix.
    """

    depth: int
    num_train_timesteps: int
    boundaries: tuple[int, ...]
    exit_depths: tuple[int, ...]

    def __post_init__(self) -> None:
        (depth, end) = _integers(
            (self.depth, self.num_train_timesteps), "depth and num_train_timesteps"
        )
        bounds = _integers(self.boundaries, "boundaries")
        depths = _integers(self.exit_depths, "exit_depths")
        _require(
            depth >= 1,
            "depth must be at least 1",
            depth,
            "give the number of blocks of the network",
        )
        _require(end >= 1, "num_train_timesteps must be at least 1", end, "DiT uses 1000")
        _require(
            len(depths) >= 1, "exit_depths must not be empty", depths, "give one depth per interval"
        )
        _require(
            len(bounds) == len(depths) + 1,
            "boundaries must have one entry more than exit_depths",
            f"{len(bounds)} boundaries for {len(depths)} exit_depths",
            "list both ends of every interval",
        )
        _require(
            bounds[0] == 0 and bounds[-1] == end,
            f"boundaries must run from 0 to num_train_timesteps = {end}",
            f"{bounds[0]} … {bounds[-1]}",
            "begin with 0 and end with the number of diffusion timesteps",
        )
        _require(
            all(a < b for a, b in pairwise(bounds)),
            "boundaries must strictly increase",
            next((f"{a} before {b}" for a, b in pairwise(bounds) if a >= b), ""),
            "remove empty intervals",
        )
        for value in depths:
            _require(
                1 <= value <= depth,
                f"exit_depths must lie in 1…{depth} (the depth of the network)",
                value,
                "lower it, or rescale the schedule with rescaled(depth)",
            )
        whole = {
            "depth": depth,
            "num_train_timesteps": end,
            "boundaries": bounds,
            "exit_depths": depths,
        }
        for name, plain in whole.items():
            object.__setattr__(self, name, plain)  # plain ints and tuples, whatever was passed

    # -- making one ------------------------------------------------------------------------------

    @classmethod
    def uniform_intervals(
        cls, exit_depths: Sequence[int], depth: int, num_train_timesteps: int = 1000
    ) -> ExitSchedule:
        """A schedule over equal intervals (to the nearest timestep), data side first."""
        _integers((depth, num_train_timesteps), "depth and num_train_timesteps")
        count = len(exit_depths)
        _require(count >= 1, "exit_depths must not be empty", "none", "give one depth per interval")
        _require(
            count <= num_train_timesteps,
            f"at most one interval a timestep ({num_train_timesteps})",
            f"{count} intervals",
            "give fewer exit_depths",
        )
        bounds = tuple(i * num_train_timesteps // count for i in range(count + 1))
        return cls(depth, num_train_timesteps, bounds, tuple(exit_depths))

    @classmethod
    def full(cls, depth: int, num_train_timesteps: int = 1000) -> ExitSchedule:
        """Every block at every noise level: the network as it was."""
        return cls.uniform_intervals((depth,), depth, num_train_timesteps)

    @classmethod
    def from_string(
        cls, text: str, depth: int | None = None, num_train_timesteps: int = 1000
    ) -> ExitSchedule:
        """Read what `str` gives, a published name (`"D3-DiT"`) or `"full"`.

        Args:
            text: the depths, data side first, separated by spaces or commas: `"28 28 24 24"` over
                equal intervals, `"12 9 @ 0 300 1000"` with the ends of unequal ones; `"full"`; or
                a key of `PUBLISHED`.
            depth: blocks of the network that may be dropped. A published schedule is rescaled to
                it and has its own without; the others need it.
            num_train_timesteps: number of diffusion timesteps.

        Raises:
            ScheduleError: none of these forms, no depth where it is needed, or an invalid schedule.
        """
        name = text.strip()
        if name in PUBLISHED:
            return cls.published(name, depth, num_train_timesteps)
        before, at, after = name.partition("@")
        depths = () if name == "full" else _numbers(before, text)
        if depth is None:
            raise ScheduleError(
                "a schedule needs the depth of its network, which its entries don't tell; "
                f"got {_shown(repr(text))} alone; give depth"
            )
        if not depths:
            return cls.full(depth, num_train_timesteps)
        if at:
            return cls(depth, num_train_timesteps, _numbers(after, text), depths)
        return cls.uniform_intervals(depths, depth, num_train_timesteps)

    @classmethod
    def published(
        cls, name: str, depth: int | None = None, num_train_timesteps: int = 1000
    ) -> ExitSchedule:
        """One of the paper's eight schedules, rescaled to `depth` where given."""
        _require(
            name in PUBLISHED,
            "unknown published schedule",
            repr(name),
            f"choose one of {', '.join(PUBLISHED)}",
        )
        own_depth, depths = PUBLISHED[name]
        schedule = cls.uniform_intervals(depths, own_depth, num_train_timesteps)
        return schedule if depth is None else schedule.rescaled(depth)

    def rescaled(self, depth: int) -> ExitSchedule:
        """The same shape for another depth: each entry times depth / self.depth, rounded half up,
        at least 1.

        Noise-easy schedules stay noise-easy. Rounding makes coarse nets coarse: check `block_frac`.
        """
        _require(
            depth >= 1,
            "depth must be at least 1",
            depth,
            "give the number of blocks of the network",
        )
        scaled = tuple(
            max(1, (2 * d * depth + self.depth) // (2 * self.depth)) for d in self.exit_depths
        )
        return ExitSchedule(depth, self.num_train_timesteps, self.boundaries, scaled)

    # -- asking it -------------------------------------------------------------------------------

    def exit_depth_at(self, t: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Blocks run at timestep t, any shape, same shape out.

        Args:
            t: timesteps in [0, num_train_timesteps); fractions belong to the interval they lie in.

        Raises:
            ScheduleError: t outside the diffusion timesteps or not finite.
        """
        times = np.asarray(t, dtype=np.float64)
        ok = bool(np.all((times >= 0) & (times < self.num_train_timesteps)))
        _require(
            ok,
            f"timesteps must lie in [0, {self.num_train_timesteps})",
            t,
            "0 is data; the last is one below the end",
        )
        interval = np.searchsorted(np.asarray(self.boundaries), times, side="right") - 1
        return np.asarray(self.exit_depths, dtype=np.int64)[interval]

    @property
    def is_noise_easy(self) -> bool:
        """True if the schedule never runs more blocks closer to noise (the paper's rule)."""
        return all(a >= b for a, b in pairwise(self.exit_depths))

    @property
    def is_full(self) -> bool:
        """True if every block runs at every noise level."""
        return all(d == self.depth for d in self.exit_depths)

    def block_calls(self, timesteps: npt.ArrayLike) -> int:
        """Droppable blocks run by a sampler that calls the network once at each of `timesteps`."""
        return int(self.exit_depth_at(timesteps).sum())

    def block_frac(self, timesteps: npt.ArrayLike | None = None) -> float:
        """`block_calls` as a fraction of the full network's, in (0, 1]; over all timesteps if no
        timesteps are given."""
        times = (
            np.arange(self.num_train_timesteps)
            if timesteps is None
            else np.atleast_1d(np.asarray(timesteps))
        )
        _require(
            times.size > 0,
            "timesteps must not be empty",
            "no timesteps",
            "give the timesteps the sampler calls at",
        )
        return self.block_calls(times) / (self.depth * times.size)

    def merged(self) -> ExitSchedule:
        """The same function of t with equal neighbouring intervals joined: equal schedules become
        equal objects."""
        keep = [i for i, d in enumerate(self.exit_depths) if i == 0 or d != self.exit_depths[i - 1]]
        bounds = (*(self.boundaries[i] for i in keep), self.num_train_timesteps)
        return ExitSchedule(
            self.depth, self.num_train_timesteps, bounds, tuple(self.exit_depths[i] for i in keep)
        )

    # -- writing it ------------------------------------------------------------------------------

    def __str__(self) -> str:
        depths = " ".join(map(str, self.exit_depths))
        count = len(self.exit_depths)
        if self.boundaries == tuple(
            i * self.num_train_timesteps // count for i in range(count + 1)
        ):
            return depths
        return f"{depths} @ {' '.join(map(str, self.boundaries))}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with format name and version."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "depth": self.depth,
            "num_train_timesteps": self.num_train_timesteps,
            "boundaries": list(self.boundaries),
            "exit_depths": list(self.exit_depths),
        }

    def to_json(self) -> str:
        """One line of JSON; `from_json` gives an equal object back."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, data: object) -> ExitSchedule:
        """Inverse of `to_dict`.

        Raises:
            ScheduleError: another format or version, a missing or unknown key, or an invalid
                schedule.
        """
        _require(
            isinstance(data, dict),
            "a schedule must be a JSON object",
            type(data).__name__,
            "write it with to_json",
        )
        assert isinstance(data, dict)
        _require(
            data.get("format") == FORMAT,
            f"format must be {FORMAT!r}",
            data.get("format"),
            "write it with to_json",
        )
        version = data.get("version")
        _require(
            version == VERSION and isinstance(version, int) and version is not True,
            f"this release reads version {VERSION} of the schedule format",
            version,
            "install the asesearch release that wrote it",
        )
        keys = {"format", "version", "depth", "num_train_timesteps", "boundaries", "exit_depths"}
        _require(
            set(data) == keys,
            f"keys must be {sorted(keys)}",
            sorted(map(str, data)),
            "write it with to_json",
        )
        lists = all(isinstance(data[k], (list, tuple)) for k in ("boundaries", "exit_depths"))
        _require(lists, "boundaries and exit_depths must be lists", data, "write it with to_json")
        return cls(
            data["depth"],
            data["num_train_timesteps"],
            tuple(data["boundaries"]),
            tuple(data["exit_depths"]),
        )

    @classmethod
    def from_json(cls, text: str) -> ExitSchedule:
        """Inverse of `to_json`.

        Raises:
            ScheduleError: not JSON, or not a schedule.
        """
        return cls.from_dict(_parsed(text))

    @classmethod
    def from_text(cls, text: str, depth: int, num_train_timesteps: int = 1000) -> ExitSchedule:
        """A schedule as users name it: a JSON file, or what `from_string` reads.

        Args:
            text: a path that ends in .json (see `read`), or a string for `from_string`.
            depth: blocks of the network that may be dropped.
            num_train_timesteps: number of diffusion timesteps.

        Raises:
            ScheduleError: see `read` and `from_string`.
        """
        if text.lower().endswith(".json"):
            return cls.read(text, depth, num_train_timesteps)
        return cls.from_string(text, depth, num_train_timesteps)

    @classmethod
    def read(
        cls, path: str | os.PathLike[str], depth: int, num_train_timesteps: int = 1000
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
            data = _parsed(text)
            if isinstance(data, str):
                return cls.from_string(data, depth, num_train_timesteps)
            if isinstance(data, list):
                return cls.uniform_intervals(data, depth, num_train_timesteps)
            _require(
                isinstance(data, dict) and "format" in data,
                "a schedule file holds what to_json gives, or plain depths: [12, 9, 6]",
                data,
                "write one of these",
            )
            found = cls.from_dict(data)
            _require(
                (found.depth, found.num_train_timesteps) == (depth, num_train_timesteps),
                f"the network has {depth} blocks and {num_train_timesteps} timesteps",
                f"a schedule for {found.depth} and {found.num_train_timesteps}",
                f"rescale it: ExitSchedule.from_json(text).rescaled({depth})",
            )
        except ScheduleError as error:
            raise ScheduleError(f"{path}: {error}") from error
        return found

    @property
    def long_name(self) -> str:
        """`slug` before it is cut: the depths and the inner boundaries of `merged`."""
        merged = self.merged()
        name = "-".join(map(str, merged.exit_depths))
        if len(merged.exit_depths) > 1:
            name += "_at_" + "-".join(map(str, merged.boundaries[1:-1]))
        return name

    @property
    def slug(self) -> str:
        """A file name for what the schedule does, of at most `SLUG_BYTES` ASCII characters.

        Schedules of one depth and number of timesteps share a name only if they run the same blocks
        at every t. Long ones are cut, and told apart by a hash.
        """
        name = self.long_name
        if len(name) <= SLUG_BYTES:
            return name
        end = "_" + hashlib.sha256(name.encode()).hexdigest()[:32]
        return name[: SLUG_BYTES - len(end)] + end


def _parsed(text: str) -> Any:
    """What a JSON text holds.

    Raises:
        ScheduleError: not JSON, nested too deep, or an integer that Python refuses to read.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = str(error)
        if not isinstance(error, json.JSONDecodeError):
            deep = isinstance(error, RecursionError)
            reason = "it is nested too deep" if deep else "an integer is too long"
        raise ScheduleError(
            f"a schedule must be JSON; got {_shown(repr(text))} ({reason}); write it with to_json"
        ) from error


@dataclass(frozen=True)
class ElasticDepths:
    """The distribution from which each sample of the elastic warm-up draws its own exit depth.

    Attributes:
        depth, num_train_timesteps: as an `ExitSchedule`'s.
        min_exit_depth: fewest blocks drawn.
        distribution: `uniform` or `noise-easy`, see `config.ElasticConfig`.
        full_frac: part of the samples that run all blocks.

    Raises:
        ScheduleError: a least depth outside 1…depth.
    """

    depth: int
    num_train_timesteps: int
    min_exit_depth: int = 1
    distribution: str = "uniform"
    full_frac: float = 0.1

    def __post_init__(self) -> None:
        ok = 1 <= self.min_exit_depth <= self.depth
        _require(ok, f"min_exit_depth must lie in 1…{self.depth}", self.min_exit_depth, "lower it")

    @property
    def exit_depths(self) -> tuple[int, int]:
        """Least and largest depth drawn."""
        return self.min_exit_depth, self.depth

    @property
    def is_full(self) -> bool:
        """True if nothing is ever dropped."""
        return self.min_exit_depth == self.depth or self.full_frac >= 1

    def draw(self, t: npt.ArrayLike, u: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Blocks to run for samples at timesteps t (N,) and uniform draws u (N,) in [0, 1): (N,).

        The share `full_frac` of the draws, the largest, stands for all blocks; the others are
        spread by the distribution.
        """
        times = np.asarray(t, np.float64)
        draws = np.asarray(u, np.float64)
        drops = draws < 1 - self.full_frac
        part = np.where(drops, draws / max(1 - self.full_frac, 1e-9), 0.0)
        power: float | npt.NDArray[np.float64] = 1.0
        if self.distribution != "uniform":
            power = 0.5 + 1.5 * times / self.num_train_timesteps
        span = self.depth - self.min_exit_depth + 1
        drawn = np.minimum(self.min_exit_depth + (span * part**power).astype(np.int64), self.depth)
        return np.where(drops, drawn, self.depth)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        values = dict(vars(self))
        values["law"] = values.pop("distribution")  # its name in files since the first release
        return {"format": "asesearch.elastic_depths", "version": VERSION, **values}
