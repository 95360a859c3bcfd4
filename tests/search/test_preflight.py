"""What can be known before the first training step is refused before it, by `search` and
`--dry-run` alike."""

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import SoftFileLock
from PIL import Image

from asesearch import locks
from asesearch.backbones import DiT, load_backbone
from asesearch.backbones.exit_weights import own_exits
from asesearch.backbones.saving import save_backbone
from asesearch.config import BackboneConfig, parse_study
from asesearch.errors import (
    AseSearchError,
    ConfigError,
    DataError,
    EvaluationError,
    ScheduleError,
    StudyError,
    WriteError,
)
from asesearch.finetuning import Trainer
from asesearch.search import Workbench, opening, parts, preflight, search
from asesearch.search.plan import Plan, make_plan
from asesearch.search.preflight import weights_of_a_start
from asesearch.search.runner import run_trials
from asesearch.search.whole import check_outputs
from asesearch.study import Study, directory
from tests.shapes import SHAPE
from tests.test_cli import call


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A network of three blocks whose parameters are all random."""
    torch.manual_seed(0)
    net = DiT(**SHAPE)
    for p in net.parameters():
        p.data = torch.randn_like(p) * 0.05
    path = tmp_path_factory.mktemp("weights") / "net.safetensors"
    save_backbone(net, path, {})
    return path


@pytest.fixture
def study(weights, monkeypatch, tmp_path):
    """A study with all there is, some of its sections changed."""
    monkeypatch.setenv("ASESEARCH_CACHE", str(tmp_path / "cache"))

    def make(**changes):
        sections = {
            "name": "tiny",
            "backbone": {"checkpoint": str(weights)},
            "data": {"kind": "fashion-mnist", "split": "test"},
            "elastic": {"num_steps": 3, "batch_size": 8, "distill_frac": 1.0},
            "map": {"num_bins": 4, "num_images": 4},
            "train": {"num_steps": 2, "batch_size": 8},
            "sampling": {"num_steps": 4, "batch_size": 40},
            "evaluation": {
                "extractor": "fashion-cnn",
                "num_samples": 70,
                "repeats": 2,
                "reference": {"kind": "fashion-mnist", "split": "train"},
            },
            "search": {
                "proposer": "difficulty",
                "num_trials": 4,
                "num_intervals": 4,
                "warm_start": ["full", "3 2 2 1"],
                "samplers": ["ddim-2"],
                "cost": "flops",
            },
            "promotion": {"num_samples": 12, "always": 1, "explore": 0},
            "confirm": {
                "max_points": 2,
                "num_samples": 80,
                "repeats": 2,
                "time_images": 4,
                "time_repeats": 2,
            },
        }
        for section, values in changes.items():
            sections[section] = (
                {**sections[section], **values} if isinstance(values, dict) else values
            )
        return parse_study(sections, "test")

    return make


@pytest.fixture
def unpaid(monkeypatch):
    """No training may begin."""

    def run(self, *args):
        raise AssertionError("a training has begun")

    monkeypatch.setattr(Trainer, "run", run)


def folder_of(images, place, side=28):
    for i in range(images):
        place.mkdir(parents=True, exist_ok=True)
        Image.new("L", (side, side), i).save(place / f"{i}.png")
    return str(place)


# -- what is refused -----------------------------------------------------------------------------

WRONG = [
    (
        {"evaluation": {"num_samples": 64}},
        EvaluationError,
        "evaluation.num_samples must exceed the 64 features",
    ),
    (
        {"confirm": {"num_samples": 64}},
        EvaluationError,
        "confirm.num_samples must exceed.*got 64; set at least 65",
    ),
    (
        {"promotion": {"metric": "frechet"}},
        EvaluationError,
        "promotion.num_samples must .*promotion.metric = 'auto'",
    ),
    (
        {"confirm": {"training_seeds": 2}, "train": {"num_steps": 0}},
        ConfigError,
        "got 2 with train.num_steps 0; set training_seeds = 1, or train",
    ),
    (
        {"evaluation": {"seed": 999_999_900}},
        EvaluationError,
        r"confirmation has image seeds of its own.*search|low-fid",
    ),
    (
        {"elastic": {"mixed_precision": "bf16"}},
        ConfigError,
        r"\[elastic\] mixed_precision = 'bf16' needs a GPU",
    ),
    (
        {"train": {"mixed_precision": "fp16"}},
        ConfigError,
        r"\[train\] mixed_precision = 'fp16' needs a GPU",
    ),
    (
        {"search": {"warm_start": ["3 2 1"]}},
        ScheduleError,
        r"\[search\] warm start '3 2 1' does not fit",
    ),
    ({"search": {"warm_start": ["D9"]}}, ScheduleError, r"\[search\] .*published names"),
    ({"search": {"samplers": ["euler-maruyama-5"]}}, ConfigError, "vp-sde process"),
    ({"search": {"min_exit_depth": 4}}, ScheduleError, "min_exit_depth"),
    (
        {"map": {"num_bins": 1001}},
        ConfigError,
        r"\[map\] num_bins must be at most the number of timesteps, 1000; got 1001",
    ),
    (
        {"map": {"data": {"kind": "image-folder", "path": "gone", "image_size": 28}}},
        DataError,
        "map.data.path: .*gone",
    ),
]


@pytest.mark.parametrize(
    ("changes", "error", "text"), WRONG, ids=lambda v: str(v)[:50] if isinstance(v, dict) else ""
)
def test_it_is_refused_before_anything_is_trained_or_written(
    study, unpaid, tmp_path, changes, error, text
):
    with pytest.raises(error, match=text):
        search(study(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_same_study_begins_to_train(study, unpaid, tmp_path):
    """The control of all the above."""
    with pytest.raises(AssertionError, match="a training has begun"):
        search(study(), tmp_path / "run")


def test_finite_weights_may_give_images_that_are_not(study, unpaid, tmp_path):
    torch.manual_seed(0)
    net = DiT(**SHAPE)
    for p in net.parameters():
        p.data = torch.randn_like(p) * 1e20
    save_backbone(net, tmp_path / "huge.safetensors", {})
    changes = {"backbone": {"checkpoint": str(tmp_path / "huge.safetensors")}}
    with pytest.raises(
        EvaluationError, match="pretrained network gives images that are not finite under ddim-4"
    ):
        search(study(**changes), tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"evaluation": {"extractor": "inception-v3-compat"}},
            "evaluation.num_samples and confirm.num_samples must exceed the 2048 features of inc",
        ),
        (
            {"confirm": {"also": ["vgg16"]}},
            "^confirm.num_samples must exceed the 4096 features of vgg16",
        ),
    ],
)
def test_images_are_counted_before_weights_are_fetched_for_them(
    study, unpaid, tmp_path, monkeypatch, changes, text
):
    monkeypatch.setattr(parts, "make_extractor", lambda *_: pytest.fail("weights are fetched"))
    with pytest.raises(EvaluationError, match=text):
        search(study(**changes), tmp_path / "run")


def test_few_reference_images_are_counted_before_their_features_are_made(
    study, unpaid, tmp_path, monkeypatch
):
    few = folder_of(5, tmp_path / "few")
    reference = {"kind": "image-folder", "path": few, "image_size": 28, "channels": 1}
    monkeypatch.setattr(
        opening, "reference_statistics", lambda *_: pytest.fail("features are made")
    )
    with pytest.raises(
        EvaluationError, match="more images than the 64 features of fashion-cnn.*got 5 in.*'kid'"
    ):
        search(study(evaluation={"reference": reference}), tmp_path / "run")


@pytest.mark.parametrize("begun", [True, False])
def test_a_file_system_without_locks_is_refused_and_nothing_is_left_of_the_try(
    study, tmp_path, monkeypatch, begun
):
    run_dir = tmp_path / "runs" / "run"
    if begun:
        run_dir.mkdir(parents=True)
    check_outputs(study(), run_dir)
    monkeypatch.setattr(locks, "FileLock", SoftFileLock)  # what filelock takes in its place
    place = run_dir if begun else tmp_path
    with pytest.raises(StudyError, match=f"can't lock a file in {place} .flock is not supported"):
        check_outputs(study(), run_dir)
    assert list(tmp_path.rglob("*")) == ([run_dir.parent, run_dir] if begun else [])


def test_damaged_training_images_are_found_first(study, unpaid, tmp_path):
    for label in range(10):
        images = Path(folder_of(2, tmp_path / "images" / f"class-{label}"))
    (images / "1.png").write_bytes((images / "1.png").read_bytes()[:40])
    data = {
        "kind": "image-folder",
        "path": str(tmp_path / "images"),
        "image_size": 28,
        "channels": 1,
        "split": "train",
    }
    with pytest.raises(DataError, match=r"class-9/1\.png"):
        search(study(data=data), tmp_path / "run")


def test_a_study_directory_that_can_not_be_written(study, unpaid, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="file/run"):
        search(study(), tmp_path / "file" / "run")


def test_a_disk_without_room_for_a_checkpoint(study, unpaid, tmp_path, monkeypatch):
    before = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: before._replace(free=1000))
    with pytest.raises(WriteError, match=r"the checkpoint of a training takes .*; make room there"):
        search(study(), tmp_path / "run")


def test_outputs_among_the_images_are_refused(study, unpaid, tmp_path):
    images = {"kind": "image-folder", "path": str(tmp_path), "image_size": 28, "channels": 1}
    for changes in ({"data": images}, {"map": {"num_bins": 4, "num_images": 4, "data": images}}):
        config = study(**changes)
        for out, option in ((tmp_path, "--out"), (tmp_path / "a" / "run", "--out")):
            with pytest.raises(ConfigError, match=f"not among them; got .*; change {option}"):
                search(config, out)
        with pytest.raises(ConfigError, match="change --report"):
            search(config, tmp_path.parent / "run", report_dir=tmp_path / "report")
        assert not list(tmp_path.iterdir())


# -- a dry run -----------------------------------------------------------------------------------


def dry_run(config, tmp_path):
    path = tmp_path / "study.json"
    path.write_text(json.dumps(config.model_dump(mode="json", exclude_none=True)))
    path = tmp_path / "study.toml"
    path.write_text(to_toml(config.model_dump(mode="json", exclude_none=True)))
    return call(
        "search", path, "--out", tmp_path / "run", "--report", tmp_path / "report", "--dry-run"
    )


def to_toml(data):
    """Enough of TOML for a study: top-level values, and a section's values inline."""
    lines = [f"{k} = {json.dumps(v)}" for k, v in data.items() if not isinstance(v, dict)]
    for name, section in data.items():
        if isinstance(section, dict):
            lines += [f"[{name}]", *(f"{k} = {inline(v)}" for k, v in section.items())]
    return "\n".join(lines)


