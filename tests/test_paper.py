"""The rows of the paper's figures: what they are, and that a killed run goes on and mixes
nothing."""

import copy
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from asesearch.backbones import load_backbone, save_backbone
from asesearch.config import BackboneConfig, DiffusionConfig, LossWeight, TrainConfig
from asesearch.diffusion import make_diffusion
from asesearch.finetuning import Batch
from asesearch.sampler import Sampler
from asesearch.schedule import ExitSchedule
from asesearch.score import Protocol

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import paper  # noqa: E402
import paper_networks  # noqa: E402
import paper_options  # noqa: E402
import paper_page  # noqa: E402
import paper_rows  # noqa: E402
from paper_record import Record, read_lines  # noqa: E402
from paper_rows import Choice  # noqa: E402
from paper_shown import Experiment  # noqa: E402

FLAT = LossWeight(shape="none")
FEW = ["figure1", "--tiny", "--samplers", "ddim-5", "--methods", "full", "data-easy"]


@pytest.fixture(autouse=True, scope="module")
def _flops_without_counting():
    """Counting those of 18 depths takes most of a tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "asesearch.search.costs.flops_table",
            lambda net, *_: tuple(float(d + 1) for d in range(1, net.depth + 1)),
        )
        yield


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A folder in which the third row was interrupted, and the rows measured until then."""
    out = tmp_path_factory.mktemp("paper")
    whole = paper.Lab.measure
    seen = []

    def measure(lab, row, seed):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(row)
        return whole(lab, row, seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paper.Lab, "measure", measure)
        with pytest.raises(KeyboardInterrupt):
            paper.main([*FEW, "--out", str(out)])
    return out, read_lines(out / "figure1.jsonl")


@pytest.mark.thorough
def test_a_row_tells_all_it_depends_on(measured):
    _, (pretrained, tuned) = measured
    assert pretrained["training_seed"] is None and pretrained["tuning"]["own_gflops"] == 0
    assert tuned["training_seed"] == 0 and tuned["block_frac"] == tuned["time_frac"] == 1
    assert len(tuned["values"]) == 2 and tuned["num_samples"] == 70
    assert tuned["settings"]["protocol"]["solver"] is None  # part of the row
    fine_tuning = {"elastic_weights", "warm_up", "train"}
    # so that the network as it is can stand beside any fine-tuning
    assert tuned["settings"].keys() - pretrained["settings"].keys() == fine_tuning
    assert pretrained["settings"].items() <= tuned["settings"].items()
    assert tuned["score"] == sum(tuned["values"]) / 2
    assert "/" not in tuned["command"].split(" ", 2)[2]


def test_equal_compute_is_the_searchs_own(measured):
    """More steps than the warm-up's and the schedule's own, which have a teacher; on noise."""
    out, (_, tuned) = measured
    (made,) = out.glob("networks/18-*/recipe.json")
    config = json.loads(made.read_text())["identity"]["config"]
    assert config["num_steps"] > 9 + 1 and config["distill_frac"] == 0
    assert tuned["tuning"]["own_gflops"] > 0 == tuned["tuning"]["warm_up_gflops"]


@pytest.mark.thorough
def test_a_killed_run_goes_on_and_another_protocol_is_refused(measured, monkeypatch, capsys):
    out, before = measured
    path = out / "figure1.jsonl"
    path.write_bytes(path.read_bytes() + b'{"experiment": "fig')  # killed while it wrote
    paper.main([*FEW, "--out", str(out)])
    after = read_lines(path)
    assert after[:2] == before and len(after) == 4 and path.read_text().count("\n") == 4
    steps = make_diffusion(DiffusionConfig()).timesteps(5)
    for line in after[2:]:
        schedule = ExitSchedule.from_string(line["row"]["schedule"], 18)
        assert line["block_frac"] == pytest.approx(schedule.block_frac(steps)) != 1
        assert line["time_frac"] != 1 and line["tuning"]["warm_up_gflops"] > 0
        spent = line["tuning"]["warm_up_gflops"] + line["tuning"]["own_gflops"]
        assert before[1]["tuning"]["own_gflops"] >= spent  # equal compute
    assert len(list(out.glob("sheets/*.png"))) == 4

    monkeypatch.setattr(paper.Lab, "measure", None)
    paper.main([*FEW, "--out", str(out)])  # nothing is left
    paper.main(["ablations", *FEW[1:-2], "--out", str(out), "--methods", "full"])  # taken over
    assert [line["taken_from"] for line in read_lines(out / "ablations.jsonl")] == ["figure1"] * 2
    with pytest.raises(SystemExit, match="compile_sampling"):  # its times would be others
        paper.main([*FEW, "--out", str(out), "--compile-sampling"])
    with pytest.raises(SystemExit, match="experts of table4.*leave --compile-sampling out"):
        paper.main(["table4", *FEW[1:], "--out", str(out), "--compile-sampling"])
    with pytest.raises(SystemExit, match=r"train\.lr: 0\.0006 there and 0\.001 now; give the same"):
        paper.main([*FEW, "--out", str(out), "--own-lr", "1e-3"])
    assert read_lines(path) == after


