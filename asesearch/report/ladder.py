"""Rungs of a search: low-fidelity scores and who was promoted, what low-fidelity scores were worth,
and where the time went.

Low-fidelity scores have a table and axes of their own: they are never on one front with figures
after fine-tuning.
"""

from __future__ import annotations

import math

import pandas as pd
from matplotlib.figure import Figure

from asesearch.report import tables
from asesearch.report.style import (
    BLUE,
    GREEN,
    GREY,
    HEIGHT,
    ORANGE,
    PURPLE,
    SKY,
    SMALL,
    VERMILION,
    Drawing,
    axes,
    log_if_wide,
    relative_axis,
)
from asesearch.study.records import StudyResults

#: Part of the time on record -> what to call it, and its colour.
PARTS = {
    "calibrate": ("calibrating accelerations", PURPLE),
    "elastic": ("elastic warm-up", BLUE),
    "map": ("difficulty map", SKY),
    "low_fidelity": ("low-fidelity scores", GREEN),
    "finetune": ("fine-tuning", ORANGE),
    "sample": ("sampling and evaluating", VERMILION),
    "other": ("the rest", GREY),
    "confirm": ("confirmation", "0.35"),
}
JOINED = {"decode": "sample", "evaluate": "sample"}  # parts shown as one


def rungs(results: StudyResults) -> pd.DataFrame:
    """The low-fidelity rung of every trial that has one, and its high-fidelity score where it was
    promoted."""
    rows = []
    for r in results.records:
        cost = results.cost_frac(r)
        if r.low_fidelity is None or cost is None:
            continue
        rows.append(
            {
                "number": r.number,
                "label": tables.label(r, results),
                "origin": r.origin,
                "sampler": str(r.sampler),
                "schedule": str(r.schedule),
                "cost": tables.cost_of(results, "search"),
                "time_frac": cost,
                "low_fidelity_score": r.low_fidelity.quality.value,
                "low_fidelity_std_error": math.nan
                if r.low_fidelity.quality.std_error is None
                else r.low_fidelity.quality.std_error,
                "low_fidelity_num_samples": r.low_fidelity.quality.protocol.num_samples,
                "metric": r.low_fidelity.quality.protocol.metric_name,
                "probability": math.nan
                if r.low_fidelity.probability is None
                else r.low_fidelity.probability,
                "promoted": r.low_fidelity.promoted,
                "reason": r.low_fidelity.reason,
                "high_fidelity_score": r.quality.value if r.quality else math.nan,
            }
        )
    return pd.DataFrame(rows)


def rank_correlation(table: pd.DataFrame) -> float:
    """Spearman's, of low- and high-fidelity scores; NaN below four pairs."""
    both = table.dropna(subset=["high_fidelity_score"]) if len(table) else table
    return (
        float(both["low_fidelity_score"].corr(both["high_fidelity_score"], method="spearman"))
        if len(both) >= 4
        else math.nan
    )


def spending(results: StudyResults) -> pd.DataFrame:
    """Seconds and GFLOPs on record by part; GFLOPs are counted for the search, not for confirmation
    or evaluation."""
    seconds: dict[str, float] = dict(results.warm_up.get("seconds", {}))
    gflops: dict[str, float] = dict(results.warm_up.get("gflops", {}))
    for r in results.records:
        for part, value in r.seconds.items():
            seconds[JOINED.get(part, part)] = seconds.get(JOINED.get(part, part), 0.0) + value
        for part, value in r.gflops.items():
            gflops[part] = gflops.get(part, 0.0) + value
    if any(c.seconds for c in results.confirmations):
        seconds["confirm"] = sum(c.seconds for c in results.confirmations)
    order = [p for p in PARTS if seconds.get(p)]
    return pd.DataFrame(
        {
            "part": order,
            "what": [PARTS[p][0] for p in order],
            "seconds": [seconds[p] for p in order],
            "gflops": [gflops.get(p, math.nan) for p in order],
        }
    )


def draw_rungs(data: pd.DataFrame) -> Figure:
    """Low-fidelity scores against cost: `rungs`; who went up is filled, who was stopped hollow with
    its probability."""
    figure, ax = axes(HEIGHT)
    for promoted, colour, name in ((True, BLUE, "fine-tuned"), (False, VERMILION, "stopped")):
        mine = data[data["promoted"] == promoted]
        if len(mine):
            ax.errorbar(
                mine["time_frac"],
                mine["low_fidelity_score"],
                mine["low_fidelity_std_error"].fillna(0.0),
                fmt="o",
                color=colour,
                mfc=colour if promoted else "white",
                ms=5.5,
                capsize=2,
                elinewidth=1,
                label=f"{name} ({len(mine)})",
            )
    ax.set_xlabel(tables.AXES[data["cost"].iloc[0]])
    ax.set_ylabel(
        f"low-fidelity score, {int(data['low_fidelity_num_samples'].iloc[0])} images per repeat"
    )
    relative_axis(ax.xaxis)
    ax.legend(frameon=False)
    log_if_wide(ax, data["low_fidelity_score"])
    return figure


def draw_fidelity(data: pd.DataFrame) -> Figure:
    """What a low-fidelity score says of the high-fidelity one: rows of `rungs` with both."""
    figure, ax = axes(HEIGHT)
    ax.plot(data["low_fidelity_score"], data["high_fidelity_score"], "o", color=BLUE, ms=5.5)
    ax.set_xlabel("low-fidelity score")
    ax.set_ylabel("after fine-tuning")
    rank = rank_correlation(data)
    if not math.isnan(rank):
        ax.text(
            0.04,
            0.95,
            f"rank correlation {rank:.2f}",
            transform=ax.transAxes,
            va="top",
            fontsize=SMALL,
        )
    log_if_wide(ax, data["high_fidelity_score"])
    return figure


def draw_spending(data: pd.DataFrame) -> Figure:
    """Minutes by part: `spending`."""
    figure, ax = axes(0.9 + 0.32 * len(data))
    minutes = data["seconds"] / 60
    ax.barh(data["what"], minutes, color=[PARTS[p][1] for p in data["part"]], height=0.65)
    for i, (m, share) in enumerate(zip(minutes, minutes / minutes.sum(), strict=True)):
        ax.text(m, i, f" {m:.1f} min, {100 * share:.0f} %", va="center", fontsize=SMALL)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.75 * float(minutes.max()))
    ax.set_xlabel("minutes on record")
    ax.grid(False)
    ax.spines["left"].set_visible(False)
    ax.tick_params(left=False)
    return figure


def drawings(results: StudyResults) -> list[Drawing]:
    """The figures of this module, those without data too."""
    found = rungs(results)
    both = found.dropna(subset=["high_fidelity_score"]) if len(found) else found
    return [
        Drawing.of(
            "rungs",
            "Low-fidelity scores: who went up",
            "Every schedule under the weights it starts from, on few images, before any "
            "fine-tuning of its own. These scores compare with each other only; the quality model "
            "decides by them who is fine-tuned.",
            found,
            draw_rungs,
        ),
        Drawing.of(
            "fidelity",
            "What a low-fidelity score is worth",
            "Schedules that have both: how well the low-fidelity score foretold the one after "
            "fine-tuning.",
            both,
            draw_fidelity,
        ),
        Drawing.of(
            "spending",
            "Where the time went",
            "Time on record, all workers together. A part that is done once serves every schedule.",
            spending(results),
            draw_spending,
        ),
    ]
