"""What shapes do not tell of a network: heads, labels and how timesteps are
counted. Known, asked for, or said."""

import argparse
import re

import pytest
import torch

from asesearch.backbones import DiT, UViT, inspect_checkpoint, load_backbone, save_backbone, uvit
from asesearch.backbones.checkpoints import load_trained
from asesearch.backbones.files import read_checkpoint
from asesearch.backbones.shapes import from_shapes
from asesearch.config import BackboneConfig, DiffusionConfig
from asesearch.errors import CheckpointError, ConfigError
from asesearch.sampling import check_sampling

SMALL = {"input_size": 8, "in_channels": 1, "hidden_size": 16, "depth": 1, "num_heads": 2}


def load(path, kind: str = "dit", **args):
    return load_backbone(BackboneConfig(kind=kind, checkpoint=str(path), args=args))


def shaped_like(net, path, **beside) -> None:
    """A file of the network's shapes, one zero an entry."""
    state = {k: torch.zeros(()).expand(v.shape) for k, v in net.state_dict().items()}
    torch.save({"model": state, **beside}, path)


def on_meta(cls, **args):
    with torch.device("meta"):
        return cls(**args)


# -- heads -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "heads", "usual"), [(384, 12, 6), (384, 3, 6), (768, 6, 12), (1152, 18, 16)]
)
def test_other_heads_than_the_official_of_that_width(
    tmp_path, width: int, heads: int, usual: int
) -> None:
    torch.manual_seed(0)
    net = DiT(
        input_size=4,
        patch_size=2,
        in_channels=1,
        hidden_size=width,
        depth=1,
        num_heads=heads,
        num_classes=5,
    ).eval()
    for p in net.parameters():
        p.data = p.data + torch.randn_like(p) * 0.1
    torch.save(net.state_dict(), tmp_path / "net.pt")
    with pytest.raises(
        ConfigError,
        match=r"don't tell the number of attention heads; set args\.num_heads in \[backbone\]",
    ):
        load(tmp_path / "net.pt", num_classes=5)
    inputs = torch.randn(2, 1, 4, 4), torch.tensor([10, 700]), torch.tensor([1, 4])
    with torch.no_grad():
        wanted = net(*inputs)
        assert torch.equal(
            load(tmp_path / "net.pt", num_classes=5, num_heads=heads).eval()(*inputs), wanted
        )
        wrong = load(tmp_path / "net.pt", num_classes=5, num_heads=usual).eval()(*inputs)
    assert (wrong - wanted).abs().max() > 0.01 * wanted.abs().max()  # the control: heads matter


OFFICIAL_S = {"depth": 12, "hidden_size": 384, "num_heads": 6}
OFFICIAL_UVIT = {
    "img_size": 64,
    "patch_size": 4,
    "in_chans": 3,
    "embed_dim": 512,
    "depth": 12,
    "num_heads": 8,
}


@pytest.mark.parametrize(
    ("kind", "args", "heads"),
    [
        ("dit", {**OFFICIAL_S, "patch_size": 4, "input_size": 64}, 6),
        ("dit", {**OFFICIAL_S, "patch_size": 2, "in_channels": 1, "learn_sigma": False}, 6),
        ("dit", {**OFFICIAL_S, "depth": 11}, None),
        ("dit", {**OFFICIAL_S, "patch_size": 1}, None),
        ("dit", {**OFFICIAL_S, "mlp_ratio": 2.0}, None),
        ("dit", {**OFFICIAL_S, "hidden_size": 768}, 12),  # that is DiT-B
        ("dit", {**OFFICIAL_S, "hidden_size": 1152}, None),
        ("uvit", OFFICIAL_UVIT, 8),
        ("uvit", {**OFFICIAL_UVIT, "img_size": 32, "num_classes": 11, "in_chans": 4}, 8),
        ("uvit", {**OFFICIAL_UVIT, "depth": 10}, None),
        ("uvit", {**OFFICIAL_UVIT, "conv": False}, None),
        ("uvit", {**OFFICIAL_UVIT, "qkv_bias": True}, None),
        ("uvit", {**OFFICIAL_UVIT, "skip": False}, None),
        ("uvit", {**OFFICIAL_UVIT, "mlp_time_embed": True}, None),
        ("uvit", {**OFFICIAL_UVIT, "embed_dim": 768}, None),
    ],
)
def test_heads_are_known_where_the_whole_shape_is_official(
    tmp_path, kind: str, args: dict, heads: int | None
) -> None:
    shaped_like(on_meta({"dit": DiT, "uvit": UViT}[kind], **args), tmp_path / "net.pt")
    info = inspect_checkpoint(tmp_path / "net.pt")
    assert info.args.get("num_heads") == heads
    assert sum(f"{heads} attention heads, as" in note for note in info.notes) == (heads is not None)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"in_channels": 4, "input_size": 64}, False),
        ({"in_channels": 4, "input_size": 64, "num_heads": 12}, False),  # the user says so
        ({"in_channels": 3, "input_size": 32}, True),
        ({"in_channels": 4, "input_size": 32, "num_classes": 10}, True),
    ],
)
def test_heads_of_an_official_shape_are_doubted_where_the_data_are_others(
    tmp_path, args: dict, said: bool
) -> None:
    shape = {**OFFICIAL_S, "patch_size": 4, **args}
    shaped_like(on_meta(DiT, **shape), tmp_path / "net.pt")
    given = {"num_heads": args["num_heads"]} if "num_heads" in args else {}
    found = from_shapes(read_checkpoint(tmp_path / "net.pt"), given)
    assert found.args["num_heads"] == args.get("num_heads", 6)
    doubts = [note for note in found.doubtful if "or to 6 to say so" in note]
    assert len(doubts) == said and set(doubts) <= set(found.assumed)