@pytest.mark.thorough
def test_a_u_vit_has_the_schedules_published_for_it_and_times_may_be_left_for_later(
    tmp_path, monkeypatch
):
    out = tmp_path / "rows"
    call = [*FEW[:-2], "full", "exits", "--kind", "uvit", "--out", str(out)]
    paper.main([*call, "--untimed"])
    untimed = read_lines(out / "figure1.jsonl")
    assert len(untimed) == 4 and not any("time_frac" in line for line in untimed)
    monkeypatch.setattr(paper.Lab, "measure", None)
    paper.main(call)
    lines = read_lines(out / "figure1.jsonl")
    assert [line["time_frac"] == 1 for line in lines] == [True, True, False, False]
    told = [{k: v for k, v in line.items() if not k.startswith("time_")} for line in lines]
    assert told == untimed
    paper.main(call)  # nothing is left
    assert read_lines(out / "figure1.jsonl") == lines
    assert {line["settings"]["depth"] for line in lines} == {8}
    published = ExitSchedule.from_string("D1-U-ViT", 8)
    assert [line["row"]["schedule"] for line in lines][2] == str(published)
    assert all("--kind uvit" in line["command"] for line in lines)
    shown = Experiment("figure1", out)
    planned = {s.row.label for s in shown.all if not s.measured}
    assert planned >= {"D1-U-ViT reversed", "4 of 8 blocks", "D3-U-ViT reversed", "2 of 8 blocks"}
    page = paper_page.write_page(out, tmp_path / "page")
    text = page.read_text()
    assert text.count("data:image/png") == len(list(out.glob("sheets/*.png"))) == 4
    assert paper_page.write_page(page.parent, page.parent).read_text() == text  # it is kept whole


@pytest.mark.thorough
@pytest.mark.parametrize("full_depth", ["tuned", "pretrained"])
def test_without_a_warm_up_none_is_counted(tmp_path, full_depth):
    rows = ["D3-DiT", "no warm-up, equal compute"]
    few = ["--tiny", "--samplers", "ddim-5", "--full-depth", full_depth, "--methods", *rows]
    paper.main(["ablations", *few, "--out", str(tmp_path)])
    warmed, cold = (line["tuning"] for line in read_lines(tmp_path / "ablations.jsonl"))
    assert warmed["warm_up_gflops"] > 0 == cold["warm_up_gflops"]
    assert cold["own_gflops"] > 9 * warmed["own_gflops"] > 0


def test_a_warm_up_of_unknown_cost_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="got none; make some with"):
        paper.main(["figure1", "--out", str(tmp_path)])
    weights = paper_options.tiny_network(tmp_path / "w.safetensors", 0)
    with pytest.raises(SystemExit, match="does not tell its steps; give --elastic-steps and"):
        paper.main(["figure1", "--out", str(tmp_path), "--elastic", str(weights)])


