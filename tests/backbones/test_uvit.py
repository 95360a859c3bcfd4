"""U-ViT against numbers of the official implementation."""

import pytest
import torch

from asesearch.backbones import UViT
from asesearch.backbones.uvit import PRESETS
from asesearch.errors import ConfigError

TOLERANCE = 1e-4  # float32 on a CPU, one forward


def load(parity, name: str):
    config, state, data = parity(name)
    net = UViT(**config).eval()
    net.load_state_dict(state)
    return net, (data["x_t"], data["t"], data.get("y")), data


@pytest.mark.parametrize("name", ["uvit_uncond", "uvit_class"])
@torch.no_grad()
def test_forward_equals_the_official_one_at_every_exit_depth(parity, name: str) -> None:
    net, args, data = load(parity, name)
    assert net.depth == 3
    assert (net(*args) - data["out"]).abs().max() < TOLERANCE
    for k in range(net.depth + 1):
        assert (net(*args, exit_depth=k) - data[f"exit.{k}"]).abs().max() < TOLERANCE
        assert k == net.depth or (data[f"exit.{k}"] - data["out"]).abs().max() > 100 * TOLERANCE


@torch.no_grad()
def test_each_sample_leaves_at_its_own_depth(parity) -> None:
    net, args, data = load(parity, "uvit_class")
    depths = torch.tensor([0, 3, 1, 2, 1])
    expected = torch.stack([data[f"exit.{int(k)}"][i] for i, k in enumerate(depths)])
    assert (net(*args, exit_depth=depths) - expected).abs().max() < TOLERANCE


@torch.no_grad()
def test_a_dropped_block_merges_its_skip_and_no_more(parity) -> None:
    net, args, _ = load(parity, "uvit_uncond")
    dropped = net(*args, exit_depth=2)
    run = net(*args)
    net.block_at(2).mlp.fc1.weight.data *= 1.1
    assert torch.equal(net(*args, exit_depth=2), dropped)
    assert not torch.allclose(net(*args), run, atol=1e-3)
    net.block_at(2).skip_linear.weight.data *= 1.1
    assert not torch.allclose(net(*args, exit_depth=2), dropped, atol=1e-3)


PUBLISHED = {"S": 44, "M": 131, "L": 287, "H": 501}  # millions, Bao et al. 2023, Table 1


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_size(name: str) -> None:
    with torch.device("meta"):
        net = UViT.from_preset(name)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(
        PUBLISHED[name[6]], abs=0.5
    )
    assert net.patch_size == int(name[8])
    assert net.learn_sigma is False and net.guided_channels == net.in_channels


def test_celeba_s4_is_the_paper_s_network_of_6_decoder_blocks() -> None:
    with torch.device("meta"):
        net = UViT.from_preset("U-ViT-S/4-CelebA64")
    assert (net.depth, len(net.in_blocks), net.input_size, net.num_classes) == (6, 6, 64, 0)
    assert net.time_embedder() is None


def test_labels_and_null_label_follow_the_released_settings() -> None:
    with torch.device("meta"):
        latent = UViT.from_preset("U-ViT-L/2-ImageNet256")
        pixel = UViT.from_preset("U-ViT-M/4-ImageNet64")
    assert (latent.num_classes, latent.has_null_label) == (1000, True)  # 1001 embeddings
    assert (pixel.num_classes, pixel.has_null_label) == (1000, False)  # 1000 embeddings


@pytest.mark.parametrize(
    "changes",
    [{"patch_size": 3}, {"num_heads": 5}, {"depth": 5}, {"depth": 0}],
    ids=["patch", "heads", "odd", "none"],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict) -> None:
    with pytest.raises(ConfigError, match="; got "):
        UViT(
            **{
                "img_size": 8,
                "patch_size": 4,
                "embed_dim": 16,
                "num_heads": 2,
                "depth": 2,
                **changes,
            }
        )
    with pytest.raises(ConfigError, match="unknown U-ViT preset"):
        UViT.from_preset("U-ViT-S/2")


def test_recomputed_activations_give_the_same_gradients() -> None:
    torch.manual_seed(0)
    args = {
        "img_size": 8,
        "patch_size": 4,
        "in_chans": 1,
        "embed_dim": 16,
        "depth": 4,
        "num_heads": 2,
    }
    net = UViT(**args)
    lean = UViT(**args, use_checkpoint=True)
    lean.load_state_dict(net.state_dict())
    x_t = torch.randn(3, 1, 8, 8)
    t = torch.tensor([3, 300, 999])
    depths = torch.tensor([2, 0, 1])
    for each in (net, lean):
        each(x_t, t, exit_depth=depths).square().sum().backward()
    pairs = zip(net.parameters(), lean.parameters(), strict=True)
    assert all(torch.allclose(a.grad, b.grad, atol=1e-6) for a, b in pairs)
