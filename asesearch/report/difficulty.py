"""The difficulty map as table, figure and files: where a network needs its depth."""

from __future__ import annotations

import math
import os
import tempfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import seaborn
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from asesearch.config import DiffusionConfig
from asesearch.errors import WriteError
from asesearch.files import why_not, write_json
from asesearch.report.style import HEIGHT, SMALL, Drawing, axes
from asesearch.solvers import make_levels
from asesearch.study.difficulty import TABLES, DifficultyMap

Array = npt.NDArray[np.float64]
CAPTION = (
    "Mean square error of the predicted noise against {against} full-depth prediction, by noise "
    "level and blocks run. From a line upwards the error is at most the number on it: where the "
    "line is low, a schedule may be shallow."
)

IMAGE_CAPTION = (
    "The same as a mean square error of the clean image (or latent) that follows from the "
    "predicted noise: (σ / α)² times as large, at the middle of each noise level. This is what the "
    "solver's steps pass on: near noise a small error of the noise is a large one of the image."
)


def table(difficulty_map: DifficultyMap) -> pd.DataFrame:
    """One row a noise level and exit depth, data side first, shallow first.

    Columns: `t_from`, `t_to` (the first timestep that no longer belongs to it), `exit_depth`, then
    the errors and standard errors of the map.
    """
    rows = [
        {
            "t_from": t_from,
            "t_to": t_to,
            "exit_depth": d + 1,
            **{name: getattr(difficulty_map, name)[i][d] for name in TABLES},
        }
        for i, (t_from, t_to) in enumerate(pairwise(difficulty_map.edges))
        for d in range(difficulty_map.depth)
    ]
    return pd.DataFrame(rows)


def draw(data: pd.DataFrame, column: str = "error_full") -> Figure:
    """Heat map of a column of `table`, and for a few round numbers a line above which it is no
    larger."""
    # (depth, bins)
    errors = data.pivot(index="exit_depth", columns="t_from", values=column).to_numpy()
    edges = [*sorted(set(data["t_from"])), int(data["t_to"].max())]
    positive = errors[errors > 0]
    high = float(positive.max()) if positive.size else 1.0
    low = min([*positive, 10.0 ** math.floor(math.log10(high))])  # so that the bar has a tick
    figure, ax = axes(HEIGHT + 0.4)
    ax.set_facecolor("0.85")  # shows where the error is 0
    mesh = ax.pcolormesh(
        edges,
        np.arange(len(errors) + 1) + 0.5,
        np.ma.masked_less_equal(errors, 0.0),
        cmap="viridis",
        norm=LogNorm(low, max(high, 1.01 * low)),
    )
    _lines(ax, edges, errors)
    # deepest exits without any error
    exact = int(np.cumprod((errors == 0).all(axis=1)[::-1]).sum())
    if exact:
        middle = (edges[0] + edges[-1]) / 2, len(errors) - exact / 2 + 0.5
        ax.text(*middle, "no error", color="0.3", fontsize=SMALL, ha="center", va="center")
    ax.set(xlim=(edges[0], edges[-1]), ylim=(0.5, len(errors) + 0.5))
    ax.set_xlabel("noise level t  (0 = data, right = noise)")
    ax.set_ylabel("exit depth (blocks run)")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 4, 5, 10], min_n_ticks=1))
    ax.grid(False)
    seaborn.despine(ax=ax, left=True, bottom=True)
    bar = figure.colorbar(mesh, ax=ax, pad=0.02, aspect=22)
    bar.set_label("error against full depth (log scale)")
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.outline.set_visible(False)
    return figure


def _lines(ax: Axes, edges: list[int], errors: Array) -> None:
    """For each threshold a staircase on top of the exit depths that are too shallow, with its
    number on it."""
    # the least of equals
    found = {
        tuple(too_shallow(errors, threshold)): threshold for threshold in thresholds(errors)[::-1]
    }
    dark = withStroke(linewidth=2.8, foreground="0.1")
    taken: list[tuple[float, float]] = []
    for line, threshold in sorted(found.items(), key=lambda item: item[1]):
        at = _place(line, [other for other in found if other != line], len(errors), taken)
        if at is None:  # no line without its number
            continue
        height = np.array(line)
        # frame: out of sight
        shown = np.where(height == 0, -1, np.where(height == len(errors), len(errors) + 1, height))
        ax.stairs(
            shown + 0.5, edges, baseline=None, color="white", lw=1.4, path_effects=[dark], zorder=3
        )
        taken.append(_middle(line, at, len(errors)))
        ax.text(
            (edges[at] + edges[at + 1]) / 2,
            line[at] + 0.5,
            f"{threshold:g}",
            color="white",
            fontsize=SMALL,
            ha="center",
            va="center",
            bbox={"boxstyle": "round,pad=0.15", "fc": "0.1", "lw": 0},
            zorder=4,
        )


