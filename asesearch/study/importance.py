"""What each interval of the noise levels is worth, as it is recorded."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Importance:
    """What the score loses and the time gains, where one interval alone runs half of its blocks.

    By the quality model, after all trials on record.

    Attributes:
        sampler: under which; the study's own.
        boundaries: of the intervals, in timesteps, data side first.
        exit_depth: blocks run in the interval; all in the others.
        depth: blocks of the network.
        log_change: expected change of the logarithm of the score after fine-tuning, by interval;
            positive is worse.
        log_std: its standard deviation.
        time_saved: relative to the full network's sampling time, by interval.
        num_scores: of all kinds, that the model learned from.
    """

    sampler: str
    boundaries: tuple[int, ...]
    exit_depth: int
    depth: int
    log_change: tuple[float, ...]
    log_std: tuple[float, ...]
    time_saved: tuple[float, ...]
    num_scores: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Importance:
        """Inverse of `to_dict`."""
        lists: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**lists)
