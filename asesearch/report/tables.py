"""Report data apart from drawing: one function, one `DataFrame`. Every figure is drawn from one of
these and nothing else.

Scores of the search protocol and of the confirmation protocol never share a table, except in
`confirmation`, whose columns say which is which.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import numpy as np
import pandas as pd

from asesearch.errors import StudyError
from asesearch.report.attainment import volume
from asesearch.sampler import Sampler
from asesearch.schedule import PUBLISHED
from asesearch.score import CONFIDENCE, EvaluationResult, Protocol
from asesearch.study.front import non_dominated
from asesearch.study.records import (
    REFERENCE_QUALITY,
    REFERENCE_TIME,
    Confirmation,
    StudyResults,
    TrialRecord,
)
from asesearch.study.timing import credited_time

FULL = "full network"
REFERENCE = "the reference"  # verdict of the full network, which the others are compared with
LEVEL = f"{100 * CONFIDENCE:.0f}\N{NO-BREAK SPACE}% confidence"  # said with every verdict
#: Kind of a score: as the search saw it (predicted time), or confirmed on fresh seeds (measured
#: time).
Kind = Literal["search", "confirmed"]
#: What relative costs are of.
MEASURED = "measured time"
PREDICTED = "predicted time"
FLOPS = "FLOPs"
#: Names of their axes.
AXES = {
    MEASURED: "measured sampling time / full network's",
    PREDICTED: "predicted sampling time / full network's",
    FLOPS: "FLOPs of a sampling / full network's",
}


def cost_of(results: StudyResults, kind: Kind) -> str:
    """What the relative costs beside scores of a kind are of."""
    if kind == "confirmed":
        return MEASURED
    return FLOPS if results.cost == "flops" else PREDICTED


def unit_of(cost: str) -> str:
    """A cost in a word: "time" or "FLOPs"."""
    return FLOPS if cost == FLOPS else "time"


def written(table: pd.DataFrame, cost: str = "") -> pd.DataFrame:
    """A table as it is written: where its relative costs are FLOPs no column calls them a time.

    Args:
        table: whose columns of costs begin with `time_`, whatever they are of.
        cost: what they are of; default the column `cost`, where there is one.
    """
    if FLOPS not in (cost, *table.get("cost", ())[:1]):
        return table
    table = table.drop(columns="measured_frac", errors="ignore")
    return table.rename(columns=lambda name: name.replace("time_", "flops_"))


def label(record: TrialRecord, results: StudyResults) -> str:
    """What to call a trial in figures and tables: "full network", a published name, or "#12"; with
    its steps and acceleration where its sampler is not the study's own: "full, 8 steps", "#12, 8
    steps + cache-attn-0.1"; with the sampler where another has as many: "full, dpm++2m-8"."""
    if record.origin == "full":
        return FULL
    if record.sampler != results.own_sampler:
        if not record.schedule.is_full:
            return f"#{record.number}, {_steps(record.sampler)}"
        alike = {r.sampler for r in results.records if r.schedule.is_full and r.origin != "full"}
        same = [s for s in alike if _steps(s) == _steps(record.sampler)]
        return f"full, {record.sampler if len(same) > 1 else _steps(record.sampler)}"
    return record.origin if record.origin in PUBLISHED else f"#{record.number}"


def _steps(sampler: Sampler) -> str:
    added = sampler.acceleration
    return f"{sampler.num_steps} steps" + (f" + {added}" if added else "")


def protocol_of(results: StudyResults, kind: Kind) -> Protocol | None:
    """The one protocol of the study's scores; None if there are none.

    Raises:
        EvaluationError: the scores were measured in different ways.
    """
    if kind == "search":
        found = [r.quality.protocol for r in results.complete if r.quality is not None]
    else:
        found = [c.quality.protocol for c in results.confirmations]
    for other in found[1:]:
        found[0].require_same(other)
    return found[0] if found else None


def kind_of(results: StudyResults) -> Kind:
    """Which scores the headline and the front stand on: confirmed ones, as soon as a schedule
    has one."""
    return "confirmed" if results.stands_confirmed else "search"


