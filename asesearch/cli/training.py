"""`train` and `finetune`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from asesearch.cli.interruption import interruptible
from asesearch.cli.options import DryRun, ScheduleText, StudyFile, schedule_of
from asesearch.cli.printing import bar_of_steps, print_json, say
from asesearch.config import StudyConfig, load_study
from asesearch.errors import ConfigError


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
        Path | None, typer.Option(help="Folder of the checkpoint; default runs/NAME-finetune.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Fine-tune the study's network under one exit schedule. Killed runs resume.

    On several GPUs: accelerate launch -m asesearch finetune …
    """
    config = load_study(study).with_options("train", num_steps=steps)
    if config.backbone.checkpoint is None:
        raise ConfigError(
            "fine-tuning needs pretrained weights; got no backbone.checkpoint; give it, or use "
            "`asesearch train`"
        )
    _fit(config, schedule, out, run_dir or Path("runs") / f"{config.name}-finetune", dry_run)


def _fit(config: StudyConfig, schedule_text: str, out: Path, run_dir: Path, dry_run: bool) -> None:
    """What `train` and `finetune` share."""
    from asesearch.backbones.checkpoints import load_backbone, save_backbone
    from asesearch.data import check_readable, open_data
    from asesearch.diffusion import make_diffusion
    from asesearch.files import check_writable
    from asesearch.finetuning import CHECKPOINT, Trainer, seconds_per_step

    if out.suffix != ".safetensors":
        raise ConfigError(f"weights are written as .safetensors; got {out}; change --out")
    check_writable(out)
    check_writable(run_dir, CHECKPOINT)
    data = open_data(config.data)
    diffusion = make_diffusion(config.diffusion)
    backbone = load_backbone(
        config.backbone, config.train.seed, getattr(data, "null_condition", None)
    )
    schedule = schedule_of(schedule_text, backbone.depth, config.diffusion.num_train_timesteps)
    trainer = Trainer(
        backbone, data, diffusion, schedule, config.train, None if dry_run else run_dir
    )
    check_readable(data)
    if dry_run:
        step_s = seconds_per_step(trainer)
        print_json(
            {
                "study": config.shareable(),
                "schedule": str(schedule),
                "images": len(data),
                "parameters": sum(p.numel() for p in backbone.parameters()),
                "estimate": {
                    "step_s": round(step_s, 4),
                    "total_s": round(step_s * config.train.num_steps, 3),
                },
            }
        )
        return
    if trainer.resumed_at:
        say(f"resuming at step {trainer.resumed_at} of {config.train.num_steps}")
    every = f"one every {config.train.checkpoint_every} steps"
    kept = f"the last checkpoint ({every}) is kept in {run_dir}; the same command resumes from it"
    with interruptible(kept), bar_of_steps(config.train.num_steps, "train") as on_step:
        on_step(trainer.step, trainer.losses[-1] if trainer.losses else float("nan"))
        result = trainer.run(on_step)
    if not trainer.accelerator.is_main_process:
        return
    command = (
        f"asesearch {'train' if schedule.is_full else 'finetune'}: {json.dumps(config.shareable())}"
    )
    save_backbone(
        result.backbone.cpu(), out, {"exit_schedule": schedule.to_json(), "made_by": command}
    )
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
