"""Tables of what is shown of the front's points: their schedules, losses and samples; and the
latency table."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pandas as pd

from asesearch.errors import StudyError
from asesearch.report import tables
from asesearch.study.records import StudyResults, TrialRecord

MAX_CURVE_POINTS = 80
MAX_SHOWN = 5
MAX_SAMPLES = 8


def schedule_matrix(results: StudyResults) -> pd.DataFrame:
    """Blocks run over time for the front (fastest first) and the full network; column `t120` holds
    [120, next column's t)."""
    chosen = tables.front_records(results)
    starts = sorted({t for r in chosen for t in r.schedule.boundaries[:-1]})
    rows = []
    for r in chosen:
        row = {
            "number": r.number,
            "label": tables.label(r, results),
            "depth": r.schedule.depth,
            "end": r.schedule.num_train_timesteps,
        }
        rows.append(
            row
            | {
                f"t{t}": int(d)
                for t, d in zip(starts, r.schedule.exit_depth_at(starts), strict=True)
            }
        )
    return pd.DataFrame(rows)


def losses(results: StudyResults) -> pd.DataFrame:
    """Fine-tuning loss of front points and the full network, averaged over at most 80 equal
    stretches of steps.

    Stored curves hold at most 500 points: `step` is counted in the steps that were made. In records
    of an earlier release the full network made those of the elastic warm-up and of the brief
    fine-tuning together.
    """
    brief = results.config.get("train", {}).get("num_steps")
    elastic = results.config.get("elastic") or {}
    rows = []
    for r in _shown(results, [r for r in tables.front_records(results) if r.losses]):
        stretches = np.array_split(np.asarray(r.losses), min(MAX_CURVE_POINTS, len(r.losses)))
        ends = np.cumsum([len(s) for s in stretches])
        warm_up = elastic.get("num_steps", 0) if r.schedule.is_full else 0
        steps = r.finetune_steps or (brief + warm_up if brief else len(r.losses))
        per_point = steps / len(r.losses)
        for end, stretch in zip(ends, stretches, strict=True):
            step = (end - (len(stretch) - 1) / 2) * per_point
            rows.append(
                {
                    "number": r.number,
                    "label": tables.label(r, results),
                    "step": step,
                    "loss": float(stretch.mean()),
                }
            )
    return pd.DataFrame(rows, columns=["number", "label", "step", "loss"])


def latency(results: StudyResults) -> pd.DataFrame:
    """Latency of one network call by exit depth, and the least-squares line through it (NaN for one
    depth)."""
    measured = np.asarray(results.latency_ms, dtype=np.float64)
    depths = np.arange(1, len(measured) + 1)
    fit = np.full(len(measured), math.nan)
    if len(measured) > 1:
        slope, intercept = np.polyfit(depths, measured, 1)
        fit = intercept + slope * depths
    return pd.DataFrame({"exit_depth": depths, "latency_ms": measured, "fit_ms": fit})


def samples(results: StudyResults) -> pd.DataFrame:
    """Which stored images are shown: at most eight of front points and of the full network, the
    same seeds in each.

    Raises:
        StudyError: images that are not (N, 1 or 3, H, W) uint8.
    """
    rows = []
    for r in _shown(
        results, [r for r in tables.front_records(results) if r.number in results.samples]
    ):
        images = results.samples[r.number]
        if images.ndim != 4 or images.shape[1] not in (1, 3) or images.dtype != np.uint8:
            raise StudyError(
                f"samples must be uint8 of shape (N, 1 or 3, H, W); got {images.dtype} "
                f"{images.shape} in trial {r.number}; decode latents before they are stored"
            )
        for i in range(min(MAX_SAMPLES, len(images))):
            digest = hashlib.sha256(np.ascontiguousarray(images[i]).data).hexdigest()
            rows.append(
                {
                    "number": r.number,
                    "label": tables.label(r, results),
                    "image": i,
                    "sha256": digest,
                }
            )
    return pd.DataFrame(rows, columns=["number", "label", "image", "sha256"])


def _shown(results: StudyResults, chosen: list[TrialRecord]) -> list[TrialRecord]:
    """At most five of `chosen`, evenly spread, both ends included, and the full network last."""
    others = [r for r in chosen if r is not results.full]
    last = len(others) - 1
    keep = (
        range(len(others))
        if last < MAX_SHOWN
        else sorted({round(i * last / (MAX_SHOWN - 1)) for i in range(MAX_SHOWN)})
    )
    return [*(others[i] for i in keep), *(r for r in chosen if r is results.full)]
