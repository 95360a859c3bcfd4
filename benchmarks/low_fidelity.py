"""Which low-fidelity score predicts the full protocol, and what a fine-tuning is best done with.

One part a question: `predict` compares low-fidelity scores of schedules with their figure after the
longest fine-tuning, by rank; `ablate` compares ways of fine-tuning after equal compute;
`low-fidelity` compares scores that exist for fewer images than features. Killed, the same command
goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from measuring import Figure, parse, publish, say
from scipy.stats import spearmanr
from torch import Tensor

from asesearch.backbones.base import Backbone
from asesearch.backbones.checkpoints import load_backbone
from asesearch.backbones.saving import save_backbone
from asesearch.config import (
    BackboneConfig,
    ElasticConfig,
    LossWeight,
    MapConfig,
    StudyConfig,
    TrainConfig,
    parse_study,
)
from asesearch.evaluation.distances import frechet_distance, kernel_distance, projected_distance
from asesearch.evaluation.extractors import make_extractor, register_extractor
from asesearch.evaluation.fashion_cnn import FashionCNN
from asesearch.evaluation.features import extract_features, to_uint8
from asesearch.evaluation.fidelity import build_protocol
from asesearch.evaluation.references import ReferenceStats, reference_statistics
from asesearch.files import write_json
from asesearch.finetuning import finetune
from asesearch.point import Point
from asesearch.schedule import ElasticDepths, ExitSchedule
from asesearch.search import Workbench
from asesearch.search.mapping import measure_map
from asesearch.study.difficulty import DifficultyMap

RESULTS = (
    Path(__file__).parent.parent / "reports" / "search-efficiency" / "low-fidelity-scores.json"
)
SHORT = {"min_snr_gamma": 5.0, "batch_size": 32, "loss_weight": {"shape": "none"}}


def study(args: argparse.Namespace) -> StudyConfig:
    """The shipped network and images; eight second-order steps, which are as good as fifty of
    DDIM."""
    return parse_study(
        {
            "name": "low-fidelity",
            "backbone": {"kind": "dit", "checkpoint": "shipped:fashion-mnist-dit"},
            "data": {"kind": "fashion-mnist", "split": "test"},
            "sampling": {"solver": "dpm++2m-quadratic", "num_steps": 8},
            "evaluation": {
                "extractor": "fashion-cnn",
                "num_samples": 80 if args.tiny else 200,
                "repeats": 2,
                "reference": {"kind": "fashion-mnist", "split": "train"},
            },
            "search": {"min_exit_depth": 2, "cost": "flops"},
        },
        "low_fidelity",
    )


class Lab:
    """Network, elastic weights and map, made once."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.bench = Workbench(study(args))
        self.depth = self.bench.backbone.depth
        self.steps = next(iter(self.bench.samplers.values()))
        self.work: Path = args.work
        self.work.mkdir(parents=True, exist_ok=True)

    def point(self, schedule: ExitSchedule) -> Point:
        """A schedule under the study's own sampler."""
        return Point(schedule, self.bench.own_sampler)

    def remembered(self, key: str, make: Any) -> Any:
        """`make()`'s JSON value, kept under a key."""
        path = self.work / f"{key}.json"
        if not path.is_file():
            write_json(path, make())
            say(f"{key}: {path.read_text()[:90]}")
        return json.loads(path.read_text())

    def tuned(
        self, key: str, start: Backbone, depths: ExitSchedule | ElasticDepths, config: TrainConfig
    ) -> Backbone:
        """A fine-tuned network, kept under a key."""
        path = self.work / f"{key}.safetensors"
        if not path.is_file():
            net = finetune(
                start,
                self.bench.data,
                self.bench.diffusion,
                depths,
                config,
                teacher=self.bench.backbone,
            ).backbone
            save_backbone(net, path, {})
        return load_backbone(BackboneConfig(checkpoint=str(path))).eval()

    def figure(
        self, net: Backbone, schedule: ExitSchedule, num_samples: int | None = None, seed: int = 0
    ) -> list[float]:
        """Values of the repeats."""
        changes = {"seed": seed} | ({"num_samples": num_samples} if num_samples else {})
        evaluation = self.bench.config.evaluation.model_copy(update=changes)
        protocol = build_protocol(
            evaluation,
            self.bench.config.sampling,
            self.bench.extractor,
            self.bench.reference,
            guided_channels=self.bench.backbone.guided_channels,
        )
        return list(self.bench.evaluate(net, self.point(schedule), protocol)[0].values)

    def elastic(self) -> Backbone:
        """The elastic network that `predict` and the warm-started parts of `ablate` share."""
        steps = 3 if self.args.tiny else self.args.elastic_steps
        config = ElasticConfig(
            **SHORT, num_steps=steps, lr=1e-3, warmup_steps=20, ema_decay=0.98, distill_frac=1.0
        )
        law = ElasticDepths(self.depth, 1000, 2, "noise-easy", 0.1)
        return self.tuned("elastic", self.bench.backbone, law, config)

    def map(self) -> DifficultyMap:
        """Of the elastic network against the pretrained one."""
        config = MapConfig(num_bins=10, num_images=8 if self.args.tiny else 48)
        data = self.bench.data
        diffusion = self.bench.diffusion
        made = self.remembered(
            "map",
            lambda: measure_map(
                self.elastic(), data, diffusion, config, self.bench.backbone
            ).to_dict(),
        )
        return DifficultyMap.from_dict(made)


