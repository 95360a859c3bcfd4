"""Weights inside of training states, whatever wraps them and their names."""

import argparse
import logging
import re
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file

from asesearch.backbones import (
    DiT,
    UViT,
    inspect_checkpoint,
    load_backbone,
    read_state_dict,
    wrappers,
)
from asesearch.backbones.wrappers import find_weights
from asesearch.config import BackboneConfig
from asesearch.errors import CheckpointError

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2)}


def random_dit() -> DiT:
    torch.manual_seed(0)
    net = DiT(input_size=8, in_channels=1, hidden_size=16, depth=2, num_heads=2, num_classes=3)
    for p in net.parameters():
        p.data = p.data + torch.randn_like(p) * 0.1
    return net.eval()


def outputs(net) -> torch.Tensor:
    x_t = torch.linspace(-1, 1, 128).view(2, 1, 8, 8)
    with torch.no_grad():
        return net(x_t, torch.tensor([3, 700]), torch.tensor([0, 2]))


def prefixed(state, prefix: str) -> dict:
    return {prefix + k: v for k, v in state.items()}


def in_between(state) -> dict:
    """Names as torch.compile makes them where each block is compiled."""
    return {
        k.replace("blocks.0.", "blocks.0._orig_mod.").replace("blocks.1.", "blocks.1._orig_mod."): v
        for k, v in state.items()
    }


def others(state) -> dict:
    return {k: v + 1 for k, v in state.items()}


def averaged(state, count: int = 3) -> dict:
    """As torch.optim.swa_utils.AveragedModel saves it."""
    return {"n_averaged": torch.tensor(count)} | prefixed(state, "module.")


def squashed(state) -> dict:
    return {f"model_ema.{k.replace('.', '')}": v for k, v in state.items()}


OPTIMISER = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-4}]}
BY_NAME = {"exp_avg": {"x_embedder.proj.weight": torch.zeros(16, 1, 2, 2)}}

