"""What the benchmarks share: options, the device, and results as a table on stdout and a JSON
file."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from asesearch.files import write_json
from asesearch.study.environment import environment

QUICK = 2  # repeats of --quick and --tiny
TINY = 1
LEAST = 2  # blocks that a warm-up draws, where nothing else is said


@dataclass(frozen=True)
class Figure:
    """One measured number.

    Attributes:
        name: what was measured.
        value: in `unit`; `x` is a ratio of two quantities of the same kind.
        spread: half-IQR over the repeats, None for what is not
            repeated.
        goal: `<= number` or `>= number`, None for a number that is only reported.
    """

    name: str
    value: float
    unit: str = "x"
    spread: float | None = None
    goal: str | None = None

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached, None without one."""
        if self.goal is None:
            return None
        sign, limit = self.goal.split()
        return self.value <= float(limit) if sign == "<=" else self.value >= float(limit)


def options(description: str, repeats: int, batch: int) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have; the arguments are its defaults."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--batch", type=int, default=batch, help="images per call or step (default %(default)s)"
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=repeats,
        help="timed repeats of each comparison (default %(default)s)",
    )
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} repeats: a first look")
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="a tiny network, to see that the script runs; goals do not apply",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile every droppable block, as train.compile does",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of weights and inputs (default %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    return parser


def add_full_depth(parser: argparse.ArgumentParser) -> None:
    """The option that gives early exits weights of their own."""
    parser.add_argument(
        "--full-depth",
        choices=["tuned", "pretrained"],
        default="tuned",
        help="pretrained: weights of their own for early exits, as search.full_depth has it",
    )


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line, with `repeats` as --quick and --tiny have it."""
    args = parser.parse_args()
    if args.batch < 1 or args.repeats < 1:
        parser.error(
            f"--batch and --repeats must be at least 1; got {args.batch} and {args.repeats}"
        )
    args.repeats = TINY if args.tiny else QUICK if args.quick else args.repeats
    args.load_before = _load()
    args.started = time.perf_counter()
    return args


def gpu_or_cpu() -> torch.device:
    """The current GPU where there is one; hide it with CUDA_VISIBLE_DEVICES= to measure the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wake(net: nn.Module, seed: int) -> None:
    """Draw what starts at zero (adaLN-Zero, the output layer, biases) from N(0, 0.02), so that
    every block does real work."""
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.02, generator=generator)


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def publish(
    benchmark: str, args: argparse.Namespace, figures: Sequence[Figure], raw: dict[str, Any]
) -> None:
    """Print the figures as a table and write them with everything they depend on.

    Args:
        raw: what the figures were computed from.
    """
    figures = [replace(f, goal=None) for f in figures] if args.tiny else figures
    width = max(len(f.name) for f in figures)
    print(f"{'':{width}}  {'value':>12} {'':4} {'spread':>8}  goal")
    for f in figures:
        spread = "" if f.spread is None else f"{f.spread:.4g}"
        goal = "" if f.goal is None else f"{f.goal}  {'met' if f.met else 'MISSED'}"
        print(f"{f.name:{width}}  {f.value:12.5g} {f.unit:4} {spread:>8}  {goal}".rstrip())
    settings = {
        k: v
        for k, v in vars(args).items()
        if k not in ("out", "work", "report", "load_before", "started")
    }
    record = {
        "benchmark": benchmark,
        "settings": settings,
        "environment": machine(),
        # 1 minute; far above `threads` = not a quiet machine
        "load_average": {"before": args.load_before, "after": _load()},
        "seconds": time.perf_counter() - args.started,
        "figures": [{**asdict(f), "met": f.met} for f in figures],
        "raw": raw,
    }
    if args.out is not None:
        write_json(args.out, record)
        say(f"wrote {args.out}")


def machine() -> dict[str, Any]:
    """Machine and versions, for records."""
    return {**environment(), "cpu": _cpu_name(), "device": gpu_or_cpu().type}


def _load() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )
