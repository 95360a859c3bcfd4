"""Schedule search: `search` runs a whole study, `Study` opens one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from asesearch.config import StudyConfig
from asesearch.search.confirmation import confirm
from asesearch.search.difficulty import DifficultyMap, measure_map
from asesearch.search.picking import pick, pick_nearest
from asesearch.search.preflight import preflight
from asesearch.search.records import Confirmation, StudyResults, TrialRecord
from asesearch.search.study import Study
from asesearch.search.workbench import Workbench

__all__ = [
    "Confirmation",
    "DifficultyMap",
    "Study",
    "StudyResults",
    "TrialRecord",
    "Workbench",
    "confirm",
    "measure_map",
    "pick",
    "pick_nearest",
    "preflight",
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
        AseSearchError: see `Workbench`, `preflight`, `Study` and `Study.run`.
    """
    bench = Workbench(config, run_dir)
    preflight(bench, run_dir)
    study = Study(config, run_dir)
    study.run(bench, on_trial)
    confirm(study, bench, on_confirmation)
    return study.results()
