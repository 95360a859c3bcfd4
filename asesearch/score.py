"""Scores that know how they were measured. No torch in here.

Results whose protocol differs are never compared or put on one front.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from scipy.special import stdtrit

from asesearch.errors import EvaluationError

CONFIDENCE = 0.95  # of every interval, and so of every verdict


PCA = "frechet-pca"  # of `Protocol.metric`


@dataclass(frozen=True)
class Protocol:
    """Everything a score depends on besides the network and its schedule.

    Attributes:
        metric: "frechet", "kid", or "frechet-pca-K": the Fréchet distance in the reference's first
            K principal components.
        extractor: name of the feature extractor.
        extractor_digest: SHA-256 of its weights.
        num_samples: images generated a repeat.
        reference: name of the reference data.
        reference_size: its number of images.
        reference_digest: SHA-256 of its content.
        seeds: first image seed of each repeat; repeat r uses seeds[r] … seeds[r] + num_samples - 1.
        solver, num_steps, cfg_scale, precision: how the images were made. Solver and steps are None
            where they compete on
            one front: there they are part of what is measured, beside the schedule.
        guided_channels: guidance acted on the first so many channels of the network's output: three
            of four in the official DiT code, all in diffusers' pipelines. None without guidance
            (cfg_scale 1). Under guidance None means that it is not on record, in a study of a
            release that did not keep it; such a score is comparable with those of its own study,
            where the network fixes the channels, and not with any that tells them.
    """

    metric: str
    extractor: str
    extractor_digest: str
    num_samples: int
    reference: str
    reference_size: int
    reference_digest: str
    seeds: tuple[int, ...]
    solver: str | None
    num_steps: int | None
    cfg_scale: float
    precision: str = "float32"
    guided_channels: int | None = None

    @property
    def num_components(self) -> int | None:
        """K of "frechet-pca-K"; None for other metrics."""
        name, _, count = self.metric.rpartition("-")
        return int(count) if name == PCA else None

    @property
    def metric_name(self) -> str:
        """What to print: "FID" for Inception-v3 features, else the extractor's name stands with the
        metric's."""
        inception = self.extractor == "inception-v3-compat"
        if self.metric == "kid":
            return "KID" if inception else f"Kernel distance ({self.extractor})"
        if self.num_components is not None:
            return (
                f"Fréchet distance in {self.num_components} principal components ({self.extractor})"
            )
        return "FID" if inception else f"Fréchet distance ({self.extractor})"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; without guided channels where there are none, as earlier releases
        wrote it."""
        data = {**asdict(self), "seeds": list(self.seeds)}
        return {k: v for k, v in data.items() if k != "guided_channels" or v is not None}

    def require_same(self, other: Protocol) -> None:
        """Refuse to compare scores of two protocols.

        Raises:
            EvaluationError: naming the fields that differ.
        """
        differ = [
            f"{f.name}: {getattr(self, f.name)!r} and {getattr(other, f.name)!r}"
            for f in fields(self)
            if getattr(self, f.name) != getattr(other, f.name)
        ]
        if differ:
            raise EvaluationError(
                "scores are compared only under one protocol; these differ in "
                f"{'; '.join(differ)}; evaluate both alike"
            )

    def require_same_images(self, other: Protocol) -> None:
        """Refuse protocols that are scored on different images.

        Raises:
            EvaluationError: other seeds or another number of images.
        """
        ours = self.num_samples, self.seeds
        theirs = other.num_samples, other.seeds
        if ours != theirs:
            raise EvaluationError(
                "feature spaces are scored on the same images; got "
                f"(num_samples, seeds) {ours} and {theirs}; build both protocols alike"
            )


@dataclass(frozen=True)
class EvaluationResult:
    """A score with its spread and its protocol.

    Attributes:
        protocol: how it was measured.
        values: one score a repeat (`protocol.seeds`), lower is better.
    """

    protocol: Protocol
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.values) != len(self.protocol.seeds) or not all(
            math.isfinite(v) for v in self.values
        ):
            raise EvaluationError(
                f"one finite value per repeat is needed; got {self.values} for "
                f"{len(self.protocol.seeds)} repeats; the network gave images that are not finite, "
                "or too few"
            )

    @property
    def value(self) -> float:
        """Mean over the repeats."""
        return sum(self.values) / len(self.values)

    @property
    def std_error(self) -> float | None:
        """Standard error of `value`; None from one repeat."""
        return None if len(self.values) < 2 else _std_error(self.values)

    def minus(self, other: EvaluationResult) -> tuple[float, float | None]:
        """Difference of the means and its standard error (None from one repeat).

        Repeat r of both used the same image seeds, so the error is that of the differences repeat
        by repeat.

        Raises:
            EvaluationError: the protocols differ.
        """
        self.protocol.require_same(other.protocol)
        pairs = zip(self.values, other.values, strict=True)
        difference = self.value - other.value
        if len(self.values) < 2:
            return difference, None
        return difference, _std_error(tuple(a - b for a, b in pairs))

    def margin(self, other: EvaluationResult) -> float | None:
        """Half the width of the confidence interval of `minus` (None from one repeat).

        The interval is Student's for the differences repeat by repeat: at three repeats it reaches
        4.3 standard errors, at two 12.7. Where it leaves out 0, the two differ at the level
        `CONFIDENCE`.

        Raises:
            EvaluationError: the protocols differ.
        """
        _, std_error = self.minus(other)
        if std_error is None:
            return None
        return student_factor(len(self.values)) * std_error

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"protocol": self.protocol.to_dict(), "values": list(self.values)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> EvaluationResult:
        """Inverse of `to_dict`."""
        protocol = {**data["protocol"], "seeds": tuple(data["protocol"]["seeds"])}
        return cls(Protocol(**protocol), tuple(data["values"]))


@dataclass(frozen=True)
class PrecisionRecall:
    """How good and how varied a generator's images are, beside a score that mixes both.

    Attributes:
        precision: share of its images that could be of the reference, one value a repeat.
        recall: share of the reference that could be of its images, one value a repeat.
    """

    precision: tuple[float, ...]
    recall: tuple[float, ...]

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PrecisionRecall:
        """Inverse of `dataclasses.asdict`."""
        return cls(tuple(data["precision"]), tuple(data["recall"]))


@dataclass(frozen=True)
class TrainedScore:
    """Scores of one point under several training seeds, on the same images.

    Attributes:
        values: one score per training seed, lower is better.
    """

    values: tuple[float, ...]

    @property
    def value(self) -> float:
        """Mean over the training seeds."""
        return sum(self.values) / len(self.values)

    @property
    def std_error(self) -> float | None:
        """Standard error of `value`; None from one training seed."""
        return None if len(self.values) < 2 else _std_error(self.values)

    def minus(self, other: TrainedScore) -> tuple[float, float | None]:
        """Difference of the means over the seeds that both have, and half the width of its
        confidence interval (None from one seed): Student's for the differences seed by seed, as
        both networks see the same batches under a seed.

        Source: "The FID Lottery" (2026): training again moves FID more than sampling again does.
        """
        differences = tuple(a - b for a, b in zip(self.values, other.values, strict=False))
        mean = sum(differences) / len(differences)
        if len(differences) < 2:
            return mean, None
        return mean, student_factor(len(differences)) * _std_error(differences)


def trained_again_difference(
    pairs: Sequence[tuple[EvaluationResult, EvaluationResult]],
) -> tuple[float, float | None]:
    """How much higher the first scores are, were both points trained again and sampled again.

    Args:
        pairs: scores of two points under the same training seed and protocol; at least one pair.

    Returns:
        The mean difference, and half the width of its confidence interval: the root of the squared
        widths of Student's intervals over training seeds and over repeats, so that scores of the
        same few images under several seeds do not pass for sure (None from one seed or one repeat).

    Raises:
        EvaluationError: the protocols differ.
    """
    for ours, theirs in pairs:
        ours.protocol.require_same(theirs.protocol)
    table = [
        [a - b for a, b in zip(ours.values, theirs.values, strict=True)] for ours, theirs in pairs
    ]
    by_seed = tuple(sum(row) / len(row) for row in table)
    by_repeat = tuple(sum(column) / len(column) for column in zip(*table, strict=True))
    mean = sum(by_seed) / len(by_seed)
    if min(len(by_seed), len(by_repeat)) < 2:
        return mean, None
    margins = (student_factor(len(v)) * _std_error(v) for v in (by_seed, by_repeat))
    return mean, math.hypot(*margins)


def _std_error(values: tuple[float, ...]) -> float:
    n = len(values)
    mean = sum(values) / n
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)


def student_factor(repeats: int) -> float:
    """Standard errors of a mean of `repeats` values from the middle of its confidence interval to
    an end."""
    return float(stdtrit(repeats - 1, (1 + CONFIDENCE) / 2))
