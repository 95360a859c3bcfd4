"""What `make search` runs: choose the study, search, export, sample.

    python studies/make_search.py [STUDY [WORKERS]]

Without STUDY it is the quick one, or the small one where this machine would need long for it.
Without WORKERS two share out a shipped study, each with half of the CPU cores; one does where there
is a GPU or a single core, or for any other study. Each command is shown as it begins; the first
that fails ends it with its exit code, and the same `make search` goes on from there.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

QUICK = Path("studies/fashion-mnist-quick.toml")
SMALL = Path("studies/fashion-mnist-small.toml")
LIMIT_MIN = 20
PICK = ["--pick", "fastest-within", "--quality", "+25%", "--early-exit", "--or-nearest"]
GPU_TOOLS = ("nvidia-smi", "rocm-smi")  # there where a GPU's driver is


def say(text: str) -> None:
    """A line on stderr, where progress goes."""
    print(text, file=sys.stderr, flush=True)


# -- commands ------------------------------------------------------------------------------------


def show(*args: str | Path, more: str = "") -> None:
    """The command line that begins."""
    say(f"\n$ asesearch {shlex.join(map(str, args))}{more}")


def begin(
    *args: str | Path, threads: int, said: IO[str] | int | None = None
) -> subprocess.Popen[str]:
    """Start a command of asesearch.

    Args:
        args: of its command line.
        threads: of its arithmetic; 0 leaves them to PyTorch.
        said: where its progress goes; by default where this program's goes.
    """
    env = dict(os.environ)
    # what was installed without bytecode would be compiled again by every command
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    if threads:
        env["OMP_NUM_THREADS"] = str(threads)
    words = [sys.executable, "-m", "asesearch", *map(str, args)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=said, text=True, env=env)


def result(command: subprocess.Popen[str]) -> dict[str, Any]:
    """Wait for a command; the JSON that it prints.

    Ends this process with the command's exit code if it fails.
    """
    out, _ = command.communicate()
    if command.returncode:
        sys.exit(command.returncode if command.returncode > 0 else 128 - command.returncode)
    found: dict[str, Any] = json.loads(out)
    return found


def asesearch(*args: str | Path) -> dict[str, Any]:
    """Run a command; see `result`."""
    show(*args)
    return result(begin(*args, threads=0))


# -- workers -------------------------------------------------------------------------------------


def num_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_workers() -> int:
    """Two on a CPU of several cores: networks as small as the shipped one are trained hardly faster
    by a second thread."""
    return 2 if num_cores() > 1 and not any(map(shutil.which, GPU_TOOLS)) else 1


def threads_each(workers: int) -> int:
    """Threads of each of several workers: its share of the cores, and no more than OMP_NUM_THREADS;
    0 for a single worker."""
    if workers == 1:
        return 0
    share = max(1, num_cores() // workers)
    given = os.environ.get("OMP_NUM_THREADS", "")
    return min(share, int(given)) if given.isdigit() and int(given) else share


@contextmanager
def further_workers(study: Path, workers: int) -> Iterator[None]:
    """All workers of a search but the first, while that is at work and until they have ended.

    They say nothing, but what ended one that fails is said, and the others go on. Where the first
    fails, or is interrupted, they are interrupted too.
    """
    with ExitStack() as open_files:
        begun = []
        try:
            for _ in range(workers - 1):
                said = open_files.enter_context(
                    tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
                )
                worker = begin("search", study, threads=threads_each(workers), said=said)
                begun.append((worker, said))
            yield
        except BaseException:
            for worker, _ in begun:
                worker.send_signal(signal.SIGINT)
                worker.communicate()
            raise
        for worker, said in begun:
            worker.communicate()
            said.seek(0)
            if worker.returncode:
                lines = said.read().replace("\r", "\n").strip().split("\n")
                say(f"a further worker ended with exit code {worker.returncode}: {lines[-1]}")


def search(study: Path, workers: int) -> dict[str, Any]:
    """What the first worker of a search prints."""
    show("search", study, more=f"  ({workers} workers)" if workers > 1 else "")
    return result(begin("search", study, threads=threads_each(workers)))


# -- the study -----------------------------------------------------------------------------------


def needed_min(study: Path, workers: int) -> float:
    """Minutes that a study is expected to take here, measured by all its workers at once.

    The full network is fine-tuned beside the warm-up where there are several; what follows is
    shared out.
    """
    show("search", study, "--dry-run", more=f"  ({workers} at once)" if workers > 1 else "")
    threads = threads_each(workers)
    heard = [None, *[subprocess.DEVNULL] * (workers - 1)]  # what is wrong is said once
    begun = [begin("search", study, "--dry-run", threads=threads, said=said) for said in heard]
    plans = [result(command)["plan"] for command in begun]
    if workers == 1:
        return float(plans[0]["expected_s"]) / 60
    return max(_shared_s(plan, workers) for plan in plans) / 60


def _shared_s(plan: dict[str, float], workers: int) -> float:
    """Seconds of a plan, which is one worker's, where several share it out."""
    warm_up = plan["elastic_s"] + plan["map_s"]
    rest = plan["expected_s"] - warm_up - plan["full_s"]
    return max(warm_up, plan["full_s"]) + rest / workers


def choose(workers: int) -> Path:
    """The study that was begun already; else the quick one, or the small one where it takes
    long."""
    for study in (QUICK, SMALL):
        if (Path("runs") / study.stem / "study.json").is_file():
            say(f"{study} was begun here (runs/{study.stem}): going on with it")
            if study == SMALL:
                say(f"the longer one: make search STUDY={QUICK}")
            return study
    say("measuring how long the search will take on this machine, as busy as it is at the moment")
    needed = needed_min(QUICK, workers)
    if needed <= LIMIT_MIN:
        say(f"searching {QUICK}: about {needed:.0f} minutes")
        return QUICK
    say(
        f"{QUICK} would take about {needed:.0f} minutes here, more than {LIMIT_MIN}, so {SMALL} is "
        "searched in its place"
    )
    say(f"the longer one: make search STUDY={QUICK}")
    return SMALL


def main(study: str, workers: str) -> None:
    """Search `study`, or the one that fits this machine if empty; export a point and sample it."""
    signal.signal(signal.SIGINT, lambda *_: None)  # the running command ends itself on Ctrl-C
    shipped = not study or Path(study) in (QUICK, SMALL)
    if workers and not (workers.isdigit() and int(workers)):
        sys.exit(f"WORKERS must be a positive integer; got {workers!r}; leave it out or give one")
    count = int(workers) if workers else default_workers() if shipped else 1
    chosen = Path(study) if study else choose(count)
    with further_workers(chosen, count):
        found = search(chosen, count)
        print(json.dumps(found, indent=1, ensure_ascii=False), flush=True)
        folder = Path(found["study"])
        bundle, images = folder / "bundle", folder / "bundle-samples.png"
        picked = asesearch("export", folder, *PICK, "--out", bundle, "--overwrite")
        vae = tomllib.loads(chosen.read_text(encoding="utf-8"))["data"].get("vae")
        decode = [] if vae is None else ["--vae", vae]
        asesearch("sample", bundle, "--num", "40", "--out", images, *decode)
    print(f"The report: {found['report']}")
    print(
        f"The bundle: {bundle} (trial {picked['trial']}: {picked['schedule']}), sampled: {images}"
    )


if __name__ == "__main__":
    main(*(sys.argv[1:] + ["", ""])[:2])
