"""Figures of a report, each drawn from one table and nothing else, and saved beside it."""

from __future__ import annotations

import itertools
import math
import string
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pandas as pd
import seaborn
from matplotlib.figure import Figure

from asesearch.report import curves, difficulty, evidence, exhibits, ladder, tables
from asesearch.report.labels import named, place_labels, two_lines, xy
from asesearch.report.style import (
    BLUE,
    GREY,
    ORANGE,
    SMALL,
    VERMILION,
    WIDTH,
    Drawing,
    axes,
    log_if_wide,
    relative_axis,
    score_axis,
    settle,
    width_of,
)
from asesearch.schedule import PUBLISHED
from asesearch.study.records import StudyResults
from asesearch.study.timing import UNEXPLAINED


def drawings(results: StudyResults) -> list[Drawing]:
    """Every figure that the data allow, in the order of the page; nothing is drawn yet."""
    every = [
        *_fronts(results),
        evidence.attainment_drawing(results),
        _schedules(results),
        *_maps(results),
        evidence.importance_drawing(results),
        _samples(results),
        curves.trials_drawing(results),
        *ladder.drawings(results),
        *curves.drawings(results),
    ]
    return [drawing for drawing in every if not drawing.data.empty]


def _fronts(results: StudyResults) -> Iterator[Drawing]:
    """The front, and behind a confirmed one the search's."""
    kind = tables.kind_of(results)
    points = tables.points(results, kind)
    caption = _FRONT[tables.cost_of(results, kind)]
    if (points["credited_frac"] > points["time_frac"]).any():
        caption += f" Where a time was measured {UNEXPLAINED}, the line goes by their bound."
    yield Drawing.of("front", "Front", caption, points, draw_front)
    if kind == "confirmed":
        points = tables.points(results, "search")
        caption = _FRONT[tables.cost_of(results, "search")]
        caption += " Filled marks went on to be confirmed."
        yield Drawing.of("front_search", "What the search saw", caption, points, draw_front)


def _schedules(results: StudyResults) -> Drawing:
    caption = "Blocks run at each noise level, fastest schedule on top."
    data = exhibits.schedule_matrix(results)
    return Drawing.of("schedules", "Schedules", caption, data, draw_schedules)


def _maps(results: StudyResults) -> Iterator[Drawing]:
    """The difficulty map, where there is one."""
    found = results.difficulty_map
    process = results.config.get("diffusion")
    for drawing in (difficulty.drawing(found), difficulty.image_drawing(found, process)):
        if drawing is not None:
            yield drawing


def _samples(results: StudyResults) -> Drawing:
    caption = "The same seeds and labels in every row, fastest schedule on top."
    data = exhibits.samples(results)
    return Drawing.of("samples", "Samples", caption, data, lambda data: draw_samples(data, results))


#: Two bars that miss each other prove nothing.
_NO_VERDICT = f"(no verdict: that is the table's, at {tables.LEVEL})"
_SEARCH = (
    "All trials under the search protocol, against {}. Bars: one "
    f"standard error {_NO_VERDICT}. Down and left is better."
)
_FRONT = {
    tables.MEASURED: "Confirmed on fresh seeds, against measured sampling time. Bars: one standard "
    f"error {_NO_VERDICT}, and half-IQR of the time. Down and left "
    "is better.",
    tables.PREDICTED: _SEARCH.format("predicted sampling time"),
    tables.FLOPS: _SEARCH.format("the FLOPs of a sampling"),
}


def draw_front(data: pd.DataFrame) -> Figure:
    """Score against sampling time: `tables.points`."""
    front = data[data["on_front"]]
    # own first
    samplers = list(
        dict.fromkeys(
            [*data.loc[data["label"] == tables.FULL, "sampler"], *sorted(data["sampler"])]
        )
    )
    markers = dict(zip(samplers, _markers(), strict=False))
    beside = max(1, int(WIDTH / (max(width_of(name) for name in samplers) + 0.45)))
    figure, ax = axes(3.9 + 0.2 * math.ceil((len(samplers) - 1) / beside))
    ax.step(
        front["credited_frac"],
        front["quality"],
        where="post",
        color=BLUE,
        lw=1.4,
        alpha=0.8,
        zorder=2,
    )
    looks = [_look(row, markers) for _, row in data.iterrows()]
    for look in dict.fromkeys(looks):
        marker, colour, faint, hollow = look
        rows = data[[other == look for other in looks]]
        ax.errorbar(
            rows["time_frac"],
            rows["quality"],
            xerr=_bars(rows["time_spread"]),
            yerr=_bars(rows["std_error"]),
            fmt="",
            marker=marker,
            ls="none",
            color=colour,
            mfc="white" if hollow else None,
            ms=5 if faint else 6.5,
            capsize=2,
            elinewidth=1,
            alpha=0.6 if faint else 1.0,
            zorder=2 if faint else 4,
        )
    ax.set_xlabel(tables.AXES[data["cost"].iloc[0]])
    score_axis(ax, data["metric"].iloc[0], 3.9)
    relative_axis(ax.xaxis)
    ax.margins(0.12)
    if len(samplers) > 1:
        for name in samplers:
            ax.plot([], [], ls="none", marker=markers[name], color="0.4", ms=5, label=name)
        figure.legend(frameon=False, loc="outside upper center", ncols=beside, handletextpad=0.2)
    low, high = ax.get_xlim()
    if high - low < 0.2:
        ax.set_xlim((low + high) / 2 - 0.1, (low + high) / 2 + 0.1)
    log_if_wide(ax, data["quality"])
    settle(figure)
    steps = _step_points(front)
    first = data["label"].isin([tables.FULL, *PUBLISHED]) | data["label"].str.startswith("full")
    ranked = pd.concat([data[first], data[data["on_front"] & ~first]])
    place_labels(
        ax,
        named(ranked, "time_frac", "quality"),
        [*xy(data, "time_frac", "quality"), *steps],
        SMALL,
    )
    return figure


