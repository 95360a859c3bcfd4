"""The command line: parse, call, print. Results go to stdout, progress and errors to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from typer.core import TyperGroup

from asesearch import __version__
from asesearch.config import StudyConfig, load_study
from asesearch.errors import AseSearchError, ConfigError
from asesearch.schedule import ExitSchedule

if TYPE_CHECKING:
    from asesearch.search import Workbench
    from asesearch.study import Study
    from asesearch.study.records import StudyResults, TrialRecord


class _Program(TyperGroup):
    """The commands: --debug may stand anywhere on the line, and Ctrl-C is answered in one line."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take --debug out, which `main` looks for itself."""
        end = args.index("--") if "--" in args else len(args)
        return super().parse_args(ctx, [a for a in args[:end] if a != "--debug"] + args[end:])

    def invoke(self, ctx: Any) -> Any:
        """Run the command; Ctrl-C outside of `_interruptible` comes before any work."""
        with _interruptible("its work had not begun; give the same command again"):
            return super().invoke(ctx)


@contextmanager
def _interruptible(kept: str | Callable[[], str]) -> Iterator[None]:
    """On Ctrl-C say in one line what is kept, and exit with 130 as shells expect."""
    try:
        yield
    except KeyboardInterrupt:
        _say(f"interrupted: {kept if isinstance(kept, str) else kept()}")
        raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Program,
    help="Search early-exit schedules for diffusion transformers: search, look at the front, pick "
    "a point, ship it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

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
    typer.Option(
        "--dry-run", help="Print the resolved plan with its cost estimate as JSON, and stop."
    ),
]
SCHEDULE = typer.Option(
    "--schedule",
    help='Blocks per equal interval, data side first ("12 12 9 6"), with the ends of unequal ones '
    '("12 9 @ 0 300 1000"), a published name ("D3-DiT"), a file (.json), or "full".',
)
ScheduleText = Annotated[str, SCHEDULE]


DEBUG_HELP = "Show the traceback of an error; may stand anywhere on the line."


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"asesearch {__version__}")
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option("--version", callback=_version, is_eager=True, help="Print the release and stop."),
]


@app.callback()
def _main(
    debug: Annotated[bool, typer.Option("--debug", help=DEBUG_HELP)] = False,
    version: Version = False,
) -> None:
    pass  # --debug is read by `main`, which catches the errors


def _print(data: Any) -> None:
    text = json.dumps(data, indent=1, ensure_ascii=False)
    # a path may hold bytes that are not UTF-8
    typer.echo(text.encode("utf-8", "backslashreplace").decode("utf-8"))


def _say(text: str) -> None:
    typer.echo(text, err=True)


@contextmanager
def _bar(total: int, what: str) -> Iterator[Callable[[int, float], None]]:
    """A progress bar on stderr; the callback takes (steps done, loss)."""
    with tqdm(total=total, desc=what, file=sys.stderr, dynamic_ncols=True, leave=False) as bar:

        def on_step(done: int, loss: float) -> None:
            bar.update(done - bar.n)
            bar.set_postfix(loss=f"{loss:.4f}")

        yield on_step


def _schedule(text: str, depth: int, chain: int) -> ExitSchedule:
    if text.lower().endswith(".json"):
        return ExitSchedule.read(text, depth, chain)
    return ExitSchedule.from_string(text, depth, chain)


@app.command()
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


