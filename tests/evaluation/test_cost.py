"""Cost on a clock of our own: a network whose every block takes a known time."""

import json
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from asesearch.backbones import Backbone, DiT
from asesearch.errors import EvaluationError, ScheduleError
from asesearch.evaluation.clock import compare_sampling_time
from asesearch.evaluation.cost import (
    LatencyTable,
    count_flops,
    flops_frac,
    flops_table,
    full_call_ms,
    measure_changed,
    measure_latency,
)
from asesearch.schedule import ExitSchedule

FIXED = 3.0
PER_BLOCK = 2.0
DEPTH = 5


class ClockedNet(Backbone):
    """Takes FIXED + PER_BLOCK ms a block on its own clock, times `drift` more at each call; notes
    the depths it ran."""

    depth = DEPTH
    in_channels = 1
    input_size = 2
    num_classes = 3

    def __init__(self, drift=1.0, min_exit_depth=1):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.min_exit_depth = min_exit_depth
        self.drift = drift
        self.speed = 1.0
        self.now = 0.0
        self.ran = []

    def forward(self, x_t, t, y=None, *, exit_depth=None):
        assert (
            x_t.shape == (4, 1, 2, 2) and y.shape == t.shape == (4,) and not torch.is_grad_enabled()
        )
        exit_depth = self.check_exit_depth(exit_depth, 4)
        self.ran.append(exit_depth)
        self.now += self.speed * (FIXED + PER_BLOCK * exit_depth)
        self.speed *= self.drift
        return x_t

    def timer(self, call):
        start = self.now
        call()
        return self.now - start


def measured(net, repeats=6):
    return measure_latency(net, 4, repeats, timer=net.timer)


def test_the_table_is_the_networks_time():
    table = measured(ClockedNet())
    assert table.median_ms == pytest.approx([FIXED + PER_BLOCK * d for d in range(1, DEPTH + 1)])
    assert table.spread_ms == pytest.approx([0] * DEPTH, abs=1e-9)
    assert table.fit == pytest.approx((FIXED, PER_BLOCK))
    assert (table.batch_size, table.repeats, table.device, table.dtype) == (4, 6, "cpu", "float32")
    assert table.threads == torch.get_num_threads()


def test_depths_are_interleaved_in_a_new_order_each_round():
    net = ClockedNet()
    measured(net, repeats=6)
    rounds = [net.ran[i : i + DEPTH] for i in range(0, len(net.ran), DEPTH)]
    assert len(rounds) == 7  # the first is thrown away
    assert all(sorted(r) == list(range(1, DEPTH + 1)) for r in rounds)
    assert len({tuple(r) for r in rounds}) > 3


def test_the_first_round_is_not_timed():
    class ColdNet(ClockedNet):
        def forward(self, *args, **kwargs):
            self.now += 1000 if len(self.ran) < DEPTH else 0
            return super().forward(*args, **kwargs)

    assert measured(ColdNet(), repeats=1).median_ms == pytest.approx(
        [FIXED + PER_BLOCK * d for d in range(1, DEPTH + 1)]
    )


def test_a_slowing_machine_favours_no_depth():
    drift = 1.01  # a third slower after 30 calls
    table = measured(ClockedNet(drift), repeats=60)
    schedule = ExitSchedule.uniform_intervals((5, 1), DEPTH)
    steps = [100, 900]
    one_after_the_other = [
        (FIXED + PER_BLOCK * d) * drift ** (60 * (d - 1)) for d in range(1, DEPTH + 1)
    ]
    honest = (13 + 5) / (2 * 13)
    assert table.time_frac(schedule, steps) == pytest.approx(honest, rel=0.05)
    assert (one_after_the_other[0] + one_after_the_other[-1]) / (
        2 * one_after_the_other[-1]
    ) < 0.8 * honest


def test_fractions_add_up():
    table = measured(ClockedNet())
    schedule = ExitSchedule.uniform_intervals((5, 4, 2, 1), DEPTH)
    steps = np.linspace(0, 999, 8).round()
    depths = schedule.exit_depth_at(steps)
    expected = (FIXED + PER_BLOCK * depths).mean() / (FIXED + PER_BLOCK * DEPTH)
    assert table.time_frac(schedule, steps) == pytest.approx(expected)
    assert table.bound_frac(schedule, steps) == pytest.approx(expected)
    assert table.bound_frac(schedule, steps) > schedule.block_frac(steps)
    assert table.time_frac(ExitSchedule.full(DEPTH), steps) == 1.0
    without_fixed = LatencyTable(1, "cpu", 1, "float32", (1.0, 2.0, 3.0, 4.0, 5.0), (0.0,) * 5, 1)
    assert without_fixed.bound_frac(schedule, steps) == pytest.approx(schedule.block_frac(steps))


