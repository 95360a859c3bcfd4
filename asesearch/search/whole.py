"""A search from the study file to the report; `asesearch search` is no other."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from asesearch.backbones.device import plain_torch
from asesearch.config import StudyConfig
from asesearch.data.outputs import KNOWN, check_output
from asesearch.errors import ConfigError
from asesearch.files import real_path
from asesearch.locks import check_locks
from asesearch.search.confirmation import confirm
from asesearch.search.plan import Plan, make_plan
from asesearch.search.preflight import preflight
from asesearch.search.runner import run_trials
from asesearch.search.workbench import Workbench
from asesearch.study.changes import other_inputs
from asesearch.study.directory import STUDY, check_study_dir
from asesearch.study.opening import check_to_search, storage_of
from asesearch.study.records import Confirmation, StudyResults, TrialRecord
from asesearch.study.study import Study
from asesearch.study.urls import parse_url
from asesearch.study.workers import worked_s


class SearchRun:
    """A search that can run to its end, as far as that can be known: everything is checked when it
    is made, and nothing is left behind by that.

    Args:
        config: the study file.
        run_dir: the study directory.
        report_dir: folder of the report that is written in the end; None for none.
        dry_run: whether it is only planned, so that nothing is written to the study directory.

    Attributes:
        bench: what the study's trials share.
        page: the report, once it is written.

    Raises:
        AseSearchError: see `check_outputs`, `check_to_search`, `Workbench` and `preflight`.
    """

    def __init__(
        self,
        config: StudyConfig,
        run_dir: Path,
        report_dir: Path | None = None,
        *,
        dry_run: bool = False,
    ) -> None:
        check_outputs(config, run_dir, report_dir)
        begun = check_to_search(config, run_dir)
        self._has_begun = begun is not None
        self.config = config
        self.run_dir = run_dir
        self.report_dir = report_dir
        self.bench = Workbench(config, None if dry_run else run_dir)
        if begun is not None:
            other_inputs(begun, run_dir, self.bench.identity)
            self.bench.costs.check_on_record(run_dir)
        self.found = preflight(self.bench, run_dir)
        self.page: Path | None = None

    @cached_property
    def plan(self) -> Plan:
        """What it will take, measured on this machine, beside what is on record."""
        if not self._has_begun:
            return make_plan(self.bench)
        recorded = Study.open(self.run_dir, storage_of(self.config, self.run_dir)).results()
        return make_plan(self.bench, recorded, worked_s(self.run_dir))

    def to_dict(self) -> dict[str, Any]:
        """Settings, protocols, what was found to work, and the plan: plain data for JSON."""
        protocols = self.bench.protocols
        return {
            "study": self.config.shareable(),
            "protocol": vars(protocols.search),
            "protocols": {
                name: {**vars(p), "metric_name": p.metric_name}
                for name, p in protocols.named.items()
            },
            "preflight": self.found.to_dict(),
            "plan": self.plan.to_dict(),
        }

    @cached_property
    def study(self) -> Study:
        """The study directory, begun or continued.

        Raises:
            StudyError: see `Study`.
        """
        return Study(self.config, self.run_dir)

    def run(
        self,
        on_trial: Callable[[TrialRecord], None] | None = None,
        on_confirmation: Callable[[Confirmation], None] | None = None,
        *,
        on_step: Callable[[int, float], None] | None = None,
        on_warm_up: Callable[[int, float], None] | None = None,
        on_searched: Callable[[], None] | None = None,
    ) -> StudyResults:
        """Warm up, search, confirm the front, write the report.

        Args:
            on_trial: called with each record of this process.
            on_confirmation: called with each point that this process has confirmed.
            on_step: called as (steps done, loss) in each brief fine-tuning.
            on_warm_up: called as (steps done, loss) in the elastic warm-up.
            on_searched: called once, between the trials and the confirmation.

        Raises:
            AseSearchError: see `Study`, `run_trials`, `confirm` and `write_report`.
        """
        self.bench.trials.on_step = on_step
        run_trials(self.study, self.bench, on_trial, on_warm_up)
        if on_searched is not None:
            on_searched()
        confirm(self.study, self.bench, on_confirmation)
        results = self.study.results()
        if self.report_dir is not None:
            from asesearch.report import write_report  # which draws: not for every search

            self.page = write_report(results, self.report_dir)
        return results


def check_outputs(config: StudyConfig, run_dir: Path, report_dir: Path | None = None) -> None:
    """Refuse a study directory, storage or report folder that can't be written; nothing is left
    behind.

    Raises:
        StudyError: the storage's URL, a file system without locks, or a report folder that holds
            something else.
        WriteError: a folder can't be written.
        ConfigError: the report would take the place of the study.
    """
    if config.search.storage is not None:
        parse_url(config.search.storage)
    check_output(config, run_dir, "--out", [STUDY])
    if report_dir is not None:
        check_output(config, report_dir, "--report", KNOWN)  # `check_report_dir` looks into it
    check_study_dir(run_dir, config.search.storage)
    _check_locks(run_dir)
    if report_dir is None:
        return
    if real_path(report_dir) in (real_path(run_dir), *real_path(run_dir).parents):
        raise ConfigError(
            f"the report goes beside the study or into it; got {report_dir} for the study in "
            f"{run_dir}, which it would have to replace; change --report"
        )
    from asesearch.report.page import check_report_dir  # which draws: not for every search

    check_report_dir(report_dir)


def _check_locks(run_dir: Path) -> None:
    """Try file locks where the study directory is or will be, and leave nothing behind.

    Raises:
        StudyError: they do not work there.
    """
    folder = real_path(run_dir)
    while not folder.exists():
        folder = folder.parent
    check_locks(folder)


@plain_torch()
def search(
    config: StudyConfig,
    run_dir: str | os.PathLike[str],
    on_trial: Callable[[TrialRecord], None] | None = None,
    on_confirmation: Callable[[Confirmation], None] | None = None,
    *,
    report_dir: str | os.PathLike[str] | None = None,
) -> StudyResults:
    """Run (or resume) a study: warm up, search until `search.num_trials` schedules have ended or
    the budget is spent, then confirm the front, and write the report where a folder is given.

    Raises:
        AseSearchError: see `SearchRun`; a `config` that is none.
    """
    if not isinstance(config, StudyConfig):
        raise ConfigError(
            f"config must be a study file that is read; got {type(config).__name__}; read it by "
            "load_study"
        )
    page = None if report_dir is None else Path(report_dir)
    return SearchRun(config, Path(run_dir), page).run(on_trial, on_confirmation)
