"""Rows of `paper.py` as its page shows them: training seeds brought together, differences from the
full network, and what is not measured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from paper_record import Line, key_of, read_lines, score_of
from paper_rows import FIXED, Choice, Row

from asesearch.report import tables
from asesearch.score import EvaluationResult, TrainedScore, student_factor
from asesearch.study.timing import credited_time


@dataclass(frozen=True)
class Shown:
    """A row with what is on record of it, one line a training seed; none if it is not measured."""

    row: Row
    lines: tuple[Line, ...] = ()

    @property
    def measured(self) -> bool:
        """Whether there is anything to show."""
        return bool(self.lines)

    @property
    def score(self) -> EvaluationResult:
        """One value per seed set: the mean over the training seeds."""
        results = [score_of(line) for line in self.lines]
        means = np.mean([result.values for result in results], axis=0)
        return EvaluationResult(results[0].protocol, tuple(means.tolist()))

    @property
    def trained(self) -> TrainedScore:
        """One value per training seed."""
        return TrainedScore(tuple(score_of(line).value for line in self.lines))

    def get(self, name: str) -> float:
        """A cost of the first training seed; NaN where it is not measured."""
        return float(self.lines[0].get(name, math.nan)) if self.lines else math.nan

    @property
    def credited_frac(self) -> float:
        """The relative time that may be claimed, see `credited_time`; NaN if not measured."""
        return credited_time(self.get("time_frac"), self.get("time_spread"), self.get("block_frac"))

    @property
    def tuning_tflop(self) -> tuple[float, float]:
        """Own training, and the warm-up's; NaN where it is not measured."""
        if not self.lines:
            return math.nan, math.nan
        cost = self.lines[0]["tuning"]
        return cost["own_gflops"] / 1000, cost["warm_up_gflops"] / 1000

    @property
    def tuning_seconds(self) -> float:
        """Of its own training; NaN where it is not measured."""
        return float(self.lines[0]["tuning"]["own_seconds"]) if self.lines else math.nan


class Experiment:
    """All rows of an experiment, measured or planned.

    Args:
        name: of the experiment.
        folder: with the files of rows.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.path = folder / f"{name}.jsonl"
        self.lines = read_lines(self.path)
        told = self.lines[0]["settings"] if self.lines else {}
        own = any(line["settings"].get("full_depth") == "pretrained" for line in self.lines)
        choice = Choice(
            joined=not own,
            depth=told.get("depth", 18),
            kind=told.get("kind", "dit"),
            published=not any("--no-published" in line["command"] for line in self.lines),
        )
        planned = FIXED[name](choice) if name in FIXED and self.lines else ()
        rows = {key_of(row.to_dict(), None): row for row in planned}
        lines: dict[tuple[Any, ...], list[Line]] = {}
        for line in self.lines:
            key = key_of(line["row"], None)
            rows[key] = Row(**line["row"])
            lines.setdefault(key, []).append(line)
        self.all = [Shown(row, tuple(lines.get(key, ()))) for key, row in rows.items()]

    def rows(self, against: str | None = None, stage: str = "confirm") -> list[Shown]:
        """Those compared at a sampler, or at all, in the order they were planned."""
        return [
            shown
            for shown in self.all
            if shown.row.stage == stage and against in (None, shown.row.against)
        ]

    @property
    def samplers(self) -> list[str]:
        """That rows are compared at."""
        return list(dict.fromkeys(shown.row.against for shown in self.all))

    def reference(self, against: str) -> Shown | None:
        """The better of the measured full networks at a sampler."""
        full = [s for s in self.rows(against) if s.row.method == "full" and s.measured]
        return min(full, key=lambda s: s.score.value, default=None)

    def table(self) -> pd.DataFrame:
        """One line a row."""
        return pd.DataFrame([self._line(shown) for shown in self.all])

    def _line(self, shown: Shown) -> dict[str, Any]:
        row = shown.row
        difference, margin = self.difference(shown)
        own, warm = shown.tuning_tflop
        return {
            **row.to_dict(),
            "score": shown.score.value if shown.measured else math.nan,
            "resampling": tables.nan(shown.score.std_error) if shown.measured else math.nan,
            "retraining": tables.nan(shown.trained.std_error) if shown.measured else math.nan,
            "training_seeds": len(shown.lines) if row.trained else 0,
            "difference": difference,
            "margin": margin,
            "block_frac": shown.get("block_frac"),
            "flops_frac": shown.get("flops_frac"),
            "time_frac": shown.get("time_frac"),
            "time_spread": shown.get("time_spread"),
            "own_tflop": own,
            "warm_up_tflop": warm,
            "own_seconds": shown.tuning_seconds,
        }

    def difference(self, shown: Shown) -> tuple[float, float]:
        """From the better full network on the same seed sets, and half its 95 % interval: the wider
        of resampling's and, where both were trained again, of retraining's. NaN if unknown."""
        reference = self.reference(shown.row.against)
        same = reference is shown or shown.row.stage != "confirm"
        if reference is None or not shown.measured or same:
            return math.nan, math.nan
        difference, _ = shown.score.minus(reference.score)
        margins = [shown.score.margin(reference.score), self._retrained(shown, reference)]
        known = [margin for margin in margins if margin is not None]
        return difference, max(known, default=math.nan)

    def _retrained(self, shown: Shown, reference: Shown) -> float | None:
        """Half the interval over the training seeds; a full network as it is has none to vary."""
        if reference.row.trained:
            return shown.trained.minus(reference.trained)[1]
        error = shown.trained.std_error
        return None if error is None else student_factor(len(shown.lines)) * error