def by_number(results: StudyResults) -> dict[int, TrialRecord]:
    """Trials by number.

    Raises:
        StudyError: a confirmation of a trial that is not on record or has no score.
    """
    complete = {r.number for r in results.complete}
    stray = [c.number for c in results.confirmations if c.number not in complete]
    if stray:
        raise StudyError(
            f"confirmations belong to complete trials; got trial numbers {stray}; run `asesearch "
            "search` again"
        )
    return {r.number: r for r in results.records}


def trials(results: StudyResults) -> pd.DataFrame:
    """Every trial that ended, complete or failed, under the search protocol."""
    protocol = protocol_of(results, "search")
    repeats = len(protocol.seeds) if protocol else 0
    parts = sorted({part for r in results.records for part in r.seconds}, key=_part_order)
    on_front = {r.number for r in results.front()}
    rows = []
    for r in results.records:
        values = r.quality.values if r.quality else ()
        row = {
            "number": r.number,
            "label": label(r, results),
            "origin": r.origin,
            "schedule": str(r.schedule),
            "sampler": str(r.sampler),
            "state": r.state,
            "metric": protocol.metric_name if protocol else "",
            "quality": r.quality.value if r.quality else math.nan,
            "std_error": std_error(r.quality),
        }
        row |= {f"repeat_{i + 1}": values[i] if values else math.nan for i in range(repeats)}
        row |= {f"{c}_frac": nan(getattr(r, f"{c}_frac")) for c in ("time", "flops", "block")}
        row["speed_up"] = 1 / r.time_frac if r.time_frac else math.nan
        row |= {f"{part}_s": r.seconds.get(part, math.nan) for part in parts}
        row["gflops"] = sum(r.gflops.values()) if r.gflops else math.nan
        rows.append(
            row
            | {
                "on_front": r.number in on_front,
                "failure": r.failure or "",
                "finished_at": r.finished_at,
            }
        )
    table = pd.DataFrame(rows)
    table["best_quality"] = table["quality"].cummin().ffill()
    return table


def _part_order(part: str) -> tuple[int, str]:
    known = ("low_fidelity", "finetune", "sample", "decode", "evaluate", "other")
    return (known.index(part) if part in known else len(known), part)


def nan(value: float | None) -> float:
    return math.nan if value is None else value


def std_error(quality: EvaluationResult | None) -> float:
    return math.nan if quality is None else nan(quality.std_error)


def points(results: StudyResults, kind: Kind) -> pd.DataFrame:
    """Every score of one kind against sampling time, fastest first, compared with the full network
    of the same kind.

    `time_frac` is the predicted or measured time, or, by the search in a study of FLOPs, those, as
    `cost` says; `credited_frac` is what may be claimed of it, the bound `block_frac` where a
    measured time is better than its block calls can explain. `speed_up` (NaN of FLOPs), `on_front`
    and the order go by what may be claimed.
    `difference` is the score minus the full network's, `difference_se` its standard error,
    `difference_margin` half the width of its interval of that `confidence`; `verdict` says in words
    whether the interval leaves out 0.
    """
    records = by_number(results)
    full = results.full
    found: list[tuple[TrialRecord, EvaluationResult, float, float]] = []
    if kind == "search":
        found = [
            (r, r.quality, nan(results.cost_frac(r)), math.nan)
            for r in results.complete
            if r.quality is not None
        ]
    else:
        found = [
            (records[c.number], c.quality, c.measured_time_frac, _time_spread(results, c))
            for c in results.confirmations
        ]
    protocol = protocol_of(results, kind)
    cost = cost_of(results, kind)
    baseline = next(
        (quality for r, quality, *_ in found if full is not None and r.number == full.number), None
    )
    claimed = [
        time
        if kind == "search"
        else credited_time(time, 0.0 if math.isnan(spread) else spread, r.block_frac)
        for r, _, time, spread in found
    ]
    scores = [quality.value for _, quality, *_ in found]
    front = set(non_dominated(list(zip(claimed, scores, strict=True))))
    confirmed = {c.number for c in results.confirmations}
    rows = []
    for i, (r, quality, time, spread) in enumerate(found):
        difference, error = (math.nan, None) if baseline is None else quality.minus(baseline)
        margin = None if baseline is None else quality.margin(baseline)
        rows.append(
            {
                "number": r.number,
                "label": label(r, results),
                "schedule": str(r.schedule),
                "sampler": str(r.sampler),
                "kind": kind,
                "metric": protocol.metric_name if protocol else "",
                "cost": cost,
                "time_frac": time,
                "time_spread": spread,
                "speed_up": math.nan if cost == FLOPS else 1 / claimed[i],
                "block_frac": nan(r.block_frac),
                "credited_frac": claimed[i],
                "quality": quality.value,
                "std_error": std_error(quality),
                "difference": difference,
                "difference_se": nan(error),
                "difference_margin": nan(margin),
                "confidence": CONFIDENCE,
                "verdict": REFERENCE if r is full else verdict(difference, margin),
                "on_front": i in front,
                "confirmed": r.number in confirmed,
            }
        )
    return pd.DataFrame(rows, columns=_POINT_COLUMNS).sort_values(
        ["credited_frac", "number"], ignore_index=True
    )


