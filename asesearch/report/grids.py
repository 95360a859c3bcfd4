"""Tables of a report as they are printed: text by text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import pandas as pd

from asesearch.report import evidence, ladder, opinions, tables
from asesearch.report.wording import number, plus_minus, relative, signed, speed_up
from asesearch.score import Protocol
from asesearch.study.answers import indistinguishable
from asesearch.study.picking import scored_points
from asesearch.study.records import StudyResults


@dataclass(frozen=True)
class Grid:
    """A table as it is printed; `marked` are the rows that stand out."""

    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    marked: tuple[int, ...] = ()


def front_grid(results: StudyResults, chosen: int | None) -> Grid:
    """The front and, where it is not on it, the full network."""
    points = tables.points(results, tables.kind_of(results))
    points = points[points["on_front"].astype(bool) | (points["label"] == tables.FULL)]
    metric = points["metric"].iloc[0] if len(points) else "score"
    unit = tables.unit_of(tables.cost_of(results, tables.kind_of(results)))
    timed = unit == "time"
    several = _several(results)
    same = _same(results, points)
    rows = [
        (
            row["label"],
            _time(row),
            *((speed_up(row["credited_frac"]),) if timed else ()),
            plus_minus(row["quality"], row["std_error"]),
            _difference(row, "difference_margin"),
            row["verdict"] if row["on_front"] else f"{row['verdict']}, off the front",
            same[row["number"]],
            *((row["sampler"],) if several else ()),
            row["schedule"],
        )
        for _, row in points.iterrows()
    ]
    marked = tuple(i for i, n in enumerate(points["number"]) if n == chosen)
    sampler = ("sampler",) if several else ()
    head = (
        "schedule",
        f"relative {unit}",
        *(("speed-up",) if timed else ()),
        metric,
        "difference",
        f"against the full network ({tables.LEVEL})",
        "not told apart from",
        *sampler,
        "blocks run, data to noise",
    )
    return Grid(head, rows, marked)


def _time(row: pd.Series, time: str = "time") -> str:
    """A relative time; where block calls can't explain a measured one, their bound beside it.

    Args:
        row: of a table.
        time: what the columns of the time and its spread begin with.
    """
    text = relative(row[f"{time}_frac"], row[f"{time}_spread"])
    if row["credited_frac"] > row[f"{time}_frac"]:
        return f"{text} (block calls explain {relative(row['credited_frac'])})"
    return text


def _same(results: StudyResults, points: pd.DataFrame) -> dict[int, str]:
    """By trial, the other rows whose score can't be told apart from its own."""
    names = dict(zip(points["number"], points["label"], strict=True))
    scored = [p for p in scored_points(results) if p.record.number in names]
    out = dict.fromkeys(names, "–")
    for point in scored:
        same = indistinguishable(point, scored)
        text = "unknown" if same is None else "; ".join(names[n] for n in same) or "none"
        out[point.record.number] = text
    return out


def _several(results: StudyResults) -> bool:
    """Whether samplers compete."""
    return len({r.sampler for r in results.records}) > 1


def _difference(row: pd.Series, margin: str = "margin") -> str:
    """A difference and its margin, of that column; "–" of the reference itself."""
    if row["verdict"] == tables.REFERENCE:
        return "–"
    return signed(row["difference"], plus_minus(row["difference"], row[margin]))


def confirmation_grid(results: StudyResults) -> Grid:
    table = tables.confirmation(results)
    both = bool(len(table)) and bool(table["precision"].notna().any())
    head = (
        "schedule",
        "search",
        "confirmed",
        "selection bias",
        *(("precision", "recall") if both else ()),
        "time predicted",
        "time measured",
        "speed-up",
    )
    rows = [
        (
            row["label"],
            plus_minus(row["search_quality"], row["search_std_error"]),
            plus_minus(row["confirmed_quality"], row["confirmed_std_error"]),
            "–"
            if math.isnan(row["selection_bias"])
            else signed(
                row["selection_bias"], plus_minus(row["selection_bias"], row["selection_bias_se"])
            ),
            *(
                plus_minus(row[name], row[f"{name}_se"])
                for name in (("precision", "recall") if both else ())
            ),
            relative(row["predicted_time_frac"]),
            _time(row, "measured_time"),
            speed_up(row["credited_frac"]),
        )
        for _, row in table.iterrows()
    ]
    return Grid(head, rows)


