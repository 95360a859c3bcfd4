"""DBCache by cache-dit: it decides as the package does, and leaves nothing behind."""

import sys
from collections import Counter
from contextlib import ExitStack

import numpy as np
import pytest
import torch

from asesearch.backbones.dbcache import DBCache, Deciding
from asesearch.backbones.smoothcache import SmoothCache
from asesearch.calibration import read_acceleration
from asesearch.errors import ConfigError
from asesearch.schedule import ExitSchedule
from tests.backbones.accelerated import (
    CALLS,
    DIFFUSERS,
    FULL,
    SCHEDULE,
    calibrate,
    check_again_under_its_number,
    diffusers_dit,
    make,
    some_layers,
)

FLAGS = np.array([False, True, False, True, True])


def block_calls(net):
    """How often each block is called from now on."""
    calls = Counter()
    for i, block in enumerate(net.transformer_blocks()):
        block.register_forward_pre_hook(lambda *_, i=i: calls.update([i]))
    return calls


def state_of(net):
    """Names of all that modules hold, in order."""
    return {name: (list(vars(m)), list(m._modules)) for name, m in net.named_modules()}


def test_the_package_missing_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cache_dit", None)
    with pytest.raises(
        ConfigError, match=r"needs the package cache-dit; .*pip install 'asesearch\["
    ):
        calibrate(diffusers_dit(), "dbcache-0.1")


@pytest.mark.parametrize(
    "data",
    [
        {"kind": "dbcache", "reuse": ""},
        {"kind": "dbcache", "reuse": "0x"},
        {"kind": "dbcache", "reuse": "11"},
        {"kind": "dbcache"},
    ],
)
def test_damaged_data_is_refused(data):
    with pytest.raises(ConfigError, match="got"):
        read_acceleration(data)


def test_batches_that_differ_are_decided_by_most_images():
    deciding = Deciding(0.1, 3)
    for rows, reused in ((2, [False, True, True]), (1, [False, False, True])):
        for call, flag in enumerate(reused):
            deciding._count(call, rows, flag)
    assert deciding.reuse.tolist() == [False, True, True]
    deciding._count(1, 1, False)
    assert deciding.reuse.tolist() == [False, False, True]


@pytest.mark.slow
@pytest.mark.parametrize("name", DIFFUSERS)
def test_reused_calls_run_the_first_block_alone(name):
    net = DIFFUSERS[name]()
    calls = block_calls(net)
    result = make(net, DBCache(FLAGS))
    depths = SCHEDULE.exit_depth_at(result.timesteps)
    expected = Counter()
    for reused, depth in zip(FLAGS, depths, strict=True):
        expected.update(2 * list(range(1 if reused else depth)))  # two batches
    assert calls == expected and calls.total() < 2 * depths.sum()


@pytest.mark.slow
@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.8, 1.0])
def test_it_is_fixed_as_cache_dit_decides(threshold):
    """The same images as under cache-dit's own dynamic rule, for the images it was decided by."""
    net = diffusers_dit()
    deciding = Deciding(threshold, CALLS)
    expected = make(net, deciding, FULL, batch_size=3).images
    found = calibrate(net, f"dbcache-{threshold:g}", batch_size=3)
    assert found.reuse.tolist() == deciding.reuse.tolist()
    assert torch.equal(make(net, found, FULL, batch_size=3).images, expected)
    plain = make(net, None, FULL, batch_size=3).images
    assert torch.equal(expected, plain) == (not found.reuse.any())
    assert found.reuse.any() == (threshold > 0)
    if threshold == 1:
        assert found.reuse.tolist() == [False, *[True] * (CALLS - 1)]


@pytest.mark.slow
def test_nothing_is_left_behind(capsys):
    net = diffusers_dit()
    before = state_of(net)
    make(net, DBCache(FLAGS))
    assert state_of(net) == before
    with pytest.raises(RuntimeError, match="stop"), DBCache(FLAGS).attached(net) as begin:
        begin(0)
        assert state_of(net) != before  # the control
        raise RuntimeError("stop")
    assert state_of(net) == before
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_two_networks_at_once_keep_to_themselves():
    nets = [diffusers_dit(), diffusers_dit()]
    for parameter in nets[1].parameters():
        parameter.data *= 0.9
    expected = [make(net, DBCache(FLAGS)).images for net in nets]
    x_t = torch.randn(2, 1, 8, 8)
    y = torch.tensor([1, 2])
    calls = [torch.full((2,), t) for t in (900, 500)]
    with torch.no_grad():
        apart = []
        for net in nets:
            with DBCache(FLAGS).attached(net) as begin:
                apart.append(two_calls([net], [begin], x_t, calls, y)[0])
        with ExitStack() as stack:
            begins = [stack.enter_context(DBCache(FLAGS).attached(net)) for net in nets]
            together = two_calls(nets, begins, x_t, calls, y)
    assert all(map(torch.equal, apart, together)) and not torch.equal(*together)
    assert all(
        torch.equal(make(net, DBCache(FLAGS)).images, images)
        for net, images in zip(nets, expected, strict=True)
    )


def two_calls(nets, begins, x_t, calls, y):
    """Each network's outputs at two calls in turn, the second of which reuses."""
    out = []
    for number, t in enumerate(calls):
        for begin in begins:
            begin(number)
        out.append([net(x_t, t, y) for net in nets])
    return [torch.stack(found) for found in zip(*out, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dbcache", "smoothcache"])
def test_one_at_a_time_and_one_depth_for_the_batch(kind):
    net = diffusers_dit()
    strong = DBCache(FLAGS) if kind == "dbcache" else some_layers(net)
    assert isinstance(strong, DBCache | SmoothCache)
    for other in (DBCache(FLAGS), some_layers(net)):
        with (
            strong.attached(net),
            pytest.raises(ConfigError, match="one acceleration at a time"),
            other.attached(net),
        ):
            pass
    x_t = torch.randn(2, 1, 8, 8)
    with (
        strong.attached(net) as begin,
        pytest.raises(ConfigError, match="one exit depth for the batch"),
    ):
        begin(0)
        net(x_t, torch.tensor([500, 500]), torch.tensor([1, 2]), exit_depth=torch.tensor([1, 3]))


@pytest.mark.slow
def test_a_network_that_a_user_caches_is_refused():
    cache_dit = pytest.importorskip("cache_dit")
    net = diffusers_dit()
    cache_dit.enable_cache(net.transformer, cache_config=cache_dit.DBCacheConfig())
    with pytest.raises(ConfigError, match="disable what a pipeline has of its own"):
        make(net, DBCache(FLAGS))
    cache_dit.disable_cache(net.transformer)


@pytest.mark.slow
def test_an_exit_before_a_reused_call_is_passed_on():
    """A call that computed few blocks leaves the residual of those: exits and caching together."""
    net = diffusers_dit()
    shallow = ExitSchedule.uniform_intervals((1,), 4)
    assert torch.equal(
        make(net, DBCache(FLAGS), shallow).images, make(net, None, shallow).images
    )  # with one block there is nothing to reuse
    both = make(net, DBCache(FLAGS)).images
    assert (both - make(net).images).abs().max() > 1e-3
    assert (both - make(net, DBCache(FLAGS), FULL).images).abs().max() > 1e-3


@pytest.mark.slow
def test_a_call_can_be_made_again_under_its_number():
    """As clocks do: it reuses each time."""
    net = diffusers_dit()
    check_again_under_its_number(net, DBCache(FLAGS))