def _time_spread(results: StudyResults, c: Confirmation) -> float:
    """Of a measured time; NaN where there was one pair, which has none."""
    once = results.config.get("confirm", {}).get("time_repeats") == 1
    full = results.full is not None and c.number == results.full.number
    return math.nan if once and not full else c.measured_time_spread


_POINT_COLUMNS = [
    "number",
    "label",
    "schedule",
    "sampler",
    "kind",
    "metric",
    "cost",
    "time_frac",
    "time_spread",
    "speed_up",
    "block_frac",
    "credited_frac",
    "quality",
    "std_error",
    "difference",
    "difference_se",
    "difference_margin",
    "confidence",
    "verdict",
    "on_front",
    "confirmed",
]


def scores_of(results: StudyResults, kind: Kind) -> dict[int, EvaluationResult]:
    """Scores of one kind, by trial."""
    if kind == "confirmed":
        return {c.number: c.quality for c in results.confirmations}
    return {r.number: r.quality for r in results.complete if r.quality is not None}


def verdict(difference: float, margin: float | None, single: str = "repeat") -> str:
    """A score against the full network's, in words.

    Args:
        difference: the score minus the full network's.
        margin: half the width of the confidence interval of the difference, see
            `EvaluationResult.margin`.
        single: what there is one of where no margin is known.
    """
    if math.isnan(difference):
        return "no score of the full network"
    if margin is None or math.isnan(margin):
        return f"spread unknown (one {single})"
    if abs(difference) <= margin:
        return "can't be told apart"
    return "better" if difference < 0 else "worse"


def front(results: StudyResults) -> pd.DataFrame:
    """The front, fastest first: of the confirmed scores where there are any, else of the
    search's."""
    table = points(results, kind_of(results))
    return table[table["on_front"].astype(bool)].reset_index(drop=True)


def front_records(results: StudyResults) -> list[TrialRecord]:
    """Trials of `front`, fastest first, then the full network where it is not among them."""
    records = by_number(results)
    chosen = [records[n] for n in front(results)["number"]]
    return chosen + [r for r in (results.full,) if r is not None and r not in chosen]


def hypervolume(results: StudyResults) -> pd.DataFrame:
    """Area dominated by the trials so far: relative time, or, in a study of FLOPs, those, times log
    score (times the plain score if one is not positive).

    Reference point: 1.1 times the full network's cost and twice its score, so that studies of one
    protocol compare; without the full network, or with scores that are not positive, the worst
    score seen.
    """
    protocol = protocol_of(results, "search")
    done = [r for r in results.complete if r.quality and results.cost_frac(r) is not None]
    values = np.array(
        [(results.cost_frac(r), r.quality.value) for r in done if r.quality], dtype=np.float64
    ).reshape(-1, 2)
    log = bool((values[:, 1] > 0).all())
    full = results.full
    worst = float(values[:, 1].max()) if len(values) else math.nan
    limit = (
        REFERENCE_QUALITY * full.quality.value
        if log and full is not None and full.quality is not None
        else worst
    )
    scaled = np.column_stack((values[:, 0], np.log(values[:, 1]))) if log else values
    reference = (REFERENCE_TIME, math.log(limit) if log and len(values) else limit)
    columns = {
        "number": [r.number for r in done],
        "hypervolume": [volume(scaled[: i + 1], reference) for i in range(len(done))],
        "metric": protocol.metric_name if protocol else "",
        "scale": "log" if log else "linear",
        "cost": cost_of(results, "search"),
        "reference_time_frac": REFERENCE_TIME,
        "reference_quality": limit,
    }
    return pd.DataFrame(columns)