@pytest.mark.parametrize("size", [32, 64])
def test_heads_of_a_released_u_vit_are_not_doubted(tmp_path, size: int) -> None:
    shaped_like(on_meta(UViT, **{**OFFICIAL_UVIT, "img_size": size}), tmp_path / "net.pt")
    found = from_shapes(read_checkpoint(tmp_path / "net.pt"), {})
    assert any("8 attention heads" in note for note in found.doubtful) == (size == 32)


def test_heads_of_an_official_shape_can_be_overridden_and_must_divide_the_width(tmp_path) -> None:
    net = DiT(input_size=2, in_channels=1, **{**OFFICIAL_S, "num_heads": 12}, num_classes=1000)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    assert load(tmp_path / "net.pt").config["num_heads"] == 6
    assert load(tmp_path / "net.pt", num_heads=12).config["num_heads"] == 12
    with pytest.raises(
        ConfigError,
        match="must be a multiple of num_heads and of 4; got 384 and 5; correct num_heads",
    ):
        load(tmp_path / "net.pt", num_heads=5)
    shaped_like(on_meta(UViT, **OFFICIAL_UVIT), tmp_path / "uvit.pt")
    with pytest.raises(ConfigError, match="must be a multiple of num_heads; got 512 and 7"):
        load(tmp_path / "uvit.pt", "uvit", num_heads=7)


@pytest.mark.parametrize(
    "options",
    [
        {"args": argparse.Namespace(num_heads=4, num_classes=3)},
        {"hyper_parameters": {"num_heads": 4, "num_classes": 3}},
        {"config": {"model": {"num_heads": 4}, "data": {"num_classes": 3}}},
        {"config": {"model": {"params": {"num_heads": 4, "num_classes": 3}}}},
        {"num_heads": 4, "num_classes": 3},
        {"train_args": {"text_encoder": {"num_heads": 2}, "num_heads": 4, "num_classes": 3}},
    ],
)
def test_options_of_the_training_tell_heads_and_labels(tmp_path, caplog, options: dict) -> None:
    net = DiT(**{**SMALL, "num_heads": 4}, num_classes=3)
    torch.save({"model": net.state_dict(), **options}, tmp_path / "net.pt")
    again = load(tmp_path / "net.pt")
    assert again.config == net.config and not caplog.records


@pytest.mark.parametrize(
    "told",
    [
        {"args": {"num_heads": 3}},
        {"args": {"num_heads": 4}, "model_config": {"num_heads": 8}},
        {"config": {"discriminator": {"num_heads": 4}}},
        {"args": argparse.Namespace(text_encoder={"num_heads": 4})},
        {"discriminator_config": {"num_heads": 4}},
        {"a": {"num_heads": 4}},
    ],
)
def test_options_that_do_not_fit_tell_nothing(tmp_path, told: dict) -> None:
    torch.save({"model": DiT(**SMALL, num_classes=3).state_dict(), **told}, tmp_path / "net.pt")
    with pytest.raises(ConfigError, match="number of attention heads"):
        load(tmp_path / "net.pt")


