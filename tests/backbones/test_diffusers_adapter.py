import copy
import json
from pathlib import Path

import pytest
import torch
from diffusers import (
    DiTTransformer2DModel,
    HunyuanDiT2DModel,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
)
from safetensors.torch import load_file, save_file

from asesearch.backbones.block_exits import SPECS
from asesearch.backbones.checkpoints import load_backbone
from asesearch.backbones.conditioning import repeat
from asesearch.backbones.diffusers_adapter import DiffusersBackbone, load_diffusers
from asesearch.backbones.exit_weights import ExitWeights
from asesearch.backbones.saving import save_backbone
from asesearch.config import BackboneConfig
from asesearch.errors import CheckpointError, ConfigError, ScheduleError
from asesearch.sampling import guided

DEPTH = 4
N = 5
TOKENS = 3
EXITS = [4, 1, 3, 1, 2]
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": DEPTH, "sample_size": 8}


def dit():
    return DiTTransformer2DModel(**HEADS, in_channels=4, out_channels=8, num_embeds_ada_norm=10)


def pixart(**changes):
    args = {
        **HEADS,
        "in_channels": 4,
        "out_channels": 8,
        "cross_attention_dim": 16,
        "caption_channels": 12,
        **changes,
    }
    return PixArtTransformer2DModel(**args)


def sd3():
    sizes = {
        "joint_attention_dim": 12,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 6,
        "pos_embed_max_size": 8,
    }
    return SD3Transformer2DModel(
        **HEADS,
        **sizes,
        in_channels=4,
        out_channels=4,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )


def sana():
    heads = {
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": 12,
    }
    return SanaTransformer2DModel(**HEADS, **heads, in_channels=4, out_channels=4)


def randomised(model, seed=0):
    """Every parameter random, so that no gate is zero and no block can hide."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.2
    return model.eval()


def prompt(**more):
    mask = torch.ones(N, TOKENS)
    mask[1:3, -1] = 0
    draws = {name: torch.randn(*shape) for name, shape in more.items()}
    return {"encoder_hidden_states": torch.randn(N, TOKENS, 12), **draws}, mask


def case(name):
    """A network, and arguments x_t, t, y of a batch of N."""
    torch.manual_seed(0)
    x_t = torch.randn(N, 4, 8, 8)
    t = torch.tensor([0, 100, 500, 700, 999])
    if name == "dit":
        return randomised(dit()), x_t, t, torch.tensor([0, 3, 10, 9, 1])
    if name == "sd3":
        return randomised(sd3()), x_t, t + 0.5, prompt(pooled_projections=(N, 6))[0]
    y, mask = prompt()
    if name == "pixart with sizes":
        model = pixart(
            use_additional_conditions=True, num_attention_heads=3, cross_attention_dim=24
        )  # width 24: sizes take a third each
        sizes = {"resolution": torch.rand(N, 2) * 64, "aspect_ratio": torch.rand(N, 1)}
        return randomised(model), x_t, t, {**y, **sizes, "encoder_attention_mask": mask}
    return (
        randomised(pixart() if name == "pixart" else sana()),
        x_t,
        t,
        {**y, "encoder_attention_mask": mask},
    )


NAMES = ["dit", "pixart", "pixart with sizes", "sd3", "sana"]
every_network = pytest.mark.parametrize("name", NAMES)


def rows(y, index):
    return {k: v[index] for k, v in y.items()} if isinstance(y, dict) else y[index]


def official(model, x_t, t, y):
    """A call as diffusers' documentation has it."""
    if not isinstance(y, dict):
        return model(x_t, timestep=t, class_labels=y).sample
    added = {k: y[k] for k in ("resolution", "aspect_ratio") if k in y}
    rest = {k: v for k, v in y.items() if k not in added}
    return model(x_t, timestep=t, **({"added_cond_kwargs": added} if added else {}), **rest).sample


