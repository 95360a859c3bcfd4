"""What the bench measures of a point, against clocks and networks of known cost."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from asesearch.backbones import DiT, UViT
from asesearch.backbones.caching import Caching
from asesearch.backbones.saving import save_backbone
from asesearch.config import parse_study
from asesearch.errors import ConfigError, EvaluationError, StudyError
from asesearch.evaluation.cost import LatencyTable
from asesearch.evaluation.distances import frechet_distance, precision_recall
from asesearch.evaluation.fashion_cnn import FashionCNN
from asesearch.evaluation.features import extract_features, to_uint8
from asesearch.point import Point
from asesearch.sampler import Sampler
from asesearch.schedule import ExitSchedule
from asesearch.search import costs, opening
from asesearch.search.accelerating import recorded_acceleration
from asesearch.search.plan import make_plan
from asesearch.search.protocols import FRESH_SEEDS
from asesearch.search.workbench import Workbench
from tests.shapes import SHAPE

FAST = Sampler("dpm++2m", 2)


@pytest.fixture
def make_bench(tmp_path):
    """A bench for a network of three blocks, with some sections of its study changed."""
    torch.manual_seed(0)
    net = DiT(**SHAPE)
    torch.nn.init.normal_(net.final_layer.linear.weight, std=0.05)
    save_backbone(net, tmp_path / "net.safetensors", {})

    def make(run_dir=None, reading=False, **sections):
        study = {
            "name": "tiny",
            "backbone": {"kind": "dit", "checkpoint": str(tmp_path / "net.safetensors")},
            "data": {"kind": "fashion-mnist", "split": "test"},
            "sampling": {"solver": "ddim", "num_steps": 4, "batch_size": 40},
            "evaluation": {
                "extractor": "fashion-cnn",
                "num_samples": 70,
                "repeats": 2,
                "reference": {"kind": "fashion-mnist", "split": "train"},
            },
            "confirm": {"num_samples": 80, "repeats": 3, "time_images": 4, "time_repeats": 3},
        }
        config = parse_study({**study, **sections}, "test")
        return Workbench(config, run_dir, reading=reading)

    return make


@pytest.mark.parametrize(("cfg_scale", "channels"), [(1.0, None), (1.5, 1)])
def test_every_protocol_tells_what_guidance_acts_on(make_bench, cfg_scale, channels):
    sampling = {"solver": "ddim", "num_steps": 2, "batch_size": 40, "cfg_scale": cfg_scale}
    found = {
        p.guided_channels
        for p in make_bench(
            sampling=sampling, promotion={"num_samples": 20}
        ).protocols.named.values()
    }
    assert found == {channels}


def test_measured_time_is_the_points_over_the_full_networks(make_bench, monkeypatch):
    """On a clock where a sampling of the full network takes 8 ms and the point's 2."""
    bench = make_bench()
    asked = []
    now = [0.0]
    net = object()
    full_net = object()
    schedule = ExitSchedule.from_string("3 1", 3)

    def sample(backbone, point, seeds):
        asked.append((backbone, point, tuple(seeds)))
        now[0] += 8.0 if point.schedule.is_full else 2.0

    def timer(call):
        start = now[0]
        call()
        return now[0] - start

    monkeypatch.setattr(bench, "sample", sample)
    monkeypatch.setattr("asesearch.evaluation.clock._synchronised_wall", timer)
    found = bench.measured_time(net, Point(schedule, FAST), full_net)
    assert found.median == 0.25 and found.spread == 0.0 and len(found.pairs) == 3
    # each under its own weights and sampler, the same seeds
    point = (net, Point(schedule, FAST), (0, 1, 2, 3))
    full = (full_net, Point(bench.full, bench.own_sampler), (0, 1, 2, 3))
    assert asked == [point, full, point, full, full, point, point, full]


