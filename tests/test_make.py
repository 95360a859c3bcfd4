"""`make` as a new user meets it, with stand-ins for asesearch, pip and apt-get that note what they
are asked."""

import importlib.util
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from asesearch.config import load_study
from asesearch.evaluation.extractors import make_extractor

ROOT = Path(__file__).parent.parent
QUICK = "studies/fashion-mnist-quick.toml"
SMALL = "studies/fashion-mnist-small.toml"
PICK = "--pick fastest-within --quality +25% --early-exit --or-nearest"
STANDIN = f"""case "$*" in
  "-m pip install"*) echo "$*" >> pip.txt; ! [ -e fail-install ]; exit;;
  "-m pip"*|"-m ensurepip"*) ! [ -e fail-pip ]; exit;;
esac
exec {sys.executable} "$@"
"""
ASESEARCH = """
import json, os, pathlib, sys, time, tomllib
args = sys.argv[1:]
with open("calls.txt", "a") as log:
    print("|".join(args) + "\\n", file=log, end="")
with open("threads.txt", "a") as log:
    print(args[0] + " " + os.environ.get("OMP_NUM_THREADS", "all") + "\\n", file=log, end="")
fail = pathlib.Path("fail-" + args[0])
if "--dry-run" in args:
    expected = json.loads(pathlib.Path("seconds.json").read_text())[args[1]]
    parts = {"elastic_s": 60.0, "map_s": 2.0, "full_s": 100.0}
    print(json.dumps({"plan": {"expected_s": expected, **parts}}))
elif args[0] == "search":
    name = tomllib.loads(pathlib.Path(args[1]).read_text())["name"]
    run = pathlib.Path("runs") / name
    run.mkdir(parents=True, exist_ok=True)
    (run / "study.json").write_text("{}")
    if fail.exists():
        sys.exit("error: as asked")
    further = os.fstat(2).st_nlink == 0  # what it says goes to a file without a name
    if further and pathlib.Path("fail-further").exists():
        sys.exit("waiting\\nerror: the second")
    if pathlib.Path("long").exists():
        try:
            pathlib.Path("began-further" if further else "began").touch()
            time.sleep(60)
        except KeyboardInterrupt:
            time.sleep(0.5)
            pathlib.Path("further-ended" if further else "ended-itself").touch()
            sys.exit(130)
    print(json.dumps({"study": str(run), "report": f"reports/{name}/index.html"}))
elif args[0] == "export":
    print("no early-exit schedule is within the budget; taking trial 3", file=sys.stderr)
    print(json.dumps({"trial": 3, "schedule": "12 7"}))
else:
    print("{}")
"""


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def clone(tmp_path):
    """A fresh clone with a blank and an apostrophe in its path, set up but for what pip
    installs."""
    folder = tmp_path / "a user's clone"
    (folder / "studies").mkdir(parents=True)
    (folder / ".ci").mkdir()
    for name in ("Makefile", "pyproject.toml", ".ci/venv", "studies/make_search.py", QUICK, SMALL):
        shutil.copy(ROOT / name, folder / name)
    program(
        folder / ".venv/bin/python",
        STANDIN,
    )
    (folder / "asesearch").mkdir()
    (folder / "asesearch/__init__.py").touch()
    (folder / "asesearch/__main__.py").write_text(ASESEARCH)
    (folder / "seconds.json").write_text(f'{{"{QUICK}": 500.0}}')
    return folder


def environment(**more):
    """This process's environment without what the tests' own Python and make put there, for one
    worker."""
    own = ("MAKE", "PYTHON", "STUDY", "WORKERS", "MFLAGS")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(own)}
    return kept | {"HOME": "/proc", "WORKERS": "1"} | more  # a home where nobody can write


def begin(clone, *args, **env):
    """Start make as the leader of a process group, with Ctrl-C heeded even where these tests run in
    the background."""
    with (clone / "said.txt").open("w") as said:
        return subprocess.Popen(
            ["make", *args],
            cwd=clone,
            env=environment(**env),
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            stdout=said,
            stderr=said,
        )


