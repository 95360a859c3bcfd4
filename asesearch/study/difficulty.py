"""The difficulty map as it is recorded: how wrong a network is at each noise level if it stops
after each of its blocks.

`asesearch.search.mapping` measures it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from asesearch.errors import ConfigError, StudyError

FORMAT = "asesearch.difficulty_map"
VERSION = 1
Table = tuple[tuple[float, ...], ...]  # [bin][exit_depth - 1]
TABLES = ("error_full", "error_full_se", "error_noise", "error_noise_se")


@dataclass(frozen=True)
class DifficultyMap:
    """Mean square errors of the noise prediction, per pixel: 0 is exact, 1 is as wrong as
    predicting no noise at all.

    Tables are indexed `[bin][exit_depth - 1]`, data side first. Exit depths below the network's
    least have the least one's values. All depths of a bin saw the same images, timesteps and noise,
    so their differences are surer than the standard errors of each say.

    Attributes:
        num_train_timesteps: number of diffusion timesteps.
        edges: of the bins, strictly increasing from 0 to num_train_timesteps; bin i is [edges[i],
            edges[i + 1]).
        error_full, error_full_se: against the full-depth prediction of the reference network, and
            its standard error.
        error_noise, error_noise_se: against the noise that was added, and its standard error.
        num_images: images per bin.
        data, data_digest: what they were drawn from.
        weights: fingerprint of the network measured.
        reference_weights: of the reference; the same where the network is measured against itself.

    Raises:
        StudyError: naming the rule that is broken, the value and the fix.
    """

    num_train_timesteps: int
    edges: tuple[int, ...]
    error_full: Table
    error_full_se: Table
    error_noise: Table
    error_noise_se: Table
    num_images: int
    data: str
    data_digest: str
    weights: str
    reference_weights: str

    def __post_init__(self) -> None:
        bounds = self.edges
        end = self.num_train_timesteps
        whole = all(type(v) is int for v in (*bounds, end, self.num_images))
        _require(
            whole, "timesteps and num_images must be integers", (*bounds, end, self.num_images)
        )
        rising = (
            len(bounds) >= 2
            and all(a < b for a, b in pairwise(bounds))
            and (bounds[0], bounds[-1]) == (0, end)
        )
        _require(
            rising, f"edges must strictly increase from 0 to num_train_timesteps = {end}", bounds
        )
        _require(self.num_images >= 2, "num_images must be at least 2", self.num_images)
        texts = (self.data, self.data_digest, self.weights, self.reference_weights)
        _require(
            all(isinstance(v, str) for v in texts), "data and fingerprints must be text", texts
        )
        for name in TABLES:
            rows = getattr(self, name)
            shape = (len(rows), sorted({len(row) for row in rows}))
            fits = len(rows) == self.num_bins and shape[1] == [self.depth] and self.depth >= 1
            _require(
                fits,
                f"{name} must have {self.num_bins} bins of one value per block",
                f"bins and values {shape}",
            )
            bad = [v for row in rows for v in row if type(v) is not float or not 0 <= v < math.inf]
            _require(not bad, f"{name} must be finite and not negative", bad[:3])

    @property
    def depth(self) -> int:
        """Blocks of the network."""
        return len(self.error_full[0]) if self.error_full else 0

    @property
    def num_bins(self) -> int:
        """Noise levels."""
        return len(self.edges) - 1

    def error_at(
        self, timesteps: npt.ArrayLike, kind: Literal["full", "noise"] = "full"
    ) -> npt.NDArray[np.float64]:
        """Errors at any timesteps and exit depths 1…depth: (N,) -> (N, depth).

        Between the middles of two bins the logarithm of the error is linear in t (the error itself
        where one of the two is 0), so that intervals finer than the bins make sense; outside the
        first and the last middle it is constant. The middle of a bin is the mean of its whole
        timesteps, so that bins of one timestep give their own values there.

        Raises:
            ConfigError: timesteps outside [0, num_train_timesteps].
        """
        t = np.atleast_1d(np.asarray(timesteps, dtype=np.float64))
        if not bool(np.all((t >= 0) & (t <= self.num_train_timesteps))):
            raise ConfigError(
                f"timesteps must lie in [0, {self.num_train_timesteps}]; got {timesteps!r}; 0 is "
                "data"
            )
        # (bins, depth)
        values = np.asarray(self.error_full if kind == "full" else self.error_noise)
        middles = np.array([(a + b - 1) / 2 for a, b in pairwise(self.edges)])
        place = np.interp(t, middles, np.arange(len(middles)))  # (N,), in units of bins
        lower = np.floor(place).astype(np.int64)
        # (N, depth) each
        low = values[lower]
        high = values[np.minimum(lower + 1, len(middles) - 1)]
        part = (place - lower)[:, None]
        linear = (1 - part) * low + part * high
        with np.errstate(divide="ignore", invalid="ignore"):
            between = np.exp((1 - part) * np.log(low) + part * np.log(high))
        errors: npt.NDArray[np.float64] = np.where(
            (low > 0) & (high > 0) & (part > 0), between, linear
        )
        return errors

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with format name and version; `from_dict` gives an equal object
        back."""
        return {"format": FORMAT, "version": VERSION, **vars(self)}

    @classmethod
    def from_dict(cls, data: object) -> DifficultyMap:
        """Inverse of `to_dict`.

        Raises:
            StudyError: another format or version, a missing or unknown key, or an invalid map.
        """
        given = data if isinstance(data, dict) else {}
        _require(
            given.get("format") == FORMAT, f"format must be {FORMAT!r}", repr(given.get("format"))
        )
        version = given.get("version")
        _require(
            version == VERSION,
            f"this release reads version {VERSION} of the difficulty map",
            repr(version),
        )
        values = {k: v for k, v in given.items() if k not in ("format", "version")}
        names = {f.name for f in fields(cls)}
        _require(values.keys() == names, f"keys must be {sorted(names)}", sorted(map(str, values)))
        lists = isinstance(values["edges"], (list, tuple)) and all(
            _is_table(values[name]) for name in TABLES
        )
        _require(lists, "edges must be a list, and the errors lists of lists", "something else")
        tables = {
            k: tuple(tuple(float(v) if type(v) is int else v for v in row) for row in values[k])
            for k in TABLES
        }
        return cls(**{**values, **tables, "edges": tuple(values["edges"])})


def _require(ok: bool, rule: str, value: object) -> None:
    if not ok:
        raise StudyError(f"{rule}; got {value} in a difficulty map; delete it to measure again")


def _is_table(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(row, (list, tuple)) for row in value)