@app.command()
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
    schedule = _schedule(schedule_text, backbone.depth, config.diffusion.num_train_timesteps)
    trainer = Trainer(
        backbone, data, diffusion, schedule, config.train, None if dry_run else run_dir
    )
    check_readable(data)
    if dry_run:
        step_s = seconds_per_step(trainer)
        _print(
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
        _say(f"resuming at step {trainer.resumed_at} of {config.train.num_steps}")
    every = f"one every {config.train.checkpoint_every} steps"
    kept = f"the last checkpoint ({every}) is kept in {run_dir}; the same command resumes from it"
    with _interruptible(kept), _bar(config.train.num_steps, "train") as on_step:
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
    _print(
        {
            "weights": str(out),
            "steps": config.train.num_steps,
            "mean_loss_of_last_steps": sum(last) / len(last) if last else None,
            "loss_weight_ended_at": result.weight_ended_at,
            "seconds": round(result.seconds, 1),
        }
    )


@app.command()
def sample(
    bundle: Annotated[Path, typer.Argument(help="Bundle that `asesearch export` wrote.")],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Picture grid (.png), or all images as an array (.npz)."),
    ],
    num: Annotated[int, typer.Option(min=1, help="Number of images.")] = 64,
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
    dry_run: DryRun = False,
) -> None:
    """Sample images from a bundle with its network, schedule and solver.

    A bundle of a latent network needs --vae for images; without it the .npz holds `latents`,
    float32.
    """

    from asesearch.backbones.base import Conditioning
    from asesearch.data import save_images
    from asesearch.deployment.bundle import load_bundle
    from asesearch.evaluation.fidelity import to_uint8
    from asesearch.files import check_writable
    from asesearch.search.opening import default_device

    if out.suffix not in (".png", ".npz"):
        raise ConfigError(f"images are written as .png or .npz; got {out}; change --out")
    if (prompt is None) != (text_encoder is None) or (prompt is not None and label is not None):
        raise ConfigError(
            "--prompt goes with --text-encoder and without --label; got another combination; "
            "correct it"
        )
    check_writable(out)
    loaded = load_bundle(bundle, default_device())
    if loaded.latents is not None and vae is None and out.suffix == ".png":
        raise ConfigError(
            "this bundle makes latents, and a picture needs --vae; got none; give it, or write .npz"
        )
    decoder = None if vae is None else loaded.decoder(vae)
    y: Conditioning | None = None if label is None else loaded.labels(label, num)
    if prompt is not None and text_encoder is not None:
        y = loaded.encode_prompts([prompt] * num, text_encoder)
    how, calls = loaded.plan(range(seed, seed + num), y, steps)
    plan = {
        "schedule": str(loaded.schedule),
        "sampling": how.model_dump(mode="json"),
        "num": num,
        "block_frac": loaded.schedule.block_frac(calls),
    }
    if dry_run:
        _print(plan)
        return
    with _interruptible(f"no image was written to {out}; the same command begins again"):
        result = loaded.sample(range(seed, seed + num), y, steps)
    if loaded.latents is not None and decoder is None:
        save_images(result.images.numpy(), out, "latents")
    else:
        save_images(
            to_uint8(result.images if decoder is None else decoder.decode(result.images)).numpy(),
            out,
        )
    _print(
        {
            **plan,
            "out": str(out),
            "nfe": result.nfe,
            "block_calls": result.block_calls,
            "seconds": round(result.seconds, 3),
        }
    )


@app.command()
def evaluate(
    run_dir: RunDir,
    trial: Annotated[
        int | None,
        typer.Option(help="Trial to evaluate; default: the pretrained network as it is."),
    ] = None,
    schedule: Annotated[str | None, SCHEDULE] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Compare with the figure on record for --trial; exit 1 if it can't be reproduced.",
        ),
    ] = False,
    storage: Storage = None,
    dry_run: DryRun = False,
) -> None:
    """Measure quality under the study's protocol: a trial's weights again, or the pretrained ones
    under any schedule."""
    from asesearch.backbones.base import check_schedule
    from asesearch.point import Point
    from asesearch.search import Workbench
    from asesearch.search.confirmation import load_trial
    from asesearch.study import Study
    from asesearch.study.reproduce import compare

    if check and trial is None:
        raise ConfigError(
            "--check compares with the figure of a trial; got no --trial; give its number"
        )
    if trial is not None and schedule is not None:
        raise ConfigError(
            f"a trial has its own schedule; got --trial {trial} with --schedule; leave one out"
        )
    study = Study.open(run_dir, storage)
    bench = Workbench(study.config, run_dir)
    record = None if trial is None else study.record(trial)
    if record is None:
        net = bench.backbone
        depths = _schedule(schedule or "full", bench.backbone.depth, bench.full.num_train_timesteps)
        check_schedule(net, bench.full.num_train_timesteps, depths)
        point = Point(depths, bench.own_sampler)
    else:
        net = load_trial(study, record, bench.device)
        point = record.point
    chosen = {"schedule": str(point.schedule), "sampler": str(point.sampler)}
    if dry_run:
        _print({**chosen, "protocol": vars(bench.protocols.search)})
        return
    with _interruptible("a figure that is not complete is not kept; the same command begins again"):
        quality, seconds = bench.evaluate(net, point, bench.protocols.search)
    result: dict[str, Any] = {
        "metric": bench.protocols.search.metric_name,
        "value": quality.value,
        "std_error": quality.std_error,
    }
    result |= {
        **chosen,
        "sampling_seconds": round(seconds["sample"], 2),
        **quality.to_dict(),
    }
    if check:
        assert record is not None and record.quality is not None
        result["check"] = compare(record.quality, quality)
    _print(result)
    if check and not result["check"]["reproduced"]:
        raise typer.Exit(1)


