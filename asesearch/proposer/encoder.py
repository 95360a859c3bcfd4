"""Points as arrays for the quality model, under one difficulty map."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from asesearch.point import Point
from asesearch.sampler import Sampler

Array = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

NUM_WEIGHTS = 8  # hat functions over the noise level
NUM_BINS = 10  # of the depth profile
#: What stands in for the map's error, chosen by marginal likelihood: itself, its root, or the share
#: of blocks left out, squared, which needs no map. The last is charged nats: the map is believed
#: until the trials speak against it.
SHAPES = ("log", "sqrt", "depth")


class ErrorMap(Protocol):
    """A difficulty map: mean square error of each exit depth against the full network."""

    def error_at(self, timesteps: npt.ArrayLike, /) -> Array:
        """(n,) timesteps -> (n, depth) errors; column d - 1 is exit depth d."""
        ...


@dataclass(frozen=True)
class Inputs:
    """Points in arrays.

    Attributes:
        features: (shapes, n, NUM_WEIGHTS) φ for each of `SHAPES`.
        profile: (n, NUM_BINS) mean depth fraction in equal bins of the timesteps.
        log_calls: (n,) log of the number of network calls.
        sampler: (n,) a number that stands for the sampler's name.
    """

    features: Array
    profile: Array
    log_calls: Array
    sampler: Integers

    def __len__(self) -> int:
        return len(self.profile)

    def take(self, order: Integers) -> Inputs:
        """The points at these indices."""
        return Inputs(
            self.features[:, order], self.profile[order], self.log_calls[order], self.sampler[order]
        )

    @staticmethod
    def join(parts: Sequence[Inputs]) -> Inputs:
        """One after another; at least one."""
        return Inputs(
            np.concatenate([p.features for p in parts], axis=1),
            *(
                np.concatenate([getattr(p, name) for p in parts])
                for name in ("profile", "log_calls", "sampler")
            ),
        )


class Encoder:
    """Points to model inputs under one difficulty map.

    Args:
        difficulty_map: errors by timestep and exit depth.
        num_train_timesteps: number of diffusion timesteps.
        samplers: sampler -> timesteps of its network calls.
    """

    def __init__(
        self,
        difficulty_map: ErrorMap,
        num_train_timesteps: int,
        samplers: Mapping[Sampler, Sequence[float]],
    ) -> None:
        self.map = difficulty_map
        self.samplers = samplers
        self.num_train_timesteps = num_train_timesteps
        self._grid = (np.arange(4 * NUM_BINS) + 0.5) * num_train_timesteps / (4 * NUM_BINS)
        self._scales = np.ones(len(SHAPES))
        self._typical = 1.0
        typical = self._above(self._grid)[:, :-1]
        self._typical = float(typical.mean()) if typical.size and typical.any() else 1.0
        raw = self._shaped(self._grid)  # (shapes, grid, depth)
        self.depth = raw.shape[2]
        sizes = raw[:, :, : max(1, self.depth - 1)].mean(axis=(1, 2))
        self._scales = np.where(sizes > 0, sizes, 1.0)

    def _shaped(self, timesteps: npt.ArrayLike) -> Array:
        """(n,) timesteps -> (shapes, n, depth) errors above the full depth's; 1 is typical."""
        above = self._above(timesteps)
        left_out = 1 - np.arange(1, above.shape[1] + 1) / above.shape[1]
        shapes = np.stack(
            [
                np.log1p(above / self._typical),
                np.sqrt(above),
                np.broadcast_to(left_out**2, above.shape),
            ]
        )
        return np.asarray(shapes / self._scales[:, None, None])

    def _above(self, timesteps: npt.ArrayLike) -> Array:
        """(n,) timesteps -> (n, depth) the map's errors above the full depth's."""
        errors = np.asarray(
            self.map.error_at(np.asarray(timesteps, dtype=np.float64)), dtype=np.float64
        )
        return np.maximum(errors - errors[:, -1:], 0.0)

    def _basis(self, timesteps: npt.ArrayLike) -> Array:
        """(n,) timesteps -> (n, NUM_WEIGHTS) hat functions on equally spaced knots; each row sums
        to 1."""
        place = (
            np.asarray(timesteps, dtype=np.float64) / self.num_train_timesteps * (NUM_WEIGHTS - 1)
        )
        return np.asarray(np.clip(1 - np.abs(place[:, None] - np.arange(NUM_WEIGHTS)), 0.0, 1.0))

    def encode(self, points: Sequence[Point]) -> Inputs:
        """Any points, one by one."""
        if not points:
            some = next(iter(self.samplers))
            return self.encode_depths(np.ones((0, 1), int), (0, self.num_train_timesteps), some)
        return Inputs.join(
            [
                self._encode(
                    p.schedule.exit_depth_at(self.samplers[p.sampler])[None],
                    p.schedule.exit_depth_at(self._grid)[None],
                    p.sampler,
                )
                for p in points
            ]
        )

    def encode_depths(
        self, depths: Integers, boundaries: Sequence[int], sampler: Sampler
    ) -> Inputs:
        """Many schedules of one sampler at once: (n, intervals) depths over common boundaries."""
        edges = np.asarray(boundaries)[1:-1]
        timesteps = np.asarray(self.samplers[sampler])
        calls = depths[:, np.searchsorted(edges, timesteps, side="right")]  # (n, calls)
        grid = depths[:, np.searchsorted(edges, self._grid, side="right")]
        return self._encode(calls, grid, sampler)

    def _encode(self, calls: Integers, grid: Integers, sampler: Sampler) -> Inputs:
        timesteps = self.samplers[sampler]
        n, count = calls.shape
        table = self._shaped(timesteps)
        basis = self._basis(timesteps)
        errors = table[:, np.arange(count), calls - 1]  # (shapes, n, calls)
        profile = grid.reshape(n, NUM_BINS, grid.shape[1] // NUM_BINS).mean(axis=2) / self.depth
        name = zlib.crc32(str(sampler).encode())
        return Inputs(
            errors @ basis / count,
            profile,
            np.full(n, np.log(count)),
            np.full(n, name, dtype=np.int64),
        )

    def interval_errors(
        self, weights: Array, sampler: Sampler, boundaries: Sequence[int], shape: str
    ) -> Array:
        """Additive errors for `optimal_schedules`: (…, NUM_WEIGHTS) weights -> (…, intervals,
        depth) in log score."""
        timesteps = self.samplers[sampler]
        # (calls, depth), (calls, weights)
        table = self._shaped(timesteps)[SHAPES.index(shape)]
        basis = self._basis(timesteps)
        interval = np.searchsorted(
            np.asarray(boundaries)[1:-1], np.asarray(timesteps), side="right"
        )
        inside = interval[None, :] == np.arange(len(boundaries) - 1)[:, None]  # (intervals, calls)
        total = np.einsum(
            "...k,jk,jd,ij->...id", weights, basis, table, inside.astype(float), optimize=True
        )
        return np.asarray(total / len(timesteps))
