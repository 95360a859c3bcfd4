"""How a search will spend its time, measured on this machine before it starts."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from asesearch.calibration import NUM_IMAGES, num_looks
from asesearch.config import TrainConfig
from asesearch.finetuning import Depths, Trainer, seconds_per_step
from asesearch.search.budget import MARGIN, confirmation_s
from asesearch.search.promotion import num_explored
from asesearch.search.warmup import elastic_depths, needs_map
from asesearch.search.workbench import Workbench

#: Of the full network's cost: what a proposed schedule is expected to take, where the plan has to
#: guess.
TYPICAL_FRAC = 0.65


@dataclass(frozen=True)
class Plan:
    """Seconds, each part in the order it is spent.

    Without a budget these are upper bounds: every schedule is counted at the cost of the full
    network, and as promoted. With
    one they are expectations: schedules at 0.65 of it.

    Attributes:
        train_step_s: one fine-tuning step at full depth.
        image_s: sampling one image at full depth with the study's own sampler.
        decode_s: turning one latent into an image; 0 where the network makes images.
        calls_an_image: network calls.
        calibrate_s: calibrating the accelerations of samplers; 0 where none needs it.
        elastic_s, map_s: the warm-up; 0 where the study has none.
        full_s: tuning and evaluating the full network, which all others are compared with.
        low_fidelity_s: the low-fidelity rung of one trial; 0 without promotion.
        trial_s: one trial that is fine-tuned, its low-fidelity rung included.
        num_trials: schedules besides the full network; with a budget, how many it leaves room for
            if all are fine-tuned.
        search_s: all trials; with a budget, also the exploration phase (`promotion.explore`
            low-fidelity scores).
        confirm_s: confirmation of the front, its timing included.
        total_s: of all this.
        expected_s: what the search is expected to take: schedules at 0.65 of the full network's
            blocks, under the study's samplers in equal parts, and the exploration phase at its
            low-fidelity scores alone; with a budget `total_s`.
        budget_s: the study's budget of wall time, which the search keeps to, the plan being one
            worker's; None without one.
    """

    train_step_s: float
    image_s: float
    decode_s: float
    calls_an_image: int
    calibrate_s: float
    elastic_s: float
    map_s: float
    full_s: float
    low_fidelity_s: float
    trial_s: float
    num_trials: int
    search_s: float
    confirm_s: float
    total_s: float
    expected_s: float
    budget_s: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, seconds rounded to milliseconds."""
        return {k: round(v, 3) if isinstance(v, float) else v for k, v in vars(self).items()}

    def line(self) -> str:
        """The whole study in one line, for one worker; what is on record is counted as if it were
        to be done."""
        trials = f"{self.num_trials} {'trial' if self.num_trials == 1 else 'trials'}"
        warm_up_s = self.calibrate_s + self.elastic_s + self.map_s
        parts = f"warm-up {_in_words(warm_up_s)}, " if warm_up_s else ""
        parts += f"full network {_in_words(self.full_s)}, {trials} {_in_words(self.search_s)}"
        parts += f", confirmation {_in_words(self.confirm_s)}"
        if self.budget_s is None:
            return (
                f"about {_in_words(self.expected_s)}, at most {_in_words(self.total_s)}: {parts} "
                "(every schedule counted at the full network's cost)"
            )
        if self.num_trials == 0:
            budget = _in_words(self.budget_s)
            return (
                f"the budget of {budget} leaves no room for trials beside the full network: "
                f"{parts} (expected)"
            )
        return (
            f"about {_in_words(self.budget_s)}, the budget: {parts} (expected, if all are "
            "fine-tuned)"
        )


def _in_words(seconds: float) -> str:
    """A time in the unit that suits it, two digits."""
    units = (
        (90.0, "s", 1),
        (90 * 60.0, "min", 60),
        (48 * 3600.0, "h", 3600),
        (float("inf"), "days", 86400),
    )
    unit, size = next((unit, size) for limit, unit, size in units if seconds < limit)
    value = seconds / size
    return f"{value:.1f} {unit}" if value < 9.95 else f"{value:.0f} {unit}"


def _decode_s(bench: Workbench) -> float:
    """Seconds to decode one latent, in a batch of the study's after one to warm up."""
    if bench.decoder is None:
        return 0.0
    latents = torch.zeros(bench.batch_size, *bench.data.shape)
    bench.decoder.decode(latents)
    start = time.perf_counter()
    bench.decoder.decode(latents)
    return (time.perf_counter() - start) / bench.batch_size


@dataclass(frozen=True)
class _Rates:
    """What one of each takes on this machine with the full network, in seconds, and how many there
    are in a trial."""

    step_s: float
    image_s: float
    decode_s: float
    steps: int
    images: int
    low_fidelity_images: int

    def low_fidelity_s(self, calls_frac: float) -> float:
        """The low-fidelity rung of a point whose sampling costs `calls_frac` of the full one."""
        return self.low_fidelity_images * (calls_frac * self.image_s + self.decode_s)

    def trial_s(self, blocks_frac: float, calls_frac: float) -> float:
        """A trial that is fine-tuned, at `blocks_frac` of the blocks."""
        tuned_s = self.steps * blocks_frac * self.step_s
        scored_s = self.images * (calls_frac * self.image_s + self.decode_s)
        return tuned_s + scored_s + self.low_fidelity_s(calls_frac)


