"""How firm the front is, over the repeats of the evaluation, and what each interval is worth, in
tables and figures."""

from __future__ import annotations

import numpy as np
import pandas as pd
import seaborn
from matplotlib.figure import Figure
from scipy.special import ndtri

from asesearch.report import attainment, tables
from asesearch.report.style import (
    BLUE,
    VERMILION,
    WIDTH,
    Drawing,
    attained_band,
    axes,
    front_line,
    log_if_wide,
    relative_axis,
    score_axis,
)
from asesearch.score import CONFIDENCE
from asesearch.study.records import StudyResults

_ATTAINED = (
    "What all repeats of the evaluation attained (upper line), at least half (middle) and the best "
    "one (lower): where the band is wide, the front may be noise."
)
_IMPORTANCE = (
    "How much the score is expected to rise where that interval alone runs half of its blocks, by "
    f"the quality model after all trials; bars: {tables.LEVEL}. Below: the {{}} it saves."
)


def attained(results: StudyResults, kind: tables.Kind) -> pd.DataFrame:
    """What the best repeat of the evaluation attained, at least half of them, and all: how firm the
    front is; empty for one repeat. Times are those that may be claimed, see `tables.points`."""
    scores_of = tables.scores_of(results, kind)
    table = tables.points(results, kind).dropna(subset=["credited_frac"])
    if table.empty:
        return attainment.surfaces([])
    scores = np.array([scores_of[n].values for n in table["number"]])  # (points, repeats)
    times = table["credited_frac"].to_numpy(dtype=np.float64)
    found = attainment.surfaces([np.column_stack((times, column)) for column in scores.T])
    return found.assign(cost=tables.cost_of(results, kind))


def importance(results: StudyResults) -> pd.DataFrame:
    """What each interval is worth, data side first: how much the score is expected to rise where it
    alone runs half of its blocks, in per cent, with the ends of the interval of that confidence,
    and the time that saves, or, in a study of FLOPs, those.

    Source: `asesearch.proposer.importance`.
    """
    found = results.importance
    if found is None:
        return pd.DataFrame()
    mean, std = np.array(found.log_change), np.array(found.log_std)
    reach = float(ndtri((1 + CONFIDENCE) / 2))

    def rise(log_change: np.ndarray) -> np.ndarray:
        return np.asarray(100 * np.expm1(log_change))

    return pd.DataFrame(
        {
            "t_from": found.boundaries[:-1],
            "t_to": found.boundaries[1:],
            "exit_depth": found.exit_depth,
            "depth": found.depth,
            "rise_percent": rise(mean),
            "rise_low": rise(mean - reach * std),
            "rise_high": rise(mean + reach * std),
            "cost": tables.cost_of(results, "search"),
            "time_saved": found.time_saved,
            "sampler": found.sampler,
            "num_scores": found.num_scores,
        }
    )


def draw_attainment(data: pd.DataFrame, points: pd.DataFrame) -> Figure:
    """`attained`: the front of each share of the repeats.

    Args:
        data: the surfaces.
        points: for the names of the axes.
    """
    figure, ax = axes(3.9)
    end = max(1.0, float(data["time_frac"].max()))
    attained_band(ax, data, end, BLUE)
    for level, style in (("best", ":"), ("median", "-"), ("worst", "--")):
        mine = data[data["level"] == level]
        by = int(mine["attained_by"].iloc[0])
        front_line(ax, mine, end, style, color=BLUE, lw=1.4, label=f"{level} (by {by})")
    ax.set_xlabel(tables.AXES[points["cost"].iloc[0]])
    score_axis(ax, points["metric"].iloc[0], 3.6)
    relative_axis(ax.xaxis)
    figure.legend(frameon=False, loc="outside upper center", ncols=3)
    log_if_wide(ax, data["quality"])
    return figure


def draw_importance(data: pd.DataFrame) -> Figure:
    """`importance`: rise of the score above, time saved below."""
    figure = Figure(figsize=(WIDTH, 3.9), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2.2, 1))
    middle = (data["t_from"] + data["t_to"]) / 2
    width = 0.86 * (data["t_to"] - data["t_from"])
    away = [data["rise_percent"] - data["rise_low"], data["rise_high"] - data["rise_percent"]]
    top.bar(middle, data["rise_percent"], width, color=VERMILION, alpha=0.75)
    top.errorbar(middle, data["rise_percent"], away, fmt="none", ecolor="0.25", capsize=3, lw=1)
    top.axhline(0, color="0.4", lw=0.8)
    top.set_ylabel("rise of the score, %")
    bottom.bar(middle, 100 * data["time_saved"], width, color=BLUE, alpha=0.75)
    bottom.set_ylabel(f"{tables.unit_of(data['cost'].iloc[0])} saved, %")
    bottom.set_xlabel("timestep (0 = data, right = noise)")
    bottom.set_xlim(int(data["t_from"].iloc[0]), int(data["t_to"].iloc[-1]))
    for ax in (top, bottom):
        ax.grid(False, axis="x")
        seaborn.despine(ax=ax)
    return figure


def attainment_drawing(results: StudyResults) -> Drawing:
    """The figure of the front's repeats; without repeats its table is empty."""
    kind = tables.kind_of(results)

    def draw(data: pd.DataFrame) -> Figure:
        return draw_attainment(data, tables.points(results, kind))

    title = "Attainment over repeats"
    return Drawing.of("attainment", title, _ATTAINED, attained(results, kind), draw)


def importance_drawing(results: StudyResults) -> Drawing:
    """The figure of the intervals; where the study has no estimate of them its table is empty."""
    title = "What each interval is worth"
    caption = _IMPORTANCE.format(tables.unit_of(tables.cost_of(results, "search")))
    return Drawing.of("importance", title, caption, importance(results), draw_importance)
