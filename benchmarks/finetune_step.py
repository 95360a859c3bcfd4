"""Is a fine-tuning step under an early-exit schedule as much cheaper as its block calls, and a
whole sampling too?

The shipped network's size on the shipped images, with random weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from statistics import median
from typing import Any

import torch
from measuring import Figure, gpu_or_cpu, options, parse, publish, say, wake
from torch import Tensor

from asesearch.backbones import DiT
from asesearch.backbones.base import ExitDepth
from asesearch.config import TrainConfig
from asesearch.data import fashion_mnist
from asesearch.diffusion import Diffusion
from asesearch.evaluation.clock import compare_sampling_time
from asesearch.evaluation.cost import measure_latency
from asesearch.finetuning import Trainer, draw_batch
from asesearch.sampling import sample
from asesearch.schedule import ExitSchedule

SHIPPED = {
    "input_size": 28,
    "patch_size": 4,
    "in_channels": 1,
    "hidden_size": 64,
    "depth": 12,
    "num_heads": 4,
    "num_classes": 10,
}
TINY = {**SHIPPED, "hidden_size": 16, "num_heads": 2}
SAMPLED = ("D3-DiT", "D7-DiT")


class PickAfterwards(DiT):
    """Runs every block for every sample and picks the exits afterwards, as the paper's released
    training code does."""

    def forward(
        self, x_t: Tensor, t: Tensor, y: Tensor | None = None, *, exit_depth: ExitDepth = None
    ) -> Tensor:
        if not isinstance(exit_depth, Tensor) or y is None:
            return super().forward(x_t, t, y, exit_depth=exit_depth)
        x = self.x_embedder(x_t) + self.pos_embed  # (N, L, D)
        c = self.t_embedder(t) + self.y_embedder(y)  # (N, D)
        after = []
        for block in self.blocks:
            x = block(x, c)
            after.append(x)
        rows = torch.arange(len(x), device=x.device)
        x = torch.stack(after)[exit_depth.to(x.device) - 1, rows]  # (N, L, D)
        return self.unpatchify(self.final_layer(x, c))


def build(kind: type[DiT], args: argparse.Namespace) -> DiT:
    torch.manual_seed(args.seed)
    net = kind(**(TINY if args.tiny else SHIPPED))
    wake(net, args.seed)
    return net


def stepper(
    kind: type[DiT], schedule: ExitSchedule, args: argparse.Namespace
) -> Callable[[], None]:
    """One step of a trainer, from drawing the batch to the weights; every trainer sees the same
    batches."""
    config = TrainConfig(
        batch_size=args.batch,
        compile=args.compile,
        mixed_precision=args.mixed_precision,
        lr_schedule="constant",
        seed=args.seed,
    )
    trainer = Trainer(build(kind, args), fashion_mnist("test"), Diffusion(), schedule, config)

    def step() -> None:
        batch = draw_batch(
            trainer.data, trainer.backbone, config, trainer.diffusion, trainer.step, trainer.part
        )
        trainer.train_step(batch).cpu()  # which waits for a GPU

    return step


def largest_difference(schedule: ExitSchedule, args: argparse.Namespace) -> float:
    """Between the outputs of the two ways of training: one network, every interval's timesteps."""
    t = torch.arange(0, 1000, 50)
    x_t = torch.randn(len(t), 1, 28, 28, generator=torch.Generator().manual_seed(args.seed))
    depths = torch.from_numpy(schedule.exit_depth_at(t.numpy()))
    with torch.no_grad():
        a, b = (
            build(kind, args)(x_t, t, t % 10, exit_depth=depths) for kind in (DiT, PickAfterwards)
        )
    return float((a - b).abs().max())


def training(args: argparse.Namespace) -> tuple[list[Figure], dict[str, Any]]:
    """D3's steps against steps that run all blocks, in turn."""
    schedule = ExitSchedule.published("D3-DiT", SHIPPED["depth"])
    full = ExitSchedule.full(SHIPPED["depth"])
    early = stepper(DiT, schedule, args)
    every = stepper(DiT, full, args)
    say(f"training: {args.repeats} pairs of steps, D3 and full depth")
    skipped = compare_sampling_time(early, every, args.repeats)
    picks = stepper(PickAfterwards, schedule, args)
    say(
        f"training: {args.repeats} pairs of steps, D3 with the exits picked afterwards and full "
        "depth"
    )
    picked = compare_sampling_time(picks, every, args.repeats)
    figures = [
        Figure(
            "D3 step / step of all blocks", skipped.median, spread=skipped.spread, goal="<= 0.78"
        ),
        Figure("D3 block calls / all (bound)", schedule.block_frac()),
        Figure(
            "D3 step, exits picked afterwards / step of all blocks",
            picked.median,
            spread=picked.spread,
        ),
        Figure("step of all blocks", median(b for _, b in skipped.pairs) * 1e3, "ms"),
        Figure(
            "largest difference of the two ways' outputs", largest_difference(schedule, args), ""
        ),
    ]
    return figures, {"skipped": asdict(skipped), "picked": asdict(picked)}


def sampling(args: argparse.Namespace) -> tuple[list[Figure], dict[str, Any]]:
    """Whole samplings against the full network's, in turn."""
    device = gpu_or_cpu()
    diffusion = Diffusion()
    depth = SHIPPED["depth"]
    net = build(DiT, args).to(device).eval()
    if args.compile:
        for i in range(depth):
            net.block_at(i).compile()
    repeats = max(1, args.repeats // 6)
    steps = 2 if args.tiny else args.steps
    say("sampling: latency at each exit depth")
    table = measure_latency(net, args.batch, max(3, args.repeats // 2), device)
    seeds = range(args.batch)
    y = torch.arange(args.batch) % net.num_classes

    def run(schedule: ExitSchedule) -> Callable[[], object]:
        return lambda: sample(
            net, "ddim", schedule, diffusion=diffusion, num_steps=steps, seeds=seeds, y=y
        )

    figures = []
    raw = {"latency": table.to_dict()}
    for name in SAMPLED:
        schedule = ExitSchedule.published(name, depth)
        say(f"sampling: {name}, {repeats} pairs of {steps} DDIM steps and one to warm up")
        ratio = compare_sampling_time(run(schedule), run(ExitSchedule.full(depth)), repeats)
        limit = table.bound_frac(schedule, diffusion.timesteps(steps))
        figures += [
            Figure(f"{name} sampling time / full", ratio.median, spread=ratio.spread),
            Figure(
                f"{name} block calls / all (bound)", schedule.block_frac(diffusion.timesteps(steps))
            ),
            Figure(f"{name} bound with the fixed part", limit),
            Figure(
                f"{name} measured / bound with the fixed part",
                ratio.median / limit,
                spread=ratio.spread / limit,
                goal="<= 1.05",
            ),
        ]
        raw[name] = asdict(ratio)
    return figures, raw


def main() -> None:
    parser = options(__doc__ or "", repeats=30, batch=64)
    parser.add_argument("--steps", type=int, default=50, help="of DDIM (default %(default)s)")
    parser.add_argument(
        "--mixed-precision",
        choices=("no", "bf16", "fp16"),
        default="no",
        help="of training; needs a GPU",
    )
    args = parse(parser)
    figures = []
    raw = {}
    for part in (training, sampling):
        more, raw[part.__name__] = part(args)
        figures += more
    publish("finetune_step", args, figures, raw)


if __name__ == "__main__":
    main()
