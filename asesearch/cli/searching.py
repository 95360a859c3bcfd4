"""`search`, `map`, `evaluate` and `recheck`."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from asesearch.cli.interruption import interruptible
from asesearch.cli.options import SCHEDULE, DryRun, RunDir, Storage, StudyFile
from asesearch.cli.printing import print_json, say
from asesearch.errors import ConfigError

if TYPE_CHECKING:
    from asesearch.search import SearchRun
    from asesearch.study import Study
    from asesearch.study.records import Confirmation, StudyResults, TrialRecord


def search(
    study: StudyFile,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Study directory; default runs/NAME.")
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(help="Schedules in all, in place of the study's search.num_trials."),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Wall time in place of a number of trials: 90m, 2h, 1d.")
    ] = None,
    storage: Annotated[
        str | None, typer.Option(help="Optuna storage URL; default a SQLite file in the directory.")
    ] = None,
    report_dir: Annotated[
        Path | None, typer.Option("--report", help="Report folder; default reports/NAME.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Search exit schedules: fine-tune, sample and evaluate each, confirm the front on fresh seeds,
    write the report.

    With --budget, warm-up, trials and confirmation together take that wall time, within a tenth:
    the time in which at least one worker is at work, in earlier runs too.
    Ctrl-C or a crash loses at most the trial in flight; the same command resumes, and with more
    --trials it continues.
    Several processes may share one study: give all the same file, --out, and a --storage that all
    can reach. They share out trials and confirmation; one that has nothing else to do waits for the
    others and says so.
    """
    from asesearch.config import load_study
    from asesearch.search import SearchRun

    if trials is not None and budget is not None:
        raise ConfigError(
            f"give --trials or --budget, not both; got {trials} and {budget}; leave one out"
        )
    config = load_study(study).with_options(
        "search", num_trials=trials, budget=budget, storage=storage
    )
    if trials is not None:
        config = config.model_copy(
            update={"search": config.search.model_copy(update={"budget": None})}
        )
    run_dir = out or Path("runs") / config.name
    report_to = report_dir or Path("reports") / config.name
    run = SearchRun(config, run_dir, report_to, dry_run=dry_run)
    if dry_run:
        print_json(run.to_dict())
        return
    opened = run.study
    say(run.plan.line())
    with interruptible(lambda: _on_record(opened)):
        results = _shown(run)
        print_json({"study": str(run_dir), "report": str(run.page), "front": _front(results)})


def _on_record(study: Study) -> str:
    """What an interrupted search has kept."""
    of = "" if study.config.search.budget else f" of {study.config.search.num_trials}"
    return f"{study.run_dir} keeps {len(study.records())}{of} schedules; the same command resumes"


def _shown(run: SearchRun) -> StudyResults:
    """Search, with a bar on stderr and a line for each trial and each confirmation."""
    config = run.config
    total = None if config.search.budget else config.search.num_trials
    done = len(run.study.records())
    if done:
        what = f"{done} of {total or 'unlimited'} schedules on record; continuing"
        if total is not None and done >= total:
            what = f"{done} schedules on record, {total} are asked for: no trial is added"
        say(f"{run.run_dir}: {what}")
    with ExitStack() as while_searching:
        start = min(done, total or done)
        bar = while_searching.enter_context(
            tqdm(total=total, initial=start, desc="search", file=sys.stderr, dynamic_ncols=True)
        )
        while_searching.enter_context(logging_redirect_tqdm())  # lines about waiting go above it

        def on_trial(record: TrialRecord) -> None:
            bar.update(len(run.study.records()) - bar.n)  # other workers' too
            bar.write(_trial_line(record, config.search.cost), file=sys.stderr)

        def on_searched() -> None:
            while_searching.close()
            say("confirming the front on fresh seeds")

        return run.run(
            on_trial,
            lambda c: say(_confirmed_line(c, run.study.record(c.number))),
            on_step=lambda step, loss: bar.set_postfix_str(f"step {step} loss {loss:.4f}"),
            on_warm_up=lambda step, loss: bar.set_postfix_str(f"warm-up {step} loss {loss:.4f}"),
            on_searched=on_searched,
        )


def _front(results: StudyResults) -> list[dict[str, Any]]:
    """The front of the report: of confirmed scores and measured times where there are any.

    `confirmed` says which; without it the score is the search's and the time predicted, or none in
    a study of FLOPs, whose front goes by those. The time is the bound of the block calls where the
    measured one is better than they can explain.
    """
    from asesearch.report.tables import FLOPS, front

    flops = {r.number: r.flops_frac for r in results.records}
    rows = front(results).to_dict("records")
    return [
        {
            "trial": int(row["number"]),
            "schedule": row["schedule"],
            "sampler": row["sampler"],
            "confirmed": row["kind"] == "confirmed",
            "quality": row["quality"],
            "std_error": None if isnan(row["std_error"]) else row["std_error"],
            "time_frac": None if row["cost"] == FLOPS else row["credited_frac"],
            "speed_up": None if row["cost"] == FLOPS else row["speed_up"],
            "flops_frac": flops[row["number"]],
            "measured_time_frac": row["time_frac"] if row["kind"] == "confirmed" else None,
        }
        for row in rows
    ]


def _time(frac: float) -> str:
    """A relative sampling time and the speed-up it comes to."""
    return f"{frac:.3f}× the time ({1 / frac:.2f}× as fast)"