def inline(value):
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {inline(v)}" for k, v in value.items()) + " }"
    return json.dumps(value)


def test_a_dry_run_says_what_it_has_checked_and_writes_nothing(study, unpaid, tmp_path):
    found = json.loads(dry_run(study(), tmp_path)[0])
    checked = "\n".join(found["preflight"]["checked"])
    for words in (
        "one image through ddim-4, ddim-2, and fashion-cnn",
        "low-fidelity protocol: Fréchet distance in 3 principal components (fashion-cnn), 2 x 12 "
        "images",
        "search protocol: Fréchet distance (fashion-cnn), 2 x 70 images",
        "confirmation protocol: Fréchet distance (fashion-cnn), 2 x 80 images",
        "10000 of fashion-mnist/test",
        "warm starts: full, 3 2 2 1, full ddim-2",
        "map: 4 bins of 4 images",
        "one step of [elastic] with 2 images, mixed_precision 'no'",
        "one step of [train] with 2 images",
    ):
        assert words in checked
    assert 0 < found["preflight"]["seconds"] < 60
    assert found["protocols"]["low-fidelity"]["metric"] == "frechet-pca-3"
    assert not (tmp_path / "run").exists() and not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"backbone": {"checkpoint": "MISSING"}},
        {
            "data": {
                "kind": "image-folder",
                "path": "MISSING",
                "split": "train",
                "image_size": 28,
                "channels": 1,
            }
        },
        {
            "data": {"kind": "latents", "path": "MISSING", "split": "train", "vae": "v"},
            "evaluation": {"reference": "folder"},
        },
        {
            "evaluation": {
                "reference": {
                    "kind": "image-folder",
                    "path": "MISSING",
                    "image_size": 28,
                    "channels": 1,
                }
            }
        },
        {"evaluation": {"extractor_weights": "MISSING"}},
        {
            "map": {
                "data": {"kind": "image-folder", "path": "MISSING", "image_size": 28, "channels": 1}
            }
        },
    ],
    ids=["checkpoint", "data", "latents", "reference", "extractor", "map data"],
)
def test_a_dry_run_names_what_is_missing(study, unpaid, tmp_path, changes):
    text = json.dumps(changes).replace("MISSING", str(tmp_path / "is-not-here"))
    changes = json.loads(text)
    if changes.get("evaluation", {}).get("reference") == "folder":
        changes["evaluation"]["reference"] = {
            "kind": "image-folder",
            "path": str(tmp_path / "images"),
            "image_size": 28,
        }
    named = {"data": "data.path", "evaluation": "evaluation.reference.path", "map": "map.data.path"}
    section = next(iter(changes))
    is_path = '"path"' in text and '"latents"' not in text
    with pytest.raises(AseSearchError, match=f"{named[section] if is_path else ''}.*is-not-here"):
        dry_run(study(**changes), tmp_path)