def test_heads_that_the_file_tells_otherwise_are_refused(tmp_path) -> None:
    net = DiT(**SMALL, num_classes=3)
    told = {"args": {"num_heads": 2, "num_classes": 3}}
    torch.save({"model": net.state_dict(), **told}, tmp_path / "told.pt")
    save_backbone(net, tmp_path / "own.safetensors")
    for name in ("told.pt", "own.safetensors"):
        assert load(tmp_path / name, num_heads=2).config == net.config
        with pytest.raises(
            ConfigError,
            match=rf"{name} says that its network has num_heads = 2; got num_heads = 4 in \[backb",
        ):
            load(tmp_path / name, num_heads=4)


@pytest.mark.parametrize("hidden", range(17, 60))
def test_any_number_of_hidden_units(tmp_path, hidden: int) -> None:
    """The official code computes it as int(width * ratio)."""
    net = DiT(**SMALL, num_classes=3)
    state = net.state_dict()
    for name in ("fc1.weight", "fc1.bias"):
        state[f"blocks.0.mlp.{name}"] = torch.ones(hidden, *state[f"blocks.0.mlp.{name}"].shape[1:])
    state["blocks.0.mlp.fc2.weight"] = torch.ones(16, hidden)
    torch.save(state, tmp_path / "net.pt")
    assert load(tmp_path / "net.pt", num_heads=2).blocks[0].mlp.fc1.out_features == hidden


# -- labels ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [1, 2, 10, 999, 1000])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_labels_are_what_the_study_file_says(
    tmp_path, caplog, classes: int, dropout: float
) -> None:
    net = DiT(**SMALL, num_classes=classes, class_dropout_prob=dropout)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    by_classes = load(tmp_path / "net.pt", num_heads=2, num_classes=classes)
    by_dropout = load(tmp_path / "net.pt", num_heads=2, class_dropout_prob=dropout)
    for again in (by_classes, by_dropout):
        assert (again.num_classes, again.has_null_label) == (classes, dropout > 0)
        assert again.config == net.config
    assert not caplog.records


@pytest.mark.parametrize(
    ("rows", "classes", "null", "said"),
    [
        (1, 1, False, False),
        (1001, 1000, True, False),
        (2, 1, True, True),
        (11, 10, True, True),
        (1000, 999, True, True),
    ],
)
def test_labels_that_nobody_tells_of_are_the_official_ones_and_it_is_said(
    tmp_path, caplog, rows: int, classes: int, null: bool, said: bool
) -> None:
    net = DiT(**SMALL, num_classes=rows, class_dropout_prob=0.0)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    again = load(tmp_path / "net.pt", num_heads=2)
    assert (again.num_classes, again.has_null_label) == (classes, null)
    both = (
        f"{'class' if classes == 1 else 'classes'} and the null label, as the official training "
        f"makes them; set args.num_classes = {rows} in [backbone] if no labels were dropped in "
        f"training, or {classes} to say so"
    )
    assert [both in r.getMessage() for r in caplog.records] == [True] * said
    info = inspect_checkpoint(tmp_path / "net.pt")
    assert (
        info.num_classes == classes
        and [n for n in info.notes if both in n] == list(info.notes)[-1:] * said
    )


@pytest.mark.parametrize(
    ("options", "classes", "null"),
    [
        ({"num_classes": 11}, 11, False),
        ({"num_classes": 10}, 10, True),
        ({"class_dropout_prob": 0.0}, 11, False),
        ({"class_dropout_prob": 0.2}, 10, True),
        ({"num_classes": 500}, 10, True),  # of another network
        ({"classifier": {"num_classes": 11}}, 10, True),
    ],
)
def test_labels_by_the_options_of_the_training(
    tmp_path, options: dict, classes: int, null: bool
) -> None:
    net = DiT(**SMALL, num_classes=11, class_dropout_prob=0.0)
    torch.save(
        {"ema": net.state_dict(), "args": argparse.Namespace(**options)}, tmp_path / "net.pt"
    )
    again = load(tmp_path / "net.pt", num_heads=2)
    assert (again.num_classes, again.has_null_label) == (classes, null)


