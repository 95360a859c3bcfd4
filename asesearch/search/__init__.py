"""Doing it: `search` runs a whole study."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from asesearch.config import StudyConfig
from asesearch.search.confirmation import confirm
from asesearch.search.mapping import measure_map
from asesearch.search.preflight import preflight
from asesearch.search.runner import run_trials
from asesearch.search.workbench import Workbench
from asesearch.study.records import Confirmation, StudyResults, TrialRecord
from asesearch.study.study import Study

__all__ = [
    "Workbench",
    "confirm",
    "measure_map",
    "preflight",
    "run_trials",
    "search",
]


def search(
    config: StudyConfig,
    run_dir: Path,
    on_trial: Callable[[TrialRecord], None] | None = None,
    on_confirmation: Callable[[Confirmation], None] | None = None,
) -> StudyResults:
    """Run (or resume) a study: warm up, search until `search.num_trials` schedules have ended or
    the budget is spent, then confirm the front.

    Raises:
        AseSearchError: see `Workbench`, `preflight`, `Study` and `run_trials`.
    """
    bench = Workbench(config, run_dir)
    preflight(bench, run_dir)
    study = Study(config, run_dir)
    run_trials(study, bench, on_trial)
    confirm(study, bench, on_confirmation)
    return study.results()