def _step_s(bench: Workbench, depths: Depths, settings: TrainConfig) -> float:
    """Seconds of one training step."""
    trainer = Trainer(bench.backbone, bench.data, bench.diffusion, depths, settings)
    return seconds_per_step(trainer)


def _rates(bench: Workbench) -> _Rates:
    """Time a few steps and calls."""
    config = bench.config
    rung = config.promotion
    calls = len(next(iter(bench.samplers.values())))
    return _Rates(
        image_s=calls * bench.costs.full_call_ms / 1000 / bench.batch_size,
        decode_s=_decode_s(bench),
        step_s=_step_s(bench, bench.full, config.train),
        steps=config.train.num_steps,
        images=config.evaluation.num_samples * config.evaluation.repeats,
        low_fidelity_images=0 if rung is None else rung.num_samples * rung.repeats,
    )


def make_plan(bench: Workbench) -> Plan:
    """Time a few steps and calls, and multiply."""
    config = bench.config
    rates = _rates(bench)
    made_s = rates.image_s + rates.decode_s
    calls = len(next(iter(bench.samplers.values())))
    elastic = config.elastic
    budget_s = config.search.budget_s
    elastic_s = (
        0.0
        if elastic is None
        else elastic.num_steps * _step_s(bench, elastic_depths(bench), elastic)
    )
    passes = 2 if config.sampling.cfg_scale != 1 else 1  # of a sampler's call; the map makes one
    mapped = config.map.num_bins * config.map.num_images * 3
    map_s = mapped * rates.image_s / (calls * passes) if needs_map(bench) else 0.0
    full_s = bench.trials.tuning(bench.full)[1].num_steps * rates.step_s
    full_s += (rates.images + rates.low_fidelity_images) * made_s
    calibrate_s = _calibrate_s(bench, rates)
    begun_s = calibrate_s + elastic_s + map_s + full_s
    share = 1.0 if budget_s is None else TYPICAL_FRAC
    low_fidelity_s = rates.low_fidelity_s(share)
    trial_s = rates.trial_s(share, share)
    trials = config.search.num_trials - 1
    points = config.confirm.max_points
    if budget_s is None:
        points = min(points, trials)
    confirm_s = confirmation_s(config, made_s, [share] * points, tuning_s=_tuning_s(bench, rates))
    look_s = 0.0
    if budget_s is not None:
        look_s = num_explored(config) * low_fidelity_s
        left_s = budget_s * (1 - MARGIN) - begun_s - look_s - confirm_s
        trials = max(0, int(left_s / trial_s))
    search_s = look_s + trials * trial_s
    total_s = begun_s + search_s + confirm_s
    return Plan(
        train_step_s=rates.step_s,
        image_s=rates.image_s,
        decode_s=rates.decode_s,
        calls_an_image=calls * (2 if config.sampling.cfg_scale != 1 else 1),
        calibrate_s=calibrate_s,
        elastic_s=elastic_s,
        map_s=map_s,
        full_s=full_s,
        low_fidelity_s=low_fidelity_s,
        trial_s=trial_s,
        num_trials=trials,
        search_s=search_s,
        confirm_s=confirm_s,
        total_s=total_s,
        expected_s=begun_s + _expected_s(bench, rates, trials, points)
        if budget_s is None
        else total_s,
        budget_s=budget_s,
    )


def _calibrate_s(bench: Workbench, rates: _Rates) -> float:
    """Samplings of the full network under each sampler, as many as its calibration takes."""
    own, *_ = map(len, bench.samplers.values())
    looks = (
        num_looks(sampler.acceleration) * len(calls) / own
        for sampler, calls in bench.samplers.items()
        if sampler.acceleration
    )
    return sum(looks) * NUM_IMAGES * rates.image_s


def _expected_s(bench: Workbench, rates: _Rates, trials: int, points: int) -> float:
    """What trials and confirmation are expected to take without a budget, see `Plan`."""
    own, *_ = calls = [len(steps) for steps in bench.samplers.values()]
    pace = TYPICAL_FRAC * fmean(calls) / own
    looks = min(trials, num_explored(bench.config))
    search_s = looks * rates.low_fidelity_s(pace)
    search_s += (trials - looks) * rates.trial_s(TYPICAL_FRAC, pace)
    made_s = rates.image_s + rates.decode_s
    return search_s + confirmation_s(
        bench.config, made_s, [pace] * points, tuning_s=_tuning_s(bench, rates)
    )


def _tuning_s(bench: Workbench, rates: _Rates) -> tuple[float, float]:
    """Of a point and of the full network; a point takes less, as it drops blocks."""
    _, full = bench.trials.tuning(bench.full)
    return bench.config.train.num_steps * rates.step_s, full.num_steps * rates.step_s