def record_rows(net):
    """For each block the batch sizes it is called with, and those its first norm is called with."""
    blocks = [[] for _ in range(net.depth)]
    norms = [[] for _ in range(net.depth)]

    def recorder(seen):
        def hook(module, args, kwargs):
            seen.append(len(args[0] if args else kwargs["hidden_states"]))

        return hook

    for i in range(net.depth):
        net.block_at(i).register_forward_pre_hook(recorder(blocks[i]), with_kwargs=True)
        net.block_at(i).norm1.register_forward_pre_hook(recorder(norms[i]), with_kwargs=True)
    return blocks, norms


@every_network
def test_full_depth_is_the_official_output(name):
    model, x_t, t, y = case(name)
    expected = official(model, x_t, t, y)
    net = DiffusersBackbone(model)
    for exit_depth in (None, DEPTH, torch.full((N,), DEPTH)):
        assert torch.equal(net(x_t, t, y, exit_depth=exit_depth), expected)


@every_network
def test_an_exit_is_the_network_with_its_last_blocks_cut_off(name):
    model, x_t, t, y = case(name)
    net = DiffusersBackbone(copy.deepcopy(model))
    blocks, norms = record_rows(net)
    for k in range(1, DEPTH):
        cut = copy.deepcopy(model)
        other = copy.deepcopy(model)
        cut.transformer_blocks = model.transformer_blocks[:k]
        other.transformer_blocks = model.transformer_blocks[: k + 1]
        out = net(x_t, t, y, exit_depth=k)
        assert torch.equal(out, official(cut, x_t, t, y))
        # the comparison sees one block more
        assert not torch.allclose(out, official(other, x_t, t, y), atol=1e-3)
    assert blocks == norms == [[N, N, N], [N, N], [N], []]


@every_network
def test_each_sample_leaves_at_its_own_exit(name):
    model, x_t, t, y = case(name)
    net = DiffusersBackbone(model)
    alone = [net(x_t[[i]], t[[i]], rows(y, [i]), exit_depth=k) for i, k in enumerate(EXITS)]
    blocks, norms = record_rows(net)
    out = net(x_t, t, y, exit_depth=torch.tensor(EXITS))
    torch.testing.assert_close(out, torch.cat(alone), atol=1e-5, rtol=1e-5)
    assert blocks == norms == [[5], [3], [2], [1]]
    wrong = net(x_t, t, y, exit_depth=torch.tensor(EXITS[::-1]))
    assert not torch.allclose(wrong, out, atol=1e-3)


def test_samples_that_all_leave_early_call_no_late_block():
    model, x_t, t, y = case("sd3")
    net = DiffusersBackbone(model)
    alone = [
        net(x_t[[i]], t[[i]], rows(y, [i]), exit_depth=k) for i, k in enumerate([1, 2, 2, 1, 1])
    ]
    blocks, _ = record_rows(net)
    out = net(x_t, t, y, exit_depth=torch.tensor([1, 2, 2, 1, 1]))
    torch.testing.assert_close(out, torch.cat(alone), atol=1e-5, rtol=1e-5)
    assert blocks == [[5], [2], [], []]


@every_network
def test_gradients_are_those_of_the_samples_alone(name):
    model, x_t, t, y = case(name)
    net = DiffusersBackbone(model)
    exits = [2, 1, 3, 1, 2]
    net(x_t, t, y, exit_depth=torch.tensor(exits)).square().mean(dim=(1, 2, 3)).sum().backward()
    got = {n: p.grad for n, p in net.named_parameters()}
    net.zero_grad()
    for i, k in enumerate(exits):
        net(x_t[[i]], t[[i]], rows(y, [i]), exit_depth=k).square().mean(
            dim=(1, 2, 3)
        ).sum().backward()
    for n, p in net.named_parameters():
        assert (got[n] is None) == (p.grad is None), n
        if p.grad is not None:
            torch.testing.assert_close(got[n], p.grad, atol=1e-4, rtol=1e-4)
    assert all(p.grad is None for p in net.block_at(DEPTH - 1).parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in net.block_at(2).parameters())


