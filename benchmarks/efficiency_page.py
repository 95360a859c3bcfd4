"""The page of `search_efficiency.py`: hypervolume against compute, fresh-seed fronts, and the
numbers behind them."""

from __future__ import annotations

import argparse
import base64
import html
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure as Picture
from measuring import Figure

from asesearch.files import replacing
from asesearch.report.style import (
    BLUE,
    GREEN,
    GREY,
    HEIGHT,
    ORANGE,
    PURPLE,
    VERMILION,
    Drawing,
    axes,
    log_axis,
    relative_axis,
)

#: Names of the two figures that the page's first sentence tells.
RATIO = "our compute at the best baseline's hypervolume / all of its"
COVERED = "share of the best baseline's fresh front that ours dominates"
COLOURS = {
    "difficulty": VERMILION,
    "random": GREY,
    "tpe": BLUE,
    "nsga2": GREEN,
    "gp": ORANGE,
    "other": PURPLE,
}
NAMES = {
    "difficulty": "asesearch",
    "random": "random",
    "tpe": "TPE",
    "nsga2": "NSGA-II",
    "gp": "GP",
}


def compute_table(curves: dict[str, list[list[tuple[float, float]]]]) -> pd.DataFrame:
    """Hypervolume after each trial: one row a method, repeat and trial."""
    rows = [
        {"method": method, "repeat": i, "trial": j, "tflop": spent / 1000, "hypervolume": volume}
        for method, runs in curves.items()
        for i, run in enumerate(runs)
        for j, (spent, volume) in enumerate(run)
    ]
    return pd.DataFrame(rows)


def draw_compute(data: pd.DataFrame) -> Picture:
    """Every run thin, and each method's mean over its runs thick."""
    figure, ax = axes(HEIGHT + 0.4)
    for method, mine in data.groupby("method", sort=False):
        colour = COLOURS[method]
        grid = np.linspace(0, mine["tflop"].max(), 200)
        runs = []
        for _, run in mine.groupby("repeat"):
            ax.step(run["tflop"], run["hypervolume"], where="post", color=colour, lw=0.6, alpha=0.5)
            place = np.searchsorted(run["tflop"], grid, side="right") - 1
            runs.append(
                np.where(place >= 0, run["hypervolume"].to_numpy()[np.maximum(place, 0)], 0.0)
            )
        ax.plot(grid, np.mean(runs, axis=0), color=colour, lw=2, label=NAMES[method])
    ax.set_xlabel("compute spent, TFLOP (all of it)")
    ax.set_ylabel("hypervolume  (higher is better)")
    ax.legend(frameon=False, loc="lower right")
    return figure


def front_table(results: list[dict[str, Any]]) -> pd.DataFrame:
    """Final fronts on fresh seeds."""
    return pd.DataFrame(
        [{"method": r["method"], "repeat": r["repeat"], **p} for r in results for p in r["fresh"]]
    )


def draw_fronts(data: pd.DataFrame) -> Picture:
    """Fresh-seed scores of each method's final front, all repeats."""
    figure, ax = axes(HEIGHT + 0.4)
    for method, mine in data.groupby("method", sort=False):
        ax.plot(
            mine["cost"],
            mine["quality"],
            "o",
            color=COLOURS[method],
            ms=5,
            alpha=0.8,
            label=NAMES[method],
        )
    ax.set_xlabel("sampling FLOPs / full network's")
    ax.set_ylabel("Fréchet distance (fashion-cnn)")
    relative_axis(ax.xaxis)
    log_axis(ax)
    ax.legend(frameon=False)
    return figure


def write_page(
    folder: Path,
    figures: list[Figure],
    raw: dict[str, Any],
    results: list[dict[str, Any]],
    args: argparse.Namespace,
) -> None:
    """`index.html`, its figures and their data."""
    folder.mkdir(parents=True, exist_ok=True)
    compute = compute_table(raw["curves"])
    fronts = front_table(results)
    shown = [
        Drawing(
            "compute",
            "Hypervolume against compute",
            COMPUTE,
            compute,
            lambda: draw_compute(compute),
        ),
        Drawing(
            "fronts", "Final fronts on fresh seeds", FRONTS, fronts, lambda: draw_fronts(fronts)
        ),
    ]
    pictures = []
    for drawing in shown:
        svg = base64.b64encode(drawing.save(folder)).decode()
        pictures.append(
            f'<figure><h2>{drawing.title}</h2><img alt="{drawing.title}" '
            f'src="data:image/svg+xml;base64,{svg}"><figcaption>{drawing.caption} <a '
            f'href="{drawing.name}.csv">data</a></figcaption></figure>'
        )
    rows = "".join(
        f"<tr><th>{html.escape(shown_name(f))}</th><td>{cell(f)}</td><td>{goal(f)}</td></tr>"
        for f in figures
    )
    settings = ", ".join(
        f"{k} {v}"
        for k, v in sorted(vars(args).items())
        if isinstance(v, int) and not isinstance(v, bool)
    )
    command = "python benchmarks/search_efficiency.py"
    if args.full_depth == "pretrained":
        command += f" --network {args.network} --full-depth pretrained"
    text = PAGE.format(
        answer=html.escape(answer(figures)),
        pictures="".join(pictures),
        rows=rows,
        settings=settings,
        network=html.escape(args.network.removeprefix("shipped:")),
        recipe=RECIPES[args.full_depth],
        command=html.escape(f"{command} --report {folder}"),
    )
    with replacing(folder / "index.html") as part:
        part.write_text(text, encoding="utf-8")


