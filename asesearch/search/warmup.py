"""What a study makes once and all its workers share: the elastic weights that serve every schedule,
and the difficulty map.

One worker makes it, the others wait for it (a lock that a dying process gives back), the first of
them after it has fine-tuned the full network, which needs nothing of it; killed, it goes on from
its checkpoint.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from asesearch.backbones.base import Backbone
from asesearch.backbones.checkpoints import load_saved
from asesearch.backbones.saving import save_backbone
from asesearch.data import open_data
from asesearch.files import write_json
from asesearch.finetuning import CHECKPOINT, finetune
from asesearch.locks import try_lock, waited_lock
from asesearch.search.costs import elastic_depths
from asesearch.search.mapping import measure_map
from asesearch.search.trials import BEGUN_AGAIN, first_start
from asesearch.search.workbench import Workbench
from asesearch.study import directory
from asesearch.study.difficulty import DifficultyMap
from asesearch.study.directory import read_state
from asesearch.study.records import shortened

LOCK = "warm-up.lock"


@dataclass
class WarmUp:
    """What the warm-up gave.

    Attributes:
        start: weights that every trial's fine-tuning starts from: the elastic ones, or the
            pretrained.
        difficulty_map: of `start` against the pretrained network; None where nothing needs it.
        seconds, gflops: spent on "elastic" and "map".
        losses: of the elastic warm-up.
    """

    start: Backbone
    difficulty_map: DifficultyMap | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    gflops: dict[str, float] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)


def needs_map(bench: Workbench) -> bool:
    """Whether the study's proposer or promotion uses the difficulty map."""
    return bench.config.search.proposer == "difficulty" or bench.config.promotion is not None


def is_being_made(bench: Workbench, run_dir: Path) -> bool:
    """Whether another worker is at the study's elastic weights."""
    if bench.config.elastic is None or (run_dir / directory.ELASTIC_WEIGHTS).exists():
        return False
    with try_lock(run_dir / LOCK) as free:
        return not free


def warm_up(
    bench: Workbench, run_dir: Path, on_step: Callable[[int, float], None] | None = None
) -> WarmUp:
    """Make or load the study's elastic weights and difficulty map, and let the bench start its
    trials from them.

    Raises:
        TrainingDiverged: the warm-up; nothing can be searched then.
        StudyError: files of an earlier warm-up that can't be read.
    """
    made = WarmUp(first_start(bench))
    if bench.config.elastic is None and not needs_map(bench):
        return made
    run_dir.mkdir(parents=True, exist_ok=True)
    with waited_lock(run_dir / LOCK, "makes the warm-up"):
        _read_cost(made, run_dir / directory.WARM_UP)
        if bench.config.elastic is not None:
            made.start = _elastic(bench, run_dir, made, on_step)
        if needs_map(bench):
            made.difficulty_map = _map(bench, run_dir, made)
    bench.trials.start = made.start
    return made


def _read_cost(made: WarmUp, path: Path) -> None:
    def take(stored: dict[str, Any]) -> bool:
        made.seconds = dict(stored["seconds"])
        made.gflops = dict(stored["gflops"])
        made.losses = list(stored["losses"])
        return True

    read_state(path, take, "what the warm-up took counts as nothing")


def _elastic(
    bench: Workbench, run_dir: Path, made: WarmUp, on_step: Callable[[int, float], None] | None
) -> Backbone:
    path = run_dir / directory.ELASTIC_WEIGHTS
    config = bench.config.elastic
    assert config is not None
    if not directory.is_whole(path, "the elastic warm-up is done again"):
        depths = elastic_depths(bench)
        folder = run_dir / directory.ELASTIC
        directory.drop_damaged(folder / CHECKPOINT, BEGUN_AGAIN)
        teacher = bench.backbone if config.distill_frac > 0 else None
        start = first_start(bench)
        tuned = finetune(
            start, bench.data, bench.diffusion, depths, config, folder, teacher, on_step
        )
        made.seconds["elastic"] = tuned.seconds
        made.losses = shortened(tuned.losses)
        made.gflops["elastic"] = bench.costs.training_gflops(depths, config)
        write_json(run_dir / directory.WARM_UP, _cost_of(made))
        save_backbone(tuned.backbone, path, {"elastic_depths": json.dumps(depths.to_dict())})
        (folder / CHECKPOINT).unlink(missing_ok=True)
    return load_saved(path, bench.config.backbone.kind, bench.device)


def _map(bench: Workbench, run_dir: Path, made: WarmUp) -> DifficultyMap:
    path = run_dir / directory.MAP
    config = bench.config.map
    if (
        stored := read_state(path, DifficultyMap.from_dict, "the map is measured again")
    ) is not None:
        return stored
    data = bench.data if config.data is None else open_data(config.data, "map.data")
    start = time.perf_counter()
    found = measure_map(
        made.start, data, bench.diffusion, config, bench.backbone, bench.config.sampling.batch_size
    )
    made.seconds["map"] = time.perf_counter() - start
    calls = 3 * bench.costs.flops[-1]  # all exits in one call and a little, and the reference's
    made.gflops["map"] = config.num_bins * found.num_images * calls / 1e9
    write_json(run_dir / directory.WARM_UP, _cost_of(made))
    write_json(path, found.to_dict())
    return found


def _cost_of(made: WarmUp) -> dict[str, Any]:
    return {"seconds": made.seconds, "gflops": made.gflops, "losses": made.losses}
