"""Every command, as a user runs it, on a network small enough to train in a second."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from asesearch.cli import app, main
from asesearch.cli import program as program_module
from asesearch.data import ImageArray
from tests.processes import Child
from tests.study.test_storage import snapshot

STUDY = """
name = "tiny"
[backbone]
kind = "dit"
{backbone}
[data]
kind = "fashion-mnist"
split = "test"
[train]
num_steps = 4
batch_size = 8
lr = 1e-3
[sampling]
solver = "ddim"
num_steps = 3
batch_size = 40
[evaluation]
extractor = "fashion-cnn"
num_samples = 70
repeats = 2
reference = {{ kind = "fashion-mnist", split = "train" }}
[search]
num_trials = 3
num_intervals = 4
warm_start = ["3 2 2 1"]
[confirm]
num_samples = 80
repeats = 2
time_images = 4
time_repeats = 2
"""
ARGS = (
    "args = { input_size = 28, patch_size = 14, in_channels = 1, hidden_size = 16, depth = 3, "
    "num_heads = 2, num_classes = 10 }"
)


def call(*args, code=0):
    """Run a command in this process; its exit code is checked, its stdout and stderr returned."""
    result = CliRunner().invoke(app, [str(a) for a in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.stderr
    return result.stdout, result.stderr


def program(*args):
    """What a process does that is asesearch with these arguments."""
    sys.argv = ["asesearch", *map(str, args)]
    main()


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """Reports of these tests are read for their words; drawing takes seconds. `place` has one with
    all its figures."""
    monkeypatch.setattr("asesearch.report.page.drawings", lambda results: [])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with study files, trained weights and a finished search."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "scratch.toml").write_text(STUDY.format(backbone=ARGS))
    _, err = call(
        "train",
        folder / "scratch.toml",
        "--out",
        folder / "net.safetensors",
        "--run-dir",
        folder / "runs/train",
    )
    assert "loss=" in err and "loss=nan" not in err  # a bar without a loss until there is one
    (folder / "tiny.toml").write_text(
        STUDY.format(backbone=f'checkpoint = "{folder}/net.safetensors"')
    )
    out, err = call(
        "search",
        folder / "tiny.toml",
        "--out",
        folder / "runs/tiny",
        "--report",
        folder / "reports/tiny",
    )
    result = json.loads(out)
    assert result["report"] == str(folder / "reports/tiny/index.html") and result["front"]
    assert "confirming the front" in err
    return folder


@pytest.mark.thorough
def test_train_writes_weights_and_says_how_they_were_made(place):
    from asesearch.backbones import inspect_checkpoint

    info = inspect_checkpoint(place / "net.safetensors")
    assert info.args["hidden_size"] == 16
    out, err = call(
        "train",
        place / "scratch.toml",
        "--out",
        place / "again.safetensors",
        "--run-dir",
        place / "runs/train",
    )
    assert "resuming at step 4 of 4" in err and json.loads(out)["steps"] == 4
    first, again = (load_file(place / name) for name in ("net.safetensors", "again.safetensors"))
    assert first.keys() == again.keys() and all(np.array_equal(first[k], again[k]) for k in first)


def test_compare_writes_a_page_and_nothing_into_the_studies(place, tmp_path):
    run = place / "runs/tiny"
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    groups = ("--group", "a", "--group", "b")
    out, err = call("compare", run, run, "--out", tmp_path / "both", *groups)
    found = json.loads(out)
    assert found["comparison"] == str(tmp_path / "both/index.html")
    assert [g["group"] for g in found["groups"]] == ["a", "b"] and "a: hypervolume" in err
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before
    assert "out" in json.loads(call("compare", run, run, "-o", tmp_path / "dry", "--dry-run")[0])
    assert not (tmp_path / "dry").exists()


def test_search_left_a_report_and_resumes_with_more_trials(place):
    page = (place / "reports/tiny/index.html").read_text()
    assert "Fréchet distance (fashion-cnn)" in page and "3 2 2 1" in page
    assert (place / "runs/tiny/confirmations/0.json").is_file()
    copy = place / "longer.toml"
    copy.write_text((place / "tiny.toml").read_text())
    out, err = call(
        "search",
        copy,
        "--out",
        place / "runs/tiny",
        "--trials",
        4,
        "--report",
        place / "reports/longer",
    )
    assert "3 of 4 schedules on record" in err and json.loads(out)["front"]


def test_a_comparability_break_is_refused(place):
    changed = place / "changed.toml"
    changed.write_text((place / "tiny.toml").read_text().replace("num_steps = 3", "num_steps = 2"))
    from asesearch.errors import StudyError

    with pytest.raises(StudyError, match=r"sampling\.num_steps: 3 -> 2"):
        call("search", changed, "--out", place / "runs/tiny")


def test_dry_run_prints_a_plan_and_leaves_nothing(place, tmp_path):
    plan = json.loads(
        call("search", place / "tiny.toml", "--out", tmp_path / "dry", "--dry-run")[0]
    )
    assert plan["plan"]["search_s"] > 0 and plan["study"]["search"]["num_trials"] == 3
    assert not (tmp_path / "dry").exists()
    plan = json.loads(
        call(
            "finetune",
            place / "tiny.toml",
            "--schedule",
            "D3-DiT",
            "-o",
            tmp_path / "w.safetensors",
            "--dry-run",
        )[0]
    )
    assert plan["schedule"] == "3 3 3 3 2 2 2 2 1 1" and plan["estimate"]["total_s"] > 0
    assert list(tmp_path.iterdir()) == []


def test_finetune_under_a_schedule(place, tmp_path):
    out, _ = call(
        "finetune",
        place / "tiny.toml",
        "--schedule",
        "3 1",
        "--steps",
        2,
        "-o",
        tmp_path / "w.safetensors",
        "--run-dir",
        tmp_path / "run",
    )
    assert json.loads(out)["steps"] == 2 and (tmp_path / "w.safetensors").is_file()


def test_each_schedule_is_fine_tuned_beside_the_others(place, tmp_path, monkeypatch):
    """And a checkpoint where earlier releases kept it is gone on from."""
    monkeypatch.chdir(tmp_path)
    runs = Path("runs/tiny-finetune")

    def finetune(schedule):
        args = ("finetune", place / "tiny.toml", "--steps", 2, "--schedule", schedule)
        return call(*args, "-o", "w.safetensors")[1]

    for schedule in ("3 2 2 1", "3 2 1 1"):
        assert "resuming" not in finetune(schedule)
    kept = sorted(runs.glob("*/training.safetensors"))
    assert len(kept) == 2 and "resuming at step 2" in finetune("3 2 2 1")
    kept[0].rename(runs / "training.safetensors")
    assert all("resuming at step 2" in finetune(s) for s in ("3 2 2 1", "3 2 1 1"))
    assert len(list(runs.glob("*/training.safetensors"))) == 1


def test_a_report_goes_into_the_working_directory(place, tmp_path, monkeypatch):
    from asesearch.errors import StudyError

    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # and over itself
        call("report", place / "runs" / "tiny", "--out", ".")
        assert Path("index.html").is_file() and Path("tables/trials.csv").is_file()
    with pytest.raises(StudyError, match="goes into a folder of its own; got /; give another"):
        call("report", place / "runs" / "tiny", "--out", "/")


@pytest.mark.thorough
def test_a_notebooks_backend_does_not_matter(place, tmp_path):
    """IPython sets MPLBACKEND for the commands that a cell runs."""
    environment = {**os.environ, "MPLBACKEND": "module://not_installed.backend"}
    words = [sys.executable, "-m", "asesearch", "report", place / "runs/tiny", "--out", "r"]
    ended = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0 and (tmp_path / "r/index.html").is_file(), ended.stderr


@pytest.mark.parametrize(
    ("command", "words"),
    [("evaluate", ("--schedule", "", "--dry-run")), ("export", ("--pick", "", "--out", "b"))],
)
def test_an_unset_variable_is_no_choice(place, tmp_path, monkeypatch, command, words):
    from asesearch.errors import AseSearchError

    monkeypatch.chdir(tmp_path)
    with pytest.raises(AseSearchError):
        call(command, place / "runs/tiny", *words)
    assert not list(tmp_path.iterdir())


def test_report_alone(place, tmp_path):
    assert (
        json.loads(call("report", place / "runs/tiny", "--out", tmp_path / "r", "--dry-run")[0])[
            "trials"
        ]
        >= 3
    )
    assert Path(
        json.loads(call("report", place / "runs/tiny", "--out", tmp_path / "r")[0])["report"]
    ).is_file()


@pytest.mark.thorough
def test_export_and_sample_in_another_process(place, tmp_path):
    from asesearch import load_bundle
    from asesearch.evaluation.features import to_uint8

    chosen = json.loads(
        call(
            "export",
            place / "runs/tiny",
            "--pick",
            "best-within",
            "--time",
            1,
            "-o",
            tmp_path / "b",
            "--dry-run",
        )[0]
    )
    assert chosen["evaluation"]["confirmed"] and not (tmp_path / "b").exists()
    call("export", place / "runs/tiny", "--pick", "best-within", "--time", 1, "-o", tmp_path / "b")
    child = Child(
        program, "sample", tmp_path / "b", "-o", tmp_path / "x.npz", "--num=6", "--seed=5"
    )
    code, out, err = child.ended()
    assert code == 0, err
    assert json.loads(out)["nfe"] == 3
    images = np.load(tmp_path / "x.npz")["images"]
    here = to_uint8(load_bundle(tmp_path / "b").sample(range(5, 11)).images).numpy()
    assert np.array_equal(images, here)
    call("sample", tmp_path / "b", "-o", tmp_path / "x.png", "--num", 5, "--label", 3, "--steps", 2)
    few = ("--num", 3, "--batch-size", 2, "--dry-run")
    plan = json.loads(call("sample", tmp_path / "b", "-o", tmp_path / "y.png", *few)[0])
    assert plan["sampling"]["batch_size"] == 2
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers
@pytest.mark.parametrize(
    "format", ["diffusers", *(pytest.param(f, marks=pytest.mark.slow) for f in ("onnx", "aoti"))]
)
def test_a_point_and_its_bundle_in_another_format(place, tmp_path, format):
    made = tmp_path / "made"
    _, err = call("export", place / "runs/tiny", "--trial", 1, "--format", format, "-o", made)
    assert "fine-tune" not in err  # nor a bar of it
    call("export", place / "runs/tiny", "--trial", 1, "-o", tmp_path / "b")
    call("convert", tmp_path / "b", "--format", format, "-o", tmp_path / "converted")
    hashes = [
        json.loads((folder / "bundle.json").read_text())["files"]
        for folder in (made, tmp_path / "converted")
    ]
    # safetensors writes a file's metadata in any order
    free = (".pt2", "model.safetensors")
    files = [made / "model.safetensors", tmp_path / "converted" / "model.safetensors"]
    assert files[0].is_file() == files[1].is_file() == ("model.safetensors" in hashes[0])
    if files[0].is_file():
        ours, theirs = map(load_file, files)
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    hashes = [{k: v for k, v in h.items() if not k.endswith(free)} for h in hashes]
    assert hashes[0] == hashes[1]
    checks = json.loads(call("verify", made, "--no-speed", "--json")[0])
    assert [c["name"] for c in checks if c["passed"]] == ["files", "network", "parity", "images"], (
        checks
    )


@pytest.mark.parametrize(
    ("label", "rule"),
    [(10, "got 10, the null label"), (11, "got 11; choose"), (-1, "got -1; choose")],
)
def test_a_label_that_is_no_class_is_refused(place, tmp_path, label, rule):
    from asesearch.errors import ConfigError

    if not (place / "b").exists():
        call("export", place / "runs/tiny", "--trial", 0, "-o", place / "b")
    for more in ((), ("--dry-run",)):
        with pytest.raises(ConfigError, match=rf"network, 0…9; {rule}.* 0…9"):
            call(
                "sample", place / "b", "-o", tmp_path / "x.png", "--num", 2, "--label", label, *more
            )
    assert list(tmp_path.iterdir()) == []
    call("sample", place / "b", "-o", tmp_path / "x.png", "--num", 2, "--label", 9)


@pytest.mark.thorough
def test_a_guided_study_of_a_release_that_did_not_record_the_channels_goes_on(
    place, tmp_path, monkeypatch
):
    """Its network is on record, so its own scores stay comparable; those of a new study tell their
    channels."""
    from asesearch.search import protocols
    from asesearch.study import Study

    text = (
        (place / "tiny.toml")
        .read_text()
        .replace("batch_size = 40", "batch_size = 40\ncfg_scale = 1.5")
    )
    (tmp_path / "tiny.toml").write_text(text)
    where = tmp_path / "run"
    made = protocols.build_protocol
    args = (
        "search",
        tmp_path / "tiny.toml",
        "--out",
        where,
        "--report",
        tmp_path / "report",
        "--trials",
    )
    with monkeypatch.context() as earlier:
        earlier.setattr(
            protocols, "build_protocol", lambda *a, **k: made(*a, **{**k, "guided_channels": None})
        )
        call(*args, 2)
    assert "guided_channels" not in (where / "inputs.json").read_text()
    call(*args, 3)
    records = Study.open(where).records()
    assert len(records) == 3 and {r.quality.protocol.guided_channels for r in records} == {None}
    assert "not on record" in (tmp_path / "report/index.html").read_text()
    check, _ = call("evaluate", where, "--trial", 0, "--check")
    assert json.loads(check)["check"]["reproduced"] is True
    plan, _ = call("search", tmp_path / "tiny.toml", "--out", tmp_path / "new", "--dry-run")
    assert json.loads(plan)["protocol"]["guided_channels"] == 1


def test_export_takes_the_nearest_only_where_it_is_asked_to(place, tmp_path):
    from asesearch.errors import StudyError

    args = (
        "export",
        place / "runs/tiny",
        "--pick",
        "fastest-within",
        "--quality",
        "0.5",
        "-o",
        tmp_path / "b",
        "--dry-run",
    )
    with pytest.raises(
        StudyError,
        match=r"no schedule is within the quality budget '0.5'; the nearest is .*--or-nearest",
    ):
        call(*args)
    out, err = call(*args, "--early-exit", "--or-nearest")
    chosen = json.loads(out)
    assert chosen["schedule"] != "3" and "no early-exit schedule is " in err
    assert f"trial {chosen['trial']} with " in err and err.endswith("; taking it\n")


def test_export_after_full_finetuning_records_both_figures(place, tmp_path):
    call("export", place / "runs/tiny", "--trial", 1, "--finetune-steps", 3, "-o", tmp_path / "b")
    manifest = json.loads((tmp_path / "b/bundle.json").read_text())
    after = manifest["evaluation"]["after_full_finetuning"]
    assert after["num_steps"] == 3 and after["quality"]["protocol"]["num_samples"] == 80
    assert manifest["evaluation"]["search"]["protocol"]["num_samples"] == 70
    assert manifest["provenance"]["trial"] == 1


def test_evaluate_reproduces_the_figure_on_record(place):
    result = json.loads(call("evaluate", place / "runs/tiny", "--trial", 0, "--check")[0])
    assert result["check"]["reproduced"] and result["metric"] == "Fréchet distance (fashion-cnn)"
    untuned = json.loads(call("evaluate", place / "runs/tiny", "--schedule", "3 1 1 1")[0])
    assert untuned["schedule"] == "3 1 1 1" and len(untuned["values"]) == 2


def changed(path, change):
    """Give a file of weights other content."""
    with safe_open(path, "np") as file:
        metadata = file.metadata()  # noqa: SIM118 (not a dict)
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    path.unlink()  # loaded weights are mapped from their file: never write it in place
    save_file({k: change(v) for k, v in tensors.items()}, path, metadata)


def test_other_weights_behind_the_path_are_not_taken_for_the_studys(place, tmp_path):
    """Neither trained on nor evaluated; a trial's own weights are what they were."""
    from asesearch.errors import StudyError

    run, net, out = place / "runs/tiny", place / "net.safetensors", tmp_path / "b"
    export = ("export", run, "--trial", 1, "--out", out)
    tuned = (*export, "--finetune-steps", 2)
    kept = net.read_bytes()
    changed(net, lambda v: v * np.float32(1.05))
    try:
        for args in (tuned, (*tuned, "--dry-run"), ("evaluate", run)):
            with pytest.raises(StudyError, match=r"begun with other weights .*; restore them"):
                call(*args)
        assert not list(run.rglob("finetune-2")) and not out.exists()
        call("evaluate", run, "--trial", 1, "--dry-run")
        call(*export, "--dry-run")
    finally:
        net.unlink()
        net.write_bytes(kept)
    call(*tuned, "--dry-run")
    call("evaluate", run, "--dry-run")


