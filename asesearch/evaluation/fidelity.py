"""Fréchet and kernel distance between generated images and a reference, by torch-fidelity.

Source: Heusel et al. 2017 (FID), Bińkowski et al. 2018 (KID); the arithmetic is torch-fidelity's.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch_fidelity import KEY_METRIC_FID, KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from asesearch.config import EvaluationConfig, PromotionConfig, SamplingConfig, StudyConfig
from asesearch.data import DataSource, cache_dir, check_readable, read_ahead, workers_of
from asesearch.errors import EvaluationError, WriteError
from asesearch.evaluation.extractors import Extractor
from asesearch.files import replacing
from asesearch.score import PCA, EvaluationResult, Protocol

Floats = npt.NDArray[np.float64]

#: Images for each principal component of "frechet-pca".
COMPONENTS_SHARE = 4
KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
KID_SEED = 2020
#: References keep the features of so many of their images (chosen with KID_SEED) for the kernel
#: distance.
KID_REFERENCE_SIZE = 5000
#: What a cached reference depends on besides extractor and data. Raise the version when the
#: arithmetic changes.
RECIPE = {
    "version": 1,
    "conversion": "clamp(127.5 x + 128, 0, 255)",
    "kept": KID_REFERENCE_SIZE,
    "seed": KID_SEED,
}
#: Data whose references travel in the package (for `fashion-cnn`): name -> digest.
SHIPPED = {
    "fashion-mnist/train": "cd81caa324de06d7582cc6fb4039dae3f6b0b0dd74936f4f1ea599df9436f943"
}
SHIPPED_DIR = Path(str(resources.files("asesearch"))) / "assets" / "references"

_log = logging.getLogger(__name__)


def to_uint8(images: Tensor) -> Tensor:
    """Images as bytes with the official DiT rounding: (N, C, H, W) float in [-1, 1] -> uint8 on the
    CPU.

    Raises:
        EvaluationError: an image is not finite.
    """
    finite = torch.isfinite(images).flatten(1).all(1)  # (N,)
    if not bool(finite.all()):
        raise EvaluationError(
            f"images must be finite; got {int((~finite).sum())} of {len(images)} with NaN or "
            "infinity; the network has diverged: lower the learning rate, or fine-tune it longer"
        )
    return (images * 127.5 + 128).clamp(0, 255).to("cpu", torch.uint8)


def _feature_batches(
    extractor: Extractor, images: Tensor | DataSource, batch_size: int
) -> Iterator[Floats]:
    """(N', D) each, in order; a data set is read ahead."""
    starts = range(0, len(images), batch_size)
    if isinstance(images, Tensor):
        for start in starts:
            yield extractor(images[start : start + batch_size]).numpy()
        return
    parts = [range(start, min(start + batch_size, len(images))) for start in starts]
    with closing(read_ahead(partial(_read_bytes, images), parts, workers_of(images))) as read:
        for batch in read:
            yield extractor(batch).numpy()


def _read_bytes(source: DataSource, indices: range) -> Tensor:
    return to_uint8(source.batch(indices)[0])


def extract_features(
    extractor: Extractor, images: Tensor | DataSource, batch_size: int = 200
) -> Floats:
    """Features of images.

    Args:
        images: (N, C, H, W) uint8, or a data set (without its augmentation).

    Returns:
        (N, D) float64.

    Raises:
        EvaluationError: no images, or images the extractor does not take.
    """
    if len(images) == 0:
        raise EvaluationError("features need at least one image; got none; generate more")
    return np.concatenate(list(_feature_batches(extractor, images, batch_size)))


# -- references ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReferenceStats:
    """What generated images are compared with.

    Attributes:
        name, size, digest: the data set's name, number of images and SHA-256.
        extractor, extractor_digest: whose features these are.
        mean, cov: their moments, (D,) and (D, D) float64.
        features: (M, D) float32, of a fixed random subset of at most KID_REFERENCE_SIZE images, for
            the kernel distance.
    """

    name: str
    size: int
    digest: str
    extractor: str
    extractor_digest: str
    mean: Floats
    cov: Floats
    features: npt.NDArray[np.float32]

    @cached_property
    def axes(self) -> Floats:
        """(D, D) unit vectors of the principal components as columns, the widest first."""
        _, vectors = np.linalg.eigh(self.cov)
        return np.asarray(vectors[:, ::-1])


def reference_path(folder: Path, extractor: Extractor, digest: str) -> Path:
    """Where a folder keeps a reference: the name covers extractor, weights, data and recipe."""
    key = json.dumps(
        {"extractor": extractor.name, "weights": extractor.digest, "data": digest, **RECIPE},
        sort_keys=True,
    )
    return folder / f"{extractor.name}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"


def reference_statistics(
    source: DataSource | str, extractor: Extractor, cache: bool = True
) -> ReferenceStats:
    """Moments and kept features of a reference data set.

    Looked for in the package, then in `cache_dir()/references`; else computed, and kept there if
    `cache`. A cached file that is damaged is made again.

    Args:
        source: the data set, or the name of one in `SHIPPED`, which need not be on this machine.

    Raises:
        EvaluationError: an unknown name, no stored reference for a bare name, or images the
            extractor does not take.
    """
    if isinstance(source, str):
        if source not in SHIPPED:
            raise EvaluationError(
                f"the package knows the references {', '.join(SHIPPED)} by name; got {source!r}; "
                "give the data set itself"
            )
        digest = SHIPPED[source]
    else:
        extractor.check_shape(source.shape[0], source.name)
        digest = source.digest
    cached = reference_path(cache_dir() / "references", extractor, digest)
    stored = [reference_path(SHIPPED_DIR, extractor, digest), *([cached] if cache else [])]
    for path in stored:
        found = _read_reference(path, extractor, digest)
        if found is not None:
            return found
    if isinstance(source, str):
        raise EvaluationError(
            f"no reference of {source} is stored for the extractor {extractor.name} with weights "
            f"{extractor.digest[:8]}…; give the data set itself once"
        )
    made = _make_reference(source, extractor)
    if cache:
        try:
            write_reference(cached, made)
        except WriteError as error:  # the statistics are there all the same
            _log.warning(
                "the next run will make the reference again: %s; set ASESEARCH_CACHE to such a "
                "folder",
                error,
            )
    return made


def _make_reference(
    source: DataSource, extractor: Extractor, batch_size: int = 200
) -> ReferenceStats:
    """Moments in one pass, so that a large data set's features need not fit in memory."""
    if len(source) < 2:
        raise EvaluationError(
            f"a reference needs at least 2 images; got {len(source)} in {source.name}; give more"
        )
    check_readable(source)
    kept_rows = np.zeros(len(source), dtype=bool)
    order = np.random.default_rng(KID_SEED).permutation(len(source))
    kept_rows[order[:KID_REFERENCE_SIZE]] = True
    count = 0
    mean = np.zeros(extractor.dim)
    scatter = np.zeros((extractor.dim, extractor.dim))
    kept = []
    for batch in _feature_batches(extractor, source, batch_size):
        size = len(batch)
        centre = batch.mean(0)
        step = centre - mean
        centred = batch - centre
        # Chan et al. 1979
        scatter += centred.T @ centred + np.outer(step, step) * (count * size / (count + size))
        mean = mean + step * (size / (count + size))
        kept.append(batch[kept_rows[count : count + size]].astype(np.float32))
        count += size
    return ReferenceStats(
        source.name,
        count,
        source.digest,
        extractor.name,
        extractor.digest,
        mean,
        scatter / (count - 1),
        np.concatenate(kept),
    )


def write_reference(path: Path, reference: ReferenceStats) -> None:
    """Store a reference, atomically."""
    facts = {
        k: getattr(reference, k)
        for k in ("name", "size", "digest", "extractor", "extractor_digest")
    }
    with replacing(path, shared=True) as part, part.open("wb") as file:
        np.savez(
            file,
            facts=json.dumps(facts),
            mean=reference.mean,
            cov=reference.cov,
            features=reference.features,
        )


def _read_reference(path: Path, extractor: Extractor, digest: str) -> ReferenceStats | None:
    """The stored reference; None if there is none, or none that can be trusted."""
    if not os.path.isfile(path):  # `Path.is_file` raises where a folder above may not be read
        return None
    try:
        # the zip's checksums cover every byte
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            facts: dict[str, Any] = json.loads(str(file["facts"]))
            found = ReferenceStats(
                **facts, mean=file["mean"], cov=file["cov"], features=file["features"]
            )
        ours = (found.extractor, found.extractor_digest, found.digest) == (
            extractor.name,
            extractor.digest,
            digest,
        )
        dim = extractor.dim
        shapes = (
            found.mean.shape == (dim,)
            and found.cov.shape == (dim, dim)
            and found.features.shape[1:] == (dim,)
        )
        if not (
            ours
            and shapes
            and all(np.isfinite(a).all() for a in (found.mean, found.cov, found.features))
        ):
            raise ValueError("it does not hold what its name says")
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        _log.warning("the stored reference %s is damaged (%s); it is not used", path, error)
        return None
    return found


# -- distances -----------------------------------------------------------------------------------


def frechet_distance(mean1: Floats, cov1: Floats, mean2: Floats, cov2: Floats) -> float:
    """Fréchet distance of two Gaussians, |mean1 - mean2|² + Tr(cov1 + cov2 - 2 (cov1 cov2)^½), by
    torch-fidelity.

    Raises:
        EvaluationError: moments that are not finite or of different sizes.
    """
    if (
        mean1.shape != mean2.shape
        or cov1.shape != cov2.shape
        or cov1.shape != (mean1.size, mean1.size)
    ):
        raise EvaluationError(
            f"moments must be (D,) and (D, D) with one D; got {mean1.shape}, {cov1.shape}, "
            f"{mean2.shape} and {cov2.shape}; use one extractor for both"
        )
    if not all(np.isfinite(a).all() for a in (mean1, cov1, mean2, cov2)):
        raise EvaluationError(
            "moments must be finite; got NaN or infinity among the features; check the images"
        )
    first = {"mu": np.asarray(mean1, np.float64), "sigma": np.asarray(cov1, np.float64)}
    second = {"mu": np.asarray(mean2, np.float64), "sigma": np.asarray(cov2, np.float64)}
    return float(fid_statistics_to_metric(first, second, verbose=False)[KEY_METRIC_FID])


def projected_distance(features: Floats, reference: ReferenceStats, num_components: int) -> float:
    """Fréchet distance in the reference's first principal components, for fewer images than
    features.

    The projection follows from the reference alone, so that all sets of images are compared in one
    space.

    Args:
        features: (N, D), N > num_components.
    """
    axes = reference.axes[:, :num_components]  # (D, k)
    ours = features @ axes  # (N, k)
    mean = ours.mean(0)
    cov = np.cov(ours, rowvar=False).reshape(len(axes.T), -1)
    return frechet_distance(mean, cov, reference.mean @ axes, axes.T @ reference.cov @ axes)


def kernel_distance(features1: npt.ArrayLike, features2: npt.ArrayLike) -> tuple[float, float]:
    """Kernel distance by torch-fidelity: cubic kernel, unbiased, over random subsets with a fixed
    seed.

    Args:
        features1: (N, D).
        features2: (M, D).

    Returns:
        Mean over KID_SUBSETS subsets of KID_SUBSET_SIZE (fewer, if there are not so many) and their
        standard deviation, which is not the standard error of the mean.

    Raises:
        EvaluationError: fewer than 2 rows, or not finite.
    """
    tensors = [torch.from_numpy(np.asarray(f, dtype=np.float64)) for f in (features1, features2)]
    size = min(KID_SUBSET_SIZE, *(len(t) for t in tensors))
    if size < 2 or not all(bool(torch.isfinite(t).all()) for t in tensors):
        raise EvaluationError(
            "a kernel distance needs at least 2 finite features on each side; got "
            f"{[tuple(t.shape) for t in tensors]}; generate more images, and check that they are "
            "finite"
        )
    found = kid_features_to_metric(
        *tensors, kid_subsets=KID_SUBSETS, kid_subset_size=size, rng_seed=KID_SEED, verbose=False
    )
    return float(found[KEY_METRIC_KID_MEAN]), float(found[KEY_METRIC_KID_STD])


# -- the protocol --------------------------------------------------------------------------------


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
        EvaluationError: too few images for the metric, repeats that share seeds, or a reference of
            another extractor.
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


def check_sample_counts(config: StudyConfig, dim: int) -> None:
    """Refuse a study whose scores can't exist, all of them at once, from the numbers alone.

    Args:
        dim: features of the study's extractor.

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
    few = {name: count for name, count in counts.items() if count <= dim}
    if few:
        fixes = {"promotion.num_samples": "promotion.metric = 'auto'"}
        others = dict.fromkeys(fixes.get(name, "evaluation.metric = 'kid'") for name in few)
        raise EvaluationError(
            f"{' and '.join(few)} must exceed the {dim} features of {config.evaluation.extractor} "
            "for the Fréchet distance (their covariance is singular otherwise); got "
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


def evaluate(
    make_images: Callable[[range], Tensor],
    protocol: Protocol,
    extractor: Extractor,
    reference: ReferenceStats,
    chunk: int = 1000,
) -> EvaluationResult:
    """The protocol's score of a generator, one value per repeat.

    Args:
        make_images: gives the images (len(seeds), C, H, W) uint8 of a range of image seeds; called
            in turn for the seeds of each repeat, at most `chunk` at a time.

    Raises:
        EvaluationError: images of another type or number, a score that is not finite, or an
            extractor or reference that is not the protocol's.
    """
    given = (
        extractor.name,
        extractor.digest,
        reference.extractor_digest,
        reference.digest,
        reference.size,
    )
    wanted = (
        protocol.extractor,
        *[protocol.extractor_digest] * 2,
        protocol.reference_digest,
        protocol.reference_size,
    )
    if given != wanted:
        raise EvaluationError(
            f"extractor and reference must be the protocol's; got {given} for {wanted}; build the "
            "protocol with these two"
        )
    values = []
    for first in protocol.seeds:
        parts = []
        for start in range(0, protocol.num_samples, chunk):
            seeds = range(first + start, first + min(start + chunk, protocol.num_samples))
            images = make_images(seeds)
            if len(images) != len(seeds):
                raise EvaluationError(
                    f"one image a seed is needed; got {len(images)} for {len(seeds)} seeds; "
                    "make_images must give them all"
                )
            parts.append(extract_features(extractor, images))
        values.append(_distance(protocol, np.concatenate(parts), reference))
    return EvaluationResult(protocol, tuple(values))


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