def _markers() -> Iterator[str]:
    """A marker for each sampler, no two alike."""
    yield from "o^vsDPX<>*pHd"
    yield from (f"${letter}$" for letter in string.ascii_letters)
    yield from (f"${i}$" for i in itertools.count())


def _look(row: pd.Series, markers: dict[str, str]) -> tuple[str, str, bool, bool]:
    """How a point of the front is drawn: marker, colour, whether faint, whether hollow."""
    full = row["label"].startswith("full")
    named = row["label"] in PUBLISHED
    faint = not (row["on_front"] or full or named)
    colour = GREY if faint else VERMILION if full else ORANGE if named else BLUE
    return markers[row["sampler"]], colour, faint, row["kind"] == "search" and not row["confirmed"]


def _bars(values: pd.Series) -> pd.Series | None:
    """Lengths of error bars; where there are none, no bars."""
    return None if values.isna().all() or (values == 0).all() else values.fillna(0.0)


def _step_points(front: pd.DataFrame) -> list[tuple[float, float]]:
    """Data points along the front's line, so that no text covers it."""
    out = []
    for (x0, y0), (x1, y1) in pairwise(xy(front, "credited_frac", "quality")):
        out += [(x0 + (x1 - x0) * i / 12, y0) for i in range(12)]
        out += [(x1, y0 + (y1 - y0) * i / 12) for i in range(12)]
    return out


def draw_schedules(data: pd.DataFrame) -> Figure:
    """Blocks over time: `exhibits.schedule_matrix`."""
    columns = [c for c in data.columns if c.startswith("t")]
    edges = [*(int(c[1:]) for c in columns), int(data["end"].iloc[0])]
    blocks = data[columns].to_numpy()
    names = [label.replace(" + ", "\n+ ") for label in data["label"]]
    narrow = 0.3 if len(data) <= 20 else 0.2
    figure, ax = axes(1.1 + len(data) * (0.36 if any("\n" in n for n in names) else narrow))
    depth = int(data["depth"].iloc[0])
    rows = np.arange(len(data) + 1)
    mesh = ax.pcolormesh(
        edges, rows, blocks, cmap="viridis", vmin=0, vmax=depth, edgecolors="white", linewidth=0.8
    )
    if len(columns) <= 12:
        for i, row in enumerate(blocks):
            for j, value in enumerate(row):
                colour = "white" if value < 0.6 * depth else "black"
                middle = (edges[j] + edges[j + 1]) / 2
                ax.text(
                    middle,
                    i + 0.5,
                    str(value),
                    ha="center",
                    va="center",
                    color=colour,
                    fontsize=SMALL,
                )
    ax.invert_yaxis()
    ax.set_yticks(rows[:-1] + 0.5, names)
    ax.set_xlabel("timestep (0 = data, right = noise)")
    ax.grid(False)
    ax.tick_params(left=False)
    seaborn.despine(ax=ax, left=True, bottom=True)
    bar = figure.colorbar(mesh, ax=ax, pad=0.02, aspect=14)
    bar.set_label("blocks run")
    bar.set_ticks(sorted({0, *(round(depth * i / 4) for i in range(1, 5))}))
    bar.outline.set_visible(False)
    return figure


def _row_name(label: str) -> str:
    """A label in two lines."""
    return two_lines(label.replace(tables.FULL, "full\nnetwork"))


def draw_samples(data: pd.DataFrame, results: StudyResults) -> Figure:
    """Images of `exhibits.samples`, one row a schedule."""
    numbers = list(dict.fromkeys(data["number"]))
    count = int(data["image"].max()) + 1
    shape = results.samples[numbers[0]].shape
    names = {n: _row_name(data.loc[data["number"] == n, "label"].iloc[0]) for n in numbers}
    margin = max(map(width_of, names.values())) + 0.2
    cell = (WIDTH - margin) / count
    image_high = shape[2] / shape[3]
    high = max(image_high, 0.36 / cell)  # room for two lines of text
    figure = Figure(figsize=(WIDTH, cell * high * len(numbers)))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set_axis_off()
    for i, n in enumerate(numbers):
        mine = data[data["number"] == n]
        top = -i * high - (high - image_high) / 2
        bottom = top - 0.96 * image_high
        for j in mine["image"]:
            image = results.samples[n][j].transpose(1, 2, 0)  # (H, W, C)
            image = image[..., 0] if image.shape[-1] == 1 else image
            ax.imshow(
                image,
                cmap="gray",
                vmin=0,
                vmax=255,
                interpolation="nearest",
                extent=(j, j + 0.96, bottom, top),
            )
        middle = (top + bottom) / 2
        ax.text(-0.06 / cell, middle, names[n], ha="right", va="center", fontsize=SMALL)
    ax.set(xlim=(-margin / cell, count), ylim=(-high * len(numbers), 0), aspect="auto")
    return figure