def test_other_data_than_the_studys_are_the_cause_that_every_check_names(place):
    """Not that the score isn't reproduced."""
    from asesearch.errors import StudyError

    run = place / "runs/tiny"
    path = run / "inputs.json"
    kept = path.read_text()
    path.write_text(json.dumps({**json.loads(kept), "data": "others"}))
    try:
        for args in (("recheck", run, 0), ("evaluate", run, "--trial", 0, "--check")):
            with pytest.raises(StudyError, match=r"begun with other data .*; restore them"):
                call(*args)
    finally:
        path.write_text(kept)


RNG = np.random.default_rng(0)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "change",
    [
        lambda v: v * np.float32(1.05),
        pytest.param(
            lambda v: RNG.standard_normal(v.shape, np.float32) * v.std(), marks=pytest.mark.slow
        ),
    ],
    ids=["5 % more", "noise"],
)
def test_evaluate_check_fails_for_other_weights(tmp_path, change):
    """Of a trained network, whose score tells weights apart: the same reproduce it, others do
    not."""
    study = tmp_path / "shipped.toml"
    text = STUDY.format(backbone='checkpoint = "shipped:fashion-mnist-dit"')
    for old, new in (
        ("repeats = 2", "repeats = 1"),
        ("num_steps = 3", "num_steps = 2"),
        ("num_steps = 4", "num_steps = 1"),
        ("batch_size = 8", "batch_size = 2"),
        ("batch_size = 40", "batch_size = 24"),
        ("num_samples = 80", "num_samples = 70"),
    ):
        assert old in text
        text = text.replace(old, new)
    study.write_text(text)
    run = tmp_path / "run"
    call("search", study, "--out", run, "--report", tmp_path / "report", "--trials", 1)
    (path,) = run.rglob("weights.safetensors")
    trained = path.read_bytes()

    def check(code):
        out, _ = call("evaluate", run, "--trial", 0, "--check", code=code)
        return json.loads(out)["check"]

    assert check(0)["reproduced"] is True
    changed(path, change)
    found = check(1)
    assert found["reproduced"] is False
    assert abs(found["largest_relative_difference"]) > found["tolerance"]
    out, err = call("recheck", run, 0, code=1)
    assert json.loads(out)["reproduced"] == 0 and "0 of 1 reproduced" in err
    path.unlink()
    path.write_bytes(trained)
    assert check(0)["reproduced"] is True


