"""Scale and shift of cached output: fitted to what it stands in for."""

import json
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from asesearch.backbones.acceleration import Looking
from asesearch.backbones.adjusting import Fitting
from asesearch.backbones.caching import Caching, adjusted
from asesearch.calibration import read_acceleration
from asesearch.errors import ConfigError
from tests.backbones.accelerated import CALLS, FULL, NETWORKS, PARTS, calibrate, make

ONE = np.array([[False], [True]])


def fit_of(*pairs):
    """The fit of one flag to (kept, true output) of some batches, and the last batch adjusted."""
    fitting = Fitting(Caching("attn", ONE))
    for kept, true in pairs:
        out = fitting._adjusted(0, kept, lambda true=true: true)
    return fitting.adjustment, out


def test_a_scale_and_a_shift_are_found():
    torch.manual_seed(0)
    kept = torch.randn(3, 4, 8)
    true = kept * torch.linspace(0.5, 2, 8) + torch.arange(8.0)
    adjustment, out = fit_of((kept, true))
    torch.testing.assert_close(out, true, rtol=0, atol=5e-3)  # kept as float16
    np.testing.assert_allclose(adjustment[0, 0], np.linspace(-0.5, 1, 8), atol=1e-3)
    np.testing.assert_allclose(adjustment[0, 1], np.arange(8), atol=5e-3)


def test_large_output_that_changes_little_is_changed_little():
    """A scale kept as float16 would be 0.1 % off, here 1."""
    torch.manual_seed(0)
    kept = 1000 + torch.randn(3, 4, 8)
    _, out = fit_of((kept, kept + 0.01))
    torch.testing.assert_close(out, kept + 0.01, rtol=0, atol=1e-3)


def test_a_channel_that_does_not_vary_is_shifted_alone():
    kept = torch.full((1, 4, 2), 5.0)
    adjustment, out = fit_of((kept, torch.full((1, 4, 2), 7.0)))
    assert adjustment[0].tolist() == [[0, 0], [2, 2]] and (out == 7).all()
    far, same = fit_of((kept, torch.full((1, 4, 2), 1e6)))  # more than float16 holds
    assert not far.any() and torch.equal(same, kept)


def test_batches_add_up():
    torch.manual_seed(0)
    kept, true = torch.randn(2, 6, 4, 8)
    whole, _ = fit_of((kept, true))
    parts, _ = fit_of((kept[:2], true[:2]), (kept[2:], true[2:]))
    np.testing.assert_array_equal(parts, whole)
    assert not np.array_equal(fit_of((kept[:2], true[:2]))[0], whole)  # the control


class Probe(Looking):
    """Squared errors of what is reused: plain, adjusted, and with the adjustments of other
    channels."""

    def __init__(self, caching):
        super().__init__(CALLS)
        self.caching = caching
        self.errors = np.zeros((3, caching.reuse.sum()))

    @contextmanager
    def attached(self, net):
        table = torch.from_numpy(self.caching.adjustment.astype(np.float32))

        def measure(number, kept, compute):
            right = adjusted(kept, table[number])
            true = compute()
            for row, value in enumerate((kept, right, adjusted(kept, table[number].roll(3, 1)))):
                self.errors[row, number] += float((value - true).square().sum())
            return right

        with self.caching.leading(net, measure) as begin:
            yield begin


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("part", PARTS)
def test_what_is_adjusted_is_nearer_to_the_truth(network, part):
    net = NETWORKS[network]()
    probe = Probe(calibrate(net, f"cache-{part}-adjusted-0.5", batch_size=3))
    make(net, probe, FULL, batch_size=3)
    plain, right, wrong = probe.errors
    assert len(plain) >= 5 and (right <= plain * 1.001).all()
    assert right.sum() < 0.8 * plain.sum()
    assert wrong.sum() > plain.sum()  # the control


def test_a_threshold_of_zero_has_nothing_to_adjust():
    found = calibrate(NETWORKS["DiT"](), "cache-attn-adjusted-0")
    assert found.adjustment.shape == (0, 2, 1)
    assert read_acceleration(found.to_dict()).adjustment.shape == (0, 2, 1)


def test_what_a_large_network_needs_is_not_too_much():
    """DiT-XL/2 at 50 calls, as far as can be reused."""
    reuse = np.ones((50, 28), dtype=bool)
    reuse[0] = False
    found = Caching("attn", reuse, np.zeros((49 * 28, 2, 1152), dtype=np.float16))
    assert len(json.dumps(found.to_dict())) < 9e6


@pytest.mark.parametrize("damage", ["x", "AAA=", "AAAA", 3, None])
def test_a_damaged_adjustment_is_refused(damage):
    data = Caching("attn", ONE, np.zeros((1, 2, 4), dtype=np.float16)).to_dict()
    with pytest.raises(ConfigError, match="two rows of float16 for each of 1"):
        read_acceleration(data | {"adjustment": damage})
    with pytest.raises(ConfigError, match="two rows for each of 1"):
        Caching("attn", ONE, np.zeros((2, 2, 4), dtype=np.float16))
