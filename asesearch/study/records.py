"""What a study knows about each schedule it tried: the rows of every table and figure.

A `TrialRecord` is stored as JSON in its Optuna trial, a `Confirmation` in the study directory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from asesearch.errors import OUT_OF_MEMORY
from asesearch.point import Point
from asesearch.sampler import Sampler
from asesearch.schedule import ExitSchedule
from asesearch.score import (
    EvaluationResult,
    PrecisionRecall,
    TrainedScore,
    trained_again_difference,
)
from asesearch.study.difficulty import DifficultyMap
from asesearch.study.front import non_dominated
from asesearch.study.importance import Importance

#: Word of a relative cost, by `search.cost`.
UNITS = {"time": "time", "flops": "FLOPs"}
#: Beyond these multiples of the full network's time and score a point is worth nothing: reference
#: point of hypervolumes.
REFERENCE_TIME = 1.1
REFERENCE_QUALITY = 2.0
#: What is said of points that `left_out` names.
NOT_CONFIRMED = (
    "on the search's front but not confirmed, with more than "
    f"{REFERENCE_QUALITY:g} times the full network's score: {{}}"
)
RECORD = "record"  # user attribute of an Optuna trial that holds its TrialRecord
EXPLORES = "explores"  # user attribute of a trial: whether it belongs to the exploration phase
EXPLORATION = "the exploration phase"  # reason of a low-fidelity rung that decides nothing else
#: What earlier releases wrote for it.
EXPLORATIONS = (EXPLORATION, "a first look around")
# user attribute of a trial whose schedule is on record (its number), or with another worker
REPEAT = "repeat_of"


@dataclass(frozen=True)
class LowFidelity:
    """The first rung of a trial: the schedule under the elastic weights, before any fine-tuning of
    its own.

    Attributes:
        quality: under the low-fidelity protocol, which is compared with nothing but other
            low-fidelity scores.
        promoted: whether the schedule went on to its brief fine-tuning.
        probability: that it belongs to the front of fine-tuned scores, judged by all scores of
            both kinds so far; None where nothing was judged.
        reason: the decision in words.
    """

    quality: EvaluationResult
    promoted: bool
    probability: float | None
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**vars(self), "quality": self.quality.to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LowFidelity:
        """Inverse of `to_dict`."""
        return cls(**{**data, "quality": EvaluationResult.from_dict(data["quality"])})


@dataclass(frozen=True)
class TrialRecord:
    """One point: fine-tuned, sampled, evaluated.

    Attributes:
        number: trial number in the study, from 0.
        origin: "full" (the full network after equal-compute fine-tuning), a published name
            ("D3-DiT"), or the proposer's name.
        point: what was tried.
        state: "complete", "stopped" (not promoted from the low-fidelity rung) or "failed".
        quality: the score under the search protocol; None if stopped or failed.
        time_frac: predicted sampling time over the full network's under the study's own sampler,
            from the latency table of the worker's device; None if failed.
        flops_frac, block_frac: FLOPs of the whole sampling, and block calls, over the same.
        low_fidelity: the low-fidelity rung; None without promotion.
        losses: mean training loss of each fine-tuning step, or of equal stretches of steps.
        finetune_steps: how many steps those are; None in a record of an earlier release.
        seconds: time spent by part: "low_fidelity", "finetune", "sample", "decode" (of latents),
            "evaluate".
        gflops: arithmetic spent by part, "low_fidelity", "finetune" and "sample": network calls
            times their FLOPs, a training step counting three calls of its samples and one of the
            teacher.
        failure: why it failed, one line.
        versions: versions of the packages that made it.
        finished_at: UTC, ISO 8601.
    """

    number: int
    origin: str
    point: Point
    state: str
    quality: EvaluationResult | None = None
    time_frac: float | None = None
    flops_frac: float | None = None
    block_frac: float | None = None
    low_fidelity: LowFidelity | None = None
    losses: tuple[float, ...] = ()
    finetune_steps: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    gflops: dict[str, float] = field(default_factory=dict)
    failure: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    finished_at: str = ""

    @property
    def schedule(self) -> ExitSchedule:
        """Of the point."""
        return self.point.schedule

    @property
    def sampler(self) -> Sampler:
        """Of the point."""
        return self.point.sampler

    def cost_frac(self, cost: str) -> float | None:
        """Relative cost by a study's second objective; None if failed. Times of several latency
        tables are not compared, as those of a study of FLOPs may be.

        Args:
            cost: "time" or "flops".
        """
        return self.flops_frac if cost == "flops" else self.time_frac

    @property
    def had_no_memory(self) -> bool:
        """Whether it failed as memory ran out, which may have been taken by something else."""
        return self.failure is not None and self.failure.startswith(OUT_OF_MEMORY)

    def described(self) -> dict[str, Any]:
        """Which point it is, as plain data: number, origin, schedule and sampler."""
        return {
            "trial": self.number,
            "origin": self.origin,
            "schedule": str(self.schedule),
            "sampler": str(self.sampler),
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        data = asdict(replace(self, quality=None, low_fidelity=None))
        del data["point"]
        data["schedule"] = self.schedule.to_dict()
        data["sampler"] = str(self.sampler)
        data["quality"] = None if self.quality is None else self.quality.to_dict()
        data["low_fidelity"] = None if self.low_fidelity is None else self.low_fidelity.to_dict()
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any], own: Sampler) -> TrialRecord:
        """Inverse of `to_dict`.

        Args:
            data: what `to_dict` gave, or an earlier release, in which an empty sampler stood for
                the study's own.
            own: the study's own sampler. The full network under it has the origin "full": an
                earlier release gave it the proposer's name where it had been enqueued by hand.
        """
        quality = data["quality"]
        rung = rung_in(data)
        sampler = data.get("sampler", "")
        point = Point(
            ExitSchedule.from_dict(data["schedule"]),
            Sampler.from_string(sampler) if sampler else own,
        )
        is_full = point.schedule.is_full and point.sampler == own
        return cls(
            **{
                **{k: v for k, v in data.items() if k not in ("schedule", "sampler", "cheap")},
                "point": point,
                "origin": "full" if is_full else data["origin"],
                "quality": None if quality is None else EvaluationResult.from_dict(quality),
                "low_fidelity": LowFidelity.from_dict(rung) if rung else None,
                "seconds": _parts(data.get("seconds", {})),
                "gflops": _parts(data.get("gflops", {})),
                "losses": tuple(data["losses"]),
            }
        )


def rung_in(data: dict[str, Any]) -> dict[str, Any] | None:
    """The low-fidelity rung in a record's plain data, by its name in this or earlier releases."""
    rung: dict[str, Any] | None = data.get("low_fidelity", data.get("cheap"))
    return rung