@pytest.mark.parametrize(
    ("ms", "fixed", "per_block"),
    [((1.0, 4.0), 0.0, 1.8), ((3.0, 2.0), 2.5, 0.0), ((3.0,), 0.0, 3.0)],
)
def test_the_fit_has_no_negative_part(ms, fixed, per_block):
    assert LatencyTable(1, "cpu", 1, "float32", ms, (0.0,) * len(ms), 1).fit == pytest.approx(
        (fixed, per_block)
    )


def test_depths_below_the_least_have_its_time():
    table = measured(ClockedNet(min_exit_depth=3))
    assert table.median_ms[0] == table.median_ms[1] == table.median_ms[2] < table.median_ms[3]


def test_a_table_survives_json_and_refuses_the_rest():
    table = measured(ClockedNet())
    data = json.loads(json.dumps(table.to_dict()))
    assert LatencyTable.from_dict(data) == table
    with pytest.raises(EvaluationError, match="keys"):
        LatencyTable.from_dict({**data, "more": 1})
    with pytest.raises(EvaluationError, match="positive median"):
        LatencyTable.from_dict({**data, "median_ms": [0.0] * DEPTH})
    with pytest.raises(EvaluationError, match="repeats"):
        measure_latency(ClockedNet(), 4, 0)


@pytest.mark.parametrize("which", ["time", "bound", "flops"])
def test_a_schedule_for_another_depth_is_refused(which):
    table = measured(ClockedNet())
    price = {
        "time": table.time_frac,
        "bound": table.bound_frac,
        "flops": lambda schedule, steps: flops_frac(schedule, steps, table.median_ms),
    }[which]
    with pytest.raises(ScheduleError, match=r"rescaled\(5\)"):
        price(ExitSchedule.full(4), [1])
    with pytest.raises(ScheduleError, match="empty"):
        price(ExitSchedule.full(5), [])


def test_the_real_clock_runs(tiny_dit):
    tiny_dit.train()
    table = measure_latency(tiny_dit, 2, repeats=2)
    assert len(table.median_ms) == tiny_dit.depth and tiny_dit.training


def test_compiled_blocks_are_timed_as_such(tiny_dit, only_traced):
    table = measure_latency(tiny_dit, 2, repeats=1, compile=True)
    assert table.compile and only_traced() == 1  # for four exit depths
    assert LatencyTable.from_dict(table.to_dict()) == table
    older = {k: v for k, v in table.to_dict().items() if k != "compile"}
    assert not LatencyTable.from_dict(older).compile
    assert not measure_latency(tiny_dit, 2, repeats=1).compile


# -- whole samplings -----------------------------------------------------------------------------


class Machine:
    """Two samplings of 2 ms and 4 ms on a clock whose speed drifts by a tenth a run."""

    def __init__(self, drift=1.0):
        self.now = 0.0
        self.speed = 1.0
        self.drift = drift
        self.order = []

    def run(self, name, ms):
        self.order.append(name)
        self.now += ms * self.speed
        self.speed *= self.drift

    def timer(self, call):
        start = self.now
        call()
        return self.now - start

    def compare(self, repeats):
        return compare_sampling_time(
            lambda: self.run("A", 2), lambda: self.run("B", 4), repeats, timer=self.timer
        )


def test_samplings_alternate_after_a_warm_up():
    machine = Machine()
    ratio = machine.compare(3)
    assert "".join(machine.order) == "AB" + "ABBAAB"
    assert ratio.median == pytest.approx(0.5) and ratio.spread == pytest.approx(0, abs=1e-12)
    assert np.allclose(ratio.pairs, [(0.002, 0.004)] * 3)


def test_alternation_cancels_a_drift_that_a_fixed_order_keeps():
    ratio = Machine(drift=1.1).compare(4)
    assert ratio.median == pytest.approx(0.5, rel=0.01)
    assert all(abs(a / b - 0.5) > 0.03 for a, b in ratio.pairs)  # each pair alone is off
    assert ratio.spread > 0.01


def test_the_real_clock_compares():
    ratio = compare_sampling_time(lambda: None, lambda: None, repeats=1)
    assert ratio.median > 0 and ratio.spread == 0
    with pytest.raises(EvaluationError, match="repeats"):
        compare_sampling_time(lambda: None, lambda: None, repeats=0)


# -- FLOPs ---------------------------------------------------------------------------------------


