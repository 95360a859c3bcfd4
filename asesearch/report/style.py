"""What all figures share: colours, sizes, axes, and how they are saved.

Sized for a phone: at 360 px the smallest text is still 9 px high.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import seaborn
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath
from matplotlib.ticker import FuncFormatter, MaxNLocator

from asesearch.report import tables
from asesearch.report.attainment import along

#: Colour-blind safe: what a mark means is never said by its colour alone.
BLUE, ORANGE, GREEN, VERMILION, PURPLE, _, _, GREY, _, SKY = seaborn.color_palette(
    "colorblind"
).as_hex()
WIDTH = 4.2
HEIGHT = 3.3
SMALL = 9.0
STYLE: dict[Any, Any] = {
    **seaborn.axes_style("whitegrid"),
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10.0,
    "axes.labelsize": 10.0,
    "axes.titlesize": 10.0,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "text.parse_math": False,
    "axes.edgecolor": "0.7",
    "grid.color": "0.9",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.6,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "asesearch",
    "svg.fonttype": "path",
    "figure.dpi": 100.0,
}


@dataclass(frozen=True)
class Drawing:
    """One figure and all it shows.

    Attributes:
        name: stem of its files.
        title, caption: what it is and how to read it.
        data: the table it is drawn from.
        draw: makes the figure.
    """

    name: str
    title: str
    caption: str
    data: pd.DataFrame
    draw: Callable[[], Figure]

    @classmethod
    def of(
        cls,
        name: str,
        title: str,
        caption: str,
        data: pd.DataFrame,
        draw: Callable[[pd.DataFrame], Figure],
    ) -> Drawing:
        """A figure that is drawn by a function of its table."""
        return cls(name, title, caption, data, lambda: draw(data))

    def save(self, folder: Path) -> bytes:
        """Write NAME.svg, NAME.png and NAME.csv; returns the SVG. The same data give the same
        bytes."""
        stem = folder / self.name
        tables.written(self.data).to_csv(stem.with_suffix(".csv"), index=False, lineterminator="\n")
        with matplotlib.rc_context(STYLE):
            figure = self.draw()
            settle(figure)
            figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
            figure.savefig(stem.with_suffix(".png"), dpi=200)
        return stem.with_suffix(".svg").read_bytes()


def settle(figure: Figure) -> None:
    """Lay out once and for all: what is placed next stays where it is put."""
    if figure.get_layout_engine() is not None:
        figure.draw_without_rendering()
        figure.set_layout_engine("none")


def axes(height: float = HEIGHT) -> tuple[Figure, Axes]:
    """A figure of the usual width with one pair of axes, laid out by matplotlib."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def width_of(text: str, size: float = SMALL) -> float:
    """Width of a text's longest line, in inches."""
    widths = (TextPath((0, 0), line, size=size).get_extents().width for line in text.split("\n"))
    return float(max(widths)) / 72


def score_axis(ax: Axes, metric: str, height: float = HEIGHT) -> None:
    """Name the vertical axis, in as many lines as its height asks for.

    Args:
        ax: the axes.
        metric: name of the score.
        height: inches of the axes and what is below them.
    """
    room = height - 0.75
    text = f"{metric}  (lower is better)"
    size = 10.0
    if width_of(text, size) > room:
        letters = max(1, int(len(metric) * room / width_of(metric, size)))
        text = "\n".join([*textwrap.wrap(metric, letters), "(lower is better)"])
    ax.set_ylabel(text)


def relative_axis(axis: Axis) -> None:
    """Ticks as relative costs."""
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.2g}×"))
    axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))


def log_if_wide(ax: Axes, values: pd.Series) -> None:
    """A logarithmic vertical axis where the values drawn are positive and span more than a factor
    of four."""
    if values.min() > 0 and values.max() > 4 * values.min():
        log_axis(ax)


def front_line(
    ax: Axes, corners: pd.DataFrame, end: float, style: str | tuple[Any, ...], **how: Any
) -> None:
    """The line of a front: each corner's score holds until the next, the last to the end."""
    x = [*corners["time_frac"], end]
    y = [*corners["quality"], corners["quality"].iloc[-1]]
    ax.step(x, y, where="post", ls=style, **how)


def attained_band(ax: Axes, surfaces: pd.DataFrame, end: float, colour: str) -> None:
    """Between what the best and what all repeats attained; where not all have a point, from the
    best up to the highest score of the surfaces."""
    edges = np.array(sorted({*surfaces["time_frac"], end}))
    top = float(surfaces["quality"].max())
    low, high = (
        along(surfaces[surfaces["level"] == level], edges, top) for level in ("best", "worst")
    )
    ax.fill_between(edges, low, high, step="post", color=colour, alpha=0.15, lw=0)


def log_axis(ax: Axes) -> None:
    """A logarithmic vertical axis with plain numbers, more of them where it spans less."""

    def between(value: float, _: int) -> str:
        low, high = ax.get_ylim()
        return f"{value:g}" if f"{value:e}"[0] in ("25" if high > 5 * low else "23468") else ""

    ax.set_yscale("log")
    plain = FuncFormatter(lambda v, _: f"{v:g}")
    ax.yaxis.set_major_formatter(plain)
    ax.yaxis.set_minor_formatter(FuncFormatter(between))
