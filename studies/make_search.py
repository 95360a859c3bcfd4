"""What `make search` runs: choose the study, search, export, sample.

    python studies/make_search.py [STUDY]

Without STUDY it is the quick one, or the small one where this machine would need long for it. Each
command is shown as it begins; the first that fails ends it with its exit code, and the same
`make search` goes on from there.
"""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

QUICK = Path("studies/fashion-mnist-quick.toml")
SMALL = Path("studies/fashion-mnist-small.toml")
LIMIT_MIN = 20
PICK = ["--pick", "fastest-within", "--quality", "+25%", "--early-exit", "--or-nearest"]


def say(text: str) -> None:
    """A line on stderr, where progress goes."""
    print(text, file=sys.stderr, flush=True)


def asesearch(*args: str | Path) -> dict[str, Any]:
    """Run a command of asesearch; the JSON that it prints.

    Ends this process with the command's exit code if it fails.
    """
    words = [str(a) for a in args]
    say(f"\n$ asesearch {shlex.join(words)}")
    done = subprocess.Popen(
        [sys.executable, "-m", "asesearch", *words], stdout=subprocess.PIPE, text=True
    )
    out, _ = done.communicate()
    if done.returncode:
        sys.exit(done.returncode if done.returncode > 0 else 128 - done.returncode)
    found: dict[str, Any] = json.loads(out)
    return found


def choose() -> Path:
    """The study that was begun already; else the quick one, or the small one where it takes
    long."""
    for study in (QUICK, SMALL):
        if (Path("runs") / study.stem / "study.json").is_file():
            say(f"{study} was begun here (runs/{study.stem}): going on with it")
            if study == SMALL:
                say(f"the longer one: make search STUDY={QUICK}")
            return study
    say("measuring how long the search will take on this machine, as busy as it is at the moment")
    needed = float(asesearch("search", QUICK, "--dry-run")["plan"]["expected_s"]) / 60
    if needed <= LIMIT_MIN:
        say(f"searching {QUICK}: about {needed:.0f} minutes")
        return QUICK
    say(
        f"{QUICK} would take about {needed:.0f} minutes here, more than {LIMIT_MIN}, so {SMALL} is "
        "searched in its place"
    )
    say(f"the longer one: make search STUDY={QUICK}")
    return SMALL


def main(study: str) -> None:
    """Search `study`, or the one that fits this machine if empty; export a point and sample it."""
    signal.signal(signal.SIGINT, lambda *_: None)  # the running command ends itself on Ctrl-C
    chosen = Path(study) if study else choose()
    found = asesearch("search", chosen)
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
    main(sys.argv[1] if len(sys.argv) > 1 else "")
