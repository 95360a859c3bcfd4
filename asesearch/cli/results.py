"""`report`, `compare`, `pick`, `export`, `convert`, `sample` and `verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asesearch.cli.interruption import interruptible
from asesearch.cli.options import DryRun, ExportedVae, Format, RunDir, Storage
from asesearch.cli.printing import bar_of_steps, print_json, say
from asesearch.errors import ConfigError
from asesearch.files import real_path

if TYPE_CHECKING:
    from asesearch.study import Study, TrialRecord


def report(
    run_dir: RunDir,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Report folder; default reports/NAME.")
    ] = None,
    storage: Storage = None,
    dry_run: DryRun = False,
) -> None:
    """Write the report of a study: front, schedules, samples, cost, protocol; a page with figures
    and data beside it."""
    from asesearch.report import write_report
    from asesearch.report.page import check_report_dir
    from asesearch.study import Study

    opened = Study.open(run_dir, storage)
    folder = out or Path("reports") / opened.config.name
    check_report_dir(folder)
    results = opened.results()
    if dry_run:
        print_json(
            {
                "trials": len(results.records),
                "confirmed": len(results.confirmations),
                "out": str(folder),
            }
        )
        return
    with interruptible(f"{folder} is as it was, or the same command completes it"):
        page = write_report(results, folder)
    print_json({"report": str(page)})


def compare(
    studies: Annotated[
        list[Path], typer.Argument(help="Study directories, two or more (runs/NAME).")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    group: Annotated[
        list[str] | None,
        typer.Option(
            help="The group of each study, once per study in the same order: studies of one group "
            "are repeats of one method; default the study's name."
        ),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Lay the fronts of several studies over each other: hypervolume, attainment over repeats, and
    where each wins; a page with figures and data.

    Studies measured in different ways are refused. Reads records only.
    """
    from asesearch.report import compare as compare_studies
    from asesearch.report.folder import check_folder
    from asesearch.study import Study

    check_folder(out, "comparison")
    results = [Study.open(folder, takes_storage=False).results() for folder in studies]
    with interruptible(f"{out} is as it was, or the same command completes it"):
        found = compare_studies(results, None if dry_run else out, group)
    say(str(found))
    where = "out" if dry_run else "comparison"
    print_json({**found.to_dict(), where: str(out / "index.html")})


def pick(
    run_dir: RunDir,
    quality: Annotated[
        str,
        typer.Option(help='Quality budget of the fastest point: "7.5", "+5%", "ci" or "1se".'),
    ] = "+5%",
    time: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="Time budget of the best point, relative to the full network's."
        ),
    ] = 0.75,
    early_exit: Annotated[
        bool,
        typer.Option(
            "--early-exit", help="Only schedules that exit early, not full depth in fewer steps."
        ),
    ] = False,
    storage: Storage = None,
) -> None:
    """Say which point of the front to take: the fastest within a quality budget, the best within a
    time budget, and the knee; and which points can't be told apart from each.

    In words on stderr and as JSON on stdout. Reads records only.
    """
    from asesearch.study import Study, answers
    from asesearch.study.picking import told_unconfirmed

    results = Study.open(run_dir, storage).results()
    found = answers(results, quality, time, early_exit=early_exit)
    if told := told_unconfirmed(results):
        say(told)
    for answer in found:
        say(str(answer))
    print_json([answer.to_dict() for answer in found])


def _check_choice(trial: int | None, picking: tuple[object, ...]) -> None:
    """Refuse a trial beside options that pick one."""
    if trial is not None and any(option is not None for option in picking):
        raise ConfigError(
            "--trial names the point to export, so nothing is picked; got it with --pick, "
            "--quality, --time, --early-exit or --or-nearest; leave out one or the other"
        )


def export(
    run_dir: RunDir,
    out: Annotated[Path, typer.Option("--out", "-o", help="Bundle folder to write.")],
    pick: Annotated[
        str | None,
        typer.Option(
            help="best-quality (the default), fastest-within (needs --quality) or best-within "
            "(needs --time): by confirmed scores where there are any."
        ),
    ] = None,
    quality: Annotated[
        str | None,
        typer.Option(
            help='Quality budget: "7.5", "+5%" over the full network, "ci" (not shown to be worse '
            'at 95 % confidence), or "1se" (within one standard error).'
        ),
    ] = None,
    time: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Time budget, as a fraction of the full network's."),
    ] = None,
    early_exit: Annotated[
        bool,
        typer.Option(
            "--early-exit",
            help="Pick among schedules that exit early, not full depth in fewer steps.",
        ),
    ] = False,
    or_nearest: Annotated[
        bool,
        typer.Option(
            "--or-nearest",
            help="Where nothing is within the budget, take the nearest point and say so; with "
            "--early-exit and no such point on the front, the one of full depth.",
        ),
    ] = False,
    trial: Annotated[int | None, typer.Option(help="Export this trial instead of picking.")] = None,
    finetune_steps: Annotated[
        int | None, typer.Option(min=1, help="Fine-tune the point fully first, for so many steps.")
    ] = None,
    format: Format = "bundle",
    vae: ExportedVae = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the bundle if it exists.")
    ] = False,
    storage: Storage = None,
    dry_run: DryRun = False,
) -> None:
    """Pick a point of the front and write it as a bundle that samples anywhere."""
    from asesearch.deployment.export import plan_export
    from asesearch.deployment.writing import check_bundle_dir
    from asesearch.study import Study
    from asesearch.study.picking import pick_and_tell

    _check_choice(trial, (pick, quality, time, early_exit or None, or_nearest or None))
    check_bundle_dir(out, overwrite=overwrite)
    opened = Study.open(run_dir, storage)
    if trial is not None:
        record = opened.record(trial)
    else:
        rule = "best-quality" if pick is None else pick
        record, told = pick_and_tell(
            opened.results(), rule, quality, time, early_exit=early_exit, or_nearest=or_nearest
        )
        for line in told:
            say(line)
    options: dict[str, Any] = {"format": format, "vae": vae, "overwrite": overwrite}
    if dry_run:
        print_json(plan_export(opened, record, out, finetune_steps, **options))
        return
    folder = _export(opened, record, out, finetune_steps, **options)
    print_json({**record.described(), "format": format, "bundle": str(folder)})


