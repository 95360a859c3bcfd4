"""The ASE loop: one trainer for pretraining, brief and full fine-tuning."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from asesearch.backbones import conditioning
from asesearch.backbones.base import Backbone, check_network
from asesearch.backbones.device import check_memory, plain_torch
from asesearch.backbones.digests import weights_fingerprint
from asesearch.backbones.exit_weights import ExitWeights, weight_sets
from asesearch.config import TrainConfig
from asesearch.data import DataSource
from asesearch.diffusion import Process
from asesearch.errors import ScheduleError, TrainingDiverged
from asesearch.finetuning.annealing import SYNC_EVERY, Depths
from asesearch.finetuning.batches import batches, draw_batch, strata_below
from asesearch.finetuning.checkpoint import (
    CHECKPOINT,
    check_checkpoint_room,
    read_checkpoint,
    write_checkpoint,
)
from asesearch.finetuning.fit import check_fit
from asesearch.finetuning.step import TrainingStep
from asesearch.schedule import ExitSchedule

#: Steps in a row that fp16's loss scaler may skip: each halves its scale, which begins at 2^16, so
#: that it is 1/16 after them.
MAX_SKIPPED = 20


@dataclass
class TrainResult:
    """What a run gives.

    Attributes:
        backbone: the EMA network, in eval mode, on the device it was trained on.
        losses: mean unweighted hybrid loss of each step.
        weight_ended_at: step from which λ was 1, None if it never got there.
        seconds: time spent in training steps, over all resumptions.
    """

    backbone: Backbone
    losses: list[float]
    weight_ended_at: int | None
    seconds: float


class Trainer(TrainingStep):
    """State of one run. Use `finetune` unless you need the steps one by one.

    Args:
        backbone: the network to start from; it is copied, not changed.
        data: training images.
        diffusion: forward process; its timesteps must be the schedule's.
        schedule: blocks to run at each noise level, or the distribution of an elastic warm-up.
        config: see `TrainConfig`.
        run_dir: folder for the checkpoint that makes the run resumable; None = not resumable.
        teacher: full-depth network for distillation; by default `backbone`, if `distill_frac` > 0.
            In eval mode on the device it is used as it is, so don't change it during the run; else
            it is copied. Under mixed precision its weights may be in half precision.
        accelerator: for several processes or devices; by default one is made.
        exits_only: timesteps at which the schedule runs all blocks are not trained on.

    Raises:
        ConfigError, DataError, ScheduleError: parts that do not fit each other.
        CheckpointError: `run_dir` holds the checkpoint of another run.
    """

    @plain_torch()
    def __init__(
        self,
        backbone: Backbone,
        data: DataSource,
        diffusion: Process,
        schedule: Depths,
        config: TrainConfig,
        run_dir: str | os.PathLike[str] | None = None,
        teacher: Backbone | None = None,
        accelerator: Accelerator | None = None,
        exits_only: bool = False,
    ) -> None:
        check_fit(backbone, data, diffusion, schedule, config)
        if teacher is not None:
            modes = (config.mixed_precision, getattr(accelerator, "mixed_precision", "no"))
            half = config.distill_frac == 0 or set(modes) != {"no"}
            check_network(teacher, "mixed_precision = 'bf16'", half=half)
        check_memory(
            config.batch_size, 4 * math.prod(data.shape), "a batch of images", "lower batch_size"
        )
        self.fingerprint = weights_fingerprint(backbone)
        super().__init__(backbone, diffusion, schedule, config, teacher, accelerator)
        self.data = data
        self.strata: Tensor | None = None
        if exits_only and isinstance(schedule, ExitSchedule):
            self.strata = strata_below(schedule.depth, diffusion, schedule.exit_depth_at)
        self.run_dir = None if run_dir is None else Path(run_dir)
        self.seconds = 0.0
        self.skipped = 0
        self.losses: list[float] = []
        self.resumed_at = self._load() if self.run_dir is not None else 0

    def _absorb(self, stats: list[Tensor]) -> None:
        """Bring the statistics of the last steps to the host, over all processes; guard against
        NaN.

        Raises:
            TrainingDiverged: a loss or a gradient is not finite, or the loss scaler skips one step
                after the other.
        """
        if not stats:
            return
        table = self.accelerator.reduce(torch.stack(stats), "sum").cpu().double()  # (steps, 5)
        first = self.step - len(stats)
        for i, (total, short, count, norm, skipped) in enumerate(table.tolist()):
            if not (math.isfinite(total) and math.isfinite(norm)):
                other = ", or train in bf16" if self.config.mixed_precision == "fp16" else ""
                raise TrainingDiverged(
                    f"loss or gradient is not finite at step {first + i} of "
                    f"{self.config.num_steps}; lower the learning rate ({self.config.lr:g}) or "
                    f"give a longer warm-up{other}"
                )
            self.skipped = self.skipped + 1 if skipped else 0
            if self.skipped >= MAX_SKIPPED:
                raise TrainingDiverged(
                    f"the gradients overflow in fp16 whatever the loss scale: {self.skipped} steps "
                    f"in a row were skipped up to step {first + i} of {self.config.num_steps}; "
                    f"train in bf16, or lower the learning rate ({self.config.lr:g})"
                )
            self.losses.append(total / self.config.batch_size)
            self.weight.update(short / count if count else math.nan, first + i)

    @plain_torch()
    def run(self, on_step: Callable[[int, float], None] | None = None) -> TrainResult:
        """Train to `num_steps`.

        Args:
            on_step: called as (steps done, mean loss of the last steps) every few steps, on the
                main process.

        Raises:
            TrainingDiverged: the loss or a gradient is not finite; nothing of the last steps is
                saved.
        """
        total = self.config.num_steps

        start = time.perf_counter()
        stats: list[Tensor] = []
        read = batches(
            self.data,
            self.backbone,
            self.config,
            self.diffusion,
            self.part,
            range(self.step, total),
            self.strata,
        )
        with closing(read):
            for batch in read:
                stats.append(self.train_step(batch))
                due = self.run_dir is not None and self.step % self.config.checkpoint_every == 0
                if not (self.step % SYNC_EVERY == 0 or due or self.step == total):
                    continue
                self._absorb(stats)
                self.seconds += time.perf_counter() - start
                stats = []
                if on_step is not None and self.accelerator.is_main_process:
                    last = self.losses[-SYNC_EVERY:]
                    on_step(self.step, sum(last) / len(last))
                if due or (self.step == total and self.run_dir is not None):
                    self._save()
                start = time.perf_counter()
        for name in self._learnt:
            self.ema_of[name].requires_grad_(True)  # so that it can be trained further
        ended = self.weight.ended_at
        return TrainResult(
            self.ema, self.losses, None if ended is None or ended >= total else ended, self.seconds
        )

    # -- save and resume -------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        """What must agree for a checkpoint to be continued."""
        return {
            "config": self.config.result_fields,
            "schedule": self.schedule.to_dict(),
            "backbone": [type(self.backbone).__name__, self.backbone.config],
            "initial weights": self.fingerprint,
            **({} if self.strata is None else {"exits only": True}),
            "data": self.data.digest,
            "betas": [self.diffusion.beta_schedule, self.diffusion.num_train_timesteps],
        }

    def _save(self) -> None:
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process or self.run_dir is None:
            return
        scaler = self.accelerator.scaler
        progress = {
            "step": self.step,
            "losses": self.losses,
            "weight_losses": self.weight.losses,
            "weight_ended_at": self.weight.ended_at,
            "seconds": self.seconds,
            "skipped": self.skipped,
            "loss_scaler": None if scaler is None else scaler.state_dict(),
        }
        write_checkpoint(self.run_dir / CHECKPOINT, self.tensors(), self._identity(), progress)

    def _load(self) -> int:
        assert self.run_dir is not None
        path = self.run_dir / CHECKPOINT
        if not path.is_file():
            return 0
        tensors, progress = read_checkpoint(path, self._identity(), self.accelerator.device)
        self.restore(tensors)
        self.step = progress["step"]
        self.losses = progress["losses"]
        self.seconds = progress["seconds"]
        self.weight.losses = progress["weight_losses"]
        self.weight.ended_at = progress["weight_ended_at"]
        self.skipped = progress.get("skipped", 0)
        if self.accelerator.scaler is not None and progress.get("loss_scaler"):
            self.accelerator.scaler.load_state_dict(progress["loss_scaler"])
        return self.step


def finetune(
    backbone: Backbone,
    data: DataSource,
    diffusion: Process,
    schedule: Depths,
    config: TrainConfig,
    run_dir: str | os.PathLike[str] | None = None,
    teacher: Backbone | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> TrainResult:
    """Fine-tune `backbone` (or train it from scratch, with `ExitSchedule.full`) under an exit
    schedule.

    See `Trainer` for arguments and errors, `Trainer.run` for `on_step`. With `run_dir`, a killed
    run goes on where its last checkpoint was, and gives the same result as one that was not killed.
    The precision is the config's and gradients are made, whatever the caller's `torch.autocast`,
    `torch.no_grad` or `torch.inference_mode` say.

    Of a network with weights of its own for early exits these are trained, on the timesteps of
    early exits alone, with the weights for full depth as the default teacher.
    """
    trainer = trainer_of(backbone, data, diffusion, schedule, config, run_dir, teacher)
    return whole(trainer.run(on_step), trainer, backbone)


def trainer_of(
    backbone: Backbone,
    data: DataSource,
    diffusion: Process,
    schedule: Depths,
    config: TrainConfig,
    run_dir: str | os.PathLike[str] | None = None,
    teacher: Backbone | None = None,
) -> Trainer:
    """The trainer of `finetune`: of a network, or of its weights for early exits.

    Raises:
        ScheduleError: such weights, and a schedule without an early exit.
        WriteError: no room for a checkpoint in `run_dir`.
    """
    check_fit(backbone, data, diffusion, schedule, config)
    if run_dir is not None:
        check_checkpoint_room(Path(run_dir), weight_sets(backbone)[-1], config)
    if not isinstance(backbone, ExitWeights):
        return Trainer(backbone, data, diffusion, schedule, config, run_dir, teacher)
    if schedule.is_full:
        raise ScheduleError(
            "weights of their own for early exits are trained under early exits; got a schedule "
            f"that runs all {schedule.depth} blocks everywhere; give one that leaves some out"
        )
    teacher = teacher or backbone.full
    return Trainer(
        backbone.exits, data, diffusion, schedule, config, run_dir, teacher, exits_only=True
    )


@plain_torch()
def whole(result: TrainResult, trainer: Trainer, backbone: Backbone) -> TrainResult:
    """The result of `trainer_of` with the network that it is part of: beside the weights for early
    exits those for full depth."""
    if not isinstance(backbone, ExitWeights):
        return result
    device = trainer.accelerator.device
    tuned = ExitWeights(backbone.full.to(device), result.backbone).eval()
    config = trainer.config
    batch = draw_batch(trainer.data, tuned, config, trainer.diffusion, 0, (0, config.batch_size))
    y = conditioning.to(batch.y, device)
    deepest = trainer.schedule.deepest_exit
    tuned.share_unused(batch.x_start.to(device), batch.t.to(device), y, deepest)
    return replace(result, backbone=tuned)


def seconds_per_step(trainer: Trainer) -> float:
    """Median time of three training steps of a trainer that is thrown away afterwards, after one to
    warm up."""
    times = []
    for step in range(4):
        start = time.perf_counter()
        batch = draw_batch(
            trainer.data,
            trainer.backbone,
            trainer.config,
            trainer.diffusion,
            step,
            trainer.part,
            trainer.strata,
        )
        trainer.train_step(batch).cpu()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