@every_network
def test_detaching_gives_the_network_back(name):
    model, x_t, t, y = case(name)
    names = list(model.state_dict())
    classes = [type(b) for b in model.transformer_blocks]
    expected = official(model, x_t, t, y)
    net = DiffusersBackbone(model)
    assert list(model.state_dict()) == names
    assert [n.removeprefix("transformer.") for n in net.state_dict()] == names
    assert all(isinstance(b, c) for b, c in zip(model.transformer_blocks, classes, strict=True))
    net(x_t, t, y, exit_depth=1)
    assert torch.equal(official(model, x_t, t, y), expected)  # between calls nothing is skipped
    assert net.detach() is model
    assert [type(b) for b in model.transformer_blocks] == classes
    assert list(model.state_dict()) == names
    assert torch.equal(official(model, x_t, t, y), expected)
    DiffusersBackbone(model)  # may be attached again


def test_one_attachment_at_a_time():
    model = dit()
    net = DiffusersBackbone(model)
    with pytest.raises(ConfigError, match="one early exit at a time.*detach"):
        DiffusersBackbone(model)
    assert net.detach() is model


def test_a_copy_runs_its_own_blocks():
    model, x_t, t, y = case("dit")
    net = DiffusersBackbone(model)
    before = net(x_t, t, y, exit_depth=2)
    other = copy.deepcopy(net)
    randomised(other.transformer, seed=1)
    assert torch.equal(net(x_t, t, y, exit_depth=2), before)
    assert not torch.allclose(other(x_t, t, y, exit_depth=2), before, atol=1e-3)
    other.detach()
    assert torch.equal(net(x_t, t, y, exit_depth=2), before)


def test_a_failed_call_leaves_no_plan_behind():
    model, x_t, t, y = case("dit")
    net = DiffusersBackbone(model)
    with pytest.raises(RuntimeError):
        net(x_t[:, :2], t, y, exit_depth=1)
    assert torch.equal(official(model, x_t, t, y), net(x_t, t, y))


@every_network
def test_attributes(name):
    model, *_ = case(name)
    net = DiffusersBackbone(model)
    is_dit = name == "dit"
    is_epsilon = name in ("dit", "pixart", "pixart with sizes")
    assert (
        net.depth,
        net.min_exit_depth,
        net.in_channels,
        net.guided_channels,
        net.input_size,
    ) == (DEPTH, 1, 4, 4, 8)
    assert (net.num_classes, net.has_null_label, net.learn_sigma) == (
        10 * is_dit,
        is_dit,
        is_epsilon,
    )
    assert net.prediction_type == ("epsilon" if is_epsilon else "flow")
    assert net.block_at(0) is model.transformer_blocks[0]
    embedders = [n for n, _ in model.named_parameters() if ".timestep_embedder." in f".{n}"]
    assert (
        len(list(net.time_embedder().parameters()))
        == len(embedders)
        == 4 * (DEPTH if is_dit else 1)
    )


@every_network
def test_the_config_makes_the_same_network(name):
    model, x_t, t, y = case(name)
    net = DiffusersBackbone(model)
    other = DiffusersBackbone(**json.loads(json.dumps(net.config))).eval()
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x_t, t, y, exit_depth=2), net(x_t, t, y, exit_depth=2))
    assert json.dumps(other.config) == json.dumps(net.config)


def test_training_mode_drops_no_labels_by_itself():
    model, x_t, t, y = case("dit")
    net = DiffusersBackbone(model)
    expected = net(x_t, t, y)
    assert all(torch.equal(net.train()(x_t, t, y), expected) for _ in range(20))
    net.detach()  # diffusers' own dropout is back: one label in ten, in each block
    assert not all(torch.equal(official(model, x_t, t, y), expected) for _ in range(20))


