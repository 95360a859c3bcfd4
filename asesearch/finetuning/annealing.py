"""What changes over the course of a run: learning rate, EMA decay and loss weight."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from asesearch.config import LossWeight, TrainConfig
from asesearch.schedule import ElasticDepths, ExitSchedule

Depths = ExitSchedule | ElasticDepths
"""Blocks to run: one schedule, or a distribution that every sample draws its exit depth from."""
SYNC_EVERY = 10  # steps between looks at the loss: each is a device synchronisation


def lr_factor(step: int, config: TrainConfig) -> float:
    """Learning rate at a step as a fraction of `lr`: linear warm-up, then constant or a cosine to
    0.

    The same values as diffusers' `get_scheduler`, but for its warm-up, which begins at 0, so that
    a first step would learn nothing, and is up to 1 / warmup_steps lower. No scheduler object: it
    counts its own calls, and step k's rate is to follow from k alone.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return 1.0
    return 0.5 * (
        1
        + math.cos(
            math.pi * (step - config.warmup_steps) / max(1, config.num_steps - config.warmup_steps)
        )
    )


def ema_decay_at(step: int, config: TrainConfig) -> float:
    """The share of the old average that a step keeps: `ema_decay`, ramped up to.

    The average itself is PyTorch's. diffusers' `EMAModel` could give the same decays (with
    use_ema_warmup, inv_gamma = 9, power = 1, update_after_step = -1), but its import takes 6 s of
    processor time, as it loads pipelines and transformers.
    """
    return min(config.ema_decay, (1 + step) / (10 + step))


@dataclass
class PlateauWeight:
    """λ(t) over the course of a run; see `config.LossWeight` for shape and stop rule."""

    config: LossWeight
    most_dropped: float  # largest fraction of blocks that the schedule drops
    losses: list[float] = field(default_factory=list)
    ended_at: int | None = None

    @classmethod
    def make(cls, config: LossWeight, schedule: Depths) -> PlateauWeight:
        """For a schedule; nothing is raised if it drops nothing."""
        flat = config.shape == "none" or config.peak == 1.0 or schedule.is_full
        return cls(
            config, 1 - min(schedule.exit_depths) / schedule.depth, ended_at=0 if flat else None
        )

    def update(self, loss: float, step: int) -> None:
        """Take the mean loss on the shortened intervals at a step (NaN if none was drawn); apply
        the stop rule.

        What the losses say counts from the next look at them (see `SYNC_EVERY`), so that no result
        depends on when checkpoints are written.
        """
        if self.ended_at is not None:
            return
        if math.isfinite(loss):
            self.losses.append(loss)
        window = self.config.window
        limit = self.config.max_steps
        if len(self.losses) >= 2 * window and len(self.losses) % window == 0:
            before = sum(self.losses[-2 * window : -window]) / window
            now = sum(self.losses[-window:]) / window
            if now > before * (1 - self.config.tolerance):
                self.ended_at = -(-(step + 1) // SYNC_EVERY) * SYNC_EVERY
        if limit is not None and max(step + 1, self.ended_at or 0) >= limit:
            self.ended_at = limit

    def at(self, dropped: Tensor, step: int) -> Tensor:
        """λ at a step of samples for which these fractions of the blocks are dropped: (N,) ->
        (N,)."""
        ends = [end for end in (self.ended_at, self.config.max_steps) if end is not None]
        if step >= min(ends, default=math.inf):
            return torch.ones_like(dropped)
        lift = (
            dropped / self.most_dropped
            if self.config.shape == "dropped"
            else (dropped > 0).to(dropped)
        )
        return 1 + (self.config.peak - 1) * lift
