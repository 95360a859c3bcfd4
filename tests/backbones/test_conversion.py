"""Official DiT and diffusers' DiT: the same weights, the same numbers."""

import pytest
import torch
from diffusers import DiTTransformer2DModel

from asesearch.backbones import DiT
from asesearch.backbones.conversion import diffusers_to_dit, dit_to_diffusers
from asesearch.errors import CheckpointError, ConfigError

TOLERANCE = 1e-4  # float32 on a CPU, one forward
SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 3,
    "sample_size": 8,
    "num_embeds_ada_norm": 5,
}


def randomise(net, seed: int = 0):
    gen = torch.Generator().manual_seed(seed)
    for name, p in net.named_parameters():
        if name != "pos_embed":
            p.data = torch.randn(p.shape, generator=gen) * 0.1
    return net.eval()


def share_embedders(model) -> None:
    """As a converted official network has them: random weights give each block its own."""
    for block in model.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())


def batch(labels: int):
    gen = torch.Generator().manual_seed(1)
    x_t = torch.randn(4, 4, 8, 8, generator=gen)
    return x_t, torch.tensor([0, 1, 500, 999]), torch.randint(labels, (4,), generator=gen)


@pytest.fixture
def theirs():
    model = randomise(DiTTransformer2DModel(**SIZES, out_channels=8))
    share_embedders(model)
    return model


@pytest.fixture
def ours():
    sizes = {"input_size": 8, "hidden_size": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
    return randomise(DiT(**sizes))


@torch.no_grad()
def test_a_diffusers_network_computes_the_same_as_our_dit(theirs) -> None:
    state, args = diffusers_to_dit(theirs.state_dict(), theirs.config)
    net = DiT(**args).eval()
    net.load_state_dict(state)
    x_t, t, y = batch(6)  # the null label too
    expected = theirs(x_t, timestep=t, class_labels=y).sample
    assert (net(x_t, t, y) - expected).abs().max() < TOLERANCE
    official = DiT(**{**args, "frequency_shift": 0}).eval()
    official.load_state_dict(state)
    # the two spacings of frequencies differ
    assert (official(x_t, t, y) - expected).abs().max() > 100 * TOLERANCE


@torch.no_grad()
def test_an_official_network_computes_the_same_in_diffusers(ours) -> None:
    state, args = dit_to_diffusers(ours.state_dict(), ours.config)
    model = DiTTransformer2DModel(**args).eval()
    model.load_state_dict(state)
    x_t, t, y = batch(6)
    plain = model(x_t, timestep=t, class_labels=y).sample
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    expected = ours(x_t, t, y)
    assert (model(x_t, timestep=t, class_labels=y).sample - expected).abs().max() < TOLERANCE
    assert (plain - expected).abs().max() > 100 * TOLERANCE


def test_there_and_back_gives_the_same_tensors(ours) -> None:
    state, args = dit_to_diffusers(ours.state_dict(), ours.config)
    back, config = diffusers_to_dit(state, args)
    assert {k: back[k].tolist() for k in back} == {
        k: v.tolist() for k, v in ours.state_dict().items()
    }
    assert DiT(**{**config, "frequency_shift": 0}).config == ours.config


def test_a_network_without_learned_variance_or_with_old_stored_positions_converts(theirs) -> None:
    model = randomise(DiTTransformer2DModel(**SIZES))
    share_embedders(model)
    _, args = diffusers_to_dit(
        {**model.state_dict(), "pos_embed.pos_embed": torch.zeros(1, 16, 32)}, model.config
    )
    assert args["learn_sigma"] is False
    assert diffusers_to_dit(theirs.state_dict(), theirs.config)[1]["learn_sigma"] is True


def test_diverged_embedders_are_refused(theirs) -> None:
    theirs.transformer_blocks[2].norm1.emb.timestep_embedder.linear_2.bias.data[0] += 1e-3
    with pytest.raises(
        CheckpointError,
        match="same embedders; got another t_embedder|linear_2.bias in transformer_blocks.2",
    ):
        diffusers_to_dit(theirs.state_dict(), theirs.config)


def test_missing_and_surplus_entries_are_named(theirs) -> None:
    state = theirs.state_dict()
    del state["transformer_blocks.1.attn1.to_k.bias"]
    with pytest.raises(
        CheckpointError, match=r"1 missing: transformer_blocks\.1\.attn1\.to_k\.bias"
    ):
        diffusers_to_dit(state, theirs.config)
    with pytest.raises(CheckpointError, match="1 unexpected: adaln"):
        diffusers_to_dit({**theirs.state_dict(), "adaln": torch.zeros(1)}, theirs.config)


@pytest.mark.parametrize(
    "changes",
    [
        {"activation_fn": "geglu"},
        {"norm_type": "ada_norm_single"},
        {"attention_bias": False},
        {"num_layers": None},
        {"sample_size": 0},
        {"patch_size": "2"},
        {"out_channels": 12},
    ],
    ids=str,
)
def test_another_architecture_is_refused(theirs, changes: dict) -> None:
    with pytest.raises(CheckpointError, match="must .*; got .*; "):
        diffusers_to_dit(theirs.state_dict(), {**theirs.config, **changes})


def test_what_diffusers_can_not_have_is_refused(ours) -> None:
    for changes in ({"mlp_ratio": 2.0}, {"class_dropout_prob": 0.0}):
        with pytest.raises(ConfigError, match="; got mlp_ratio"):
            dit_to_diffusers(ours.state_dict(), {**ours.config, **changes})
    with pytest.raises(CheckpointError, match="fixed sine-cosine positions"):
        dit_to_diffusers({**ours.state_dict(), "pos_embed": ours.pos_embed + 0.01}, ours.config)
