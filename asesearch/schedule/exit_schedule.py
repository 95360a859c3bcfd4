"""`ExitSchedule`: how many blocks run at each noise level."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from asesearch.errors import ScheduleError
from asesearch.schedule.checks import (
    FORMAT,
    PUBLISHED,
    VERSION,
    checked_data,
    checked_parts,
    equal_intervals,
    numbers,
    parsed,
    require,
    require_depth,
    shown,
)

#: The longest `ExitSchedule.slug`, in bytes.
SLUG_BYTES = 100


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
        parts = (self.depth, self.num_train_timesteps, self.boundaries, self.exit_depths)
        for name, plain in checked_parts(*parts).items():
            object.__setattr__(self, name, plain)  # plain ints and tuples, whatever was passed

    # -- making one ------------------------------------------------------------------------------

    @classmethod
    def uniform_intervals(
        cls, exit_depths: Sequence[int], depth: int, num_train_timesteps: int = 1000
    ) -> ExitSchedule:
        """A schedule over equal intervals (ends rounded down to whole timesteps), data side
        first."""
        bounds = equal_intervals(len(exit_depths), depth, num_train_timesteps)
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
        depths = () if name == "full" else numbers(before, text)
        if depth is None:
            raise ScheduleError(
                "a schedule needs the depth of its network, which its entries don't tell; "
                f"got {shown(repr(text))} alone; give depth"
            )
        if not depths:
            return cls.full(depth, num_train_timesteps)
        if at:
            return cls(depth, num_train_timesteps, numbers(after, text), depths)
        return cls.uniform_intervals(depths, depth, num_train_timesteps)

    @classmethod
    def published(
        cls, name: str, depth: int | None = None, num_train_timesteps: int = 1000
    ) -> ExitSchedule:
        """One of the paper's eight schedules, rescaled to `depth` where given."""
        require(
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
        require_depth(depth)
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
        require(
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
    def deepest_exit(self) -> int:
        """Most blocks that run where some are left out; 0 if none ever are."""
        return max((d for d in self.exit_depths if d < self.depth), default=0)

    @property
    def is_full(self) -> bool:
        """True if every block runs at every noise level."""
        return all(d == self.depth for d in self.exit_depths)

    def block_calls(self, timesteps: npt.ArrayLike) -> int:
        """Droppable blocks run by a sampler that calls the network once at each of `timesteps`."""
        return int(self.exit_depth_at(timesteps).sum())

    def block_frac(self, timesteps: npt.ArrayLike | None = None, fixed_blocks: int = 0) -> float:
        """Block calls as a fraction of the full network's, in (0, 1].

        Args:
            timesteps: where the network is called; None for all.
            fixed_blocks: of the network that run in every call (`Backbone.fixed_blocks`), as a
                U-ViT's encoder does.
        """
        times = (
            np.arange(self.num_train_timesteps)
            if timesteps is None
            else np.atleast_1d(np.asarray(timesteps))
        )
        require(
            times.size > 0,
            "timesteps must not be empty",
            "no timesteps",
            "give the timesteps the sampler calls at",
        )
        fixed = fixed_blocks * times.size
        return (fixed + self.block_calls(times)) / (fixed + self.depth * times.size)

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
        return cls(**checked_data(data))

    @classmethod
    def from_json(cls, text: str) -> ExitSchedule:
        """Inverse of `to_json`.

        Raises:
            ScheduleError: not JSON, or not a schedule.
        """
        return cls.from_dict(parsed(text))

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