def shown_name(figure: Figure) -> str:
    """Its name, with a method as the page calls it."""
    what, found, method = figure.name.rpartition(": ")
    return f"{what}{found}{NAMES.get(method, method)}"


def cell(figure: Figure) -> str:
    """Value, unit and spread; a ratio has its sign of multiplication."""
    spread = "" if figure.spread is None else f" ± {figure.spread:.3g}"
    unit = "×" if figure.unit == "x" else f" {figure.unit}"
    return f"{figure.value:.4g}{spread}{unit}".rstrip()


def goal(figure: Figure) -> str:
    """The goal and whether it is met."""
    return (
        ""
        if figure.goal is None
        else f"{html.escape(figure.goal)}: {'met' if figure.met else 'missed'}"
    )


def answer(figures: list[Figure]) -> str:
    """The search's compute and the share of the front that it dominates, in a sentence."""
    named = {figure.name: figure for figure in figures}
    ratio = named[RATIO]
    share = named[COVERED]
    reached = (
        f"The best baseline's final hypervolume was reached with {ratio.value:.2f} of its compute "
        "(median of the repeats)"
        if np.isfinite(ratio.value)
        else "The best baseline's final hypervolume was not reached in most repeats"
    )
    return (
        f"{reached}; on fresh seeds {100 * share.value:.0f} % of the best baseline's front is "
        "dominated."
    )


COMPUTE = (
    "Every trial, mean over repeats thick. All arithmetic counts: warm-up, map, fine-tuning, "
    "sampling. Reference point: 1.1 times the full network's cost, twice its score; area in "
    "relative cost times the logarithm of the score. The first trials are the same for all "
    "baselines: warm starts, then random draws (up to the 8th for TPE and GP, the 10th for "
    "NSGA-II)."
)
RECIPES = {
    "tuned": "The full network is tuned alike for all; baselines learn from images, ours distils.",
    "pretrained": (
        "Early exits have weights of their own, distilled from the pretrained network by all "
        "methods alike; the full network is the pretrained one."
    ),
}
FRONTS = "The points of each method's final front, sampled again on seeds that no search has seen."
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Search efficiency</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem;
  margin: 0 auto; padding: 1rem; color: #222; }}
.figures {{ display: flex; flex-wrap: wrap; gap: 1.5rem; }}
figure {{ flex: 1 1 20rem; margin: 0; }}
img {{ width: 100%; }}
h2 {{ font-size: 1.05rem; }}
figcaption {{ font-size: .9rem; color: #555; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; }}
th, td {{ text-align: left; padding: .3rem .8rem; border-bottom: 1px solid #ddd; }}
th {{ font-weight: normal; }} .big {{ font-size: 1.25rem; }}
</style></head><body>
<h1>What a search costs</h1>
<p class="big">{answer}</p>
<p>Random, TPE, NSGA-II and GP (Optuna's) fine-tune every schedule from the pretrained weights.
asesearch pays for one elastic warm-up and a difficulty map first, then fine-tunes more briefly
what its low-fidelity scores promote. One study a method and repeat, on the shipped network
{network} and the 10,000 shipped images, sampled in 8 steps of DPM-Solver++(2M). Baselines
share the warm starts full, D2, D3, D4 and D7; ours starts from the full network alone. {recipe}</p>
<div class="figures">{pictures}</div>
<h2>Numbers</h2><div class="scroll"><table>
<thead><tr><th>number</th><td>value ± half the range over repeats</td><td>goal</td></tr></thead>
<tbody>{rows}</tbody></table></div>
<h2>Reproduce</h2>
<p><code>{command}</code> ({settings})</p>
</body></html>
"""
