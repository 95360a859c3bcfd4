"""Which elastic warm-up loses nothing: each recipe alone, from one network, with the same images.

One call measures one recipe and seed: the network after the
warm-up at full depth and under a few schedules, and the same after a brief fine-tuning of their
own (distilled from the same teacher). `--recipe none` fine-tunes from the network itself, which is
the control with equal compute. `--full-depth pretrained` leaves the calls at full depth to the
pretrained network, `--truncated-snr` has the loss count the clean image near noise. A GPU runs
several calls beside each other.

    python benchmarks/recipes.py shipped:fashion-mnist-dit --recipe half-full --seed 0 --out a.json
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import LEAST, add_full_depth, machine
from torch import Tensor, nn

from asesearch.backbones import load_backbone, save_backbone
from asesearch.backbones.base import Backbone
from asesearch.backbones.dit import DiT
from asesearch.backbones.exit_weights import ExitWeights
from asesearch.config import BackboneConfig, ElasticConfig, LossWeight, TrainConfig, parse_study
from asesearch.diffusion import Process
from asesearch.evaluation.fidelity import build_protocol
from asesearch.files import write_json
from asesearch.finetuning import finetune
from asesearch.point import Point
from asesearch.sampler import Sampler
from asesearch.schedule import ElasticDepths, ExitSchedule
from asesearch.search import Workbench

FLAT = LossWeight(shape="none")
ERRORS_AT = (999, 900, 800, 640, 360)
#: Each lead alone; `common` is what all share unless they say otherwise.
COMMON: dict[str, Any] = {
    "lr": 1e-3,
    "lr_schedule": "cosine",
    "warmup_steps": 50,
    "ema_decay": 0.995,
    "min_snr_gamma": 5.0,
    "distill_frac": 1.0,
    "depth_distribution": "noise-easy",
    "full_frac": 0.1,
    "loss_weight": FLAT,
}
RECIPES: dict[str, dict[str, Any]] = {
    "constant": {"lr_schedule": "constant"},
    "cosine": {},
    "half-full": {"full_frac": 0.5},
    "sandwich": {"full_frac": 1 / 3, "sandwich": True},
    "adapter": {"full_frac": 0.5, "adapter": True},
    "low-lr": {"full_frac": 0.5, "lr": 3e-4},
    "high-lr": {"full_frac": 0.5, "lr": 2e-3},
    "half-noise": {"full_frac": 0.5, "distill_frac": 0.5},
    "noise": {"full_frac": 0.5, "distill_frac": 0.0},
    "uniform": {"full_frac": 0.5, "depth_distribution": "uniform"},
    "mostly-full": {"full_frac": 0.8},
    "mostly-full-low-lr": {"full_frac": 0.8, "lr": 3e-4},
    "steep": {"full_frac": 0.5, "steep": True},
    "steep-mostly-full": {"full_frac": 0.8, "steep": True},
}


class Sandwich(ElasticDepths):
    """A third of the samples at full depth, a third at the least, the others drawn between."""

    def draw(self, t: Any, u: Any) -> Any:
        depths = super().draw(t, u)
        depths[np.asarray(u) < 1 / 3] = self.min_exit_depth
        return depths


class Steep(ElasticDepths):
    """Deep near data, where no good schedule exits early: the power that spreads the draws is
    2·sqrt(t / T), 0 at data, where noise-easy has 0.5 + 1.5·t / T."""

    def draw(self, t: Any, u: Any) -> Any:
        times = np.asarray(t, np.float64) / self.num_train_timesteps
        draws = np.asarray(u, np.float64)
        part = np.minimum(draws / max(1 - self.full_frac, 1e-9), 1.0)
        span = self.depth - self.min_exit_depth + 1
        drawn = self.min_exit_depth + (span * part ** (2 * np.sqrt(times))).astype(np.int64)
        return np.minimum(drawn, self.depth)


class AdaptedDiT(DiT):
    """A DiT whose final layer also knows after how many blocks it is asked: a shift and a scale
    for each depth, zero at first, beside those of the condition."""

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        width = config["hidden_size"]
        self.exit_shift = nn.Parameter(torch.zeros(self.depth, width))
        self.exit_scale = nn.Parameter(torch.zeros(self.depth, width))

    def forward(
        self, x_t: Tensor, t: Tensor, y: Tensor | None = None, *, exit_depth: Any = None
    ) -> Tensor:
        last = self.depth if exit_depth is None else exit_depth
        index = torch.as_tensor(last).expand(len(x_t)).to(x_t.device) - 1  # (N,)
        shift = self.exit_shift[index][:, None]
        scale = self.exit_scale[index][:, None]

        def adapt(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            return out * (1 + scale) + shift

        handle = self.final_layer.norm_final.register_forward_hook(adapt)
        try:
            return super().forward(x_t, t, y, exit_depth=exit_depth)
        finally:
            handle.remove()


def adapted(net: Backbone) -> AdaptedDiT:
    """The same network with the adapter."""
    made = AdaptedDiT(**net.config).to(next(net.parameters()).device)
    made.load_state_dict(net.state_dict(), strict=False)
    return made.eval()


class Lab:
    """The network, its teacher, and how it is judged."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.bench = Workbench(
            parse_study(
                {
                    "name": "recipes",
                    "backbone": {"kind": args.kind, "checkpoint": args.network},
                    "data": {"kind": "fashion-mnist", "split": "train"},
                    "sampling": {
                        "solver": args.sampler.solver,
                        "num_steps": args.sampler.num_steps,
                        "batch_size": args.sample_batch,
                    },
                    "evaluation": {
                        "extractor": "fashion-cnn",
                        "num_samples": args.num_samples,
                        "repeats": args.repeats,
                    },
                    "search": {
                        "min_exit_depth": args.min_exit_depth,
                        "cost": "flops",
                        "full_depth": args.full_depth,
                    },
                },
                "recipes",
            )
        )
        depth = self.bench.backbone.depth
        shapes = args.schedules or ["full", "D3-DiT", "D7-DiT"]
        self.schedules = {s: ExitSchedule.from_string(s, depth=depth) for s in shapes}
        self.diffusion: Process = self.bench.diffusion

    def score(self, net: Backbone, schedule: ExitSchedule, sampler: Sampler) -> float | list[float]:
        """Fréchet distance of `num_samples` images, on seeds that depend on nothing; of each
        repeat, where there are several."""
        how = self.bench.config.sampling.under(sampler)
        protocol = build_protocol(
            self.bench.config.evaluation,
            how,
            self.bench.extractor,
            self.bench.reference,
            guided_channels=net.guided_channels,
        )
        found = self.bench.evaluate(net, Point(schedule, sampler), protocol)[0]
        return found.value if self.args.repeats == 1 else list(found.values)

    def scores(self, net: Backbone) -> dict[str, float | list[float]]:
        """Under every schedule."""
        return {
            s: self.score(net, schedule, self.sampler) for s, schedule in self.schedules.items()
        }

    @property
    def sampler(self) -> Sampler:
        """The study's own."""
        return self.bench.own_sampler

    def elastic(self) -> Backbone:
        """The network after the warm-up of the recipe, or that of an earlier call."""
        net = self.bench.backbone
        if self.args.elastic is not None:
            kept = BackboneConfig(kind=self.args.kind, checkpoint=str(self.args.elastic))
            return load_backbone(kept).to(self.bench.device).eval()
        if self.args.recipe == "none":
            return net
        values = COMMON | RECIPES[self.args.recipe]
        kind = ElasticDepths
        if values.pop("sandwich", False):
            kind = Sandwich
        if values.pop("steep", False):
            kind = Steep
        if values.pop("adapter", False):
            net = adapted(net)
        config = ElasticConfig(
            **values,
            num_steps=self.args.steps,
            batch_size=self.args.batch,
            seed=self.args.seed,
            truncated_snr=self.args.truncated_snr,
        )
        limits = (config.full_frac, None)
        if self.args.full_depth == "pretrained":
            limits = (0.0, net.depth - 1)
            net = ExitWeights(net, net)
        least = self.args.min_exit_depth
        depths = kind(net.depth, 1000, least, config.depth_distribution, *limits)
        return finetune(
            net, self.bench.data, self.diffusion, depths, config, teacher=self.bench.backbone
        ).backbone

    @torch.no_grad()
    def errors(self, net: Backbone, schedule: ExitSchedule) -> dict[str, dict[str, float]]:
        """By timestep, how far a network is from the pretrained one at full depth on 100 noised
        images: the root mean square of the difference of the noise that both predict, and of the
        clean image that follows from it."""
        data = self.bench.data
        x_start, y = data.batch(list(range(100)))
        found = {}
        for t in ERRORS_AT:
            generator = torch.Generator().manual_seed(t)
            at = torch.full((len(x_start),), t)
            noise = torch.randn(x_start.shape, generator=generator)
            x_t = self.diffusion.q_sample(x_start, at, noise).to(self.bench.device)
            where = (x_t, at.to(x_t.device), None if y is None else y.to(x_t.device))
            depth = int(schedule.exit_depth_at(at[:1].numpy())[0])
            ours = net(*where, exit_depth=depth)[:, : x_t.shape[1]]
            apart = float((ours - self.bench.backbone(*where)[:, : x_t.shape[1]]).square().mean())
            scale = float(1 / self.diffusion.snr(at[:1]))
            found[str(t)] = {"noise": apart**0.5, "image": (scale * apart) ** 0.5}
        return found

    def mean(self, net: Backbone, share: float) -> Backbone:
        """The mean of the pretrained weights and a network's, whose share is given."""
        out = copy.deepcopy(net)
        with torch.no_grad():
            pairs = zip(out.parameters(), self.bench.backbone.parameters(), strict=True)
            for ours, theirs in pairs:
                ours.lerp_(theirs, 1 - share)
        return out

    def tuned(self, net: Backbone, schedule: ExitSchedule, distill_frac: float) -> Backbone:
        """After own steps under a schedule."""
        config = TrainConfig(
            num_steps=self.args.own_steps,
            batch_size=self.args.own_batch,
            lr=self.args.own_lr,
            warmup_steps=10,
            ema_decay=self.args.own_ema,
            min_snr_gamma=5.0,
            distill_frac=distill_frac,
            loss_weight=FLAT,
            seed=self.args.seed,
            truncated_snr=self.args.truncated_snr,
        )
        data = self.bench.data
        teacher = self.bench.backbone
        if schedule.is_full and self.args.full_depth == "pretrained":
            return teacher
        if self.args.full_depth == "pretrained" and not isinstance(net, ExitWeights):
            net = ExitWeights(teacher, net)
        return finetune(net, data, self.diffusion, schedule, config, teacher=teacher).backbone


