"""Arguments and options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

StudyFile = Annotated[
    Path,
    typer.Argument(
        help="Study file (TOML): network, data, training, sampling, evaluation, search."
    ),
]
RunDir = Annotated[
    Path, typer.Argument(help="Study directory that `asesearch search` wrote (runs/NAME).")
]
Storage = Annotated[
    str | None,
    typer.Option(
        help="The study's Optuna storage URL; default the one on record, which is without its "
        "password."
    ),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Check everything, print as JSON what would be done, and stop."),
]
Format = Annotated[
    str,
    typer.Option(
        "--format",
        help="bundle; diffusers, a pipeline folder (DiT); onnx, for onnxruntime (DiT and U-ViT; "
        "needs the extra onnx); or aoti, a bundle with its block compiled for this machine's CPU "
        "(DiT and U-ViT; needs g++).",
    ),
]
ExportedVae = Annotated[
    Path | None,
    typer.Option(
        "--vae", help="With the format diffusers: folder of the VAE that decodes the latents."
    ),
]
SCHEDULE = typer.Option(
    "--schedule",
    help='Blocks per equal interval, data side first ("12 12 9 6"), with the ends of unequal ones '
    '("12 9 @ 0 300 1000"), a published name ("D3-DiT"), a file (.json), or "full".',
)
ScheduleText = Annotated[str, SCHEDULE]
