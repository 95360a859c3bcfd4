"""`compare`: fronts of several studies as a page, figures and CSV."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from asesearch.report import grids, tables
from asesearch.report.comparison import UNKNOWN_SPREAD, Comparison, compare_results
from asesearch.report.explorer import scripts
from asesearch.report.folder import MARK, environment, write_folder
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
    attained_band,
    axes,
    front_line,
    log_if_wide,
    relative_axis,
    score_axis,
)
from asesearch.report.wording import number, percent, relative
from asesearch.study.records import StudyResults
from asesearch.study.timing import UNEXPLAINED

COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, GREY)
MARKS = "osD^vPX"
LINES: tuple[str | tuple[Any, ...], ...] = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1, 2)))


def compare(
    results: Sequence[StudyResults],
    out_dir: Path | None = None,
    groups: Sequence[str] | None = None,
) -> Comparison:
    """Put the fronts of studies on one scale, and write the page where a folder is given.

    Args:
        results: of two studies or more, `Study.open(…).results()`; nothing is written into them.
        out_dir: an empty or missing folder, or one that holds an earlier comparison.
        groups: of each study the group that it is a repeat in; default: its name, so that the same
            study searched with several seeds is one method with repeats.

    Raises:
        ConfigError: fewer than two studies, another number of groups, or a group's name that is not
            UTF-8.
        EvaluationError: the studies were measured in different ways; names the field and both
            values.
        StudyError: a study has no score, or `out_dir` holds something else.
        WriteError: `out_dir` can't be written.
    """
    comparison = compare_results(results, groups)
    if out_dir is not None:
        write_folder(Path(out_dir), "comparison", lambda folder: _write(comparison, folder))
    return comparison


def _write(comparison: Comparison, folder: Path) -> None:
    """Everything into an empty folder."""
    shown = [(drawing, drawing.save(folder / "figures")) for drawing in drawings(comparison)]
    for name in ("studies", "groups", "points", "attained", "wins"):
        table = getattr(comparison, name)
        if not table.empty:
            tables.written(table, comparison.cost).to_csv(
                folder / "tables" / f"{name}.csv", index=False, lineterminator="\n"
            )
    page = environment().get_template("compare.html.j2")
    html = page.render(
        mark=MARK.format(what="comparison"),
        comparison=comparison,
        figures={d.name: (d, base64.b64encode(svg).decode()) for d, svg in shown},
        studies=_studies_grid(comparison),
        groups=_groups_grid(comparison),
        wins=_wins_grid(comparison),
        protocol=grids.protocol_grid({comparison.kind: comparison.protocol}),
        reference=number(comparison.reference[1]),
        level=tables.LEVEL,
        unknown_spread=percent(UNKNOWN_SPREAD),
        script=scripts()["script"],
    )
    (folder / "index.html").write_text(html, encoding="utf-8")


# -- tables --------------------------------------------------------------------------------------


def _studies_grid(comparison: Comparison) -> grids.Grid:
    rows = [
        (
            row["study"],
            row["group"],
            str(row["trials"]),
            number(row["full_quality"]),
            number(row["hypervolume"]),
            percent(row["share"]),
        )
        for _, row in comparison.studies.iterrows()
    ]
    head = ("study", "group", "trials", "full network", "hypervolume", "of all studies' together")
    return grids.Grid(head, rows)


def _groups_grid(comparison: Comparison) -> grids.Grid:
    rows = [
        (
            row["group"],
            str(row["studies"]),
            number(row["hypervolume"]),
            f"{number(row['hypervolume_min'])} … {number(row['hypervolume_max'])}",
            "–" if comparison.wins.empty else percent(row["wins"]),
        )
        for _, row in comparison.groups.iterrows()
    ]
    head = (
        "group",
        "studies",
        "hypervolume, mean",
        "least … largest",
        "budgets it wins",
    )
    return grids.Grid(head, rows)


def _wins_grid(comparison: Comparison) -> grids.Grid:
    rows = []
    for _, row in comparison.wins.iterrows():
        least, most = number(row["lead_min"]), number(row["lead_max"])
        lead = least if least == most else f"{least} … {most}"
        between = f"{relative(row['time_from'])} … {relative(row['time_to'])}"
        rows.append((between, row["winner"] or "no clear winner", lead, row["verdict"]))
    return grids.Grid(
        (f"{comparison.unit} budget", "lowest score", "lead over the next", "because"), rows
    )


# -- figures -------------------------------------------------------------------------------------


def drawings(comparison: Comparison) -> list[Drawing]:
    """The figures of the page; nothing is drawn yet."""
    kind = {
        tables.MEASURED: "confirmed scores, measured sampling time",
        tables.PREDICTED: "search scores, predicted sampling time",
        tables.FLOPS: "search scores, FLOPs of a sampling",
    }[comparison.cost]
    caption = f"All fronts: {kind}. Down and left is better."
    if not comparison.attained.empty:
        caption += (
            " Of a group with repeats the line is what at least half of them attained, the band "
            "reaches from the best to the worst."
        )
    points = comparison.points
    if (points["time_frac"] > points["measured_frac"]).any():
        caption += f" A time that was measured {UNEXPLAINED}, stands at the bound of those calls."
    out = [
        Drawing(
            "fronts", "Fronts", caption, points, lambda: draw_fronts(points, comparison.attained)
        )
    ]
    what = "the logarithm of the score" if comparison.scale == "log" else "the score"
    caption = (
        f"Area that each study dominates in {comparison.unit} × {what}, below one reference point "
        f"for all: {comparison.unit} {comparison.reference[0]:g}, score "
        f"{number(comparison.reference[1])}. The line is the group's mean."
    )
    studies = comparison.studies
    out.append(
        Drawing("hypervolume", "Hypervolume", caption, studies, lambda: draw_hypervolume(studies))
    )
    return out


def draw_fronts(points: pd.DataFrame, attained: pd.DataFrame) -> Figure:
    """Fronts of all groups over each other.

    Args:
        points: of `Comparison`.
        attained: of `Comparison`.
    """
    figure, ax = axes(4.2)
    front = points[points["on_front"].astype(bool)]
    end = max(1.0, float(front["time_frac"].max()))
    for i, group in enumerate(dict.fromkeys(points["group"])):
        colour = COLOURS[i % len(COLOURS)]
        style = LINES[i % len(LINES)]
        mine = front[front["group"] == group]
        surfaces = attained[attained["group"] == group]
        if surfaces.empty:
            front_line(ax, mine, end, style, color=colour, lw=1.6)
        else:
            attained_band(ax, surfaces, end, colour)
            median = surfaces[surfaces["level"] == "median"]
            front_line(ax, median, end, style, color=colour, lw=1.8)
        count = len(set(mine["study"]))
        label = group if count < 2 else f"{group} ({count} studies)"
        ax.errorbar(
            mine["time_frac"],
            mine["quality"],
            mine["std_error"].fillna(0.0) if count < 2 else None,
            fmt=MARKS[i % len(MARKS)],
            color=colour,
            ms=5.0 if count < 2 else 3.5,
            alpha=1.0 if count < 2 else 0.7,
            elinewidth=1,
            capsize=2,
            label=label,
        )
    ax.set_xlabel(tables.AXES[points["cost"].iloc[0]])
    score_axis(ax, points["metric"].iloc[0], 4.2)
    relative_axis(ax.xaxis)
    ax.legend(frameon=False, loc="upper right", fontsize=SMALL)
    log_if_wide(ax, front["quality"])
    return figure


def draw_hypervolume(studies: pd.DataFrame) -> Figure:
    """A dot for each study, in a row for its group."""
    names = list(dict.fromkeys(studies["group"]))
    figure, ax = axes(0.9 + 0.42 * len(names))
    for i, name in enumerate(names):
        mine = studies[studies["group"] == name]["hypervolume"]
        colour = COLOURS[i % len(COLOURS)]
        ax.plot(mine, [i] * len(mine), MARKS[i % len(MARKS)], color=colour, ms=6, alpha=0.8)
        ax.plot([mine.mean()] * 2, [i - 0.28, i + 0.28], color=colour, lw=2)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlabel("hypervolume  (higher is better)")
    ax.xaxis.set_major_locator(MaxNLocator(5))
    return figure