def test_recheck_of_all_whose_weights_are_kept(place):
    from asesearch.errors import StudyError

    run = place / "runs/tiny"
    before = snapshot(run)
    out, err = call("recheck", run)
    found = json.loads(out)
    number = len(list(run.glob("trials/*/weights.safetensors")))
    assert found["reproduced"] == found["of"] >= number >= 2
    assert f"{found['of']} of {found['of']} reproduced" in err
    assert all(t["largest_relative_difference"] == 0.0 for t in found["trials"])
    assert json.loads(call("recheck", run, 0, "--dry-run")[0]) == {"trials": [0]}
    with pytest.raises(StudyError, match="no finished trial 99"):
        call("recheck", run, 99)
    assert snapshot(run) == before


def test_pick_answers_in_words_and_as_json(place):
    from asesearch.errors import ConfigError

    run = place / "runs/tiny"
    before = snapshot(run)
    out, err = call("pick", run, "--quality", "1000", "--time", 1)
    found = json.loads(out)
    assert [a["question"] for a in found] == [
        "fastest with quality within 1000",
        "best quality within 1x the time",
        "knee of the front",
    ]
    assert found[1]["score"] <= found[0]["score"] and found[0]["time_frac"] <= found[1]["time_frac"]
    assert err.count(": trial ") == 3 and snapshot(run) == before
    with pytest.raises(ConfigError, match="a quality budget is"):
        call("pick", run, "--quality", "low")