def spaces_grid(results: StudyResults) -> Grid:
    head = ("schedule", "metric", "score", "minus the full network", "verdict", "time measured")
    rows = [
        (
            row["label"],
            row["metric"],
            plus_minus(row["quality"], row["std_error"]),
            _difference(row),
            row["verdict"],
            relative(row["time_frac"]),
        )
        for _, row in opinions.feature_spaces(results).iterrows()
    ]
    return Grid(head, rows)


def _training_seeds(row: pd.Series) -> str:
    """How many networks a score is of."""
    if not row["training_seeds"]:
        return "not trained"
    failed = f", {row['failed_seeds']} failed" if row["failed_seeds"] else ""
    return f"{row['training_seeds']}{failed}"


def _over_pairs(row: pd.Series, seeds_of_full: int) -> str:
    """A difference and its margin, with the seeds that it is over where one of the two scores is
    over others (0: of no training)."""
    told = _difference(row)
    if told == "–" or {row["training_seeds"], seeds_of_full} <= {0, row["pairs"]}:
        return told
    return f"{told} over {row['pairs']} common seed{'s' if row['pairs'] > 1 else ''}"


def retrained_grid(results: StudyResults) -> Grid:
    head = (
        "schedule",
        "training seeds",
        "score over them",
        "± from training",
        "± from sampling",
        "minus the full network",
        "verdict",
        "time measured",
    )
    table = opinions.retrained(results)
    full = table[table["label"] == tables.FULL] if len(table) else table
    of_full = int(full["training_seeds"].iloc[0]) if len(full) else 0
    rows = [
        (
            row["label"],
            _training_seeds(row),
            number(row["quality"]),
            number(row["training_se"]),
            number(row["sampling_se"]),
            _over_pairs(row, of_full),
            row["verdict"],
            relative(row["time_frac"]),
        )
        for _, row in table.iterrows()
    ]
    return Grid(head, rows)


def trials_grid(results: StudyResults) -> Grid:
    table = tables.trials(results)
    repeats = [c for c in table.columns if c.startswith("repeat_")]
    seconds = [c for c in table.columns if c.endswith("_s")]
    metric = next((m for m in table["metric"] if m), "score")
    several = _several(results)
    rows = [
        (
            str(row["number"]),
            row["origin"],
            *((row["sampler"],) if several else ()),
            row["schedule"],
            plus_minus(row["quality"], row["std_error"])
            if row["state"] == "complete"
            else row["state"],
            *(number(row[c]) for c in (repeats if len(repeats) > 1 else ())),
            relative(row["time_frac"]),
            speed_up(row["time_frac"]),
            *(relative(row[c]) for c in ("flops_frac", "block_frac")),
            *(number(row[c]) for c in seconds),
        )
        for _, row in table.iterrows()
    ]
    head = [
        "no.",
        "origin",
        *(("sampler",) if several else ()),
        "blocks run, data to noise",
        metric,
    ]
    head += [c.replace("_", " ") for c in repeats] if len(repeats) > 1 else []
    head += [
        "relative time",
        "speed-up",
        "FLOPs",
        "block calls",
        *(f"{c.removesuffix('_s')}, s" for c in seconds),
    ]
    return Grid(tuple(head), rows, tuple(i for i, front in enumerate(table["on_front"]) if front))