@pytest.mark.parametrize(("told", "least"), [({}, 2), ({"min_exit_depth": 1}, 1)])
def test_the_weights_tell_of_their_warm_up(told, least, tmp_path):
    path = paper_options.tiny_network(tmp_path / "net.safetensors", 0, "uvit")
    kept = tmp_path / "w.safetensors"
    warm_up = {"num_steps": 9, "batch_size": 8, "full_frac": 0.8, "seconds": 3.0, **told}
    net = load_backbone(BackboneConfig(kind="uvit", checkpoint=str(path)))
    save_backbone(net, kept, {"warm_up": json.dumps(warm_up)})
    argv = ["figure1", "--kind", "uvit", "--out", str(tmp_path), "--elastic", str(kept)]
    args = paper_options.complete(paper_options.options().parse_args(argv))
    assert (args.elastic_steps, args.elastic_full_frac, args.elastic_seconds) == (9, 0.8, 3.0)
    study = paper_options.study_of(args, ["ddim-5"])
    assert study.search.min_exit_depth == args.elastic_min_exit_depth == least


def test_a_damaged_line_in_the_middle_is_refused(tmp_path):
    path = tmp_path / "figure1.jsonl"
    path.write_text('{}\n{"a"\n{}\n')
    with pytest.raises(paper.StudyError, match="line 2"):
        Record(path, {})


# -- which rows ----------------------------------------------------------------------------------


def test_shapes_have_one_budget_and_mixed_schedules_one_light_interval():
    rows = list(paper_rows.table3(Choice()))
    shapes = [ExitSchedule.from_string(r.schedule, 18) for r in rows if r.method == "shape"]
    assert {s.block_frac() for s in shapes} == {shapes[0].block_frac()} and len(shapes) == 8
    mixed = [r for r in paper_rows.table4(Choice()) if r.method == "mixed"]
    for row in mixed:
        depths = ExitSchedule.from_string(row.schedule, 18).exit_depths
        light = [i for i, d in enumerate(depths) if d < 18]
        assert light == [int(row.label[-1])] and depths[light[0]] == 6


@pytest.mark.parametrize(
    ("kind", "counts"), [("dit", [39, 36, 32, 30, 25]), ("uvit", [38, 36, 34, 32, 25])]
)
def test_fewer_steps_are_as_many_as_the_blocks_of_a_schedule_pay_for(kind, counts):
    """Of a U-ViT those that always run are paid for too."""
    net = load_backbone(BackboneConfig(kind=kind, checkpoint=paper_options.NETWORKS[kind]))
    choice = Choice(depth=net.depth, kind=kind)
    assert choice.fixed_blocks == net.fixed_blocks
    rows = list(paper_rows.step_rows("ddim-50", choice))
    assert [int(row.label.split()[0]) for row in rows] == counts
    for name, row in zip(choice.names, rows, strict=False):
        frac = choice.read(name).block_frac(None, net.fixed_blocks)
        assert Sampler.from_string(row.sampler).num_steps / 50 == pytest.approx(frac, abs=0.011)


def test_every_shape_of_figure1_runs_as_many_blocks():
    rows = [row for row in paper_rows.figure1(Choice()) if row.method != "full"]
    fracs = [ExitSchedule.from_string(row.schedule, 18).block_frac() for row in rows]
    for easy, turned, flat in (fracs[:3], fracs[3:]):
        assert easy == turned and abs(easy - flat) < 1 / 36


def test_samplers_that_are_not_there_are_left_out():
    assert paper_rows.offered("ddim-50") and paper_rows.offered("unipc-quadratic-6")
    assert not paper_rows.offered("ddim-50+nothing-4") and not paper_rows.offered("ddim50")


CACHES = ("+cache-a", "+cache-b")


def test_pay_picks_the_cheapest_that_is_good_enough(monkeypatch):
    """16 blocks score within 5 % of the full network, 14 do not; no cache does."""
    monkeypatch.setattr(paper_rows, "offered", lambda name: True)

    def found(row):
        depths = ExitSchedule.from_string(row.schedule, 18).exit_depths
        cost = sum(depths) / len(depths) / 18
        score = 10 + 30 * (1 - cost) ** 2 + {"a": 3, "b": 2}.get(row.sampler[-1], 0)
        return score + 0.1 * (row.recipe == "own"), cost

    rows = list(paper_rows.pay(Choice(samplers=("ddim-25",), caches=CACHES), found, 0.05))
    final = [r for r in rows if r.stage == "confirm"]
    assert [(r.method, r.label) for r in final] == [
        ("full", "full, as it is"),
        ("full", "full, equal compute"),
        ("exits", "16"),
        ("cache", "cache-b"),
        ("exits+cache", "16, cache-b"),
    ]
    assert final[3].recipe == "pretrained" and final[4].recipe == "own"
    assert all(r.stage == "pick" for r in rows[: -len(final)])
    quick = Choice(samplers=("ddim-25",), equal_compute=False, caches=CACHES)
    assert len(list(paper_rows.pay(quick, found, 0.05))) == len(rows) - 2
    strict = list(paper_rows.pay(Choice(samplers=("ddim-25",), caches=CACHES), found, -0.5))
    assert strict[-3].label == "16"  # none is good enough: the best score


