"""Uncertainty-based exits: who leaves where, what still runs, and what estimators learn."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from asesearch.backbones.uncertainty import TIME_CHANNELS, DeeDiff, Learning, _regressed
from asesearch.calibration import read_acceleration
from asesearch.errors import ConfigError
from asesearch.sampler import Sampler
from asesearch.schedule import ExitSchedule
from tests.backbones.accelerated import CALLS, FULL, NETWORKS, calibrate, dit, make, some_exits


@pytest.fixture(scope="module", params=NETWORKS)
def net(request):
    return NETWORKS[request.param]()


def told(*uncertainties, threshold=0.5):
    """Estimators that say the same of every image."""
    weights = np.zeros((3, 16 + TIME_CHANNELS + 1), dtype=np.float32)
    weights[:, -1] = [math.log(u / (1 - u)) for u in uncertainties]
    return DeeDiff(threshold, weights, np.tile([0, 0, 0, 1], (CALLS, 1)))


def batch(net, n=6):
    torch.manual_seed(1)
    x_t = torch.linspace(0.1, 4, n)[:, None, None, None] * torch.randn(n, 1, 8, 8)
    return x_t, torch.full((n,), 500), torch.arange(n) if net.num_classes else None


@pytest.mark.parametrize(
    ("said", "depth"),
    [((0.5, 0.9, 0.9), 1), ((0.9, 0.4, 0.9), 2), ((0.51, 0.51, 0.1), 3), ((0.6, 0.6, 0.6), 4)],
)
def test_all_leave_at_the_first_block_whose_uncertainty_is_at_most_the_threshold(net, said, depth):
    static = make(net, schedule=ExitSchedule.from_string(str(depth), 4)).images
    assert torch.equal(make(net, told(*said), FULL).images, static)


@torch.no_grad()
@pytest.mark.parametrize("exit_depth", [None, 3])
def test_each_image_leaves_for_itself_and_costs_nothing_in_later_blocks(net, exit_depth):
    seen = []
    rows = []
    blocks = net.transformer_blocks()[-net.depth :]
    handles = [b.mlp.register_forward_pre_hook(lambda _, a: rows.append(len(a[0]))) for b in blocks]
    args = batch(net)
    with some_exits(net, FULL).leading(net, lambda call, depths: seen.append(depths)):
        rows.clear()
        out = net(*args, exit_depth=exit_depth)
    for handle in handles:
        handle.remove()
    (depths,) = seen
    assert len(depths.unique()) > 1 and depths.max() <= (exit_depth or 4)
    torch.testing.assert_close(out, net(*args, exit_depth=depths))
    assert (out - net(*args, exit_depth=exit_depth)).abs().max() > 1e-3  # the control
    assert rows == [n for n in (int((depths > i).sum()) for i in range(4)) if n]


def test_costs_are_expected_from_the_calibrations_exits():
    made = dataclasses.replace(told(0.9, 0.9, 0.9), exits=np.tile([1, 0, 2, 1], (2, 1)))
    assert made.mix(dit(), [4, 2]) == [
        ((0.25, 1, True), (0.5, 3, True), (0.25, 4, True)),
        ((0.25, 1, True), (0.75, 2, True)),
    ]


@torch.no_grad()
def test_estimators_see_tokens_time_and_how_far_each_exit_is_from_the_end(net, monkeypatch):
    seen = []
    monkeypatch.setattr(Learning, "_add", lambda self, *args: seen.append(args))
    args = batch(net)
    with Learning(1).attached(net):
        full = net(*args)
    assert torch.equal(full, net(*args))
    ((tokens, time, gaps),) = seen
    assert [t.shape for t in tokens] == [(6, 16)] * 3 and time.shape == (6, TIME_CHANNELS)
    for depth, gap in enumerate(gaps, 1):
        apart = torch.tanh((net(*args, exit_depth=depth) - full)[:, :1].abs())
        torch.testing.assert_close(gap, apart.mean(dim=(1, 2, 3)))


def test_a_linear_relation_is_learned():
    torch.manual_seed(0)
    x = torch.randn(500, 4).double()
    x[:, 2] = 7  # tells nothing
    x[:, 3] = 1
    y = 2 * x[:, 0] - x[:, 1] + 3
    found = _regressed(x.T @ x, x.T @ y)
    torch.testing.assert_close(found, torch.tensor([2.0, -1, 0, 3]).double(), rtol=0, atol=0.3)
    assert found[2] == 0
    residual = (y - x @ found).var() / y.var()
    assert residual < 0.02 < (y - x @ found.flip(0)).var() / y.var()


def test_more_is_saved_at_a_higher_threshold():
    net = dit()
    depth = np.arange(1, 5)
    found = [calibrate(net, f"deediff-{a}").exits for a in ("0", "0.001", "0.003", "1")]
    means = [float((exits @ depth).sum() / exits.sum()) for exits in found]
    assert means == sorted(means, reverse=True) and means[0] == 4 > means[1] > means[-1] == 1
    assert all((exits.sum(axis=1) == 3).all() for exits in found)  # of three images


def test_an_exit_depth_for_each_image_is_refused():
    net = dit()
    with (
        told(0.9, 0.9, 0.9).attached(net),
        pytest.raises(ConfigError, match="one exit depth for the batch"),
    ):
        net(*batch(net), exit_depth=torch.tensor([1, 2, 3, 4, 4, 4]))


def test_more_than_certainty_is_refused():
    for amount in ("1.5", "2"):
        with pytest.raises(ConfigError, match="deediff takes an amount from 0 to 1; got"):
            Sampler("ddim", 50, f"deediff-{amount}")
    with pytest.raises(ConfigError, match="lies in 0…1; got 1.5"):
        told(0.9, 0.9, 0.9, threshold=1.5)
    with pytest.raises(ConfigError, match="calibrated for 3 droppable blocks"):
        exits = np.ones((CALLS, 3), dtype=np.int64)
        make(dit(), DeeDiff(0.5, np.zeros((2, 49), dtype=np.float32), exits))


@pytest.mark.parametrize(
    "change",
    [
        {"exits": [[1, 2, 3], [1, 2]]},
        {"exits": [[0.5, 0.5, 0, 0]]},
        {"exits": [[0, 0, 0, 0]]},
        {"exits": [[1, -1, 1, 1]]},
        {"exits": []},
        {"estimators": "AAAA"},
        {"estimators": None},
        {"threshold": "much"},
        {"threshold": -1},
    ],
)
def test_damaged_data_is_refused(change):
    with pytest.raises(ConfigError, match="got"):
        read_acceleration(told(0.9, 0.9, 0.9).to_dict() | change)