def cost_grid(results: StudyResults) -> Grid:
    table = tables.cost(results)
    if table.empty:
        return Grid((), [])
    if results.confirmations:
        table = table[table["measured_time_frac"].notna()]
    rows = [
        (
            row["label"],
            relative(row["block_frac"]),
            speed_up(row["block_frac"]),
            relative(row["flops_frac"]),
            relative(row["predicted_time_frac"]),
            _time(row, "measured_time"),
            speed_up(row["credited_frac"]),
        )
        for _, row in table.sort_values(["predicted_time_frac", "number"]).iterrows()
    ]
    return Grid(
        (
            "schedule",
            "block calls (bound)",
            "speed-up of the bound",
            "FLOPs",
            "time predicted",
            "time measured",
            "speed-up",
        ),
        rows,
    )


def protocol_grid(protocols: dict[str, Protocol | None]) -> Grid:
    """Every field of the protocols in use, one column each."""
    used = {name: p for name, p in protocols.items() if p is not None}
    rows = [("metric name", *(p.metric_name for p in used.values()))] if used else []
    for f in fields(Protocol):
        rows.append((f.name.replace("_", " "), *(_protocol_cell(p, f.name) for p in used.values())))
    return Grid(("", *used), rows if used else [])


def _protocol_cell(protocol: Protocol, name: str) -> str:
    value = getattr(protocol, name)
    if name in ("solver", "num_steps") and value is None:  # where samplers compete
        return "any: part of the point"
    if name == "guided_channels" and value is None:
        return "none: no guidance" if protocol.cfg_scale == 1 else "not on record"
    return f"the first {value}" if name == "guided_channels" else _plain(value)


def environment_grid(results: StudyResults) -> Grid:
    """The environment, one line a fact, and what changed while the study ran."""
    rows = [(key, _plain(value)) for key, value in _flat(results.environment).items()]
    seen: dict[str, set[str]] = {}
    for r in results.records:
        for package, version in r.versions.items():
            seen.setdefault(package, set()).add(version)
    rows += [
        (f"{p}: changed between trials", ", ".join(sorted(v)))
        for p, v in sorted(seen.items())
        if len(v) > 1
    ]
    return Grid(("", ""), rows)


def importance_grid(results: StudyResults) -> Grid:
    """What each interval is worth."""
    rows = [
        (
            f"{row['t_from']} … {row['t_to']}",
            f"{row['rise_percent']:+.1f}\N{NO-BREAK SPACE}%".replace("-", "−"),
            f"{row['rise_low']:+.1f} … {row['rise_high']:+.1f}\N{NO-BREAK SPACE}%".replace(
                "-", "−"
            ),
            f"{100 * row['time_saved']:.1f}\N{NO-BREAK SPACE}%",
        )
        for row in evidence.importance(results).to_dict("records")
    ]
    saved = f"{tables.unit_of(tables.cost_of(results, 'search'))} saved"
    head = ("timesteps", "rise of the score", f"interval ({tables.LEVEL})", saved)
    return Grid(head, rows)


def rungs_grid(results: StudyResults) -> Grid:
    """Decisions at the low-fidelity rung."""
    rows = [
        (
            row["label"],
            plus_minus(row["low_fidelity_score"], row["low_fidelity_std_error"]),
            "up" if row["promoted"] else "stopped",
            row["reason"],
        )
        for _, row in ladder.rungs(results).iterrows()
    ]
    return Grid(("schedule", "low-fidelity score", "went", "because"), rows)


def failed_grid(results: StudyResults) -> Grid:
    failed = [r for r in results.records if r.state == "failed"]
    rows = [
        (str(r.number), r.origin, str(r.schedule), r.failure or "no reason on record")
        for r in failed
    ]
    return Grid(("no.", "origin", "blocks run, data to noise", "reason"), rows)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= (
            _flat(value, f"{prefix}{key} ")
            if isinstance(value, dict)
            else {f"{prefix}{key}": value}
        )
    return out


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "none" if value is None else str(value)