@pytest.mark.parametrize(
    ("rows", "args", "rule"),
    [
        (
            11,
            {"num_classes": 9},
            r"those of num_classes = 11 \(no null label\) or 10 \(and the null label\); got 9",
        ),
        (11, {"num_classes": 12}, "got 12"),
        (1, {"num_classes": 2}, r"num_classes = 1 \(no null label\); got 2"),
        (
            1,
            {"class_dropout_prob": 0.1},
            r"num_classes = 1 \(no null label\); got class_dropout_prob = 0\.1 in \[backbone\], "
            "which needs a null label; leave it out",
        ),
        (1, {"class_dropout_prob": 0.1, "num_classes": 2}, "got 2 in .*; correct args.num_classes"),
        (
            11,
            {"num_classes": 11, "class_dropout_prob": 0.1},
            "a network without a null label; got class_dropout_prob = 0.1",
        ),
        (
            11,
            {"num_classes": 10, "class_dropout_prob": 0.0},
            "a network with a null label; got class_dropout_prob = 0.0",
        ),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path, rows: int, args: dict, rule: str) -> None:
    torch.save(
        DiT(**SMALL, num_classes=rows, class_dropout_prob=0.0).state_dict(), tmp_path / "net.pt"
    )
    with pytest.raises(ConfigError, match=rule):
        load(tmp_path / "net.pt", num_heads=2, **args)


def test_labels_without_a_row_are_refused(tmp_path) -> None:
    state = DiT(**SMALL, num_classes=1, class_dropout_prob=0.0).state_dict()
    table = "y_embedder.embedding_table.weight"
    torch.save({**state, table: state[table][:0]}, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match=rf"missing or misshapen: {table} has no rows"):
        load(tmp_path / "net.pt", num_heads=2)
    torch.save(state, tmp_path / "net.pt")  # the control: one row is enough
    assert load(tmp_path / "net.pt", num_heads=2, class_dropout_prob=0.0).num_classes == 1


UVIT = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize(
    ("rows", "args", "classes", "null", "said"),
    [
        (11, {}, 10, True, True),
        (11, {"has_null_label": True}, 10, True, False),
        (11, {"has_null_label": False}, 11, False, False),
        (1, {}, 1, False, False),
        (1001, {}, 1000, True, False),
        (-1, {}, 0, False, False),
    ],
)
def test_labels_of_a_u_vit(
    tmp_path, caplog, rows: int, args: dict, classes: int, null: bool, said: bool
) -> None:
    torch.save(
        UViT(**UVIT, num_classes=rows, has_null_label=False).state_dict(), tmp_path / "net.pt"
    )
    again = load(tmp_path / "net.pt", "uvit", num_heads=2, **args)
    assert (again.num_classes, again.has_null_label) == (classes, null)
    assert [
        "set args.has_null_label in [backbone] to false" in r.getMessage() for r in caplog.records
    ] == [True] * said
    y = torch.tensor([0, max(0, classes - 1)]) if classes else None
    assert again(torch.zeros(2, 1, 8, 8), torch.tensor([1, 2]), y).shape == (2, 1, 8, 8)


def test_a_single_label_that_is_the_null_label_is_refused() -> None:
    with pytest.raises(ConfigError, match="got 1; set has_null_label to false"):
        UViT(**UVIT, num_classes=1)


def test_guidance_without_a_null_label_is_refused_with_the_reason(tmp_path) -> None:
    from asesearch.diffusion import Diffusion

    torch.save(
        DiT(**SMALL, num_classes=1, class_dropout_prob=0.0).state_dict(), tmp_path / "net.pt"
    )
    with pytest.raises(
        ConfigError,
        match=r"with a null label .* dropped labels .*; this one has none; got cfg_scale 1\.5; use "
        r"1",
    ):
        check_sampling(load(tmp_path / "net.pt", num_heads=2), "ddim", Diffusion(), 2, 1.5)


# -- other networks --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "rule"),
    [
        (
            "t_block.1.weight",
            "PixArt's weights .* folder of its diffusers version, such as PixArt-alpha/.* kind = "
            "'diffusers'",
        ),
        (
            "csize_embedder.mlp.0.weight",
            "holds PixArt's weights .* sizes and aspect ratios: take one of 256",
        ),
        ("joint_blocks.0.x_block.attn.qkv.weight", "holds Stable Diffusion 3's weights"),
    ],
)
@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}}]
)
def test_original_weights_of_other_networks_are_named(tmp_path, key: str, rule: str, wrap) -> None:
    state = DiT(**SMALL, num_classes=3).state_dict() | {key: torch.zeros(1)}
    torch.save(wrap(state), tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=rule):
        inspect_checkpoint(tmp_path / "net.pth")


