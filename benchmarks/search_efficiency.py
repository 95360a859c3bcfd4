"""Hypervolume against compute: Optuna's random, TPE, NSGA-II and GP, each schedule fine-tuned from
the pretrained weights, against elastic warm-up, difficulty proposer and promotion.

One study a method and repeat, on the shipped network and images. Compute counts all arithmetic:
warm-up, map, fine-tuning and sampling. Warm starts that several baselines share are run once and
charged to each. Killed, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from efficiency_page import COVERED, RATIO, write_page
from measuring import Figure, add_full_depth, parse, publish, say

from asesearch.backbones.base import Backbone
from asesearch.config import StudyConfig, TrainConfig, parse_study
from asesearch.files import write_json
from asesearch.locks import waited_lock
from asesearch.point import Point
from asesearch.report.attainment import volume
from asesearch.schedule import ExitSchedule
from asesearch.score import EvaluationResult, Protocol
from asesearch.search import Workbench, run_trials
from asesearch.search.confirmation import load_trial
from asesearch.search.protocols import FRESH_SEEDS
from asesearch.search.trials import Outcome, Trials
from asesearch.study import Study
from asesearch.study.records import RECORD, REFERENCE_QUALITY, REFERENCE_TIME, TrialRecord

RIVALS = ("random", "tpe", "nsga2", "gp")
OURS = "difficulty"
METHODS = (OURS, *RIVALS)
PUBLISHED = ("D2-DiT", "D3-DiT", "D4-DiT", "D7-DiT")
TRAIN: dict[str, Any] = {
    "batch_size": 32,
    "lr": 8e-4,
    "warmup_steps": 10,
    "ema_decay": 0.9,
    "min_snr_gamma": 5.0,
    "checkpoint_every": 1000,
    "loss_weight": {"shape": "none"},
}


def study_of(method: str, repeat: int, args: argparse.Namespace) -> StudyConfig:
    """The study of one method: all but the way of searching is the same.

    Where early exits have weights of their own, all methods distil them from the pretrained
    network: that recipe is no part of the search. Where not, the baselines learn from images.
    """
    ours = method == OURS
    own_exits = args.full_depth == "pretrained"
    tiny = args.tiny
    evaluation = {
        "extractor": "fashion-cnn",
        "num_samples": 80 if tiny else 300,
        "repeats": 2,
        "seed": 10_000 * (repeat + 1),
    }
    data: dict[str, Any] = {
        "name": f"{method}-{repeat}",
        "backbone": {"kind": "dit", "checkpoint": args.network},
        "data": {"kind": "fashion-mnist", "split": "test"},
        "train": {**TRAIN, "num_steps": args.own_steps if ours else args.steps, "seed": repeat},
        "sampling": {"solver": "dpm++2m-quadratic", "num_steps": 8},
        "evaluation": {**evaluation, "reference": {"kind": "fashion-mnist", "split": "train"}},
        "search": {
            "proposer": method,
            "num_trials": args.own_trials if ours else args.trials,
            "num_intervals": 10,
            "min_exit_depth": 2,
            "seed": repeat,
            "cost": "flops",
            "full_depth": args.full_depth,
            "keep_weights": "front",
            "warm_start": ["full", *PUBLISHED],
        },
    }
    if own_exits:
        data["train"]["distill_frac"] = 1.0
    if ours:
        elastic = {
            "num_steps": args.elastic_steps,
            "lr": 1e-3,
            "ema_decay": 0.98,
            "distill_frac": 1.0,
            "full_frac": 0.8 if own_exits else 0.5,
            "seed": repeat,
        }
        data["elastic"] = {
            **TRAIN,
            **elastic,
            "depth_distribution": "noise-easy",
            "warmup_steps": 20,
        }
        data["map"] = {"num_bins": 10, "num_images": 32, "seed": repeat}
        data["train"] = {**data["train"], "distill_frac": 1.0, "ema_decay": 0.8}
        data["promotion"] = {
            "num_samples": 80 if tiny else 100,
            "repeats": 2,
            "explore": args.explore,
        }
        data["search"]["warm_start"] = ["full"]
    return parse_study(data, "search_efficiency")


class SharedTrials(Trials):
    """Trials that the baselines of one repeat share, with a full network that is tuned alike for
    all; where early exits have weights of their own it is not tuned."""

    def __init__(self, bench: Workbench, shared: Path | None, full_train: TrainConfig) -> None:
        super().__init__(bench, bench.costs)
        self.shared = shared
        self.full_train = full_train

    def tuning(
        self, schedule: ExitSchedule, training_seed: int = 0
    ) -> tuple[Backbone, TrainConfig]:
        if schedule.is_full and not self.parts.config.search.own_exits:
            return self.parts.backbone, self.full_train
        return super().tuning(schedule, training_seed)

    def try_point(self, point: Point, folder: Path) -> Outcome:
        if self.shared is None:
            return super().try_point(point, folder)
        path = self.shared / folder.name
        with waited_lock(path / "trying.lock", f"tries {point}"):
            if not (path / "outcome.json").is_file():
                outcome = super().try_point(point, path)
                write_json(
                    path / "outcome.json", {**vars(outcome), "quality": outcome.quality.to_dict()}
                )
        shutil.copytree(path, folder, dirs_exist_ok=True)
        stored = json.loads((path / "outcome.json").read_text())
        return Outcome(**{**stored, "quality": EvaluationResult.from_dict(stored["quality"])})


def run_one(method: str, repeat: int, work: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One study, begun or gone on with, and its front on fresh seeds."""
    config = study_of(method, repeat, args)
    run_dir = work / config.name
    done = run_dir / "result.json"
    if done.is_file():
        return json.loads(done.read_text())  # type: ignore[no-any-return]
    shared = None if method == OURS else work / f"shared-{repeat}"
    bench = Workbench(config, run_dir)
    bench.trials = SharedTrials(bench, shared, study_of("random", repeat, args).train)
    study = Study(config, run_dir)
    run_trials(
        study,
        bench,
        lambda r: say(
            f"  {config.name} #{r.number} {r.schedule}: {r.quality.value if r.quality else r.state}"
        ),
    )
    results = study.results()
    fresh = fresh_scores(study, bench, list(results.front()))
    extra = sum(results.warm_up.get("gflops", {}).values())
    rows = rows_of(study)
    result = {
        "method": method,
        "repeat": repeat,
        "warm_up_gflops": extra,
        "trials": rows,
        "fresh": fresh,
    }
    write_json(done, result)
    return result