@pytest.mark.parametrize(("cfg_scale", "images"), [(1.0, 40), (1.5, 80), (0.0, 80)])
def test_a_guided_call_is_timed_with_both_of_its_halves(make_bench, monkeypatch, cfg_scale, images):
    bench = make_bench(
        sampling={"solver": "ddim", "num_steps": 4, "batch_size": 40, "cfg_scale": cfg_scale}
    )
    rows = []

    def measure(backbone, batch_size, repeats, device, y, compile):
        rows.append((batch_size, len(y)))
        return table

    table = LatencyTable(
        batch_size=images,
        device="cpu",
        threads=1,
        dtype="float32",
        median_ms=(1.0, 2.0, 3.0),
        spread_ms=(0.1, 0.1, 0.1),
        repeats=5,
    )
    monkeypatch.setattr(costs, "measure_latency", measure)
    assert bench.costs.latency.median_ms == table.median_ms and rows == [(images, images)]
    assert bench.costs.full_call_ms == 3.0


def test_a_plan_alone_times_full_depth_alone(make_bench, monkeypatch):
    bench = make_bench()
    monkeypatch.setattr(costs, "measure_latency", lambda *_, **__: pytest.fail("a whole table"))
    assert make_plan(bench).image_s > 0


def test_confirmation_has_seeds_that_no_trial_has_seen(make_bench):
    bench = make_bench()
    assert bench.protocols.search.seeds == (0, 70)
    confirmed = bench.protocols.confirmation
    assert confirmed.num_samples == 80 and confirmed.seeds == (
        FRESH_SEEDS,
        FRESH_SEEDS + 80,
        FRESH_SEEDS + 160,
    )
    assert FRESH_SEEDS > 10**8


def test_classes_take_turns(make_bench):
    bench = make_bench()
    assert opening.conditioning_for(bench.backbone, bench.data, [0, 9, 10, 23]).tolist() == [
        0,
        9,
        0,
        3,
    ]


def test_guided_sampling_costs_two_calls_a_step(make_bench):
    plain = make_bench()
    guided = make_bench(
        sampling={"solver": "ddim", "num_steps": 4, "batch_size": 40, "cfg_scale": 1.5}
    )
    point = Point(ExitSchedule.from_string("3 1", 3), plain.own_sampler)
    once = plain.costs.sampling_gflops(point, plain.protocols.search)
    assert once > 0 and guided.costs.sampling_gflops(
        point, guided.protocols.search
    ) == pytest.approx(2 * once)


def test_low_fidelity_scores_are_of_the_weights_that_trials_start_from(make_bench, monkeypatch):
    bench = make_bench(promotion={"num_samples": 66, "repeats": 1})
    seen = []
    bench.trials.start = elastic = object()

    def evaluate(net, point, protocol):
        seen.append((net, point, protocol))
        return "score", {"sample": 1.0, "evaluate": 2.0}

    monkeypatch.setattr(bench, "evaluate", evaluate)
    point = Point(ExitSchedule.from_string("3 1", 3), bench.own_sampler)
    score, seconds, gflops = bench.trials.try_low_fidelity(point)
    assert (
        seen == [(elastic, point, bench.protocols.low_fidelity)]
        and bench.protocols.low_fidelity.num_samples == 66
    )
    assert (score, seconds) == ("score", 3.0)
    assert gflops == pytest.approx(
        bench.costs.sampling_gflops(point, bench.protocols.search) * 66 / 140
    )


SECOND_SPACE = """
from asesearch.evaluation.fashion_cnn import FashionCNN

class Pooled(FashionCNN):
    def forward(self, images):
        return (super().forward(images)[0].unflatten(1, (-1, 4)).mean(2),)
"""


