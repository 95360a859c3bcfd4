"""Block caching: what is reused is what was computed, and what it costs is what was run."""

from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from asesearch.backbones.caching import Caching, Recorder, reuse_of
from asesearch.calibration import read_acceleration
from asesearch.errors import ConfigError
from tests.backbones.accelerated import (
    CALLS,
    NETWORKS,
    PARTS,
    SCHEDULE,
    calibrate,
    dit,
    make,
    some_flags,
)


@pytest.fixture(scope="module", params=NETWORKS)
def net(request):
    return NETWORKS[request.param]()


@contextmanager
def counted(net, part):
    """How often each block's part was computed."""
    calls = Counter()
    blocks = net.transformer_blocks()
    modules = blocks if part == "block" else [getattr(block, part) for block in blocks]
    inner = [m.fc1 if part == "mlp" else (m.qkv if part == "attn" else m.attn.qkv) for m in modules]
    handles = [
        m.register_forward_hook(lambda *_, i=i: calls.update([i])) for i, m in enumerate(inner)
    ]
    yield calls
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("part", PARTS)
def test_a_threshold_of_zero_reuses_nothing(net, part):
    assert not calibrate(net, f"cache-{part}-0").reuse.any()


@pytest.mark.parametrize("part", PARTS)
def test_only_what_is_not_flagged_or_never_ran_is_computed(net, part):
    flags = some_flags(net)
    fixed = flags.shape[1] - net.depth
    with counted(net, part) as calls:
        result = make(net, Caching(part, flags))
    depths = SCHEDULE.exit_depth_at(result.timesteps)
    expected = Counter()
    seen = set()
    for row, depth in zip(flags, depths, strict=True):
        for i in range(fixed + depth):
            expected[i] += 2 * (not row[i] or i not in seen)  # two batches
            seen.add(i)
    assert calls == expected
    full = 2 * (fixed * CALLS + depths.sum())
    assert calls.total() < full
    # and the mix says the same
    mixes = Caching(part, flags).mix(net, depths.tolist())
    reused = sum(w * (fixed + d) for mix in mixes for w, d, on in mix if on)
    assert calls.total() == pytest.approx(full - 2 * reused)


@pytest.mark.parametrize("part", PARTS)
def test_reused_output_is_that_of_the_call_before(part):
    """One block, all of whose later calls reuse, against the formula written out."""
    net = dit()
    flags = np.zeros((2, 4), dtype=bool)
    flags[1, 0] = True
    block = net.blocks[0]
    x, later = torch.randn(2, 3, 4, 16)
    c = torch.randn(3, 16)
    with torch.no_grad():
        shift, scale, gate, shift2, scale2, gate2 = (
            v[:, None] for v in block.adaLN_modulation(c).chunk(6, dim=1)
        )

        def attn(x):
            return block.attn(block.norm1(x) * (1 + scale) + shift)

        def mlp(x):
            return block.mlp(block.norm2(x) * (1 + scale2) + shift2)

        middle = x + gate * attn(x)
        if part == "attn":
            h = later + gate * attn(x)
            expected = h + gate2 * mlp(h)
        elif part == "mlp":
            expected = later + gate * attn(later) + gate2 * mlp(middle)
        else:
            expected = later + (middle + gate2 * mlp(middle) - x)
        with Caching(part, flags).attached(net) as begin:
            begin(0)
            block(x, c)
            begin(1)
            found = block(later, c)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert (block(later, c) - expected).abs().max() > 1e-3  # the control: nothing is attached


def test_changes_are_relative_to_the_call_before():
    """A network whose output doubles from call to call changes by half of it."""
    net = dit()
    recorder = Recorder("mlp", 3)
    with torch.no_grad(), recorder.attached(net) as begin:
        for call in range(3):
            begin(call)
            for block in net.blocks:
                block.mlp.fc2.bias.data.fill_(2.0**call)
                block.mlp.fc2.weight.data.zero_()
                block.mlp(torch.zeros(1, 4, 16))
    np.testing.assert_allclose(recorder.changes, np.array([[0.0], [0.5], [0.5]]).repeat(4, axis=1))


def test_changes_sum_up_to_the_threshold():
    changes = np.array([[0.0, 0], [0.25, 0], [0.25, 0], [0.25, 1], [0.25, 0]])
    assert reuse_of(changes, 0.5)[:, 0].tolist() == [False, True, False, True, False]
    assert reuse_of(changes, 0.6)[:, 0].tolist() == [False, True, True, False, True]
    assert reuse_of(changes, 0.5)[:, 1].tolist() == [False, True, True, False, True]
    assert not reuse_of(changes, 0.0).any()


def test_a_higher_threshold_reuses_more():
    net = dit()
    shares = [calibrate(net, f"cache-attn-{a}").reuse.mean() for a in ("0.01", "0.1", "1", "99")]
    assert shares == sorted(shares) and shares[0] < shares[-1] == (CALLS - 1) / CALLS


@pytest.mark.parametrize(
    "data",
    [
        {"kind": "cache", "part": "attn", "reuse": []},
        {"kind": "cache", "part": "attn", "reuse": ["01", "1"]},
        {"kind": "cache", "part": "attn", "reuse": ["0x"]},
        {"kind": "cache", "part": "head", "reuse": ["01"]},
        {"kind": "cache", "part": "attn", "reuse": ["01"], "more": 1},
        {"kind": "magic"},
        {},
    ],
)
def test_damaged_data_is_refused(data):
    with pytest.raises(ConfigError, match="got"):
        read_acceleration(data)


def test_another_number_of_blocks_is_refused(net):
    with pytest.raises(ConfigError, match="calibrated for 1 blocks"):
        make(net, Caching("attn", np.zeros((CALLS, 1), dtype=bool)))
