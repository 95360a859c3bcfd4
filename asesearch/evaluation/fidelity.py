"""The score of a generator under a protocol: what it is fixed by, what can't give one, and giving
it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from torch import Tensor

from asesearch.backbones.device import check_memory
from asesearch.config import EvaluationConfig, PromotionConfig, SamplingConfig, StudyConfig
from asesearch.errors import EvaluationError
from asesearch.evaluation.distances import frechet_distance, kernel_distance, projected_distance
from asesearch.evaluation.extractors import Extractor
from asesearch.evaluation.features import Floats, extract_features
from asesearch.evaluation.references import ReferenceStats
from asesearch.sampler import SEEDS_END
from asesearch.score import PCA, EvaluationResult, Protocol

#: Images for each principal component of "frechet-pca".
COMPONENTS_SHARE = 4


def build_protocol(
    config: EvaluationConfig,
    sampling: SamplingConfig,
    extractor: Extractor,
    reference: ReferenceStats,
    seeds: Sequence[int] | None = None,
    metric: str | None = None,
    guided_channels: int | None = None,
) -> Protocol:
    """Fix everything a score depends on, and refuse what can't give one, before anything is
    sampled.

    Args:
        seeds: first image seed of each repeat; by default config.seed, config.seed + num_samples, …
        metric: in place of the evaluation's own: "frechet", "kid" or "frechet-pca".
        guided_channels: the network's (`Backbone.guided_channels`); kept where there is guidance.

    Raises:
        EvaluationError: too few images for the metric, repeats that share seeds, seeds that no
            image can have, or a reference of another extractor.
    """
    count = config.num_samples
    metric = metric or config.metric
    if (reference.extractor, reference.extractor_digest) != (extractor.name, extractor.digest):
        raise EvaluationError(
            f"the reference holds features of {reference.extractor} "
            f"({reference.extractor_digest[:8]}…); got the extractor {extractor.name} "
            f"({extractor.digest[:8]}…); make the reference with the same extractor"
        )
    for what, n in (("num_samples", count), ("the number of reference images", reference.size)):
        if metric == "frechet" and n <= extractor.dim:
            raise EvaluationError(
                f"{what} must exceed the extractor's {extractor.dim} features for the Fréchet "
                f"distance (their covariance is singular otherwise); got {n}; generate at least "
                f"{extractor.dim + 1}, or use metric = 'kid'"
            )
    check_memory(count, 4 * extractor.dim, "features of num_samples images", "lower num_samples")
    starts = (
        tuple(config.seed + r * count for r in range(config.repeats))
        if seeds is None
        else tuple(map(int, seeds))
    )
    if not starts or any(b - a < count for a, b in pairwise(sorted(starts))):
        raise EvaluationError(
            f"repeats of {count} images must not share seeds; got first seeds {starts}; put them "
            f"at least {count} apart"
        )
    if min(starts) < 0 or max(starts) + count > SEEDS_END:
        raise EvaluationError(
            f"image seeds must lie in 0…{SEEDS_END - 1}; got repeats of {count} images from the "
            f"seeds {starts} on; let the last begin at {SEEDS_END - count} at most"
        )
    return Protocol(
        metric=f"{PCA}-{num_components(count, extractor.dim)}" if metric == PCA else metric,
        extractor=extractor.name,
        extractor_digest=extractor.digest,
        num_samples=count,
        reference=reference.name,
        reference_size=reference.size,
        reference_digest=reference.digest,
        seeds=starts,
        solver=sampling.solver,
        num_steps=sampling.num_steps,
        cfg_scale=sampling.cfg_scale,
        precision=sampling.precision,
        guided_channels=None if sampling.cfg_scale == 1 else guided_channels,
    )


def check_sample_counts(config: StudyConfig, dim: int, also: str | None = None) -> None:
    """Refuse a study whose scores can't exist, all of them at once, from the numbers alone.

    Args:
        dim: features of the study's extractor.
        also: name of an extractor of `confirm.also`, whose features they are instead.

    Raises:
        EvaluationError: too few images for the Fréchet distance.
    """
    counts = {
        "evaluation.num_samples": config.evaluation.num_samples,
        "confirm.num_samples": config.confirm.num_samples,
    }
    if config.evaluation.metric != "frechet":
        counts = {}
    if config.promotion is not None and config.promotion.metric == "frechet":
        counts["promotion.num_samples"] = config.promotion.num_samples
    if also is not None:
        counts = {name: count for name, count in counts.items() if name == "confirm.num_samples"}
    few = {name: count for name, count in counts.items() if count <= dim}
    if few:
        fixes = {"promotion.num_samples": "promotion.metric = 'auto'"}
        others = dict.fromkeys(fixes.get(name, "evaluation.metric = 'kid'") for name in few)
        extractor = also or config.evaluation.extractor
        raise EvaluationError(
            f"{' and '.join(few)} must exceed the {dim} features of {extractor} for the Fréchet "
            "distance (their covariance is singular otherwise); got "
            f"{' and '.join(map(str, few.values()))}; set at least {dim + 1}, or "
            f"{' and '.join(others)}"
        )


def num_components(num_samples: int, dim: int) -> int:
    """Principal components for "frechet-pca": a quarter as many as images, so that their covariance
    is well known."""
    return max(1, min(num_samples // COMPONENTS_SHARE, dim))


def low_fidelity_metric(promotion: PromotionConfig, evaluation: EvaluationConfig, dim: int) -> str:
    """Metric of low-fidelity evaluations for `dim` features; see `PromotionConfig`."""
    if promotion.metric != "auto":
        return promotion.metric
    enough = evaluation.metric == "kid" or promotion.num_samples > dim
    return evaluation.metric if enough else PCA


@dataclass(frozen=True)
class Space:
    """A feature space and what a score in it needs.

    Raises:
        EvaluationError: an extractor or reference that is not the protocol's.
    """

    protocol: Protocol
    extractor: Extractor
    reference: ReferenceStats

    def __post_init__(self) -> None:
        protocol = self.protocol
        given = (
            self.extractor.name,
            self.extractor.digest,
            self.reference.extractor_digest,
            self.reference.digest,
            self.reference.size,
        )
        wanted = (
            protocol.extractor,
            *[protocol.extractor_digest] * 2,
            protocol.reference_digest,
            protocol.reference_size,
        )
        if given != wanted:
            raise EvaluationError(
                f"extractor and reference must be the protocol's; got {given} for {wanted}; build "
                "the protocol with these two"
            )


def evaluate(
    make_images: Callable[[range], Tensor],
    protocol: Protocol,
    extractor: Extractor,
    reference: ReferenceStats,
    chunk: int = 1000,
) -> EvaluationResult:
    """The protocol's score of a generator, one value per repeat; see `evaluate_in`."""
    return evaluate_in(make_images, [Space(protocol, extractor, reference)], chunk)[0]


