"""A trial's work: fine-tune briefly, sample with the study's seeds, evaluate, count the cost."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from asesearch.backbones.base import Backbone, check_schedule
from asesearch.backbones.checkpoints import inspect_checkpoint, load_saved
from asesearch.backbones.compiled import forget_graphs
from asesearch.backbones.device import collect_cycles
from asesearch.backbones.exit_weights import own_exits
from asesearch.backbones.saving import save_backbone
from asesearch.config import TrainConfig
from asesearch.data import save_images
from asesearch.files import replacing
from asesearch.finetuning import CHECKPOINT, TrainResult, finetune
from asesearch.point import Point
from asesearch.schedule import ExitSchedule
from asesearch.score import EvaluationResult
from asesearch.search.costs import Costs
from asesearch.search.opening import conditioning_for
from asesearch.search.parts import SHOWN_IMAGES, Parts
from asesearch.study import directory
from asesearch.study.records import shortened

NUM_PROMPTS = 4  # kept beside a trial's weights, for its bundle
BEGUN_AGAIN = "the training begins again"
# in the metadata of the weights: seconds and losses of the fine-tuning that made them
TOOK = "fine_tuning"


@dataclass
class Outcome:
    """What one schedule gave; see `TrialRecord` for the fields."""

    quality: EvaluationResult
    time_frac: float
    flops_frac: float
    block_frac: float
    losses: list[float]
    seconds: dict[str, float]
    gflops: dict[str, float]
    finetune_steps: int | None = None


def first_start(parts: Parts) -> Backbone:
    """What the elastic warm-up, or a trial of a study without one, starts from: the pretrained
    weights, which stay what makes the calls at full depth where the study says so."""
    if parts.config.search.own_exits:
        return own_exits(parts.backbone)
    return parts.backbone


class Trials:
    """Tries points from one start.

    Args:
        parts: of the study.
        costs: what its points cost.

    Attributes:
        start: what trials are fine-tuned from: the pretrained weights, until `warm_up` puts the
            elastic ones here.
        on_step: sees (steps done, loss) of each fine-tuning.
    """

    def __init__(self, parts: Parts, costs: Costs) -> None:
        self.parts = parts
        self.costs = costs
        self.start: Backbone = first_start(parts)
        self.on_step: Callable[[int, float], None] | None = None

    def tuning(
        self, schedule: ExitSchedule, training_seed: int = 0
    ) -> tuple[Backbone, TrainConfig]:
        """What a schedule's brief fine-tuning starts from, and its settings.

        `training_seed` 0 is the search's; each other draws other batches, timesteps and noise.

        The full network, which all others are compared with, gets equal-compute fine-tuning: from
        its pretrained weights, for as many steps as take the arithmetic of the elastic warm-up and
        of the brief fine-tuning together. It learns noise targets: from a teacher that it equals it
        would learn nothing. Where the pretrained weights make all calls at full depth it is the
        pretrained network.
        """
        config = self.parts.config.train
        config = config.model_copy(update={"seed": config.seed + training_seed})
        if not schedule.is_full:
            return self.start, config
        own = self.parts.config.search.own_exits
        steps = 0 if own else self.costs.equal_compute_steps()
        return self.parts.backbone, config.model_copy(
            update={"num_steps": steps, "distill_frac": 0.0}
        )

    def tuned(self, schedule: ExitSchedule, folder: Path, training_seed: int = 0) -> TrainResult:
        """The schedule's fine-tuned network, and what it took.

        From its file where another sampler's trial left it, or one that was killed before it was on
        record: the file keeps what the fine-tuning took.
        """
        path = folder / directory.WEIGHTS
        if directory.is_whole(path, "the schedule is fine-tuned again", schedule):
            net = load_saved(path, self.parts.config.backbone.kind, self.parts.device)
            took = json.loads(inspect_checkpoint(path).metadata.get(TOOK, "null")) or {
                "seconds": 0.0,
                "losses": [],
            }
            return TrainResult(net, took["losses"], None, took["seconds"])
        directory.drop_damaged(folder / CHECKPOINT, BEGUN_AGAIN)
        start, config = self.tuning(schedule, training_seed)
        for net in (start, self.parts.backbone):
            forget_graphs(net)
        teacher = self.parts.backbone if config.distill_frac > 0 else None
        tuned = finetune(
            start,
            self.parts.data,
            self.parts.diffusion,
            schedule,
            config,
            folder,
            teacher,
            self.on_step,
        )
        took = {"seconds": tuned.seconds, "losses": shortened(tuned.losses)}
        extra = {directory.TUNED_FOR: schedule.to_json(), TOOK: json.dumps(took)}
        save_backbone(tuned.backbone, path, extra)
        (folder / CHECKPOINT).unlink(missing_ok=True)
        if self.parts.device.type == "cuda":
            collect_cycles()  # before it is sampled
        return tuned

    def try_point(self, point: Point, folder: Path) -> Outcome:
        """Fine-tune, sample, evaluate; weights and samples are left in `folder`.

        Raises:
            TrainingDiverged, EvaluationError: the schedule's own failure.
        """
        schedule = point.schedule
        check_schedule(self.parts.backbone, self.parts.diffusion.num_train_timesteps, schedule)
        _ = self.costs.latency  # before any trial, not in one
        tuned = self.tuned(schedule, folder)
        shown: list[Tensor] = []
        protocol = self.parts.protocols.search
        quality, seconds = self.parts.evaluate(tuned.backbone, point, protocol, shown)
        file = folder / directory.samples_file(point.sampler, self.parts.own_sampler)
        save_images(torch.cat(shown)[:SHOWN_IMAGES].numpy(), file)
        if isinstance(
            prompts := conditioning_for(tuned.backbone, self.parts.data, range(NUM_PROMPTS)), dict
        ):
            with replacing(folder / directory.PROMPTS) as part:
                save_file(prompts, part)
        gflops = {"sample": self.costs.sampling_gflops(point, protocol)}
        config = self.tuning(schedule)[1]
        if tuned.seconds:
            gflops["finetune"] = self.costs.training_gflops(schedule, config)
        return Outcome(
            quality,
            *self.costs.fracs(point),
            losses=tuned.losses,
            finetune_steps=config.num_steps,
            seconds={"finetune": tuned.seconds, **seconds},
            gflops=gflops,
        )

    def try_low_fidelity(self, point: Point) -> tuple[EvaluationResult, float, float]:
        """The first rung: score of the point under the elastic weights as they are, and the seconds
        and GFLOPs it took.

        Raises:
            EvaluationError: images that are not finite.
        """
        protocol = self.parts.protocols.low_fidelity
        assert protocol is not None
        quality, seconds = self.parts.evaluate(self.start, point, protocol)
        return quality, sum(seconds.values()), self.costs.sampling_gflops(point, protocol)
