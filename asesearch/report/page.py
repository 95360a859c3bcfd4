"""The report: one self-contained page, the figures and the tables it shows, written whole or not at
all."""

from __future__ import annotations

import base64
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import tomli_w

from asesearch.errors import AseSearchError, StudyError
from asesearch.files import check_writable
from asesearch.report import ladder, tables
from asesearch.report.plots import drawings
from asesearch.report.style import Drawing
from asesearch.report.wording import UNKNOWN, headline, number, percent, plus_minus
from asesearch.score import Protocol
from asesearch.study.picking import pick
from asesearch.study.records import StudyResults

MARK = '<meta name="generator" content="asesearch report">'
#: Ways to pick a point: mode, its quality and time budgets, and what they mean.
PICKS: tuple[tuple[str, str | None, float | None, str], ...] = (
    ("best-quality", None, None, "the best score"),
    (
        "fastest-within",
        "ci",
        None,
        f"the fastest that is not worse than the full network ({tables.LEVEL})",
    ),
    ("best-within", None, 0.75, "the best score within three quarters of the full network's time"),
)


def write_report(results: StudyResults, out_dir: Path) -> Path:
    """Write `index.html`, `figures/` and `tables/`; returns the path of `index.html`.

    Everything is made in a temporary folder first and moved at the end, the page last. The same
    results give the same bytes.

    Args:
        results: of a study, begun or finished.
        out_dir: an empty or missing folder, or one that holds an earlier report.

    Raises:
        EvaluationError: scores of different protocols under one heading.
        StudyError: no trial has ended, the results contradict themselves, or `out_dir` holds
            something else.
        WriteError: `out_dir` can't be written.
    """
    out_dir = Path(out_dir)
    _check(results)
    check_report_dir(out_dir)
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=f".{out_dir.name}.", dir=out_dir.parent
        ) as temporary:
            _write(results, Path(temporary))
            _move(Path(temporary), out_dir)
    except OSError as error:
        raise StudyError(
            f"can't write the report to {out_dir}: {error}; choose a folder you may write to"
        ) from error
    return out_dir / "index.html"


def _check(results: StudyResults) -> None:
    if not results.records:
        raise StudyError(
            f"a report needs a trial that has ended; got none in {results.name!r}; run `asesearch "
            "search` first"
        )
    tables.protocol_of(results, "search")
    tables.protocol_of(results, "confirmed")
    tables.by_number(results)


def check_report_dir(out_dir: Path) -> None:
    """Refuse a folder that no report can be written to; nothing is left in it.

    Raises:
        StudyError: it holds something else.
        WriteError: it can't be written.
    """
    # a temporary folder beside it comes first
    check_writable(
        out_dir.with_name(f".{out_dir.name}.{'0' * 8}"), "tables/confirmation.csv", named=out_dir
    )
    page = out_dir / "index.html"
    ours = page.is_file() and MARK in page.read_text(encoding="utf-8", errors="replace")
    if out_dir.exists() and not ours and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise StudyError(
            f"a report goes into an empty folder or over an earlier report; got {out_dir}; give "
            "another folder"
        )
    check_writable(out_dir, "tables/confirmation.csv")


def _write(results: StudyResults, folder: Path) -> None:
    """Everything into an empty folder."""
    for name in ("figures", "tables"):
        (folder / name).mkdir()
    shown = [(drawing, drawing.save(folder / "figures")) for drawing in drawings(results)]
    makers = {
        "trials": tables.trials,
        "front": tables.front,
        "confirmation": tables.confirmation,
        "rungs": ladder.rungs,
    }
    for name, make in makers.items():
        table = make(results)
        if not table.empty:
            table.to_csv(folder / "tables" / f"{name}.csv", index=False, lineterminator="\n")
    (folder / "index.html").write_text(render_page(results, shown), encoding="utf-8")


def _move(source: Path, target: Path) -> None:
    """Each file over its predecessor, the page last, then what an earlier report left over is
    removed."""
    names = sorted(
        p.relative_to(source) for p in source.rglob("*") if p.is_file() and p.name != "index.html"
    )
    for name in [*names, Path("index.html")]:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(source / name, target / name)
    for folder in ("figures", "tables"):
        for path in (target / folder).glob("*"):
            if path.relative_to(target) not in names and path.suffix in (".svg", ".png", ".csv"):
                path.unlink()


@dataclass(frozen=True)
class Grid:
    """A table as it is printed; `marked` are the rows that stand out."""

    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    marked: tuple[int, ...] = ()


