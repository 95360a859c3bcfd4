"""Second opinions of confirmed points, as tables: trained again, and in further feature spaces."""

from __future__ import annotations

import math

import pandas as pd

from asesearch.report import tables
from asesearch.score import CONFIDENCE
from asesearch.study.records import Confirmation, StudyResults


def retrained(results: StudyResults) -> pd.DataFrame:
    """Confirmed points over their training seeds, fastest first; empty where each has one seed.

    `quality` is the mean over `training_seeds` networks, beside `failed_seeds` whose fine-tuning
    failed; `training_se` its standard error (from training; none of the pretrained network, which
    is not trained), `sampling_se` that of the search's own network (from sampling, on other
    images); `difference` and `margin` compare with the full network seed by seed and repeat by
    repeat, over the `pairs` seeds under which both have a score, for both to be trained and sampled
    again, and `verdict` is by them.
    """
    records = tables.by_number(results)
    full = next(
        (c for c in results.confirmations if results.full and c.number == results.full.number), None
    )
    rows = []
    for c in sorted(results.confirmations, key=lambda c: (c.measured_time_frac, c.number)):
        if not c.retrained:
            continue
        difference, margin = (math.nan, None) if full is None else c.trained_minus(full)
        record = records[c.number]
        pairs = 0 if full is None else len(_seeds(c) & _seeds(full))
        trained = not (record.schedule.is_full and results.two_weights)
        rows.append(
            {
                "number": c.number,
                "label": tables.label(record, results),
                "metric": c.quality.protocol.metric_name,
                "training_seeds": len(c.trained.values) if trained else 0,
                "failed_seeds": sum(isinstance(q, str) for q in c.retrained),
                "quality": c.trained.value,
                "training_se": tables.nan(c.trained.std_error if trained else None),
                "sampling_se": tables.std_error(c.quality),
                "pairs": pairs,
                "difference": difference,
                "margin": tables.nan(margin),
                "confidence": CONFIDENCE,
                "verdict": tables.REFERENCE
                if c is full
                else tables.verdict(difference, margin, "training" if pairs == 1 else "repeat"),
                "time_frac": c.measured_time_frac,
            }
        )
    return pd.DataFrame(rows)


def _seeds(c: Confirmation) -> set[int]:
    """The training seeds under which it has a score, the search's own as 0."""
    return {i for i, q in enumerate((c.quality, *c.retrained)) if not isinstance(q, str)}


def failed_seeds(results: StudyResults) -> list[str]:
    """A sentence for each fine-tuning of a confirmed point that failed under a further seed."""
    records = tables.by_number(results)
    return [
        f"Of {tables.label(records[c.number], results)}, training seed {seed} failed: {told}."
        for c in results.confirmations
        for seed, told in enumerate(c.retrained, 1)
        if isinstance(told, str)
    ]


def feature_spaces(results: StudyResults) -> pd.DataFrame:
    """Confirmed points in further feature spaces, fastest first: scores of the same images, each
    compared with the full network's in the same space; empty without such spaces."""
    records = tables.by_number(results)
    number = None if results.full is None else results.full.number
    full = {q.protocol: q for c in results.confirmations if c.number == number for q in c.also}
    rows = []
    for c in sorted(results.confirmations, key=lambda c: (c.measured_time_frac, c.number)):
        for quality in c.also:
            baseline = full.get(quality.protocol)
            difference = math.nan if baseline is None else quality.minus(baseline)[0]
            margin = None if baseline is None else quality.margin(baseline)
            rows.append(
                {
                    "number": c.number,
                    "label": tables.label(records[c.number], results),
                    "metric": quality.protocol.metric_name,
                    "quality": quality.value,
                    "std_error": tables.std_error(quality),
                    "difference": difference,
                    "margin": tables.nan(margin),
                    "confidence": CONFIDENCE,
                    "verdict": tables.REFERENCE
                    if c.number == number
                    else tables.verdict(difference, margin),
                    "time_frac": c.measured_time_frac,
                }
            )
    return pd.DataFrame(rows)