@pytest.mark.parametrize(
    "command",
    [
        "train",
        "finetune",
        "sample",
        "evaluate",
        "recheck",
        "map",
        "search",
        "report",
        "export",
        "latents",
        "train-extractor",
    ],
)
def test_every_command_explains_itself(command):
    out, _ = call(command, "--help")
    assert "Usage" in out and len(out) > 300
    assert all(
        option in out for option in (["--dry-run"] if command != "train-extractor" else ["--out"])
    )


def as_program(monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, "argv", ["asesearch", *map(str, args)])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code, capsys.readouterr()


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(28, "No space left on device"), "No space left on device; free some space, and"),
        (
            FileNotFoundError(2, "No usable temporary directory found in ['/tmp', '/']"),
            "No usable temporary directory found in ['/tmp', '/']; set TMPDIR",
        ),
        (
            OSError(
                "Matplotlib requires access to a writable cache directory, but a temporary "
                "directory could not be created; set MPLCONFIGDIR."
            ),
            "Matplotlib requires access",
        ),
        (OSError(5, "Input/output error"), "Input/output error; asesearch --debug shows where"),
    ],
)
def test_what_the_system_refuses_is_one_line(monkeypatch, capsys, error, line):
    def refuse():
        raise error

    monkeypatch.setattr(program_module, "app", refuse)
    code, said = as_program(monkeypatch, capsys, "pick", "run")
    assert code == 1 and said.err.startswith(f"error: the system refuses: {line}")
    assert said.err.count("\n") == 1
    monkeypatch.setattr(sys, "argv", ["asesearch", "pick", "run", "--debug"])
    with pytest.raises(OSError):
        main()


def test_where_memory_ends_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(program_module, "app", lambda: torch.empty(1 << 50))
    code, said = as_program(monkeypatch, capsys, "sample", "bundle")
    assert code == 1 and said.err.startswith("error: out of memory: DefaultCPUAllocator: can't")
    assert said.err.count("\n") == 1 and "batch_size" in said.err
    monkeypatch.setattr(program_module, "app", lambda: torch.ones(2, 3) @ torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):  # a fault, and shown
        as_program(monkeypatch, capsys, "sample", "bundle")