@app.command()
def search(
    study: StudyFile,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Study directory; default runs/NAME.")
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(help="Schedules in all, in place of the study's search.num_trials."),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Wall time in place of a number of trials: 90m, 2h, 1d.")
    ] = None,
    storage: Annotated[
        str | None, typer.Option(help="Optuna storage URL; default a SQLite file in the directory.")
    ] = None,
    report_dir: Annotated[
        Path | None, typer.Option("--report", help="Report folder; default reports/NAME.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Search exit schedules: fine-tune, sample and evaluate each, confirm the front on fresh seeds,
    write the report.

    With --budget, warm-up, trials and confirmation together take that wall time, within a tenth:
    the time in which at least one worker is at work, in earlier runs too.
    Ctrl-C or a crash loses at most the trial in flight; the same command resumes, and with more
    --trials it continues.
    Several processes may share one study: give all the same file, --out, and a --storage that all
    can reach. They share out trials and confirmation; one that has nothing else to do waits for the
    others and says so.
    """
    from asesearch.report.page import check_report_dir
    from asesearch.search import Workbench, preflight
    from asesearch.search.plan import make_plan
    from asesearch.study import Study
    from asesearch.study.directory import check_study_dir
    from asesearch.study.storage import parse_url

    if trials is not None and budget is not None:
        raise ConfigError(
            f"give --trials or --budget, not both; got {trials} and {budget}; leave one out"
        )
    config = load_study(study).with_options(
        "search", num_trials=trials, budget=budget, storage=storage
    )
    if trials is not None:
        config = config.model_copy(
            update={"search": config.search.model_copy(update={"budget": None})}
        )
    if config.search.storage is not None:
        parse_url(config.search.storage)
    run_dir = out or Path("runs") / config.name
    report_to = report_dir or Path("reports") / config.name
    check_study_dir(run_dir, config.search.storage)
    if report_to.resolve() in (run_dir.resolve(), *run_dir.resolve().parents):
        raise ConfigError(
            f"the report goes beside the study or into it; got {report_to} for the study in "
            f"{run_dir}, which it would have to replace; change --report"
        )
    check_report_dir(report_to)
    bench = Workbench(config, None if dry_run else run_dir)
    found = preflight(bench, run_dir)
    if dry_run:
        protocols = {
            name: {**vars(p), "metric_name": p.metric_name}
            for name, p in bench.protocols.named.items()
        }
        _print(
            {
                "study": config.shareable(),
                "protocol": vars(bench.protocols.search),
                "protocols": protocols,
                "preflight": found.to_dict(),
                "plan": make_plan(bench).to_dict(),
            }
        )
        return
    opened = Study(config, run_dir)
    _say(make_plan(bench).line())
    with _interruptible(lambda: _on_record(opened)):
        _print(_search(opened, bench, report_to))


def _on_record(study: Study) -> str:
    """What an interrupted search has kept."""
    of = "" if study.config.search.budget else f" of {study.config.search.num_trials}"
    return f"{study.run_dir} keeps {len(study.records())}{of} schedules; the same command resumes"


def _search(opened: Study, bench: Workbench, report_to: Path) -> dict[str, Any]:
    """Search, confirm, report; what `search` prints."""
    from asesearch.report import write_report
    from asesearch.search import confirm, run_trials

    config = opened.config
    run_dir = opened.run_dir
    total = None if config.search.budget else config.search.num_trials
    done = len(opened.records())
    if done:
        _say(f"{run_dir}: {done} of {total or 'unlimited'} schedules on record; continuing")
    with (
        tqdm(
            total=total,
            initial=min(done, total or done),
            desc="search",
            file=sys.stderr,
            dynamic_ncols=True,
        ) as bar,
        logging_redirect_tqdm(),  # a line about waiting goes above the bar
    ):
        bench.trials.on_step = lambda step, loss: bar.set_postfix_str(
            f"step {step} loss {loss:.4f}"
        )

        def on_trial(record: TrialRecord) -> None:
            bar.update()
            bar.write(_trial_line(record), file=sys.stderr)

        run_trials(
            opened,
            bench,
            on_trial,
            lambda step, loss: bar.set_postfix_str(f"warm-up {step} loss {loss:.4f}"),
        )
    _say("confirming the front on fresh seeds")
    confirm(
        opened,
        bench,
        lambda c: _say(
            f"trial {c.number}: {c.quality.value:.4g} at {c.measured_time_frac:.3f} measured"
        ),
    )
    results = opened.results()
    page = write_report(results, report_to)
    return {"study": str(run_dir), "report": str(page), "front": _front(results)}


def _front(results: StudyResults) -> list[dict[str, Any]]:
    """The front of the report: of confirmed scores and measured times where there are any.

    `confirmed` says which; without it the score is the search's and the time predicted.
    """
    from asesearch.report.tables import front

    rows = front(results).to_dict("records")
    return [
        {
            "trial": int(row["number"]),
            "schedule": row["schedule"],
            "sampler": row["sampler"],
            "confirmed": row["kind"] == "confirmed",
            "quality": row["quality"],
            "std_error": None if isnan(row["std_error"]) else row["std_error"],
            "time_frac": row["time_frac"],
        }
        for row in rows
    ]


def _trial_line(record: TrialRecord) -> str:
    """One line about a trial that has ended."""
    point = f"trial {record.number} ({record.origin}) {record.point}"
    if record.quality is not None:
        return f"{point}: {record.quality.value:.4g} at {record.time_frac:.3f} of the time"
    if record.cheap is not None and record.failure is None:
        return (
            f"{point}: cheap figure {record.cheap.quality.value:.4g}, {record.cheap.reason}: "
            "not fine-tuned"
        )
    return f"{point}: {record.failure}"


@app.command()
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
        _print(
            {
                "trials": len(results.records),
                "confirmed": len(results.confirmations),
                "out": str(folder),
            }
        )
        return
    with _interruptible(f"{folder} is as it was, or the same command completes it"):
        page = write_report(results, folder)
    _print({"report": str(page)})


@app.command("map")
def map_command(
    study: StudyFile,
    weights: Annotated[
        Path | None,
        typer.Option(
            help="Weights to measure against the study's own network, in place of that network "
            "itself."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to write; default reports/NAME-map.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Measure the difficulty map: the error of every exit depth at every noise level, in one pass,
    without sampling.

    Where few blocks already come close to the full network, an exit schedule may be shallow. The
    network may be trained or not. The images are those of [map.data], or else the study's: give
    some it was not trained on.
    """
    from asesearch.backbones.checkpoints import load_backbone
    from asesearch.data import open_data
    from asesearch.diffusion import make_diffusion
    from asesearch.files import check_writable
    from asesearch.report.difficulty import write_map
    from asesearch.search.mapping import map_seconds, measure_map
    from asesearch.search.opening import default_device

    config = load_study(study)
    folder = out or Path("reports") / f"{config.name}-map"
    device = default_device()
    check_writable(folder, "map.json")
    data = open_data(config.map.data or config.data)
    diffusion = make_diffusion(config.diffusion)
    null = getattr(data, "null_condition", None)
    backbone = load_backbone(config.backbone, config.train.seed, null).to(device)
    reference = None
    names = {
        "weights": config.backbone.checkpoint or f"random, seed {config.train.seed}",
        "reference": "itself",
    }
    if weights is not None:
        if config.backbone.checkpoint is not None:
            reference = backbone
            names["reference"] = config.backbone.checkpoint
        given = config.backbone.model_copy(update={"checkpoint": str(weights)})
        backbone = load_backbone(given, null_condition=null).to(device)
        names["weights"] = str(weights)
    parts = (backbone, data, diffusion, config.map, reference)
    facts = {
        **names,
        "data": data.name,
        "num_images": config.map.num_images,
        "num_bins": config.map.num_bins,
    }
    if dry_run:
        _print(
            {**facts, "out": str(folder), "estimate": {"total_s": round(map_seconds(*parts), 2)}}
        )
        return
    bar = tqdm(
        total=config.map.num_bins, desc="map", file=sys.stderr, dynamic_ncols=True, leave=False
    )
    kept = (
        f"the map was not complete, so nothing was written to {folder}; the same command "
        "begins again"
    )
    with _interruptible(kept), bar:
        found = measure_map(
            *parts, config.sampling.batch_size, lambda done, _: bar.update(done - bar.n)
        )
    files = [str(path) for path in write_map(found, folder)]
    ends = {"data": 0, "middle": found.num_bins // 2, "noise": found.num_bins - 1}
    means = {name: [float(f"{v:.4g}") for v in found.error_full[i]] for name, i in ends.items()}
    _print({**facts, "files": files, "error_by_exit_depth": means})


@app.command()
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
            help='Quality budget: "7.5", "+5%" over the full network, "ci" (not worse than it at '
            '95 % confidence), or "1se" '
            "(within one standard error)."
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
            "--early-exit and no such point on the front, the fastest of full depth.",
        ),
    ] = False,
    trial: Annotated[int | None, typer.Option(help="Export this trial instead of picking.")] = None,
    finetune_steps: Annotated[
        int | None, typer.Option(min=1, help="Fine-tune the point fully first, for so many steps.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the bundle if it exists.")
    ] = False,
    storage: Storage = None,
    dry_run: DryRun = False,
) -> None:
    """Pick a point of the front and write it as a bundle that samples anywhere."""
    from asesearch.deployment.bundle import check_bundle_dir
    from asesearch.deployment.export import check_export, evaluation_of
    from asesearch.deployment.export import export as write
    from asesearch.study import Study, pick_nearest
    from asesearch.study import pick as pick_point

    choosing = (pick, quality, time, early_exit or None, or_nearest or None)
    if trial is not None and any(option is not None for option in choosing):
        raise ConfigError(
            "--trial names the point to export, so nothing is picked; got it with --pick, "
            "--quality, --time, --early-exit or --or-nearest; leave out one or the other"
        )
    check_bundle_dir(out, overwrite=overwrite)
    opened = Study.open(run_dir, storage)
    if trial is not None:
        record = opened.record(trial)
    elif or_nearest:
        asked = pick or "best-quality", quality, time
        record, shortfall = pick_nearest(opened.results(), *asked, early_exit=early_exit)
        if shortfall:
            _say(shortfall)
    else:
        record = pick_point(
            opened.results(), pick or "best-quality", quality, time, early_exit=early_exit
        )
    chosen = {"trial": record.number, "origin": record.origin, "schedule": str(record.schedule)}
    chosen["sampler"] = str(record.sampler)
    check_export(opened, record, out, finetune_steps, overwrite=overwrite)
    if dry_run:
        _print({**chosen, "evaluation": evaluation_of(opened, record), "out": str(out)})
        return
    kept = f"no bundle was written to {out}"
    if finetune_steps is not None:
        kept += (
            "; the last checkpoint of the fine-tuning is kept, and the same command resumes from it"
        )
    options: dict[str, Any] = {"finetune_steps": finetune_steps, "overwrite": overwrite}
    with _interruptible(kept), _bar(finetune_steps or 0, "fine-tune") as on_step:
        folder = write(opened, record, out, on_step=on_step, **options)
    _print({**chosen, "bundle": str(folder)})