# -- networks ------------------------------------------------------------------------------------


def tuning_of(recipe):
    """What D3's fine-tuning starts from, and the fields in which it differs from `own`."""
    base = TrainConfig(**{**paper_options.TRAIN, "num_steps": 200, "loss_weight": FLAT})
    config = SimpleNamespace(
        train=base,
        elastic=SimpleNamespace(num_steps=1500),
        search=SimpleNamespace(own_exits=False),
    )
    parts = SimpleNamespace(
        config=config,
        backbone="pretrained",
        trials=SimpleNamespace(start="elastic"),
        costs=None,
    )
    trials = paper_networks.Recipe(parts, paper_rows.RECIPES[recipe])
    start, config = trials.tuning(Choice().read("D3-DiT"))
    own = base.model_dump()
    return start, {k: v for k, v in config.model_dump().items() if v != own[k]}


def test_weights_of_their_own_have_no_joined_rows_beside_them():
    for make in (paper_rows.figure3, paper_rows.ablations):
        joined, alone = (list(make(Choice(joined=joined))) for joined in (True, False))
        assert [row for row in joined if row.recipe != paper_rows.JOINED] == alone != joined


def test_each_recipe_changes_one_thing():
    assert tuning_of("own") == ("elastic", {})
    assert tuning_of("four times the steps") == ("elastic", {"num_steps": 800})
    assert tuning_of("no warm-up, equal compute") == ("pretrained", {"num_steps": 1700})
    for recipe in paper_rows.RECIPES:
        assert len(tuning_of(recipe)[1]) == (recipe != "own"), recipe


@pytest.mark.thorough
def test_exits_with_weights_of_their_own(tmp_path):
    """One candidate each is not picked; the full network is tuned in the warm-up's compute."""
    schedule = "18 18 18 18 18 18 18 18 2 2"
    argv = ["pay", "--tiny", "--full-depth", "pretrained", "--samplers", "ddim-5", "--no-published"]
    argv += ["--schedules", schedule, "--caches", "block-4", "--fewer", "4", "--out", str(tmp_path)]
    argv += ["--elastic-full-frac", "0"]
    paper.main(argv)
    lines = read_lines(tmp_path / "pay.jsonl")
    assert [(line["row"]["method"], line["row"]["stage"]) for line in lines] == [
        ("full", "pick"),
        ("full", "pick"),
        ("full", "confirm"),
        ("full", "confirm"),
        ("exits", "confirm"),
        ("cache", "confirm"),
        ("exits+cache", "confirm"),
        ("steps", "confirm"),
    ]
    exits, _, both, steps = lines[4:]
    assert (steps["row"]["sampler"], steps["block_frac"]) == ("ddim-4", 0.8)
    assert both["flops_frac"] == exits["flops_frac"] < 1  # as if no cache reused: see the fixture
    assert exits["settings"]["full_depth"] == "pretrained"
    (made,) = tmp_path.glob("networks/18-2_*/weights.safetensors")
    assert any(name.startswith("exits.") for name in load_file(made))
    (full,) = (p for p in tmp_path.glob("networks/*/recipe.json") if "at" not in p.parent.name)
    steps = json.loads(full.read_text())["identity"]["config"]["num_steps"]
    assert 1 < steps < 1 + 9  # a step of early exits takes less
    argv = ["figure1", "--elastic", str(made), "--elastic-steps", "9", "--elastic-batch", "8"]
    argv += ["--network", str(tmp_path / "tiny.safetensors"), "--out", str(tmp_path / "no")]
    with pytest.raises(SystemExit, match="make early exits alone; got --full-depth tuned"):
        paper.main(argv)