def _export(
    study: Study, record: TrialRecord, out: Path, finetune_steps: int | None, **options: Any
) -> Path:
    """Write the bundle, with a bar for its fine-tuning."""
    from asesearch.deployment.export import export as write

    kept = f"no bundle was written to {out}"
    if finetune_steps is not None:
        kept += (
            "; the last checkpoint of the fine-tuning is kept, and the same command resumes from it"
        )
    hidden = finetune_steps is None
    with (
        interruptible(kept),
        bar_of_steps(finetune_steps or 0, "fine-tune", hidden=hidden) as on_step,
    ):
        return write(study, record, out, finetune_steps=finetune_steps, on_step=on_step, **options)


def convert(
    bundle: Annotated[
        Path, typer.Argument(help="Bundle that `asesearch export` wrote, of the format bundle.")
    ],
    format: Format,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    vae: ExportedVae = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the folder if it is an exported one.")
    ] = False,
) -> None:
    """Write a bundle in another format."""
    from asesearch.deployment import formats
    from asesearch.deployment.reading import load_bundle
    from asesearch.deployment.writing import check_bundle_dir

    if real_path(out) == real_path(bundle):
        raise ConfigError(
            f"a bundle in another format is another folder; got {out} for both, which would take "
            "the bundle's place; change --out"
        )
    check_bundle_dir(out, overwrite=overwrite)
    loaded = load_bundle(bundle)
    with interruptible(f"nothing was written to {out}"):
        folder = formats.write(loaded, out, format, vae=vae, overwrite=overwrite)
    print_json({"schedule": str(loaded.schedule), "format": format, "out": str(folder)})


def sample(
    bundle: Annotated[
        Path, typer.Argument(help="Bundle that `asesearch export` wrote, of the format bundle.")
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Picture grid (.png), or all images as an array (.npz)."),
    ],
    num: Annotated[
        int,
        typer.Option(
            min=1, help="Number of images; of fewer than classes, those of the first classes."
        ),
    ] = 64,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the first image; the others count up.")
    ] = 0,
    label: Annotated[
        int | None, typer.Option(help="Class of all images, from 0; default: all classes in turn.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Text of all images; default: the bundle's examples in turn.")
    ] = None,
    text_encoder: Annotated[
        Path | None, typer.Option(help="Folder of the text encoder that --prompt needs.")
    ] = None,
    vae: Annotated[
        Path | None,
        typer.Option(help="Folder of the VAE that turns latents into images; .npz needs none."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Solver steps, in place of the bundle's.")
    ] = None,
    compile: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Run the network's blocks as compiled code, or not; default as the bundle says. "
            "The first call takes seconds more.",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Images that go through the network together; default as the bundle says. Fewer "
            "take less memory.",
        ),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Sample images from a bundle with its network, schedule and solver.

    A bundle of a latent network needs --vae for images; without it the .npz holds `latents`,
    float32.
    """
    from asesearch.deployment.images import BundleImages

    images = BundleImages(
        bundle,
        out,
        num,
        seed=seed,
        label=label,
        prompt=prompt,
        text_encoder=text_encoder,
        vae=vae,
        num_steps=steps,
        compile=compile,
        batch_size=batch_size,
    )
    if dry_run:
        print_json(images.plan)
        return
    with interruptible(f"no image was written to {out}; the same command begins again"):
        result = images.sample()
        images.write(result)
    print_json(images.told(result))


def verify(
    bundle: Annotated[Path, typer.Argument(help="Folder that `asesearch export` wrote.")],
    speed: Annotated[
        bool,
        typer.Option("--speed/--no-speed", help="Time it against the full network; about 20 s."),
    ] = True,
    compile: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Of a bundle, run the network's blocks as compiled code, or not; default as the "
            "bundle says.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Check an exported folder on this machine: file hashes, network, outputs against those on
    record, and measured speed beside what its blocks promise.

    Exit code 0 if all is as it should be, else 1.
    """
    from asesearch.deployment.verify import verify as look

    with interruptible("nothing was changed"):
        checks = look(bundle, speed=speed, compile=compile)
    if as_json:
        print_json([check.to_dict() for check in checks])
    else:
        for check in checks:
            typer.echo(f"{check.name:8} {'ok' if check.passed else 'FAILED':7} {check.found}")
    if not all(check.passed for check in checks):
        raise typer.Exit(1)