#: name -> (what is saved of a network's state s, where its weights are found)
FORMS = {
    "plain": (lambda s: s, "weights"),
    "counters beside": (lambda s: {**s, "epoch": 3, "best": 0.5}, "weights"),
    "data parallel": (lambda s: prefixed(s, "module."), "weights"),
    "compiled": (lambda s: prefixed(s, "_orig_mod."), "weights"),
    "both": (lambda s: prefixed(s, "module._orig_mod."), "weights"),
    "both, the other way": (lambda s: prefixed(s, "_orig_mod.module."), "weights"),
    "twice": (lambda s: prefixed(s, "module.module."), "weights"),
    "sharded": (lambda s: prefixed(s, "_fsdp_wrapped_module."), "weights"),
    "blocks compiled": (in_between, "weights"),
    "some compiled": (
        lambda s: {f"_orig_mod.{k}" if "blocks" in k else k: v for k, v in s.items()},
        "weights",
    ),
    "model": (lambda s: {"model": s, "opt": OPTIMISER, "args": argparse.Namespace(lr=1)}, "model"),
    "model, by name in the optimiser": (lambda s: {"model": s, "optimizer": BY_NAME}, "model"),
    "model_state_dict": (
        lambda s: {"model_state_dict": prefixed(s, "module."), "epoch": 1},
        "model_state_dict",
    ),
    "state_dict": (lambda s: OrderedDict(state_dict=s, epoch=3), "state_dict"),
    "net": (lambda s: {"net": s}, "net"),
    "an unusual name": (lambda s: {"diffusion_transformer": s, "step": 7}, "diffusion_transformer"),
    "nested": (lambda s: {"state": {"network": prefixed(s, "_orig_mod.")}}, "state.network"),
    "lightning": (
        lambda s: {"state_dict": prefixed(s, "model."), "pytorch-lightning_version": "2"},
        "state_dict.model",
    ),
    "lightning, net compiled": (
        lambda s: {"state_dict": prefixed(s, "net._orig_mod.")},
        "state_dict.net",
    ),
    "lightning with a VAE": (
        lambda s: {"state_dict": prefixed(s, "model.") | {"vae.conv_in.weight": torch.zeros(2)}},
        "state_dict.model",
    ),
    "a discriminator beside": (
        lambda s: {"model": s, "discriminator": {"conv.weight": torch.zeros(2)}},
        "model",
    ),
    "a teacher beside": (lambda s: {"teacher": others(s), "model": s}, "model"),
    "ema": (lambda s: {"model": others(s), "ema": s}, "ema"),
    "ema first": (lambda s: {"ema": s, "model": others(s)}, "ema"),
    "ema, parallel": (lambda s: {"model": others(s), "ema": prefixed(s, "module.")}, "ema"),
    "model parallel": (lambda s: {"model": prefixed(others(s), "module."), "ema": s}, "ema"),
    "ema_model": (lambda s: {"model": others(s), "ema_model": s}, "ema_model"),
    "state_dict_ema": (lambda s: {"state_dict": others(s), "state_dict_ema": s}, "state_dict_ema"),
    "shadow": (lambda s: {"model": others(s), "ema": {"decay": 0.99, "shadow": s}}, "ema.shadow"),
    "ema alone": (lambda s: {"ema": s}, "ema"),
    "ema in lightning": (
        lambda s: {"state_dict": prefixed(others(s), "model.") | prefixed(s, "ema_model.")},
        "state_dict.ema_model",
    ),
    "ema with its model": (
        lambda s: {
            "ema": prefixed(s, "ema_model.")
            | prefixed(others(s), "online_model.")
            | {"step": torch.zeros(1)}
        },
        "ema.ema_model",
    ),
    "ema without the fixed positions": (
        lambda s: {
            "model": others(s) | {"pos_embed": s["pos_embed"]},
            "ema": {k: v for k, v in s.items() if k != "pos_embed"},
        },
        "ema",
    ),
    "ema of Composer": (
        lambda s: {
            "state": {
                "model": others(s),
                "algorithms": [("EMA", {"ema_model": {"named_parameters_dict": s}})],
            }
        },
        "state.algorithms.EMA.ema_model.named_parameters_dict",
    ),
    "ema in a list": (lambda s: {"models": [others(s)], "ema_models": [s]}, "ema_models.0"),
    "ema in a tuple": (lambda s: {"model": others(s), "ema": (s, 0.99)}, "ema.0"),
    "ema of a callback": (
        lambda s: {"model": others(s), "callbacks": [{"ema": s}]},
        "callbacks.0.ema",
    ),
    "ema by its rate": (lambda s: {"model": others(s), "ema": {0.99: s}}, "ema.0.99"),
    "lists of other things": (
        lambda s: {"model": s, "rng": [("torch", torch.zeros(3)), {"mean": torch.zeros(1)}]},
        "model",
    ),
    "averaged model": (averaged, "weights"),
    "averaged model, every tensor in float32": (
        lambda s: {k: v.float() for k, v in averaged(s).items()},
        "weights",
    ),
    "averaged model, parallel": (lambda s: prefixed(averaged(s), "module."), "weights"),
    "averaged model in lightning": (
        lambda s: {"state_dict": prefixed(others(s), "net.") | prefixed(averaged(s), "mean.")},
        "state_dict.mean",
    ),
    "averaged model of one with a prefix": (lambda s: averaged(prefixed(s, "net.")), "net"),
    "torchvision": (lambda s: {"model": others(s), "model_ema": averaged(s)}, "model_ema"),
    "swa": (lambda s: {"model": others(s), "swa_model": averaged(s)}, "swa_model"),
    "swa without a counter": (lambda s: {"model": others(s), "swa_state": s}, "swa_state"),
    "a counter under another name": (lambda s: {"model": others(s), "mean": averaged(s)}, "mean"),
    "swa not begun": (lambda s: {"model": s, "swa_model": averaged(others(s), 0)}, "model"),
    "swa not begun, lightning": (
        lambda s: {
            "state_dict": prefixed(s, "net."),
            "callbacks": {
                "SWA": {"n_averaged": 0, "average_model_state": prefixed(others(s), "net.")}
            },
        },
        "state_dict.net",
    ),
    "swa begun, lightning": (
        lambda s: {
            "state_dict": prefixed(others(s), "net."),
            "callbacks": {"SWA": {"n_averaged": 2, "average_model_state": prefixed(s, "net.")}},
        },
        "callbacks.SWA.average_model_state.net",
    ),
    "averaged as it was saved": (
        lambda s: {
            "state_dict": prefixed(s, "net."),
            "current_model_state": prefixed(others(s), "net."),
            "averaging_state": {"n_averaged": torch.tensor(3)},
        },
        "state_dict.net",
    ),
    "swa's learning rates": (lambda s: {"model": s, "swa_scheduler": {"lr": [0.1]}}, "model"),
    "swa under other names": (
        lambda s: {"model": s, "swa": averaged({"a": torch.ones(2)})},
        "model",
    ),
    "a counter over other names": (
        lambda s: {"model": s, "mean": averaged({"a": torch.ones(2)})},
        "model",
    ),
    "ema empty": (lambda s: {"model": s, "ema": {}}, "model"),
    "ema of Composer under other names": (
        lambda s: {
            "state": {
                "model": s,
                "algorithms": [("EMA", {"ema_model": {"a": torch.ones(2)}})],
            }
        },
        "state.model",
    ),
    "ema deep down under other names": (
        lambda s: {"a": {"b": {"net": s, "c": [{"ema": {"a": torch.ones(2)}}]}}},
        "a.b.net",
    ),
    "ema of a list": (lambda s: {"model": s, "ema_state": [3]}, "model"),
    "ema in settings": (
        lambda s: {"model": s, "config": {"train": {"ema": {"decay": 0.99}}}},
        "model",
    ),
    "ema in an optimiser": (
        lambda s: {"model": s, "optimizer": {"state": {0: {"ema": torch.ones(2)}}}},
        "model",
    ),
    "ema of nothing": (lambda s: {"ema": {"decay": 0.99}, "model": s}, "model"),
    "ema None": (lambda s: {"model": s, "ema": None}, "model"),
    "ema in part": (
        lambda s: {"model": s, "ema": {k: v for k, v in others(s).items() if "blocks.1" not in k}},
        "model",
    ),
    "ema under other names": (
        lambda s: {"state_dict": prefixed(s, "model.") | squashed(others(s))},
        "state_dict.model",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_network_is_found_in_what_training_programs_save(tmp_path, form: str) -> None:
    wrap, source = FORMS[form]
    net = random_dit()
    torch.save(wrap(net.state_dict()), tmp_path / "net.pt")
    args = {"num_heads": 2, "num_classes": 3}
    again = load_backbone(
        BackboneConfig(kind="dit", checkpoint=str(tmp_path / "net.pt"), args=args)
    ).eval()
    assert (
        torch.equal(outputs(again), outputs(net))
        and again.state_dict().keys() == net.state_dict().keys()
    )
    assert inspect_checkpoint(tmp_path / "net.pt").source == source


@pytest.mark.parametrize(
    ("form", "note"),
    [
        (
            "ema empty",
            r"^ema holds no weights under the network's names, so they are those of model$",
        ),
        ("ema of nothing", "^ema holds no weights"),
        ("ema of Composer under other names", "^EMA holds no weights"),
        ("ema deep down under other names", "^ema holds no weights"),
        ("ema of a list", "^ema_state holds no weights"),
        ("ema of Composer", r"^the weights are those of .*EMA.*, averaged, not those of state"),
        (
            "ema in part",
            r"^ema lacks 10 of the 32 tensors of model, such as blocks\.1\..*, so the weights are "
            r"those of model$",
        ),
        ("ema without the fixed positions", "^ema lacks pos_embed, which is that of model$"),
        (
            "swa not begun",
            r"^swa_model has averaged nothing yet .* the weights are those of model$",
        ),
        ("swa not begun, lightning", r"^callbacks\.SWA\..* has averaged nothing yet"),
        ("swa under other names", "^swa holds no weights"),
        ("a counter over other names", "^mean holds no weights"),
        ("ema under other names", r"^model_ema holds no weights .* those of state_dict\.model$"),
    ],
)
def test_what_was_decided_about_averaged_weights_is_said(
    tmp_path, caplog, form: str, note: str
) -> None:
    torch.save(FORMS[form][0](random_dit().state_dict()), tmp_path / "net.pt")
    assert (
        len([n for n in inspect_checkpoint(tmp_path / "net.pt").notes if re.search(note, n)]) == 1
    )
    config = BackboneConfig(
        kind="dit", checkpoint=str(tmp_path / "net.pt"), args={"num_heads": 2, "num_classes": 3}
    )
    load_backbone(config)
    load_backbone(config)
    assert len(caplog.records) == 1  # said once


@pytest.mark.parametrize(
    "form",
    [
        *("ema", "swa", "torchvision", "averaged as it was saved", "swa's learning rates"),
        *("lists of other things", "ema in settings", "ema in an optimiser"),
    ],
)
def test_nothing_is_said_of_a_plain_training_state(tmp_path, caplog, form: str) -> None:
    torch.save(FORMS[form][0](random_dit().state_dict()), tmp_path / "net.pt")
    load_backbone(
        BackboneConfig(checkpoint=str(tmp_path / "net.pt"), args={"num_heads": 2, "num_classes": 3})
    )
    assert not caplog.records


@pytest.mark.parametrize(
    "earlier",
    [
        {"topk": [{"ema": 1}, {"ema": 2}]},
        {"ema_by_step": {1000: 1, 2000: 2}},
        {"ema_history": [1, 2]},
    ],
)
def test_a_history_of_averages_leaves_the_clear_one(earlier: dict) -> None:
    net = random_dit().state_dict()

    def filled(part):
        if isinstance(part, dict):
            return {k: filled(v) for k, v in part.items()}
        return list(map(filled, part)) if isinstance(part, list) else others(net)

    found = find_weights({"model": others(net), "ema": net, **filled(earlier)})
    assert found.source == "ema" and found.state["pos_embed"] is net["pos_embed"]
    assert len(found.notes) == 1 and "such weights in" in found.notes[0]


def test_a_history_of_weights_leaves_the_clear_ones_of_an_unusual_name() -> None:
    net = random_dit().state_dict()
    past = [others(net), others(net)]
    assert find_weights({"generator": net, "history": past}).source == "generator"


def test_an_average_from_a_list_is_named() -> None:
    net = random_dit().state_dict()
    found = find_weights({"model": others(net), "ema": [net]})
    assert found.notes == ("the weights are those of ema.0, averaged, not those of model",)


def test_long_lists_of_numbers_are_not_looked_into(monkeypatch) -> None:
    looked = []
    true_look = wrappers._candidates

    def look(data, *args):
        looked.append(data)
        return true_look(data, *args)

    monkeypatch.setattr(wrappers, "_candidates", look)
    numbers = [0.5] * 1000
    find_weights({"model": random_dit().state_dict(), "losses": numbers, "by_step": {3: 0.5}})
    assert not any(isinstance(data, float) for data in looked)


def test_an_average_of_nothing_alone_is_taken_and_said(tmp_path) -> None:
    for count in (0, 3):
        torch.save(averaged(random_dit().state_dict(), count), tmp_path / "net.pt")
        notes = inspect_checkpoint(tmp_path / "net.pt").notes
        assert any("nothing was averaged yet" in n for n in notes) == (count == 0)


@pytest.mark.parametrize(
    ("plain", "other", "taken"),
    [
        ("model", "modelEma", True),
        ("net", "netEMA", True),
        ("model", "EMAModel", True),
        ("model", "emaParams", True),
        ("model", "emamodel", True),
        ("model", "avg_model", True),
        ("model", "model_avg", True),
        ("model", "avg_0.999", True),
        ("model", "avg", True),
        ("model", "polyak", True),
        ("model", "teacher", False),
        ("model", "schemaModel", False),
        ("model", "emanated", False),
        ("model", "avg_pool", False),
    ],
)
def test_averaged_weights_under_other_names_are_taken_or_else_told_of(
    tmp_path, caplog, plain: str, other: str, taken: bool
) -> None:
    net = random_dit().state_dict()
    torch.save({plain: others(net), other: net}, tmp_path / "net.pt")
    state, source = read_state_dict(tmp_path / "net.pt")
    assert source == (other if taken else plain)
    assert torch.equal(state["pos_embed"], net["pos_embed"] + (not taken))
    load_backbone(
        BackboneConfig(checkpoint=str(tmp_path / "net.pt"), args={"num_heads": 2, "num_classes": 3})
    )
    said = f"the weights are those of {plain}, and there are such weights in {other} too; if"
    assert [said in r.getMessage() for r in caplog.records] == [True] * (not taken)


@pytest.mark.parametrize(
    "beside",
    [
        {"avg_loss": [torch.zeros(1)], "avg_pool": torch.zeros(2), "schema": {}, "avgModel": 3},
        {"teacher": {"patch_embed.proj.weight": torch.zeros(16, 1, 2, 2)}},  # no such network
    ],
)
def test_names_that_only_resemble_those_of_averages_say_nothing(tmp_path, beside: dict) -> None:
    torch.save({"model": random_dit().state_dict(), **beside}, tmp_path / "net.pt")
    info = inspect_checkpoint(tmp_path / "net.pt")
    assert info.source == "model"
    assert not [n for n in info.notes if "weights" in n]


@pytest.mark.parametrize("wrap", [lambda s: prefixed(s, "_orig_mod.module."), averaged])
def test_prefixes_of_a_u_vit_and_in_safetensors(tmp_path, wrap) -> None:
    net = UViT(img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=4, num_heads=2)
    save_file(wrap(net.state_dict()), tmp_path / "net.safetensors")
    config = BackboneConfig(
        kind="uvit", checkpoint=str(tmp_path / "net.safetensors"), args={"num_heads": 2}
    )
    again = load_backbone(config).state_dict()
    assert again.keys() == net.state_dict().keys()
    assert all(torch.equal(again[k], v) for k, v in net.state_dict().items())


@pytest.mark.parametrize(
    ("wrap", "names"),
    [
        (lambda s: s, {"a.weight", "a.bias"}),  # its own name, not a wrapper's
        (lambda s: prefixed(s, "module."), {"a.weight", "a.bias"}),
        (lambda s: prefixed(s, "model.module."), {"a.weight", "a.bias"}),
        (lambda s: {"model": s, "optimizer": dict(s)}, {"a.weight", "a.bias"}),
        (averaged, {"a.weight", "a.bias"}),
        (
            lambda s: s | {"n_averaged": torch.tensor(3)},  # counts nothing under `module.`
            {"a.weight", "a.bias", "n_averaged"},
        ),
        (
            lambda s: prefixed(s, "model.") | {"b": torch.zeros(1)},
            {"model.a.weight", "model.a.bias", "b"},
        ),
    ],
)
def test_names_of_an_unknown_network(tmp_path, wrap, names: set) -> None:
    torch.save(wrap(STATE), tmp_path / "net.pt")
    assert set(read_state_dict(tmp_path / "net.pt")[0]) == names


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        ({"epoch": 3, "lr": 0.1}, r"holds epoch \(int\), lr \(float\); save net\.state_dict"),
        ({}, "it holds an empty dict"),
        ([1, 2], "it holds list of 2"),
        (
            {"best": [1], "w": torch.zeros(2, 3), "sub": {"x": 1}},
            r"best \(list of 1\), w \(float32 \(2, 3\)\), sub \(dict of 1: x\)",
        ),
        ({str(i): i for i in range(12)}, "and 4 more; save"),
        (
            {"student": STATE, "student_ema": STATE, "teacher": STATE},
            "several sets of weights: student, student_ema, teacher; save the one",
        ),
        (
            {"gen": STATE, "disc": STATE},
            "several sets of weights: gen, disc; save the one that is meant",
        ),
        (
            {"ema_0.99": STATE, "ema_0.9999": STATE, "model": STATE},
            r"several sets of weights: ema_0\.99, ema_0\.9999",
        ),
        (
            {"decay": 0.9, "shadow_params": [torch.zeros(2)]},
            r"list without names \(shadow_params\), .*copy_to",
        ),
        (
            {"model": STATE, "ema": {"shadow_params": [torch.zeros(2)]}},
            r"list without names \(ema\.shadow_params\)",
        ),
        (
            {"state_dict": STATE, "optimizer_states": [{"opt": {}, "ema": (torch.zeros(2),)}]},
            r"list without names \(optimizer_states\.0\.ema\)",  # as NeMo's EMA optimiser
        ),
        (
            {"module.a": torch.zeros(1), "a": torch.zeros(1)},
            r"holds (module\.)?a twice, with and without a prefix",
        ),
    ],
)
def test_what_holds_no_network_is_described(tmp_path, data, rule: str) -> None:
    torch.save(data, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match=rule):
        read_state_dict(tmp_path / "net.pt")


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_a_diffusers_folder_with_wrapped_names(tmp_path, monkeypatch, caplog, suffix: str) -> None:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    small = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 1,
        "sample_size": 8,
        "num_layers": 2,
    }
    model = DiTTransformer2DModel(**small, out_channels=2, num_embeds_ada_norm=3).eval()
    model.transformer_blocks[1].norm1.emb.load_state_dict(
        model.transformer_blocks[0].norm1.emb.state_dict()
    )
    model.save_config(tmp_path)
    state = prefixed(model.state_dict(), "module._orig_mod.")
    name = f"diffusion_pytorch_model.{suffix}"
    torch.save({"state_dict": state}, tmp_path / name) if suffix == "bin" else save_file(
        state, tmp_path / name
    )
    wanted = model(
        torch.linspace(-1, 1, 128).view(2, 1, 8, 8),
        torch.tensor([3, 700]),
        torch.tensor([0, 2]),
        return_dict=False,
    )[0].detach()
    monkeypatch.setattr(logging.getLogger("diffusers"), "handlers", [caplog.handler])
    for kind in ["dit"] + ["diffusers"] * (suffix == "safetensors"):
        net = load_backbone(BackboneConfig(kind=kind, checkpoint=str(tmp_path))).eval()
        assert (outputs(net) - wanted).abs().max() < 1e-5
    assert not caplog.records
    if suffix == "safetensors":  # the control: diffusers itself says that no weights fit
        DiTTransformer2DModel.from_pretrained(tmp_path)
        assert any("newly initialized" in r.getMessage() for r in caplog.records)
