"""DiT against numbers of the official implementation."""

import numpy as np
import pytest
import torch

from asesearch.backbones import DiT
from asesearch.backbones.dit import sincos_pos_embed
from asesearch.errors import ConfigError
from asesearch.schedule import ExitSchedule

TOLERANCE = 1e-4  # float32 on a CPU, one forward


def load(parity, name: str):
    config, state, data = parity(name)
    net = DiT(**config).eval()
    net.load_state_dict(state)
    return net, data


@torch.no_grad()
def test_forward_equals_the_official_one(parity) -> None:
    net, data = load(parity, "dit")
    error = (net(data["x_t"], data["t"], data["y"]) - data["out"]).abs().max()
    assert error < TOLERANCE


@torch.no_grad()
def test_guidance_acts_on_the_first_guided_channels(parity) -> None:
    net, data = load(parity, "dit")
    x_t, t, y = (data[f"cfg.{k}"] for k in ("x_t", "t", "y"))
    half = len(x_t) // 2
    # the official code runs both halves on the first half's images
    x_t = torch.cat([x_t[:half], x_t[:half]])
    cond, uncond = net(x_t, t, y).chunk(2)
    c = net.guided_channels
    guided = torch.cat([uncond[:, :c] + 1.5 * (cond[:, :c] - uncond[:, :c]), cond[:, c:]], dim=1)
    assert (guided - data["cfg.out"][:half]).abs().max() < TOLERANCE


@torch.no_grad()
def test_early_exit_equals_the_released_early_exit_code(parity) -> None:
    net, data = load(parity, "ase_dit_d3")
    depths = torch.from_numpy(ExitSchedule.published("D3-DiT").exit_depth_at(data["t"].numpy()))
    assert len(depths.unique()) == 5
    args = (data["x_t"], data["t"], data["y"])
    assert (net(*args, exit_depth=depths) - data["out"]).abs().max() < TOLERANCE
    assert (net(*args) - data["out"]).abs().max() > 100 * TOLERANCE  # the exits matter


@pytest.mark.parametrize(
    ("name", "millions"), [("DiT-XL/2", 675), ("DiT-L/2", 458), ("DiT-B/2", 130.5), ("DiT-S/2", 33)]
)
def test_presets_have_the_published_size(name: str, millions: float) -> None:
    with torch.device("meta"):
        net = DiT.from_preset(name)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.6)


def test_dit_xl_2_has_the_official_code_s_parameter_count() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in DiT.from_preset("DiT-XL/2").parameters()) == 675_129_632


def test_an_unknown_preset_is_refused_and_changes_apply() -> None:
    for name in ("DiT-XXL/2", "DiT-XL/3", "DiT-XL", ""):
        with pytest.raises(ConfigError, match="unknown DiT preset"):
            DiT.from_preset(name)
    with torch.device("meta"):
        assert DiT.from_preset("DiT-S/8", input_size=64).input_size == 64


@pytest.mark.parametrize(
    "changes", [{"patch_size": 3}, {"num_heads": 5}, {"hidden_size": 18, "num_heads": 2}]
)
def test_sizes_that_do_not_fit_are_refused(changes: dict) -> None:
    with pytest.raises(ConfigError, match="; got "):
        DiT(**{"input_size": 8, "hidden_size": 32, "num_heads": 4, "depth": 1, **changes})


def test_positions_repeat_along_rows_and_columns() -> None:
    table = sincos_pos_embed(16, 4).view(4, 4, 16)
    first = table[..., :8]
    second = table[..., 8:]
    assert torch.equal(first, first[:1].expand(4, 4, 8)) and torch.equal(
        second, second[:, :1].expand(4, 4, 8)
    )
    assert np.allclose(table[0, 0], [0, 0, 0, 0, 1, 1, 1, 1] * 2)


def test_a_new_network_predicts_zero_and_does_not_train_its_positions() -> None:
    net = DiT(
        input_size=8,
        patch_size=4,
        in_channels=1,
        hidden_size=16,
        depth=2,
        num_heads=2,
        num_classes=2,
    )
    args = (torch.randn(2, 1, 8, 8), torch.tensor([1, 900]), torch.tensor([0, 1]))
    assert not net(*args).any()
    assert not net.pos_embed.requires_grad
