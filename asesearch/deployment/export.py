"""From a point of a study to a bundle."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from asesearch.backbones.base import Backbone
from asesearch.backbones.device import plain_torch
from asesearch.data import check_readable
from asesearch.deployment import formats
from asesearch.deployment.bundle import Bundle
from asesearch.deployment.writing import check_bundle_dir
from asesearch.errors import ConfigError, StudyError, WriteError
from asesearch.files import check_writable
from asesearch.finetuning import CHECKPOINT, finetune
from asesearch.finetuning.from_file import LOCK
from asesearch.locks import waited_if_possible
from asesearch.search.accelerating import recorded_acceleration
from asesearch.search.confirmation import load_trial, trial_weights
from asesearch.search.warmup import warm_up
from asesearch.search.workbench import Workbench
from asesearch.study.changes import other_inputs
from asesearch.study.directory import INPUTS, PROMPTS, read_json
from asesearch.study.environment import environment
from asesearch.study.records import TrialRecord
from asesearch.study.study import Study


@plain_torch()
def export(
    study: Study,
    record: TrialRecord,
    folder: str | os.PathLike[str],
    *,
    bench: Workbench | None = None,
    finetune_steps: int | None = None,
    format: str = "bundle",
    vae: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    on_step: Callable[[int, float], None] | None = None,
) -> Path:
    """Write the bundle of one point, with the weights of its trial or, with `finetune_steps`, fully
    fine-tuned ones; or another of `asesearch.deployment.formats`.

    A full fine-tuning starts where the trial's did (from the elastic weights, where the study has
    them; the full network from the pretrained ones) under the study's `train` settings with another
    number of steps. It is resumable (its checkpoint lies in the trial's folder; a second export
    waits for it and takes what it gave), and is evaluated under the confirmation protocol, on
    `bench` where one is given.

    Raises:
        StudyError: the trial's weights or prompts were deleted.
        ConfigError: no study, or no record of a trial.
        AseSearchError: see `check_export`.
    """
    if not (isinstance(study, Study) and isinstance(record, TrialRecord)):
        raise ConfigError(
            "export takes a Study and one of its records; got "
            f"{type(study).__name__} and {type(record).__name__}; open it by Study.open, and take "
            "what pick returns"
        )
    folder = Path(folder)
    vae = None if vae is None else Path(vae)
    options: dict[str, Any] = {"vae": vae, "overwrite": overwrite}
    _check_outputs(study, record, folder, finetune_steps, format=format, **options)
    config = study.config
    evaluation = evaluation_of(study, record)
    latents = None
    if config.data.kind == "latents":
        latents = read_json(study.run_dir / INPUTS)["decoder"]
    if finetune_steps is None:
        net = load_trial(study, record, torch.device("cpu"))
    else:
        bench = bench or Workbench(config, study.run_dir)
        other_inputs(study.optuna, study.run_dir, bench.identity)
        net = _finetuned(study, record, bench, finetune_steps, on_step)
        quality, _ = bench.evaluate(net, record.point, bench.protocols.confirmation)
        evaluation["after_full_finetuning"] = {
            "num_steps": finetune_steps,
            "quality": quality.to_dict(),
        }
    bundle = Bundle(
        backbone=net.cpu(),
        schedule=record.schedule,
        kind=config.backbone.kind,
        diffusion=config.diffusion,
        sampling=config.sampling.under(record.sampler),
        evaluation=evaluation,
        provenance={
            "study": config.name,
            "trial": record.number,
            "origin": record.origin,
            "config": config.shareable(),
            "environment": environment(),
        },
        prompts=_prompts(study.trial_dir(record.schedule) / PROMPTS) if net.takes_prompt else None,
        latents=latents,
        acceleration=recorded_acceleration(study.run_dir, record.sampler)
        if record.sampler.acceleration
        else None,
        acceleration_name=record.sampler.acceleration,
    )
    return formats.write(bundle, folder, format, **options)


def _finetuned(
    study: Study,
    record: TrialRecord,
    bench: Workbench,
    num_steps: int,
    on_step: Callable[[int, float], None] | None,
) -> Backbone:
    """The network of a point after a full fine-tuning, see `export`."""
    check_readable(bench.data)
    warm_up(bench, study.run_dir)
    start, train = bench.trials.tuning(record.schedule)
    train = train.model_copy(update={"num_steps": num_steps})
    teacher = bench.backbone if train.distill_frac > 0 else None
    folder = study.trial_dir(record.schedule)
    if start.takes_prompt:
        _prompts(folder / PROMPTS)  # before the hours, not after
    where = folder / f"finetune-{num_steps}"
    with waited_if_possible(where / LOCK, "fine-tunes this schedule fully"):
        return finetune(
            start, bench.data, bench.diffusion, record.schedule, train, where, teacher, on_step
        ).backbone


def check_export(
    study: Study,
    record: TrialRecord,
    folder: Path,
    finetune_steps: int | None = None,
    *,
    format: str = "bundle",
    vae: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Refuse what `export` could not write, before anything is trained; nothing is left behind.

    Raises:
        CheckpointError: the folder exists (and `overwrite` is not set), or holds something else.
        ConfigError: fewer than one step of fine-tuning, or more than can be counted; or see
            `asesearch.deployment.formats.check_format`.
        StudyError: the trial has no weights, where those of the trial are exported; network or data
            are not those of the study any more, where they are trained with.
        WriteError: the folder, or the trial's for the checkpoint, can't be written.
        AseSearchError: see `Workbench`, where it is fine-tuned.
    """
    options: dict[str, Any] = {"vae": vae, "overwrite": overwrite}
    _check_outputs(study, record, folder, finetune_steps, format=format, **options)
    if finetune_steps is not None:
        bench = Workbench(study.config, study.run_dir, reading=True)
        other_inputs(study.optuna, study.run_dir, bench.identity)