def test_an_expert_sees_its_tenth_alone_and_is_asked_there_alone(tiny_dit, monkeypatch):
    trainer = object.__new__(paper_networks.TenthTrainer)
    trainer.diffusion = make_diffusion(DiffusionConfig())
    trainer.tenth = 3
    monkeypatch.setattr(paper_networks.Trainer, "train_step", lambda _, batch: batch.t)
    t = trainer.train_step(Batch(None, None, torch.arange(1000), None, None))
    assert t.unique(return_counts=True)[1].tolist() == [10] * 100
    assert (t.min(), t.max()) == (300, 399)

    other = copy.deepcopy(tiny_dit)
    other.final_layer.linear.bias.data += 1
    nets = [other if tenth == 3 else tiny_dit for tenth in range(10)]
    experts = paper_networks.experts(nets, 1000)
    x, y = torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.long)
    for time, net in ((299, tiny_dit), (300, other), (399, other), (400, tiny_dit)):
        at = torch.full((2,), time)
        assert torch.equal(experts(x, at, y, exit_depth=2), net(x, at, y, exit_depth=2))
    assert not torch.equal(tiny_dit(x, at, y), other(x, at, y)) and experts.depth == 4


@pytest.mark.slow
@pytest.mark.parametrize("experiment", paper_rows.EXPERIMENTS)
def test_every_experiment_runs(experiment, tmp_path):
    samplers = ["--samplers", "ddim-4", "dpm++2m-4"]
    paper.main([experiment, "--tiny", "--out", str(tmp_path), *samplers])
    lines = read_lines(tmp_path / f"{experiment}.jsonl")
    assert {line["row"]["against"] for line in lines} == {"ddim-4", "dpm++2m-4"}
    methods = {line["row"]["method"] for line in lines}
    assert "full" in methods and len(methods) >= 2
    page = paper_page.write_page(tmp_path, tmp_path / "page").read_text()
    assert "these figures mean nothing" in page and "measured</i>" in page or experiment != "pay"


# -- the page ------------------------------------------------------------------------------------


def line_of(row, values, seed, **more):
    """A row on record."""
    protocol = Protocol(
        "frechet", "cnn", "0", 100, "images", 60, "0", (0, 100, 200), None, None, 1.0
    )
    train = {"num_steps": 200, "batch_size": 128}
    warm = {"steps": 1500, "batch_size": 128}
    cost = {"own_gflops": 2e3, "own_seconds": 9.0, "own_on": "a GPU", "warm_up_gflops": 0.0}
    return {
        "row": row.to_dict(),
        "training_seed": seed,
        "values": values,
        "block_frac": 0.5,
        "flops_frac": 0.5,
        **({"time_frac": 0.6, "time_spread": 0.01} if not seed else {}),
        "tuning": cost,
        "machine": {"gpu": None, "cpu": "a CPU", "threads": 1, "versions": {"torch": "2"}},
        "date": "2026-01-01",
        "command": "python benchmarks/paper.py pay",
        "settings": {
            "tiny": False,
            "network": "net",
            "weights": "0123456789",
            "warm_up": warm,
            "train": train,
            "protocol": protocol.to_dict(),
        },
        **more,
    }


def test_the_page_tells_both_errors_and_what_is_not_measured(tmp_path):
    full, tuned = paper_rows.full_rows("ddim-25", Choice())
    exits = next(paper_rows.exit_rows("ddim-25", Choice()))
    lines = [
        line_of(full, [10.0, 10.2, 10.1], None, time_frac=1.0, time_spread=0.0),
        line_of(tuned, [11.0, 11.0, 11.0], 0),
        line_of(exits, [12.0, 12.3, 12.0], 0),
        line_of(exits, [14.0, 14.3, 14.0], 1),
    ]
    (tmp_path / "pay.jsonl").write_text("\n".join(map(json.dumps, lines)))
    experiment = Experiment("pay", tmp_path)
    shown = experiment.rows("ddim-25")[2]
    assert shown.score.values == (13.0, 13.3, 13.0)
    assert shown.trained.value == pytest.approx(13.1) and shown.trained.std_error == 1.0
    assert experiment.reference("ddim-25").row == full  # the better of both
    difference, margin = experiment.difference(shown)
    assert difference == pytest.approx(3.0) and margin == pytest.approx(12.706, rel=1e-3)
    page = paper_page.write_page(tmp_path, tmp_path / "page").read_text()
    assert "13.10 ± 0.10" in page and "1.0 (2)" in page and "+3 ± 13" in page
    assert "40\N{NO-BREAK SPACE}% of the time saved" in page and "no difference shown" in page
    assert "net (weights 01234567). Own steps" in page
    assert page.count("Not measured yet") == 6 and page.count("<i>not measured</i>") == 6 * 6 + 3
    assert (tmp_path / "page" / "pay.csv").is_file()