@pytest.fixture
def second_space(tmp_path, monkeypatch):
    (tmp_path / "second_space.py").write_text(SECOND_SPACE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("ASESEARCH_CACHE", str(tmp_path / "cache"))
    return "second_space:Pooled"


@pytest.mark.thorough
def test_confirmed_images_are_scored_in_further_feature_spaces(make_bench, second_space):
    confirm = {"num_samples": 80, "repeats": 2, "also": [second_space]}
    evaluation = {"extractor": "fashion-cnn", "num_samples": 70}
    bench = make_bench(confirm=confirm, evaluation=evaluation)
    point = Point(bench.full, bench.own_sampler)
    quality, (other,), found = bench.confirmed(bench.backbone, point)
    assert quality == bench.evaluate(bench.backbone, point, bench.protocols.confirmation)[0]
    assert other.protocol.seeds == quality.protocol.seeds and other.protocol != quality.protocol
    [space] = bench.also
    for i, (first, value) in enumerate(zip(other.protocol.seeds, other.values, strict=True)):
        images = bench.sample(bench.backbone, point, range(first, first + 80)).images
        own = extract_features(bench.extractor, to_uint8(images))
        both = precision_recall(own, bench.reference.features)
        assert (found.precision[i], found.recall[i]) == both
        features = extract_features(space.extractor, to_uint8(images))
        moments = features.mean(0), np.cov(features, rowvar=False)
        assert features.shape == (80, 16)
        assert value == pytest.approx(
            frechet_distance(*moments, space.reference.mean, space.reference.cov)
        )


@pytest.mark.thorough
def test_a_further_space_takes_weights_from_a_table(make_bench, second_space, tmp_path):
    evaluation = {"extractor": "fashion-cnn", "num_samples": 70}
    state = load_file(FashionCNN.shipped())
    save_file(state | {"head.bias": state["head.bias"] + 1}, tmp_path / "own.safetensors")
    made = [
        make_bench(confirm={"num_samples": 80, "also": also}, evaluation=evaluation).also[0]
        for also in ([second_space], {second_space: str(tmp_path / "own.safetensors")})
    ]
    assert made[0].extractor.digest != made[1].extractor.digest
    absent = {second_space: str(tmp_path / "absent")}
    with pytest.raises(EvaluationError, match="must be a file; got .*absent"):
        make_bench(confirm={"num_samples": 80, "also": absent}, evaluation=evaluation)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("also", "error", "rule"),
    [
        (["fashion-cnn"], ConfigError, "'fashion-cnn' twice"),
        (["second_space:Pooled"] * 2, ConfigError, "'second_space:Pooled' twice"),
        (["absent:Space"], EvaluationError, "can't import the extractor absent:Space"),
    ],
)
def test_a_further_space_is_refused_before_anything_is_paid(
    make_bench, second_space, also, error, rule
):
    evaluation = {"extractor": "fashion-cnn", "num_samples": 70}
    with pytest.raises(error, match=rule):
        make_bench(confirm={"num_samples": 80, "also": also}, evaluation=evaluation)


CACHED = "ddim-4+cache-block-0.5"


@pytest.mark.parametrize("kind", ["cache-block-0.5", "cache-attn-adjusted-0.5", "deediff-0.1"])
def test_a_samplers_acceleration_is_calibrated_once_and_read_again(
    make_bench, tmp_path, monkeypatch, kind
):
    sampler = Sampler("ddim", 4, kind)
    path = tmp_path / "run" / f"acceleration_{sampler}.json"
    how = {"run_dir": tmp_path / "run", "search": {"samplers": [str(sampler)]}}
    first = make_bench(**how)
    assert not path.exists()  # nothing is measured before it is needed
    first.calibrate()
    written = path.read_bytes()
    (tmp_path / "run" / "locks" / "acceleration.lock").unlink()
    again = make_bench(**how)
    monkeypatch.setattr("asesearch.search.parts.calibrated", None)
    found = again.acceleration(sampler)
    assert found.to_dict() == first.acceleration(sampler).to_dict()
    # reading takes no lock, so that it works where nothing can be written
    assert path.read_bytes() == written and not list((tmp_path / "run" / "locks").iterdir())
    monkeypatch.undo()
    path.unlink()
    alone = make_bench(**how, reading=True).acceleration(sampler)
    assert alone.to_dict() == found.to_dict() and not path.exists()
    path.write_bytes(written)
    assert recorded_acceleration(tmp_path / "run", sampler).to_dict() == found.to_dict()


