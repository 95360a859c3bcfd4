"""Doing it: `search` runs a whole study."""

from asesearch.search.confirmation import confirm
from asesearch.search.mapping import measure_map
from asesearch.search.preflight import preflight
from asesearch.search.reevaluation import PointEvaluation, recheck, to_recheck
from asesearch.search.runner import run_trials
from asesearch.search.study_map import StudyMap
from asesearch.search.whole import SearchRun, search
from asesearch.search.workbench import Workbench

__all__ = [
    "PointEvaluation",
    "SearchRun",
    "StudyMap",
    "Workbench",
    "confirm",
    "measure_map",
    "preflight",
    "recheck",
    "run_trials",
    "search",
    "to_recheck",
]