def schedules(lab: Lab, count: int, budget: float | None, seed: int) -> list[ExitSchedule]:
    """Random schedules of any shape, noise-easy or not, of one budget (share of block calls) or of
    budgets from 0.35 to 0.9."""
    rng = np.random.default_rng(seed)
    out = []
    while len(out) < count:
        target = budget or rng.uniform(0.35, 0.9)
        shape = np.sort(rng.uniform(0, 1, 10)) ** rng.uniform(0.4, 2.5)
        shape = rng.permuted(shape) if rng.random() < 0.25 else shape[::-1]
        low = rng.integers(2, 7)
        depths = np.clip(np.round(low + (lab.depth - low) * shape), 2, lab.depth).astype(int)
        schedule = ExitSchedule.uniform_intervals(depths.tolist(), lab.depth)
        close = 0.006 if budget else 0.03
        known = {lab.point(s) for s in out}
        if (
            abs(schedule.block_frac(lab.steps) - target) < close
            and lab.point(schedule) not in known
        ):
            out.append(schedule)
    return out


def predict(lab: Lab) -> tuple[list[Figure], dict[str, Any]]:
    """Rank correlation of each low-fidelity score with the longest fine-tuning."""
    count, lengths = (4, (1, 2, 3)) if lab.args.tiny else (lab.args.schedules, (8, 24, 64))
    elastic = lab.elastic()
    table = lab.map()
    snr = np.array([float(lab.bench.diffusion.snr()[int(t)]) for t in lab.steps])
    weightings = {"unweighted": np.ones(len(snr)), "1/SNR": 1 / snr, "log(1+SNR)": np.log1p(snr)}
    figures = []
    raw = {}
    for name, budget in (("one budget", 0.62), ("mixed budgets", None)):
        rows = []
        for i, schedule in enumerate(schedules(lab, count, budget, 1 if budget else 2)):
            rows.append(
                lab.remembered(
                    f"{name[:3]}-{i}",
                    lambda s=schedule: one(lab, elastic, table, weightings, s, lengths),
                )
            )
        raw[name] = rows
        truth = [r[f"tuned {lengths[-1]}"] for r in rows]
        for key in [
            k for k in rows[0] if k not in ("schedule", "block_frac", f"tuned {lengths[-1]}")
        ]:
            values = [r[key] for r in rows]
            figures.append(
                Figure(
                    f"{name}: {key}",
                    float(spearmanr(values, truth).statistic),
                    "",
                    bootstrap(values, truth),
                )
            )
    return figures, raw


