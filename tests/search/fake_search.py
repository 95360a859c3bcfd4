"""A search whose evaluation is a formula: `python fake_search.py SEARCH_JSON RUN_DIR DIE_AT SECTIONS_JSON`.

Run as a process by tests that kill it.
"""

import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from asesearch.config import parse_study
from asesearch.errors import TrainingDiverged
from asesearch.evaluation.results import EvaluationResult, Protocol
from asesearch.search.study import Study
from asesearch.search.workbench import Outcome

DEPTH = 6
PROTOCOL = Protocol("frechet", "fake", "0", 100, "fake", 100, "0", (0, 100), "ddim", 10, 1.0)
CHEAP = replace(PROTOCOL, num_samples=20)


class FakeBench:
    """Quality is a formula of the schedule; a schedule ending in `fails` diverges."""

    def __init__(self, die_at=None, fails=None, weights="w", config=None):
        self.backbone = SimpleNamespace(depth=DEPTH, min_exit_depth=1)
        self.protocol, self.die_at, self.fails, self.tried = PROTOCOL, die_at, fails, []
        self.identity = {"weights": weights}
        self.config, self.min_exit_depth, self.cheaply = config or make_config(), 1, []
        own = tuple(range(950, 0, -100))
        self.samplers = {"ddim-50": own} | dict.fromkeys(self.config.search.samplers, own[::2])
        self.latency, self.batch_size = SimpleNamespace(median_ms=(1.0,)), 10
        self.call_cost = tuple(float(d) for d in range(1, DEPTH + 1))

    def cost_fracs(self, schedule, sampler=""):
        frac = schedule.block_frac(self.samplers[sampler or "ddim-50"]) * (0.5 if sampler else 1.0)
        return frac, frac, frac

    def try_cheaply(self, schedule, sampler=""):
        self.cheaply.append(schedule)
        return EvaluationResult(CHEAP, tuple(2 * v for v in figures(schedule, sampler))), 0.5, 1.0

    def try_schedule(self, schedule, folder, sampler=""):
        if len(self.tried) == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.tried.append(schedule)
        if self.fails is not None and schedule.exit_depths[-1] == self.fails:
            raise TrainingDiverged("loss or gradient is not finite at step 3 of 9; lower the learning rate")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "weights.safetensors").write_bytes(b"x")
        fracs = self.cost_fracs(schedule, sampler)
        quality = EvaluationResult(PROTOCOL, figures(schedule, sampler))
        return Outcome(quality, *fracs, [1.0, 0.5], {"finetune": 1.0}, {"finetune": 2.0})


def figures(schedule, sampler=""):
    """Two repeats: blocks left out near data cost most, and half the steps a quarter of it all."""
    dropped = [(DEPTH - d) / (1 + i) for i, d in enumerate(schedule.exit_depths)]
    value = (5 + sum(d**2 for d in dropped)) * (1.25 if sampler else 1.0)
    return value - 0.1, value + 0.1


def make_config(sections=None, **search):
    return parse_study(
        {
            "name": "fake",
            "backbone": {"kind": "dit", "checkpoint": "none"},
            "data": {"kind": "fashion-mnist"},
            "search": {"num_trials": 8, "num_intervals": 4, "warm_start": ["6 6 3 3"], **search},
            **(sections or {}),
        },
        "fake",
    )


if __name__ == "__main__":
    search, run_dir, die_at = json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    config = make_config(json.loads(sys.argv[4]), **search)
    Study(config, run_dir).run(FakeBench(die_at=die_at if die_at >= 0 else None, config=config), lambda r: time.sleep(0))
