"""The networks of `paper.py`: fine-tuned once for each schedule, recipe and training seed, kept as
files, and shared by all rows and experiments."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from measuring import machine
from paper_rows import EXPERTS, JOINED, OWN, PRETRAINED, RECIPES, Row
from torch import Tensor, nn

from asesearch.backbones import save_backbone
from asesearch.backbones.base import Backbone, ExitDepth
from asesearch.backbones.checkpoints import load_backbone
from asesearch.backbones.digests import weights_fingerprint
from asesearch.backbones.exit_weights import ExitWeights
from asesearch.config import BackboneConfig, TrainConfig
from asesearch.files import write_json
from asesearch.finetuning import CHECKPOINT, Batch, Trainer
from asesearch.locks import waited_lock
from asesearch.schedule import ExitSchedule
from asesearch.search import Workbench
from asesearch.search.costs import elastic_depths
from asesearch.search.trials import Trials, first_start
from asesearch.study import directory

TENTHS = 10


@dataclass(frozen=True)
class Made:
    """A network and what it cost.

    Attributes:
        net: in eval mode.
        gflops: of its own fine-tuning.
        seconds: of it, on the machine that did it.
        on: that machine; empty where nothing was trained.
        warmed: whether it started from the elastic weights, whose cost then counts too.
    """

    net: Backbone
    gflops: float = 0.0
    seconds: float = 0.0
    on: str = ""
    warmed: bool = False


class Recipe(Trials):
    """`Trials` with a recipe's changes.

    Args:
        bench: whose trials have their start already.
        changes: of `RECIPES`.
    """

    def __init__(self, bench: Workbench, changes: dict[str, Any]) -> None:
        super().__init__(bench, bench.costs)
        self.bench = bench
        self.start = bench.trials.start
        self.changes = changes

    def tuning(
        self, schedule: ExitSchedule, training_seed: int = 0
    ) -> tuple[Backbone, TrainConfig]:
        start, config = super().tuning(schedule, training_seed)
        changes = dict(self.changes)
        steps = config.num_steps
        if schedule.is_full and self.bench.config.search.own_exits:
            steps = self._equal_compute(config)
        elastic = self.parts.config.elastic
        if changes.pop("start", "") == PRETRAINED:
            start = first_start(self.parts)
            steps += 0 if elastic is None else elastic.num_steps
        steps = round(changes.pop("times", 1.0) * steps)
        fields = {**config.model_dump(), **changes, "num_steps": steps}
        return start, TrainConfig.model_validate(fields)

    def _equal_compute(self, config: TrainConfig) -> int:
        """Steps of the full network that take the compute of a warm-up of early exits alone, and as
        many more as a schedule's own, each of which takes less."""
        own = self.bench.config.train.num_steps
        elastic = self.bench.config.elastic
        assert elastic is not None
        once = config.model_copy(update={"num_steps": 1})
        warm = self.costs.training_gflops(elastic_depths(self.bench), elastic)
        return own + round(warm / self.costs.training_gflops(self.bench.full, once))


class TenthTrainer(Trainer):
    """A training run that sees one tenth of the timesteps alone."""

    tenth = 0

    def train_step(self, batch: Batch) -> Tensor:
        """As it is, with the batch's timesteps moved into the tenth, evenly."""
        whole = self.diffusion.num_train_timesteps
        low = self.tenth * whole // TENTHS
        high = (self.tenth + 1) * whole // TENTHS
        t = low + torch.div(batch.t * (high - low), whole, rounding_mode="floor")
        return super().train_step(replace(batch, t=t))


class Several(Backbone):
    """Several networks in the place of one; all images of a call share one.

    Args:
        nets: of one shape.
        choose: number of the network that makes the call at a timestep.
    """

    def __init__(self, nets: Sequence[Backbone], choose: Callable[[int], int]) -> None:
        super().__init__()
        for name in Backbone.__annotations__:
            if hasattr(nets[0], name):
                setattr(self, name, getattr(nets[0], name))
        self.nets = nn.ModuleList(nets)
        self.choose = choose

    def forward(
        self, x_t: Tensor, t: Tensor, y: Tensor | None = None, *, exit_depth: ExitDepth = None
    ) -> Tensor:
        net = self.nets[self.choose(int(t[0]))]
        return net(x_t, t, y, exit_depth=exit_depth)  # type: ignore[no-any-return]