@pytest.fixture
def begun(study, unpaid, tmp_path):
    """A study with its warm-up on record."""
    config = study()
    opened = Study(config, tmp_path / "run")
    opened.check_inputs(Workbench(config).identity)
    (tmp_path / "run" / directory.ELASTIC_WEIGHTS).touch()
    return config


@pytest.mark.thorough
def test_a_dry_run_refuses_a_study_that_can_not_go_on(begun, study, tmp_path):
    def files():
        return {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}

    before = files()
    dry_run(begun, tmp_path)
    for changes, message in (
        ({"sampling": {**begun.sampling.model_dump(), "num_steps": 5}}, "sampling.num_steps: 4 ->"),
        ({"search": {"storage": f"sqlite:///{tmp_path}/other.db"}}, "other.db does not hold them"),
        ({"search": {"storage": "postgresql://a@127.0.0.1:1/b"}}, "check that the server runs"),
    ):
        changed = begun.model_dump(exclude_none=True)
        for section, values in changes.items():
            changed[section] = {**changed[section], **values}
        with pytest.raises(StudyError, match=message):
            dry_run(parse_study(changed, "changed"), tmp_path)
    assert files() == before and not (tmp_path / "other.db").exists()
    (tmp_path / "run" / directory.STUDY).unlink()
    with pytest.raises(StudyError, match="study.json was lost"):
        dry_run(begun, tmp_path)
    shutil.rmtree(tmp_path / "run")
    other = Study(study(name="tiny"), tmp_path / "elsewhere")
    storage = {"storage": f"sqlite:///{other.run_dir / directory.DATABASE}"}
    changed = begun.model_dump(exclude_none=True)
    with pytest.raises(StudyError, match="holds another study named 'tiny'"):
        dry_run(parse_study({**changed, "search": {**changed["search"], **storage}}, "x"), tmp_path)


