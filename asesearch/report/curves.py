"""Figures of a report's curves: scores and hypervolume over trials, cost, latency, losses. Each is
drawn from one table and nothing else."""

from __future__ import annotations

import numpy as np
import pandas as pd
import seaborn
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from asesearch.report import exhibits, tables
from asesearch.report.labels import named, place_labels, spread_out, two_lines, xy
from asesearch.report.style import (
    BLUE,
    GREY,
    SMALL,
    VERMILION,
    Drawing,
    axes,
    log_if_wide,
    relative_axis,
    score_axis,
    settle,
)
from asesearch.report.wording import number, percent
from asesearch.study.records import StudyResults

_COST = (
    "Sampling time against the block-call bound, both over the full network's. On the diagonal the "
    "clock saves all that the blocks promise; above it, time goes to what no exit can skip."
)
_APART = (
    " A predicted time is of the device and batch of the worker that ran the trial: such times are "
    "not compared, the search goes by FLOPs."
)


def trials_drawing(results: StudyResults) -> Drawing:
    """The figure of all scores over trials."""
    done = tables.trials(results)
    cost = f"{results.cost}_frac"
    columns = ["number", "label", "metric", "quality", "std_error", cost, "best_quality"]
    return Drawing.of(
        "trials",
        "Quality over trials",
        "Every trial under the search protocol; the line is the best so far. Bars: one standard "
        "error.",
        done[done["state"] == "complete"][columns],
        draw_trials,
    )


def drawings(results: StudyResults) -> list[Drawing]:
    """The other figures of this module, those without data too."""
    volume = tables.hypervolume(results)
    losses = exhibits.losses(results)
    return [
        Drawing.of(
            "hypervolume",
            "Hypervolume over trials",
            _hypervolume_caption(volume),
            volume,
            draw_hypervolume,
        ),
        Drawing.of(
            "cost",
            "Cost: bound and clock",
            _COST + (_APART if results.cost == "flops" else ""),
            tables.cost(results),
            draw_cost,
        ),
        Drawing.of(
            "latency",
            "Latency by exit depth",
            "Median time of one network call, and the straight line through it.",
            exhibits.latency(results),
            draw_latency,
        ),
        Drawing.of(
            "losses", "Fine-tuning loss", _losses_caption(results, losses), losses, draw_losses
        ),
    ]


def _losses_caption(results: StudyResults, losses: pd.DataFrame) -> str:
    full = tables.FULL in set(losses["label"])
    of = " and of the full network" if full else ""
    caption = f"Loss of front points{of}, averaged over stretches of steps."
    frac = results.config.get("train", {}).get("distill_frac")
    if full and frac:
        share = "" if frac == 1 else f", for {percent(frac)} of the samples,"
        caption += (
            f" The full network learns the noise, the others{share} what a teacher predicts: "
            "levels differ."
        )
    return caption


def _hypervolume_caption(volume: pd.DataFrame) -> str:
    if volume.empty:
        return ""
    last = volume.iloc[-1]
    what = "the logarithm of the score" if last["scale"] == "log" else "the score"
    unit = tables.unit_of(last["cost"])
    return (
        f"Area dominated in relative {unit} × {what}, below the reference point: {unit} "
        f"{last['reference_time_frac']:g}, {last['metric']} {number(last['reference_quality'])}."
    )


def draw_trials(data: pd.DataFrame) -> Figure:
    """Score over trials, coloured by cost: complete rows of `tables.trials`."""
    figure, ax = axes()
    by_flops = "flops_frac" in data
    costs = data["flops_frac" if by_flops else "time_frac"]
    if data["std_error"].notna().any():
        ax.errorbar(
            data["number"],
            data["quality"],
            data["std_error"],
            fmt="none",
            ecolor="0.6",
            elinewidth=1,
            zorder=2,
        )
    dots = ax.scatter(
        data["number"],
        data["quality"],
        40,
        costs,
        cmap="viridis",
        edgecolors="white",
        zorder=3,
    )
    dots.set_clim(min(0.5, costs.min()), max(1.0, costs.max()))
    ax.step(data["number"], data["best_quality"], where="post", color=VERMILION, zorder=2)
    bar = figure.colorbar(dots, ax=ax, pad=0.02, aspect=22)
    bar.set_label(f"{tables.FLOPS if by_flops else tables.PREDICTED} / full network's")
    relative_axis(bar.ax.yaxis)
    bar.outline.set_visible(False)
    _over_trials(ax)
    score_axis(ax, data["metric"].iloc[0])
    log_if_wide(ax, data["quality"])
    ax.margins(0.08)
    settle(figure)
    last = data.iloc[-1]
    place_labels(
        ax,
        [(last["number"], last["best_quality"], "best so far")],
        xy(data, "number", "quality"),
        SMALL,
    )
    return figure


def _over_trials(ax: Axes) -> None:
    ax.set_xlabel("trial")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    low, high = ax.get_xlim()
    ax.set_xlim(min(low, -0.5), max(high, 0.5))


def draw_hypervolume(data: pd.DataFrame) -> Figure:
    """`tables.hypervolume`."""
    figure, ax = axes(2.8)
    ax.step(data["number"], data["hypervolume"], where="post", color=BLUE)
    ax.plot(data["number"], data["hypervolume"], "o", color=BLUE, ms=3.5)
    ax.set_ylim(bottom=0, top=max(1e-6, 1.1 * data["hypervolume"].max()))
    _over_trials(ax)
    ax.set_ylabel("hypervolume  (higher is better)")
    return figure


