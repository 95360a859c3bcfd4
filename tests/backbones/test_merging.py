"""Token merging: which tokens are merged, and that they are taken apart again."""

import pytest
import torch

from asesearch.backbones import UViT
from asesearch.backbones.merging import Grid, Merging
from asesearch.calibration import read_acceleration
from asesearch.errors import ConfigError
from asesearch.sampler import Sampler
from tests.backbones.accelerated import dit, make


def test_the_first_of_each_two_by_two_takes_others_in():
    grid = Grid(3, 2, 0.5)
    assert grid.into.tolist() == [2, 4, 8, 10]  # two tokens before a grid of 3 x 3
    assert sorted([*grid.into.tolist(), *grid.sources.tolist()]) == list(range(2, 11))
    assert grid.num_merged == 4 and Grid(1, 0, 0.5).num_merged == 0
    assert [Grid(10, 0, r / 100).num_merged for r in range(51)] == list(range(51))


def test_twins_are_merged_and_taken_apart():
    """Of 4 x 4 patches two have a twin (of another length) that takes them in."""
    torch.manual_seed(0)
    grid = Grid(4, 1, 0.125)
    x = torch.randn(2, 17, 32)
    pairs = {6: 1, 12: 11}  # source: where it goes
    for source, into in pairs.items():
        x[:, source] = 2 * x[:, into]
    merge, take_apart = grid.match(x)
    merged = merge(x)
    assert merged.shape == (2, 15, 32)
    expected = x.clone()
    for source, into in pairs.items():
        expected[:, [source, into]] = 1.5 * x[:, [into]]  # the mean of the two
    torch.testing.assert_close(take_apart(merged), expected)
    # a control: less alike than these are no others
    assert (take_apart(merged) - x)[:, [0, 2, 3, 4, 5, 7]].abs().max() == 0


def test_several_go_into_one():
    x = torch.zeros(1, 4, 2)
    x[0] = torch.tensor([[1.0, 0], [3, 0], [5, 0.1], [0, 1]])
    merge, take_apart = Grid(2, 0, 0.5).match(x)
    torch.testing.assert_close(merge(x)[0], torch.tensor([[0, 1], [3, 0.1 / 3]]))
    torch.testing.assert_close(take_apart(merge(x))[0, :, 0], torch.tensor([3.0, 3, 3, 0]))


def test_label_and_time_are_left_alone():
    """U-ViT's first two tokens come first, unmerged, even where all are the same."""
    net = UViT(img_size=8, patch_size=2, embed_dim=16, depth=2, num_heads=2, num_classes=4)
    seen = []
    attn = net.mid_block.attn
    handle = attn.qkv.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = torch.ones(2, 18, 16)
    x[:, :2] = torch.arange(64.0).view(2, 2, 16)
    with torch.no_grad(), Merging(0.5).attached(net):
        out = attn(x)
    handle.remove()
    assert seen[0].shape == (2, 10, 16) and torch.equal(seen[0][:, :2], x[:, :2])
    assert out.shape == x.shape


def test_more_merged_is_another_image():
    net = dit()
    plain = make(net).images
    far = [(make(net, Merging(r)).images - plain).abs().mean() for r in (0.1, 0.25, 0.5)]
    assert far == sorted(far) and far[0] > 0


@pytest.mark.parametrize("ratio", [0.6, -0.1, 1.0])
def test_more_than_half_is_refused(ratio):
    with pytest.raises(ConfigError, match=r"0 to 0.5 of the patches; got"):
        Merging(ratio)
    with pytest.raises(ConfigError, match="got"):
        read_acceleration({"kind": "merge", "ratio": ratio})
    with pytest.raises(ConfigError, match="got"):
        Sampler("ddim", 50, f"merge-{ratio:g}")


@pytest.mark.parametrize("data", [{"kind": "merge"}, {"kind": "merge", "ratio": "0.1"}])
def test_damaged_data_is_refused(data):
    with pytest.raises(ConfigError, match="has the keys kind and ratio"):
        read_acceleration(data)
