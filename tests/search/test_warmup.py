"""The warm-up: made once, shared by all workers, gone on with where it was killed; and what trials
make of it."""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout

from asesearch.backbones import DiT
from asesearch.backbones.digests import weights_digest
from asesearch.backbones.exit_weights import ExitWeights
from asesearch.backbones.saving import save_backbone
from asesearch.config import parse_study
from asesearch.deployment.export import export
from asesearch.deployment.reading import load_bundle
from asesearch.deployment.verify import verify
from asesearch.errors import ConfigError
from asesearch.evaluation.cost import LatencyTable
from asesearch.point import Point
from asesearch.report.ladder import spending
from asesearch.sampler import Sampler
from asesearch.schedule import ExitSchedule
from asesearch.search import search as whole_search
from asesearch.search.costs import elastic_depths
from asesearch.search.runner import run_trials
from asesearch.search.warmup import warm_up
from asesearch.search.whole import SearchRun
from asesearch.search.workbench import Workbench
from asesearch.study import directory
from asesearch.study.difficulty import DifficultyMap
from asesearch.study.directory import ELASTIC_WEIGHTS as WEIGHTS
from asesearch.study.directory import MAP
from asesearch.study.directory import WARM_UP as COST
from asesearch.study.study import Study
from tests.processes import Child
from tests.shapes import SHAPE


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    net = DiT(**SHAPE)
    for p in net.parameters():
        if p.requires_grad and not p.any():
            torch.nn.init.normal_(p, std=0.05)
    return net


@pytest.fixture
def study(network, tmp_path):
    save_backbone(network, tmp_path / "net.safetensors", {})
    return parse_study(
        {
            "name": "tiny",
            "backbone": {"kind": "dit", "checkpoint": str(tmp_path / "net.safetensors")},
            "data": {"kind": "fashion-mnist", "split": "test"},
            "train": {"num_steps": 3, "batch_size": 8},
            "elastic": {
                "num_steps": 4,
                "batch_size": 8,
                "checkpoint_every": 2,
                "distill_frac": 1.0,
            },
            "map": {"num_bins": 4, "num_images": 4},
            "sampling": {"solver": "ddim", "num_steps": 4, "batch_size": 40},
            "evaluation": {
                "extractor": "fashion-cnn",
                "num_samples": 70,
                "repeats": 2,
                "reference": {"kind": "fashion-mnist", "split": "train"},
            },
            "search": {
                "proposer": "difficulty",
                "num_intervals": 4,
                "num_trials": 4,
                "samplers": ["dpm++2m-2"],
            },
            "promotion": {"num_samples": 66, "repeats": 1, "always": 1},
            "confirm": {
                "num_samples": 70,
                "repeats": 2,
                "time_images": 4,
                "time_repeats": 1,
                "max_points": 2,
            },
        },
        "test",
    )


