"""`train` and `finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from asesearch.cli.interruption import interruptible
from asesearch.cli.options import DryRun, ScheduleText, StudyFile
from asesearch.cli.printing import bar_of_steps, print_json, say
from asesearch.errors import ConfigError

if TYPE_CHECKING:
    from asesearch.config import StudyConfig


def train(
    study: StudyFile,
    out: Annotated[Path, typer.Option("--out", "-o", help="Weights to write (.safetensors).")],
    run_dir: Annotated[
        Path | None, typer.Option(help="Folder of the checkpoint; default runs/NAME-train.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Train the study's network with all its blocks, from scratch or from its checkpoint. Killed
    runs resume."""
    from asesearch.config import load_study

    config = load_study(study)
    _fit(config, "full", out, run_dir or Path("runs") / f"{config.name}-train", dry_run)


def finetune(
    study: StudyFile,
    schedule: ScheduleText,
    out: Annotated[Path, typer.Option("--out", "-o", help="Weights to write (.safetensors).")],
    steps: Annotated[
        int | None, typer.Option(help="Steps, in place of the study's train.num_steps.")
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(help="Folder of the checkpoint; default runs/NAME-finetune/SCHEDULE."),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Fine-tune the study's network under one exit schedule. Killed runs resume.

    On several GPUs: accelerate launch -m asesearch finetune …
    """
    from asesearch.config import load_study

    config = load_study(study).with_options("train", num_steps=steps)
    if config.backbone.checkpoint is None:
        raise ConfigError(
            "fine-tuning needs pretrained weights; got no backbone.checkpoint; give it, or use "
            "`asesearch train`"
        )
    default = Path("runs") / f"{config.name}-finetune"
    _fit(config, schedule, out, run_dir or default, dry_run, by_schedule=run_dir is None)


def _fit(
    config: StudyConfig,
    schedule: str,
    out: Path,
    run_dir: Path,
    dry_run: bool,
    *,
    by_schedule: bool = False,
) -> None:
    """What `train` and `finetune` share."""
    from asesearch.finetuning.from_file import StudyTraining

    training = StudyTraining(
        config, schedule, out, run_dir, by_schedule=by_schedule, dry_run=dry_run
    )
    if dry_run:
        print_json(training.plan())
        return
    trainer = training.trainer
    if trainer.resumed_at:
        say(f"resuming at step {trainer.resumed_at} of {config.train.num_steps}")
    every = f"one every {config.train.checkpoint_every} steps"
    kept = (
        f"the last checkpoint ({every}) is kept in {training.run_dir}; the same command resumes "
        "from it"
    )
    with interruptible(kept):
        with bar_of_steps(config.train.num_steps, "train") as on_step:
            if trainer.losses:
                on_step(trainer.step, trainer.losses[-1])
            result = training.run(on_step)
        training.write(result)
    if not trainer.accelerator.is_main_process:
        return
    last = result.losses[-100:]
    print_json(
        {
            "weights": str(out),
            "steps": config.train.num_steps,
            "mean_loss_of_last_steps": sum(last) / len(last) if last else None,
            "loss_weight_ended_at": result.weight_ended_at,
            "seconds": round(result.seconds, 1),
        }
    )