def render_page(results: StudyResults, shown: list[tuple[Drawing, bytes]]) -> str:
    """The page as text, with each figure's SVG in it."""
    env = jinja2.Environment(
        loader=jinja2.PackageLoader("asesearch.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    kind = tables.kind_of(results)
    search = tables.protocol_of(results, "search")
    confirmed = tables.protocol_of(results, "confirmed")
    used = confirmed or search
    answer = headline(results)
    return env.get_template("report.html.j2").render(
        mark=MARK,
        name=results.name,
        kind=kind,
        metric=used.metric_name if used else None,
        answer=answer,
        figures={drawing.name: (drawing, base64.b64encode(svg).decode()) for drawing, svg in shown},
        front=_front_grid(results, answer.chosen),
        confirmation=_confirmation_grid(results),
        trials=_trials_grid(results),
        cost=_cost_grid(results),
        protocol=_protocol_grid({"search": search, "confirmation": confirmed}),
        environment=_environment_grid(results),
        failed=_failed_grid(results),
        picks=_picks(results, answer.chosen),
        rungs=_rungs_grid(results),
        toml=study_toml(results.config),
        one_repeat=used is not None and len(used.seeds) == 1,
        unknown=UNKNOWN,
        level=tables.LEVEL,
        check=next((r.number for r in results.complete), None)
        if answer.chosen is None
        else answer.chosen,
        finished=max(r.finished_at for r in results.records),
    )


def _front_grid(results: StudyResults, chosen: int | None) -> Grid:
    """The front and, where it is not on it, the full network."""
    points = tables.points(results, tables.kind_of(results))
    points = points[points["on_front"].astype(bool) | (points["label"] == tables.FULL)]
    metric = points["metric"].iloc[0] if len(points) else "score"
    several = _several(results)
    rows = [
        (
            row["label"],
            percent(1 - row["time_frac"]),
            _time(row["time_frac"], row["time_spread"]),
            plus_minus(row["quality"], row["std_error"]),
            _difference(row),
            row["verdict"] if row["on_front"] else f"{row['verdict']}, off the front",
            *((row["sampler"],) if several else ()),
            row["schedule"],
        )
        for _, row in points.iterrows()
    ]
    marked = tuple(i for i, n in enumerate(points["number"]) if n == chosen)
    sampler = ("sampler",) if several else ()
    head = (
        "schedule",
        "saved",
        "time",
        metric,
        "difference",
        f"against the full network ({tables.LEVEL})",
        *sampler,
        "blocks run, data to noise",
    )
    return Grid(head, rows, marked)


def _several(results: StudyResults) -> bool:
    """Whether samplers compete."""
    return len({r.sampler for r in results.records}) > 1


def _picks(results: StudyResults, chosen: int | None) -> list[tuple[str, str]]:
    """Export commands with what each hands over."""
    records = tables.by_number(results)
    out = []
    if chosen is not None:
        out.append(
            (
                f"--trial {chosen}",
                f"{tables.label(records[chosen], results.own_sampler)}, "
                "which the headline speaks of",
            )
        )
    for mode, quality, time, meaning in PICKS:
        budget = f" --quality {quality}" if quality else f" --time {time}" if time else ""
        try:
            got = tables.label(pick(results, mode, quality, time), results.own_sampler)
        except AseSearchError:  # no point meets the budget, or the spread is unknown
            got = "none in this study"
        out.append((f"--pick {mode}{budget}", f"{meaning}: {got}"))
    return out


def _time(frac: float, spread: float) -> str:
    if math.isnan(frac):
        return "not measured"
    return (
        percent(frac)
        if math.isnan(spread) or spread == 0
        else f"{100 * frac:.1f} ± {100 * spread:.1f}\N{NO-BREAK SPACE}%"
    )


def _difference(row: pd.Series) -> str:
    if row["verdict"] == "the reference":
        return "–"
    return ("+" if row["difference"] > 0 else "") + plus_minus(
        row["difference"], row["difference_margin"]
    )


def _confirmation_grid(results: StudyResults) -> Grid:
    head = ("schedule", "search", "confirmed", "selection bias", "time predicted", "time measured")
    rows = [
        (
            row["label"],
            plus_minus(row["search_quality"], row["search_std_error"]),
            plus_minus(row["confirmed_quality"], row["confirmed_std_error"]),
            "–"
            if math.isnan(row["selection_bias"])
            else f"{row['selection_bias']:+.3g}".replace("-", "−"),
            percent(row["predicted_time_frac"]),
            _time(row["measured_time_frac"], row["measured_time_spread"]),
        )
        for _, row in tables.confirmation(results).iterrows()
    ]
    return Grid(head, rows)


def _trials_grid(results: StudyResults) -> Grid:
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
            *(_share(row[c]) for c in ("time_frac", "flops_frac", "block_frac")),
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
    head += ["time", "FLOPs", "block calls", *(f"{c.removesuffix('_s')}, s" for c in seconds)]
    return Grid(tuple(head), rows, tuple(i for i, front in enumerate(table["on_front"]) if front))


def _share(value: float) -> str:
    return "–" if math.isnan(value) else percent(value)


def _cost_grid(results: StudyResults) -> Grid:
    table = tables.cost(results)
    if table.empty:
        return Grid((), [])
    if results.confirmations:
        table = table[table["measured_time_frac"].notna()]
    rows = [
        (
            row["label"],
            _share(row["block_frac"]),
            _share(row["flops_frac"]),
            _share(row["predicted_time_frac"]),
            _time(row["measured_time_frac"], row["measured_time_spread"]),
        )
        for _, row in table.sort_values(["predicted_time_frac", "number"]).iterrows()
    ]
    return Grid(
        ("schedule", "block calls (bound)", "FLOPs", "time predicted", "time measured"), rows
    )


def _protocol_grid(protocols: dict[str, Protocol | None]) -> Grid:
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


def _environment_grid(results: StudyResults) -> Grid:
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


def _rungs_grid(results: StudyResults) -> Grid:
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


def _failed_grid(results: StudyResults) -> Grid:
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


def study_toml(config: dict[str, Any]) -> str:
    """The resolved study file as TOML. What is unset is left out, and so is the storage, whose URL
    may hold a password."""
    search = {k: v for k, v in config.get("search", {}).items() if k != "storage"}
    return tomli_w.dumps(_set_values({**config, "search": search} if search else config))


def _set_values(table: dict[str, Any]) -> dict[str, Any]:
    """A table without its null values, which TOML does not have."""
    return {
        key: _set_values(value) if isinstance(value, dict) else value
        for key, value in table.items()
        if value is not None
    }
