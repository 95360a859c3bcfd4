"""The report: one self-contained page, the figures and the tables it shows, written whole or not at
all."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import tomli_w

from asesearch.errors import AseSearchError, StudyError
from asesearch.report import evidence, grids, ladder, opinions, tables
from asesearch.report.explorer import embedded, scripts
from asesearch.report.folder import MARK, check_folder, environment, write_folder
from asesearch.report.plots import drawings
from asesearch.report.style import Drawing
from asesearch.report.wording import UNKNOWN, headline, repeatability
from asesearch.study.picking import pick, told_difference
from asesearch.study.records import StudyResults

#: Ways to pick a point: mode, its quality and time budgets, and what they mean.
PICKS: tuple[tuple[str, str | None, float | None, str], ...] = (
    ("best-quality", None, None, "the best score"),
    (
        "fastest-within",
        "ci",
        None,
        f"the fastest that is not shown to be worse than the full network ({tables.LEVEL})",
    ),
    (
        "best-within",
        None,
        0.75,
        "the best score within three quarters of the full network's {unit}",
    ),
)


def write_report(results: StudyResults, out_dir: Path) -> Path:
    """Write `index.html`, `figures/` and `tables/`; returns the path of `index.html`.

    Written whole or not at all. The same results give the same bytes.

    Args:
        results: of a study, begun or finished.
        out_dir: an empty or missing folder, or one that holds an earlier report.

    Raises:
        EvaluationError: scores of different protocols under one heading.
        StudyError: no trial has ended, the results contradict themselves, or `out_dir` holds
            something else.
        WriteError: `out_dir` can't be written.
    """
    _check(results)
    return write_folder(Path(out_dir), "report", lambda folder: _write(results, folder))


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
    check_folder(out_dir, "report")


def _write(results: StudyResults, folder: Path) -> None:
    """Everything into an empty folder."""
    shown = [(drawing, drawing.save(folder / "figures")) for drawing in drawings(results)]
    makers = {
        "trials": tables.trials,
        "front": tables.front,
        "confirmation": tables.confirmation,
        "training-seeds": opinions.retrained,
        "feature-spaces": opinions.feature_spaces,
        "rungs": ladder.rungs,
        "attainment": lambda results: evidence.attained(results, tables.kind_of(results)),
        "importance": evidence.importance,
    }
    for name, make in makers.items():
        table = make(results)
        if not table.empty:
            tables.written(table).to_csv(
                folder / "tables" / f"{name}.csv", index=False, lineterminator="\n"
            )
    (folder / "index.html").write_text(render_page(results, shown), encoding="utf-8")


def render_page(results: StudyResults, shown: list[tuple[Drawing, bytes]]) -> str:
    """The page as text, with each figure's SVG in it."""
    kind = tables.kind_of(results)
    search = tables.protocol_of(results, "search")
    confirmed = tables.protocol_of(results, "confirmed")
    used = confirmed if kind == "confirmed" else search
    answer = headline(results)
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            mark=MARK.format(what="report"),
            name=results.name,
            kind=kind,
            metric=used.metric_name if used else None,
            answer=answer,
            figures={
                drawing.name: (drawing, base64.b64encode(svg).decode()) for drawing, svg in shown
            },
            front=grids.front_grid(results, answer.chosen),
            confirmation=grids.confirmation_grid(results),
            retrained=grids.retrained_grid(results),
            spaces=grids.spaces_grid(results),
            trials=grids.trials_grid(results),
            cost=grids.cost_grid(results),
            protocol=grids.protocol_grid({"search": search, "confirmation": confirmed}),
            environment=grids.environment_grid(results),
            failed=grids.failed_grid(results),
            picks=_picks(results, answer.chosen),
            rungs=grids.rungs_grid(results),
            importance=grids.importance_grid(results),
            learned=results.importance,
            data=embedded(results, answer.chosen) if results.complete else None,
            **scripts(),
            two_weights=results.two_weights,
            by_flops=results.cost == "flops",
            failed_seeds=opinions.failed_seeds(results),
            toml=study_toml(results.config),
            one_repeat=used is not None and len(used.seeds) == 1,
            unknown=UNKNOWN,
            level=tables.LEVEL,
            check=_checked(results, answer.chosen),
            repeatable=repeatability(results),
            finished=max(r.finished_at for r in results.records),
        )
    )


def _checked(results: StudyResults, chosen: int | None) -> int | None:
    """A trial to score again: the chosen one, if the study keeps its weights; None if there is
    none."""
    kept = [r.number for r in results.complete if results.has_weights(r)]
    return chosen if chosen in kept else next(iter(kept), None)


def _picks(results: StudyResults, chosen: int | None) -> list[tuple[str, str]]:
    """Export commands with what each hands over."""
    records = tables.by_number(results)
    unit = tables.unit_of(tables.cost_of(results, tables.kind_of(results)))
    out = []
    if chosen is not None and results.has_weights(records[chosen]):
        out.append(
            (
                f"--trial {chosen}",
                f"{tables.label(records[chosen], results)}, which the headline speaks of",
            )
        )
    for mode, quality, time, meaning in PICKS:
        budget = f" --quality {quality}" if quality else f" --time {time}" if time else ""
        try:
            record = pick(results, mode, quality, time)
            got = tables.label(record, results)
            if quality and (told := told_difference(results, record)):
                got += f"; {told}"
        except AseSearchError:  # no point meets the budget, or the spread is unknown
            got = "none in this study"
        out.append((f"--pick {mode}{budget}", f"{meaning.format(unit=unit)}: {got}"))
    return out


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