def wait_for(path, process, seconds):
    """Until `path` is there; a process that ends before, or a time that passes, is an error."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end, path
        time.sleep(0.05)


def make(clone, *args, code=0, timeout=60, **env):
    done = subprocess.run(
        ["make", *args],
        cwd=clone,
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def calls(clone):
    return [line.replace("|", " ") for line in (clone / "calls.txt").read_text().splitlines()]


def installs(clone):
    lines = (clone / "pip.txt").read_text().splitlines()
    found = [line.split()[-1] for line in lines if line.startswith("-m pip install")]
    return [".[dev]" if what.startswith(".[dev,") else what for what in found]  # with other extras


def after_search(name):
    run = f"runs/{name}"
    return [
        f"export {run} {PICK} --out {run}/bundle --overwrite",
        f"sample {run}/bundle --num 40 --out {run}/bundle-samples.png",
    ]


def test_the_quick_study_where_it_is_quick(clone):
    said = make(clone, "search")
    assert calls(clone) == [
        f"search {QUICK} --dry-run",
        f"search {QUICK}",
        *after_search("fashion-mnist-quick"),
    ]
    assert f"searching {QUICK}: about 8 minutes" in said
    assert "no early-exit schedule is within the budget; taking trial 3" in said
    assert "The report: reports/fashion-mnist-quick/index.html" in said
    assert "The bundle: runs/fashion-mnist-quick/bundle (trial 3: 12 7)" in said


def test_the_small_study_where_the_quick_one_is_long_and_again(clone):
    (clone / "seconds.json").write_text(f'{{"{QUICK}": 1860.0}}')
    said = make(clone, "search")
    first = [f"search {QUICK} --dry-run"]
    rest = [f"search {SMALL}", *after_search("fashion-mnist-small")]
    assert calls(clone) == first + rest
    assert (
        f"{QUICK} would take about 31 minutes here, more than 20, so {SMALL} is searched in its "
        "place" in said
    )
    assert f"make search STUDY={QUICK}" in said
    # not asked again: what was begun goes on, however busy the machine is now
    (clone / "seconds.json").write_text("{}")
    said = make(clone, "search")
    assert calls(clone) == first + rest + rest
    assert f"{SMALL} was begun here (runs/fashion-mnist-small): going on with it" in said
    assert f"make search STUDY={QUICK}" in said


@pytest.mark.parametrize(("seconds", "study"), [(1200.0, QUICK), (1201.0, SMALL)])
def test_the_limit(clone, seconds, study):
    (clone / "seconds.json").write_text(f'{{"{QUICK}": {seconds}}}')
    make(clone, "search")
    assert f"search {study}" in calls(clone)


def test_any_study_by_its_own_name(clone):
    """The study's directory is what the search says; latents are decoded by the study's VAE."""
    (clone / "my studies").mkdir()
    (clone / "my studies/file.toml").write_text('name = "other"\n[data]\nvae = "the vae"\n')
    make(clone, "search", "STUDY=my studies/file.toml")
    exported, sampled = after_search("other")
    assert calls(clone) == ["search my studies/file.toml", exported, f"{sampled} --vae the vae"]


def test_a_failed_search_ends_make_and_the_next_goes_on(clone):
    (clone / "fail-search").touch()
    said = make(clone, "search", code=2)
    assert "error: as asked" in said and calls(clone)[-1] == f"search {QUICK}"
    (clone / "fail-search").unlink()
    make(clone, "search")
    assert calls(clone)[2:] == [f"search {QUICK}", *after_search("fashion-mnist-quick")]


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_lets_the_search_end_itself(clone, workers):
    (clone / "long").touch()
    make(clone, "setup")
    begun = begin(clone, "search", f"STUDY={QUICK}", WORKERS=str(workers))
    for name in ("began", "began-further")[:workers]:
        wait_for(clone / name, begun, 30)
    os.killpg(begun.pid, signal.SIGINT)
    begun.wait(timeout=30)
    assert (clone / "further-ended").exists() == (workers > 1)
    said = (clone / "said.txt").read_text()
    assert begun.returncode != 0 and "Traceback" not in said
    assert (clone / "ended-itself").exists() and set(calls(clone)) == {f"search {QUICK}"}


# -- several workers -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def program_of_make():
    """studies/make_search.py as a module."""
    spec = importlib.util.spec_from_file_location("make_search", ROOT / "studies/make_search.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("cores", "gpu", "workers", "threads"), [(1, False, 1, 0), (2, True, 1, 0), (5, False, 2, 2)]
)
def test_two_workers_where_the_cpu_has_cores_for_them(
    program_of_make, monkeypatch, tmp_path, cores, gpu, workers, threads
):
    monkeypatch.setattr(program_of_make, "num_cores", lambda: cores)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if gpu:
        program(tmp_path / "nvidia-smi", "")
    assert program_of_make.default_workers() == workers
    assert program_of_make.threads_each(workers) == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # what is given is not exceeded
    assert program_of_make.threads_each(workers) == min(1, threads)


def test_two_workers_share_the_quick_study(clone, program_of_make):
    """Each has its part of the cores; how long they will take is measured by both at once."""
    (clone / "seconds.json").write_text(f'{{"{QUICK}": 2262.0}}')
    said = make(clone, "search", WORKERS="2", OMP_NUM_THREADS="")
    exported, sampled = after_search("fashion-mnist-quick")
    assert sorted(calls(clone)) == sorted(
        [f"search {QUICK} --dry-run"] * 2 + [f"search {QUICK}"] * 2 + [exported, sampled]
    )
    # the full network beside the warm-up, and half of the rest
    assert f"searching {QUICK}: about {(100 + (2262 - 162) / 2) / 60:.0f} minutes" in said
    threads = max(1, program_of_make.num_cores() // 2)
    lines = (clone / "threads.txt").read_text().splitlines()
    assert sorted(lines) == sorted([f"search {threads}"] * 4 + ["export ", "sample "])
    assert "The bundle: runs/fashion-mnist-quick/bundle" in said and "exit code" not in said


def test_a_further_worker_that_fails_is_named_and_the_first_goes_on(clone):
    (clone / "fail-further").touch()
    said = make(clone, "search", f"STUDY={QUICK}", WORKERS="2")
    assert "a further worker ended with exit code 1: error: the second" in said
    others = [c for c in calls(clone) if not c.startswith("search ")]  # it may be the last to start
    assert others[-2:] == after_search("fashion-mnist-quick")


def test_a_failed_search_of_two_workers_is_said_once(clone):
    (clone / "fail-search").touch()
    said = make(clone, "search", f"STUDY={QUICK}", WORKERS="2", code=2)
    assert said.count("error: as asked") == 1 and "Traceback" not in said
    assert set(calls(clone)) == {f"search {QUICK}"}


def test_another_study_has_one_worker(clone):
    (clone / "other.toml").write_text('name = "other"\n[data]\n')
    make(clone, "search", "STUDY=other.toml", WORKERS="")
    assert calls(clone).count("search other.toml") == 1


@pytest.mark.parametrize("workers", ["0", "two"])
def test_a_number_of_workers_that_is_none(clone, workers):
    said = make(clone, "search", WORKERS=workers, code=2)
    assert f"WORKERS must be a positive integer; got '{workers}'" in said


# -- setting up ----------------------------------------------------------------------------------


def test_installed_once_and_again_when_something_changed(clone):
    (clone / "fail-pip").touch()
    said = make(clone, "setup", code=2, PYTHON="/bin/false")
    # no pip, so the environment is made again, by the Python that was named
    assert "Python 3.11 or newer" in said
    (clone / "fail-pip").unlink()
    make(clone, "setup")
    assert installs(clone) == ["."] and (clone / ".venv/installed").read_text().endswith("clone\n")
    make(clone, "setup")
    assert installs(clone) == ["."]
    make(clone, "setup-dev")
    make(clone, "setup")
    assert installs(clone) == [".", ".[dev]"]
    project = clone / "pyproject.toml"
    project.write_text(project.read_text() + "\n# a new dependency\n")
    make(clone, "setup")
    assert installs(clone) == [".", ".[dev]", "."]
    (clone / ".venv/installed").write_text("")  # the power went
    make(clone, "setup")
    assert len(installs(clone)) == 4
    moved = clone.parent / "moved"
    clone.rename(moved)
    assert "installing into .venv" in make(moved, "setup")


def test_a_failed_install_is_begun_again(clone):
    (clone / "fail-install").touch()
    assert "the same make goes on from here" in make(clone, "search", code=2)
    assert not (clone / "calls.txt").exists()
    (clone / "fail-install").unlink()
    make(clone, "search")
    assert installs(clone) == [".", "."] and f"search {QUICK}" in calls(clone)


OLD = "case $2 in import*) exit 1;; esac; echo Python 3.10.12\n"
NEW = """case "$*" in
  "-c "*) exit 0;;
  "-m venv"*) [ -e "$TMP/venv-installed" ] || { echo "ensurepip is not available"; exit 1; }
    mkdir -p "$4/bin"; echo "$0" > "$4/made-by";;