def rows_of(study: Study) -> list[dict[str, Any]]:
    """Trials as plain data, in order; one that was stopped and came again has two rows, each with
    what was spent in it."""
    spent: dict[Point, float] = {}
    rows = []
    for trial in study.optuna.get_trials(deepcopy=False):
        if RECORD in trial.user_attrs:
            record = TrialRecord.from_dict(
                json.loads(trial.user_attrs[RECORD]), study.config.sampling.sampler
            )
            total = sum(record.gflops.values())
            rows.append(
                {
                    "number": record.number,
                    "origin": record.origin,
                    "schedule": str(record.schedule),
                    "state": record.state,
                    "quality": None if record.quality is None else record.quality.value,
                    "cost": record.flops_frac,
                    "gflops": total - spent.get(record.point, 0.0),
                }
            )
            spent[record.point] = total
    return rows


def fresh_scores(study: Study, bench: Workbench, front: list[TrialRecord]) -> list[dict[str, Any]]:
    """The front's points on seeds that no search has seen, others in each repeat."""
    first = FRESH_SEEDS + 10_000 * study.config.search.seed
    seeds = tuple(first + 1000 * i for i in range(2))
    protocol: Protocol = type(bench.protocols.search)(
        **{**vars(bench.protocols.search), "seeds": seeds}
    )
    out = []
    for record in front:
        quality, _ = bench.evaluate(load_trial(study, record, bench.device), record.point, protocol)
        out.append(
            {"schedule": str(record.schedule), "cost": record.flops_frac, "quality": quality.value}
        )
    return out


def hypervolume(points: list[tuple[float, float]], full_quality: float) -> float:
    """Area in relative cost × logarithm of the score that the points dominate below 1.1 times the
    full network's cost, twice its score."""
    found = np.array([(cost, math.log(quality)) for cost, quality in points]).reshape(-1, 2)
    return volume(found, (REFERENCE_TIME, math.log(REFERENCE_QUALITY * full_quality)))


def curve(result: dict[str, Any], full_quality: float) -> list[tuple[float, float]]:
    """(GFLOPs spent, hypervolume of high-fidelity scores) after each trial."""
    spent = result["warm_up_gflops"]
    points = []
    out = [(result["warm_up_gflops"], 0.0)]
    for trial in result["trials"]:
        spent += trial["gflops"]
        if trial["quality"] is not None:
            points.append((trial["cost"], trial["quality"]))
        out.append((spent, hypervolume(points, full_quality)))
    return out


def reached_at(points: list[tuple[float, float]], level: float) -> float:
    """Compute at which a curve first reaches a level; infinite if never."""
    return next((spent for spent, volume in points if volume >= level), math.inf)


