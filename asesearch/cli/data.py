"""`latents` and `train-extractor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from asesearch.cli.interruption import interruptible
from asesearch.cli.options import DryRun
from asesearch.cli.printing import bar_of_parts, print_json
from asesearch.errors import ConfigError


def latents(
    folder: Annotated[Path, typer.Argument(help="Image folder: class subfolders, or flat.")],
    vae: Annotated[
        Path, typer.Option(help="Folder of a diffusers AutoencoderKL, or of a pipeline with one.")
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder to write, for data of kind 'latents'.")
    ],
    image_size: Annotated[
        int, typer.Option(min=1, help="Side of the centre crop that is encoded, in pixels.")
    ],
    captions: Annotated[
        Path | None, typer.Option(help='JSON Lines with "file_name" and "text" of every image.')
    ] = None,
    text_encoder: Annotated[
        Path | None, typer.Option(help="Folder of the text encoder that --captions needs.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens per caption; default 120, as PixArt-α's.")
    ] = None,
    flips: Annotated[
        bool, typer.Option("--flips/--no-flips", help="Encode the mirror images too.")
    ] = True,
    skip_damaged: Annotated[
        bool, typer.Option("--skip-damaged", help="Leave out images that can't be read.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a pass.")] = 32,
    dtype: Annotated[
        str, typer.Option(help="Of the stored numbers: float16 or float32.")
    ] = "float16",
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all files again in the end; compare SHA-256.")
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Encode an image folder once through a VAE, and captions through a text encoder. Killed runs
    resume."""
    from asesearch.backbones.device import default_device
    from asesearch.config import DataConfig
    from asesearch.data import refuse_among_data
    from asesearch.encoding import encode_folder
    from asesearch.encoding.folder import encoded_facts
    from asesearch.encoding.networks import MAX_LENGTH
    from asesearch.files import check_writable

    if max_length is not None and captions is None:
        raise ConfigError(
            f"--max-length is for captions; got {max_length} without --captions; leave it out"
        )
    images = DataConfig(
        kind="image-folder", path=str(folder), image_size=image_size, skip_damaged=skip_damaged
    )
    refuse_among_data([images], out, "--out")
    check_writable(out, "null-prompt.npy")
    kept = f"what is encoded is kept in {out}; the same command resumes"
    with interruptible(kept):
        with bar_of_parts("encode", hidden=dry_run) as progress:
            plan = encode_folder(
                images,
                vae,
                out,
                captions=captions,
                text_encoder=text_encoder,
                batch_size=batch_size,
                flips=flips,
                device=default_device(),
                max_length=MAX_LENGTH if max_length is None else max_length,
                dtype=dtype,
                progress=progress,
                dry_run=dry_run,
            )
        facts = encoded_facts(out, flips, verify) if plan is None else vars(plan)
    print_json(facts)


def train_extractor_(
    out: Annotated[Path, typer.Option("--out", "-o", help="Weights to write (.safetensors).")],
    name: Annotated[
        str, typer.Option(help="Which of the shipped ones: fashion-cnn or fashion-vit.")
    ] = "fashion-cnn",
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of the Fashion-MNIST IDX files, if not found by itself."),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Seed of weights and batches.")
    ] = 0,
) -> None:
    """Train a small classifier whose features measure grey images (the shipped `fashion-cnn` and
    `fashion-vit` were made so)."""
    from asesearch.data import fashion_mnist
    from asesearch.evaluation.classifiers import train_extractor
    from asesearch.evaluation.extractors import SHIPPED_CLASSIFIERS
    from asesearch.files import check_weights_file

    if name not in SHIPPED_CLASSIFIERS:
        raise ConfigError(f"--name must be one of {', '.join(SHIPPED_CLASSIFIERS)}; got {name!r}")
    check_weights_file(out)
    images = fashion_mnist("train", data)
    with interruptible(f"no weights were written to {out}; the same command begins again"):
        accuracy = train_extractor(
            SHIPPED_CLASSIFIERS[name], images, out, test=fashion_mnist("test"), seed=seed
        )
    print_json({"weights": str(out), "test_accuracy": accuracy})