def one(
    lab: Lab,
    elastic: Backbone,
    table: DifficultyMap,
    weightings: dict[str, Any],
    schedule: ExitSchedule,
    lengths: tuple[int, ...],
) -> dict[str, Any]:
    """All figures of one schedule."""
    depths = schedule.exit_depth_at(lab.steps)
    errors = table.error_at(lab.steps)[np.arange(len(lab.steps)), depths - 1]
    out: dict[str, Any] = {"schedule": str(schedule), "block_frac": schedule.block_frac(lab.steps)}
    out |= {f"map error, {name}": float((w * errors).sum()) for name, w in weightings.items()}
    out["map error, root"] = float(np.sqrt(errors).sum())
    out["elastic, 100 images"] = float(
        np.mean(lab.figure(elastic, schedule, None if lab.args.tiny else 100))
    )
    out["elastic, 200 images"] = float(np.mean(lab.figure(elastic, schedule)))
    for steps in lengths:
        config = TrainConfig(
            **SHORT, num_steps=steps, lr=6e-4, warmup_steps=5, ema_decay=0.9, distill_frac=1.0
        )
        data = lab.bench.data
        diffusion = lab.bench.diffusion
        teacher = lab.bench.backbone
        net = finetune(elastic, data, diffusion, schedule, config, teacher=teacher).backbone
        out[f"tuned {steps}"] = float(np.mean(lab.figure(net, schedule)))
    return out


def bootstrap(a: list[float], b: list[float]) -> float:
    """Standard error of a rank correlation, over resampled schedules."""
    rng = np.random.default_rng(0)
    pairs = np.array([a, b])
    draws = [pairs[:, rng.integers(0, len(a), len(a))] for _ in range(400)]
    ranks = [spearmanr(*d).statistic for d in draws if len(set(d[0])) > 2 and len(set(d[1])) > 2]
    return float(np.nanstd(ranks))


class FashionConv(FashionCNN):
    """The 2,352 numbers behind `fashion-cnn`'s last convolution: as many features as Inception has,
    and few images."""

    def __init__(
        self, name: str = "fashion-conv", features_list: tuple[str, ...] = ("64",), **rest: Any
    ) -> None:
        super().__init__(name, features_list, **rest)

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """(N, 1, 28, 28) uint8 -> (N, 2352)."""
        x = F.silu(self.norm1(self.conv1(images.float() / 127.5 - 1)))  # (N, 32, 14, 14)
        return (F.silu(self.norm2(self.conv2(x))).flatten(1),)


# of each schedule: for the full distance, and for each set of seeds
TRUTH_IMAGES = 1000
SET_IMAGES = 200
SETS = 3
FEW = {"fashion-cnn": (16, 32), "fashion-conv": (100,)}  # images per repeat, of two


def low_fidelity(lab: Lab) -> tuple[list[Figure], dict[str, Any]]:
    """Rank correlation of scores of few images with the full distance of many, and with the
    fine-tuned score on record.

    All scores of a schedule are of the elastic network and of the same images; the full distance is
    of others.
    """
    register_extractor("fashion-conv", FashionConv)
    conv = make_extractor("fashion-conv")
    spaces = {"fashion-cnn": (lab.bench.extractor, lab.bench.reference)}
    spaces["fashion-conv"] = conv, reference_statistics(lab.bench.data, conv)
    count = 4 if lab.args.tiny else lab.args.schedules // 2
    figures = []
    raw = {}
    for name, budget in (("one budget", 0.62), ("mixed budgets", None)):
        rows = []
        for i, schedule in enumerate(schedules(lab, count, budget, 1 if budget else 2)):
            key = f"low-fidelity-{name[:3]}-{i}"
            rows.append(lab.remembered(key, lambda s=schedule: scores_of_few(lab, spaces, s)))
        raw[name] = rows
        truths = {"full distance": [r["full distance"] for r in rows]}
        if (tuned := on_record(name, rows)) is not None:
            truths["fine-tuned"] = tuned
        for what, truth in truths.items():
            for key in rows[0]["few"]:
                sets = np.array([r["few"][key] for r in rows])  # (schedules, sets)
                found = float(np.mean([spearmanr(column, truth).statistic for column in sets.T]))
                figures.append(
                    Figure(f"{name}, {what}: {key}", found, "", bootstrap_sets(sets, truth))
                )
    return figures, raw