@app.command()
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
    from asesearch.config import DataConfig
    from asesearch.data.latents import LatentShards
    from asesearch.encoding import encode_folder
    from asesearch.files import check_writable
    from asesearch.search.opening import default_device

    if max_length is not None and captions is None:
        raise ConfigError(
            f"--max-length is for captions; got {max_length} without --captions; leave it out"
        )
    check_writable(out, "null-prompt.npy")
    bar = tqdm(
        desc="encode", file=sys.stderr, dynamic_ncols=True, leave=False, delay=0.5, disable=dry_run
    )
    with _interruptible(f"what is encoded is kept in {out}; the same command resumes"), bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        plan = encode_folder(
            DataConfig(
                kind="image-folder",
                path=str(folder),
                image_size=image_size,
                skip_damaged=skip_damaged,
            ),
            vae,
            out,
            captions=captions,
            text_encoder=text_encoder,
            batch_size=batch_size,
            flips=flips,
            device=default_device(),
            max_length=120 if max_length is None else max_length,
            dtype=dtype,
            progress=progress,
            dry_run=dry_run,
        )
    if plan is not None:
        _print(vars(plan))
        return
    shards = LatentShards(out, flip=flips, verify=verify)
    facts = {
        "latents": str(out),
        "images": len(shards),
        "shape": shards.shape,
        "classes": shards.num_classes,
    }
    _print({**facts, "prompts": shards.null_condition is not None, "verified": verify})


@app.command("train-extractor")
def train_extractor_command(
    out: Annotated[Path, typer.Option("--out", "-o", help="Weights to write (.safetensors).")],
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of the Fashion-MNIST IDX files, if not found by itself."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and batches.")] = 0,
) -> None:
    """Train the small classifier whose features measure grey images (the shipped `fashion-cnn` was
    made so)."""
    from asesearch.data import fashion_mnist
    from asesearch.evaluation.extractors import train_extractor
    from asesearch.files import check_writable

    if out.suffix != ".safetensors":
        raise ConfigError(f"weights are written as .safetensors; got {out}; change --out")
    check_writable(out)
    images = fashion_mnist("train", data)
    with _interruptible(f"no weights were written to {out}; the same command begins again"):
        accuracy = train_extractor(images, out, test=fashion_mnist("test"), seed=seed)
    _print({"weights": str(out), "test_accuracy": accuracy})


def main() -> None:
    """Entry point: asesearch's own errors become one line and exit code 1; wrong usage exits with
    2."""
    try:
        app()
    except AseSearchError as error:
        if "--debug" in sys.argv:
            raise
        with suppress(BrokenPipeError):
            _say(f"error: {error}")
        sys.exit(1)