def _middle(line: tuple[int, ...], at: int, depth: int) -> tuple[float, float]:
    """Where a line is in the middle of a bin, in fractions of the axes."""
    return (at + 0.5) / len(line), line[at] / depth


def _place(
    line: tuple[int, ...],
    others: list[tuple[int, ...]],
    depth: int,
    taken: list[tuple[float, float]],
) -> int | None:
    """The bin where a line's number has most room: far from the other lines, the frame and the
    line's own steps.

    Args:
        line, others: exit depths by bin.
        depth: of the network.
        taken: where numbers are already, in fractions of the axes.

    Returns:
        The bin; None if every place is taken.
    """
    bins = len(line)
    margin = min(max(1, bins // 10), (bins - 1) // 2)

    def room(i: int) -> tuple[float, float]:
        near = range(max(0, i - 1), min(bins, i + 2))
        gaps = [abs(other[j] - line[i]) for other in others for j in near]
        steps = max(abs(line[j] - line[i]) for j in near)
        return min([*gaps, line[i], depth - line[i]]) - steps, -abs(i + 0.5 - bins / 2)

    def free(i: int) -> bool:
        x, y = _middle(line, i, depth)
        return all(abs(x - a) > 0.25 or abs(y - b) > 0.08 for a, b in taken)  # size of a number

    return max(filter(free, range(margin, bins - margin)), key=room, default=None)


def thresholds(errors: Array) -> list[float]:
    """Up to three round numbers (1, 2 or 5 times a power of ten) that lie well apart among the
    errors (depth, bins)."""
    positive = errors[errors > 0]
    if not positive.size:
        return []
    found = set()
    for wanted in np.quantile(positive, [0.15, 0.5, 0.85]):
        power = 10.0 ** math.floor(math.log10(wanted))
        found.add(min((m * power for m in (1, 2, 5, 10)), key=lambda v: abs(math.log(v / wanted))))
    return sorted(float(f"{v:.1g}") for v in found if errors.min() < v < errors.max())


def too_shallow(errors: Array, threshold: float) -> npt.NDArray[np.int64]:
    """Deepest exit whose error is above the threshold, by noise level: (depth, bins) -> (bins,); 0
    where there is none."""
    above = errors > threshold
    deepest: npt.NDArray[np.int64] = np.where(
        above.any(axis=0), len(errors) - above[::-1].argmax(axis=0), 0
    )
    return deepest


def drawing(difficulty_map: DifficultyMap | None) -> Drawing | None:
    """The map as a figure of a report; None without a map."""
    if difficulty_map is None:
        return None
    data = table(difficulty_map)
    against = (
        "its own"
        if difficulty_map.weights == difficulty_map.reference_weights
        else "the pretrained network's"
    )
    return Drawing(
        "difficulty", "Difficulty", CAPTION.format(against=against), data, lambda: draw(data)
    )


def image_drawing(
    difficulty_map: DifficultyMap | None, diffusion: dict[str, Any] | None
) -> Drawing | None:
    """The map's errors as errors of the clean image, under a study file's process; None without a
    map or a process."""
    if difficulty_map is None or diffusion is None:
        return None
    levels = make_levels(DiffusionConfig.model_validate(diffusion))
    data = table(difficulty_map)
    middle = (data["t_from"] + data["t_to"] - 1) / 2
    if levels.kind == "discrete":
        middle = middle.astype(int)
    scale = [(sigma / alpha) ** 2 for alpha, sigma in map(levels.level, middle)]
    data["error_image"] = data["error_full"] * scale
    return Drawing(
        "difficulty-image",
        "Difficulty, as an error of the image",
        IMAGE_CAPTION,
        data[["t_from", "t_to", "exit_depth", "error_image"]],
        lambda: draw(data, "error_image"),
    )


def write_map(difficulty_map: DifficultyMap, folder: Path) -> list[Path]:
    """Write map.csv, map.png, map.svg and, last, map.json, which `DifficultyMap.from_dict` reads;
    returns their paths.

    Raises:
        WriteError: the folder can't be made or written to.
    """
    shown = drawing(difficulty_map)
    assert shown is not None
    names = ["map.csv", "map.png", "map.svg"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".map.", dir=folder) as temporary:
            replace(shown, name="map").save(Path(temporary))
            for name in names:
                os.replace(Path(temporary) / name, folder / name)
    except OSError as error:
        raise WriteError(why_not(folder, error)) from error
    write_json(folder / "map.json", difficulty_map.to_dict())
    return [folder / name for name in (*names, "map.json")]