def scores_of_few(lab: Lab, spaces: dict[str, Any], schedule: ExitSchedule) -> dict[str, Any]:
    """Of one schedule: its full distance, and for each score the mean over two repeats, one a set
    of seeds."""
    many, few, sets = (80, 24, 1) if lab.args.tiny else (TRUTH_IMAGES, SET_IMAGES, SETS)
    images = to_uint8(
        lab.bench.sample(lab.elastic(), lab.point(schedule), range(many + sets * few)).images
    )
    extractor, reference = spaces["fashion-cnn"]
    features = extract_features(extractor, images[:many])
    full = frechet_distance(
        features.mean(0), np.cov(features, rowvar=False), reference.mean, reference.cov
    )
    found: dict[str, list[float]] = {}
    for space, (extractor, reference) in spaces.items():
        features = extract_features(extractor, images[many:]).reshape(sets, few, -1)
        for n in FEW[space]:
            n = min(n, few // 2)
            for part in features:
                for key, value in scores(part[: 2 * n].reshape(2, n, -1), reference).items():
                    found.setdefault(f"{extractor.dim} features, {n} x 2 images, {key}", []).append(
                        value
                    )
    return {
        "schedule": str(schedule),
        "block_frac": schedule.block_frac(lab.steps),
        "full distance": full,
        "few": found,
    }


def scores(repeats: Any, reference: ReferenceStats) -> dict[str, float]:
    """Every score of (2, N, D) features, N < D, the mean over the repeats."""
    n = repeats.shape[1]
    out = {
        "kernel distance": float(
            np.mean([kernel_distance(f, reference.features)[0] for f in repeats])
        )
    }
    for part in (8, 4, 2):
        found = [projected_distance(f, reference, n // part) for f in repeats]
        out[f"Fréchet distance in N/{part} principal components"] = float(np.mean(found))
    if repeats.shape[2] < 100:  # else minutes each
        moments = [(f.mean(0), np.cov(f, rowvar=False)) for f in repeats]
        found = [frechet_distance(*m, reference.mean, reference.cov) for m in moments]
        out["Fréchet distance, singular"] = float(np.mean(found))
    return out


def on_record(name: str, rows: list[dict[str, Any]]) -> list[float] | None:
    """Fine-tuned scores of the same schedules in the last results of `predict`; None where there
    are none."""
    if not RESULTS.is_file():
        return None
    known = {
        r["schedule"]: r["tuned 64"]
        for r in json.loads(RESULTS.read_text())["raw"]["predict"][name]
    }
    return (
        [known[r["schedule"]] for r in rows] if all(r["schedule"] in known for r in rows) else None
    )


def bootstrap_sets(sets: Any, truth: list[float]) -> float:
    """Standard error of the mean over seed sets of a rank correlation: schedules and sets drawn
    again together."""
    rng = np.random.default_rng(0)
    values = np.asarray(truth)
    draws = []
    for _ in range(400):
        rows = rng.integers(0, len(values), len(values))
        columns = rng.integers(0, sets.shape[1], sets.shape[1])
        if len(set(rows)) > 2:
            draws.append(
                np.mean([spearmanr(sets[rows, c], values[rows]).statistic for c in columns])
            )
    return float(np.std(draws))


def ablate(lab: Lab) -> tuple[list[Figure], dict[str, Any]]:
    """Figure of one schedule after equal compute, by target, loss weight and start."""
    schedule = ExitSchedule.published("D7-DiT", lab.depth)
    frac = float(
        np.mean(np.asarray(lab.bench.costs.flops)[schedule.exit_depth_at(np.arange(1000)) - 1])
        / lab.bench.costs.flops[-1]
    )
    budget = 4 if lab.args.tiny else lab.args.ablation_steps  # steps with noise targets
    figures = []
    raw = {}
    flat = LossWeight(shape="none")
    raised = LossWeight(shape="dropped", peak=2.0, window=20)
    for start in ("pretrained", "elastic"):
        net = lab.bench.backbone if start == "pretrained" else lab.elastic()
        for distill in (0.0, 0.5, 1.0):
            for name, weight in (("λ = 1", flat), ("λ(t) to 2", raised)):
                steps = (
                    budget if distill == 0 else max(1, round(budget * 3 * frac / (3 * frac + 1)))
                )
                values = []
                for repeat in range(1 if lab.args.tiny else lab.args.repeats):
                    config = TrainConfig(
                        **{**SHORT, "loss_weight": weight},
                        num_steps=steps,
                        lr=8e-4,
                        warmup_steps=10,
                        ema_decay=0.9,
                        distill_frac=distill,
                        seed=repeat,
                    )
                    key = f"ablate-{start}-{distill}-{weight.shape}-{repeat}"
                    values.append(
                        lab.remembered(
                            key, lambda n=net, c=config, r=repeat: tune_once(lab, n, schedule, c, r)
                        )
                    )
                means = [float(np.mean(v)) for v in values]
                what = "noise targets" if distill == 0 else f"distillation {distill:g}"
                spread = (
                    float(np.std(means, ddof=1) / np.sqrt(len(means))) if len(means) > 1 else None
                )
                figures.append(
                    Figure(
                        f"{start} start, {what}, {name} ({steps} steps)",
                        float(np.mean(means)),
                        "",
                        spread,
                    )
                )
                raw[f"{start} {distill} {weight.shape}"] = values
    return figures, raw


def tune_once(
    lab: Lab, start: Backbone, schedule: ExitSchedule, config: TrainConfig, repeat: int
) -> list[float]:
    """Values of one run."""
    data = lab.bench.data
    diffusion = lab.bench.diffusion
    net = finetune(start, data, diffusion, schedule, config, teacher=lab.bench.backbone).backbone
    return lab.figure(net, schedule, seed=50_000 * (repeat + 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--only", choices=("predict", "ablate", "low-fidelity"), help="one part alone"
    )
    parser.add_argument(
        "--schedules", type=int, default=20, help="of each kind in `predict` (default %(default)s)"
    )
    parser.add_argument(
        "--elastic-steps", type=int, default=300, help="of 32 images (default %(default)s)"
    )
    parser.add_argument(
        "--ablation-steps",
        type=int,
        default=64,
        help="with noise targets, of 32 images (default %(default)s)",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=3,
        help="training and sampling seeds of `ablate` (default %(default)s)",
    )
    parser.add_argument(
        "--work", type=Path, default=Path("runs/low-fidelity"), help="folder of what is kept"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="few steps and images, to see that the script runs"
    )
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    parser.set_defaults(batch=32, quick=False)
    tiny_repeats = parser.get_default("repeats")
    args = parse(parser)
    args.repeats = args.repeats if not args.tiny else tiny_repeats
    lab = Lab(args)
    figures = []
    raw = {}
    for name, part in {"ablate": ablate, "predict": predict, "low-fidelity": low_fidelity}.items():
        if args.only in (None, name):
            more, raw[name] = part(lab)
            figures += more
    publish("low_fidelity", args, figures, raw)


if __name__ == "__main__":
    main()
