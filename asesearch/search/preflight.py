"""Before anything is trained: what can be known now is not refused later.

Nothing is checked here by a rule of its own. The real objects are made and used once: `Workbench`
has sent an image through every sampler, the decoder and the extractor and built every protocol;
here the training data are read through, the space, the warm starts and the map are made ready, and
each kind of training takes one step.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asesearch.backbones.base import Backbone
from asesearch.backbones.device import check_memory
from asesearch.backbones.exit_weights import weight_sets
from asesearch.config import StudyConfig, TrainConfig
from asesearch.data import check_readable, open_data
from asesearch.errors import (
    AseSearchError,
    ConfigError,
    EvaluationError,
    first_line,
    is_out_of_memory,
)
from asesearch.finetuning import Depths, Trainer, draw_batch
from asesearch.finetuning.checkpoint import check_checkpoint_room
from asesearch.search.costs import elastic_depths
from asesearch.search.mapping import check_map
from asesearch.search.setup import warm_starts
from asesearch.search.warmup import needs_map
from asesearch.search.workbench import Workbench
from asesearch.study.directory import STUDY, check_study_dir

# of the training step on a CPU; a GPU, whose memory may not suffice, takes a whole batch
TRIED_IMAGES = 2
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preflight:
    """What was found to work.

    Attributes:
        checked: each in a few words.
        seconds: that it took, without the making of the workbench.
    """

    checked: tuple[str, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"checked": list(self.checked), "seconds": round(self.seconds, 3)}


def preflight(bench: Workbench, run_dir: Path | None = None) -> Preflight:
    """Make sure that a search can run to its end, as far as that can be known; nothing is left
    behind.

    Args:
        bench: of the study.
        run_dir: the study directory; None where it is not to be written.

    Raises:
        AseSearchError: what would have been refused later, with the section of the study file.
    """
    begun = time.perf_counter()
    samplers = ", ".join(map(str, bench.samplers))
    checked = [f"one image through {samplers}, and {bench.extractor.name}"]
    if bench.decoder is not None:
        checked.append("its latent through the decoder")
    for name, protocol in bench.protocols.named.items():
        images = f"{len(protocol.seeds)} x {protocol.num_samples} images"
        checked.append(f"{name} protocol: {protocol.metric_name}, {images}")
        classes = bench.backbone.num_classes
        if len(protocol.seeds) > 1 and protocol.num_samples < classes:
            _log.warning(
                "%s",
                f"the {images} of the {name} protocol are of other classes each time, as the "
                f"network has {classes:,}: what tells the classes apart counts as noise of its "
                f"scores; take a multiple of {classes:,} images, or repeats = 1",
            )
    check_training_seeds(bench.config)
    check_memory(
        bench.config.confirm.time_images,
        4 * math.prod(bench.data.shape),
        "the images of confirm.time_images",
        "lower it",
    )
    if run_dir is not None:
        check_study_dir(run_dir, bench.config.search.storage)
        if not (run_dir / STUDY).exists():  # one begun may have nothing left to train
            for config in filter(None, (bench.config.elastic, bench.config.train)):
                check_checkpoint_room(run_dir, weight_sets(bench.backbone)[-1], config)
        checked.append(f"{run_dir} can be written")
    check_readable(bench.data)
    checked.append(f"training data: {len(bench.data)} of {bench.data.name}")
    with _section("search"):
        checked.append(f"warm starts: {', '.join(warm_starts(bench.config, bench))}")
    if needs_map(bench):
        checked.append(_try_map(bench))
    checked += _try_training(bench)
    return Preflight(tuple(checked), time.perf_counter() - begun)


def check_training_seeds(config: StudyConfig) -> None:
    """Refuse further training seeds where points are not trained: no score would move.

    Raises:
        ConfigError: as said.
    """
    seeds = config.confirm.training_seeds
    if seeds > 1 and config.train.num_steps == 0:
        raise ConfigError(
            "confirm.training_seeds above 1 fine-tunes each point again under other seeds, for "
            f"which train.num_steps must be above 0; got {seeds} with train.num_steps 0; set "
            "training_seeds = 1, or train"
        )


def _try_map(bench: Workbench) -> str:
    """Open the map's images and check them against the network."""
    config = bench.config.map
    data = bench.data if config.data is None else open_data(config.data, "map.data")
    with _section("map"):
        check_map(bench.backbone, bench.backbone, data, bench.diffusion, config, bench.batch_size)
        if config.data is not None:
            check_readable(data)
    return f"map: {config.num_bins} bins of {config.num_images} images of {data.name}"


def _try_training(bench: Workbench) -> list[str]:
    """One step of each kind of training."""
    kinds: list[tuple[str, Depths, TrainConfig]] = [("train", bench.full, bench.config.train)]
    if bench.config.elastic is not None:
        with _section("elastic"):
            kinds.insert(0, ("elastic", elastic_depths(bench), bench.config.elastic))
    done = []
    for section, depths, config in kinds:
        if config.num_steps == 0:
            continue
        with _section(section):
            # a trial starts from the elastic weights, which lie beside the pretrained ones
            beside = bench.device.type == "cuda" and bench.config.elastic is not None
            held = weights_of_a_start(bench) if beside and section == "train" else None
            images = try_step(bench, depths, config)
            del held
        done.append(
            f"one step of [{section}] with {images} images, mixed_precision "
            f"{config.mixed_precision!r}"
        )
    return done


def weights_of_a_start(bench: Workbench) -> list[Backbone]:
    """Networks that take the memory of those that trials start from after the warm-up: before it,
    the weights for early exits are those for full depth."""
    return [copy.deepcopy(net) for net in weight_sets(bench.trials.start)]


def try_step(bench: Workbench, depths: Depths, config: TrainConfig) -> int:
    """One training step from the pretrained weights, thrown away; the number of its images.

    Raises:
        ConfigError: settings that can't be trained with on this machine.
        EvaluationError: a loss that is not finite.
    """
    trainer = Trainer(bench.backbone, bench.data, bench.diffusion, depths, config)
    world = trainer.part[1]
    images = config.batch_size
    if bench.device.type == "cpu":
        images = min(images, TRIED_IMAGES * world)
    trainer.config = config.model_copy(update={"batch_size": images})
    try:
        batch = draw_batch(
            bench.data, trainer.backbone, trainer.config, bench.diffusion, 0, trainer.part
        )
        loss = trainer.train_step(batch)[0].item()
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            where = "GPU" if bench.device.type == "cuda" else "machine"
            raise ConfigError(
                f"a step of {images} images does not fit the {where}'s memory; lower batch_size"
            ) from error
        if not config.compile or isinstance(error, AseSearchError):
            raise
        reason = first_line(error)
        raise ConfigError(
            f"the blocks can't be compiled here ({reason}); set compile = false"
        ) from error
    if not abs(loss) < float("inf"):
        raise EvaluationError(
            f"the pretrained network's first loss must be finite; got {loss}; check that the "
            "checkpoint fits [backbone] and [diffusion], or set mixed_precision = 'no'"
        )
    return images


@contextmanager
def _section(name: str) -> Iterator[None]:
    """Errors inside say which section of the study file they are about."""
    try:
        yield
    except AseSearchError as error:
        raise type(error)(f"[{name}] {error}") from error