@pytest.mark.parametrize(
    "change",
    [
        {"sampling": {"solver": "ddim", "num_steps": 4, "batch_size": 40, "cfg_scale": 1.5}},
        {"diffusion": {"beta_schedule": "scaled_linear"}},
    ],
)
def test_a_calibration_that_was_made_for_something_else_is_made_again(
    make_bench, tmp_path, caplog, change
):
    how = {"run_dir": tmp_path / "run", "search": {"samplers": [CACHED]}}
    make_bench(**how).calibrate()
    make_bench(**how, **change).calibrate()
    assert "was made for another network or sampling: it is calibrated again" in caplog.text
    caplog.clear()
    make_bench(**how, **change).calibrate()
    assert not caplog.text


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"made_for": 1, "acceleration": {}}'])
def test_a_damaged_calibration_is_made_again(make_bench, tmp_path, caplog, content):
    sampler = Sampler("ddim", 4, "merge-0.5")
    path = tmp_path / f"acceleration_{sampler}.json"
    path.write_text(content)
    with pytest.raises(StudyError, match="search once more, which calibrates it again"):
        recorded_acceleration(tmp_path, sampler)
    make_bench(run_dir=tmp_path, search={"samplers": [str(sampler)]}).calibrate()
    assert "damaged" in caplog.text
    assert recorded_acceleration(tmp_path, sampler).to_dict() == {"kind": "merge", "ratio": 0.5}


@pytest.mark.thorough
def test_exits_that_images_choose_are_costed_as_they_were_counted(make_bench):
    sampler = Sampler.from_string("ddim-4+deediff-1")
    bench = make_bench(search={"samplers": [str(sampler)]})
    flops = bench.costs.flops
    time, found, blocks = bench.costs.fracs(Point(bench.full, sampler))
    assert found == pytest.approx(flops[0] / flops[-1]) and blocks == pytest.approx(1 / 3)
    assert time > 0


@pytest.mark.thorough
def test_a_cached_point_is_sampled_and_costed_as_such(make_bench):
    bench = make_bench(search={"samplers": [CACHED, "ddim-4+cache-attn-0"]})
    own = Point(bench.full, bench.own_sampler)
    none = Point(bench.full, Sampler.from_string("ddim-4+cache-attn-0"))
    cached = Point(bench.full, Sampler.from_string(CACHED))
    for parameter in bench.backbone.parameters():  # blocks and head give nothing at first
        parameter.data += 0.1
    plain = bench.sample(bench.backbone, own, range(3)).images
    assert torch.equal(bench.sample(bench.backbone, none, range(3)).images, plain)
    reuse = np.zeros((4, 3), dtype=bool)
    reuse[1::2] = True  # half of all block calls
    bench._accelerations[cached.sampler] = Caching("block", reuse)
    assert not torch.equal(bench.sample(bench.backbone, cached, range(3)).images, plain)
    assert bench.costs.fracs(none)[1:] == (1.0, 1.0)
    time, flops, blocks = bench.costs.fracs(cached)
    assert blocks == pytest.approx(0.5) and 0.5 < flops < 1.0 and time > 0
    # what the proposer is told of its calls is the same
    calls = bench.costs.of_calls(cached.sampler)
    assert calls.shape == (4, 3)
    assert calls[:, -1].sum() / (4 * bench.costs.latency.median_ms[-1]) == pytest.approx(time)
    protocol = bench.protocols.search
    spent = [bench.costs.sampling_gflops(p, protocol) for p in (cached, own)]
    assert spent[0] / spent[1] == pytest.approx(flops)