def test_a_dry_run_knows_the_weights_by_their_content(begun, weights, tmp_path):
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(weights.read_bytes())
    config = begun.model_copy(update={"backbone": BackboneConfig(checkpoint=str(copy))})
    dry_run(config, tmp_path)
    net = load_backbone(config.backbone)
    net.final_layer.linear.bias.data += 1
    save_backbone(net, copy, {})
    with pytest.raises(StudyError, match="begun with other weights"):
        dry_run(config, tmp_path)


def test_a_dry_run_refuses_times_of_another_batch_size(study, unpaid, tmp_path):
    run = tmp_path / "run"
    begun = study(search={"cost": "time"})
    bench = Workbench(begun, run)
    Study(begun, run).check_inputs(bench.identity)
    (run / directory.ELASTIC_WEIGHTS).touch()
    assert bench.costs.latency.batch_size == 40
    before = (run / directory.LATENCY).read_bytes()
    with pytest.raises(StudyError, match="must come from one batch size; .* back to 40, or search"):
        dry_run(begun.with_options("sampling", batch_size=20), tmp_path)
    dry_run(begun, tmp_path)
    assert (run / directory.LATENCY).read_bytes() == before


# -- how long it will take -----------------------------------------------------------------------


def plan(**changes):
    parts = {
        "train_step_s": 1.0,
        "image_s": 1.0,
        "decode_s": 0.0,
        "calls_an_image": 4,
        "calibrate_s": 0.0,
        "elastic_s": 300.0,
        "map_s": 60.0,
        "full_s": 7200.0,
        "low_fidelity_s": 1.0,
        "trial_s": 20.0,
        "num_trials": 9,
        "search_s": 180.0,
        "confirm_s": 45.0,
        "total_s": 7785.0,
        "expected_s": 7000.0,
        "budget_s": None,
    }
    return Plan(**{**parts, **changes})


