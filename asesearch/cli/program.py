"""The program: its commands, --debug, --version, and how errors end it."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from asesearch import __version__
from asesearch.cli import data, results, searching, training
from asesearch.cli.interruption import interruptible_command
from asesearch.cli.printing import say
from asesearch.errors import AseSearchError, is_out_of_memory, memory_told
from asesearch.files import printable

LONGEST = 120  # characters of a path in an error


class _Program(TyperGroup):
    """The commands: --debug may stand anywhere on the line, and Ctrl-C is answered in one line."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take --debug out, which `run` looks for itself."""
        end = args.index("--") if "--" in args else len(args)
        return super().parse_args(ctx, [a for a in args[:end] if a != "--debug"] + args[end:])

    def invoke(self, ctx: Any) -> Any:
        """Run the command; Ctrl-C outside of its work is answered too."""
        with interruptible_command():
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Program,
    help="Search early-exit schedules for diffusion transformers: search, look at the front, pick "
    "a point, ship it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


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
    pass  # --debug is read by `run`, which catches the errors


# in the order of the help
app.command("train")(training.train)
app.command("finetune")(training.finetune)
app.command("sample")(results.sample)
app.command("evaluate")(searching.evaluate)
app.command("recheck")(searching.recheck)
app.command("search")(searching.search)
app.command("report")(results.report)
app.command("compare")(results.compare)
app.command("map")(searching.map_)
app.command("pick")(results.pick)
app.command("export")(results.export)
app.command("convert")(results.convert)
app.command("verify")(results.verify)
app.command("latents")(data.latents)
app.command("train-extractor")(data.train_extractor_)


def run() -> None:
    """Run the command that was given; asesearch's own errors, and the system's, become one line and
    exit code 1."""
    # nothing is shown; a notebook's own backend, which its commands inherit, may not be here
    os.environ["MPLBACKEND"] = "agg"
    try:
        app()
    except (AseSearchError, OSError, RuntimeError, MemoryError) as error:
        known = isinstance(error, (AseSearchError, OSError)) or is_out_of_memory(error)
        if "--debug" in sys.argv or not known:
            raise
        with suppress(BrokenPipeError):
            say(f"error: {printable(_told(error))}")
        sys.exit(1)


def _told(error: Exception) -> str:
    """The line of an error; of what the system refuses, what it says of it."""
    if isinstance(error, AseSearchError):
        return str(error)
    if not isinstance(error, OSError):
        fewer = "take fewer images at a time (batch_size; of a bundle --batch-size)"
        fix = f"{fewer}, or end what else holds memory (asesearch --debug shows where)"
        return f"{memory_told(error)}; {fix}"
    if error.filename is None:
        reason = (error.strerror or str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        return f"the system refuses: {reason}; {_fix(error)}"
    path = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else ""
    shown = path if len(path) <= LONGEST else f"{path[:LONGEST]}… ({len(path)} characters)"
    return f"can't use {shown}: {error.strerror or error}; check the path and who may read it"


def _fix(error: OSError) -> str:
    """What to do about an error of the system that names no path."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space, and give the same command again"
    if "temporary directory" in str(error):
        return "set TMPDIR (for figures MPLCONFIGDIR too) to a folder that can be written"
    return "asesearch --debug shows where"