def cost(results: StudyResults) -> pd.DataFrame:
    """Cost over the full network's: the block-call bound, FLOPs, the predicted and, where
    confirmed, the measured time; `credited_frac` is what may be claimed, see `points`."""
    measured = {c.number: c for c in results.confirmations}
    confirmed = points(results, "confirmed").set_index("number")["credited_frac"]
    rows = []
    for r in results.complete:
        c = measured.get(r.number)
        rows.append(
            {
                "number": r.number,
                "label": label(r, results),
                "block_frac": nan(r.block_frac),
                "flops_frac": nan(r.flops_frac),
                "predicted_time_frac": nan(r.time_frac),
                "measured_time_frac": c.measured_time_frac if c else math.nan,
                "measured_time_spread": _time_spread(results, c) if c else math.nan,
                "credited_frac": confirmed[r.number] if c else nan(r.time_frac),
            }
        )
    return pd.DataFrame(rows)


def confirmation(results: StudyResults) -> pd.DataFrame:
    """Search score and confirmed score side by side.

    `selection_bias` is how much more the point loses to the full network under the confirmation's
    seeds than under the search's, which the choice flattered: how the full network's own score
    moves between them does not count. It is left out where the two protocols differ in more than
    their seeds, because the score then depends on the difference (on N above all). `credited_frac`
    is the time that may be claimed, see `points`.
    """
    full = None if results.full is None else results.full.number
    baseline = next((c for c in results.confirmations if c.number == full), None)
    records = by_number(results)
    confirmed = points(results, "confirmed").set_index("number")
    by_trial = {c.number: c for c in results.confirmations}
    rows = []
    for c in map(by_trial.__getitem__, confirmed.index):
        r = records[c.number]
        row = confirmed.loc[c.number]
        assert r.quality is not None
        rows.append(
            {
                "number": c.number,
                "label": label(r, results),
                "metric": c.quality.protocol.metric_name,
                "search_quality": r.quality.value,
                "search_std_error": std_error(r.quality),
                "confirmed_quality": c.quality.value,
                "confirmed_std_error": std_error(c.quality),
                "num_samples": c.quality.protocol.num_samples,
                "repeats": len(c.quality.values),
                **_selection_bias(results, r.quality, c, baseline),
                "predicted_time_frac": nan(r.time_frac),
                "measured_time_frac": c.measured_time_frac,
                "measured_time_spread": _time_spread(results, c),
                "credited_frac": row["credited_frac"],
                "difference": row["difference"],
                "difference_se": row["difference_se"],
                "difference_margin": row["difference_margin"],
                "confidence": row["confidence"],
                "verdict": row["verdict"],
                **_precision_recall(c),
            }
        )
    return pd.DataFrame(rows)


def _precision_recall(confirmed: Confirmation) -> dict[str, float]:
    """Mean over the repeats and its standard error, each; NaN where they were not measured."""
    found = confirmed.precision_recall
    out = {}
    for name in ("precision", "recall"):
        values = np.array(() if found is None else getattr(found, name))
        spread = len(values) > 1
        out[name] = float(values.mean()) if len(values) else math.nan
        out[f"{name}_se"] = (
            float(values.std(ddof=1) / math.sqrt(len(values))) if spread else math.nan
        )
    return out


def _selection_bias(
    results: StudyResults,
    search: EvaluationResult,
    confirmed: Confirmation,
    baseline: Confirmation | None,
) -> dict[str, float]:
    """See `confirmation`, with its standard error; NaN where it can't be told."""
    out = {"selection_bias": math.nan, "selection_bias_se": math.nan}
    full = results.full
    if baseline is None or full is None or full.quality is None or baseline is confirmed:
        return out
    same = replace(search.protocol, seeds=()) == replace(confirmed.quality.protocol, seeds=())
    if same:
        before, before_se = search.minus(full.quality)
        after, after_se = confirmed.quality.minus(baseline.quality)
        out["selection_bias"] = after - before
        if before_se is not None and after_se is not None:
            out["selection_bias_se"] = math.hypot(before_se, after_se)
    return out
