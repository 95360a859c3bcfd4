"""The contract of an acceleration, over all of them."""

import copy

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from asesearch.backbones import DiT
from asesearch.backbones.acceleration import led
from asesearch.backbones.exit_weights import ExitWeights
from asesearch.calibration import calibrated, read_acceleration
from asesearch.diffusion import Diffusion
from asesearch.errors import ConfigError, ScheduleError
from asesearch.evaluation.cost import count_flops, flops_table, mixed_cost
from asesearch.sampler import ACCELERATIONS
from asesearch.schedule import ExitSchedule
from tests.backbones.accelerated import (
    CALLS,
    MIDDLE,
    NETWORKS,
    RIVALS,
    SCHEDULE,
    STRONG,
    WEAK,
    awake,
    calibrate,
    case,
    diffusers_dit,
    make,
    networks,
    prompts,
)


def marked(kind, *more):
    """cache-dit takes seconds to import; of the other package's networks one is enough."""
    marks = [pytest.mark.slow] if kind == "dbcache" or more == ("PixArt",) else []
    return pytest.param((*more, kind) if more else kind, marks=marks, id="-".join((*more, kind)))


every_kind = pytest.mark.parametrize("kind", [marked(kind) for kind in ACCELERATIONS])


@pytest.fixture(params=[marked(kind, name) for kind in ACCELERATIONS for name in networks(kind)])
def each(request):
    return case(*request.param)


PLAIN = {}
SHALLOW = ExitSchedule.from_string("3 2 2 1", 4)


def plain_flops(net):
    """The table of a network as it is, counted once for each shape."""
    shape = type(net), net.num_classes
    if shape not in PLAIN:
        PLAIN[shape] = flops_table(net, prompts(net, 1))
    return PLAIN[shape]


def first_network(kind):
    return next(iter(networks(kind).values()))()


