"""`ElasticDepths`: the exit depths of an elastic warm-up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from asesearch.schedule.checks import VERSION, require


@dataclass(frozen=True)
class ElasticDepths:
    """The distribution from which each sample of the elastic warm-up draws its own exit depth.

    Attributes:
        depth, num_train_timesteps: as an `ExitSchedule`'s.
        min_exit_depth: fewest blocks drawn.
        distribution: `uniform` or `noise-easy`, see `config.ElasticConfig`.
        full_frac: part of the samples that run all blocks.
        max_exit_depth: most blocks that the others draw; None for all.

    Raises:
        ScheduleError: a least depth outside 1…depth, or a largest one outside min_exit_depth…depth.
    """

    depth: int
    num_train_timesteps: int
    min_exit_depth: int = 1
    distribution: str = "uniform"
    full_frac: float = 0.5
    max_exit_depth: int | None = None

    def __post_init__(self) -> None:
        ok = 1 <= self.min_exit_depth <= self.depth
        fix = "raise it" if self.min_exit_depth < 1 else "lower it"
        require(ok, f"min_exit_depth must lie in 1…{self.depth}", self.min_exit_depth, fix)
        low = self.min_exit_depth
        ok = low <= self._top <= self.depth
        rule = f"max_exit_depth must lie in {low}…{self.depth}"
        require(ok, rule, self._top, "a network needs a block that may be left out")

    @property
    def exit_depths(self) -> tuple[int, int]:
        """Least and largest depth drawn."""
        return self.min_exit_depth, self.depth if self.full_frac > 0 else self._top

    @property
    def deepest_exit(self) -> int:
        """Most blocks of a draw that leaves some out."""
        return min(self._top, self.depth - 1)

    @property
    def _top(self) -> int:
        """Most blocks that the distribution draws."""
        return self.depth if self.max_exit_depth is None else self.max_exit_depth

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
        span = self._top - self.min_exit_depth + 1
        drawn = np.minimum(self.min_exit_depth + (span * part**power).astype(np.int64), self._top)
        return np.where(drops, drawn, self.depth)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        values = dict(vars(self))
        values["law"] = values.pop("distribution")  # its name in files since the first release
        if self.max_exit_depth is None:
            values.pop("max_exit_depth")  # files of releases that did not know it
        return {"format": "asesearch.elastic_depths", "version": VERSION, **values}
