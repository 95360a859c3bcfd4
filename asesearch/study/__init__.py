"""What is on record: the study directory, its storage, its trials, and what can be read from them.

Nothing in here needs torch, so that reports and picks are quick.
"""

from asesearch.study.answers import Answer, answers
from asesearch.study.difficulty import DifficultyMap
from asesearch.study.picking import pick, pick_nearest
from asesearch.study.records import Confirmation, StudyResults, TrialRecord
from asesearch.study.study import Study

__all__ = [
    "Answer",
    "Confirmation",
    "DifficultyMap",
    "Study",
    "StudyResults",
    "TrialRecord",
    "answers",
    "pick",
    "pick_nearest",
]