def test_a_search_is_not_one_process_of_a_training(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, said = as_program(
        monkeypatch, capsys, "search", place / "tiny.toml", "--out", tmp_path / "run", "--dry-run"
    )
    assert code == 1 and "start each worker of a search by a command of its own" in said.err
    assert not (tmp_path / "run").exists()


@pytest.mark.thorough
def test_a_budget_is_planned_and_kept(place, tmp_path):
    study = tmp_path / "timed.toml"
    study.write_text(
        (place / "tiny.toml").read_text().replace("num_intervals = 4", "num_intervals = 8")
    )
    args = ("search", study, "--out", tmp_path / "run", "--report", tmp_path / "report")
    plan = json.loads(call(*args, "--budget", "10m", "--dry-run")[0])["plan"]
    assert plan["budget_s"] == 600 and plan["num_trials"] >= 1
    assert 600 * 0.97 - plan["trial_s"] <= plan["total_s"] <= 600 * 0.97
    out, _ = call(*args, "--budget", "6s")
    from asesearch.study import Study
    from asesearch.study.records import spent_s

    results = Study.open(tmp_path / "run").results()
    # a trial is a large part of so short a budget, and other tests share the machine: a search of
    # minutes keeps to a tenth
    assert json.loads(out)["front"] and len(results.records) > 1 and spent_s(results) <= 3 * 6


WRONG = [
    (("search", "missing.toml"), 1, "can't read missing.toml"),
    (("search", "bad.toml"), 1, "unknown key search.tirals"),
    (("search", "value.toml"), 1, "train.lr"),
    (("search", "broken.toml"), 1, "is not valid TOML"),
    (("report", "nowhere"), 1, "no study in nowhere"),
    (("report", "x" * 5000), 1, "File name too long; check the path"),
    (("sample", "x" * 5000, "-o", "x.png"), 1, "File name too long"),
    (("sample", "nowhere", "-o", "x.png"), 1, "can't read nowhere/bundle.json"),
    (("sample", "nowhere", "-o", "x.jpg"), 1, "written as .png or .npz"),
    (("train", "tiny.toml", "-o", "x.pt"), 1, "written as .safetensors"),
    (
        ("finetune", "deep.toml", "--schedule", "28 28", "-o", "x.safetensors"),
        1,
        "rescale the schedule",
    ),
    (
        ("finetune", "deep.toml", "--schedule", "D9-DiT", "-o", "x.safetensors"),
        1,
        "published names",
    ),
    (("search", "tiny.toml", "--trials", "0"), 1, "search: num_trials"),
    (("search", "tiny.toml", "--budget", "soon"), 1, "search: budget"),
    (
        ("search", "tiny.toml", "--budget", "1h", "--trials", "4"),
        1,
        "--trials or --budget, not both",
    ),
    (("search", "sampler.toml"), 1, "search.samplers.0"),
    (("train", "tiny.toml", "-o", "tiny.toml/x.safetensors"), 1, "can't write to tiny.toml/"),
    (
        ("export", "runs", "--trial", "1", "--pick", "best-quality", "-o", "b"),
        1,
        "--trial names the point",
    ),
    (("export", "runs", "--trial", "1", "--or-nearest", "-o", "b"), 1, "--trial names the point"),
    (("search",), 2, "Missing argument"),
    (("export", "runs", "--time", "2", "-o", "b"), 2, "less than or equal to 1"),
]


@pytest.mark.parametrize(
    ("args", "code", "message"), WRONG, ids=[" ".join(w[0][:2]) for w in WRONG]
)
def test_wrong_input_is_one_line_and_leaves_nothing(
    place, tmp_path, monkeypatch, capsys, args, code, message
):
    text = (place / "tiny.toml").read_text()
    monkeypatch.chdir(tmp_path)
    files = {
        "bad.toml": text.replace("num_trials", "tirals"),
        "value.toml": text.replace("lr = 1e-3", "lr = -1"),
        "broken.toml": "name = ",
        "tiny.toml": text,
        "deep.toml": text,
        "sampler.toml": text.replace("[search]", '[search]\nsamplers = ["heun-8"]'),
    }
    for name, content in files.items():
        Path(name).write_text(content)
    got, said = as_program(monkeypatch, capsys, *args)
    assert got == code and message in said.err and "Traceback" not in said.err
    assert code == 2 or len(said.err.strip().splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(files)


def test_debug_shows_the_traceback(monkeypatch):
    from asesearch.errors import ConfigError

    monkeypatch.setattr(sys, "argv", ["asesearch", "--debug", "search", "missing.toml"])
    with pytest.raises(ConfigError):
        main()


def test_unwritable_study_directory(place, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("not a folder")
    code, said = as_program(
        monkeypatch, capsys, "search", place / "tiny.toml", "--out", tmp_path / "file" / "run"
    )
    assert code == 1 and "can't write to" in said.err and said.err.count("\n") == 1


def test_a_path_that_is_not_utf8_is_printed_as_json(place, tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    stdout, _ = call("map", place / "tiny.toml", "--out", folder, "--dry-run")
    stdout.encode("utf-8")
    assert json.loads(stdout)["out"] == str(folder)


# -- outputs are looked at before any work ---------------------------------------------------------

LATE = [
    ("train", "nothing.toml", "-o", "file/x.safetensors"),
    ("train", "nothing.toml", "-o", "x.safetensors", "--run-dir", "file/run"),
    ("finetune", "nothing.toml", "--schedule", "full", "-o", "folder.safetensors"),
    ("finetune", "nothing.toml", "--schedule", "full", "-o", "x.safetensors", "--run-dir", "file"),
    ("sample", "nowhere", "-o", "/proc/nope/x.npz"),
    ("sample", "nowhere", "-o", "file/x.png"),
    ("sample", "nowhere", "-o", f"{'a' * 250}.png"),
    ("search", "nothing.toml", "-o", "file"),
    ("search", "nothing.toml", "-o", "/proc/nope"),
    ("search", "nothing.toml", "-o", "a" * 256),
    ("search", "nothing.toml", "-o", "/".join(["a" * 100] * 6)),
    ("search", "nothing.toml", "--report", "file"),
    ("search", "nothing.toml", "--report", "full"),
    ("search", "nothing.toml", "--report", "a" * 250),
    ("search", "nothing.toml", "-o", "new", "--report", "new"),
    ("search", "nothing.toml", "-o", "new/run", "--report", "new"),
    ("map", "nothing.toml", "-o", "file"),
    ("export", "nowhere", "--trial", "0", "-o", "folder.safetensors"),
    ("export", "nowhere", "--trial", "0", "-o", "full", "--overwrite"),
    ("export", "nowhere", "--trial", "0", "-o", "file", "--overwrite"),
    ("export", "nowhere", "--trial", "0", "-o", "file/b", "--finetune-steps", "9"),
    ("latents", "nowhere", "--vae", "nowhere", "--image-size", "8", "-o", "file"),
]


@pytest.mark.parametrize("dry", [False, True], ids=["real", "dry"])
@pytest.mark.parametrize("args", LATE, ids=range(len(LATE)))
def test_an_output_that_can_t_be_written_is_refused_before_inputs_are_read(
    place, tmp_path, monkeypatch, capsys, args, dry
):
    """The network, bundle, study or images are missing too: what comes first is what is said."""
    monkeypatch.chdir(tmp_path)
    text = (place / "tiny.toml").read_text().replace(f"{place}/net", "nothing")
    Path("nothing.toml").write_text(text)
    Path("file").write_text("not a folder")
    Path("folder.safetensors").mkdir()
    Path("full").mkdir()
    Path("full/precious").write_text("kept")
    before = sorted(tmp_path.rglob("*"))
    code, said = as_program(monkeypatch, capsys, *args, *(["--dry-run"] if dry else []))
    line = said.err.strip()
    assert code == 1 and "\n" not in line and "Traceback" not in line and len(line) < 500
    assert "nothing.safetensors" not in line and "nowhere" not in line
    output = args[
        args.index(
            "--report" if "--report" in args else "--run-dir" if "--run-dir" in args else "-o"
        )
        + 1
    ]
    assert output[:100] in line
    assert sorted(tmp_path.rglob("*")) == before and Path("file").read_text() == "not a folder"


def test_the_same_commands_with_outputs_that_can_be_written_get_to_their_inputs(
    place, tmp_path, monkeypatch, capsys
):
    """Negative control of the refusals above."""
    monkeypatch.chdir(tmp_path)
    text = (place / "tiny.toml").read_text().replace(f"{place}/net", "nothing")
    Path("nothing.toml").write_text(text)
    for args, missing in (
        (("train", "nothing.toml", "-o", "deep/x.safetensors"), "nothing.safetensors"),
        (("sample", "nowhere", "-o", "deep/x.npz"), "nowhere"),
        (("search", "nothing.toml", "-o", "a" * 200, "--report", "b" * 200), "nothing.safetensors"),
        (("export", "nowhere", "--trial", "0", "-o", "deep/b"), "nowhere"),
    ):
        code, said = as_program(monkeypatch, capsys, *args)
        assert (
            code == 1
            and missing in said.err
            and sorted(p.name for p in tmp_path.iterdir()) == ["nothing.toml"]
        )


def test_an_export_that_can_t_be_written_trains_nothing(place, tmp_path, monkeypatch, capsys):
    (tmp_path / "b").mkdir()
    args = (
        "export",
        place / "runs/tiny",
        "--trial",
        1,
        "--finetune-steps",
        7,
        "-o",
        tmp_path / "b",
    )
    code, said = as_program(monkeypatch, capsys, *args)
    assert code == 1 and "exists already" in said.err
    assert (
        not list((place / "runs/tiny").rglob("finetune-7"))
        and list((tmp_path / "b").iterdir()) == []
    )


def test_two_exports_share_one_full_fine_tuning(place, tmp_path, monkeypatch):
    """The second waits for the first, whose checkpoint it would break, and takes its weights."""
    from asesearch.deployment import export as module
    from asesearch.finetuning import Trainer
    from asesearch.locks import try_lock

    steps, held = [], []
    real, train_step = module.finetune, Trainer.train_step

    def finetune(*args):
        with try_lock(args[5] / "training.lock") as free:
            held.append(not free)
        return real(*args)

    def counted(self, batch):
        steps.append(1)
        return train_step(self, batch)

    monkeypatch.setattr(module, "finetune", finetune)
    monkeypatch.setattr(Trainer, "train_step", counted)
    args = ("export", place / "runs/tiny", "--trial", 1, "--finetune-steps", 5, "-o")
    call(*args, tmp_path / "a")
    call(*args, tmp_path / "b")
    assert held == [True, True] and len(steps) == 5
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[k], second[k]) for k in first)


def test_numbers_that_can_t_be_counted_to_are_refused(place, tmp_path, monkeypatch, capsys):
    many = str(10**20)
    export = ("export", place / "runs/tiny", "--trial", 1, "-o", tmp_path / "b")
    for dry in ((), ("--dry-run",)):
        code, said = as_program(monkeypatch, capsys, *export, "--finetune-steps", many, *dry)
        assert code == 1 and "num_steps: Input should be less than" in said.err
    out = ("--out", tmp_path / "x.safetensors")
    code, said = as_program(monkeypatch, capsys, "train-extractor", *out, "--seed", many)
    assert code == 2 and "4294967295" in said.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["x.pt", "x", "x.safetensors.bak"])
def test_the_extractors_weights_are_safetensors(tmp_path, monkeypatch, capsys, name):
    code, said = as_program(monkeypatch, capsys, "train-extractor", "--out", tmp_path / name)
    assert code == 1 and "written as .safetensors" in said.err


def test_an_extractor_that_is_not_shipped_can_t_be_trained(tmp_path, monkeypatch, capsys):
    args = ("train-extractor", "--name", "inception-v3-compat", "--out", tmp_path / "x.safetensors")
    code, said = as_program(monkeypatch, capsys, *args)
    assert code == 1 and "one of fashion-cnn, fashion-vit; got 'inception-v3-compat'" in said.err


# -- options that would be ignored -----------------------------------------------------------------

IGNORED = [
    (("evaluate", "RUN", "--trial", "0", "--schedule", "3 1"), "a trial has its own schedule"),
    (("evaluate", "RUN", "--trial", "0", "--schedule", "full"), "a trial has its own schedule"),
    (("evaluate", "RUN", "--check"), "got no --trial"),
    (
        ("export", "RUN", "-o", "b", "--trial", "0", "--pick", "best-quality"),
        "--trial names the point",
    ),
    (("export", "RUN", "-o", "b", "--trial", "0", "--quality", "1se"), "--trial names the point"),
    (("export", "RUN", "-o", "b", "--trial", "0", "--time", "0.5"), "--trial names the point"),
    (("export", "RUN", "-o", "b", "--quality", "1se"), "best-quality none"),
    (
        ("export", "RUN", "-o", "b", "--pick", "fastest-within", "--quality", "1se", "--time", "1"),
        "got fastest-within",
    ),
    (("export", "RUN", "-o", "b", "--trial", "0", "--vae", "v"), "the format diffusers only"),
    (("export", "RUN", "-o", "b", "--trial", "0", "--format", "tf"), "must be one of bundle, diff"),
    (("search", "STUDY", "--trials", "3", "--budget", "1h"), "--trials or --budget, not both"),
    (("sample", "b", "-o", "x.png", "--prompt", "a", "--label", "1"), "--prompt goes with"),
    (("sample", "b", "-o", "x.png", "--text-encoder", "t"), "--prompt goes with"),
    (
        ("latents", "i", "--vae", "v", "-o", "l", "--image-size", "8", "--max-length", "9"),
        "--max-length is for captions",
    ),
]


@pytest.mark.parametrize("dry", [False, True], ids=["real", "dry"])
@pytest.mark.parametrize(("args", "reason"), IGNORED, ids=[" ".join(a[0]) for a in IGNORED])
def test_options_that_would_be_ignored_are_refused(
    place, tmp_path, monkeypatch, capsys, args, reason, dry
):
    monkeypatch.chdir(tmp_path)
    paths = {"RUN": place / "runs/tiny", "STUDY": place / "tiny.toml"}
    args = [paths.get(a, a) for a in args] + (["--dry-run"] if dry else [])
    code, said = as_program(monkeypatch, capsys, *args)
    assert code == 1 and reason in said.err and said.err.strip().count("\n") == 0
    assert list(tmp_path.iterdir()) == []


# -- schedules of the command line -----------------------------------------------------------------


def test_what_is_printed_for_unequal_intervals_is_taken_back(place, tmp_path):
    for text in ("3 2 @ 0 300 1000", "3 1", "full"):
        said = json.loads(call("evaluate", place / "runs/tiny", "--schedule", text, "--dry-run")[0])
        again = json.loads(
            call("evaluate", place / "runs/tiny", "--schedule", said["schedule"], "--dry-run")[0]
        )
        assert again["schedule"] == said["schedule"] == {"full": "3"}.get(text, text)
    path = tmp_path / "SCHEDULE.JSON"
    path.write_text("[3, 2, 1]", encoding="utf-16")
    assert (
        json.loads(call("evaluate", place / "runs/tiny", "--schedule", path, "--dry-run")[0])[
            "schedule"
        ]
        == "3 2 1"
    )


# -- what is reported ------------------------------------------------------------------------------


def test_search_prints_the_confirmed_front(place, tmp_path):
    files = (place / "runs/tiny/confirmations").glob("*.json")  # one per point
    confirmed = [c for f in files for c in json.loads(f.read_text())["confirmations"]]
    by_number = {c["number"]: c for c in confirmed}
    out, _ = call(
        "search", place / "tiny.toml", "--out", place / "runs/tiny", "--report", tmp_path / "r"
    )
    front = json.loads(out)["front"]
    assert 1 <= len(front) <= len(confirmed) and all(row["confirmed"] for row in front)
    for row in front:
        own = by_number[row["trial"]]
        first, second = own["quality"]["values"]
        assert row["quality"] == pytest.approx((first + second) / 2)
        assert row["measured_time_frac"] == own["measured_time_frac"] <= row["time_frac"]
        assert row["speed_up"] == 1 / row["time_frac"]
        assert row["std_error"] == pytest.approx(abs(first - second) / 2)
        for other in confirmed:  # nothing confirmed is both faster and better
            faster = other["measured_time_frac"] < row["measured_time_frac"]
            assert not (faster and sum(other["quality"]["values"]) / 2 < row["quality"])


def test_sample_reports_the_steps_and_blocks_that_it_runs(place, tmp_path):
    call("export", place / "runs/tiny", "--trial", 1, "-o", tmp_path / "b")  # 3 2 2 1
    for steps, depths in ((1, [1]), (2, [2, 1]), (None, [2, 2, 1])):
        args = (
            "sample",
            tmp_path / "b",
            "-o",
            tmp_path / "x.npz",
            "--num",
            2,
            *(["--steps", steps] if steps else []),
        )
        plan = json.loads(call(*args, "--dry-run")[0])
        assert not (tmp_path / "x.npz").exists()
        said = json.loads(call(*args)[0])
        (tmp_path / "x.npz").unlink()
        assert (
            plan["sampling"]["num_steps"]
            == said["sampling"]["num_steps"]
            == said["nfe"]
            == len(depths)
        )
        assert (
            said["blocks_run_frac"]
            == plan["blocks_run_frac"]
            == pytest.approx(said["blocks_run"] / (3 * said["nfe"]))
        )
        assert said["blocks_run"] <= sum(depths) + 2


@pytest.mark.parametrize(
    "options", [("--label", 99), ("--steps", 1001), ("--seed", 2**32), ("--vae", "nowhere")]
)
def test_a_dry_run_of_sample_refuses_what_sampling_would(
    place, tmp_path, monkeypatch, capsys, options
):
    call("export", place / "runs/tiny", "--trial", 0, "-o", tmp_path / "b")
    code, said = as_program(
        monkeypatch,
        capsys,
        "sample",
        tmp_path / "b",
        "-o",
        tmp_path / "x.png",
        "--dry-run",
        *options,
    )
    assert code == 1 and said.err.count("\n") == 1 and "got" in said.err and not said.out


@pytest.mark.thorough
def test_a_number_of_trials_takes_the_place_of_the_files_budget(place, tmp_path):
    """A tenth of a second is spent by the full network alone; three trials are three trials."""
    from asesearch.study import Study

    study = tmp_path / "hasty.toml"
    study.write_text((place / "tiny.toml").read_text().replace("num_trials = 3", 'budget = "0.1s"'))
    args = ("search", study, "--out", tmp_path / "run", "--report", tmp_path / "report")
    call(*args)
    assert len(Study.open(tmp_path / "run").records()) < 3
    call(*args, "--trials", 3)
    assert len(Study.open(tmp_path / "run").records()) == 3


# -- Ctrl-C, --debug, closed pipes -----------------------------------------------------------------


@pytest.mark.thorough
def test_ctrl_c_says_what_is_kept_and_the_same_command_resumes(place, tmp_path):
    """A real signal to a real process, in the middle of a search."""
    from asesearch.study import Study

    args = [
        "search",
        place / "tiny.toml",
        "--out",
        tmp_path / "run",
        "--report",
        tmp_path / "r",
        "--trials",
    ]
    child = Child(program, *args, "90")
    try:
        while child.is_alive() and "trial 0 (full)" not in child.stderr():
            time.sleep(0.01)
        os.kill(child.pid, signal.SIGINT)
        code, out, err = child.ended()
    finally:
        child.kill()
    kept = len(Study.open(tmp_path / "run").records())
    last = err.replace("\r", "\n").strip().splitlines()[-1]
    assert (code, out) == (130, "") and "Traceback" not in err, err
    assert (
        last
        == f"interrupted: {tmp_path}/run keeps {kept} of 90 schedules; the same command resumes"
    )
    assert 1 <= kept < 90 and not (tmp_path / "r").exists()
    _, err = call(*args, kept + 1)
    assert f"{kept} of {kept + 1} schedules on record; continuing" in err


INTERRUPTED = [
    (
        "asesearch.finetuning.Trainer.run",
        ("train", "SCRATCH", "-o", "x.safetensors", "--run-dir", "t"),
        "kept in t",
    ),
    (
        "asesearch.finetuning.from_file.save_backbone",
        ("train", "SCRATCH", "-o", "x.safetensors", "--run-dir", "t"),
        "kept in t",
    ),
    (
        "asesearch.deployment.bundle.Bundle.sample",
        ("sample", "BUNDLE", "-o", "x.png"),
        "no image was written to x.png",
    ),
    (
        "asesearch.deployment.images.save_images",
        ("sample", "BUNDLE", "-o", "x.png", "--num", "2"),
        "no image was written to x.png",
    ),
    ("asesearch.search.Workbench.evaluate", ("evaluate", "RUN"), "begins again"),
    ("asesearch.report.write_report", ("report", "RUN", "-o", "r"), "same command completes it"),
    (
        "asesearch.search.study_map.measure_map",
        ("map", "STUDY", "-o", "m"),
        "nothing was written to m",
    ),
    (
        "asesearch.deployment.export.export",
        ("export", "RUN", "--trial", "0", "-o", "b"),
        "no bundle was written to b",
    ),
    (
        "asesearch.deployment.export.finetune",
        ("export", "RUN", "--trial", "0", "-o", "b", "--finetune-steps", "9"),
        "resumes",
    ),
    (
        "asesearch.encoding.encode_folder",
        ("latents", "i", "--vae", "v", "--image-size", "8", "-o", "l"),
        "kept in l",
    ),
    (
        "asesearch.evaluation.classifiers.train_extractor",
        ("train-extractor", "-o", "e.safetensors"),
        "no weights were written",
    ),
    ("asesearch.study.Study.open", ("evaluate", "RUN"), "its work had not begun"),
]


@pytest.mark.parametrize(("where", "args", "said"), INTERRUPTED, ids=[i[0] for i in INTERRUPTED])
def test_ctrl_c_is_one_line_in_every_command(place, tmp_path, monkeypatch, where, args, said):
    monkeypatch.chdir(tmp_path)
    if "BUNDLE" in args:
        call("export", place / "runs/tiny", "--trial", 0, "-o", tmp_path / "bundle")
    images = ImageArray(np.zeros((2, 1, 28, 28), np.uint8), np.arange(2), "none")
    monkeypatch.setattr(
        "asesearch.data.fashion_mnist", lambda *_, **__: images
    ) if "extractor" in args[0] else None
    before = sorted(p.name for p in tmp_path.iterdir())

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupt)
    paths = {
        "RUN": place / "runs/tiny",
        "STUDY": place / "tiny.toml",
        "SCRATCH": place / "scratch.toml",
        "BUNDLE": tmp_path / "bundle",
    }
    out, err = call(*(paths.get(a, a) for a in args), code=130)
    last = err.replace("\r", "\n").strip().splitlines()[-1]
    assert last.startswith("interrupted: ") and said in last and out == ""
    kept = {"t"} if args[0] == "train" else set()  # the folder that it resumes from
    assert {p.name for p in tmp_path.iterdir()} - kept == set(before)