def experts(nets: Sequence[Backbone], num_train_timesteps: int) -> Several:
    """A network of its own for each tenth of the timesteps."""
    return Several(nets, lambda t: t * TENTHS // num_train_timesteps).eval()


class Networks:
    """Gives the network of a row.

    Args:
        bench: the experiment's parts; its trials start from the elastic weights.
        folder: where networks are kept.
    """

    def __init__(self, bench: Workbench, folder: Path) -> None:
        self.bench = bench
        self.folder = folder

    def of(self, row: Row, training_seed: int) -> Made:
        """From its file, or fine-tuned now; killed, the same call goes on.

        Raises:
            TrainingDiverged: the recipe is too bold.
        """
        bench = self.bench
        if row.recipe == PRETRAINED:
            return Made(bench.backbone)
        if row.recipe == JOINED:
            own = self.of(replace(row, recipe=OWN), training_seed)
            if isinstance(own.net, ExitWeights):  # with --full-depth pretrained all are joined
                return own
            return replace(own, net=ExitWeights(bench.backbone, own.net).eval())
        trials = Recipe(bench, RECIPES.get(row.recipe, {}))
        schedule = ExitSchedule.from_string(row.schedule, bench.backbone.depth)
        start, config = trials.tuning(schedule, training_seed)
        identity = self._identity(schedule, start, config, row.recipe == EXPERTS)
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
        folder = self.folder / f"{schedule.slug}-{digest}"
        with waited_lock(folder / "making.lock", f"fine-tunes {schedule}"):
            if row.recipe == EXPERTS:
                net, seconds = self._experts(start, config, folder)
            else:
                tuned = trials.tuned(schedule, folder, training_seed)
                net, seconds = tuned.backbone, tuned.seconds
            made = folder / "recipe.json"
            if not made.is_file():
                write_json(made, {"identity": identity, "machine": machine()})
        on = json.loads(made.read_text(encoding="utf-8"))["machine"]
        return Made(
            net,
            bench.costs.training_gflops(schedule, config),
            seconds,
            on["gpu"] or on["cpu"],
            start is trials.start,
        )

    def _identity(
        self, schedule: ExitSchedule, start: Backbone, config: TrainConfig, experts: bool
    ) -> dict[str, Any]:
        """All that a network depends on."""
        teacher = self.bench.backbone if config.distill_frac > 0 else None
        return {
            "start": weights_fingerprint(start),
            "teacher": None if teacher is None else weights_fingerprint(teacher),
            "schedule": schedule.merged().to_dict(),
            "config": config.result_fields,
            "data": self.bench.data.digest,
            "experts": TENTHS if experts else None,
        }

    def _experts(
        self, start: Backbone, config: TrainConfig, folder: Path
    ) -> tuple[Backbone, float]:
        """One network for each tenth, each in a tenth of the steps, and their seconds."""
        bench = self.bench
        few = config.model_copy(update={"num_steps": config.num_steps // TENTHS})
        nets = []
        seconds = 0.0
        for tenth in range(TENTHS):
            own = folder / str(tenth)
            path = own / directory.WEIGHTS
            took = own / "took.json"
            if not directory.is_whole(path, "the expert is trained again"):
                trainer = TenthTrainer(start, bench.data, bench.diffusion, bench.full, few, own)
                trainer.tenth = tenth
                result = trainer.run()
                write_json(took, {"seconds": result.seconds})
                save_backbone(result.backbone, path, {"tenth": str(tenth)})
                (own / CHECKPOINT).unlink(missing_ok=True)
            seconds += json.loads(took.read_text(encoding="utf-8"))["seconds"]
            kind = BackboneConfig(kind=bench.config.backbone.kind, checkpoint=str(path))
            nets.append(load_backbone(kind).to(bench.device).eval())
        return experts(nets, bench.full.num_train_timesteps), seconds