def cost_of(lab: Lab, found: dict[str, Any]) -> dict[str, Any]:
    """What the warm-up took, for those who count it (`paper.py`)."""
    recipe = lab.args.recipe
    return {
        "recipe": recipe,
        "num_steps": 0 if recipe == "none" else lab.args.steps,
        "batch_size": lab.args.batch,
        "min_exit_depth": lab.args.min_exit_depth,
        "full_frac": (COMMON | RECIPES.get(recipe, {}))["full_frac"],
        "seed": lab.args.seed,
        "seconds": found["seconds"]["elastic"],
    }


def measured(lab: Lab) -> dict[str, Any]:
    """Everything of one recipe and seed."""
    start = time.perf_counter()
    told = {k: v.name if isinstance(v, Path) else str(v) for k, v in vars(lab.args).items()}
    found: dict[str, Any] = {"settings": told, "environment": machine()}
    net = lab.elastic()
    found["seconds"] = {"elastic": time.perf_counter() - start}
    found["elastic"] = lab.scores(net)
    write_json(lab.args.out, found)
    for share in lab.args.means:
        found.setdefault("means", {})[str(share)] = lab.scores(lab.mean(net, share))
        write_json(lab.args.out, found)
    if lab.args.keep is not None and not isinstance(net, AdaptedDiT):
        save_backbone(net, lab.args.keep, {"warm_up": json.dumps(cost_of(lab, found))})
    for name, schedule in lab.schedules.items():
        for target in lab.args.targets if lab.args.own_steps else ():
            tuned = lab.tuned(net, schedule, float(target == "teacher"))
            if tuned is lab.bench.backbone:
                continue  # not tuned at all
            key = f"{name}, {lab.args.own_steps} own steps, {target}"
            found.setdefault("tuned", {})[key] = lab.score(tuned, schedule, lab.sampler)
            found.setdefault("errors", {})[key] = lab.errors(tuned, schedule)
            write_json(lab.args.out, found)
    found["seconds"]["all"] = time.perf_counter() - start
    write_json(lab.args.out, found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network", help="weights (.safetensors), or shipped:NAME")
    parser.add_argument("--kind", default="dit")
    parser.add_argument("--recipe", choices=["none", *RECIPES], required=True)
    parser.add_argument("--steps", type=int, default=1500, help="of the warm-up")
    parser.add_argument("--batch", type=int, default=64, help="images per step of the warm-up")
    parser.add_argument("--own-steps", type=int, default=200)
    parser.add_argument("--own-batch", type=int, default=64)
    parser.add_argument("--own-lr", type=float, default=6e-4, help="learning rate of own steps")
    parser.add_argument("--own-ema", type=float, default=0.98, help="decay of their average")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-samples", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--sample-batch", type=int, default=500)
    parser.add_argument("--sampler", type=Sampler.from_string, default="unipc-quadratic-6")
    add_full_depth(parser)
    parser.add_argument(
        "--min-exit-depth", type=int, default=LEAST, help="fewest blocks that the warm-up draws"
    )
    parser.add_argument("--truncated-snr", action="store_true")
    parser.add_argument("--schedules", nargs="*", help="names or depths; default full D3 D7")
    parser.add_argument("--targets", nargs="*", choices=["teacher", "noise"], default=["teacher"])
    parser.add_argument("--keep", type=Path, help="write the elastic weights here")
    parser.add_argument("--elastic", type=Path, help="weights kept before, instead of a warm-up")
    parser.add_argument(
        "--means", nargs="*", type=float, default=[], help="also means with the pretrained weights"
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    print(measured(Lab(args)))


if __name__ == "__main__":
    main()