def draw_cost(data: pd.DataFrame) -> Figure:
    """Time against the block-call bound: `tables.cost`."""
    figure, ax = axes(3.9)
    measured = data[data["measured_time_frac"].notna()]
    ax.plot(
        data["block_frac"],
        data["predicted_time_frac"],
        "o",
        mfc="white",
        color=GREY,
        ms=5,
        zorder=2,
    )
    ax.errorbar(
        measured["block_frac"],
        measured["measured_time_frac"],
        yerr=measured["measured_time_spread"],
        fmt="o",
        color=BLUE,
        ms=6,
        capsize=2,
        elinewidth=1,
        zorder=4,
    )
    low = float(data[["block_frac", "predicted_time_frac", "measured_time_frac"]].min().min())
    span = (min(0.95, low) - 0.04, 1.04)
    ax.plot(span, span, ls=(0, (4, 3)), color="0.5", lw=1, zorder=1)
    ax.set_xlim(*span)
    ax.set_ylim(
        span[0],
        max(1.04, 1.02 * float(data[["predicted_time_frac", "measured_time_frac"]].max().max())),
    )
    ax.set_xlabel("block calls / full network's  (bound)")
    ax.set_ylabel("sampling time / full network's")
    relative_axis(ax.xaxis)
    relative_axis(ax.yaxis)
    settle(figure)
    keys = [("measured", BLUE)] if len(measured) else []
    for i, (text, colour) in enumerate(
        [*keys, ("predicted from the latency table", "0.45"), ("time = blocks", "0.45")]
    ):
        ax.text(
            0.03,
            0.97 - 0.065 * i,
            f"{'- - ' if text.startswith('time') else '○ ' if text[0] == 'p' else '● '}{text}",
            transform=ax.transAxes,
            color=colour,
            va="top",
            fontsize=SMALL,
        )
    dots = [
        *xy(data, "block_frac", "predicted_time_frac"),
        *((float(v), float(v)) for v in np.linspace(span[0], span[1], 40)),
    ]
    every = max(1, -(-len(measured) // 8))
    place_labels(
        ax,
        named(measured.sort_values("block_frac")[::-every], "block_frac", "measured_time_frac"),
        dots,
        SMALL,
    )
    return figure


def draw_latency(data: pd.DataFrame) -> Figure:
    """`exhibits.latency`."""
    figure, ax = axes(2.9)
    ax.plot(data["exit_depth"], data["latency_ms"], "o", color=BLUE, ms=5, zorder=3)
    ax.set_ylim(0, 1.12 * float(data["latency_ms"].max()))
    ax.set_xlim(left=0, right=len(data) + 0.5)
    ax.set_xlabel("exit depth (blocks run)")
    ax.set_ylabel("latency of one call, ms")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(data) > 1:
        slope = (data["fit_ms"].iloc[-1] - data["fit_ms"].iloc[0]) / (len(data) - 1)
        base = data["fit_ms"].iloc[0] - slope
        ax.plot([0, len(data)], [base, data["fit_ms"].iloc[-1]], color=VERMILION, lw=1.2, zorder=2)
        text = f"{number(base)} ms + {number(slope)} ms a block"
        ax.text(0.04, 0.95, text, transform=ax.transAxes, color=VERMILION, va="top", fontsize=SMALL)
    return figure


def draw_losses(data: pd.DataFrame) -> Figure:
    """`exhibits.losses`, each curve named at its end."""
    figure, ax = axes()
    names = list(dict.fromkeys(data["label"]))
    others = [n for n in names if n != tables.FULL]
    colours = dict(
        zip(others, seaborn.color_palette("crest", len(others)).as_hex(), strict=True)
    ) | {tables.FULL: VERMILION}
    for name in names:
        mine = data[data["label"] == name]
        ax.plot(
            mine["step"],
            mine["loss"],
            color=colours[name],
            lw=1.4,
            marker="o" if len(mine) == 1 else None,
        )
    log_if_wide(ax, data["loss"])
    last = data.groupby("label")["step"].max()
    if last.max() > 4 * last.min():  # the full network's equal compute
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    ax.set_xlabel("fine-tuning step")
    ax.set_ylabel("loss")
    ends = [data[data["label"] == n].iloc[-1] for n in names]
    figure.draw_without_rendering()
    # (n, 2)
    places = ax.transAxes.inverted().transform(
        ax.transData.transform([(e["step"], e["loss"]) for e in ends])
    )
    lines = 1 + max(two_lines(name).count("\n") for name in names)
    gap = (0.1 + 1.25 * lines) * SMALL * figure.dpi / 72 / ax.get_window_extent().height
    heights = spread_out(places[:, 1].tolist(), gap, 0.02, 0.98)
    for name, (x, y), height in zip(names, places, heights, strict=True):
        line = {
            "arrowstyle": "-",
            "lw": 0.6,
            "color": colours[name],
            "shrinkA": 0,
            "shrinkB": 0,
            "relpos": (0, 0.5),
        }
        ax.annotate(
            two_lines(name),
            (x, y),
            (1.03, height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=VERMILION if name == tables.FULL else "0.2",
            fontsize=SMALL,
            va="center",
            arrowprops=line,
        )
    return figure