def test_the_plan_in_one_line():
    assert plan().line() == (
        "about 1.9 h, at most 2.2 h: warm-up 6.0 min, full network 2.0 h, 9 trials 3.0 min, "
        "confirmation 45 s (every schedule counted at the full network's cost)"
    )
    days = plan(elastic_s=0.0, map_s=0.0, num_trials=1, total_s=4 * 86400.0).line()
    assert "at most 4.0 days: full network" in days and ", 1 trial 3.0 min," in days
    assert plan(budget_s=8 * 60.0).line().startswith("about 8.0 min, the budget: warm-up 6.0 min,")
    assert (
        plan(budget_s=60.0, num_trials=0, search_s=0.0)
        .line()
        .startswith("the budget of 60 s leaves no room for trials")
    )


def test_search_says_how_long_it_will_take_before_anything_is_trained(study, unpaid, tmp_path):
    from typer.testing import CliRunner

    from asesearch.cli import app

    path = tmp_path / "study.toml"
    path.write_text(to_toml(study().model_dump(mode="json", exclude_none=True)))
    result = CliRunner().invoke(
        app, ["search", str(path), "--out", str(tmp_path / "run"), "--report", str(tmp_path / "r")]
    )
    assert isinstance(result.exception, AssertionError)  # a training has begun, and before it:
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("about ")]
    assert "at most" in line and "3 trials" in line and "warm-up" in line and "confirmation" in line


def test_trying_changes_nothing_that_a_search_sees(study, tmp_path, monkeypatch):
    bench = Workbench(study())
    before = {n: p.clone() for n, p in bench.backbone.named_parameters()}
    found = preflight(bench)
    assert len(found.checked) == 9
    assert all(torch.equal(p, before[n]) for n, p in bench.backbone.named_parameters())
    assert not bench.backbone.training
    assert make_plan(bench).num_trials == 3


# -- what is measured under which sampler and with which seeds -----------------------------------