def weights(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


class Killed(BaseException):
    pass


@pytest.mark.thorough
def test_made_once_and_the_same_after_a_kill(study, tmp_path):
    straight = warm_up(Workbench(study, tmp_path / "a"), tmp_path / "a")
    assert (
        straight.seconds["elastic"] > 0
        and straight.seconds["map"] > 0
        and len(straight.losses) == 4
    )
    assert straight.gflops["elastic"] > 0 and straight.gflops["map"] > 0
    calls = []

    def die(step, loss):
        calls.append(step)
        if step >= 4:
            raise Killed

    with pytest.raises(Killed):
        warm_up(Workbench(study, tmp_path / "b"), tmp_path / "b", die)
    assert not (tmp_path / "b" / WEIGHTS).exists()
    resumed = warm_up(
        Workbench(study, tmp_path / "b"), tmp_path / "b", lambda step, loss: calls.append(step)
    )
    assert calls == [2, 4, 4]  # the first two steps were not made again
    assert torch.equal(weights(resumed.start), weights(straight.start))
    assert resumed.difficulty_map == straight.difficulty_map
    bench = Workbench(study, tmp_path / "b")
    again = warm_up(bench, tmp_path / "b", lambda *_: pytest.fail("made a second time"))
    assert (
        torch.equal(weights(bench.trials.start), weights(straight.start))
        and again.seconds == resumed.seconds
    )
    assert not torch.equal(weights(bench.trials.start), weights(bench.backbone))


def test_other_workers_wait_for_the_first(study, tmp_path):
    taken = []

    def try_lock(step, loss):
        with pytest.raises(Timeout):
            FileLock(tmp_path / "run" / "warm-up.lock", timeout=0).acquire()
        taken.append(step)

    warm_up(Workbench(study, tmp_path / "run"), tmp_path / "run", try_lock)
    assert taken


def search(study, run_dir):
    run_trials(Study(study, run_dir), Workbench(study, run_dir))


@pytest.mark.thorough
def test_a_worker_that_would_wait_tunes_the_full_network_first(study, tmp_path):
    """And the trial of the full network, whoever makes it, takes that."""
    here = Workbench(study, tmp_path / "run")
    record = Study(study, tmp_path / "run")
    weights = record.trial_dir(here.full) / directory.WEIGHTS
    begun = []
    there = []

    def wait(step, loss):
        if not begun:
            begun.append(Child(search, study, tmp_path / "run"))
            deadline = time.monotonic() + 60
            while not weights.exists() and begun[0].is_alive() and time.monotonic() < deadline:
                time.sleep(0.05)
        there.append(weights.exists())

    run_trials(record, here, on_warm_up=wait)
    code, _, err = begun[0].ended()
    assert code == 0, err
    assert all(there)
    full = record.results().full
    assert full is not None and full.state == "complete" and full.seconds["finetune"] > 0
    # the same as of one worker alone
    search(study, tmp_path / "alone")
    alone = Study(study, tmp_path / "alone").results().full
    assert full.quality == alone.quality and full.gflops == alone.gflops


def test_nothing_is_made_where_nothing_needs_it(study, tmp_path):
    plain = study.model_copy(
        update={
            "elastic": None,
            "promotion": None,
            "search": study.search.model_copy(update={"proposer": "tpe"}),
        }
    )
    bench = Workbench(plain, tmp_path / "run")
    made = warm_up(bench, tmp_path / "run")
    assert made.start is bench.backbone and made.difficulty_map is None and made.seconds == {}
    assert not (tmp_path / "run").exists()


@pytest.mark.thorough
@pytest.mark.parametrize("content", [b"", b"{", b"\x80\x81", b"null"])
def test_a_damaged_map_is_measured_again_and_damaged_costs_are_forgotten(
    study, tmp_path, caplog, content
):
    made = warm_up(Workbench(study, tmp_path / "run"), tmp_path / "run")
    (tmp_path / "run" / MAP).write_bytes(content)
    again = warm_up(Workbench(study, tmp_path / "run"), tmp_path / "run")
    assert again.difficulty_map == made.difficulty_map and f"{MAP} is damaged" in caplog.text
    assert (
        DifficultyMap.from_dict(json.loads((tmp_path / "run" / MAP).read_text()))
        == made.difficulty_map
    )
    (tmp_path / "run" / COST).write_bytes(content)
    assert warm_up(Workbench(study, tmp_path / "run"), tmp_path / "run").seconds == {}
    assert f"{COST} is damaged" in caplog.text


def test_damaged_elastic_weights_are_named_and_made_again(study, tmp_path, caplog):
    start = warm_up(Workbench(study, tmp_path / "run"), tmp_path / "run").start
    before = {k: v.clone() for k, v in start.state_dict().items()}  # the file is mapped
    (tmp_path / "run" / WEIGHTS).unlink()
    (tmp_path / "run" / WEIGHTS).write_text("{")
    again = warm_up(Workbench(study, tmp_path / "run"), tmp_path / "run").start.state_dict()
    assert f"{WEIGHTS} is damaged" in caplog.text
    assert all(torch.equal(again[k], before[k]) for k in before)


@pytest.mark.parametrize("left", [b"", b"\x20\x00\x00\x00\x00\x00\x00\x00{}"])
def test_damaged_checkpoints_of_trainings_are_named_and_begun_again(study, tmp_path, caplog, left):
    """As a power cut leaves them."""
    bench = Workbench(study, tmp_path / "run")
    checkpoint = tmp_path / "run" / "elastic" / "training.safetensors"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(left)
    made = warm_up(bench, tmp_path / "run")
    assert len(made.losses) == 4 and not checkpoint.exists()
    assert f"{checkpoint} is damaged" in caplog.text
    assert "the training begins again" in caplog.text
    folder = tmp_path / "run" / "trials" / "3-1"
    folder.mkdir(parents=True)
    (folder / "training.safetensors").write_bytes(left)
    bench.trials.start = made.start
    tuned = bench.trials.tuned(ExitSchedule.from_string("3 1", 3), folder)
    assert len(tuned.losses) == 3 and f"{folder / 'training.safetensors'} is damaged" in caplog.text


@pytest.mark.thorough
def test_a_relative_storage_is_resumed_from_another_working_directory(study, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    how = study.search.model_copy(update={"storage": "sqlite:///trials.db", "num_trials": 1})
    study = study.model_copy(update={"search": how})
    whole_search(study, Path("run"))
    more = study.search.model_copy(update={"num_trials": 2})
    study = study.model_copy(update={"search": more})
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert SearchRun(study, Path("../run"), dry_run=True).plan.num_trials == 1
    assert len(whole_search(study, Path("../run")).records) >= 2
    assert not (tmp_path / "elsewhere" / "trials.db").exists()


@pytest.mark.parametrize("batch_size", [4, 64])
def test_the_full_network_gets_the_compute_of_warm_up_and_tuning_together(
    study, tmp_path, batch_size
):
    elastic = study.elastic.model_copy(update={"batch_size": batch_size})
    study = study.model_copy(update={"elastic": elastic})
    bench = Workbench(study, tmp_path / "run")
    warm_up(bench, tmp_path / "run")
    start, config = bench.trials.tuning(bench.full)
    assert start is bench.backbone and config.distill_frac == 0
    spent = bench.costs.training_gflops(elastic_depths(bench), elastic)
    spent += bench.costs.training_gflops(bench.full, study.train)
    step = bench.costs.training_gflops(bench.full, config) / config.num_steps
    assert spent <= config.num_steps * step < spent + step
    start, config = bench.trials.tuning(ExitSchedule.from_string("3 1", 3))
    assert start is bench.trials.start and config == study.train


def test_costs_are_over_the_full_network_under_the_studys_own_sampler(study, tmp_path):
    bench = Workbench(study, tmp_path / "run")
    bench.costs._latency = LatencyTable(
        40, "cpu", 1, "float32", (2.0, 3.0, 4.0), (0.1, 0.1, 0.1), 3
    )
    fast = Sampler("dpm++2m", 2)
    own = bench.costs.fracs(Point(bench.full, bench.own_sampler))
    assert own[0] == own[2] == 1.0
    assert bench.costs.fracs(Point(bench.full, fast)) == (0.5, 0.5, 0.5)
    shallow = Point(ExitSchedule.from_string("1", 3), fast)
    time, flops, blocks = bench.costs.fracs(shallow)
    assert time == 0.25 and blocks == pytest.approx(1 / 6) and blocks < flops < 0.5
    # arithmetic: samples times calls times FLOPs, three calls a training sample and one of the
    # teacher
    images = study.evaluation.num_samples * study.evaluation.repeats
    full = Point(bench.full, bench.own_sampler)
    assert bench.costs.sampling_gflops(full, bench.protocols.search) == pytest.approx(
        4 * images * bench.costs.flops[-1] / 1e9
    )
    spent = bench.costs.training_gflops(
        bench.full, study.train.model_copy(update={"distill_frac": 1.0})
    )
    assert spent == pytest.approx(3 * 8 * 4 * bench.costs.flops[-1] / 1e9)


@pytest.mark.parametrize("cfg_scale", [1.0, 2.5])
def test_latency_is_of_calls_as_large_as_the_samplers(study, tmp_path, cfg_scale):
    """Guidance doubles the batch of a sampler's calls; a table of half of it would tell another
    time."""
    changed = study.model_copy(
        update={"sampling": study.sampling.model_copy(update={"cfg_scale": cfg_scale})}
    )
    bench = Workbench(changed, tmp_path / "run")
    sizes = []
    bench.backbone.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    table = bench.costs.latency
    timed = set(sizes)
    sizes.clear()
    bench.sample(bench.backbone, Point(bench.full, bench.own_sampler), range(bench.batch_size))
    assert timed == set(sizes) == {table.batch_size}
    assert table.guided is (cfg_scale != 1.0) and table.precision == "float32"


@pytest.mark.thorough
def test_time_is_of_compiled_blocks_where_the_study_says_so(study, tmp_path, only_traced):
    how = study.sampling.model_copy(update={"compile": True})
    bench = Workbench(study.model_copy(update={"sampling": how}), tmp_path / "run")
    graphs = only_traced()  # of the image that goes through everything first
    assert graphs == 1 and bench.costs.latency.compile
    full = Point(bench.full, bench.own_sampler)
    bench.sample(bench.backbone, full, range(bench.batch_size))
    bench.measured_time(bench.backbone, full, bench.backbone)
    assert only_traced() == graphs + 1  # of batches, whatever their size and the exit depth
    assert not Workbench(study).costs.latency.compile and only_traced() == graphs + 1


def test_protocol_leaves_competing_samplers_out(study, tmp_path):
    bench = Workbench(study, tmp_path / "run")
    assert bench.protocols.search.solver is None and bench.protocols.search.num_steps is None
    alone = study.model_copy(update={"search": study.search.model_copy(update={"samplers": ()})})
    assert Workbench(alone).protocols.search.num_steps == 4


@pytest.mark.thorough
def test_a_whole_search_on_the_ladder(study, tmp_path):
    results = whole_search(study, tmp_path / "run")
    assert [r.origin for r in results.records[:2]] == ["full", "full dpm++2m-2"] and len(
        results.records
    ) == 4
    fast = results.records[1]
    # the full network's weights serve both samplers
    assert fast.seconds["finetune"] == 0 and "finetune" not in fast.gflops
    assert fast.time_frac == pytest.approx(0.5) and fast.quality.value != results.full.quality.value
    assert all(
        r.low_fidelity is not None and r.low_fidelity.quality.protocol.num_samples == 66
        for r in results.records
    )
    assert results.difficulty_map is not None and results.warm_up["seconds"]["elastic"] > 0
    assert {c.number for c in results.confirmations} >= {0} and all(
        c.seconds > 0 for c in results.confirmations
    )
    opened = Study.open(tmp_path / "run")
    folder = export(opened, fast, tmp_path / "bundle")
    bundle = load_bundle(folder)
    assert (bundle.sampling.solver, bundle.sampling.num_steps) == ("dpm++2m", 2)
    images = bundle.sample(range(4)).images
    shown = np.load(opened.trial_dir(fast.schedule) / "samples_dpm++2m-2.npz")["images"][:4]
    assert (
        np.abs(
            ((images * 127.5 + 128).clamp(0, 255).to(torch.uint8).numpy()).astype(int)
            - shown.astype(int)
        ).max()
        <= 1
    )
    assert json.loads((folder / "bundle.json").read_text())["sampling"]["num_steps"] == 2


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers
@pytest.mark.thorough
def test_a_search_with_the_pretrained_weights_at_full_depth(study, tmp_path):
    """Elastic weights, map, trials and export: full depth is the pretrained network's everywhere
    but in the baseline, and early exits are trained on their own timesteps alone."""
    how = {"full_depth": "pretrained", "warm_start": ("full", "3 3 2 1"), "num_trials": 4}
    search_config = study.search.model_copy(update=how)
    train = study.train.model_copy(update={"truncated_snr": True})
    seeds = study.confirm.model_copy(update={"training_seeds": 2, "max_points": 4})
    changed = study.model_copy(update={"search": search_config, "train": train, "confirm": seeds})
    bench = Workbench(changed, tmp_path / "run")
    results = whole_search(changed, tmp_path / "run")
    start = warm_up(bench, tmp_path / "run").start
    assert isinstance(start, ExitWeights)
    assert weights_digest(start.full) == weights_digest(bench.backbone)
    assert any(k.startswith("blocks.1.") for k in start.own_tensors())
    assert not any(k.startswith("blocks.2.") for k in start.own_tensors())
    assert max(row[-1] for row in results.difficulty_map.error_full) == 0
    opened = Study.open(tmp_path / "run")
    record = next(r for r in results.records if r.origin == "3 3 2 1")
    assert record.state == "complete"
    shallow = bench.costs.flops[1] + bench.costs.flops[0]
    assert record.gflops["finetune"] == pytest.approx(3 * 8 * 3 * shallow / 2 / 1e9)
    bundle = load_bundle(export(opened, record, tmp_path / "bundle"))
    assert isinstance(bundle.backbone, ExitWeights)
    assert weights_digest(bundle.backbone.full) == weights_digest(bench.backbone)
    with pytest.raises(ConfigError, match="at least 1 step; got finetune_steps 0"):
        export(opened, record, tmp_path / "none", finetune_steps=0)
    further = export(opened, record, tmp_path / "further", finetune_steps=2)
    tuned = load_bundle(further).backbone
    assert weights_digest(tuned.full) == weights_digest(bench.backbone)
    assert weights_digest(tuned.exits) != weights_digest(bundle.backbone.exits)
    pipeline = export(opened, record, tmp_path / "pipeline", format="diffusers")
    assert [c.passed for c in verify(pipeline, speed=False)] == [True] * 4
    full = load_bundle(export(opened, results.full, tmp_path / "full")).backbone
    assert type(full) is DiT and weights_digest(full) == weights_digest(bench.backbone)
    assert "finetune" not in results.full.gflops
    confirmed = {c.number: c for c in results.confirmations}
    (same,) = confirmed[results.full.number].retrained
    assert same == confirmed[results.full.number].quality  # it is not trained, so nor again
    others = [c for number, c in confirmed.items() if number != results.full.number]
    schedules = {r.number: r.schedule for r in results.records}
    again = [c for c in others if not schedules[c.number].is_full]
    assert again and all(c.retrained[0].values != c.quality.values for c in again)


@pytest.mark.thorough
def test_caching_goes_with_two_sets_of_weights(study, tmp_path):
    """On one front, and into the bundle: what is cached there is what the trial sampled."""
    name = "ddim-4+cache-block-4"
    how = {"full_depth": "pretrained", "samplers": (name,), "num_trials": 6, "proposer": "random"}
    searched = study.search.model_copy(update={**how, "keep_weights": "all"})
    changed = study.model_copy(update={"search": searched, "promotion": None})
    results = whole_search(changed, tmp_path / "run")
    both = [
        r
        for r in results.records
        if r.sampler.acceleration and not r.schedule.is_full and r.state == "complete"
    ]
    assert both
    bench = Workbench(changed, tmp_path / "run")
    for record in both:
        alone = bench.costs.fracs(Point(record.schedule, bench.config.samplers[0]))
        assert record.flops_frac < alone[1]
    opened = Study.open(tmp_path / "run")
    bundle = load_bundle(export(opened, both[0], tmp_path / "bundle"))
    assert isinstance(bundle.backbone, ExitWeights)
    shown = np.load(next(opened.trial_dir(both[0].schedule).glob("samples_*cache*.npz")))["images"]
    found = bundle.sample(range(4)).images
    found = (found * 127.5 + 128).clamp(0, 255).to(torch.uint8).numpy().astype(int)
    assert np.abs(found - shown[:4].astype(int)).max() <= 1
    plain = replace(bundle, acceleration=None, acceleration_name="").sample(range(4)).images
    assert not torch.equal(plain, bundle.sample(range(4)).images)  # the control
    # what calibrating took is counted
    (file,) = (tmp_path / "run").glob("acceleration_*.json")
    took = json.loads(file.read_text())["seconds"]
    assert 0 < took == results.warm_up["seconds"]["calibrate"]
    assert spending(results).set_index("part").loc["calibrate", "seconds"] == took


def search_until_killed(config, run_dir):
    config = parse_study(json.loads(config), "test")
    bench = Workbench(config)
    bench.evaluate = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    run_trials(Study(config, run_dir), bench)


@pytest.mark.thorough
def test_what_tuning_took_is_not_lost_with_a_kill_before_the_record(study, tmp_path):
    """Killed after the weights were written: the trial that records them counts them, another
    sampler's does not again."""
    sections = {"elastic": None, "promotion": None, "map": {}}
    search = {"proposer": "random", "num_trials": 2, "num_intervals": 4, "samplers": ["dpm++2m-2"]}
    config = parse_study({**study.model_dump(mode="json"), **sections, "search": search}, "test")
    code, _, err = Child(search_until_killed, config.model_dump_json(), tmp_path / "run").ended()
    assert code == -9, err
    opened = Study(config, tmp_path / "run")
    weights = next((tmp_path / "run" / "trials").rglob(directory.WEIGHTS))
    left = weights.read_bytes()
    assert opened.records() == []
    bench = Workbench(config)
    run_trials(opened, bench)
    own, other = opened.records()
    # not tuned a second time
    assert own.schedule.is_full and other.schedule.is_full and weights.read_bytes() == left
    assert (
        own.seconds["finetune"] > 0.001 and len(own.losses) == 3 and np.isfinite(own.losses).all()
    )
    # steps, batch, calls per sample
    assert own.gflops["finetune"] == pytest.approx(3 * 8 * 3 * bench.costs.flops[-1] / 1e9)
    assert other.seconds["finetune"] == 0 and other.losses == () and "finetune" not in other.gflops
