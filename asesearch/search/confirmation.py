"""The front again, on seeds that no trial has seen, with the real sampling time.

The best of many noisy figures is too good on average; what is reported and exported is confirmed on fresh seeds first.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from asesearch.backbones.base import Backbone
from asesearch.backbones.checkpoints import load_backbone
from asesearch.config import BackboneConfig
from asesearch.errors import StudyError
from asesearch.files import write_json
from asesearch.search.directory import CONFIRMATIONS, WEIGHTS, is_whole, read_state
from asesearch.search.records import Confirmation, TrialRecord, select
from asesearch.search.study import Study
from asesearch.search.warmup import warm_up
from asesearch.search.workbench import Workbench


def confirm(study: Study, bench: Workbench, progress: Callable[[Confirmation], None] | None = None) -> list[Confirmation]:
    """Confirm the study's front and the full network; what is confirmed already under the same protocol is kept.

    Raises:
        StudyError: the full network has no figure yet.
    """
    results = study.results()
    if results.full is None:
        raise StudyError(
            "the full network has no figure (its fine-tuning failed or has not run), so nothing can be compared with it; "
            "see the failed trials, lower train.lr, and search under another name"
        )
    protocol = bench.confirmation_protocol()
    how = study.config.confirm
    settings = {
        "protocol": {**asdict(protocol), "seeds": list(protocol.seeds)},
        "time": [how.time_images, how.time_repeats],
    }
    path = study.run_dir / CONFIRMATIONS

    def same(stored: dict[str, Any]) -> list[Confirmation]:
        return [Confirmation.from_dict(c) for c in stored["confirmations"]] if stored["settings"] == settings else []

    done = read_state(path, same, "the front is confirmed again") or []
    full_net = _network(study, results.full, bench)
    for record in select(results.front(), results.full, how.max_points):
        if any(c.number == record.number for c in done):
            continue
        begun = time.perf_counter()
        net = _network(study, record, bench)
        quality, _ = bench.evaluate(net, record.schedule, protocol, record.sampler)
        ratio, spread = 1.0, 0.0
        if record is not results.full:
            measured = bench.measured_time(net, record.schedule, full_net, record.sampler)
            ratio, spread = measured.median, measured.spread
        done.append(Confirmation(record.number, quality, ratio, spread, time.perf_counter() - begun))
        write_json(path, {"settings": settings, "confirmations": [c.to_dict() for c in done]})
        if progress is not None:
            progress(done[-1])
    return done


def _network(study: Study, record: TrialRecord, bench: Workbench) -> Backbone:
    """A point's network; fine-tuned again from the same start with the same seeds, where its file is damaged."""
    folder = study.trial_dir(record.schedule)
    if (folder / WEIGHTS).is_file() and not is_whole(folder / WEIGHTS, "the schedule is fine-tuned again"):
        warm_up(bench, study.run_dir)
        return bench.tuned(record.schedule, folder).backbone
    return load_trial(study, record, bench.device)


def trial_weights(study: Study, record: TrialRecord) -> Path:
    """File with a trial's weights.

    Raises:
        StudyError: the trial failed, the weights were deleted, as `keep_weights = "front"` does off the front, or they are
            damaged.
    """
    if record.state != "complete":
        why = record.failure or "its cheap figure did not promote it"
        raise StudyError(f"trial {record.number} {record.state}, so it has no weights ({why}); choose another")
    path = study.trial_dir(record.schedule) / WEIGHTS
    if not path.is_file():
        raise StudyError(
            f"trial {record.number} has no weights in {path.parent}: weights off the front are deleted; "
            'pick a front point, or search with keep_weights = "all"'
        )
    if not is_whole(path, f"trial {record.number} has no weights now"):
        raise StudyError(
            f"the weights of trial {record.number} in {path} are damaged; `asesearch search` makes those of points to be "
            "confirmed again; choose another trial, or restore the file"
        )
    return path


def load_trial(study: Study, record: TrialRecord, device: torch.device) -> Backbone:
    """A trial's network, in eval mode.

    Raises:
        StudyError: its weights were deleted, or are damaged.
    """
    config = BackboneConfig(kind=study.config.backbone.kind, checkpoint=str(trial_weights(study, record)))
    return load_backbone(config).to(device).eval()
