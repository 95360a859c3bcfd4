"""Moments and kept features of the data that generated images are compared with, made once and
cached."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import os
import sys
import zipfile
import zlib
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from asesearch.data import DataSource, cache_dir, check_readable
from asesearch.errors import EvaluationError, WriteError
from asesearch.evaluation.extractors import Extractor
from asesearch.evaluation.features import Floats, feature_batches
from asesearch.files import replacing
from asesearch.locks import waited_if_possible

KID_SEED = 2020
_BATCH_SIZE = 200
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
#: Data whose references travel in the package (for the extractors that do): name -> digest.
SHIPPED = {
    "fashion-mnist/train": "cd81caa324de06d7582cc6fb4039dae3f6b0b0dd74936f4f1ea599df9436f943"
}
SHIPPED_DIR = Path(str(resources.files("asesearch"))) / "assets" / "references"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
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

    Looked for in the package, then in `cache_dir()/references`; else computed, by one process while
    others wait, and kept there if `cache`. A cached file that is damaged is made again.

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
    found = _read_reference(reference_path(SHIPPED_DIR, extractor, digest), extractor, digest)
    if found is not None:
        return found
    if not cache:
        return _make_reference(source, extractor)
    cached = reference_path(cache_dir() / "references", extractor, digest)
    lock = cached.with_suffix(".lock")
    with waited_if_possible(lock, f"makes a reference in {cached.parent}"):
        found = _read_reference(cached, extractor, digest)
        if found is not None:
            return found
        made = _make_reference(source, extractor)
        try:
            write_reference(cached, made)
        except WriteError as error:  # the statistics are there all the same
            _log.warning(
                "the next run will make the reference again: %s; set ASESEARCH_CACHE to such a "
                "folder",
                error,
            )
        return made


def _make_reference(source: DataSource | str, extractor: Extractor) -> ReferenceStats:
    """Moments in one pass, so that a large data set's features need not fit in memory."""
    if isinstance(source, str):
        raise EvaluationError(
            f"no reference of {source} is stored for the extractor {extractor.name} with weights "
            f"{extractor.digest[:8]}…; give the data set itself once"
        )
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
    bar = tqdm(  # of a large network or data set it takes minutes to hours, once
        feature_batches(extractor, source, _BATCH_SIZE),
        f"{extractor.name} features of {source.name}, kept for next time",
        math.ceil(len(source) / _BATCH_SIZE),
        file=sys.stderr,
        dynamic_ncols=True,
        leave=False,
        delay=1.0,
        unit="batch",
    )
    for batch in bar:
        size = len(batch)
        centre = batch.mean(0)
        step = centre - mean
        centred = batch - centre
        # Chan et al. 1979
        scatter += centred.T @ centred + np.outer(step, step) * (count * size / (count + size))
        mean = mean + step * (size / (count + size))
        kept.append(batch[kept_rows[count : count + size]].astype(np.float32))
        count += size
    if not np.trace(scatter) > 0:
        raise EvaluationError(
            f"features of a reference must differ; the extractor {extractor.name} gives the same "
            f"for all {count} images of {source.name}; choose another extractor or reference"
        )
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
