"""How a search will spend its time, measured on this machine before it starts."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from asesearch.calibration import NUM_IMAGES, num_looks
from asesearch.config import StudyConfig, TrainConfig
from asesearch.finetuning import Depths, Trainer, seconds_per_step
from asesearch.sampler import passes_per_call
from asesearch.search.budget import MARGIN, confirmation_s, confirmed_points
from asesearch.search.costs import elastic_depths
from asesearch.search.promotion import num_explored
from asesearch.search.warmup import needs_map
from asesearch.search.workbench import Workbench
from asesearch.study.records import StudyResults, select

#: Of the full network's cost: what a proposed schedule is expected to take, where the plan has to
#: guess.
TYPICAL_FRAC = 0.65


@dataclass(frozen=True)
class Plan:
    """Seconds, each part in the order it is spent; what is on record takes none.

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
        num_trials: schedules besides the full network that are not on record; with a budget, how
            many it leaves room for if all are fine-tuned.
        search_s: all trials; with a budget, also the exploration phase (`promotion.explore`
            low-fidelity scores).
        confirm_s: confirmation of the front, its timing included.
        total_s: of all this.
        expected_s: what the search is expected to take: schedules at 0.65 of the full network's
            blocks, under the study's samplers in equal parts, and the exploration phase at its
            low-fidelity scores alone; with a budget `total_s`.
        budget_s: what is left of the study's budget of wall time, which the search keeps to, the
            plan being one worker's; None without one.
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
        """What is left of the study in one line, for one worker."""
        if self.total_s == 0:
            return "nothing is left to do: all is on record"
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
    calls = len(bench.samplers[bench.own_sampler])
    return _Rates(
        image_s=calls * bench.costs.full_call_ms / 1000 / bench.batch_size,
        decode_s=_decode_s(bench),
        step_s=_step_s(bench, bench.full, config.train),
        steps=config.train.num_steps,
        images=config.evaluation.num_samples * config.evaluation.repeats,
        low_fidelity_images=0 if rung is None else rung.num_samples * rung.repeats,
    )


@dataclass(frozen=True)
class _Left:
    """What a study has yet to do.

    Attributes:
        warm_up: parts of the warm-up that are on record.
        full: whether the full network is yet to be tried.
        trials: schedules besides it.
        explored: of these, in the exploration phase; with a budget, see `num_explored`.
        points: to be confirmed, at most.
        confirms_full: whether the full network is yet to be confirmed.
    """

    warm_up: frozenset[str]
    full: bool
    trials: int
    explored: int
    points: int
    confirms_full: bool

    @classmethod
    def of(cls, config: StudyConfig, results: StudyResults | None) -> _Left:
        """By what is on record; None for nothing."""
        most = config.confirm.max_points
        trials = config.search.num_trials - 1
        explored = num_explored(config)
        if results is None:
            points = min(most, trials) if config.search.budget_s is None else most
            return cls(frozenset(), True, trials, explored, points, True)
        full = results.full
        tried = sum(r.origin != "full" for r in results.records)
        trials = max(0, trials - tried)
        known = confirmed_points(config, results)
        points = most
        if config.search.budget_s is None and full is not None:
            chosen = {r.number for r in select(results.front(), full, most)[1:]}
            points = min(most, trials + len(chosen)) if trials else len(chosen - known)
        made = frozenset(results.warm_up.get("seconds", {}))
        confirms_full = full is None or full.number not in known
        return cls(made, full is None, trials, max(0, explored - tried), points, confirms_full)


def make_plan(bench: Workbench, results: StudyResults | None = None, worked_s: float = 0.0) -> Plan:
    """Time a few steps and calls, and multiply.

    Args:
        bench: of the study.
        results: what is on record; None for nothing.
        worked_s: of the budget, the time that was at work already.
    """
    config = bench.config
    left = _Left.of(config, results)
    rates = _rates(bench)
    made_s = rates.image_s + rates.decode_s
    calls = len(bench.samplers[bench.own_sampler])
    elastic = config.elastic
    budget_s = config.search.budget_s
    if budget_s is not None:
        budget_s = max(0.0, budget_s - worked_s)
    elastic_s = (
        0.0
        if elastic is None or "elastic" in left.warm_up
        else elastic.num_steps * _step_s(bench, elastic_depths(bench), elastic)
    )
    passes = passes_per_call(config.sampling.cfg_scale)  # the map makes one
    mapped = config.map.num_bins * config.map.num_images * 3
    maps = needs_map(bench) and "map" not in left.warm_up
    map_s = mapped * rates.image_s / (calls * passes) if maps else 0.0
    full_s = bench.trials.tuning(bench.full)[1].num_steps * rates.step_s
    full_s += (rates.images + rates.low_fidelity_images) * made_s
    full_s = full_s if left.full else 0.0
    calibrate_s = 0.0 if "calibrate" in left.warm_up else _calibrate_s(bench, rates)
    begun_s = calibrate_s + elastic_s + map_s + full_s
    share = 1.0 if budget_s is None else TYPICAL_FRAC
    low_fidelity_s = rates.low_fidelity_s(share)
    trial_s = rates.trial_s(share, share)
    trials = left.trials
    confirm_s = _confirm_s(bench, rates, left, share)
    look_s = 0.0
    if budget_s is not None:
        look_s = left.explored * low_fidelity_s
        left_s = budget_s * (1 - MARGIN) - begun_s - look_s - confirm_s
        trials = max(0, int(left_s / trial_s))
    search_s = look_s + trials * trial_s
    total_s = begun_s + search_s + confirm_s
    return Plan(
        train_step_s=rates.step_s,
        image_s=rates.image_s,
        decode_s=rates.decode_s,
        calls_an_image=calls * passes,
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
        expected_s=begun_s + _expected_s(bench, rates, left) if budget_s is None else total_s,
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


def _confirm_s(bench: Workbench, rates: _Rates, left: _Left, frac: float) -> float:
    """Seconds of the confirmation, its points at this fraction of the full network's cost."""
    return confirmation_s(
        bench.config,
        rates.image_s + rates.decode_s,
        [frac] * left.points,
        full=left.confirms_full,
        tuning_s=_tuning_s(bench, rates),
    )


def _expected_s(bench: Workbench, rates: _Rates, left: _Left) -> float:
    """What trials and confirmation are expected to take without a budget, see `Plan`."""
    own, *_ = calls = [len(steps) for steps in bench.samplers.values()]
    pace = TYPICAL_FRAC * fmean(calls) / own
    looks = min(left.trials, left.explored)
    search_s = looks * rates.low_fidelity_s(pace)
    search_s += (left.trials - looks) * rates.trial_s(TYPICAL_FRAC, pace)
    return search_s + _confirm_s(bench, rates, left, pace)


def _tuning_s(bench: Workbench, rates: _Rates) -> tuple[float, float]:
    """Of a point and of the full network; a point takes less, as it drops blocks."""
    _, full = bench.trials.tuning(bench.full)
    return bench.config.train.num_steps * rates.step_s, full.num_steps * rates.step_s
