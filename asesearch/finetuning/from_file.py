"""A study file's network trained under one schedule, from the file to the weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from asesearch.backbones.checkpoints import load_trained
from asesearch.backbones.exit_weights import own_exits, weight_sets
from asesearch.backbones.saving import save_backbone
from asesearch.config import StudyConfig
from asesearch.data import check_not_read, check_output, check_readable, open_data
from asesearch.diffusion import make_diffusion
from asesearch.errors import ConfigError
from asesearch.files import (
    check_room,
    check_utf8,
    check_weights_file,
    check_writable,
    share_room,
)
from asesearch.finetuning.checkpoint import CHECKPOINT, check_checkpoint_room, schedule_in
from asesearch.finetuning.trainer import TrainResult, seconds_per_step, trainer_of, whole
from asesearch.locks import alone
from asesearch.schedule import SLUG_BYTES, schedule_from_text

LOCK = "training.lock"  # held by the process that trains in the folder


class StudyTraining:
    """A training that is to be run; everything is checked when it is made.

    Args:
        config: the study file; its `train` settings are used, and `search.full_depth`.
        schedule: as `schedule_from_text` takes it; "full" trains all blocks.
        out: weights to write, .safetensors.
        run_dir: folder of the checkpoint, from which a killed run resumes.
        by_schedule: whether the checkpoint lies in a folder of its own schedule in `run_dir`.
        dry_run: whether it is only planned, so that no checkpoint is read or written.

    Attributes:
        trainer: that runs it.
        run_dir: folder of the checkpoint.

    Raises:
        AseSearchError: a path that can't be written, has no room for what goes there, or whose
            weights the study reads; parts that can't be opened or do not fit each other, or images
            that can't be read.
    """

    def __init__(
        self,
        config: StudyConfig,
        schedule: str,
        out: Path,
        run_dir: Path,
        *,
        by_schedule: bool = False,
        dry_run: bool = False,
    ) -> None:
        check_weights_file(out)
        check_not_read(config, out, "--out")
        check_output(config, run_dir, "--run-dir")
        check_utf8(run_dir, "a checkpoint", ConfigError)
        check_writable(run_dir, f"{'0' * SLUG_BYTES}/{CHECKPOINT}" if by_schedule else CHECKPOINT)
        data = open_data(config.data)
        null = getattr(data, "null_condition", None)
        seed = config.train.seed
        self.backbone = load_trained(config.backbone, config.diffusion, seed, null, untrained=True)
        num_timesteps = config.diffusion.num_train_timesteps
        self.schedule = schedule_from_text(schedule, self.backbone.depth, num_timesteps)
        self.run_dir = run_dir
        # earlier releases kept that of any schedule in the folder itself
        if by_schedule and schedule_in(run_dir / CHECKPOINT) != self.schedule.to_dict():
            self.run_dir = run_dir / self.schedule.slug
        if config.search.own_exits and not self.schedule.is_full:
            self.backbone = own_exits(self.backbone)
        self._check_room(config, out)
        self.trainer = trainer_of(
            self.backbone,
            data,
            make_diffusion(config.diffusion),
            self.schedule,
            config.train,
            None if dry_run else self.run_dir,
        )
        check_readable(data)
        self.config = config
        self.out = out

    def _check_room(self, config: StudyConfig, out: Path) -> None:
        """Refuse to begin where the checkpoints or the weights in the end would have no room.

        Raises:
            WriteError: as said.
        """
        net = weight_sets(self.backbone)[-1]
        size = self._bytes_written()
        together = share_room(self.run_dir, out)
        check_checkpoint_room(self.run_dir, net, config.train, result=size if together else 0)
        if not together:
            check_room(out.parent, size, "the trained network")

    def _bytes_written(self) -> int:
        """Of the weights in the end, at least: with those that training gives early exits for their
        own, but for blocks that none of them reaches, which stay shared."""
        full, *others = weight_sets(self.backbone)
        tensors = list(full.state_dict().values())
        for exits in others:
            left_out = range(self.schedule.deepest_exit, exits.depth)
            shared = {id(p) for i in left_out for p in exits.block_at(i).parameters()}
            tensors += [p for p in exits.parameters() if p.requires_grad and id(p) not in shared]
        return sum(t.numel() * t.element_size() for t in tensors)

    def plan(self) -> dict[str, Any]:
        """Settings, sizes, and the time it will take, measured on a few steps of a dry run."""
        step_s = seconds_per_step(self.trainer)
        return {
            "study": self.config.shareable(),
            "schedule": str(self.schedule),
            "images": len(self.trainer.data),
            "parameters": sum(p.numel() for p in self.backbone.parameters()),
            "estimate": {
                "step_s": round(step_s, 4),
                "total_s": round(step_s * self.config.train.num_steps, 3),
            },
        }

    def run(self, on_step: Callable[[int, float], None] | None = None) -> TrainResult:
        """Train to the end; see `Trainer.run`.

        Raises:
            ConfigError: another process trains in the checkpoint's folder.
        """
        folder = self.trainer.run_dir
        if folder is None or not self.trainer.accelerator.is_main_process:
            return self._run(on_step)
        refusal = ConfigError(
            f"one training at a time keeps its checkpoint in a folder; another is at {folder}; "
            "wait for it, or give another --run-dir"
        )
        with alone(folder / LOCK, refusal):
            return self._run(on_step)

    def _run(self, on_step: Callable[[int, float], None] | None) -> TrainResult:
        return whole(self.trainer.run(on_step), self.trainer, self.backbone)

    def write(self, result: TrainResult) -> None:
        """Write the weights and how they were made; on the main process only.

        Raises:
            WriteError: the file can't be written.
        """
        if not self.trainer.accelerator.is_main_process:
            return
        name = "train" if self.schedule.is_full else "finetune"
        made_by = f"asesearch {name}: {json.dumps(self.config.shareable())}"
        metadata = {"exit_schedule": self.schedule.to_json(), "made_by": made_by}
        save_backbone(result.backbone.cpu(), self.out, metadata)
