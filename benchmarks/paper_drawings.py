"""Figures of the paper's page, each drawn from one table and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from paper_shown import Experiment

from asesearch.report.labels import named, place_labels, xy
from asesearch.report.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    SMALL,
    VERMILION,
    Drawing,
    axes,
    log_axis,
    settle,
)

#: Name, colour and mark of each method.
METHODS = {
    "full": ("full network", "black", "*"),
    "exits": ("early exits", VERMILION, "o"),
    "joined": ("early exits, pretrained at full depth", VERMILION, "^"),
    "data-easy": ("the same, data-easy", PURPLE, "v"),
    "static": ("one depth everywhere", ORANGE, "s"),
    "steps": ("fewer steps", BLUE, "D"),
    "cache": ("caching", GREEN, "P"),
    "merge": ("token merging", SKY, "X"),
    "deediff": ("uncertainty exits", GREY, "h"),
    "exits+cache": ("early exits with caching", BLUE, "d"),
}
SOLVERS = {"ddim": BLUE, "ddpm": ORANGE, "dpm++2m": GREEN, "dpm++2m-order2": PURPLE}


def drawings(experiment: Experiment) -> Iterator[Drawing]:
    """The figures that the rows allow."""
    table = experiment.table()
    table = table[table["score"].notna()] if len(table) else table
    if table.empty:
        return
    if experiment.name == "figure4":
        yield Drawing("figure4", "Score over steps", STEPS, table, lambda: draw_steps(table))
    for sampler in experiment.samplers if experiment.name in ("figure1", "figure3") else ():
        mine = table[table["against"] == sampler].copy()
        cost = "flops_frac" if mine["time_frac"].isna().any() else "time_frac"
        if len(mine) > 1:
            title = f"Score against {SAVED[cost][0]}, {sampler}"
            name = f"{experiment.name}-{sampler.replace('+', 'p')}"
            draw = partial(draw_saved, mine, cost)
            yield Drawing(name, title, f"{SAVED[cost][1]} {BETTER}", mine, draw)


#: What a figure may set the score against: its name, and how it was measured.
SAVED = {
    "time_frac": (
        "time saved",
        "Measured sampling time saved, interleaved with the full network under the same sampler. "
        "Bars: one standard error of resampling, and half-IQR of the time.",
    ),
    "flops_frac": (
        "FLOPs saved",
        "FLOPs saved over the full network under the same sampler; the time of some rows is not "
        "measured. Bars: one standard error of resampling.",
    ),
}
BETTER = "Down and right is better."
STEPS = (
    "Solid: early exits, by the schedule in the tables below; dashed: the full network after "
    "equal-compute fine-tuning; dotted: the full network as it is. Bars: one standard error of "
    "resampling."
)


def draw_saved(data: pd.DataFrame, cost: str) -> Figure:
    """Score against what is saved of a cost."""
    data["saved"] = 100 * (1 - data[cost])
    figure, ax = axes(4.4)
    for method, (name, colour, mark) in METHODS.items():
        mine = data[data["method"] == method]
        if len(mine):
            ax.errorbar(
                mine["saved"],
                mine["score"],
                xerr=100 * mine["time_spread"].fillna(0.0) if cost == "time_frac" else None,
                yerr=mine["resampling"].fillna(0.0),
                fmt=mark,
                color=colour,
                ms=9 if mark == "*" else 5.5,
                elinewidth=1,
                label=name,
            )
    ax.set_xlabel(f"{SAVED[cost][0]}, %")
    _scores(ax, data)
    ax.margins(0.1)
    ax.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.45, 1.25), ncols=2)
    settle(figure)
    labelled = data[data["method"].isin(["exits", "steps"])]
    place_labels(ax, named(labelled, "saved", "score"), xy(data, "saved", "score"), SMALL - 1)
    return figure


def draw_steps(data: pd.DataFrame) -> Figure:
    """Score over the number of steps, a colour for each solver."""
    split = data["sampler"].str.rpartition("-")
    data = data.assign(solver=split[0], steps=split[2].astype(int)).sort_values("steps")
    figure, ax = axes(3.9)
    for solver, colour in SOLVERS.items():
        if solver not in set(data["solver"]):
            continue
        for method, recipe, style in (
            ("exits", "own", "-"),
            ("full", "own", "--"),
            ("full", "pretrained", ":"),
        ):
            same = (data["method"] == method) & (data["recipe"] == recipe)
            mine = data[same & (data["solver"] == solver)]
            ax.errorbar(
                mine["steps"],
                mine["score"],
                mine["resampling"].fillna(0.0),
                ls=style,
                marker="o",
                ms=3.5,
                color=colour,
                label=solver if method == "exits" else None,
            )
    ax.set_xscale("log")
    ticks = sorted(set(data["steps"]))
    ax.set_xticks(ticks, [str(t) for t in ticks])
    ax.set_xticks([], minor=True)
    ax.set_xlabel("steps")
    _scores(ax, data)
    ax.legend(frameon=False)
    return figure


def _scores(ax: Axes, data: pd.DataFrame) -> None:
    ax.set_ylabel("Fréchet distance (fashion-cnn)")
    if data["score"].max() > 2 * data["score"].min() > 0:
        log_axis(ax)
    else:
        ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
