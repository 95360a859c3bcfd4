"""Fréchet and kernel distance of features, and their precision and recall, by torch-fidelity.

Source: Heusel et al. 2017 (FID), Bińkowski et al. 2018 (KID), Kynkäänniemi et al. 2019 (improved
precision and recall); the arithmetic is torch-fidelity's.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch_fidelity import KEY_METRIC_FID, KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import (
    KEY_METRIC_PRECISION,
    KEY_METRIC_RECALL,
    prc_features_to_metric,
)

from asesearch.errors import EvaluationError
from asesearch.evaluation.features import Floats
from asesearch.evaluation.references import KID_SEED, ReferenceStats

KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
NEIGHBOURS = 3  # the k of precision and recall
ROWS = 1000  # whose distances are in memory at once


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


def precision_recall(features: npt.ArrayLike, reference: npt.ArrayLike) -> tuple[float, float]:
    """Share of generated images within the manifold of the reference (precision: fidelity), and of
    reference images within the manifold of the generated ones (recall: variety).

    A manifold is the union of balls about its images, each as wide as its third nearest neighbour
    is far. As both shares depend on the numbers of images, equally many of both are taken: the
    first of the generated ones, and a fixed random subset of the reference.

    Args:
        features: (N, D), of generated images.
        reference: (M, D).

    Raises:
        EvaluationError: too few rows for a neighbourhood, or not finite.

    Source: Kynkäänniemi et al. 2019, equations 1 and 2, k = 3.
    """
    ours, theirs = (np.asarray(f, dtype=np.float64) for f in (features, reference))
    size = min(len(ours), len(theirs))
    if size <= NEIGHBOURS or not all(np.isfinite(f).all() for f in (ours, theirs)):
        raise EvaluationError(
            f"precision and recall need more than {NEIGHBOURS} finite features on each side; got "
            f"{ours.shape} and {theirs.shape}; generate more images, and check that they are finite"
        )
    rows = np.random.default_rng(KID_SEED).permutation(len(theirs))[:size]
    found = prc_features_to_metric(
        torch.from_numpy(ours[:size]),
        torch.from_numpy(theirs[rows]),
        prc_neighborhood=NEIGHBOURS,
        prc_batch_size=ROWS,
        save_cpu_ram=True,
        verbose=False,
    )
    return float(found[KEY_METRIC_PRECISION]), float(found[KEY_METRIC_RECALL])