esac
"""
APT = (
    'echo "$*" >> "$TMP/apt.txt"; [ -e "$TMP/offline" ] && exit 100; touch "$TMP/venv-installed"\n'
)


def venv(tmp_path, code=0, **env):
    """Run .ci/venv where nothing but these programs is to be found."""
    for name in ("mkdir", "touch", "basename", "sh"):
        (tmp_path / name).exists() or (tmp_path / name).symlink_to(shutil.which(name))
    program(tmp_path / "id", "echo 0\n")
    env = {"PATH": str(tmp_path), "TMP": str(tmp_path), **env}
    args = ["sh", str(ROOT / ".ci/venv"), str(tmp_path / "made")]
    done = subprocess.run(args, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    return done.stderr


def test_a_new_enough_python_is_found(tmp_path):
    (tmp_path / "venv-installed").touch()
    program(tmp_path / "python3", OLD)
    assert "got Python 3.10.12; install one and name it" in venv(tmp_path, code=1)
    program(tmp_path / "python3.12", NEW)
    venv(tmp_path)
    assert (tmp_path / "made/made-by").read_text().strip().endswith("python3.12")
    said = venv(tmp_path, code=1, PYTHON="python3")
    assert "got PYTHON=python3, Python 3.10.12; name another" in said


@pytest.mark.parametrize("python", ["python3", "python3.13"])
def test_debians_venv_package_is_installed(tmp_path, python):
    program(tmp_path / python, NEW)
    assert f"install {python}-venv as root" in venv(tmp_path, code=1)  # no apt-get here
    program(tmp_path / "apt-get", APT)
    (tmp_path / "offline").touch()
    assert "ensurepip is not available" in venv(tmp_path, code=1)
    (tmp_path / "offline").unlink()
    venv(tmp_path)
    assert (tmp_path / "apt.txt").read_text().splitlines()[-1] == f"install -qy {python}-venv"
    assert (tmp_path / "made/bin").is_dir()


def test_make_alone_lists_every_target(clone):
    said = make(clone)
    targets = {line.split()[1] for line in said.splitlines() if line.startswith("make ")}
    assert targets == {
        "search",
        "help",
        "test",
        "test-thorough",
        "test-slow",
        "lint",
        "docs",
        "setup",
        "setup-dev",
        "clean",
    }
    assert not (clone / "calls.txt").exists()


@pytest.mark.parametrize("study", [QUICK, SMALL])
def test_the_shipped_studies_count_points_and_measure_honestly(study):
    config = load_study(ROOT / study)
    assert config.search.budget is None and config.promotion is not None
    features = make_extractor("fashion-cnn").dim
    for part in (config.evaluation, config.promotion, config.confirm):
        assert part.num_samples > features  # a Fréchet distance needs that many for its covariance
    explored = min(config.promotion.explore, config.search.num_trials // 2)
    warm = len(config.search.warm_start) + len(config.search.samplers)
    assert config.search.num_trials - warm - explored >= 3


@pytest.mark.slow
def test_the_small_study_from_the_first_command_to_the_bundle(clone):
    """Really run, killed on the way, run again; and once more when all is done."""
    from PIL import Image

    from asesearch import load_bundle
    from asesearch.study import Study

    shutil.rmtree(clone / "asesearch")
    (clone / "asesearch").symlink_to(ROOT / "asesearch")
    run = clone / "runs/fashion-mnist-small"
    begun = begin(clone, "search", f"STUDY={SMALL}")
    wait_for(run / "trials", begun, 3600)
    os.killpg(begun.pid, signal.SIGKILL)
    begun.wait()

    said = make(clone, "search", timeout=3600)  # no STUDY: what was begun goes on
    assert f"{SMALL} was begun here" in said
    results = Study.open(run).results()
    exits = [r for r in results.complete if not r.schedule.is_full]
    assert len(results.records) == 10 and len(exits) >= 4 and len(results.confirmations) >= 2
    assert all(0 < r.quality.value < 200 and r.quality.protocol.num_samples == 200 for r in exits)
    bundle = load_bundle(run / "bundle")
    assert not bundle.schedule.is_full
    assert bundle.sample(range(4)).images.shape == (4, 1, 28, 28)
    assert (clone / "reports/fashion-mnist-small/index.html").is_file()
    with Image.open(run / "bundle-samples.png") as image:
        assert image.convert("L").getextrema()[1] > 200  # something is drawn

    before = {p: p.stat().st_mtime_ns for p in (run / "trials").rglob("*")}
    make(clone, "search", timeout=3600)
    assert before == {p: p.stat().st_mtime_ns for p in (run / "trials").rglob("*")}
    assert Study.open(run).results().confirmations == results.confirmations
