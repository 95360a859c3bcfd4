"""Do the published schedules save, at the true size, the time that their block calls promise?

The true network with random weights: time does not depend on what they are.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measuring import Figure, gpu_or_cpu, options, parse, publish, say, wake
from torch import Tensor, nn

from asesearch.backbones import Backbone, DiT, UViT
from asesearch.backbones.conversion import dit_to_diffusers
from asesearch.backbones.exit_weights import ExitWeights
from asesearch.config import LossWeight, TrainConfig
from asesearch.diffusion import Diffusion
from asesearch.evaluation.clock import call_timer, compare_sampling_time
from asesearch.evaluation.cost import LatencyTable, measure_latency
from asesearch.finetuning import finetune
from asesearch.schedule import ExitSchedule

#: Model -> class, its published schedules, and what --tiny changes (not the depth: the schedules
#: stay as published).
MODELS: dict[str, tuple[type[DiT] | type[UViT], tuple[str, ...], dict[str, Any]]] = {
    "DiT-XL/2": (
        DiT,
        ("D2-DiT", "D3-DiT", "D4-DiT", "D7-DiT"),
        {"input_size": 8, "hidden_size": 32, "num_heads": 2, "num_classes": 10},
    ),
    "U-ViT-S/4-CelebA64": (
        UViT,
        ("D1-U-ViT", "D2-U-ViT", "D3-U-ViT", "D6-U-ViT"),
        {"img_size": 16, "embed_dim": 32, "num_heads": 2},
    ),
}
PARTS = ("memory", "tuning", "latency", "schedules", "diffusers")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# the middles of the ten intervals: every interval counts alike
TIMESTEPS = tuple(range(50, 1000, 100))


def build(args: argparse.Namespace) -> Backbone:
    """The network in float32 on the CPU."""
    kind, _, tiny = MODELS[args.model]
    torch.manual_seed(args.seed)
    net = kind.from_preset(args.model, **(tiny if args.tiny else {})).eval().requires_grad_(False)
    wake(net, args.seed)
    return net


def on_device(net: nn.Module, args: argparse.Namespace) -> nn.Module:
    """The network itself, moved."""
    net.to(gpu_or_cpu())
    return net if args.dtype == "float32" else net.to(DTYPES[args.dtype])


def inputs(net: Backbone, args: argparse.Namespace) -> tuple[Tensor, Tensor | None]:
    """x_t (N, C, H, W) and labels (N,)."""
    generator = torch.Generator().manual_seed(args.seed)
    x_t = torch.randn(
        args.batch, net.in_channels, net.input_size, net.input_size, generator=generator
    )
    y = (
        torch.randint(net.num_classes, (args.batch,), generator=generator)
        if net.num_classes
        else None
    )
    return x_t.to(gpu_or_cpu(), DTYPES[args.dtype]), None if y is None else y.to(gpu_or_cpu())


# -- memory --------------------------------------------------------------------------------------


def high_water_mb(work: Callable[[], object]) -> float:
    """The most memory of this process from now until the work is done: allocated on a GPU, resident
    on Linux."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # sets the mark back to what is resident now
    work()
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text()
    # getrusage's mark is inherited from the parent
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10


def peak_memory_mb(args: argparse.Namespace, exit_depth: int) -> float:
    """Of one forward in a process of its own, weights included."""
    net = build(args)
    on_device(net, args)
    x_t, y = inputs(net, args)
    t = torch.full((args.batch,), TIMESTEPS[-1], device=x_t.device)
    with torch.no_grad():
        return high_water_mb(lambda: net(x_t, t, y, exit_depth=exit_depth))


class RandomImages:
    """Images (C, H, W) of normal noise, and a label for each, as a trainer takes them."""

    digest = "noise"

    def __init__(self, net: Backbone, seed: int) -> None:
        self.num_classes = net.num_classes
        self.shape = (net.in_channels, net.input_size, net.input_size)
        self.seed = seed

    def __len__(self) -> int:
        return 1000

    def batch(
        self, indices: Sequence[int], generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | None]:
        gen = torch.Generator().manual_seed(self.seed + int(indices[0]))
        labels = torch.tensor(list(indices)) % self.num_classes if self.num_classes else None
        return torch.randn(len(indices), *self.shape, generator=gen), labels