def _confirmed_line(found: Confirmation, record: TrialRecord) -> str:
    """One line about a point that has been confirmed; a time that its block calls can't explain is
    not made a speed-up of."""
    from asesearch.study.timing import UNEXPLAINED, is_unexplained

    line = f"trial {found.number}: {found.quality.value:.4g} at"
    time = found.measured_time_frac
    if is_unexplained(time, found.measured_time_spread, record.block_frac):
        assert record.block_frac is not None
        blocks = f"{record.block_frac:.3f}× of the block calls"
        return f"{line} {blocks}; {time:.3f}× the time measured is {UNEXPLAINED}"
    return f"{line} {_time(time)} measured"


def _trial_line(record: TrialRecord, cost: str) -> str:
    """One line about a trial that has ended, in a study of that cost."""
    point = f"trial {record.number} ({record.origin}) {record.point}"
    if record.quality is not None:
        frac = record.cost_frac(cost)
        assert frac is not None
        told = f"{frac:.3f}× the FLOPs" if cost == "flops" else _time(frac)
        return f"{point}: {record.quality.value:.4g} at {told}"
    if record.low_fidelity is not None and record.failure is None:
        return (
            f"{point}: low-fidelity score {record.low_fidelity.quality.value:.4g}, "
            f"{record.low_fidelity.reason}: not fine-tuned"
        )
    return f"{point}: {record.failure}"


def map_(
    study: StudyFile,
    weights: Annotated[
        Path | None,
        typer.Option(
            help="Weights to measure against the study's own network, in place of that network "
            "itself."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to write; default reports/NAME-map.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Measure the difficulty map: the error of every exit depth at every noise level, in one pass,
    without sampling.

    Where few blocks already come close to the full network, an exit schedule may be shallow. The
    network may be trained or not. The images are those of [map.data], or else the study's: give
    some it was not trained on.
    """
    from asesearch.config import load_study
    from asesearch.search import StudyMap

    config = load_study(study)
    folder = out or Path("reports") / f"{config.name}-map"
    chosen = StudyMap(config, folder, weights)
    if dry_run:
        estimate = {"total_s": round(chosen.seconds(), 2)}
        print_json({**chosen.facts, "out": str(folder), "estimate": estimate})
        return
    bar = tqdm(
        total=config.map.num_bins, desc="map", file=sys.stderr, dynamic_ncols=True, leave=False
    )
    kept = (
        f"the map was not complete, so nothing was written to {folder}; the same command "
        "begins again"
    )
    with interruptible(kept), bar:
        found = chosen.measure(lambda done, _: bar.update(done - bar.n))
    with interruptible(f"the map may not be whole in {folder}; the same command begins again"):
        files = [str(path) for path in chosen.write(found)]
    ends = {"data": 0, "middle": found.num_bins // 2, "noise": found.num_bins - 1}
    means = {name: [float(f"{v:.4g}") for v in found.error_full[i]] for name, i in ends.items()}
    print_json({**chosen.facts, "files": files, "error_by_exit_depth": means})


def evaluate(
    run_dir: RunDir,
    trial: Annotated[
        int | None,
        typer.Option(help="Trial to evaluate; default: the pretrained network as it is."),
    ] = None,
    schedule: Annotated[str | None, SCHEDULE] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Compare with the score on record for --trial; exit 1 if it can't be reproduced.",
        ),
    ] = False,
    storage: Storage = None,
    dry_run: DryRun = False,
) -> None:
    """Measure quality under the study's protocol: a trial's weights again, or the pretrained ones
    under any schedule."""
    from asesearch.search import PointEvaluation

    if check and trial is None:
        raise ConfigError(
            "--check compares with the score of a trial; got no --trial; give its number"
        )
    evaluation = PointEvaluation(run_dir, trial, schedule, storage=storage)
    point = evaluation.point
    chosen = {"schedule": str(point.schedule), "sampler": str(point.sampler)}
    if dry_run:
        print_json({**chosen, "protocol": vars(evaluation.protocol)})
        return
    with interruptible("a score that is not complete is not kept; the same command begins again"):
        quality, seconds = evaluation.run()
    result: dict[str, Any] = {
        "metric": evaluation.protocol.metric_name,
        "value": quality.value,
        "std_error": quality.std_error,
        **chosen,
        "sampling_seconds": round(seconds["sample"], 2),
        **quality.to_dict(),
    }
    if check:
        result["check"] = evaluation.compare(quality)
    print_json(result)
    if check and not result["check"]["reproduced"]:
        raise typer.Exit(1)


def recheck(
    run_dir: RunDir,
    trials: Annotated[
        list[int] | None,
        typer.Argument(
            metavar="TRIAL...",
            help="Trials to check; default: all with a score whose weights are kept.",
            show_default=False,
        ),
    ] = None,
    storage: Storage = None,
    dry_run: DryRun = False,
) -> None:
    """Run recorded evaluations again from their recipe; exit 1 if any can't be reproduced."""
    from asesearch.search import Workbench, to_recheck
    from asesearch.search import recheck as check_again
    from asesearch.study import Study

    study = Study.open(run_dir, storage)
    records = to_recheck(study, trials or ())
    if dry_run:
        print_json({"trials": [r.number for r in records]})
        return
    bench = Workbench(study.config, run_dir, reading=True)
    with (
        interruptible("nothing is kept of a check; the same command begins again"),
        tqdm(total=len(records), desc="recheck", file=sys.stderr, dynamic_ncols=True) as bar,
    ):
        found = check_again(study, bench, records, lambda _: bar.update())
    good = sum(r.reproduced for r in found)
    say(f"{good} of {len(found)} reproduced")
    print_json({"reproduced": good, "of": len(found), "trials": [r.to_dict() for r in found]})
    if good < len(found):
        raise typer.Exit(1)
