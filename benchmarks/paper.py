"""The paper's figures and tables on the shipped 18-block network, row by row, under one protocol,
with the cost of training counted.

One call measures one experiment into OUT/EXPERIMENT.jsonl. Killed, the same command goes on: what
is measured is not measured again, and rows under other settings are refused. Fine-tuned networks
lie in OUT/networks, for all experiments. `paper_page.py` draws what is there.

    python benchmarks/paper.py figure3 --elastic W.safetensors --out runs/paper
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from measuring import LEAST, machine, say
from paper_networks import Made, Networks
from paper_options import command_of, complete, depth_of, parsed, samplers_of, study_of
from paper_record import Line, Record, kind_of, score_of, sheet_of
from paper_rows import ADDED, FIXED, OWN, PRETRAINED, Choice, Row, pay

from asesearch.backbones.base import Backbone
from asesearch.backbones.checkpoints import load_backbone
from asesearch.backbones.digests import weights_fingerprint
from asesearch.backbones.exit_weights import ExitWeights
from asesearch.config import BackboneConfig
from asesearch.data import save_images
from asesearch.errors import (
    AseSearchError,
    ConfigError,
    EvaluationError,
    StudyError,
    TrainingDiverged,
)
from asesearch.evaluation.clock import compare_sampling_time
from asesearch.evaluation.cost import device_name
from asesearch.evaluation.features import to_uint8
from asesearch.locks import try_lock
from asesearch.point import Point
from asesearch.sampler import Sampler
from asesearch.schedule import ExitSchedule
from asesearch.search import Workbench
from asesearch.search.costs import elastic_depths

SHEET = 100  # images of a sheet


class Lab:
    """An experiment's parts, and how a row is measured.

    Args:
        args: of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        caches = tuple(f"+cache-{name}" for name in args.caches) or ADDED["cache"]
        self.choice = Choice(
            depth_of(args),
            tuple(args.samplers),
            tuple(args.schedules),
            args.rivals_from,
            not args.no_equal_compute,
            not args.no_published,
            () if args.compile_sampling else caches,
            tuple(args.fewer),
            args.kind,
            args.full_depth == "tuned",
        )
        self.bench = Workbench(study_of(args, samplers_of(args, self.choice)), args.out)
        elastic = BackboneConfig(kind=args.kind, checkpoint=str(args.elastic))
        start = load_backbone(elastic).to(self.bench.device).eval()
        self.bench.trials.start = self._start(start)
        self.networks = Networks(self.bench, args.out / "networks")
        protocols = self.bench.protocols
        stages = {"pick": protocols.search, "confirm": protocols.confirmation}
        # samplers are part of the rows, even where there is one alone
        self.protocols = {
            stage: replace(protocol, solver=None, num_steps=None)
            for stage, protocol in stages.items()
        }
        self.record = Record(args.out / f"{args.experiment}.jsonl", self._settings())

    def _start(self, net: Backbone) -> Backbone:
        """What own steps start from: the elastic weights, beside the pretrained ones where early
        exits have weights of their own."""
        if self.bench.config.search.own_exits:
            exits = net.exits if isinstance(net, ExitWeights) else net
            return ExitWeights(self.bench.backbone, exits).eval()
        if isinstance(net, ExitWeights):
            raise ConfigError(
                "these elastic weights make early exits alone; got --full-depth tuned; give "
                "--full-depth pretrained, or weights of a warm-up with full_depth = 'tuned'"
            )
        return net

    def _settings(self) -> dict[str, Line]:
        """What a row depends on besides itself, by `kind_of`."""
        args = self.args
        config = self.bench.config
        tuned = {
            "elastic_weights": weights_fingerprint(self.bench.trials.start),
            "warm_up": {
                "steps": args.elastic_steps,
                "batch_size": args.elastic_batch,
                "full_frac": args.elastic_full_frac,
            },
            "train": config.train.model_dump(mode="json", exclude={"checkpoint_every"}),
        }
        if args.elastic_min_exit_depth != LEAST:
            tuned["warm_up"]["min_exit_depth"] = args.elastic_min_exit_depth
        if config.search.own_exits:
            tuned["full_depth"] = config.search.full_depth
        shared = {
            "network": Path(args.network).name,
            "weights": weights_fingerprint(self.bench.backbone),
            "data": self.bench.data.digest,
            "time": {
                "images": args.time_images,
                "repeats": args.time_repeats,
                "batch": min(args.time_images, args.sample_batch),
            },
            "device": device_name(self.bench.device),
            "tiny": args.tiny,
        }
        if args.compile_sampling:  # rows of earlier releases told of it in their command alone
            shared["compile_sampling"] = True
        if args.kind != "dit":  # rows of the first release of this script told no kind
            shared |= {"kind": args.kind, "depth": self.choice.depth}
        found = {}
        for stage, protocol in self.protocols.items():
            found[kind_of(stage, PRETRAINED)] = {**shared, "protocol": protocol.to_dict()}
            found[kind_of(stage, OWN)] = {**found[kind_of(stage, PRETRAINED)], **tuned}
        return found

    def rows(self) -> Iterator[Row]:
        """The experiment's, those of `pay` as they are picked."""
        wanted = self.args.methods
        make = FIXED.get(self.args.experiment)
        if make is None:
            rows = pay(self.choice, self.found, self.args.tolerance)
            wanted = ["full", *wanted] if wanted else []  # what candidates are picked by
        else:
            rows = make(self.choice)
        return (row for row in rows if not wanted or {row.method, row.label} & set(wanted))

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
        elif "time_frac" not in line and (timed := self.timed(row, seed)):
            line = {**line, **timed}
            self.record.replace(line)
        if self.args.experiment == "figure1" and not seed:
            self.keep_sheet(row)
        return line

    def measure(self, row: Row, seed: int | None) -> Line:
        """Everything of a row under a training seed."""
        point = self.point(row)
        made = self.networks.of(row, seed or 0)
        begun = time.perf_counter()
        quality, seconds = self.bench.evaluate(made.net, point, self.protocols[row.stage])
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
            **self.timed(row, seed),
            "tuning": self.tuning(made),
            "seconds": {**seconds, "all": time.perf_counter() - begun},
            "machine": {**machine(), "load": os.getloadavg()[0]},
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "command": command_of(self.args),
            "settings": self.record.settings[kind_of(row.stage, row.recipe)],
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

    def timed(self, row: Row, seed: int | None) -> dict[str, Any]:
        """Whole-sampling time over the full network's, interleaved; of the first training seed, on
        fresh seeds."""
        if self.args.untimed or seed or row.stage != "confirm":
            return {}
        point = self.point(row)
        base = Point(self.bench.full, Sampler.from_string(row.against))
        if point == base:
            return {"time_frac": 1.0, "time_spread": 0.0}
        made = self.networks.of(row, 0)
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
            "time_load": os.getloadavg()[0],
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


def main(argv: list[str] | None = None) -> None:
    try:
        args = parsed(argv)
        args.out.mkdir(parents=True, exist_ok=True)
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