def _check_outputs(
    study: Study,
    record: TrialRecord,
    folder: Path,
    finetune_steps: int | None,
    *,
    format: str,
    vae: Path | None,
    overwrite: bool,
) -> None:
    """The part of `check_export` that takes no time."""
    if finetune_steps is not None and finetune_steps < 1:
        raise ConfigError(
            f"a full fine-tuning takes at least 1 step; got finetune_steps {finetune_steps}; give "
            "more, or none for the trial's own weights"
        )
    study.config.with_options("train", num_steps=finetune_steps)  # which refuses too many
    kind = study.config.backbone.kind
    formats.check_format(format, kind, vae, record.sampler.acceleration)
    check_bundle_dir(folder, overwrite=overwrite)
    if finetune_steps is None:
        trial_weights(study, record)
    else:
        check_checkpoint(study.trial_dir(record.schedule) / f"finetune-{finetune_steps}")


def check_checkpoint(folder: Path) -> None:
    """Refuse a full fine-tuning whose checkpoint can't be written, which goes into the study.

    Raises:
        WriteError: as said.
    """
    try:
        check_writable(folder, CHECKPOINT, named=folder.parent)
    except WriteError as error:
        reason, _, _ = str(error).rpartition("; ")
        raise WriteError(
            f"{reason}; a full fine-tuning keeps its checkpoint in the study's directory: copy "
            "that to a folder that you may write to, with room in it"
        ) from error


def plan_export(
    study: Study,
    record: TrialRecord,
    folder: Path,
    finetune_steps: int | None = None,
    *,
    format: str = "bundle",
    vae: Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """What `export` would write with these arguments, as plain data; nothing is written.

    Raises:
        AseSearchError: see `check_export`.
    """
    options: dict[str, Any] = {"vae": vae, "overwrite": overwrite}
    check_export(study, record, folder, finetune_steps, format=format, **options)
    return {
        **record.described(),
        "evaluation": evaluation_of(study, record),
        "format": format,
        "out": str(folder),
    }


def _prompts(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise StudyError(
            f"can't read the trial's prompts {path}: {error}; restore it, or search again"
        ) from error


def evaluation_of(study: Study, record: TrialRecord) -> dict[str, Any]:
    """What the study knows of a point: the search's score and, where there is one, the confirmed
    one."""
    found = [c for c in study.results().confirmations if c.number == record.number]
    return {
        "search": None if record.quality is None else record.quality.to_dict(),
        "predicted_time_frac": record.time_frac,
        "block_frac": record.block_frac,
        "confirmed": found[0].to_dict() if found else None,
    }