@pytest.mark.parametrize("prefix", ["", "_fsdp_wrapped_module.", "_fsdp_wrapped_module.blocks.0."])
def test_flattened_parameters_are_told(tmp_path, prefix: str) -> None:
    torch.save({f"{prefix}_flat_param": torch.zeros(9)}, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match=r"in which FSDP keeps .*; save a full state dict"):
        inspect_checkpoint(tmp_path / "net.pt")


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"prediction": "velocity", "path_type": "Linear"}, True),  # SiT, whose shapes are DiT's
        ({"parameterization": "v"}, True),
        ({"prediction_type": "epsilon"}, False),
        ({"prediction_type": "EPSILON"}, False),
        ({"prediction": "eps_theta"}, False),
        ({"prediction": "predict-noise"}, False),
        ({"prediction": "V_PREDICTION"}, True),
        ({"prediction": "prediction"}, True),
        ({"prediction": "noise_and_velocity"}, True),
        ({"predict_xstart": True}, True),
        ({"objective": "pred_v"}, True),
        ({"objective": "pred_x0"}, True),
        ({"pred_type": "v"}, True),
        ({"v_prediction": True}, True),
        ({"predict_v": True}, True),
        ({"model_mean_type": "START_X"}, True),
        ({"model_mean_type": "ModelMeanType.PREVIOUS_X"}, True),
        ({"mean_type": "xstart"}, True),
        ({"target": "velocity"}, True),
        ({"path_type": "Linear", "prediction": "noise"}, True),
        ({"loss": "flow_matching"}, True),
        ({"loss_type": "rectified-flow"}, True),
        ({"predict_epsilon": False}, True),
        ({"predict_xstart": False, "learn_sigma": True, "sigma_small": False}, False),
        ({"rescale_learned_sigmas": False, "noise_schedule": "linear", "use_kl": False}, False),
        ({"objective": "pred_noise", "predict_epsilon": True, "v_prediction": False}, False),
        ({"model_mean_type": "EPSILON", "target": "ldm.models.DiT", "loss": "mse"}, False),
        ({"mean_type": "epsilon", "path_type": "VP", "loss_type": "l2"}, False),
        ({"path_type": "linear", "prediction_type": "epsilon"}, False),
        ({"path_type": "linear", "flow_matching": False}, False),
        ({"path_type": "linear", "v_prediction": False}, True),
        ({"scheduler": {"path_type": "linear"}}, False),  # of the learning rate
        ({"data": {"target": "sample"}, "first_stage": {"loss": "v"}}, False),
        ({"sampler": {"predict_x0": True}, "lr_schedule": {"objective": "v"}}, False),
        ({"prediction": "v", "metadata": {}}, True),
    ],
)
def test_a_network_trained_to_predict_something_else_is_refused(
    tmp_path, options: dict, refused: bool
) -> None:
    state = DiT(**SMALL, num_classes=3).state_dict()
    torch.save({"ema": state, "args": argparse.Namespace(**options)}, tmp_path / "net.pt")
    if not refused:
        assert load(tmp_path / "net.pt", num_heads=2).depth == 1
        return
    _refused_for(tmp_path / "net.pt", *next(iter(options.items())))


def _refused_for(path, name: str, value: str) -> None:
    with pytest.raises(
        CheckpointError, match=re.escape(f"trained with {name} = {value!r}") + ".* predict noise"
    ):
        load(path, num_heads=2)


@pytest.mark.parametrize(
    ("sections", "refused"),
    [
        (("config", "scheduler"), True),
        (("config", "diffusion"), True),
        (("anything",), True),
        (("args", "classifier_free"), True),
        ((), True),
        (("config", "teacher"), False),
        (("args", "text_encoder"), False),
    ],
)
def test_what_another_network_predicts_is_no_matter(tmp_path, sections, refused: bool) -> None:
    options = {"prediction_type": "v_prediction"}
    for section in reversed(sections):
        options = {section: options}
    state = DiT(**SMALL, num_classes=3).state_dict()
    torch.save({"model": state, **options}, tmp_path / "net.pt")
    if refused:
        _refused_for(tmp_path / "net.pt", "prediction_type", "v_prediction")
    else:
        assert load(tmp_path / "net.pt", num_heads=2).depth == 1


# -- timesteps of released U-ViTs ------------------------------------------------------------------


@pytest.fixture
def from_one(tmp_path, monkeypatch):
    """Weights that have the shapes of a network released with timesteps counted from 1."""
    args = {
        **{"img_size": 4, "patch_size": 2, "in_chans": 1, "embed_dim": 16, "depth": 2},
        **{"num_heads": 2, "num_classes": 4},
    }
    monkeypatch.setitem(uvit.PRESETS, "U-ViT-Ti/2-Test", {**args, "time_offset": 1.0})
    torch.manual_seed(0)
    net = UViT(**args)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    return net, tmp_path / "net.pt"


