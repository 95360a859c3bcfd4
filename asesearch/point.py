"""`Point`: an exit schedule under a sampler, the one value that is proposed, tried, recorded,
drawn, exported and loaded again. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from asesearch.errors import AseSearchError, ScheduleError
from asesearch.files import loads, once
from asesearch.sampler import Sampler
from asesearch.schedule import ExitSchedule

FORMAT = "asesearch.point"
VERSION = 1
_UNDER = " under "


@dataclass(frozen=True, eq=False)
class Point:
    """What a trial tries.

    Points are equal, and have one hash, if they run the same number of blocks at every timestep
    under the same sampler: however the schedule's intervals are cut. So sets and dictionaries of
    points need no key of their own.

    Attributes:
        schedule: blocks to run at each noise level.
        sampler: solver and number of steps.
    """

    schedule: ExitSchedule
    sampler: Sampler

    @cached_property
    def key(self) -> tuple[ExitSchedule, Sampler]:
        """What the point runs: its schedule without cuts between equal neighbours, and the
        sampler."""
        return self.weights_key, self.sampler

    @cached_property
    def weights_key(self) -> ExitSchedule:
        """What the fine-tuned weights depend on: points that differ in their sampler alone share
        them."""
        return self.schedule.merged()

    def __eq__(self, other: object) -> bool:
        return self.key == other.key if isinstance(other, Point) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def slug(self) -> str:
        """A file name of ASCII characters, different for different points of one network."""
        return f"{self.schedule.slug}_{self.sampler}"

    # -- writing it ------------------------------------------------------------------------------

    def __str__(self) -> str:
        return f"{self.schedule}{_UNDER}{self.sampler}"

    @classmethod
    def from_string(cls, text: str, depth: int, num_train_timesteps: int = 1000) -> Point:
        """The point that `str()` wrote: "12 12 9 6 under ddim-50".

        Args:
            text: schedule, " under ", sampler.
            depth: blocks of the network.
            num_train_timesteps: number of diffusion timesteps.

        Raises:
            ScheduleError: no " under ", or a schedule that can't be read.
            ConfigError: a sampler that can't be read.
        """
        schedule, under, sampler = text.rpartition(_UNDER)
        if not under:
            raise ScheduleError(
                f'a point is written "SCHEDULE under SOLVER-STEPS"; got {text!r}; write for '
                'example "12 12 9 6 under ddim-50"'
            )
        return cls(
            ExitSchedule.from_string(schedule, depth, num_train_timesteps),
            Sampler.from_string(sampler),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with format name and version; `from_dict` is its inverse."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "schedule": self.schedule.to_dict(),
            "sampler": str(self.sampler),
        }

    def to_json(self) -> str:
        """`to_dict` as one line of JSON."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, data: object) -> Point:
        """Inverse of `to_dict`.

        Raises:
            ScheduleError: another format or version, a missing or unknown key, or an invalid value.
        """
        given = data if isinstance(data, dict) else {}
        head = (given.get("format"), given.get("version"))
        if head != (FORMAT, VERSION):
            raise ScheduleError(
                f"a point has format {FORMAT!r} and version {VERSION}; got {head[0]!r} and "
                f"{head[1]!r}; write it with Point.to_json of this release"
            )
        keys = {"format", "version", "schedule", "sampler"}
        if given.keys() != keys or not isinstance(given["sampler"], str):
            raise ScheduleError(
                f"a point has the keys {', '.join(sorted(keys))}, the sampler as text; got "
                f"{', '.join(sorted(map(str, given)))}; write it with Point.to_json"
            )
        try:
            sampler = Sampler.from_string(given["sampler"])
        except AseSearchError as error:
            raise ScheduleError(str(error)) from error
        return cls(ExitSchedule.from_dict(given["schedule"]), sampler)

    @classmethod
    def from_json(cls, text: str) -> Point:
        """Inverse of `to_json`.

        Raises:
            ScheduleError: not JSON, a key twice, or see `from_dict`.
        """
        try:
            data = loads(text, object_pairs_hook=once)
        except ValueError as error:
            raise ScheduleError(
                f"a point must be JSON; got {text[:80]!r} ({error}); write it with Point.to_json"
            ) from error
        return cls.from_dict(data)
