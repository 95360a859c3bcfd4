"""The paper's figures and tables on the shipped 18-block network, row by row, under one protocol,
with the cost of training counted.

One call measures one experiment into OUT/EXPERIMENT.jsonl. Killed, the same command goes on: what
is measured is not measured again, and rows under other settings are refused. Fine-tuned networks
lie in OUT/networks, for all experiments. `paper_page.py` draws what is there.

    python benchmarks/paper.py figure3 --elastic W.safetensors --out runs/paper
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from measuring import machine, say, wake
from paper_networks import Made, Networks
from paper_record import Line, Record, score_of, sheet_of
from paper_rows import ADDED, EXPERIMENTS, FIXED, OWN, PAY, PRETRAINED, Choice, Row, offered, pay

from asesearch.backbones import DiT, save_backbone
from asesearch.backbones.checkpoints import inspect_checkpoint, load_backbone
from asesearch.backbones.digests import weights_fingerprint
from asesearch.config import BackboneConfig, StudyConfig, parse_study
from asesearch.data import save_images
from asesearch.errors import (
    AseSearchError,
    ConfigError,
    EvaluationError,
    StudyError,
    TrainingDiverged,
)
from asesearch.evaluation.cost import compare_sampling_time, device_name
from asesearch.evaluation.features import to_uint8
from asesearch.point import Point
from asesearch.sampler import Sampler
from asesearch.schedule import ExitSchedule
from asesearch.search import Workbench
from asesearch.search.warmup import elastic_depths
from asesearch.study.workers import try_lock

NETWORK = "shipped:fashion-mnist-dit-18"
SHEET = 100  # images of a sheet
#: Own steps, as `recipes.py` has them; what the command line says comes on top.
TRAIN: dict[str, Any] = {
    "warmup_steps": 10,
    "ema_decay": 0.98,
    "min_snr_gamma": 5.0,
    "distill_frac": 1.0,
    "loss_weight": {"shape": "none"},
    "checkpoint_every": 100,
}
TINY = {
    "num_samples": 70,
    "repeats": 2,
    "pick_samples": 70,
    "own_steps": 1,
    "own_batch": 8,
    "time_images": 2,
    "time_repeats": 1,
    "elastic_steps": 9,
    "elastic_batch": 8,
    "split": "test",
}
TINY_SHAPE = {"hidden_size": 8, "num_heads": 1, "patch_size": 14}


class Lab:
    """An experiment's parts, and how a row is measured.

    Args:
        args: of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.choice = Choice(
            depth_of(args), tuple(args.samplers), tuple(args.schedules), args.rivals_from
        )
        self.bench = Workbench(study_of(args, samplers_of(args, self.choice)), args.out)
        elastic = BackboneConfig(kind="dit", checkpoint=str(args.elastic))
        self.bench.trials.start = load_backbone(elastic).to(self.bench.device).eval()
        self.networks = Networks(self.bench, args.out / "networks")
        protocols = self.bench.protocols
        stages = {"pick": protocols.search, "confirm": protocols.confirmation}
        # samplers are part of the rows, even where there is one alone
        self.protocols = {
            stage: replace(protocol, solver=None, num_steps=None)
            for stage, protocol in stages.items()
        }
        self.record = Record(args.out / f"{args.experiment}.jsonl", self._settings())

    def _settings(self) -> dict[str, Line]:
        """What a row depends on besides itself, by stage."""
        args = self.args
        config = self.bench.config
        shared = {
            "network": Path(args.network).name,
            "weights": weights_fingerprint(self.bench.backbone),
            "elastic_weights": weights_fingerprint(self.bench.trials.start),
            "warm_up": {
                "steps": args.elastic_steps,
                "batch_size": args.elastic_batch,
                "full_frac": args.elastic_full_frac,
            },
            "train": config.train.model_dump(mode="json", exclude={"checkpoint_every"}),
            "data": self.bench.data.digest,
            "time": {"images": args.time_images, "repeats": args.time_repeats},
            "device": device_name(self.bench.device),
            "tiny": args.tiny,
        }
        return {
            stage: {**shared, "protocol": protocol.to_dict()}
            for stage, protocol in self.protocols.items()
        }

    def rows(self) -> Iterator[Row]:
        """The experiment's, those of `pay` as they are picked."""
        wanted = self.args.methods
        make = FIXED.get(self.args.experiment)
        if make is None:
            rows = pay(self.choice, self.found, self.args.tolerance)
        else:
            rows = make(self.choice)
        return (row for row in rows if not wanted or row.method in wanted)

    def found(self, row: Row) -> tuple[float, float]:
        """Score and relative FLOPs of a row that is measured."""
        line = self.record.find(row, 0 if row.trained else None)
        if line is None:  # it failed
            return math.inf, math.inf
        return score_of(line).value, line["flops_frac"]

    def run(self) -> None:
        """Measure what is not on record; a row that fails is said, and left for the next call."""
        for row in self.rows():
            again = self.args.training_seeds if row.stage == "confirm" else 1
            for seed in range(again) if row.trained else (None,):
                said = "" if seed is None else f", training seed {seed}"
                name = f"{row.sampler:20} {row.label} ({row.recipe}{said}), {row.stage}"
                try:
                    say(f"{name}: {score_of(self.line(row, seed)).value:.3f}")
                except (TrainingDiverged, EvaluationError) as error:
                    say(f"{name}: not measured: {error}")

    def line(self, row: Row, seed: int | None) -> Line:
        """From the record, or measured now."""
        line = self.record.find(row, seed)
        if line is None:
            line = self.measure(row, seed)
            self.record.add(line)
        if self.args.experiment == "figure1" and not seed:
            self.keep_sheet(row)
        return line

    def measure(self, row: Row, seed: int | None) -> Line:
        """Everything of a row under a training seed."""
        point = self.point(row)
        made = self.networks.of(row, seed or 0)
        begun = time.perf_counter()
        quality, seconds = self.bench.evaluate(made.net, point, self.protocols[row.stage])
        timed = self.timed(row, made) if not seed and row.stage == "confirm" else {}
        return {
            "experiment": self.args.experiment,
            "row": row.to_dict(),
            "training_seed": seed,
            "score": quality.value,
            "std_error": quality.std_error,
            "values": list(quality.values),
            "num_samples": quality.protocol.num_samples,
            "seeds": list(quality.protocol.seeds),
            **self.relative(row),
            **timed,
            "tuning": self.tuning(made),
            "seconds": {**seconds, "all": time.perf_counter() - begun},
            "machine": {**machine(), "load": os.getloadavg()[0]},
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "command": command_of(self.args),
            "settings": self.record.settings[row.stage],
        }

    def point(self, row: Row) -> Point:
        """What a row samples."""
        schedule = ExitSchedule.from_string(row.schedule, self.choice.depth)
        return Point(schedule, Sampler.from_string(row.sampler))

    def relative(self, row: Row) -> dict[str, float]:
        """Costs over the full network's under the sampler it is compared at."""
        costs = self.bench.costs
        base = costs.fracs(Point(self.bench.full, Sampler.from_string(row.against)))
        own = costs.fracs(self.point(row))
        names = ("predicted_time_frac", "flops_frac", "block_frac")
        return {name: a / b for name, a, b in zip(names, own, base, strict=True)}

    def timed(self, row: Row, made: Made) -> dict[str, Any]:
        """Whole-sampling time over the full network's, interleaved."""
        point = self.point(row)
        base = Point(self.bench.full, Sampler.from_string(row.against))
        if point == base:
            return {"time_frac": 1.0, "time_spread": 0.0}
        seeds = range(self.args.time_images)
        ratio = compare_sampling_time(
            lambda: self.bench.sample(made.net, point, seeds),
            lambda: self.bench.sample(self.bench.backbone, base, seeds),
            self.args.time_repeats,
        )
        return {
            "time_frac": ratio.median,
            "time_spread": ratio.spread,
            "time_pairs": [list(pair) for pair in ratio.pairs],
        }

    def tuning(self, made: Made) -> dict[str, Any]:
        """What training cost: a row's own steps, and the warm-up that all share."""
        config = self.bench.config.elastic
        assert config is not None
        warm = self.bench.costs.training_gflops(elastic_depths(self.bench), config)
        return {
            "own_gflops": made.gflops,
            "own_seconds": made.seconds,
            "own_on": made.on,
            "warm_up_gflops": warm if made.warmed else 0.0,
            "warm_up_seconds": self.args.elastic_seconds if made.warmed else 0.0,
        }

    def keep_sheet(self, row: Row) -> None:
        """Images of the first seeds, a column a class."""
        path = self.args.out / sheet_of(row.to_dict())
        if not path.is_file():
            net = self.networks.of(row, 0).net
            count = 20 if self.args.tiny else SHEET
            images = self.bench.sample(net, self.point(row), range(count)).images
            save_images(to_uint8(images).numpy(), path)


