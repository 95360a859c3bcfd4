"""What changed between two runs of a study, and what may."""

from __future__ import annotations

from typing import Any

from asesearch.config.sections import KINDS, DataConfig, StudyConfig

#: Fields that may change between two runs of one study: they leave every finished trial comparable.
#: (What lies at a changed
#: path must have the content on record: `Workbench.identity`.)
MAY_CHANGE = frozenset(
    {
        "search.num_trials",
        "search.budget",
        "search.storage",
        "search.keep_weights",
        "train.checkpoint_every",
        "train.compile",
        "elastic.checkpoint_every",
        "elastic.compile",
        "promotion.threshold",
        "promotion.always",
        "promotion.explore",
        "sampling.batch_size",
        "backbone.checkpoint",
        "data.path",
        "data.vae",
        "data.num_workers",
        "data.download",
        "evaluation.extractor_weights",
        "evaluation.reference.path",
        "evaluation.reference.num_workers",
        "evaluation.reference.download",
        "map.data.path",
        "map.data.num_workers",
        "map.data.download",
    }
)


def changed_fields(old: StudyConfig, new: StudyConfig) -> list[str]:
    """Fields of `new` that break comparability with `old`, as `section.field: old -> new`.

    `confirm` may change as a whole: confirmed points are confirmed again. So may what the kind of
    data has no use for, which earlier releases took without a word.
    """
    a = flat(old.model_dump(exclude={"confirm"}))
    b = flat(new.model_dump(exclude={"confirm"}))
    may = MAY_CHANGE | (_unused(old) & _unused(new))
    keys = [k for k in {**a, **b} if k not in may and a.get(k) != b.get(k)]
    return [f"{k}: {a.get(k)!r} -> {b.get(k)!r}" for k in sorted(keys)]


def _unused(config: StudyConfig) -> set[str]:
    """Settings of data that its kind has no use for, as `section.field`."""
    mapped = None if config.map is None else config.map.data
    sets: dict[str, DataConfig | None] = {
        "data": config.data,
        "evaluation.reference": config.evaluation.reference,
        "map.data": mapped,
    }
    return {
        f"{section}.{key}"
        for section, data in sets.items()
        for key, kinds in KINDS.items()
        if data is not None and data.kind not in kinds
    }


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of tables as one, its keys joined by dots."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out
