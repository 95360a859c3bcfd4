"""Optuna's own tools on a study as it is: visualization, and what the dashboard shows."""

import errno
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest
from PIL import Image

from asesearch.data import save_images
from asesearch.point import Point
from asesearch.schedule import ExitSchedule
from asesearch.score import EvaluationResult
from asesearch.search import dashboard
from asesearch.search.runner import run_trials
from asesearch.study import Study, directory
from asesearch.study.records import RECORD, LowFidelity, TrialRecord
from tests.browser import CHROMIUM, Browser
from tests.search.fake_search import LOW_FIDELITY, OWN, PROTOCOL, FakeBench, make_config

SHOWN = np.random.default_rng(0).integers(0, 255, (9, 3, 8, 8)).astype(np.uint8)


class WithSamples(FakeBench):
    """A trial leaves images, as a real one does."""

    def try_point(self, point, folder):
        outcome = super().try_point(point, folder)
        name = directory.samples_file(point.sampler, self.own_sampler)
        save_images(SHOWN, folder / name)
        return outcome


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A finished study of seven trials, one of which failed."""
    config = make_config(num_trials=7, proposer="random")
    study = Study(config, tmp_path_factory.mktemp("dashboard") / "run")
    run_trials(study, WithSamples(config=config, fails=1))
    return study


def record(state="complete", **fields):
    schedule = ExitSchedule.from_string("6 6 3 3", depth=6)
    quality = EvaluationResult(PROTOCOL, (4.0, 6.0))
    fracs = {"time_frac": 0.8, "flops_frac": 0.75, "block_frac": 0.7}
    known = {"quality": quality, **fracs} if state == "complete" else {}
    return TrialRecord(3, "tpe", Point(schedule, OWN), state, **{**known, **fields})


def test_a_note_says_what_came_of_a_trial_and_draws_its_schedule():
    rung = LowFidelity(EvaluationResult(LOW_FIDELITY, (9.0, 9.0)), True, None, "a warm start")
    note = dashboard.note_of(record(low_fidelity=rung))
    assert "**tpe**: 6 6 3 3, sampled by ddim-50" in note
    assert "Fréchet distance (fake) 5 ± 1" in note
    assert "0.800× the full network's sampling time, 1.25× as fast" in note
    assert "block calls: 0.700×" in note and "score 9: fine-tuned, a warm start" in note
    drawing = note.split("```")[1].strip().splitlines()
    assert drawing == [
        f"t    0 …  500  {'#' * 24} 6",
        f"t  500 … 1000  {'#' * 12}{' ' * 12} 3",
        "blocks run of 6; t = 0 is data, 1000 noise",
    ]
    assert "- failed: the loss" in dashboard.note_of(record("failed", failure="the loss …"))


@pytest.mark.parametrize("body", ["short", "a long one\n" * 1000])
@pytest.mark.parametrize("storage", ["memory", "sqlite", "journal"])
def test_notes_are_read_by_the_dashboard(body, storage, tmp_path):
    from optuna_dashboard import get_note

    made = {
        "memory": lambda: None,
        "sqlite": lambda: f"sqlite:///{tmp_path}/study.db",
        "journal": lambda: optuna.storages.JournalStorage(
            optuna.storages.journal.JournalFileBackend(str(tmp_path / "journal"))
        ),
    }
    study = optuna.create_study(storage=made[storage]())
    trial = study.ask()
    other = study.ask()
    dashboard.save_note(study, trial, body)
    assert get_note(trial) == body and get_note(other) == ""


@pytest.mark.thorough
def test_every_trial_has_a_note_readable_attributes_and_its_samples(searched):
    from optuna_dashboard import get_note

    study = searched.optuna
    store = optuna.artifacts.FileSystemArtifactStore(str(searched.run_dir / directory.ARTIFACTS))
    found = [t for t in study.trials if RECORD in t.user_attrs]
    assert len(found) == 7 and {searched.record_of(t).state for t in found} >= {"complete"}
    for trial in found:
        kept = searched.record_of(trial)
        assert trial.user_attrs["schedule"] == str(kept.schedule)
        live = optuna.trial.Trial(study, trial._trial_id)
        assert get_note(live) == dashboard.note_of(kept)
        if kept.state == "failed":
            continue
        assert trial.user_attrs["speed-up"] == pytest.approx(1 / kept.time_frac, rel=1e-3)
        assert trial.user_attrs["score"] == pytest.approx(kept.quality.value)
        (meta,) = optuna.artifacts.get_all_artifact_meta(trial, storage=study._storage)
        assert (meta.filename, meta.mimetype) == (f"samples-{trial.number}.png", "image/png")
        with store.open_reader(meta.artifact_id) as file:
            assert Image.open(file).size == (24, 24)
    assert study.metric_names == ["score", "relative cost"]
    assert "depth at data" in found[0].params


def test_a_trial_that_another_worker_ended_is_let_alone(searched):
    ended = next(t for t in searched.optuna.trials if RECORD in t.user_attrs)
    dashboard.show_trial(searched, ended, searched.record_of(ended))
    (again,) = (t for t in searched.optuna.trials if t.number == ended.number)
    assert again.user_attrs == ended.user_attrs


@pytest.mark.thorough
def test_a_study_of_an_earlier_release_goes_on_with_its_names(tmp_path, monkeypatch):
    config = make_config(num_trials=4, proposer="tpe")
    with monkeypatch.context() as earlier:
        earlier.setattr("asesearch.search.runner.has_short_names", lambda study: True)
        run_trials(Study(config, tmp_path), FakeBench(config=config))
    longer = make_config(num_trials=8, proposer="tpe")
    study = Study(longer, tmp_path)
    run_trials(study, FakeBench(config=longer))
    names = {frozenset(t.params) for t in study.optuna.trials}
    assert len(study.records()) == 8 and names == {frozenset({"high", "low", "u1", "u2"})}


def score_of(trial):
    return trial.values[0]


@pytest.mark.parametrize("backend", ["plotly", "matplotlib"])
def test_visualization_draws_a_study(searched, backend):
    import matplotlib.pyplot as plt

    module = optuna.visualization
    if backend == "matplotlib":
        module = optuna.visualization.matplotlib
    study = Study.open(searched.run_dir).optuna
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # experimental, and what matplotlib thinks of its layout
        front = module.plot_pareto_front(study)
        about = {"target": score_of, "target_name": "score"}
        module.plot_param_importances(study, **about)
        module.plot_optimization_history(study, **about)
        module.plot_parallel_coordinate(study, **about)
        module.plot_slice(study, **about)
        module.plot_hypervolume_history(study, reference_point=[10.0, 1.1])
        module.plot_timeline(study)
    title = front.layout.xaxis.title.text if backend == "plotly" else front.get_xlabel()
    assert title == "score"
    plt.close("all")


# -- the dashboard itself ------------------------------------------------------------------------


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def ask(url):
    """The answer, once the server is there."""
    end = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                return answer.read()
        except OSError:
            assert time.monotonic() < end, url
            time.sleep(0.2)


@pytest.fixture
def served(searched):
    """The address of a dashboard of the study."""
    port = free_port()
    program = Path(sys.executable).with_name("optuna-dashboard")
    run_dir = searched.run_dir
    command = [
        program,
        f"sqlite:///{run_dir}/{directory.DATABASE}",
        "--artifact-dir",
        run_dir / directory.ARTIFACTS,
        "--port",
        port,
    ]
    process = subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONWARNINGS": ""},
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def test_a_full_disk_costs_a_search_its_thumbnails_alone(tmp_path, monkeypatch, caplog):
    def full(**_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(dashboard, "upload_artifact", full)
    config = make_config(num_trials=3, proposer="random")
    study = Study(config, tmp_path / "run")
    run_trials(study, WithSamples(config=config))
    assert [r.state for r in study.records()] == ["complete"] * 3
    said = [r.getMessage() for r in caplog.records]
    assert sum("goes without the samples of trial" in line for line in said) == 3
    assert all("No space left" in line for line in said if "goes without" in line)


@pytest.mark.slow
def test_the_dashboard_opens_a_study(served, searched, tmp_path):
    (summary,) = json.loads(ask(f"{served}/api/studies"))["study_summaries"]
    detail = json.loads(ask(f"{served}/api/studies/{summary['study_id']}?after=0"))
    trials = {t["number"]: t for t in detail["trials"]}
    best = next(r for r in searched.records() if r.state == "complete")
    shown = trials[best.number]
    assert detail["objective_names"] == ["score", "relative cost"]
    assert "```" in shown["note"]["body"]
    artifact = shown["artifacts"][0]
    place = f"{summary['study_id']}/{shown['trial_id']}/{artifact['artifact_id']}"
    assert ask(f"{served}/artifacts/{place}").startswith(b"\x89PNG")
    if CHROMIUM is None:
        return
    with Browser(tmp_path / "profile") as browser:
        base = f"{served}/dashboard/studies/{summary['study_id']}"
        browser.open(base)
        browser.wait_for("!!document.querySelector('.js-plotly-plot')")  # the front among others
        browser.wait_for("document.body.innerText.includes('Pareto')")
        browser.open(f"{base}/trials?numbers={best.number}")
        browser.wait_for("document.body.innerText.includes('depth at data')")
        browser.wait_for("document.body.innerText.includes('blocks run of')")  # the note
        browser.wait_for(
            "[...document.images].some((i) => i.src.includes('artifact') && i.naturalWidth)"
        )
        assert browser.errors == []


def test_large_samples_are_a_small_preview():
    images = np.zeros((2, 1, 256, 300), dtype=np.uint8)
    images[:, :, :3, :3] = 90
    small = dashboard.smaller(images)
    assert small.shape == (2, 1, 85, 100) and small.dtype == np.uint8
    assert small[0, 0, 0, 0] == 90 and small[0, 0, 1, 0] == 0
    assert dashboard.smaller(SHOWN) is SHOWN


def test_what_a_record_shows_has_no_surprise():
    found = dashboard.attributes(replace(record(), time_frac=1 / 3, flops_frac=2 / 3))
    assert found["relative time"] == 0.3333 and found["speed-up"] == 3.0
    assert found["relative FLOPs"] == 0.6667
    assert set(dashboard.attributes(record("failed"))) == {"schedule", "sampler"}
