"""Features of images: bytes first, then the extractor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from asesearch.data import DataSource, read_ahead, workers_of
from asesearch.errors import EvaluationError
from asesearch.evaluation.extractors import Extractor

Floats = npt.NDArray[np.float64]
CONVERTED = 256  # images made bytes of together


def to_uint8(images: Tensor) -> Tensor:
    """Images as bytes with the official DiT rounding: (N, C, H, W) float in [-1, 1] -> uint8 on the
    CPU.

    Raises:
        EvaluationError: an image is not finite.
    """
    made = torch.empty(images.shape, dtype=torch.uint8)
    bad = 0
    # in parts: the copies in between are larger than the images
    for ours, part in zip(
        torch.split(made, CONVERTED), torch.split(images, CONVERTED), strict=True
    ):
        bad += int((~torch.isfinite(part).flatten(1).all(1)).sum())
        ours.copy_((part * 127.5 + 128).clamp_(0, 255).to("cpu", torch.uint8))
    if bad:
        raise EvaluationError(
            f"images must be finite; got {bad} of {len(images)} with NaN or infinity; the network "
            "has diverged: lower the learning rate, or fine-tune it longer"
        )
    return made


def feature_batches(
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
    return np.concatenate(list(feature_batches(extractor, images, batch_size)))
