"""What do compiled blocks save, and do schedules save as much of them as their block calls promise?

Whole samplings of a network with random weights, in turn: compiled against eager, and a published
schedule against full depth in either.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from finetune_step import SHIPPED, TINY
from measuring import Figure, gpu_or_cpu, options, parse, publish, say, wake

from asesearch.backbones import DiT
from asesearch.diffusion import Diffusion
from asesearch.evaluation.clock import compare_sampling_time
from asesearch.sampling import SampleResult, sample
from asesearch.schedule import ExitSchedule

MODELS = ("shipped", "DiT-XL/2")
SCHEDULE = "D3-DiT"


def build(args: argparse.Namespace) -> DiT:
    torch.manual_seed(args.seed)
    sizes = TINY if args.tiny else SHIPPED
    net = (
        DiT.from_preset(args.model) if args.model in MODELS[1:] and not args.tiny else DiT(**sizes)
    )
    wake(net, args.seed)
    return net.to(gpu_or_cpu()).eval()


def sampler(net: DiT, args: argparse.Namespace) -> Callable[..., SampleResult]:
    """`run(schedule, compile)`: one sampling of a batch."""

    def run(schedule: ExitSchedule, compile: bool) -> SampleResult:
        return sample(
            net,
            "ddim",
            schedule,
            diffusion=Diffusion(),
            num_steps=args.steps,
            seeds=range(args.batch),
            y=torch.arange(args.batch) % net.num_classes,
            cfg_scale=args.cfg_scale,
            batch_size=args.batch,
            precision=args.precision,
            compile=compile,
        )

    return run


def measure(args: argparse.Namespace) -> tuple[list[Figure], dict[str, Any]]:
    net = build(args)
    run = sampler(net, args)
    full = ExitSchedule.full(net.depth)
    early = ExitSchedule.published(SCHEDULE, net.depth)
    say("the first compiled sampling, and the eager one")
    first = run(early, True)
    eager = run(early, False)
    difference = (first.images - eager.images).abs().max() / eager.images.abs().max()
    bound = early.block_frac(first.timesteps)
    figures = [
        Figure("first compiled sampling", first.seconds, "s"),
        Figure("largest difference of images / largest value", float(difference), ""),
        Figure(f"{SCHEDULE} block calls / all (bound)", bound),
    ]
    raw: dict[str, Any] = {}

    def compare(name: str, a: tuple[ExitSchedule, bool], b: tuple[ExitSchedule, bool]) -> float:
        say(f"{name}: {args.repeats} pairs")
        ratio = compare_sampling_time(lambda: run(*a), lambda: run(*b), args.repeats)
        raw[name] = asdict(ratio)
        figures.append(Figure(name, ratio.median, spread=ratio.spread))
        return ratio.median

    compare("full depth, compiled / eager", (full, True), (full, False))
    compare(f"{SCHEDULE}, compiled / eager", (early, True), (early, False))
    for code, compile in (("eager", False), ("compiled", True)):
        ratio = compare(f"{SCHEDULE} / full depth, {code}", (early, compile), (full, compile))
        figures.append(Figure(f"bound / measured, {code}", bound / ratio, goal=">= 0.97"))
    return figures, raw


def main() -> None:
    parser = options(__doc__.splitlines()[0], repeats=5, batch=8)
    parser.add_argument("--model", choices=MODELS, default=MODELS[0])
    parser.add_argument("--steps", type=int, default=20, help="DDIM steps (default %(default)s)")
    parser.add_argument("--cfg-scale", type=float, default=1.0, help="guidance (1: none)")
    parser.add_argument("--precision", choices=("float32", "tf32", "bf16"), default="float32")
    args = parse(parser)
    if args.compile:
        parser.error("eager and compiled blocks are compared; leave --compile out")
    publish("compiled", args, *measure(args))


if __name__ == "__main__":
    main()
