"""The study's Optuna trials as its record: how each is ended, and what keeps a score that another
worker's mistake would have lost.
"""

from __future__ import annotations

import json
from contextlib import suppress

import optuna
from optuna.trial import FrozenTrial, TrialState

from asesearch.search.dashboard import show_trial
from asesearch.study.records import RECORD, TrialRecord
from asesearch.study.study import Study


class Ledger:
    """Puts records into trials, and ends them.

    Args:
        study: whose trials they are.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self.cost = study.config.search.cost

    def values(self, record: TrialRecord) -> tuple[float, float]:
        """The two objectives of a trial that has a score: score and relative cost."""
        cost = record.cost_frac(self.cost)
        assert cost is not None and record.quality is not None
        return record.quality.value, cost

    def tell(self, number: int, record: TrialRecord | None) -> None:
        """End a trial with its record's state; one without a record has failed.

        One that another worker, taking this one for dead, has ended is left as it is, and so is one
        that the database had ended when its answer was lost.
        """
        state, values = self._end_of(record)
        with suppress(optuna.exceptions.UpdateFinishedTrialError):
            self.study.optuna.tell(
                number, values, state=None if values else state, skip_if_finished=True
            )

    def close(self, trial: FrozenTrial) -> None:
        """End a trial whose process is gone or broke off: with its scores, if they were on record
        already."""
        recorded = RECORD in trial.user_attrs
        self.tell(trial.number, self.study.record_of(trial) if recorded else None)

    def _end_of(self, record: TrialRecord | None) -> tuple[TrialState, tuple[float, float] | None]:
        """State and objectives of an Optuna trial with this record."""
        if record is not None and record.quality is not None:
            return TrialState.COMPLETE, self.values(record)
        stopped = record is not None and record.state == "stopped"
        return TrialState.PRUNED if stopped else TrialState.FAIL, None

    def put(self, trial: optuna.Trial, record: TrialRecord) -> None:
        """Put a record into its trial; into one of its own, where another worker, taking this one
        for dead, has ended it."""
        try:
            trial.set_user_attr(RECORD, json.dumps(record.to_dict()))
        except optuna.exceptions.UpdateFinishedTrialError:
            self.keep(trial.number, record)
        else:
            show_trial(self.study, trial, record)

    def keep(self, number: int, record: TrialRecord) -> None:
        """Put a record into a trial of its own, where the one it was made in was ended
        meanwhile."""
        trials = self.study.optuna.get_trials(deepcopy=False)
        lost = next(t for t in trials if t.number == number)
        state, values = self._end_of(record)
        self.study.optuna.add_trial(
            optuna.trial.create_trial(
                state=state,
                values=values,
                params=lost.params,
                distributions=lost.distributions,
                user_attrs={**lost.user_attrs, RECORD: json.dumps(record.to_dict())},
            )
        )