def _parts(spent: dict[str, float]) -> dict[str, float]:
    """What was spent by part, whose first was "cheap" in earlier releases."""
    return {"low_fidelity" if part == "cheap" else part: value for part, value in spent.items()}


@dataclass(frozen=True)
class Confirmation:
    """A front point again: fresh seeds, and the measured whole-sampling time.

    Attributes:
        number: of the trial.
        quality: under the confirmation protocol (fresh seeds, its own N).
        measured_time_frac: median over interleaved pairs of (sampling time / the full network's).
        measured_time_spread: half-IQR of those ratios.
        seconds: that it took in all.
        retrained: the same point fine-tuned under further seeds, one score each, under the protocol
            of `quality`; of a seed under which that failed, why.
        also: the same images in further feature spaces.
        precision_recall: of the same images in the space of `quality`; None in a record of a
            release that did not measure it, or of too few images.
    """

    number: int
    quality: EvaluationResult
    measured_time_frac: float
    measured_time_spread: float
    seconds: float = 0.0
    retrained: tuple[EvaluationResult | str, ...] = ()
    also: tuple[EvaluationResult, ...] = ()
    precision_recall: PrecisionRecall | None = None

    @property
    def trained(self) -> TrainedScore:
        """The score over its training seeds, the search's first."""
        scores = (q for q in (self.quality, *self.retrained) if not isinstance(q, str))
        return TrainedScore(tuple(q.value for q in scores))

    def trained_minus(self, other: Confirmation) -> tuple[float, float | None]:
        """See `trained_again_difference`; over the training seeds under which both have a score."""
        both = zip((self.quality, *self.retrained), (other.quality, *other.retrained), strict=False)
        return trained_again_difference(
            [(a, b) for a, b in both if not (isinstance(a, str) or isinstance(b, str))]
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        several = {
            "retrained": [q if isinstance(q, str) else q.to_dict() for q in self.retrained],
            "also": [q.to_dict() for q in self.also],
        }
        return {**asdict(self), "quality": self.quality.to_dict(), **several}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Confirmation:
        """Inverse of `to_dict`; of a release without training seeds, further spaces or precision
        and recall too."""
        several = {
            name: tuple(
                q if isinstance(q, str) else EvaluationResult.from_dict(q)
                for q in data.get(name, ())
            )
            for name in ("retrained", "also")
        }
        quality = EvaluationResult.from_dict(data["quality"])
        found = data.get("precision_recall")
        both = None if found is None else PrecisionRecall.from_dict(found)
        return cls(**{**data, "quality": quality, **several, "precision_recall": both})


@dataclass(frozen=True, eq=False)
class StudyResults:
    """All that a report or an export reads.

    Attributes:
        name: of the study.
        config: the resolved study file as plain data.
        records: trials that ended, by number.
        confirmations: of front points and of the full network, by trial number.
        latency_ms: median latency of one network call of the cost batch at exit depths 1…depth
            (index 0 = depth 1).
        environment: machine, versions, device, threads.
        samples: trial number -> (N, C, H, W) uint8 images for the same seeds and labels in every
            trial.
        difficulty_map: of the weights that trials started from; None where the search used none.
        warm_up: "seconds" and "gflops" of "elastic" and "map", and the "losses" of the elastic
            warm-up; "seconds" of "calibrate", the samplers' accelerations. Empty without any.
        importance: of each interval; None where the search had no difficulty map, or is of a
            release that did not keep it.
        unconfirmable: why a trial can't be confirmed, by its number.
        most_at_once: the most workers that were at it at one time; 0 where it is not on record.
    """

    name: str
    config: dict[str, Any]
    records: tuple[TrialRecord, ...]
    confirmations: tuple[Confirmation, ...]
    latency_ms: tuple[float, ...]
    environment: dict[str, Any]
    samples: Mapping[int, np.ndarray] = field(default_factory=dict)
    difficulty_map: DifficultyMap | None = None
    warm_up: dict[str, Any] = field(default_factory=dict)
    importance: Importance | None = None
    unconfirmable: Mapping[int, str] = field(default_factory=dict)
    most_at_once: int = 0

    @property
    def complete(self) -> tuple[TrialRecord, ...]:
        """Trials with a score."""
        return tuple(r for r in self.records if r.state == "complete")

    @property
    def full(self) -> TrialRecord | None:
        """The full network after equal-compute fine-tuning; None before it is done."""
        return next((r for r in self.complete if r.origin == "full"), None)

    @property
    def own_sampler(self) -> Sampler:
        """The study's own, over whose time all times are counted."""
        how = self.config["sampling"]
        return Sampler(how["solver"], how["num_steps"])

    @property
    def cost(self) -> str:
        """The second objective: "time" or "flops"."""
        return str(self.config.get("search", {}).get("cost", "time"))

    def cost_frac(self, record: TrialRecord) -> float | None:
        """Of a trial by the second objective, see `TrialRecord.cost_frac`."""
        return record.cost_frac(self.cost)

    @property
    def two_weights(self) -> bool:
        """Whether early exits have weights of their own beside the pretrained ones."""
        return bool(self.config.get("search", {}).get("full_depth") == "pretrained")

    @property
    def unconfirmed(self) -> tuple[TrialRecord, ...]:
        """Points that a confirmation begun is still to measure, as the front stands; empty before
        it begins, and once it is whole."""
        most = self.config.get("confirm", {}).get("max_points")
        if not self.confirmations or self.full is None or most is None:
            return ()
        done = {c.number for c in self.confirmations}
        front = tuple(r for r in self.front() if r.number not in self.unconfirmable)
        return tuple(r for r in select(front, self.full, most) if r.number not in done)

    @property
    def stands_confirmed(self) -> bool:
        """Whether the front is that of the confirmed scores: not while only the full network has
        one of those that there are to be."""
        schedules = [c for c in self.confirmations if not self.full or c.number != self.full.number]
        return bool(schedules) or (bool(self.confirmations) and not self.unconfirmed)

    def has_weights(self, record: TrialRecord) -> bool:
        """Whether the study keeps the weights of a complete trial."""
        return record.point.weights_key in self._kept_weights

    @cached_property
    def _kept_weights(self) -> frozenset[ExitSchedule]:
        """Keys of the weights that the study keeps: all, or those of the search's front and of the
        full network."""
        kept = self.complete
        if self.config.get("search", {}).get("keep_weights") == "front":
            kept = (*self.front(), *((self.full,) if self.full else ()))
        return frozenset(r.point.weights_key for r in kept)

    def front(self) -> tuple[TrialRecord, ...]:
        """Non-dominated trials under the search protocol by the study's second objective, the
        cheapest first."""
        scored = [
            (r, (cost, r.quality.value))
            for r in self.complete
            if (cost := self.cost_frac(r)) is not None and r.quality is not None
        ]
        keep = non_dominated([point for _, point in scored])
        return tuple(sorted((scored[i][0] for i in keep), key=lambda r: self.cost_frac(r) or 0.0))


def num_ended(trials: Sequence[FrozenTrial]) -> int:
    """How many trials have ended with something to know: a point on record, or that it is a repeat.
    Seeds of proposals follow from it, so that those of a study depend on its record alone."""
    return sum(
        t.state == TrialState.COMPLETE or RECORD in t.user_attrs or REPEAT in t.user_attrs
        for t in trials
    )


def spent_s(results: StudyResults) -> float:
    """Seconds of work on record: warm-up, trials and confirmations, the sum over all workers."""
    trials = sum(sum(r.seconds.values()) for r in results.records)
    return (
        float(sum(results.warm_up.get("seconds", {}).values()))
        + trials
        + sum(c.seconds for c in results.confirmations)
    )


CURVE_POINTS = 500


def shortened(losses: Sequence[float]) -> list[float]:
    """A loss curve as at most CURVE_POINTS means of equal stretches."""
    if len(losses) <= CURVE_POINTS:
        return list(losses)
    return [float(part.mean()) for part in np.array_split(np.asarray(losses), CURVE_POINTS)]


def left_out(front: tuple[TrialRecord, ...], full: TrialRecord) -> list[TrialRecord]:
    """Front points that are not confirmed, as they are worth nothing: those with more than
    REFERENCE_QUALITY times the full network's score, unless there are no others.

    Of a metric that may be 0 or less by chance (KID) no multiple means anything, and none is left
    out.
    """
    points = [r for r in front if r.number != full.number]
    if full.quality is not None and full.quality.protocol.metric == "kid":
        return []
    far = [
        r
        for r in points
        if not r.quality
        or not full.quality
        or r.quality.value > REFERENCE_QUALITY * abs(full.quality.value)
    ]
    return far if len(far) < len(points) else []


def select(front: tuple[TrialRecord, ...], full: TrialRecord, max_points: int) -> list[TrialRecord]:
    """The full network and at most `max_points` front points, spread evenly over the front, both
    ends included.

    Those of `left_out` are not among them.
    """
    out = left_out(front, full)
    points = [r for r in front if r.number != full.number and r not in out]
    if len(points) > max_points:
        last = len(points) - 1
        keep = sorted({round(i * last / max(1, max_points - 1)) for i in range(max_points)})
        points = [points[i] for i in keep]
    return [full, *points]
