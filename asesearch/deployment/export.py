"""From a point of a study to a bundle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from asesearch.deployment.bundle import Bundle, write_bundle
from asesearch.errors import StudyError
from asesearch.finetuning import finetune
from asesearch.search.confirmation import load_trial
from asesearch.search.directory import INPUTS, PROMPTS, read_json
from asesearch.search.records import TrialRecord
from asesearch.search.study import Study
from asesearch.search.warmup import warm_up
from asesearch.search.workbench import Workbench, environment, sampling_as


def export(
    study: Study,
    record: TrialRecord,
    folder: Path,
    *,
    bench: Workbench | None = None,
    finetune_steps: int | None = None,
    overwrite: bool = False,
    on_step: Callable[[int, float], None] | None = None,
) -> Path:
    """Write the bundle of one point, with the weights of its trial or, with `finetune_steps`, fully fine-tuned ones.

    A full fine-tuning starts where the trial's did (from the elastic weights, where the study has them; the full network from
    the pretrained ones) under the study's `train` settings with another number of steps. It is resumable (its checkpoint lies
    in the trial's folder), and is evaluated under the confirmation protocol; it needs a `bench`.

    Raises:
        StudyError: the trial's weights or prompts were deleted.
        CheckpointError: the folder exists or can't be written.
    """
    config, evaluation = study.config, evaluation_of(study, record)
    if finetune_steps is None:
        net = load_trial(study, record, torch.device("cpu"))
    else:
        bench = bench or Workbench(config, study.run_dir)
        warm_up(bench, study.run_dir)
        start, train = bench.tuning(record.schedule)
        train = train.model_copy(update={"num_steps": finetune_steps})
        teacher = bench.backbone if train.distill_frac > 0 else None
        where = study.trial_dir(record.schedule) / f"finetune-{finetune_steps}"
        net = finetune(start, bench.data, bench.diffusion, record.schedule, train, where, teacher, on_step).backbone
        quality, _ = bench.evaluate(net, record.schedule, bench.confirmation_protocol(), record.sampler)
        evaluation["after_full_finetuning"] = {"num_steps": finetune_steps, "quality": quality.to_dict()}
    bundle = Bundle(
        backbone=net.cpu(),
        schedule=record.schedule,
        kind=config.backbone.kind,
        diffusion=config.diffusion,
        sampling=sampling_as(config.sampling, record.sampler),
        evaluation=evaluation,
        provenance={
            "study": config.name,
            "trial": record.number,
            "origin": record.origin,
            "config": config.shareable(),
            "environment": environment(),
        },
        prompts=_prompts(study.trial_dir(record.schedule) / PROMPTS) if net.takes_prompt else None,
        latents=read_json(study.run_dir / INPUTS)["decoder"] if config.data.kind == "latents" else None,
    )
    return write_bundle(bundle, folder, overwrite=overwrite)


def _prompts(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise StudyError(f"can't read the trial's prompts {path}: {error}; restore it, or search anew") from error


def evaluation_of(study: Study, record: TrialRecord) -> dict[str, Any]:
    """What the study knows of a point: the search's figure and, where there is one, the confirmed one."""
    found = [c for c in study.results().confirmations if c.number == record.number]
    return {
        "search": None if record.quality is None else record.quality.to_dict(),
        "predicted_time_frac": record.time_frac,
        "block_frac": record.block_frac,
        "confirmed": found[0].to_dict() if found else None,
    }
