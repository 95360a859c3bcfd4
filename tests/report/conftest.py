"""Synthetic studies for the report: the figures follow a law with noise, nothing is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import pytest

from asesearch.config import parse_study
from asesearch.point import Point
from asesearch.sampler import Sampler
from asesearch.schedule import PUBLISHED, ExitSchedule
from asesearch.score import EvaluationResult, Protocol
from asesearch.study.records import Confirmation, StudyResults, TrialRecord

DEPTH = 28
OWN = Sampler("ddim", 50)
OVERHEAD = 0.12  # share of a full call that no exit can skip
Builder = Callable[..., StudyResults]


def protocol(repeats: int = 3, first_seed: int = 0, **changes: object) -> Protocol:
    seeds = tuple(first_seed + 1000 * r for r in range(repeats))
    digests = {"extractor_digest": "ab" * 32, "reference_digest": "cd" * 32}
    reference = {"reference": "fashion-mnist/train", "reference_size": 60000}
    made = {"solver": "ddim", "num_steps": 50, "cfg_scale": 1.5}
    metric = {
        "metric": "frechet",
        "extractor": "inception-v3-compat",
        "num_samples": 1000,
        "seeds": seeds,
    }
    return Protocol(**(metric | digests | reference | made | changes))  # type: ignore[arg-type]


def law(schedule: ExitSchedule) -> float:
    """A smooth stand-in for the score: dropping blocks near noise is nearly free, near data
    high."""
    times = np.linspace(0, 999, 50)
    dropped = 1 - schedule.exit_depth_at(times) / schedule.depth
    weight = 0.15 + np.exp(-times / 180)
    return 9.0 + 22.0 * float((weight * dropped**2).mean()) - 0.8 * float(dropped.mean())


def build(
    num_trials: int = 24,
    *,
    repeats: int = 3,
    confirm: bool = True,
    failed: tuple[int, ...] = (7,),
    samples: np.ndarray | None = None,
    failure: str = "the loss stopped being finite at step 41",
    seed: int = 0,
    **changes: object,
) -> StudyResults:
    """A study of `num_trials`: the full network, two published schedules, then random noise-easy
    ones."""
    rng = np.random.default_rng(seed)
    search = protocol(repeats, **changes)
    records: list[TrialRecord] = []
    for n in range(num_trials):
        origin = {0: "full", 1: "D3-DiT", 2: "D4-DiT"}.get(n, "tpe")
        if n == 0:
            schedule = ExitSchedule.full(DEPTH)
        elif origin in PUBLISHED:
            schedule = ExitSchedule.published(origin)
        else:
            high, low = sorted(rng.integers(4, DEPTH + 1, 2))[::-1]
            inner = np.sort(rng.uniform(0, 1, 8))[::-1]
            depths = [int(high), *(int(low + (high - low) * u + 0.5) for u in inner), int(low)]
            schedule = ExitSchedule.uniform_intervals(depths, DEPTH)
        ended = f"2026-01-02T03:{n:02d}:00+00:00"
        if n in failed:
            records.append(
                TrialRecord(
                    n, origin, Point(schedule, OWN), "failed", failure=failure, finished_at=ended
                )
            )
            continue
        blocks = schedule.block_frac()
        curve = (
            0.05
            + 0.3 * (1.1 - blocks) * np.exp(-np.arange(200) / 40)
            + 0.004 * rng.standard_normal(200)
        )
        values = tuple(float(law(schedule) + 0.08 * z) for z in rng.standard_normal(repeats))
        records.append(
            TrialRecord(
                n,
                origin,
                Point(schedule, OWN),
                "complete",
                quality=EvaluationResult(search, values),
                time_frac=OVERHEAD + (1 - OVERHEAD) * blocks,
                flops_frac=0.01 + 0.99 * blocks,
                block_frac=blocks,
                losses=tuple(map(float, curve)),
                seconds={"finetune": 61.5 * blocks, "sample": 20.2 * blocks, "evaluate": 4.25},
                versions={"torch": "2.14.0"},
                finished_at=ended,
            )
        )
    latency = tuple(
        float(1.1 + 0.29 * d + 0.05 * rng.standard_normal()) for d in range(1, DEPTH + 1)
    )
    study_file = {"name": "demo", "backbone": {"kind": "dit"}, "data": {"kind": "fashion-mnist"}}
    config = parse_study(study_file, "test").model_dump(mode="json")
    environment = {
        "versions": {"python": "3.11.2", "torch": "2.14.0"},
        "platform": "Linux",
        "cpu_count": 2,
        "gpu": None,
    }
    results = StudyResults("demo", config, tuple(records), (), latency, environment)
    if confirm and results.full:
        results = replace(
            results, confirmations=tuple(_confirmations(results, repeats, rng, **changes))
        )
    if samples is not None:
        results = replace(results, samples={r.number: samples for r in results.complete})
    return results


def _confirmations(
    results: StudyResults, repeats: int, rng: np.random.Generator, **changes: object
) -> list[Confirmation]:
    fresh = protocol(max(repeats, 1), first_seed=1_000_000, **changes)
    assert results.full is not None
    out = []
    for r in [results.full, *(r for r in results.front() if r.origin != "full")]:
        values = tuple(
            float(law(r.schedule) + 0.05 * z) for z in rng.standard_normal(max(repeats, 1))
        )
        assert r.time_frac is not None
        noise = (0.0, 0.0) if r.schedule.is_full else (float(0.008 * rng.standard_normal()), 0.006)
        out.append(
            Confirmation(
                r.number, EvaluationResult(fresh, values), r.time_frac + noise[0], noise[1]
            )
        )
    return out


def no_more(results: StudyResults, confirmations: Iterable[Confirmation]) -> StudyResults:
    """The study with these confirmations, and no others to be made."""
    config = {k: v for k, v in results.config.items() if k != "confirm"}
    return replace(results, config=config, confirmations=tuple(confirmations))


def by_flops(results: StudyResults) -> StudyResults:
    """The study with FLOPs as second objective, its times of two latency tables in turn."""
    config = {**results.config, "search": {**results.config["search"], "cost": "flops"}}
    records = tuple(
        replace(r, time_frac=r.time_frac * (1 if r.number % 2 else 0.3)) if r.time_frac else r
        for r in results.records
    )
    return replace(results, config=config, records=records)


@pytest.fixture(scope="session")
def study() -> Builder:
    """`build`: makes a synthetic study."""
    return build
