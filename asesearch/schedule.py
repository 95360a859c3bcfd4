"""`ExitSchedule`: how many blocks run at each noise level. No torch in here.

Source: Moon et al., "A Simple Early Exiting Framework for Accelerated Sampling in Diffusion Models", ICML 2024,
section 3.2 and Table 5.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from asesearch.errors import ScheduleError

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


def _require(ok: bool, rule: str, value: object, fix: str) -> None:
    if not ok:
        raise ScheduleError(f"{rule}; got {value}; {fix}")


def _whole(values: Iterable[Any], name: str) -> tuple[int, ...]:
    out = []
    for value in values:
        ok = not isinstance(value, bool) and isinstance(value, (int, np.integer))
        _require(ok, f"{name} must be whole numbers", repr(value), "write integers without a point")
        out.append(int(value))
    return tuple(out)


@dataclass(frozen=True)
class ExitSchedule:
    """Blocks run (`exit_depths`) on each interval of the training chain.

    Attributes:
        depth: blocks of the network that may be dropped (all of DiT's, the decoder's in a U-ViT).
        num_train_timesteps: length of the chain; t lies in [0, num_train_timesteps), 0 = data.
        boundaries: strictly increasing, from 0 to num_train_timesteps; interval i is [boundaries[i], boundaries[i+1]).
        exit_depths: one count in 1…depth an interval, data side first.

    Raises:
        ScheduleError: naming the rule that is broken, the value and the fix.
    """

    depth: int
    num_train_timesteps: int
    boundaries: tuple[int, ...]
    exit_depths: tuple[int, ...]

    def __post_init__(self) -> None:
        (depth, chain) = _whole((self.depth, self.num_train_timesteps), "depth and num_train_timesteps")
        bounds, depths = _whole(self.boundaries, "boundaries"), _whole(self.exit_depths, "exit_depths")
        _require(depth >= 1, "depth must be at least 1", depth, "give the number of blocks of the network")
        _require(chain >= 1, "num_train_timesteps must be at least 1", chain, "DiT uses 1000")
        _require(len(depths) >= 1, "exit_depths must not be empty", depths, "give one depth an interval")
        _require(
            len(bounds) == len(depths) + 1,
            "boundaries must have one entry more than exit_depths",
            f"{len(bounds)} boundaries for {len(depths)} exit_depths",
            "list both ends of every interval",
        )
        _require(
            bounds[0] == 0 and bounds[-1] == chain,
            f"boundaries must run from 0 to num_train_timesteps = {chain}",
            f"{bounds[0]} … {bounds[-1]}",
            "begin with 0 and end with the length of the chain",
        )
        _require(
            all(a < b for a, b in pairwise(bounds)),
            "boundaries must strictly increase",
            bounds,
            "remove empty intervals",
        )
        for value in depths:
            _require(
                1 <= value <= depth,
                f"exit_depths must lie in 1…{depth} (the depth of the network)",
                value,
                "lower it, or rescale the schedule with rescaled(depth)",
            )
        whole = {"depth": depth, "num_train_timesteps": chain, "boundaries": bounds, "exit_depths": depths}
        for name, plain in whole.items():
            object.__setattr__(self, name, plain)  # plain ints and tuples, whatever was passed

    # -- making one ------------------------------------------------------------------------------

    @classmethod
    def uniform_intervals(cls, exit_depths: Sequence[int], depth: int, num_train_timesteps: int = 1000) -> ExitSchedule:
        """A schedule over equal intervals (to the nearest timestep), data side first."""
        count = len(exit_depths)
        _require(count >= 1, "exit_depths must not be empty", list(exit_depths), "give one depth an interval")
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
    def from_string(cls, text: str, depth: int | None = None, num_train_timesteps: int = 1000) -> ExitSchedule:
        """Read `"28 28 24 24 …"` (spaces or commas; equal intervals, data side first) or a published name (`"D3-DiT"`).

        Args:
            text: the depths, or a key of `PUBLISHED`.
            depth: depth of the network; by default the deepest entry, or the depth the published schedule was made for.
                A published schedule is rescaled to it.
            num_train_timesteps: length of the chain.

        Raises:
            ScheduleError: neither a known name nor whole numbers, or a depth out of range.
        """
        name = text.strip()
        if name in PUBLISHED:
            return cls.published(name, depth, num_train_timesteps)
        parts = name.replace(",", " ").split()
        known = ", ".join(PUBLISHED)
        _require(
            bool(parts) and all(p.isdecimal() for p in parts),
            "a schedule is whole numbers separated by spaces, or a published name",
            repr(text),
            f"the published names are {known}",
        )
        depths = tuple(int(p) for p in parts)
        return cls.uniform_intervals(depths, max(depths) if depth is None else depth, num_train_timesteps)

    @classmethod
    def published(cls, name: str, depth: int | None = None, num_train_timesteps: int = 1000) -> ExitSchedule:
        """One of the paper's eight schedules, rescaled to `depth` where given."""
        _require(name in PUBLISHED, "unknown published schedule", repr(name), f"choose one of {', '.join(PUBLISHED)}")
        own_depth, depths = PUBLISHED[name]
        schedule = cls.uniform_intervals(depths, own_depth, num_train_timesteps)
        return schedule if depth is None else schedule.rescaled(depth)

    def rescaled(self, depth: int) -> ExitSchedule:
        """The same shape for another depth: each entry times depth / self.depth, rounded half up, at least 1.

        Noise-easy schedules stay noise-easy. Rounding makes coarse nets coarse: check `block_frac`.
        """
        _require(depth >= 1, "depth must be at least 1", depth, "give the number of blocks of the network")
        scaled = tuple(max(1, (2 * d * depth + self.depth) // (2 * self.depth)) for d in self.exit_depths)
        return ExitSchedule(depth, self.num_train_timesteps, self.boundaries, scaled)

    # -- asking it -------------------------------------------------------------------------------

    def exit_depth_at(self, t: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Blocks run at timestep t, any shape, same shape out.

        Args:
            t: timesteps in [0, num_train_timesteps); fractions belong to the interval they lie in.

        Raises:
            ScheduleError: t outside the chain or not finite.
        """
        times = np.asarray(t, dtype=np.float64)
        ok = bool(np.all((times >= 0) & (times < self.num_train_timesteps)))
        _require(ok, f"timesteps must lie in [0, {self.num_train_timesteps})", t, "0 is data; the last is one below the end")
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
        """`block_calls` as a fraction of the full network's, in (0, 1]; over the whole chain if no timesteps are given."""
        times = np.arange(self.num_train_timesteps) if timesteps is None else np.atleast_1d(np.asarray(timesteps))
        _require(times.size > 0, "timesteps must not be empty", "no timesteps", "give the timesteps the sampler calls at")
        return self.block_calls(times) / (self.depth * times.size)

    def merged(self) -> ExitSchedule:
        """The same function of t with equal neighbouring intervals joined: equal schedules become equal objects."""
        keep = [i for i, d in enumerate(self.exit_depths) if i == 0 or d != self.exit_depths[i - 1]]
        bounds = (*(self.boundaries[i] for i in keep), self.num_train_timesteps)
        return ExitSchedule(self.depth, self.num_train_timesteps, bounds, tuple(self.exit_depths[i] for i in keep))

    # -- writing it ------------------------------------------------------------------------------

    def __str__(self) -> str:
        depths = " ".join(map(str, self.exit_depths))
        count = len(self.exit_depths)
        if self.boundaries == tuple(i * self.num_train_timesteps // count for i in range(count + 1)):
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
            ScheduleError: another format or version, a missing or surplus key, or an invalid schedule.
        """
        _require(isinstance(data, dict), "a schedule must be a JSON object", type(data).__name__, "write it with to_json")
        assert isinstance(data, dict)
        _require(
            data.get("format") == FORMAT,
            f"format must be {FORMAT!r}",
            repr(data.get("format")),
            "write it with to_json",
        )
        _require(
            data.get("version") == VERSION,
            f"this release reads version {VERSION} of the schedule format",
            repr(data.get("version")),
            "install the asesearch release that wrote it",
        )
        keys = {"format", "version", "depth", "num_train_timesteps", "boundaries", "exit_depths"}
        _require(set(data) == keys, f"keys must be {sorted(keys)}", sorted(map(str, data)), "write it with to_json")
        lists = all(isinstance(data[k], (list, tuple)) for k in ("boundaries", "exit_depths"))
        _require(lists, "boundaries and exit_depths must be lists", data, "write it with to_json")
        return cls(data["depth"], data["num_train_timesteps"], tuple(data["boundaries"]), tuple(data["exit_depths"]))

    @classmethod
    def from_json(cls, text: str) -> ExitSchedule:
        """Inverse of `to_json`.

        Raises:
            ScheduleError: not JSON, or not a schedule.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ScheduleError(f"a schedule must be JSON; got {text[:60]!r} ({error}); write it with to_json") from error
        return cls.from_dict(data)


@dataclass(frozen=True)
class ElasticDepths:
    """The law by which each sample of the elastic warm-up draws its own exit depth.

    Attributes:
        depth, num_train_timesteps: as an `ExitSchedule`'s.
        min_exit_depth: fewest blocks drawn.
        law: `uniform` or `noise-easy`, see `config.ElasticConfig`.
        full_frac: part of the samples that run all blocks.

    Raises:
        ScheduleError: a least depth outside 1…depth.
    """

    depth: int
    num_train_timesteps: int
    min_exit_depth: int = 1
    law: str = "uniform"
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

        The share `full_frac` of the draws, the largest, stands for all blocks; the others are spread by the law.
        """
        times, draws = np.asarray(t, np.float64), np.asarray(u, np.float64)
        drops = draws < 1 - self.full_frac
        part = np.where(drops, draws / max(1 - self.full_frac, 1e-9), 0.0)
        power = 1.0 if self.law == "uniform" else 0.5 + 1.5 * times / self.num_train_timesteps
        span = self.depth - self.min_exit_depth + 1
        drawn = np.minimum(self.min_exit_depth + (span * part**power).astype(np.int64), self.depth)
        return np.where(drops, drawn, self.depth)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"format": "asesearch.elastic_depths", "version": VERSION, **vars(self)}