# -- the command line ----------------------------------------------------------------------------


def depth_of(args: argparse.Namespace) -> int:
    """Blocks of the network."""
    return load_backbone(BackboneConfig(kind="dit", checkpoint=args.network)).depth


def samplers_of(args: argparse.Namespace, choice: Choice) -> list[str]:
    """All samplers of an experiment, by name.

    Raises:
        ConfigError: one that this release does not have.
    """
    for name in choice.samplers:
        if not offered(name):
            raise ConfigError(
                f'--samplers are written SOLVER-STEPS; got {name!r}; write for example "ddim-50"'
            )
    if args.experiment in FIXED:
        rows = FIXED[args.experiment](choice)
        return list(dict.fromkeys(name for row in rows for name in (row.against, row.sampler)))
    added = ("", *ADDED["cache"])
    names = [base + suffix for base in choice.samplers or PAY for suffix in added]
    return list(filter(offered, names))


def study_of(args: argparse.Namespace, samplers: list[str]) -> StudyConfig:
    """The study whose parts an experiment uses."""
    first = Sampler.from_string(samplers[0])
    images = args.elastic_steps * args.elastic_batch
    tuning = {**TRAIN, "batch_size": args.own_batch, "lr": args.own_lr}
    warm_up = {
        "num_steps": max(1, round(images / args.own_batch)),  # the same images in own batches
        "full_frac": args.elastic_full_frac,
        "depth_distribution": "noise-easy",
    }
    return parse_study(
        {
            "name": "paper",
            "backbone": {"kind": "dit", "checkpoint": args.network},
            "data": {"kind": "fashion-mnist", "split": args.split},
            "train": {**tuning, "num_steps": args.own_steps},
            "elastic": {**tuning, **warm_up},
            "sampling": {
                "solver": first.solver,
                "num_steps": first.num_steps,
                "batch_size": args.sample_batch,
                "precision": args.precision,
            },
            "evaluation": {
                "extractor": "fashion-cnn",
                "num_samples": args.pick_samples,
                "reference": {"kind": "fashion-mnist", "split": "train"},
            },
            "confirm": {"num_samples": args.num_samples, "repeats": args.repeats},
            "search": {"samplers": samplers[1:], "cost": "flops", "min_exit_depth": 2},
        },
        "paper",
    )