def test_timesteps_are_counted_from_one_where_the_release_does(from_one, caplog) -> None:
    net, path = from_one
    x, y = torch.randn(2, 1, 4, 4), torch.tensor([0, 3])
    for offset, given in ((1, {}), (1, {"time_offset": 1}), (0, {"time_offset": 0})):
        caplog.clear()
        loaded = load(path, "uvit", num_heads=2, **given)
        for t in (0, 500, 999):
            want = net(x, torch.full((2,), t + offset), y)
            assert torch.equal(loaded(x, torch.full((2,), t), y), want)
        assert "timesteps" not in caplog.text  # as the release has it: nothing to be told of
    notes = inspect_checkpoint(path).notes
    assert any("counts timesteps from 1" in note for note in notes)
    assert not torch.equal(net(x, torch.tensor([1, 1]), y), net(x, torch.tensor([0, 0]), y))


def test_a_copy_counts_as_its_original(from_one, tmp_path, caplog) -> None:
    loaded = load(from_one[1], "uvit", num_heads=2)
    save_backbone(loaded, tmp_path / "own.safetensors")
    caplog.clear()
    again = load(tmp_path / "own.safetensors", "uvit")
    assert again.config == loaded.config and again.time_offset == 1 and not caplog.text


@pytest.mark.parametrize(
    ("process", "said"),
    [
        ({}, True),
        ({"process": "vp-sde"}, True),
        ({"beta_schedule": "scaled_linear"}, False),
    ],
)
def test_another_process_than_the_releases_is_told(from_one, process, said, caplog) -> None:
    config = BackboneConfig(
        kind="uvit", checkpoint=str(from_one[1]), args={"num_heads": 2, "time_offset": 1}
    )
    load_trained(config, DiffusionConfig(**process))
    expected = 'U-ViT-Ti/2-Test, which was released trained under process = "discrete", '
    assert (expected in caplog.text) == said


@pytest.mark.parametrize(
    ("options", "diffusion", "said"),
    [
        ({"noise_schedule": "cosine"}, {}, "noise_schedule = 'cosine'"),
        ({"noise_schedule": "scaled_linear"}, {}, "noise_schedule = 'scaled_linear'"),
        ({"diffusion_steps": 4000}, {}, "diffusion_steps = 4000"),
        ({"num_train_timesteps": 1000}, {"num_train_timesteps": 100}, "num_train_timesteps = 1000"),
        ({"noise_schedule": "scaled_linear"}, {"beta_schedule": "scaled_linear"}, None),
        ({"diffusion_steps": 4000}, {"num_train_timesteps": 4000}, None),
        ({"diffusion_steps": 4000}, {"process": "vp-sde"}, None),
        ({"noise_schedule": "linear", "diffusion_steps": 1000}, {}, None),
        ({"sampler": {"diffusion_steps": 50}}, {}, None),
        ({"sampling": {"noise_schedule": "cosine"}, "eval": {"diffusion_steps": 50}}, {}, None),
        ({"diffusion_steps": 250, "num_train_timesteps": 1000}, {}, None),
        ({"train": {"diffusion_steps": 250}}, {}, "diffusion_steps = 250"),
        ({}, {"num_train_timesteps": 4000}, None),
    ],
)
def test_another_process_than_the_options_tell_is_refused(
    tmp_path, options: dict, diffusion: dict, said: str | None
) -> None:
    torch.manual_seed(0)
    net = DiT(**SMALL, num_classes=3)
    torch.nn.init.normal_(net.final_layer.linear.weight)
    torch.save(
        {"ema": net.state_dict(), "args": argparse.Namespace(**options)}, tmp_path / "net.pt"
    )
    config = BackboneConfig(checkpoint=str(tmp_path / "net.pt"), args={"num_heads": 2})
    if said is None:
        assert load_trained(config, DiffusionConfig(**diffusion)).depth == 1
        return
    with pytest.raises(ConfigError, match=f"as the network was trained; .*net.pt says {said}; "):
        load_trained(config, DiffusionConfig(**diffusion))


def test_the_processes_of_released_networks() -> None:
    discrete = {n for n in uvit.PRESETS if uvit.trained_under(n)["process"] == "discrete"}
    assert discrete == {"U-ViT-H/2-ImageNet256", "U-ViT-H/4-ImageNet512"}
    assert uvit.trained_under("U-ViT-L/2-ImageNet256") == {"process": "vp-sde"}
