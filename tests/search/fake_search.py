"""A search whose evaluation is a formula; `work` is a process of tests that kill it, or that run
several at once."""

import os
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np

from asesearch.config import parse_study
from asesearch.errors import TrainingDiverged
from asesearch.evaluation.clock import TimeRatio
from asesearch.evaluation.cost import LatencyTable
from asesearch.sampler import Sampler
from asesearch.score import EvaluationResult, Protocol
from asesearch.search import confirmation
from asesearch.search.latency import Conditions, shared_table
from asesearch.search.protocols import Protocols
from asesearch.search.runner import run_trials
from asesearch.search.trials import Outcome
from asesearch.study import storage, workers
from asesearch.study.study import Study

DEPTH = 6
PROTOCOL = Protocol("frechet", "fake", "0", 100, "fake", 100, "0", (0, 100), "ddim", 10, 1.0)
OWN = Sampler("ddim", 50)
LOW_FIDELITY = replace(PROTOCOL, num_samples=20)


class FakeBench:
    """Quality is a formula of the schedule; a schedule ending in `fails` diverges.

    A trial of the full network takes `full_s`, any other `trial_s`. Whatever is paid for is a line
    of the file `paid`.
    """

    device = None

    def __init__(
        self, die_at=None, fails=None, weights="w", config=None, full_s=0.0, trial_s=0.0, paid=None
    ):
        self.full_s = full_s
        self.trial_s = trial_s
        self.paid = paid
        self.backbone = SimpleNamespace(depth=DEPTH, min_exit_depth=1)
        self.costs = self
        self.trials = self
        self.die_at = die_at
        self.fails = fails
        self.tried = []
        self.identity = {"weights": weights}
        self.config = config or make_config()
        self.min_exit_depth = 1
        self.low_tried = []
        own = tuple(range(950, 0, -100))
        self.own_sampler, *others = self.config.samplers
        self.samplers = {self.own_sampler: own} | dict.fromkeys(others, own[::2])
        self.latency = SimpleNamespace(median_ms=(1.0,))
        self.batch_size = 10

    def calibrate(self):
        pass

    def of_calls(self, sampler):
        return np.tile(np.arange(1.0, DEPTH + 1), (len(self.samplers[sampler]), 1))

    def fracs(self, point):
        share = 1.0 if point.sampler == self.own_sampler else 0.5
        frac = point.schedule.block_frac(self.samplers[point.sampler]) * share
        return frac, frac, frac

    def pay(self, what):
        if self.paid is not None:
            with open(self.paid, "a") as file:
                file.write(f"{what}\n")

    def tuned(self, schedule, folder, training_seed=0):
        self.pay(f"training seed {training_seed} of {schedule}")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "weights.safetensors").write_bytes(b"x")
        return SimpleNamespace(backbone=None)

    def try_low_fidelity(self, point):
        self.low_tried.append(point.schedule)
        return EvaluationResult(LOW_FIDELITY, tuple(2 * v for v in scores(point))), 0.5, 1.0

    def try_point(self, point, folder):
        schedule = point.schedule
        if len(self.tried) == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.tried.append(schedule)
        self.pay(f"trial {point.weights_key} under {point.sampler}")
        own = point.sampler == self.own_sampler
        time.sleep(self.full_s if schedule.is_full and own else self.trial_s)
        if self.fails is not None and schedule.exit_depths[-1] == self.fails:
            raise TrainingDiverged(
                "loss or gradient is not finite at step 3 of 9; lower the learning rate"
            )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "weights.safetensors").write_bytes(b"x")
        fracs = self.fracs(point)
        quality = EvaluationResult(PROTOCOL, scores(point))
        return Outcome(quality, *fracs, [1.0, 0.5], {"finetune": 1.0}, {"finetune": 2.0})

    @property
    def protocols(self):
        how = self.config.confirm
        seeds = tuple(10**9 + i * how.num_samples for i in range(how.repeats))
        fresh = replace(PROTOCOL, num_samples=how.num_samples, seeds=seeds)
        return Protocols(PROTOCOL, fresh, LOW_FIDELITY)

    def evaluate(self, net, point, protocol):
        self.pay(f"confirmation {point.weights_key} under {point.sampler}")
        time.sleep(self.trial_s)
        return EvaluationResult(protocol, tuple(5.0 + i for i in range(len(protocol.seeds)))), {
            "sample": 0.0
        }

    also = ()

    def confirmed(self, net, point):
        return self.evaluate(net, point, self.protocols.confirmation)[0], (), None

    def measured_time(self, net, point, full_net):
        return TimeRatio(self.fracs(point)[0], 0.01, ())


class SharedBench(FakeBench):
    """With a latency table that the workers of a study directory share; measuring it takes a
    while."""

    def __init__(self, run_dir, **how):
        self.run_dir = run_dir
        super().__init__(**how, paid=run_dir / "paid")

    @property
    def latency(self):
        return shared_table(
            self.run_dir, Conditions("cpu", 10, "float32", False), self.measure, one_only=True
        )

    @latency.setter
    def latency(self, _):
        pass

    def measure(self):
        self.pay("latency")
        time.sleep(0.2)
        return LatencyTable(
            10, "cpu", 1, "float32", (1.0,) * DEPTH, (0.1,) * DEPTH, 3, "float32", False
        )


def scores(point):
    """Two repeats: blocks left out near data cost most, and half the steps a quarter of it all."""
    dropped = [(DEPTH - d) / (1 + i) for i, d in enumerate(point.schedule.exit_depths)]
    value = (5 + sum(d**2 for d in dropped)) * (1.0 if point.sampler == OWN else 1.25)
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


def work(search, run_dir, die_at=None, sections=None, **how):
    """What a process does that works on a study: search, and with `how` confirm.

    Args:
        search: the study's section of that name.
        run_dir: the study directory.
        die_at: how many trials it ends before it kills itself; None for all.
        sections: further sections of the study.
        how: times of a `SharedBench`, and `heartbeat_s`.
    """
    config = make_config(sections, **search)
    if heartbeat := how.pop("heartbeat_s", None):
        storage.HEARTBEAT_S = heartbeat
        workers.GRACE_S = 2.0 * heartbeat
        workers.BEAT_S = heartbeat / 2
    study = Study(config, run_dir)
    if not how:
        run_trials(study, FakeBench(die_at=die_at, config=config))
        return
    confirmation._network = lambda *_: None
    bench = SharedBench(run_dir, config=config, **how)
    run_trials(study, bench)
    confirmation.confirm(study, bench)
