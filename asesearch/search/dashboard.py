"""What Optuna's dashboard shows of a trial beside its numbers: readable attributes, a note with the
schedule drawn, and a grid of its samples.

The note is stored as `optuna_dashboard.save_note` stores it (release 0.21), so that a search needs
no dashboard; samples are an artifact of Optuna's, in a folder of the study directory.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import optuna
from optuna.artifacts import FileSystemArtifactStore, upload_artifact
from optuna.trial import FrozenTrial

from asesearch.data import save_images
from asesearch.schedule import ExitSchedule
from asesearch.study import directory
from asesearch.study.directory import read_images
from asesearch.study.records import TrialRecord
from asesearch.study.study import Study

NOTE_PART = 2045  # characters of a note in one attribute; longer ones take several
BAR = 24  # characters of a full-depth bar
#: Of the grid: a preview, for the samples themselves lie beside the weights.
GRID_IMAGES = 16
GRID_SIDE = 128

_log = logging.getLogger(__name__)


def show_trial(study: Study, trial: optuna.Trial | FrozenTrial, record: TrialRecord) -> None:
    """Give a trial that is on record, and not yet ended, what the dashboard shows.

    Samples that can't be written for it are no reason to end a search: it says so.

    Raises:
        StudyError: samples that can't be read.
    """
    storage = study.optuna._storage
    save_note(study.optuna, trial, note_of(record))
    try:
        for key, value in attributes(record).items():
            storage.set_trial_user_attr(trial._trial_id, key, value)
        _save_samples(study, trial, record)
    except optuna.exceptions.UpdateFinishedTrialError:
        pass  # another worker took this one for dead; its record counts all the same
    except OSError as error:  # WriteError too
        _log.warning("the dashboard goes without the samples of trial %d: %s", trial.number, error)


def attributes(record: TrialRecord) -> dict[str, Any]:
    """What a table of trials shows in words that need no explanation."""
    found: dict[str, Any] = {"schedule": str(record.schedule), "sampler": str(record.sampler)}
    if record.quality is not None:
        found["score"] = float(f"{record.quality.value:.6g}")
    if record.time_frac is not None:
        found["relative time"] = float(f"{record.time_frac:.4g}")
        found["speed-up"] = float(f"{1 / record.time_frac:.4g}")
    if record.flops_frac is not None:
        found["relative FLOPs"] = float(f"{record.flops_frac:.4g}")
    return found


def note_of(record: TrialRecord) -> str:
    """What came of a trial, in Markdown, with its schedule drawn."""
    lines = [f"**{record.origin}**: {record.schedule}, sampled by {record.sampler}", ""]
    if (quality := record.quality) is not None:
        spread = "" if quality.std_error is None else f" ± {quality.std_error:.2g}"
        lines.append(f"- {quality.protocol.metric_name} {quality.value:.4g}{spread}")
    if record.time_frac is not None:
        lines.append(
            f"- predicted: {record.time_frac:.3f}× the full network's sampling time, "
            f"{1 / record.time_frac:.2f}× as fast"
        )
    if record.flops_frac is not None:
        lines.append(f"- FLOPs: {record.flops_frac:.3f}× the full network's")
    if record.block_frac is not None:
        lines.append(f"- block calls: {record.block_frac:.3f}× the full network's")
    if (rung := record.low_fidelity) is not None:
        went = "fine-tuned" if rung.promoted else "stopped"
        score = rung.quality.value
        lines.append(f"- low-fidelity score {score:.4g}: {went}, {rung.reason}")
    if record.failure is not None:
        lines.append(f"- failed: {record.failure}")
    return "\n".join([*lines, "", "```", drawn(record.schedule), "```"])


def drawn(schedule: ExitSchedule) -> str:
    """A bar for each interval, data first, as long as the blocks that it runs."""
    merged = schedule.merged()
    ends = merged.boundaries
    width = len(str(ends[-1]))
    rows = [
        f"t {a:>{width}} … {b:>{width}}  {'#' * max(1, round(BAR * d / merged.depth)):<{BAR}} {d}"
        for a, b, d in zip(ends[:-1], ends[1:], merged.exit_depths, strict=True)
    ]
    return "\n".join([*rows, f"blocks run of {merged.depth}; t = 0 is data, {ends[-1]} noise"])


def save_note(study: optuna.Study, trial: optuna.Trial | FrozenTrial, body: str) -> None:
    """Store a note as the dashboard reads it."""
    storage = study._storage
    key = f"dashboard:{trial._trial_id}:note_"
    for i in range(0, len(body), NOTE_PART):
        part = f"{key}str:{i // NOTE_PART}"
        storage.set_study_system_attr(study._study_id, part, body[i : i + NOTE_PART])
    storage.set_study_system_attr(study._study_id, f"{key}ver", 1)


def smaller(images: npt.NDArray[np.uint8], side: int = GRID_SIDE) -> npt.NDArray[np.uint8]:
    """Images (N, C, H, W) of at most `side` pixels a side: means of squares, what is left over at
    the edges cut off."""
    n, c, height, width = images.shape
    size = -(-max(height, width) // side)
    if size == 1:
        return images
    h = height // size
    w = width // size
    squares = images[:, :, : h * size, : w * size].reshape(n, c, h, size, w, size)
    return np.asarray(squares.mean(axis=(3, 5)).round().astype(np.uint8))


def _save_samples(study: Study, trial: optuna.Trial | FrozenTrial, record: TrialRecord) -> None:
    if record.state != "complete":
        return
    images = read_images(study.samples_file(record.point), "the dashboard goes without")
    if images is None:
        return
    folder = study.run_dir / directory.ARTIFACTS
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / f"samples-{record.number}.png"
        save_images(smaller(images[:GRID_IMAGES]), path)
        upload_artifact(
            artifact_store=FileSystemArtifactStore(str(folder)),
            file_path=str(path),
            study_or_trial=trial,
            storage=study.optuna._storage,
        )
