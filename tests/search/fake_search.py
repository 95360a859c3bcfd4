"""A search whose evaluation is a formula: `python fake_search.py STUDY_JSON RUN_DIR [die_at N | hang_at N]`.

Run as a process by tests that kill it.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from asesearch.config import parse_study
from asesearch.errors import TrainingDiverged
from asesearch.evaluation.results import EvaluationResult, Protocol
from asesearch.search.study import Study
from asesearch.search.workbench import Outcome

DEPTH = 6
PROTOCOL = Protocol("frechet", "fake", "0", 100, "fake", 100, "0", (0, 100), "ddim", 10, 1.0)


class FakeBench:
    """Quality is a formula of the schedule; a schedule ending in `fails` diverges."""

    def __init__(self, die_at=None, fails=None, weights="w"):
        self.backbone = SimpleNamespace(depth=DEPTH, min_exit_depth=1)
        self.protocol, self.die_at, self.fails, self.tried = PROTOCOL, die_at, fails, []
        self.identity = {"weights": weights}

    def try_schedule(self, schedule, folder):
        if len(self.tried) == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.tried.append(schedule)
        if self.fails is not None and schedule.exit_depths[-1] == self.fails:
            raise TrainingDiverged("loss or gradient is not finite at step 3 of 9; lower the learning rate")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "weights.safetensors").write_bytes(b"x")
        dropped = [(DEPTH - d) / (1 + i) for i, d in enumerate(schedule.exit_depths)]
        value = 5 + sum(d**2 for d in dropped)
        frac = schedule.block_frac()
        return Outcome(EvaluationResult(PROTOCOL, (value - 0.1, value + 0.1)), frac, frac, frac, [1.0, 0.5], {"finetune": 1.0})


def make_config(**search):
    return parse_study(
        {
            "name": "fake",
            "backbone": {"kind": "dit", "checkpoint": "none"},
            "data": {"kind": "fashion-mnist"},
            "search": {"num_trials": 8, "num_intervals": 4, "warm_start": ["6 6 3 3"], **search},
        },
        "fake",
    )


if __name__ == "__main__":
    search, run_dir, die_at = json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    config = make_config(**search)
    Study(config, run_dir).run(FakeBench(die_at=die_at if die_at >= 0 else None), lambda r: time.sleep(0))