def compare(results: list[dict[str, Any]]) -> tuple[list[Figure], dict[str, Any]]:
    """Figures of all repeats."""
    repeats = sorted({r["repeat"] for r in results})
    curves: dict[str, list[list[tuple[float, float]]]] = {}
    ratios = []
    both = []
    fresh = {}
    final = {}
    covered = []
    published = []
    for repeat in repeats:
        own = {r["method"]: r for r in results if r["repeat"] == repeat}
        full = next(t["quality"] for t in own[RIVALS[0]]["trials"] if t["origin"] == "full")
        for method, result in own.items():
            curves.setdefault(method, []).append(curve(result, full))
            final.setdefault(method, []).append(curves[method][-1][-1][1])
            points = [(p["cost"], p["quality"]) for p in result["fresh"]]
            fresh.setdefault(method, []).append(hypervolume(points, full))
        best = max(RIVALS, key=lambda m: final[m][-1])
        total = curves[best][-1][-1][0]
        ours_at = reached_at(curves[OURS][-1], final[best][-1])
        ratios.append(ours_at / total)
        both.append(ours_at / reached_at(curves[best][-1], final[best][-1]))
        covered.append(dominated(own[OURS]["fresh"], own[best]["fresh"]))
        warm = [t for t in own[RIVALS[0]]["trials"] if t["origin"] in PUBLISHED]
        published.append(
            dominated([t for t in own[OURS]["trials"] if t["quality"] is not None], warm)
        )
    figures = [
        Figure(
            RATIO,
            float(np.median(ratios)),
            "x",
            half(ratios),
            "<= 0.15",
        ),
        Figure(
            "the same over what it took to get there",
            float(np.median(both)),
            "x",
            half(both),
        ),
        Figure(
            COVERED,
            float(np.mean(covered)),
            "",
            half(covered),
            ">= 1",
        ),
        Figure(
            "share of the published schedules that ours dominates",
            float(np.mean(published)),
            "",
            half(published),
            ">= 1",
        ),
    ]
    for method in (*RIVALS, OURS):
        figures.append(
            Figure(
                f"hypervolume, fresh seeds: {method}",
                float(np.mean(fresh[method])),
                "",
                half(fresh[method]),
            )
        )
    for method in (*RIVALS, OURS):
        spent = [c[-1][0] / 1000 for c in curves[method]]
        figures.append(Figure(f"compute: {method}", float(np.mean(spent)), "TFLOP", half(spent)))
    return figures, {
        "curves": curves,
        "fresh_hypervolume": fresh,
        "final_hypervolume": final,
        "compute_ratios": ratios,
        "compute_ratios_to_first_reach": both,
    }


def dominated(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> float:
    """Share of their points (the full network's left out) that one of ours is at least as good as
    in both objectives."""
    baselines = [p for p in theirs if p["cost"] < 1]
    hit = [
        any(o["cost"] <= p["cost"] + 1e-9 and o["quality"] <= p["quality"] for o in ours)
        for p in baselines
    ]
    return float(np.mean(hit)) if hit else math.nan


def half(values: list[float]) -> float:
    """Half the range over the repeats."""
    return (max(values) - min(values)) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--repeats",
        type=int,
        default=3,
        help="training, sampling and search seeds (default %(default)s)",
    )
    parser.add_argument(
        "--trials", type=int, default=24, help="of a baseline (default %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=200, help="of a baseline's fine-tuning (default %(default)s)"
    )
    parser.add_argument(
        "--own-trials",
        type=int,
        default=24,
        help="of ours, stopped ones included (default %(default)s)",
    )
    parser.add_argument(
        "--explore",
        type=int,
        default=10,
        help="of ours, that belong to the exploration phase (default %(default)s)",
    )
    parser.add_argument(
        "--own-steps",
        type=int,
        default=40,
        help="of ours, from the elastic weights (default %(default)s)",
    )
    parser.add_argument(
        "--elastic-steps", type=int, default=300, help="of the warm-up (default %(default)s)"
    )
    parser.add_argument(
        "--network",
        default="shipped:fashion-mnist-dit",
        help="pretrained weights (default %(default)s)",
    )
    add_full_depth(parser)
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=METHODS, help="run these studies alone"
    )
    parser.add_argument(
        "--first", type=int, default=0, help="begin at this repeat: processes can share the work"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("runs/search-efficiency"), help="folder of the studies"
    )
    parser.add_argument("--report", type=Path, help="folder for the page, its figures and tables")
    parser.add_argument(
        "--tiny", action="store_true", help="few steps and images, to see that the script runs"
    )
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    parser.set_defaults(batch=32, quick=False)
    args = parse(parser)
    if args.tiny:
        args.trials = 5
        args.own_trials = 5
        args.steps = 3
        args.own_steps = 3
        args.elastic_steps = 3
    results = []
    for repeat in range(args.first, args.repeats):
        for method in args.methods:
            say(f"{method}, repeat {repeat}")
            results.append(run_one(method, repeat, args.work, args))
    if args.first or set(args.methods) != set(METHODS):
        say("a part of the studies: run again without --first and --methods to compare them")
        return
    figures, raw = compare(results)
    if args.report is not None:
        write_page(args.report, figures, raw, results, args)
    publish("search_efficiency", args, figures, {**raw, "results": results})


if __name__ == "__main__":
    main()