def tuning_memory_mb(args: argparse.Namespace, own_exits: bool) -> tuple[float, float]:
    """Of two steps of distillation in a process of its own, the pretrained network included; and
    the parameters of the result, in millions."""
    net = build(args).to(gpu_or_cpu()).requires_grad_(True)
    schedule = own_schedule(net.depth)
    config = TrainConfig(
        num_steps=2, batch_size=args.batch, distill_frac=1.0, loss_weight=LossWeight(shape="none")
    )
    start = ExitWeights(net, net) if own_exits else net
    data: Any = RandomImages(net, args.seed)
    made: list[Backbone] = []
    mb = high_water_mb(
        lambda: made.append(
            finetune(start, data, Diffusion(), schedule, config, teacher=net).backbone
        )
    )
    return mb, sum(p.numel() for p in made[0].parameters()) / 1e6


def own_schedule(depth: int) -> ExitSchedule:
    """A fifth of the blocks for the noisiest 30 % of t."""
    return ExitSchedule.uniform_intervals([depth] * 7 + [depth // 5 + 1] * 3, depth)


def tuning(args: argparse.Namespace) -> list[Figure]:
    """What fine-tuning one set of weights, or early exits' own, takes."""
    if not measurable("tuning"):
        return []
    found = []
    for own_exits in (False, True):
        say(f"tuning: two steps, weights of their own for early exits: {own_exits}")
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            found.append(pool.submit(tuning_memory_mb, args, own_exits).result())
    (one, params), (own, more) = found
    return [
        Figure("peak memory of fine-tuning, one set of weights", one, "MiB"),
        Figure("peak memory of fine-tuning, early exits' own weights", own, "MiB"),
        Figure("early exits' own / one set", own / one, goal="<= 1.001"),
        Figure("parameters, early exits' own / one set", more / params),
    ]


def measurable(part: str) -> bool:
    """Whether this machine tells a process's peak memory."""
    able = torch.cuda.is_available() or os.access("/proc/self/clear_refs", os.W_OK)
    if not able:
        say(f"{part}: left out, it needs a GPU or Linux")
    return able


def memory(args: argparse.Namespace) -> list[Figure]:
    if not measurable("memory"):
        return []
    schedules = [ExitSchedule.published(name) for name in MODELS[args.model][1]]
    depths = {"early exit": min(min(s.exit_depths) for s in schedules), "full": schedules[0].depth}
    peaks = {}
    for name, depth in depths.items():
        say(f"memory: one forward, exit depth {depth}")
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            peaks[name] = pool.submit(peak_memory_mb, args, depth).result()
    early, full = peaks.values()
    return [
        *(
            Figure(f"peak memory, {name} ({depths[name]} blocks)", mb, "MiB")
            for name, mb in peaks.items()
        ),
        # processes differ by a few pages,
        Figure("peak memory, early exit / full", early / full, goal="<= 1.001"),
    ]


# -- time ----------------------------------------------------------------------------------------


def latency(net: Backbone, args: argparse.Namespace) -> tuple[list[Figure], LatencyTable]:
    say(f"latency: {net.depth} exit depths, {args.repeats} rounds and one to warm up")
    table = measure_latency(net, args.batch, args.repeats, gpu_or_cpu())
    rows = zip(table.median_ms, table.spread_ms, strict=True)
    figures = [
        Figure(f"forward, exit depth {d}", ms, "ms", spread)
        for d, (ms, spread) in enumerate(rows, 1)
    ]
    fixed, per_block = table.fit
    return [
        *figures,
        Figure("fixed part of a forward (fit)", fixed, "ms"),
        Figure("one block (fit)", per_block, "ms"),
    ], table


def bound(net: Backbone, schedule: ExitSchedule) -> float:
    """Speed-up if time were transformer block calls and nothing else."""
    return 1 / schedule.block_frac(TIMESTEPS, net.fixed_blocks)


def network_time(
    net: Backbone, schedule: ExitSchedule, args: argparse.Namespace
) -> Callable[[], None]:
    """The network calls of one sampling, without a solver."""
    x_t, y = inputs(net, args)
    calls = [
        (torch.full((args.batch,), t, device=x_t.device), int(schedule.exit_depth_at(t)))
        for t in TIMESTEPS
    ]

    def run() -> None:
        with torch.no_grad():
            for t, exit_depth in calls:
                net(x_t, t, y, exit_depth=exit_depth)

    return run


def schedules(
    net: Backbone, table: LatencyTable | None, args: argparse.Namespace
) -> tuple[list[Figure], dict[str, Any]]:
    figures = []
    raw = {}
    full = network_time(net, ExitSchedule.full(net.depth), args)
    for name in MODELS[args.model][1]:
        schedule = ExitSchedule.published(name, net.depth)
        say(f"schedules: {name}, {args.repeats} pairs of {len(TIMESTEPS)} calls and one to warm up")
        ratio = compare_sampling_time(
            network_time(net, schedule, args), full, args.repeats, call_timer(gpu_or_cpu())
        )
        measured = 1 / ratio.median
        limit = bound(net, schedule)
        spread = ratio.spread / ratio.median**2
        goal = ">= 1.0" if args.model == "DiT-XL/2" else None
        figures += [
            Figure(f"{name}, speed-up measured", measured, spread=spread),
            Figure(f"{name}, speed-up of the block calls (bound)", limit),
            Figure(f"{name}, measured / bound", measured / limit, spread=spread / limit, goal=goal),
        ]
        if table is not None:
            figures.append(
                Figure(
                    f"{name}, speed-up of the bound with the fixed part",
                    1 / table.bound_frac(schedule, TIMESTEPS),
                )
            )
        raw[name] = asdict(ratio)
    return figures, raw


# -- diffusers -----------------------------------------------------------------------------------


def as_diffusers(net: DiT) -> nn.Module:
    """diffusers' DiT on the very tensors of `net`, doing the same arithmetic."""
    from accelerate import init_empty_weights
    from diffusers import DiTTransformer2DModel

    state, config = dit_to_diffusers(net.state_dict(), net.config)
    with init_empty_weights(include_buffers=False):
        model = DiTTransformer2DModel(**config)
    model.load_state_dict(state, assign=True)
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # 1 in diffusers, 0 in the official code
    return model.eval().requires_grad_(False)


def against_diffusers(
    net: Backbone, theirs: nn.Module, args: argparse.Namespace
) -> tuple[list[Figure], dict[str, Any]]:
    x_t, y = inputs(net, args)
    t = torch.full((args.batch,), TIMESTEPS[5], device=x_t.device)

    @torch.no_grad()
    def ours_run() -> Tensor:
        out: Tensor = net(x_t, t, y)
        return out

    @torch.no_grad()
    def theirs_run() -> Tensor:
        out: Tensor = theirs(x_t, timestep=t, class_labels=y).sample
        return out

    say(f"diffusers: {4 * args.repeats} pairs of full-depth forwards")
    ours_out = ours_run().float()
    theirs_out = theirs_run().float()
    ratio = compare_sampling_time(ours_run, theirs_run, 4 * args.repeats, call_timer(gpu_or_cpu()))
    ours_s, theirs_s = (median(side) for side in zip(*ratio.pairs, strict=True))
    return [
        Figure("full-depth forward", ours_s * 1e3, "ms"),
        Figure("full-depth forward, diffusers", theirs_s * 1e3, "ms"),
        Figure("full-depth forward / diffusers, of the medians", ours_s / theirs_s, goal="<= 0.97"),
        Figure("full-depth forward / diffusers, of the pairs", ratio.median, spread=ratio.spread),
        Figure("largest difference of the outputs", float((ours_out - theirs_out).abs().max()), ""),
        Figure("largest output", float(theirs_out.abs().max()), ""),
    ], asdict(ratio)


def compile_blocks(net: Backbone, theirs: nn.Module | None) -> None:
    """In place, so that every exit depth shares the compiled blocks."""
    for i in range(net.depth):
        net.block_at(i).compile()
    for block in theirs.transformer_blocks if theirs is not None else ():
        block.compile()


def main() -> None:
    parser = options(__doc__ or "", repeats=5, batch=1)
    parser.add_argument("--model", choices=MODELS, default="DiT-XL/2")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of weights and images (default %(default)s)",
    )
    parser.add_argument(
        "--only", choices=PARTS, nargs="+", default=PARTS, help="parts to run (default all)"
    )
    args = parse(parser)
    figures = memory(args) if "memory" in args.only else []
    figures += tuning(args) if "tuning" in args.only else []
    raw = {}
    net = build(args)
    theirs = as_diffusers(net) if "diffusers" in args.only and isinstance(net, DiT) else None
    for model in (net, theirs):
        if model is not None:
            on_device(model, args)
    if args.compile:
        compile_blocks(net, theirs)
    table = None
    if "latency" in args.only:
        more, table = latency(net, args)
        figures = [*figures, *more]
        raw["latency"] = table.to_dict()
    if "schedules" in args.only:
        more, raw["schedules"] = schedules(net, table, args)
        figures += more
    if theirs is not None:
        more, raw["diffusers"] = against_diffusers(net, theirs, args)
        figures += more
    publish("true_size", args, figures, raw)


if __name__ == "__main__":
    main()