def test_flops_grow_by_one_blocks_worth_exactly(tiny_dit):
    table = flops_table(tiny_dit)
    tokens = 4
    width = 16
    linear = 2 * tokens * width * (3 * width + width + 8 * width)  # qkv, proj, two mlp layers
    attention = 2 * 2 * tokens * tokens * width
    modulation = 2 * width * 6 * width
    assert {b - a for a, b in zip(table, table[1:], strict=False)} == {
        linear + attention + modulation
    }
    assert count_flops(tiny_dit, 2, batch_size=3) == table[1]


def test_flops_frac_is_the_share_of_the_counted(tiny_dit):
    table = flops_table(tiny_dit)
    schedule = ExitSchedule.uniform_intervals((4, 2), 4)
    assert flops_frac(schedule, [10, 990], table) == pytest.approx(
        (table[3] + table[1]) / (2 * table[3])
    )
    assert flops_frac(ExitSchedule.full(4), [10, 990], table) == 1.0
    assert flops_frac(schedule, [10, 990], table) > schedule.block_frac([10, 990])


def test_counting_leaves_the_network_alone(tiny_dit):
    before = {k: v.clone() for k, v in tiny_dit.state_dict().items()}
    count_flops(tiny_dit, 1)
    assert all(
        torch.equal(v, before[k]) and v.device.type == "cpu"
        for k, v in tiny_dit.state_dict().items()
    )
    with pytest.raises(ScheduleError, match="exit_depth"):
        count_flops(tiny_dit, 9)


@pytest.mark.slow  # imports all of diffusers
def test_a_network_of_prompts_is_counted_with_its_conditioning():
    from asesearch.backbones.diffusers_adapter import DiffusersBackbone

    net = DiffusersBackbone(
        {
            "_class_name": "PixArtTransformer2DModel",
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 3,
            "sample_size": 8,
            "patch_size": 2,
            "cross_attention_dim": 16,
            "caption_channels": 12,
        }
    )
    table = flops_table(net, {"encoder_hidden_states": torch.zeros(1, 5, 12)})
    assert table[1] - table[0] == table[2] - table[1] > 0


@pytest.mark.slow
def test_dit_xl_2_has_the_published_flops():
    with torch.device("meta"):
        net = DiT.from_preset("DiT-XL/2")
    # Peebles & Xie 2023, table 4: multiply-adds
    assert count_flops(net, 28) / 2e9 == pytest.approx(118.64, rel=1e-3)


@pytest.mark.parametrize(
    ("ratios", "median", "spread"),
    # quartiles by hand
    [((1, 2, 3, 4, 5), 3, 1), ((5, 1, 4, 2, 90), 4, 1.5), ((2, 2, 2), 2, 0), ((1, 9), 5, 2)],
)
def test_the_spread_is_half_the_distance_between_the_quartiles(ratios, median, spread):
    # every other pair runs B first
    turns = iter([(1, t) if i % 2 else (t, 1) for i, t in enumerate(ratios)])
    times = iter([ms for pair in turns for ms in pair])
    found = compare_sampling_time(
        lambda: None, lambda: None, len(ratios), timer=lambda call: next(times)
    )
    assert (found.median, found.spread) == (median, spread)


def test_the_spread_of_a_call_is_half_the_distance_between_its_quartiles():
    """Rounds of 10 to 13 ms at each depth and one of a hiccup, after one that is thrown away."""
    rounds = iter(np.repeat([99.0, 10.0, 11.0, 12.0, 13.0, 140.0], DEPTH).tolist())
    table = measure_latency(ClockedNet(), 4, 5, timer=lambda call: next(rounds))
    assert table.median_ms == (12.0,) * DEPTH and table.spread_ms == (1.0,) * DEPTH


def test_full_depth_can_be_timed_alone():
    net = ClockedNet()
    assert full_call_ms(net, 4, 3, timer=net.timer) == measured(ClockedNet()).median_ms[-1]
    assert net.ran == [DEPTH] * 4  # one of them thrown away


class Half:
    """An acceleration under which a `ClockedNet`'s calls take half as long."""

    def most(self, net):
        return self

    @contextmanager
    def attached(self, net):
        net.pace = 0.5
        yield lambda call: None
        net.pace = 1.0


def test_changed_calls_are_timed_beside_unchanged_ones():
    """A machine that is ten times slower than when the plain table was measured, and ever slower:
    only the ratio counts."""
    net = ClockedNet()
    net.pace = 1.0
    slowness = iter(10.0 + i // 2 for i in range(1000))

    def timer(call):
        return net.timer(call) * net.pace * next(slowness)

    plain = measure_latency(net, 4, 3, timer=net.timer)
    table = measure_changed(net, plain, Half(), 3, timer=timer)
    assert table.median_ms == pytest.approx([m / 2 for m in plain.median_ms], rel=1e-9)
    assert (table.batch_size, table.repeats) == (4, 3) and max(table.spread_ms) < 1e-9