def test_null_labels():
    net = DiffusersBackbone(dit())
    assert net.null_labels(torch.tensor([1, 2])).tolist() == [10, 10]
    model, x_t, t, y = case("pixart")
    with pytest.raises(ConfigError, match="null condition.*empty prompt"):
        DiffusersBackbone(copy.deepcopy(model)).null_labels(y)
    null = {
        "encoder_hidden_states": torch.randn(1, TOKENS, 12),
        "encoder_attention_mask": torch.tensor([[1.0, 0.0, 0.0]]),
    }
    net = DiffusersBackbone(model, null)
    assert net.has_null_label and not any("null" in key for key in net.state_dict())
    got = net.null_labels(y)
    assert got.keys() == y.keys() and all(
        torch.equal(got[k], null[k].repeat(N, *[1] * (y[k].ndim - 1))) for k in null
    )
    assert net(x_t, t, got).shape == (N, 8, 8, 8)
    moved = copy.deepcopy(net).to("meta")
    assert (
        moved.null_labels({k: v.to("meta") for k, v in y.items()})[
            "encoder_hidden_states"
        ].device.type
        == "meta"
    )
    # as the training loop's batches
    assert moved.null_labels(y)["encoder_hidden_states"].device.type == "cpu"


def test_prompts_are_checked_before_the_forward():
    model, _, _, y = case("pixart")
    net = DiffusersBackbone(model)
    net.check_conditioning(y, N)
    with pytest.raises(ConfigError, match="embeddings 12 wide; got 11"):
        net.check_conditioning({**y, "encoder_hidden_states": torch.zeros(N, TOKENS, 11)}, N)
    with pytest.raises(ConfigError, match=r"must have shape \(N, L, 12\).*; got \(5, 12\)"):
        net.check_conditioning({**y, "encoder_hidden_states": torch.zeros(N, 12)}, N)
    net.check_conditioning({**y, "encoder_attention_mask": torch.zeros(N, 1, TOKENS)}, N)
    for shape in ((N, TOKENS + 1), (N, 1, TOKENS + 1), (N, 2, TOKENS)):
        with pytest.raises(ConfigError, match="encoder_attention_mask must be .5, 3., one entry"):
            net.check_conditioning({**y, "encoder_attention_mask": torch.ones(shape)}, N)
    with pytest.raises(ConfigError, match="embeddings 12 wide; got 11"):
        DiffusersBackbone(pixart(), {"encoder_hidden_states": torch.zeros(1, TOKENS, 11)})
    for wrong in (None, torch.zeros(N, dtype=torch.int64), rows(y, slice(2))):
        with pytest.raises(ConfigError, match="must be a dict with encoder_hidden_states, N = 5"):
            net.check_conditioning(wrong, N)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_prompts_of_another_type_are_taken(dtype):
    model, x_t, t, y = case("pixart")
    y = {k: v.half() if v.is_floating_point() else v for k, v in y.items()}
    null = {"encoder_hidden_states": torch.randn(1, TOKENS, 12).half()}
    net = DiffusersBackbone(model, {k: v.to(dtype) for k, v in null.items()})
    theirs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in y.items()}
    ours = {k: v.float() if v.is_floating_point() else v for k, v in y.items()}
    with torch.no_grad():
        assert torch.equal(guided(net, x_t, t, theirs, 2.0), guided(net, x_t, t, ours, 2.0))


@pytest.mark.parametrize("tokens", [2, TOKENS, 5])
@pytest.mark.parametrize("null_masked", [True, False])
def test_an_additive_bias_is_as_good_as_the_mask(tokens, null_masked):
    model, x_t, t, y = case("pixart")
    mask = y["encoder_attention_mask"]
    biased = y | {"encoder_attention_mask": ((1 - mask.float()) * -10000.0).unsqueeze(1)}
    null = {"encoder_hidden_states": torch.randn(1, tokens, 12)}
    if null_masked:
        null["encoder_attention_mask"] = torch.tensor([[1, 0, 0, 0, 0][:tokens]])
    net = DiffusersBackbone(model, null)
    net.check_conditioning(biased, N)
    with torch.no_grad():
        assert torch.equal(guided(net, x_t, t, biased, 2.0), guided(net, x_t, t, y, 2.0))