def test_a_clear_difference_is_said(tmp_path):
    full, _ = paper_rows.full_rows("ddim-25", Choice())
    exits = next(paper_rows.exit_rows("ddim-25", Choice()))
    lines = [line_of(full, [10.0, 10.2, 10.1], None), line_of(exits, [12.0, 12.3, 12.1], 0)]
    (tmp_path / "pay.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (said,) = paper_page.verdicts(Experiment("pay", tmp_path))
    assert "worse than the better full network (one training seed)." in said
    assert "40\N{NO-BREAK SPACE}% of the time saved, score" in said
    del lines[1]["time_frac"]
    (tmp_path / "pay.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (said,) = paper_page.verdicts(Experiment("pay", tmp_path))
    assert "50\N{NO-BREAK SPACE}% of the FLOPs saved, score" in said  # no time is measured
    lines[1]["values"] = lines[0]["values"]
    (tmp_path / "pay.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (said,) = paper_page.verdicts(Experiment("pay", tmp_path))
    assert said.endswith("the same images as the full network's, so nothing was skipped.")


STUDIES = {"fashion-mnist-dit-18": "paper", "fashion-mnist-uvit": "paper-uvit"}
ROOT = Path(__file__).parents[1]


COMMITTED = [
    (study, path)
    for study, report in STUDIES.items()
    for path in sorted((ROOT / "reports" / report).glob("*.jsonl"))
]


@pytest.mark.parametrize(
    ("study", "rows"), COMMITTED, ids=[f"{path.parent.name}-{path.stem}" for _, path in COMMITTED]
)
def test_a_figures_study_file_is_what_most_of_its_committed_rows_were_made_by(study, rows):
    path = ROOT / "studies/paper" / f"{study}.toml"
    args = paper_options.parsed([rows.stem, "--study", str(path), "--out", "x"])
    lines = read_lines(rows)
    own = [line["settings"] for line in lines if line["row"]["recipe"] == "own"]
    batch = min(args.time_images, args.sample_batch)
    time = {"images": args.time_images, "repeats": args.time_repeats, "batch": batch}
    same = [
        settings
        for settings in own
        if settings["train"]["num_steps"] == args.own_steps
        and settings["train"]["batch_size"] == args.own_batch
        and settings["train"]["mixed_precision"] == args.mixed_precision
        and settings.get("full_depth") == args.full_depth
        and settings["protocol"]["num_samples"] in (args.num_samples, args.pick_samples)
        and settings["time"] == time
    ]
    assert own and len(same) > len(own) / 2, own[0]


def test_a_study_file_of_figures_is_overridden_by_the_command_line_and_refuses_what_is_no_option(
    tmp_path,
):
    path = tmp_path / "s.toml"
    path.write_text(
        "own_steps = 7\nuntimed = true\n[pay]\nown_steps = 8\nfewer = [5, 6]\ncompile = false\n"
    )
    call = ["--study", str(path), "--out", str(tmp_path)]
    args = paper_options.parsed(["figure1", *call])
    assert (args.own_steps, args.untimed, args.fewer) == (7, True, [])
    args = paper_options.parsed(["pay", *call, "--fewer", "4"])
    assert (args.own_steps, args.compile, args.fewer) == (8, False, [4])
    assert paper_options.command_of(args) == (
        f"python benchmarks/paper.py pay --out {tmp_path.name} --fewer 4 --own-steps 8 --untimed"
    )
    path.write_text("[pay]\nown_step = 8\n")
    with pytest.raises(
        SystemExit, match=r"s.toml: \[pay\] own_step is no option of paper.py; write"
    ):
        paper.main(["figure1", *call])