@pytest.mark.parametrize("place_of_debug", range(4))
def test_debug_stands_anywhere(monkeypatch, place_of_debug):
    from asesearch.errors import ConfigError

    args = ["search", "missing.toml", "--dry-run"]
    monkeypatch.setattr(
        sys, "argv", ["asesearch", *args[:place_of_debug], "--debug", *args[place_of_debug:]]
    )
    with pytest.raises(ConfigError, match="can't read missing.toml"):
        main()


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_has_gone_is_no_traceback(tmp_path, stream):
    """As in `asesearch … | head -1`: a result, or an error."""
    read, write = os.pipe()
    os.close(read)
    other = "stderr" if stream == "stdout" else "stdout"
    args = ["--version"] if stream == "stdout" else ["train", "missing.toml", "-o", "x.safetensors"]
    command = [sys.executable, "-m", "asesearch", *args]
    done = subprocess.run(
        command, **{stream: write, other: subprocess.PIPE}, text=True, cwd=tmp_path, check=False
    )
    os.close(write)
    assert done.returncode == 1 and getattr(done, other) == ""


@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["real", "dry"])
def test_damaged_images_are_found_before_any_training(
    place, tmp_path, monkeypatch, capsys, caplog, dry
):
    from PIL import Image

    rng = np.random.default_rng(0)
    for label in range(10):
        (tmp_path / f"data/{label}").mkdir(parents=True)
        for i in range(2):
            pixels = rng.integers(0, 256, (28, 28), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"data/{label}/{i}.png")
    for name in ("3/1.png", "7/0.png"):
        content = (tmp_path / "data" / name).read_bytes()
        (tmp_path / "data" / name).write_bytes(content[: len(content) // 2])
    folder = f'kind = "image-folder"\npath = "{tmp_path}/data"\nimage_size = 28\nchannels = 1'
    text = (place / "tiny.toml").read_text()
    text = text.replace('kind = "fashion-mnist"\nsplit = "test"', folder, 1)
    (tmp_path / "damaged.toml").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ASESEARCH_CACHE", str(tmp_path / "cache"))
    args = (
        "finetune",
        "damaged.toml",
        "--schedule",
        "full",
        "-o",
        "x.safetensors",
        "--run-dir",
        "run",
    )
    code, said = as_program(monkeypatch, capsys, *args, *dry)
    line = said.err.strip().splitlines()[-1]
    assert code == 1 and "3/1.png" in line and "7/0.png" in line and "skip_damaged" in line
    assert not (tmp_path / "run").exists() and not (tmp_path / "x.safetensors").exists()
    (tmp_path / "damaged.toml").write_text(
        text.replace("channels = 1", "channels = 1\nskip_damaged = true")
    )
    code, _ = as_program(monkeypatch, capsys, *args, *dry)
    assert code == 0 and "skipped 2 damaged of 20 images" in caplog.text


# -- the same from Python --------------------------------------------------------------------------


def test_python_evaluates_a_point_as_the_command_does(place):
    from asesearch.errors import ConfigError
    from asesearch.search import PointEvaluation

    run_dir = place / "runs/tiny"
    evaluation = PointEvaluation(run_dir, schedule="3 1 1 1")
    quality, _ = evaluation.run()
    said = json.loads(call("evaluate", run_dir, "--schedule", "3 1 1 1")[0])
    assert (said["value"], said["schedule"]) == (quality.value, str(evaluation.point.schedule))
    with pytest.raises(ConfigError, match="compared with that of a trial; got none"):
        evaluation.compare(quality)


def test_python_searches_with_the_commands_refusals_and_report(place, tmp_path):
    from asesearch import load_study, run_search
    from asesearch.errors import ConfigError

    config = load_study(place / "tiny.toml")
    with pytest.raises(ConfigError, match="beside the study or into it"):
        run_search(config, tmp_path / "new" / "run", report_dir=tmp_path / "new")
    assert not (tmp_path / "new").exists()
    config = config.with_options("search", num_trials=len(study_of(place).records()))
    results = run_search(config, place / "runs/tiny", report_dir=tmp_path / "report")
    assert results.confirmations and (tmp_path / "report/index.html").is_file()


def study_of(place):
    from asesearch.study import Study

    return Study.open(place / "runs/tiny")