@pytest.mark.parametrize("name", ["pixart", "sana"])
@pytest.mark.parametrize("masked", ["prompt", "null", "both", "neither"])
@pytest.mark.parametrize("tokens", [2, TOKENS, 5])
def test_guidance_with_masks_and_lengths_of_either_half(name, masked, tokens):
    """As two calls of the network, one a half: what one half lacks stands for all of its tokens."""
    model, x_t, t, y = case(name)
    null = {"encoder_hidden_states": torch.randn(1, tokens, 12)}
    if masked in ("null", "both"):
        null["encoder_attention_mask"] = torch.tensor([[1, 0, 0, 0, 0][:tokens]])
    if masked not in ("prompt", "both"):
        del y["encoder_attention_mask"]
    net = DiffusersBackbone(model, null)
    with torch.no_grad():
        halves = [net(x_t, t, half)[:, :4] for half in (y, repeat(null, N))]
        found = guided(net, x_t, t, y, 3.0)[:, :4]
    expected = halves[1] + 3 * (halves[0] - halves[1])
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_a_file_of_ours_carries_the_null_condition(tmp_path):
    null = {
        "encoder_hidden_states": torch.randn(1, TOKENS, 12),
        "encoder_attention_mask": torch.tensor([[1, 0, 0]]),
    }
    other = {"encoder_hidden_states": torch.randn(1, TOKENS, 12)}
    save_backbone(DiffusersBackbone(pixart(), null), tmp_path / "net.safetensors")
    config = BackboneConfig(kind="diffusers", checkpoint=str(tmp_path / "net.safetensors"))
    again = load_backbone(config).null_condition
    assert again.keys() == null.keys() and all(torch.equal(again[k], null[k]) for k in null)
    assert torch.equal(
        load_backbone(config, null_condition=other).null_condition["encoder_hidden_states"],
        *other.values(),
    )
    save_backbone(DiffusersBackbone(pixart()), tmp_path / "bare.safetensors")
    bare = load_backbone(
        BackboneConfig(kind="diffusers", checkpoint=str(tmp_path / "bare.safetensors"))
    )
    assert bare.null_condition is None and not bare.has_null_label


@pytest.mark.parametrize(
    "null",
    [{"encoder_hidden_states": torch.zeros(2, TOKENS, 12)}, {"prompt": torch.zeros(1, TOKENS, 12)}],
    ids=["N", "name"],
)
def test_a_null_condition_that_does_not_fit_is_refused(null):
    model = pixart()
    with pytest.raises(
        ConfigError, match="leading dimension 1 under the names encoder_hidden_states"
    ):
        DiffusersBackbone(model, null)
    DiffusersBackbone(model)  # nothing was attached


def test_conditioning_that_does_not_fit_is_refused():
    model, x_t, t, y = case("dit")
    net = DiffusersBackbone(model)
    for wrong in (None, y[:-1], {"class_labels": y}):
        with pytest.raises(ConfigError, match="labels|shape"):
            net(x_t, t, wrong)
    model, x_t, t, y = case("pixart with sizes")
    net = DiffusersBackbone(model)
    lacking = {k: v for k, v in y.items() if k != "resolution"}
    for wrong in (
        None,
        torch.zeros(N),
        lacking,
        {**y, "prompt": y["resolution"]},
        rows(y, slice(2)),
    ):
        with pytest.raises(ConfigError, match="encoder_hidden_states, resolution, aspect_ratio"):
            net(x_t, t, wrong)


