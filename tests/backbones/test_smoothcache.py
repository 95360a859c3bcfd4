"""SmoothCache by dit-smoothcache: what is reused is what was computed, at the calls of a schedule
made by its rule."""

import sys
from collections import Counter

import numpy as np
import pytest
import torch

from asesearch.backbones.smoothcache import Measuring, SmoothCache, scheduled
from asesearch.calibration import read_acceleration
from asesearch.errors import ConfigError
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


@pytest.mark.parametrize("name", DIFFUSERS)
def test_only_what_is_not_flagged_or_never_ran_is_computed(name, capsys):
    net = DIFFUSERS[name]()
    strong = some_layers(net)
    calls = Counter()
    for i, block in enumerate(net.transformer_blocks()):
        for kind in strong.reuse:
            layer = getattr(block, kind)
            inner = layer.to_q if kind != "ff" else layer.net[0]
            inner.register_forward_pre_hook(lambda *_, at=(kind, i): calls.update([at]))
    result = make(net, strong)
    expected = Counter()
    for kind, flags in strong.reuse.items():
        seen = set()
        for flag, depth in zip(flags, SCHEDULE.exit_depth_at(result.timesteps), strict=True):
            for i in range(depth):
                expected[kind, i] += 2 * (not flag or i not in seen)  # two batches
                seen.add(i)
    assert calls == expected
    assert capsys.readouterr().out == ""  # the package prints a line a call


def test_a_part_of_the_layers_is_that_part_of_the_cost():
    net = diffusers_dit()
    strong = SmoothCache(
        {"attn1": np.array([False, True]), "ff": np.array([False, False])},
        {"attn1": 0.3, "ff": 0.7},
    )
    mixes = strong.mix(net, [2, 4])
    assert mixes[0] == ((1.0, 2, False), (0.0, 2, True))
    # half of the blocks had not run before
    assert mixes[1] == ((pytest.approx(0.85), 4, False), (pytest.approx(0.15), 4, True))
    assert sum(some_layers(net).shares.values()) == pytest.approx(1)


def test_errors_are_relative_to_what_is_given_now():
    """Layers whose outputs double from call to call: after k calls they were 1 - 2^-k off."""
    net = diffusers_dit()
    measuring = Measuring(4)
    with torch.no_grad(), measuring.attached(net) as begin:
        for call in range(4):
            begin(call)
            for block in net.transformer_blocks():
                block.ff.net[2].weight.zero_()
                block.ff.net[2].bias.fill_(2.0**call)
                block.ff(torch.zeros(1, 16, 16))
    errors = measuring.errors["ff"]
    np.testing.assert_allclose(errors[0], [0, 0.5, 0.5, 0.5])
    np.testing.assert_allclose(errors[1], [0, 0, 0.75, 0.75])
    np.testing.assert_allclose(errors[2], [0, 0, 0, 0.875])


def flags_of(errors, threshold):
    return "".join(map(str, scheduled(np.array(errors), threshold).astype(int)))


def test_calls_are_skipped_as_far_as_the_error_allows():
    small, large = [0.1] * 8, [0.5] * 8
    assert flags_of([small, large, large], 0.2) == "01010100"  # the last is computed
    assert flags_of([small, small, large], 0.2) == "01101100"
    assert flags_of([small, small, small], 0.2) == "01110110"
    assert flags_of([large, large, small], 0.2) == "01110110"  # only the last of them is asked
    assert flags_of([small, small, small], 0.1) == "01110110"  # at most, not less
    assert flags_of([small, small, small], 0.05) == "00000000"
    assert flags_of([[0.0] * 8] * 3, 0.0) == "00000000"
    assert flags_of([[0.1, 0.1, 0.1, 0.9, 0.1, 0.1]], 0.2) == "010010"


def test_a_higher_threshold_reuses_more():
    net = diffusers_dit()
    found = [calibrate(net, f"smoothcache-{amount}") for amount in ("0", "0.8", "99")]
    shares = [sum(flags.sum() for flags in each.reuse.values()) for each in found]
    assert 0 == shares[0] < shares[1] < shares[2] == 2 * (CALLS - 2)


def test_the_package_missing_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "SmoothCache", None)
    wanted = r"needs the package dit-smoothcache; .*pip install 'asesearch\[rivals\]'"
    with pytest.raises(ConfigError, match=wanted):
        calibrate(diffusers_dit(), "smoothcache-0.1")


@pytest.mark.parametrize(
    "changes",
    [
        {"reuse": {}},
        {"reuse": {"attn1": "01"}},
        {"reuse": {"attn1": "01", "ff": "011"}},
        {"reuse": {"attn1": "0x", "ff": "01"}},
        {"reuse": {"attn1": "01", "norm1": "01"}, "shares": {"attn1": 0.5, "norm1": 0.5}},
        {"reuse": "01"},
        {"shares": {"attn1": 2.0, "ff": 0.5}},
        {"more": 1},
    ],
)
def test_damaged_data_is_refused(changes):
    good = {
        "kind": "smoothcache",
        "reuse": {"attn1": "01", "ff": "00"},
        "shares": {"attn1": 0.5, "ff": 0.5},
    }
    assert read_acceleration(good).to_dict() == good
    with pytest.raises(ConfigError, match="got"):
        read_acceleration(good | changes)


def test_layers_of_another_network_are_refused():
    with pytest.raises(ConfigError, match="calibrated for the layers attn1, attn2, ff; got"):
        make(diffusers_dit(), some_layers(DIFFUSERS["PixArt"]()), FULL)


def test_a_call_can_be_made_again_under_its_number():
    """As clocks do: it reuses each time."""
    net = diffusers_dit()
    check_again_under_its_number(net, some_layers(net))