def evaluate_in(
    make_images: Callable[[range], Tensor],
    spaces: Sequence[Space],
    chunk: int = 1000,
    on_features: Callable[[Floats], None] | None = None,
) -> tuple[EvaluationResult, ...]:
    """Scores of one generator in several feature spaces, of the same images.

    Args:
        make_images: gives the images (len(seeds), C, H, W) uint8 of a range of image seeds; called
            in turn for the seeds of each repeat, at most `chunk` at a time.
        spaces: whose protocols have the same image seeds.
        on_features: called with each repeat's features (num_samples, D) in the first space.

    Raises:
        EvaluationError: images of another type or number, a score that is not finite, or protocols
            of different images.
    """
    first, *others = (space.protocol for space in spaces)
    for other in others:
        first.require_same_images(other)
    values: list[list[float]] = [[] for _ in spaces]
    for begin in first.seeds:
        parts: list[list[Floats]] = [[] for _ in spaces]
        for start in range(0, first.num_samples, chunk):
            seeds = range(begin + start, begin + min(start + chunk, first.num_samples))
            images = make_images(seeds)
            if len(images) != len(seeds):
                raise EvaluationError(
                    f"one image a seed is needed; got {len(images)} for {len(seeds)} seeds; "
                    "make_images must give them all"
                )
            for space, part in zip(spaces, parts, strict=True):
                part.append(extract_features(space.extractor, images))
        whole = [np.concatenate(part) for part in parts]
        for space, features, found in zip(spaces, whole, values, strict=True):
            found.append(_distance(space.protocol, features, space.reference))
        if on_features is not None:
            on_features(whole[0])
    return tuple(
        EvaluationResult(space.protocol, tuple(found))
        for space, found in zip(spaces, values, strict=True)
    )


def _distance(protocol: Protocol, features: Floats, reference: ReferenceStats) -> float:
    if protocol.metric == "kid":
        value, _ = kernel_distance(features, reference.features)
    elif protocol.num_components is not None:
        value = projected_distance(features, reference, protocol.num_components)
    else:
        value = frechet_distance(
            features.mean(0), np.cov(features, rowvar=False), reference.mean, reference.cov
        )
    if not math.isfinite(value):
        raise EvaluationError(
            f"the {protocol.metric} score must be finite; got {value}; check the images"
        )
    return value