@pytest.mark.parametrize(
    "exit_depth", [0, DEPTH + 1, torch.tensor([1, 2]), torch.tensor([0, 1, 1, 1, 1])]
)
def test_exit_depths_out_of_range_are_refused(exit_depth):
    model, x_t, t, y = case("dit")
    with pytest.raises(ScheduleError, match="exit_depth must"):
        DiffusersBackbone(model)(x_t, t, y, exit_depth=exit_depth)


def test_gradient_checkpointing_works_at_full_depth_only():
    model, x_t, t, y = case("pixart")
    net = DiffusersBackbone(model)
    expected = net(x_t, t, y)
    model.enable_gradient_checkpointing()
    assert torch.equal(net(x_t, t, y), expected)
    with pytest.raises(ConfigError, match="disable_gradient_checkpointing"):
        net(x_t, t, y, exit_depth=2)
    with torch.no_grad():
        net(x_t, t, y, exit_depth=2)


def test_output_channels_of_no_meaning_are_refused():
    with pytest.raises(
        ConfigError, match="out_channels must be in_channels = 4, or twice as many; got 6"
    ):
        DiffusersBackbone(pixart(out_channels=6))


def test_a_network_with_skip_connections_is_refused():
    sizes = {
        "cross_attention_dim": 16,
        "cross_attention_dim_t5": 16,
        "pooled_projection_dim": 16,
        "text_len": 2,
        "text_len_t5": 2,
    }
    model = HunyuanDiT2DModel(**{**HEADS, "hidden_size": 16}, **sizes, in_channels=4, patch_size=2)
    with pytest.raises(
        ConfigError, match="side output; got HunyuanDiT2DModel; supported are DiTTransformer2DModel"
    ):
        DiffusersBackbone(model)


