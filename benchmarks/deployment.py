"""What the exported formats cost: compiled, ONNX Runtime and AOTInductor against eager torch, full
and under D3-DiT; from a folder to the first image; the size of an ONNX folder.

All runs of one round come in turn in one process, the order reversed in every other round.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from measuring import Figure, options, parse, publish, say, wake

from asesearch.backbones import DiT
from asesearch.backbones.checkpoints import load_backbone
from asesearch.config import BackboneConfig, DiffusionConfig, SamplingConfig
from asesearch.deployment import formats
from asesearch.deployment.aoti import load_aoti
from asesearch.deployment.bundle import Bundle
from asesearch.deployment.onnx_runtime import GRAPH, WEIGHTS, load_onnx
from asesearch.diffusion import Diffusion
from asesearch.schedule import ExitSchedule

SHIPPED = "shipped:fashion-mnist-dit"
TINY = {"input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 16, "num_heads": 2}
FIRST_IMAGE = {
    "bundle": "from asesearch import load_bundle as load",
    "onnx": "from asesearch.deployment.onnx_runtime import load_onnx as load",
}
Run = Callable[[ExitSchedule], object]


def network(args: argparse.Namespace) -> DiT:
    """The network to measure."""
    if args.tiny:
        net = DiT(**TINY, depth=4, num_classes=3)
    elif args.model == SHIPPED:
        loaded = load_backbone(BackboneConfig(kind="dit", checkpoint=SHIPPED))
        assert isinstance(loaded, DiT)
        return loaded.eval()
    else:
        net = DiT.from_preset(args.model)
    wake(net, args.seed)
    return net.eval()


def variants(bundle: Bundle, folder: Path, args: argparse.Namespace) -> dict[str, Run]:
    """What samples the same images under a schedule."""
    threads = torch.get_num_threads()
    for name in ("onnx", "aoti"):
        say(f"writing {name}")
        formats.write(bundle, folder / name, name)
    session = load_onnx(folder / "onnx", threads=threads, check_parity=False)
    ahead = load_aoti(folder / "aoti", check_parity=False)
    seeds = range(args.batch)
    return {
        "eager": lambda s: replace(bundle, schedule=s).sample(seeds),
        "compiled": lambda s: replace(bundle, schedule=s).sample(seeds, compile=True),
        "ONNX Runtime": lambda s: session.sample(seeds, schedule=s),
        "AOTInductor": lambda s: replace(ahead, schedule=s).sample(seeds),
    }


def rounds(
    runs: dict[str, Run], schedules: dict[str, ExitSchedule], repeats: int
) -> dict[str, list[float]]:
    """Seconds of each variant under each schedule, in turn."""
    cases = [(v, s) for v in runs for s in schedules]
    for variant, schedule in cases:
        say(f"first {variant}, {schedule}")
        runs[variant](schedules[schedule])
    seconds: dict[str, list[float]] = {f"{v}, {s}": [] for v, s in cases}
    for repeat in range(repeats):
        say(f"round {repeat + 1} of {repeats}")
        for variant, schedule in cases[:: -1 if repeat % 2 else 1]:
            start = time.perf_counter()
            runs[variant](schedules[schedule])
            seconds[f"{variant}, {schedule}"].append(time.perf_counter() - start)
    return seconds


def ratio(name: str, a: list[float], b: list[float], **more: Any) -> Figure:
    """Median and half-IQR of the rounds' ratios."""
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    spread = None
    if len(ratios) > 1:
        low, _, high = quantiles(ratios, n=4, method="inclusive")
        spread = (high - low) / 2
    return Figure(name, median(ratios), spread=spread, **more)


def speed(
    bundle: Bundle, folder: Path, args: argparse.Namespace
) -> tuple[list[Figure], dict[str, Any]]:
    """Every variant against eager, and under D3 against the full network."""
    depth = bundle.backbone.depth
    schedules = {
        "full": ExitSchedule.full(depth),
        "D3": ExitSchedule.published("D3-DiT", depth),
    }
    calls = Diffusion().timesteps(bundle.sampling.num_steps)
    bound = schedules["D3"].block_frac(calls)
    seconds = rounds(variants(bundle, folder, args), schedules, args.repeats)
    figures = [Figure("D3 block calls / all (bound)", bound)]
    for variant in ("compiled", "ONNX Runtime", "AOTInductor"):
        figures += [
            ratio(f"{variant} / eager, {s}", seconds[f"{variant}, {s}"], seconds[f"eager, {s}"])
            for s in schedules
        ]
    for variant in ("eager", "compiled", "ONNX Runtime", "AOTInductor"):
        early = seconds[f"{variant}, D3"]
        full = seconds[f"{variant}, full"]
        promised = [bound * s for s in full]
        figures += [
            ratio(f"{variant}, D3 / full", early, full),
            ratio(f"{variant}, bound / measured D3", promised, early, goal=">= 0.97"),
        ]
    figures.append(Figure("eager, full", median(seconds["eager, full"]), "s"))
    return figures, seconds


def first_image(folder: Path, repeats: int) -> tuple[list[Figure], dict[str, list[float]]]:
    """Seconds from a fresh interpreter, imports included, to the first image."""
    seconds: dict[str, list[float]] = {name: [] for name in FIRST_IMAGE}
    for _ in range(repeats):
        for name, load in FIRST_IMAGE.items():
            code = f"{load}\nload({str(folder / name)!r}).sample([0])"
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            seconds[name].append(time.perf_counter() - start)
    figures = [
        Figure(f"{name}: start of Python to first image", median(times), "s")
        for name, times in seconds.items()
    ]
    return figures, seconds


def main() -> None:
    parser = options(__doc__ or "", repeats=15, batch=16)
    parser.add_argument("--model", default=SHIPPED, help="a DiT preset, or %(default)s")
    parser.add_argument("--steps", type=int, default=10, help="of DDIM (default %(default)s)")
    parser.add_argument("--work", type=Path, help="where the folders go (default: temporary)")
    args = parse(parser)
    net = network(args)
    how = SamplingConfig(num_steps=args.steps, batch_size=args.batch)
    schedule = ExitSchedule.published("D3-DiT", net.depth)
    bundle = Bundle(net, schedule, "dit", DiffusionConfig(), how, {}, {})
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        folder = Path(work)
        figures, seconds = speed(bundle, folder, args)
        say("writing bundle")
        formats.write(bundle, folder / "bundle")
        more, first = first_image(folder, 1 if args.model != SHIPPED else min(5, args.repeats))
        size = sum((folder / "onnx" / name).stat().st_size for name in (GRAPH, WEIGHTS))
    weights = sum(p.numel() * p.element_size() for p in net.parameters())
    figures += [*more, Figure("ONNX files / weights", size / weights, goal="<= 1.02")]
    publish("deployment", args, figures, {"seconds": seconds, "first_image": first})


if __name__ == "__main__":
    main()