def flops_of(call):
    """FLOPs that torch counts, and what the call gives."""
    # torch does not count a CPU's attention by itself
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    mapping = {attention: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        result = call()
    return counter.get_total_flops(), result


def test_none_of_it_changes_no_bit(each):
    plain = each.make().images
    assert torch.equal(each.make(each.calibrate(WEAK[each.kind])).images, plain)
    assert (each.make(each.strong).images - plain).abs().max() > 1e-3  # the control


def test_a_batch_sees_nothing_of_the_one_before(each):
    whole = each.make(each.strong, batch_size=3).images
    torch.testing.assert_close(each.make(each.strong, batch_size=1).images, whole)


@pytest.mark.thorough
def test_flops_are_those_counted_in_a_real_sampling(each):
    net, strong = each.net, each.strong
    # all images in one batch: counting takes its time with every operation
    flops, result = flops_of(lambda: each.make(strong, batch_size=3))
    depths = SCHEDULE.exit_depth_at(result.timesteps).tolist()
    mixes = strong.mix(net, depths)
    assert all(sum(w for w, *_ in mix) == pytest.approx(1) for mix in mixes)
    plain = plain_flops(net)
    predicted = mixed_cost(mixes, plain, flops_table(net, prompts(net, 1), strong))
    assert flops == pytest.approx(3 * each.passes * predicted, rel=1e-9)
    assert predicted < sum(plain[d - 1] for d in depths)


@pytest.fixture(params=[marked(kind, next(iter(networks(kind)))) for kind in ACCELERATIONS])
def two_sets(request):
    """A case whose early exits have weights of their own."""
    found = case(*request.param)
    exits = copy.deepcopy(found.net)
    for parameter in exits.parameters():
        parameter.data *= 1.01
    found.net = ExitWeights(found.net, exits).eval()
    return found


@pytest.mark.thorough
def test_two_sets_of_weights_keep_nothing_for_each_other(two_sets):
    net, strong = two_sets.net, two_sets.strong
    plain = two_sets.make().images
    weak = calibrate(net.full, WEAK[two_sets.kind], **two_sets.options)
    assert torch.equal(two_sets.make(weak).images, plain)
    flops, result = flops_of(lambda: two_sets.make(strong, batch_size=3))
    assert (result.images - plain).abs().max() > 1e-3
    depths = SCHEDULE.exit_depth_at(result.timesteps).tolist()
    changed = flops_table(net.full, prompts(net.full, 1), strong)
    mixes = strong.mix(net.full, depths, apart=True)
    predicted = mixed_cost(mixes, plain_flops(net.full), changed)
    assert flops == pytest.approx(3 * two_sets.passes * predicted, rel=1e-9)
    assert not any("forward" in vars(module) for module in net.modules())
    # a schedule of early exits alone, or of none, is that of one set
    for schedule, own in ((ExitSchedule.full(4), net.full), (SHALLOW, net.exits)):
        alone = make(own, strong, schedule, **two_sets.options).images
        assert torch.equal(two_sets.make(strong, schedule=schedule).images, alone)


def test_calls_are_those_that_ran(each):
    """As the acceleration's own expectation has them: exits here were counted on these images."""
    net, strong = each.net, each.strong
    plain = each.make()
    result = each.make(strong)
    depths = SCHEDULE.exit_depth_at(result.timesteps).tolist()
    mixes = strong.mix(net, depths)
    fixed = net.fixed_blocks
    whole = sum(depths) + CALLS * fixed
    assert (plain.nfe, plain.block_calls) == (each.passes * CALLS, each.passes * whole)
    if each.kind == "guide":
        alone = [mix[0][2] for mix in mixes]
        assert result.nfe == sum(1 if one else 2 for one in alone) < plain.nfe
        counted = sum((2 - one) * (fixed + d) for one, d in zip(alone, depths, strict=True))
    elif each.kind == "dbcache":
        counted = sum(1 if mix[0][2] else mix[0][1] for mix in mixes)
    elif each.kind == "deediff":
        counted = sum(w * (fixed + d) for mix in mixes for w, d, _ in mix)
    elif each.kind.startswith("cache-block"):
        seen = np.zeros(fixed + net.depth, dtype=bool)
        counted = 0
        for row, depth in zip(strong.reuse, depths, strict=True):
            runs = np.arange(fixed + net.depth) < fixed + depth
            counted += int((runs & ~(row & seen)).sum())
            seen |= runs
    else:
        counted = whole
    assert result.block_calls == pytest.approx(counted)
    saves_blocks = each.kind in ("guide", "deediff", "dbcache") or each.kind.startswith(
        "cache-block"
    )
    assert (result.block_calls < plain.block_calls) == saves_blocks


def test_it_reads_back(each):
    strong = each.strong
    again = read_acceleration(strong.to_dict())
    assert type(again) is type(strong) and again.to_dict() == strong.to_dict()
    assert torch.equal(each.make(again).images, each.make(strong).images)


@every_kind
def test_guidance_goes_with_it(kind):
    net = first_network(kind)
    plain = make(net, cfg_scale=1.5).images
    accelerated = make(net, STRONG[kind](net), cfg_scale=1.5).images
    assert (accelerated - plain).abs().max() > 1e-4
    unguided = make(net, None if kind == "guide" else STRONG[kind](net)).images
    assert (accelerated - unguided).abs().max() > 1e-4


@every_kind
def test_bfloat16_goes_with_it(kind):
    each = case(next(iter(networks(kind))), kind)
    each.options["precision"] = "bf16"
    images = each.make(each.calibrate(MIDDLE[kind])).images
    assert images.isfinite().all()
    assert (images - each.make().images).abs().max() > 1e-3


def test_surplus_data_is_refused(each):
    with pytest.raises(ConfigError, match="has the keys"):
        read_acceleration(each.strong.to_dict() | {"more": 1})


def test_what_does_not_fit_is_refused(each):
    strong = each.strong
    with pytest.raises(ConfigError, match="compiled blocks"):
        each.make(strong, compile=True)
    if strong.num_calls is not None:
        with pytest.raises(ConfigError, match=f"made for {CALLS} network calls"):
            each.make(strong, num_steps=CALLS + 1)
    if each.kind == "guide":  # goes with any network
        return
    if each.kind in RIVALS:
        with pytest.raises(ConfigError, match="acts on networks of kind 'diffusers'.*got DiT;"):
            make(NETWORKS["DiT"](), strong)
        return
    del each.net.transformer_blocks()[0].mlp
    with pytest.raises(ConfigError, match="DiT or U-ViT"):
        each.make(strong)


def test_modules_are_left_as_they_were(each):
    net, strong = each.net, each.strong
    with pytest.raises(ScheduleError), strong.attached(net):
        changed = [module for module in net.modules() if "forward" in vars(module)]
        assert changed
        with (
            pytest.raises(ConfigError, match="one acceleration at a time"),
            led({changed[0]: lambda x: x}),
        ):
            pass
        assert "forward" in vars(changed[0])
        raise ScheduleError("stop")
    assert not any("forward" in vars(module) for module in net.modules())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ACCELERATIONS)
def test_the_true_shape(kind):
    """28 blocks, 256 tokens, 1,000 classes and guidance; narrow, so that a CPU has time for it."""
    torch.manual_seed(0)
    if kind in RIVALS:
        sizes = {"in_channels": 4, "sample_size": 32, "num_embeds_ada_norm": 1000}
        net = diffusers_dit(32, num_layers=28, **sizes)
    else:
        net = awake(DiT(hidden_size=32, depth=28, num_heads=2))
    schedule = ExitSchedule.from_string("D3-DiT", 28)
    options = {"cfg_scale": 1.5, "y": torch.tensor([0, 500, 999]), "num_steps": 10}

    def look(recorder):
        return make(net, recorder, ExitSchedule.full(28), **options)

    timesteps = Diffusion().timesteps(10)
    found = read_acceleration(calibrated(MIDDLE[kind], timesteps, look).to_dict())
    result = make(net, found, schedule, **options)
    assert result.images.isfinite().all() and result.images.shape == (3, 4, 32, 32)
    assert not torch.equal(result.images, make(net, None, schedule, **options).images)
    depths = schedule.exit_depth_at(result.timesteps).tolist()
    mixes = found.mix(net, depths)
    assert [sum(w for w, *_ in mix) for mix in mixes] == pytest.approx([1] * 10)
    # calls are cheaper, or shallower
    shallower = sum(w * d for mix in mixes for w, d, _ in mix) < sum(depths) - 1
    assert shallower == (kind == "deediff")
    assert shallower or count_flops(net, 28, 2, acceleration=found) < count_flops(net, 28)