@pytest.mark.parametrize(
    "config",
    [{"_class_name": "UNet2DModel"}, {}, {"_class_name": "DiTTransformer2DModel", "depth": 3}],
)
def test_a_config_that_makes_no_network_is_refused(config):
    with pytest.raises(
        ConfigError, match="_class_name must be|must accept its constructor arguments"
    ):
        DiffusersBackbone(config)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_blocks_serve_every_depth():
    model, x_t, t, y = case("pixart")
    net = DiffusersBackbone(copy.deepcopy(model))
    expected = [net(x_t, t, y, exit_depth=k) for k in (1, 2, 4, torch.tensor(EXITS))]
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("eager")
    other = DiffusersBackbone(model)
    for i in range(DEPTH):
        other.block_at(i).compile(backend=counter)
    outs = [other(x_t, t, y, exit_depth=k) for k in (1, 2, 4)]
    graphs = counter.frame_count
    # no graph for a new depth
    assert [other(x_t, t, y, exit_depth=k) for k in (3, 1)] and counter.frame_count == graphs
    outs.append(other(x_t, t, y, exit_depth=torch.tensor(EXITS)))
    for got, want in zip(outs, expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    whole = pixart()
    whole.compile(backend=counter)
    for compiled in (whole, torch.compile(pixart(), backend=counter)):
        with pytest.raises(
            ConfigError, match="before a network is compiled as a whole; got a compiled PixArt"
        ):
            DiffusersBackbone(compiled)


# -- loading ---------------------------------------------------------------------------------------


@every_network
def test_a_saved_folder_loads(name, tmp_path):
    model, x_t, t, y = case(name)
    model.save_pretrained(tmp_path)
    net = load_diffusers(tmp_path)
    assert not net.training and torch.equal(net(x_t, t, y), official(model, x_t, t, y))


def test_sharded_weights_in_a_pipeline_folder_load(tmp_path):
    model, x_t, t, y = case("dit")
    model.half().save_pretrained(tmp_path / "transformer", max_shard_size="20KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    net = load_diffusers(tmp_path)
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    expected = dit().eval()
    expected.load_state_dict(model.state_dict())
    assert torch.equal(net(x_t, t, y), official(expected, x_t, t, y))
    next((tmp_path / "transformer").glob("*00002-of*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="must hold diffusion_pytorch_model-00002"):
        load_diffusers(tmp_path)


@pytest.mark.parametrize("kind", ["dit", "diffusers"])
def test_a_config_of_quantised_weights_is_refused_as_such(kind, tmp_path):
    """diffusers looks for a GPU or a library first, and says that it has none."""
    dit().save_pretrained(tmp_path)
    edit_config(
        tmp_path, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}
    )
    with pytest.raises(CheckpointError, match=r"got a quantization_config \(bitsandbytes\); give"):
        load_backbone(BackboneConfig(kind=kind, checkpoint=str(tmp_path)))


@pytest.mark.parametrize("name", ["dit", "pixart"])
def test_quantised_weights_and_impossible_norms_are_refused(name, tmp_path):
    """Integers would be read as the numbers that they are."""
    case(name)[0].save_pretrained(tmp_path)
    edit_config(tmp_path, norm_eps="x")
    with pytest.raises(CheckpointError, match="norm_eps must be a number between 0 and 1; got 'x'"):
        load_diffusers(tmp_path)
    edit_config(tmp_path, norm_eps=1e-6)
    (path,) = tmp_path.glob("*.safetensors")
    (tmp_path / f"._{path.name}").write_bytes(bytes(4096))  # as a Mac leaves on other disks
    load_diffusers(tmp_path)
    state = load_file(path)
    changed = next(iter(state))
    save_file({**state, changed: state[changed].to(torch.int8)}, path)
    with pytest.raises(CheckpointError, match=f"got {changed} of I8, as quantised networks have"):
        load_diffusers(tmp_path)


@pytest.mark.parametrize("name", ["dit", "pixart"])
def test_folders_that_name_the_legacy_class_load(name, tmp_path):
    model, x_t, t, y = case(name)
    model.save_pretrained(tmp_path)
    edit_config(
        tmp_path,
        _class_name="Transformer2DModel",
        double_self_attention=False,
        num_vector_embeds=None,
    )
    assert torch.equal(load_diffusers(tmp_path)(x_t, t, y), official(model, x_t, t, y))


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def drop_a_tensor(folder):
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    del state["proj_out_2.weight"]
    save_file(state, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def write_index(folder, name):
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"proj_out_2.bias": name}})
    )


def pickle_instead(folder, change=dict):
    """A .bin file as older releases of diffusers saved them."""
    path = folder / "diffusion_pytorch_model.safetensors"
    torch.save(change(load_file(path)), path.with_suffix(".bin"))
    path.unlink()


class Harm:
    """Unpickled, it would write a file."""

    def __reduce__(self):
        return (Path.touch, (Path("harm"),))