@pytest.mark.thorough
def test_a_cache_saves_block_calls_of_a_u_vit_as_of_a_dit(make_bench, tmp_path):
    """Blocks that are never dropped are cached too, and count as the others do."""
    net = UViT(img_size=28, patch_size=14, in_chans=1, embed_dim=8, depth=6, num_heads=1)
    path = tmp_path / "uvit.safetensors"
    save_backbone(net, path, {})
    names = ["ddim-4+cache-block-0.5", "ddim-4+merge-0.5"]
    bench = make_bench(
        backbone={"kind": "uvit", "checkpoint": str(path)}, search={"samplers": names}
    )
    cached, merged = (Point(bench.full, Sampler.from_string(name)) for name in names)
    reuse = np.zeros((4, 7), dtype=bool)
    reuse[1::2] = True  # half of all block calls
    bench._accelerations[cached.sampler] = Caching("block", reuse)
    _, flops, blocks = bench.costs.fracs(cached)
    assert blocks == pytest.approx(0.5) and 0.5 < flops < 1
    assert 0.5 < bench.costs.fracs(merged)[2] < 1
    shallow = Point(ExitSchedule.from_string("1", 3), bench.own_sampler)
    assert bench.costs.fracs(shallow)[2] == pytest.approx((4 + 1) / 7)


@pytest.mark.thorough
def test_caches_of_one_part_share_a_latency_table(make_bench, tmp_path):
    names = ["ddim-4+cache-block-0.5", "ddim-4+cache-block-0.1", "dpm++2m-2+cache-mlp-0.1"]
    bench = make_bench(run_dir=tmp_path / "run", search={"samplers": names})
    for sampler in bench.samplers:
        bench.costs.fracs(Point(bench.full, sampler))
    assert len(list((tmp_path / "run").glob("latency-*.json"))) == 2


GUIDED = {"solver": "ddim", "num_steps": 4, "batch_size": 40, "cfg_scale": 1.5}


def test_calls_outside_the_guidance_interval_cost_half(make_bench, tmp_path):
    names = ["ddim-4+guide-0-500", "ddim-4+guide-0-1000", "dpm++2m-2+guide-0-500"]
    run_dir = tmp_path / "run"
    bench = make_bench(run_dir=run_dir, sampling=GUIDED, search={"samplers": names})
    half, whole, two = (Point(bench.full, Sampler.from_string(name)) for name in names)
    own = Point(bench.full, bench.own_sampler)
    for parameter in bench.backbone.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    plain = bench.sample(bench.backbone, own, range(3)).images
    assert torch.equal(bench.sample(bench.backbone, whole, range(3)).images, plain)
    assert not torch.equal(bench.sample(bench.backbone, half, range(3)).images, plain)
    # calls at 999, 666, 333, 0: two of them are halved
    assert bench.costs.fracs(half)[1:] == pytest.approx((0.75, 0.75))
    assert bench.costs.fracs(two)[1:] == pytest.approx((0.375, 0.375))
    assert bench.costs.fracs(whole) == (1.0, 1.0, 1.0)
    short = Point(ExitSchedule.from_string("3 1", 3), half.sampler)
    assert bench.costs.fracs(short)[2] == pytest.approx((2 * 3 + 2 * 1 / 2) / 12)
    calls = bench.costs.of_calls(half.sampler)
    assert calls[:, -1].sum() / (4 * bench.costs.latency.median_ms[-1]) == pytest.approx(
        bench.costs.fracs(half)[0]
    )
    assert len(list(run_dir.glob("latency-*.json"))) == 1  # of all intervals
    spent = [bench.costs.sampling_gflops(p, bench.protocols.search) for p in (half, own)]
    assert spent[0] / spent[1] == pytest.approx(0.75)


def test_an_interval_is_refused_without_guidance_before_anything_is_measured(
    make_bench, monkeypatch
):
    for name in ("calibrated", "sample"):
        monkeypatch.setattr(f"asesearch.search.parts.{name}", None)
    with pytest.raises(ConfigError, match="got cfg_scale 1, which is none"):
        make_bench(search={"samplers": [CACHED, "ddim-4+guide-0-500"]})


@pytest.mark.parametrize("sampler", [CACHED, "ddim-4+merge-0.5"])
def test_an_acceleration_is_refused_with_compiled_blocks(make_bench, sampler):
    sampling = {"solver": "ddim", "num_steps": 4, "batch_size": 40, "compile": True}
    with pytest.raises(ConfigError, match="leave compile or the acceleration out"):
        make_bench(sampling=sampling, search={"samplers": [sampler]})
