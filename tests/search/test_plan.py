"""The plan of a search, counted out by hand."""

from types import SimpleNamespace

import pytest

from asesearch.config import parse_study
from asesearch.sampler import Sampler
from asesearch.search import plan

STUDY = {
    "name": "planned",
    "backbone": {"checkpoint": "shipped:fashion-mnist-dit"},
    "data": {"kind": "fashion-mnist"},
    "elastic": {"num_steps": 20},
    "map": {"num_bins": 2, "num_images": 3},
    "train": {"num_steps": 10},
    "evaluation": {"extractor": "fashion-cnn", "num_samples": 10, "repeats": 2},
    "search": {"num_trials": 6, "proposer": "difficulty"},
    "promotion": {"num_samples": 2, "repeats": 2},
    "confirm": {
        "max_points": 2,
        "num_samples": 4,
        "repeats": 2,
        "time_images": 3,
        "time_repeats": 1,
    },
}


@pytest.fixture
def bench(monkeypatch):
    """A step takes 2 s, an image 1 s in ten calls; half of the samplers call five times."""
    monkeypatch.setattr(plan, "Trainer", lambda *_: None)
    monkeypatch.setattr(plan, "seconds_per_step", lambda _: 2.0)
    monkeypatch.setattr(plan, "elastic_depths", lambda _: None)
    config = parse_study(STUDY, "test")
    tuning = None, config.train.model_copy(update={"num_steps": 30})
    return SimpleNamespace(
        config=config,
        samplers={Sampler("ddim", 10): range(10), Sampler("unipc", 5): range(5)},
        decoder=None,
        batch_size=10,
        costs=SimpleNamespace(full_call_ms=1000.0),
        full=None,
        trials=SimpleNamespace(tuning=lambda _: tuning),
        backbone=None,
        data=None,
        diffusion=None,
    )


def test_what_a_search_is_expected_to_take(bench):
    found = plan.make_plan(bench)
    # at 0.65 of the blocks and, in the mean, three quarters of the calls, an image takes 0.4875 s
    full = 30 * 2 + 20 + 4
    warm_up = 20 * 2 + 2 * 3 * 3 * 0.1
    explored = 3 * 4 * 0.4875
    tuned = 2 * (10 * 2 * 0.65 + (20 + 4) * 0.4875)
    confirmed = 8 * (1 + 2 * 0.4875) + 2 * (1 + 0.4875) * 2 * 3
    assert (
        found.expected_s
        == pytest.approx(full + warm_up + explored + tuned + confirmed)
        == pytest.approx(214.7)
    )
    # the bound: all five beside the full network tuned, at its cost
    assert found.total_s == pytest.approx(
        full + warm_up + 5 * (10 * 2 + 24) + 8 * 3 + 2 * 2 * 2 * 3
    )


def test_guidance_doubles_the_calls_of_images_and_none_of_the_map(bench):
    plain = plan.make_plan(bench)
    bench.config = bench.config.with_options("sampling", cfg_scale=2.0)
    bench.costs.full_call_ms *= 2  # of twice the batch
    guided = plan.make_plan(bench)
    assert (guided.image_s, guided.map_s) == (2 * plain.image_s, plain.map_s)
    assert plain.map_s == pytest.approx(2 * 3 * 3 * 0.1)


def test_with_a_budget_the_plan_is_what_is_expected(bench):
    bench.config = bench.config.with_options("search", budget="10m")
    found = plan.make_plan(bench)
    assert found.expected_s == found.total_s and 500 < found.total_s <= 600