@pytest.mark.thorough
def test_the_confirmation_has_its_own_seeds_and_each_points_own_sampler(
    study, tmp_path, monkeypatch
):
    """Seen where images are made: every call of the sampler in a whole search, and in its
    confirmation."""
    calls = []
    confirming = []
    real = parts.sample

    def sample(backbone, solver, schedule, **how):
        calls.append(
            (bool(confirming), str(schedule), f"{solver}-{how['num_steps']}", tuple(how["seeds"]))
        )
        return real(backbone, solver, schedule, **how)

    monkeypatch.setattr(parts, "sample", sample)
    config = study()
    bench = Workbench(config, tmp_path)
    made = Study(config, tmp_path)
    run_trials(made, bench)
    searched = {seed for _, _, _, seeds in calls for seed in seeds}
    low_fidelity = set(range(24))  # 2 x 12 images, 2 x 70 images
    high_fidelity = set(range(140))
    assert searched == low_fidelity | high_fidelity
    confirming.append(True)
    from asesearch.search import confirm

    confirmed = confirm(made, bench)
    records = {r.number: r for r in made.records()}
    samplers = {str(records[c.number].sampler) for c in confirmed}
    assert samplers == {"ddim-4", "ddim-2"}  # so that a mistaken one would be seen
    scored = [
        c for c in calls if c[0] and len(set(c[3]) & set(range(config.confirm.time_images))) == 0
    ]
    fresh = {seed for c in scored for seed in c[3]}
    assert len(fresh) == 2 * 80 and not fresh & searched
    for c in confirmed:
        record = records[c.number]
        own = (str(record.schedule), str(record.sampler))
        assert {seed for s in scored if s[1:3] == own for seed in s[3]} == fresh
        assert set(c.quality.protocol.seeds) <= fresh
    points = {(str(records[c.number].schedule), str(records[c.number].sampler)) for c in confirmed}
    assert {s[1:3] for s in scored} == points


# -- a low-fidelity score where none existed ------------------------------------------------------


@pytest.mark.thorough
def test_every_trial_gets_a_score_from_fewer_images_than_features(study, tmp_path, caplog):
    config = study(promotion={"num_samples": 12, "always": 9})
    with caplog.at_level(logging.ERROR):
        results = search(config, tmp_path)
    assert [r.failure for r in results.records] == [None] * 4
    scores = [r.low_fidelity.quality for r in results.records]
    assert {q.protocol.metric for q in scores} == {"frechet-pca-3"} and all(
        q.value > 0 for q in scores
    )
    assert all(r.quality.protocol.metric == "frechet" for r in results.complete)


@pytest.mark.thorough
def test_the_same_with_kernel_distances(study, tmp_path):
    results = search(study(promotion={"num_samples": 12, "metric": "kid", "always": 9}), tmp_path)
    assert [r.failure for r in results.records] == [None] * 4
    assert {r.low_fidelity.quality.protocol.metric_name for r in results.records} == {
        "Kernel distance (fashion-cnn)"
    }


def test_sets_of_images_that_are_of_other_classes_each_are_named(study, caplog):
    """The network has ten classes."""
    few = {"num_samples": 6, "repeats": 2}
    preflight(Workbench(study(promotion={**few, "metric": "kid"})))
    assert "2 x 6 images of the low-fidelity protocol are of other classes each" in caplog.text
    assert "a multiple of 10 images" in caplog.text
    caplog.clear()
    for enough in ({"num_samples": 10, "repeats": 2}, {"num_samples": 6, "repeats": 1}):
        preflight(Workbench(study(promotion={**enough, "metric": "kid"})))
        assert "other classes" not in caplog.text


def test_the_step_of_a_trial_is_tried_beside_all_the_weights_of_its_start(weights):
    """Weights of their own for early exits lie beside those for full depth; before the warm-up they
    are the same."""
    net = load_backbone(BackboneConfig(kind="dit", checkpoint=str(weights)))
    one = sum(p.numel() for p in net.parameters())

    def held(start):
        nets = weights_of_a_start(SimpleNamespace(trials=SimpleNamespace(start=start)))
        every = [p for each in (net, *nets) for p in each.parameters()]
        return sum({p.untyped_storage().data_ptr(): p.numel() for p in every}.values()) / one - 1

    assert held(net) == 1 and held(own_exits(net)) == 2
