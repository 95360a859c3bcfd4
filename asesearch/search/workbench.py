"""What a search works with: the study's parts, what they cost, and the work of a trial."""

from __future__ import annotations

from pathlib import Path

from asesearch.config import StudyConfig
from asesearch.search.costs import Costs
from asesearch.search.parts import Parts
from asesearch.search.trials import Trials


class Workbench(Parts):
    """A study's parts with what is done with them; arguments and errors are those of `Parts`.

    Attributes:
        costs: what points cost.
        trials: the work of a trial.
    """

    def __init__(
        self, config: StudyConfig, run_dir: Path | None = None, *, reading: bool = False
    ) -> None:
        super().__init__(config, run_dir, reading=reading)
        self.costs = Costs(self)
        self.trials = Trials(self, self.costs)