def options() -> argparse.ArgumentParser:
    """What the command line takes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("experiment", choices=EXPERIMENTS)
    add("--network", default=NETWORK, help="pretrained weights (default %(default)s)")
    add("--elastic", type=Path, help="weights of the warm-up, as recipes.py --keep writes them")
    add("--out", type=Path, required=True, help="folder of rows and networks")
    add("--num-samples", type=int, default=5000, help="images a seed set (default %(default)s)")
    add("--repeats", type=int, default=3, help="seed sets (default %(default)s)")
    add("--training-seeds", type=int, default=1, help="of own steps (default %(default)s)")
    add("--pick-samples", type=int, default=1000, help="images that `pay` picks by")
    add("--tolerance", type=float, default=0.05, help="`pay`: how much worse a pick may score")
    add("--samplers", nargs="*", default=[], help="in place of the experiment's own")
    add(
        "--methods", nargs="*", default=[], help="measure these alone: full, exits, steps, cache, …"
    )
    add("--schedules", nargs="*", default=[], help="further exit schedules, each in quotes")
    add(
        "--rivals-from",
        choices=[PRETRAINED, OWN],
        default=PRETRAINED,
        help="full network of "
        "methods without training: as it is, or after equal-compute fine-tuning",
    )
    add("--own-steps", type=int, default=200, help="of a schedule (default %(default)s)")
    add("--own-batch", type=int, default=128, help="images a step (default %(default)s)")
    add("--own-lr", type=float, default=6e-4, help="learning rate (default %(default)s)")
    add("--elastic-steps", type=int, help="of the warm-up, where its weights do not tell")
    add("--elastic-batch", type=int, help="images a step of the warm-up, likewise")
    add("--elastic-full-frac", type=float, help="its share at full depth, likewise")
    add("--elastic-seconds", type=float, help="what it took, likewise; unknown if not given")
    add("--time-images", type=int, default=64, help="images of a timed sampling")
    add("--time-repeats", type=int, default=5, help="timed pairs (default %(default)s)")
    add("--sample-batch", type=int, default=100, help="images at a time (default %(default)s)")
    add("--precision", choices=["float32", "tf32", "bf16"], default="float32")
    add("--split", choices=["train", "test"], default="train", help="images to fine-tune on")
    add("--tiny", action="store_true", help="a tiny network, to see that the script runs")
    return parser


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """With what --tiny and the weights of the warm-up say.

    Raises:
        ConfigError: a warm-up whose cost is not known.
    """
    if args.tiny:
        vars(args).update(TINY)
        args.network = str(tiny_network(args.out / "tiny.safetensors", 0))
        args.elastic = tiny_network(args.out / "tiny-elastic.safetensors", 1)
    if args.elastic is None:
        raise ConfigError(
            "schedules are fine-tuned from elastic weights; got none; make some with `python "
            "benchmarks/recipes.py … --keep W.safetensors` and give --elastic W.safetensors"
        )
    told = json.loads(inspect_checkpoint(args.elastic).metadata.get("warm_up", "{}"))
    fields = {"steps": "num_steps", "batch": "batch_size", "full_frac": "full_frac"}
    for option, field in {**fields, "seconds": "seconds"}.items():
        name = f"elastic_{option}"
        if getattr(args, name) is None:
            setattr(args, name, told.get(field))
    if args.elastic_full_frac is None:
        args.elastic_full_frac = 0.5
    if args.elastic_steps is None or args.elastic_batch is None:
        raise ConfigError(
            "the warm-up's compute is counted, and the full network is fine-tuned for as much; "
            f"{args.elastic} does not tell its steps; give --elastic-steps and --elastic-batch"
        )
    return args


def tiny_network(path: Path, seed: int) -> Path:
    """A tiny network of as many blocks for the same images."""
    if not path.is_file():
        shape = load_backbone(BackboneConfig(kind="dit", checkpoint=NETWORK)).config
        net = DiT(**{**shape, **TINY_SHAPE})
        wake(net, seed)
        save_backbone(net, path, {})
    return path


def command_of(args: argparse.Namespace) -> str:
    """The command, with the names of files alone."""
    words = ["python benchmarks/paper.py", args.experiment]
    for action in options()._actions:
        given = getattr(args, action.dest, None)
        if not action.option_strings or given in (None, False, [], action.default):
            continue
        words.append(action.option_strings[0])
        values = given if isinstance(given, list) else [] if given is True else [given]
        names = (v.name if isinstance(v, Path) else Path(str(v)).name for v in values)
        words += [f"'{name}'" if " " in name else name for name in names]
    return " ".join(words)


def main(argv: list[str] | None = None) -> None:
    args = options().parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        with try_lock(args.out / "locks" / f"{args.experiment}.lock") as mine:
            if not mine:
                raise StudyError(
                    f"one process measures an experiment; another is at {args.experiment} in "
                    f"{args.out}; wait for it, or give another --out"
                )
            Lab(complete(args)).run()
    except AseSearchError as error:
        sys.exit(f"paper.py: {error}")


if __name__ == "__main__":
    main()
