"""From a checkpoint to the network it holds, and back."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from asesearch.backbones import DiT, UViT, inspect_checkpoint, load_backbone, save_backbone
from asesearch.backbones.base import Backbone
from asesearch.backbones.checkpoints import BACKBONES, load_trained
from asesearch.config import BackboneConfig, DiffusionConfig
from asesearch.errors import CheckpointError, ConfigError

DIT = {
    "input_size": 8,
    "in_channels": 1,
    "hidden_size": 16,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 3,
}
UVIT = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 4, "num_heads": 2}
SMALL = {
    "dit": lambda: DiT(**DIT),
    "dit-plain": lambda: DiT(**DIT, learn_sigma=False, mlp_ratio=2.0, patch_size=4),
    "uvit": lambda: UViT(**UVIT),
    "uvit-class": lambda: UViT(
        **UVIT, num_classes=4, conv=False, mlp_time_embed=True, qkv_bias=True, skip=False
    ),
}


@pytest.fixture(params=SMALL)
def net(request) -> Backbone:
    torch.manual_seed(0)
    net = SMALL[request.param]()
    for p in net.parameters():
        p.data = p.data + torch.randn_like(p) * 0.1
    return net


def kind_of(net: Backbone) -> str:
    return next(k for k, cls in BACKBONES.items() if type(net) is cls)


def equal(a: Backbone, b: Backbone) -> bool:
    x = a.state_dict()
    y = b.state_dict()
    return type(a) is type(b) and x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def load(kind: str, checkpoint=None, **fields) -> Backbone:
    return load_backbone(
        BackboneConfig(
            kind=kind, checkpoint=None if checkpoint is None else str(checkpoint), **fields
        )
    )


def test_what_is_saved_is_loaded(net, tmp_path) -> None:
    save_backbone(net, tmp_path / "new" / "net.safetensors", {"note": "é"})
    again = load(kind_of(net), tmp_path / "new" / "net.safetensors")
    assert equal(net, again) and again.config == net.config
    assert [p.requires_grad for p in again.parameters()] == [
        p.requires_grad for p in net.parameters()
    ]
    info = inspect_checkpoint(tmp_path / "new" / "net.safetensors")
    assert info.metadata == {"note": "é"} and info.kind == kind_of(net)
    assert (info.input_size, info.num_classes, info.learn_sigma) == (
        net.input_size,
        net.num_classes,
        net.learn_sigma,
    )
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["net.safetensors"]


def test_the_architecture_of_a_bare_state_dict_is_found_but_for_the_heads(net, tmp_path) -> None:
    torch.save(net.state_dict(), tmp_path / "net.pt")
    with pytest.raises(ConfigError, match=r"number of attention heads; set args\.num_heads"):
        load(kind_of(net), tmp_path / "net.pt")
    again = load(kind_of(net), tmp_path / "net.pt", args={"num_heads": 2})
    assert equal(net, again) and again.config == net.config


def test_a_training_state_is_loaded_from_its_ema(net, tmp_path) -> None:
    raw = {k: torch.zeros_like(v) for k, v in net.state_dict().items()}
    torch.save({"model": raw, "ema": net.state_dict(), "opt": {}}, tmp_path / "net.pt")
    assert equal(net, load(kind_of(net), tmp_path / "net.pt", args={"num_heads": 2}))
    assert inspect_checkpoint(tmp_path / "net.pt").source == "ema"


@pytest.mark.parametrize(
    ("kind", "preset"),
    [
        ("dit", "DiT-S/8"),
        ("dit", "DiT-XL/2"),
        ("uvit", "U-ViT-S/4-CelebA64"),
        ("uvit", "U-ViT-M/4-ImageNet64"),
        ("uvit", "U-ViT-L/2-ImageNet256"),
        ("uvit", "U-ViT-H/4-ImageNet512"),
    ],
)
def test_official_sizes_are_named_and_need_no_args(tmp_path, kind: str, preset: str) -> None:
    """The file holds one zero an entry, expanded to the true shape."""
    with torch.device("meta"):
        net = BACKBONES[kind].from_preset(preset)
    torch.save(
        {k: torch.zeros(()).expand(v.shape) for k, v in net.state_dict().items()},
        tmp_path / "net.pt",
    )
    info = inspect_checkpoint(tmp_path / "net.pt")
    assert (info.model, info.kind, info.source) == (preset, kind, "weights")
    assert (info.input_size, info.num_classes, info.learn_sigma) == (
        net.input_size,
        net.num_classes,
        net.learn_sigma,
    )
    assert {**net.config, **info.args} == net.config


def test_preset_and_args_make_a_new_network_from_its_seed() -> None:
    net = load(
        "uvit", preset="U-ViT-S/4-CelebA64", args={"embed_dim": 16, "depth": 2, "num_heads": 2}
    )
    assert net.depth == 1 and net.input_size == 64
    config = BackboneConfig(kind="dit", args=DIT)
    before = torch.get_rng_state()
    assert equal(load_backbone(config, seed=3), load_backbone(config, seed=3))
    assert not equal(load_backbone(config, seed=3), load_backbone(config, seed=4))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("kind", "fields", "rule"),
    [
        ("dit", {"preset": "DiT-M/2"}, "unknown DiT preset"),
        ("uvit", {"preset": "DiT-XL/2"}, "unknown U-ViT preset"),
        ("dit", {"args": {"embed_dim": 4}}, "no argument 'embed_dim'; choose from input_size"),
        ("dit", {"args": {"depth": "12"}}, "depth must be a positive integer; got '12'"),
        ("dit", {"args": {"depth": 0}}, "depth must be a positive integer; got 0"),
        ("dit", {"args": {"depth": True}}, "depth must be a positive integer; got True"),
        ("dit", {"args": {"learn_sigma": 1}}, "learn_sigma must be true or false; got 1"),
        ("uvit", {"args": {"qk_scale": "x"}}, "qk_scale must be a number; got 'x'"),
        ("dit", {"args": {"mlp_ratio": -1.0}}, "mlp_ratio must be a number from 0 to 1000; got -1"),
        (
            "dit",
            {"args": {"class_dropout_prob": 5.0}},
            "dropout_prob must be a number from 0 to 1;",
        ),
        ("dit", {"args": {"mlp_ratio": float("nan")}}, "mlp_ratio must be a number from 0 to 1000"),
        ("uvit", {"args": {"mlp_ratio": 1e300}}, "mlp_ratio must be a number from 0 to 1000"),
        ("diffusers", {}, "needs a checkpoint folder"),
        ("diffusers", {"checkpoint": "x", "args": {"depth": 3}}, "takes neither preset nor args"),
        ("dit", {"checkpoint": "shipped:nothing"}, "no shipped network is called 'nothing'"),
    ],
)
def test_a_wrong_study_section_is_refused(kind: str, fields: dict, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        load_backbone(BackboneConfig(kind=kind, **fields))


@pytest.mark.parametrize("kind", ["meta", "sparse"])
def test_tensors_that_are_no_plain_ones_are_refused(tmp_path, kind) -> None:
    state = DiT(**DIT).state_dict()
    name = "blocks.0.mlp.fc1.weight"
    state[name] = state[name].to("meta") if kind == "meta" else state[name].to_sparse()
    torch.save(state, tmp_path / "net.pt")
    config = BackboneConfig(checkpoint=str(tmp_path / "net.pt"), args={"num_heads": 2})
    with pytest.raises(CheckpointError, match=f"must hold plain tensors; got a {kind} one, {name}"):
        load_backbone(config)


def test_entries_that_do_not_fit_are_named(tmp_path) -> None:
    state = DiT(**DIT).state_dict()
    args = {"args": {"num_heads": 2}}
    short = {k: v for k, v in state.items() if not k.startswith("blocks.1.")}
    torch.save(short, tmp_path / "short.pt")
    with pytest.raises(
        CheckpointError, match=r"10 missing: blocks\.1\.attn\.qkv\.weight, .* and 5 more; check"
    ):
        load("dit", tmp_path / "short.pt", args={"num_heads": 2, "depth": 2})
    torch.save({**state, "extra": torch.zeros(1)}, tmp_path / "long.pt")
    with pytest.raises(CheckpointError, match="1 unexpected: extra; check"):
        load("dit", tmp_path / "long.pt", **args)
    torch.save({**state, "final_layer.linear.bias": torch.zeros(3)}, tmp_path / "bent.pt")
    with pytest.raises(
        CheckpointError,
        match=r"1 of another shape: final_layer\.linear\.bias \(3,\) instead of \(8,\)",
    ):
        load("dit", tmp_path / "bent.pt", **args)
    torch.save(state, tmp_path / "small.pt")
    with pytest.raises(CheckpointError, match="does not hold what the network needs"):
        load("dit", tmp_path / "small.pt", preset="DiT-S/2")


def test_a_network_of_another_kind_is_refused(tmp_path) -> None:
    save_backbone(UViT(**UVIT), tmp_path / "net.safetensors")
    with pytest.raises(CheckpointError, match="kind 'uvit'; got kind = 'dit'"):
        load("dit", tmp_path / "net.safetensors")


@pytest.mark.parametrize(
    ("state", "rule"),
    [
        ({"conv1.weight": torch.zeros(1)}, "must be an official DiT or U-ViT"),
        (
            {"x_embedder.proj.weight": torch.zeros(16, 1, 2, 2)},
            "missing or misshapen: 'final_layer.linear.weight'",
        ),
        (
            {
                "x_embedder.proj.weight": torch.zeros(16, 1, 2, 2),
                "final_layer.linear.weight": torch.zeros(()),
            },
            "must be an off",
        ),
        ({"x_embedder.proj.weight": torch.zeros(16)}, "must be an official"),
        (
            {
                "patch_embed.proj.weight": torch.zeros(16, 1, 2, 2),
                "context_embed.weight": torch.zeros(1),
            },
            "U-ViT for text",
        ),
        (
            {"transformer_blocks.0.attn1.to_q.weight": torch.zeros(1)},
            "give the folder, with config.json",
        ),
    ],
)
def test_weights_of_an_unknown_network_are_refused(tmp_path, state: dict, rule: str) -> None:
    torch.save(state, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match=rule):
        inspect_checkpoint(tmp_path / "net.pt")


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"version": "2"}, "reads version 1 .*; got '2'"),
        ({"kind": "unet"}, "metadata .* is damaged"),
        ({"config": "{"}, "metadata .* is damaged"),
        ({"config": "[]"}, "metadata .* is damaged"),
        ({"config": '{"width": 3}'}, "has no argument 'width'"),
    ],
)
def test_damaged_metadata_is_refused(tmp_path, changes: dict, rule: str) -> None:
    path = tmp_path / "net.safetensors"
    save_backbone(DiT(**DIT), path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        state = {k: file.get_tensor(k).clone() for k in file.keys()}  # noqa: SIM118
    save_file(state, path, {**metadata, **changes})
    with pytest.raises(CheckpointError, match=rule):
        load("dit", path)


def test_what_can_not_be_saved_is_refused(tmp_path) -> None:
    class Other(DiT):
        pass

    with pytest.raises(
        ConfigError, match="only DiT, U-ViT and diffusers networks can be saved; got Other"
    ):
        save_backbone(Other(**DIT), tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match="must not use the keys .*; got config"):
        save_backbone(DiT(**DIT), tmp_path / "x.safetensors", {"config": "x"})
    assert not list(tmp_path.iterdir())


def test_half_precision_weights_become_float32(tmp_path) -> None:
    net = DiT(**DIT).half()
    save_backbone(net, tmp_path / "net.safetensors")
    again = load("dit", tmp_path / "net.safetensors")
    assert {p.dtype for p in again.parameters()} == {torch.float32} and equal(net.float(), again)


def test_a_loaded_network_trains_and_its_file_does_not_change(net, tmp_path) -> None:
    path = tmp_path / "net.safetensors"
    save_backbone(net, path)
    before = path.read_bytes()
    again = load(kind_of(net), path)
    x_t = torch.randn(2, 1, 8, 8)
    again(
        x_t, torch.tensor([1, 2]), torch.tensor([0, 1]) if net.num_classes else None
    ).square().sum().backward()
    torch.optim.SGD([p for p in again.parameters() if p.grad is not None], lr=0.1).step()
    assert not equal(net, again) and path.read_bytes() == before


TINY_DIFFUSERS = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "sample_size": 8,
}


def test_a_diffusers_dit_loads_as_either_kind_with_the_same_output(tmp_path) -> None:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        **TINY_DIFFUSERS, out_channels=8, num_layers=2, num_embeds_ada_norm=3
    ).eval()
    model.transformer_blocks[1].norm1.emb.load_state_dict(
        model.transformer_blocks[0].norm1.emb.state_dict()
    )
    model.save_pretrained(tmp_path / "pipe" / "transformer")
    info = inspect_checkpoint(tmp_path / "pipe")
    assert (info.kind, info.model, info.input_size) == ("dit", "DiT, depth 2, width 16, patch 2", 8)
    assert (info.num_classes, info.learn_sigma) == (3, True)
    ours = load("dit", tmp_path / "pipe")
    theirs = load("diffusers", tmp_path / "pipe")
    args = (torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 3, 1]))
    depths = torch.tensor([1, 2, 1])
    with torch.no_grad():
        assert (
            ours(*args, exit_depth=depths) - theirs.eval()(*args, exit_depth=depths)
        ).abs().max() < 1e-4
    save_backbone(theirs, tmp_path / "net.safetensors")
    assert inspect_checkpoint(tmp_path / "net.safetensors").kind == "diffusers"
    again = load("diffusers", tmp_path / "net.safetensors").eval()
    assert equal(theirs, again)
    with torch.no_grad():
        assert torch.equal(again(*args), theirs(*args))


def test_other_diffusers_folders_are_described_or_refused(tmp_path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    config = {
        "_class_name": "PixArtTransformer2DModel",
        "sample_size": 32,
        "in_channels": 4,
        "out_channels": 8,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    info = inspect_checkpoint(tmp_path)
    assert (info.kind, info.model, info.input_size, info.learn_sigma) == (
        "diffusers",
        config["_class_name"],
        32,
        True,
    )
    for broken in ({**config, "_class_name": "UNet2DModel"}, {**config, "sample_size": None}, {}):
        (tmp_path / "config.json").write_text(json.dumps(broken))
        with pytest.raises(CheckpointError, match="; got "):
            inspect_checkpoint(tmp_path)


LOAD = """
import re, sys
from pathlib import Path
from asesearch.backbones import load_backbone
from asesearch.config import BackboneConfig
# without mapped files
own_kib = lambda: int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = own_kib()
net = load_backbone(BackboneConfig(kind="dit", checkpoint=sys.argv[1]))
print((own_kib() - before) // 1024, float(net.blocks[27].mlp.fc2.bias[5]))
"""


@pytest.mark.slow
def test_dit_xl_2_of_true_size_loads_without_doubling_memory(tmp_path) -> None:
    """An official training state, 5.4 GB on disk of which the EMA is used."""
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in DiT.from_preset("DiT-XL/2").state_dict().items()}
    ema = {k: torch.ones(s) for k, s in shapes.items()}  # zeros would be refused
    ema["blocks.27.mlp.fc2.bias"][5] = 3.25
    torch.save(
        {"model": {k: torch.zeros(s) for k, s in shapes.items()}, "ema": ema}, tmp_path / "xl.pt"
    )
    assert (tmp_path / "xl.pt").stat().st_size > 5.3e9
    out = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path / "xl.pt")],
        capture_output=True,
        text=True,
        check=True,
    )
    grown_mib, value = out.stdout.split()
    assert float(value) == 3.25
    assert int(grown_mib) < 400  # mapped, not copied: the weights are 2,576 MiB


NOT_FINITE = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}


@pytest.mark.parametrize("number", NOT_FINITE)
@pytest.mark.parametrize(
    "name", ["final_layer.linear.bias", "pos_embed", "y_embedder.embedding_table.weight"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_number_that_is_not_finite_is_refused(
    tmp_path, number: str, name: str, dtype: torch.dtype
) -> None:
    state = {k: v.to(dtype) for k, v in DiT(**DIT).state_dict().items()}
    state[name].view(-1)[-1] = NOT_FINITE[number]
    torch.save({"ema": state}, tmp_path / "net.pt")
    with pytest.raises(
        CheckpointError, match=rf"net\.pt .*NaN or infinity: 1 of {state[name].numel()} in {name};"
    ):
        load("dit", tmp_path / "net.pt", args={"num_heads": 2})


def test_numbers_that_are_not_finite_are_counted_in_every_kind_of_file(tmp_path) -> None:
    broken = DiT(**DIT)
    with torch.no_grad():
        for p in broken.parameters():
            p.view(-1)[0] = torch.nan
    count = len(list(broken.parameters()))
    save_backbone(broken, tmp_path / "own.safetensors")
    save_file(broken.state_dict(), tmp_path / "net.safetensors")
    for name in ("own.safetensors", "net.safetensors"):
        with pytest.raises(
            CheckpointError,
            match=f"1 of .*, 1 of .*, 1 of .*, and more in {count - 3} other tensors",
        ):
            load("dit", tmp_path / name, args={"num_heads": 2})
    net = UViT(**UVIT)
    net.norm.weight.data[:7] = torch.inf
    torch.save(net.state_dict(), tmp_path / "uvit.pt")
    with pytest.raises(CheckpointError, match=r"infinity: 7 of 16 in norm\.weight;"):
        load("uvit", tmp_path / "uvit.pt", args={"num_heads": 2})


def test_doubles_that_no_float32_can_hold_are_refused(tmp_path) -> None:
    state = {k: v.double() for k, v in DiT(**DIT).state_dict().items()}
    state["final_layer.linear.bias"][:2] = 1e300
    torch.save(state, tmp_path / "net.pt")
    with pytest.raises(
        CheckpointError, match=r"float32 can; got 2 of 8 in final_layer\.linear\.bias beyond ±3\.4e"
    ):
        load("dit", tmp_path / "net.pt", args={"num_heads": 2})


def test_quantised_weights_are_refused(tmp_path) -> None:
    state = DiT(**DIT).state_dict()
    torch.save(
        {**state, "blocks.0.mlp.fc1.weight": torch.zeros(64, 16, dtype=torch.int8)},
        tmp_path / "net.pt",
    )
    with pytest.raises(
        CheckpointError,
        match=r"got blocks\.0\.mlp\.fc1\.weight of int8, as quantised networks have",
    ):
        load("dit", tmp_path / "net.pt", args={"num_heads": 2})


def test_complex_weights_are_refused_as_that(tmp_path) -> None:
    state = DiT(**DIT).state_dict()
    state["blocks.0.mlp.fc1.weight"] = state["blocks.0.mlp.fc1.weight"].to(torch.complex64)
    torch.save(state, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match=r"got \S+ of complex64, complex numbers; give"):
        load("dit", tmp_path / "net.pt", args={"num_heads": 2})


@pytest.mark.parametrize("save", [torch.save, save_file])
def test_weights_of_eight_bits_are_refused_as_quantised(tmp_path, save) -> None:
    state = {k: v.to(torch.float8_e4m3fn) for k, v in DiT(**DIT).state_dict().items()}
    save(state, tmp_path / "net")
    with pytest.raises(CheckpointError, match=r"got \S+ of float8_e4m3fn, as quantised networks"):
        load("dit", tmp_path / "net", args={"num_heads": 2})


def test_weights_that_were_left_with_other_processes_are_told_so(tmp_path) -> None:
    state = DiT(**DIT).state_dict()
    gone = {k: torch.empty(0) for k in state}
    for name, module in {"zero3": gone, "fsdp": {**gone, "pos_embed": state["pos_embed"]}}.items():
        torch.save({"module": module}, tmp_path / name)
        with pytest.raises(
            CheckpointError, match=r"tensors of size 0, as DeepSpeed's ZeRO-3.*to_fp"
        ):
            load("dit", tmp_path / name, args={"num_heads": 2})


@pytest.mark.parametrize("kind", ["dit", "uvit"])
def test_positions_that_are_missing_or_misshapen_are_named_alone(tmp_path, kind) -> None:
    state = (DiT(**DIT) if kind == "dit" else UViT(**UVIT)).state_dict()
    positions = state.pop("pos_embed")
    torch.save(state, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match=r"net\.pt lacks pos_embed, which .*state_dict\(\)"):
        load(kind, tmp_path / "net.pt", args={"num_heads": 2})
    torch.save({**state, "pos_embed": positions[0]}, tmp_path / "net.pt")
    told = rf"must be of shape \(1, tokens, width\); got \({len(positions[0])}, 16\)"
    with pytest.raises(CheckpointError, match=told):
        load(kind, tmp_path / "net.pt", args={"num_heads": 2})


@pytest.mark.parametrize("kind", ["dit", "uvit"])
def test_a_file_whose_end_is_zeros_is_refused(tmp_path, kind: str) -> None:
    path = tmp_path / "net.safetensors"
    net = DiT(**DIT) if kind == "dit" else UViT(**UVIT)
    save_file(net.state_dict(), path)  # official zeros, as those of DiT's last layer, are none
    assert equal(load(kind, path, args={"num_heads": 2}), net)
    size = path.stat().st_size
    with safe_open(path, "pt") as file:
        last = file.get_tensor(max(file.keys()))
    os.truncate(path, size - 4 * last.numel() - 4 * 512)
    os.truncate(path, size)
    lost = {
        "dit": r"x_embedder\.proj\.weight",
        "uvit": r"patch_embed\.proj\.weight",
    }[kind]
    with pytest.raises(
        CheckpointError,
        match=rf"nothing but zeros in .*{lost}.*, as an unfinished download leaves it; download it",
    ):
        load(kind, path, args={"num_heads": 2})


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("blocks.0.attn.qkv.weight", True),
        ("blocks.1.mlp.fc1.weight", True),
        ("blocks.1.mlp.fc2.weight", False),  # of a block that was added
        ("blocks.1.attn.proj.weight", False),
        ("blocks.1.mlp.fc2.bias", False),
        ("blocks.1.adaLN_modulation.1.weight", False),
        ("final_layer.linear.weight", False),  # before any training
        ("y_embedder.embedding_table.weight", True),
        ("t_embedder.mlp.0.weight", True),
        ("t_embedder.mlp.2.weight", True),
        ("pos_embed", True),
    ],
)
def test_only_weights_that_no_training_makes_zero_are_refused(
    tmp_path, name: str, refused: bool
) -> None:
    state = DiT(**DIT).state_dict()
    state[name].zero_()
    save_file(state, tmp_path / "net.safetensors")
    if refused:
        with pytest.raises(CheckpointError, match=f"nothing but zeros in {re.escape(name)}, as"):
            load("dit", tmp_path / "net.safetensors", args={"num_heads": 2})
        state[name].view(-1)[::512] = 1e-3
        save_file(state, tmp_path / "net.safetensors")
    assert load("dit", tmp_path / "net.safetensors", args={"num_heads": 2}).depth == 2


@pytest.mark.parametrize("name", ["label_emb.weight", "pos_embed", "decoder_pred.weight"])
def test_weights_of_a_u_vit_that_no_training_makes_zero_are_refused(tmp_path, name: str) -> None:
    state = UViT(**{**UVIT, "num_classes": 5}).state_dict()
    state[name].zero_()
    save_file(state, tmp_path / "net.safetensors")
    with pytest.raises(CheckpointError, match=f"nothing but zeros in {re.escape(name)}, as"):
        load("uvit", tmp_path / "net.safetensors", args={"num_heads": 2})


def test_a_network_without_classes_may_have_labels_of_zeros(tmp_path) -> None:
    state = DiT(**{**DIT, "num_classes": 1}).state_dict()
    state["y_embedder.embedding_table.weight"].zero_()
    save_file(state, tmp_path / "net.safetensors")
    assert load("dit", tmp_path / "net.safetensors", args={"num_heads": 2}).num_classes == 1


def test_a_network_of_which_nothing_was_trained_is_refused_but_for_its_training(tmp_path) -> None:
    save_file(DiT(**DIT).state_dict(), tmp_path / "net.safetensors")
    config = BackboneConfig(checkpoint=str(tmp_path / "net.safetensors"), args={"num_heads": 2})
    with pytest.raises(
        CheckpointError,
        match=r"zeros in final_layer\.linear\.weight, its last layer, so nothing was trained yet",
    ):
        load_trained(config, DiffusionConfig())
    assert load_trained(config, DiffusionConfig(), untrained=True).depth == DIT["depth"]
    assert load_trained(BackboneConfig(args=DIT), DiffusionConfig()).depth == DIT["depth"]


@pytest.mark.parametrize(
    ("extra", "fix"),
    [
        (["decay", "num_updates"], "they are of the averaging .*: save the weights without them$"),
        (["alphas_cumprod", "betas", "sqrt_one_minus_alphas_cumprod"], "save the weights without"),
        (["mask_token"], r"check preset and args in \[backbone\]$"),  # of a network of its own
        (["blocks.7.mlp.fc1.bias", "decay"], r"check preset and args in \[backbone\]$"),
    ],
)
def test_what_stands_beside_the_weights_is_told_from_those_of_another_network(
    tmp_path, extra: list[str], fix: str
) -> None:
    state = DiT(**DIT).state_dict() | {name: torch.zeros(3) for name in extra}
    save_file(state, tmp_path / "net.safetensors")
    with pytest.raises(CheckpointError, match=fix):
        load("dit", tmp_path / "net.safetensors", args={"num_heads": 2, "depth": 2})


WIDE = {**DIT, "hidden_size": 96}
FC1 = "blocks.0.mlp.fc1.weight"  # (384, 96)


def holed(state: dict[str, torch.Tensor], zeros: range) -> dict[str, torch.Tensor]:
    fc1 = state[FC1].clone()
    fc1.view(-1)[zeros.start : zeros.stop] = 0
    return {**state, FC1: fc1}


@pytest.mark.parametrize(
    "zeros", [range(1000, 2024), range(40, 40 + 8 * 1024), range(8948, 36864), range(5060)]
)
def test_a_hole_of_zeros_in_a_tensor_is_refused(tmp_path, zeros: range) -> None:
    state = DiT(**WIDE).state_dict()
    save_file(holed(state, zeros), tmp_path / "net.safetensors")
    told = rf"got {len(zeros):,} zeros in a row in {re.escape(FC1)} from number {zeros.start:,} on"
    with pytest.raises(CheckpointError, match=told):
        load("dit", tmp_path / "net.safetensors", args={"num_heads": 2})


def test_pruned_and_padded_weights_have_no_holes(tmp_path) -> None:
    state = DiT(**WIDE).state_dict()
    fc1 = state[FC1]
    draws = torch.Generator().manual_seed(0)
    rows = fc1.clone()
    rows[7:200] = rows[300:] = 0
    columns = fc1.clone()
    columns[:, 50:] = columns[100:] = 0
    sparse = fc1 * (torch.rand(fc1.shape, generator=draws) > 0.95)
    few = holed(state, range(1000, 1900))[FC1]
    ends = holed(state, range(11 * 96 + 3))[FC1]  # rows at the end, and zeros beside by chance
    for pruned in (rows, columns, sparse, few, ends):
        save_file({**state, FC1: pruned}, tmp_path / "net.safetensors")
        assert load("dit", tmp_path / "net.safetensors", args={"num_heads": 2}).depth == 2


def test_a_diffusers_folder_with_weights_of_zeros_is_refused_as_either_kind(tmp_path) -> None:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        **TINY_DIFFUSERS, out_channels=8, num_layers=1, num_embeds_ada_norm=3
    )
    model.save_pretrained(tmp_path)
    load("diffusers", tmp_path)
    for lost in (model.pos_embed.proj, model.transformer_blocks[0].ff.net[0].proj):
        lost.weight.data.zero_()
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"zeros in pos_embed\.proj\.weight, .*ff\.net\.0\."):
        load("diffusers", tmp_path)
    with pytest.raises(CheckpointError, match=r"zeros in .*x_embedder\.proj\.weight"):
        load("dit", tmp_path)


def test_a_diffusers_folder_that_is_not_finite_is_refused_as_either_kind(tmp_path) -> None:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        **TINY_DIFFUSERS, out_channels=8, num_layers=1, num_embeds_ada_norm=3
    )
    model.proj_out_2.bias.data[3] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"1 of 32 in proj_out_2\.bias"):
        load("diffusers", tmp_path)
    with pytest.raises(CheckpointError, match=r"1 of 32 in final_layer\.linear\.bias"):
        load("dit", tmp_path)