BROKEN = {
    "no config": (lambda f: (f / "config.json").unlink(), "must hold config.json"),
    "config no JSON": (
        lambda f: (f / "config.json").write_text("{"),
        "config.json is not readable JSON",
    ),
    "unknown class": (
        lambda f: edit_config(f, _class_name="UNet2DConditionModel"),
        "got 'UNet2DConditionModel'; supported are",
    ),
    "legacy class, other norm": (
        lambda f: edit_config(f, _class_name="Transformer2DModel", norm_type="layer_norm"),
        "supported",
    ),
    "other width": (
        lambda f: edit_config(f, attention_head_dim=16),
        "must hold a readable DiT|must fit its config",
    ),
    "config refused by its class": (
        lambda f: edit_config(f, norm_type="ada_norm"),
        "must hold a readable DiT",
    ),
    "no weights": (
        lambda f: (f / "diffusion_pytorch_model.safetensors").unlink(),
        "got no such files",
    ),
    "pickled under another name": (
        lambda f: (f / "diffusion_pytorch_model.safetensors").rename(f / "net.pt"),
        r"got \['net.pt'\]; call a PyTorch file diffusion_pytorch_model.bin",
    ),
    "pickled, a tensor lacks": (
        lambda f: pickle_instead(f, lambda s: dict(list(s.items())[1:])),
        "must fit its config",
    ),
    "pickled, config refused by its class": (
        lambda f: (pickle_instead(f), edit_config(f, norm_type="ada_norm")),
        "must describe a DiTTransformer2DModel",
    ),
    "pickled code": (
        lambda f: pickle_instead(f, lambda s: {**s, "x": Harm()}),
        "diffusion_pytorch_model.bin",
    ),
    "truncated": (
        lambda f: (f / "diffusion_pytorch_model.safetensors").write_bytes(b"x" * 100),
        "must hold a readable DiT",
    ),
    "a tensor lacks": (drop_a_tensor, "missing_keys.*proj_out_2.weight"),
    "index of pickles": (
        lambda f: write_index(f, "diffusion_pytorch_model-00001-of-00001.bin"),
        "must name safetensors files",
    ),
    "index outside": (
        lambda f: write_index(f, "../other.safetensors"),
        "must name safetensors files",
    ),
    "bad index": (
        lambda f: (f / "diffusion_pytorch_model.safetensors.index.json").write_text("[]"),
        "map names to files",
    ),
}


def test_pickled_weights_are_read_as_tensors_alone(tmp_path):
    net = dit()
    net.save_pretrained(tmp_path)
    pickle_instead(tmp_path)
    found = load_diffusers(tmp_path).state_dict()
    expected = DiffusersBackbone(net).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("damage", BROKEN)
def test_a_broken_folder_is_refused(damage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dit().save_pretrained(tmp_path)
    load_diffusers(tmp_path)  # it was whole
    act, message = BROKEN[damage]
    act(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_diffusers(tmp_path)
    assert not (tmp_path / "harm").exists()


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="must hold config.json"):
        load_diffusers(tmp_path / "none")


def test_the_table_names_real_arguments():
    import inspect

    import diffusers

    for name, spec in SPECS.items():
        cls = getattr(diffusers, name)
        arguments = set(inspect.signature(cls.forward).parameters)
        assert {
            *spec.required,
            *spec.optional,
            *spec.refused,
            "hidden_states",
            "timestep",
        } <= arguments
        assert not spec.added or "added_cond_kwargs" in arguments


def test_early_exits_with_weights_of_their_own_for_prompts(tmp_path):
    model, x_t, t, y = case("pixart")
    second = randomised(pixart(), seed=1)
    two = ExitWeights(DiffusersBackbone(model), DiffusersBackbone(second)).eval()
    with torch.no_grad():
        want = [two(x_t, t, y, exit_depth=d) for d in (2, DEPTH)]
        mixed = two(x_t, t, y, exit_depth=torch.tensor(EXITS))
        for i, depth in enumerate(EXITS):
            row = {k: v[i : i + 1] for k, v in y.items()}
            alone = two(x_t[i : i + 1], t[i : i + 1], row, exit_depth=depth)
            torch.testing.assert_close(mixed[i : i + 1], alone, rtol=1e-3, atol=1e-4)
    two.share_unused(x_t[:1], t[:1], {k: v[:1] for k, v in y.items()}, 2)
    save_backbone(two, tmp_path / "two.safetensors")
    own = BackboneConfig(kind="diffusers", checkpoint=str(tmp_path / "two.safetensors"))
    read = load_backbone(own).eval()
    assert isinstance(read, ExitWeights)
    with torch.no_grad():
        assert torch.equal(read(x_t, t, y, exit_depth=2), want[0])
        assert torch.equal(read(x_t, t, y), want[1])
    names = load_file(tmp_path / "two.safetensors")
    assert not any(k.startswith("exits.transformer.transformer_blocks.2") for k in names)
    assert any(k.startswith("exits.transformer.transformer_blocks.1") for k in names)
