"""The guidance interval: which calls are guided, and what the others run."""

import numpy as np
import pytest
import torch

from asesearch.backbones import DiT
from asesearch.backbones.guidance import GuidanceInterval
from asesearch.calibration import calibrated, read_acceleration
from asesearch.errors import ConfigError
from asesearch.evaluation.cost import count_flops
from asesearch.sampler import acceleration_of
from tests.backbones.accelerated import CALLS, FULL, SCHEDULE, awake, dit, make, uvit

GUIDED = {"cfg_scale": 1.5, "batch_size": 3}
TIMESTEPS = (999, 640, 360, 160, 40)


def interval(*inside):
    return GuidanceInterval(np.array(inside, dtype=bool))


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("guide-0-1000", [1, 1, 1, 1, 1]),
        ("guide-40-640", [0, 0, 1, 1, 1]),
        ("guide-41-641", [0, 1, 1, 1, 0]),
        ("guide-0-1", [0, 0, 0, 0, 0]),
    ],
)
def test_the_interval_holds_its_lower_end_and_not_its_upper(name, inside):
    found = calibrated(name, TIMESTEPS, look=None)
    assert found.inside.astype(int).tolist() == inside
    assert acceleration_of(name)[1] == tuple(map(float, name.split("-")[1:]))


def test_only_conditional_images_are_run_outside():
    """Counted in every block, at the exit depths of the schedule in all calls."""
    net = dit()
    labels = []
    rows = []
    net.y_embedder.register_forward_pre_hook(lambda _, args: labels.append(args[0].tolist()))
    for block in net.blocks:
        block.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    result = make(net, interval(0, 1, 1, 0, 0), **GUIDED)
    cond = [1, 2, 3]
    both = [*cond, *[net.num_classes] * 3]
    assert labels == [cond, both, both, cond, cond]
    depths = SCHEDULE.exit_depth_at(result.timesteps).tolist()
    assert min(depths) < max(depths)
    images = [3, 6, 6, 3, 3]
    assert rows == [n for n, d in zip(images, depths, strict=True) for _ in range(d)]


def test_no_interval_is_no_guidance_and_part_of_it_is_neither():
    net = dit()
    none = make(net, interval(*[0] * CALLS), FULL, **GUIDED).images
    torch.testing.assert_close(none, make(net, None, FULL, batch_size=3).images)
    some = make(net, interval(0, 0, 1, 1, 0), FULL, **GUIDED).images
    for other in (none, make(net, None, FULL, **GUIDED).images):
        assert (some - other).abs().max() > 1e-3


def test_an_interval_without_guidance_is_refused():
    with pytest.raises(ConfigError, match="got cfg_scale 1, which is none"):
        make(dit(), interval(*[1] * CALLS))


def test_a_network_without_null_label_is_refused():
    for options, said in (({}, "cfg_scale 1, which is none"), (GUIDED, "null label")):
        with pytest.raises(ConfigError, match=said):
            make(uvit(), interval(*[1] * CALLS), **options)


def test_each_image_may_have_its_own_depth_and_no_batch_is_odd():
    net = dit()
    x = torch.randn(2, 1, 8, 8).repeat(2, 1, 1, 1)
    y = torch.tensor([1, 2, 1000, 1000])
    t = torch.full((4,), 500)
    depths = torch.tensor([1, 4, 2, 3])
    with torch.no_grad(), interval(0).attached(net):
        out = net(x, t, y, exit_depth=depths)
        with pytest.raises(ConfigError, match="got 3 rows"):
            net(x[:3], t[:3], y[:3])
    with torch.no_grad():
        torch.testing.assert_close(out[:2], net(x[:2], t[:2], y[:2], exit_depth=depths[:2]))
    assert torch.equal(out[:2], out[2:])


def test_a_changed_call_has_half_of_the_arithmetic():
    net = dit()
    most = interval(0).most(net)
    assert count_flops(net, 3, 2, acceleration=most) == count_flops(net, 3) / 2


def test_channels_that_guidance_leaves_alone_stay_so():
    """A network that learns the variance, of which guidance changes none."""
    torch.manual_seed(0)
    net = awake(DiT(input_size=8, patch_size=2, hidden_size=16, depth=4, num_heads=2))
    images = make(net, interval(*[0] * CALLS), FULL, **GUIDED).images
    torch.testing.assert_close(images, make(net, None, FULL, batch_size=3).images)


@pytest.mark.parametrize("inside", ["", "012", None, [0, 1]])
def test_damaged_data_is_refused(inside):
    with pytest.raises(ConfigError, match="has the keys kind and inside"):
        read_acceleration({"kind": "guide", "inside": inside})


def test_flags_are_one_for_a_call():
    with pytest.raises(ConfigError, match=r"flags \(calls,\)"):
        GuidanceInterval(np.zeros((2, 2), dtype=bool))
