"""Network files: what is in one, and the network it holds.

Read: facebookresearch/DiT `.pt` (weights, or a whole training state), baofff/U-ViT `.pth`, safetensors, diffusers folders.
Written: safetensors that carry their own architecture.
"""

from __future__ import annotations

import inspect
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from asesearch.backbones import dit, uvit
from asesearch.backbones.base import Backbone
from asesearch.backbones.block_exits import SPECS
from asesearch.backbones.conversion import diffusers_dit_args, diffusers_to_dit, refuse_mismatch
from asesearch.backbones.dit import DiT
from asesearch.backbones.files import FORMAT, Contents, read_checkpoint, resolve
from asesearch.backbones.uvit import UViT
from asesearch.config import BackboneConfig
from asesearch.errors import CheckpointError, ConfigError
from asesearch.files import replacing

VERSION = "1"
NULL = "null_condition."  # begins the names of a null condition's tensors in the files we write
RESERVED = ("format", "version", "kind", "config")
BACKBONES: dict[str, type[DiT] | type[UViT]] = {"dit": DiT, "uvit": UViT}

#: Heads are not in the shapes of the weights: those of the official sizes, by width.
_HEADS = {
    "dit": {width: heads for _, width, heads in dit.PRESETS.values()},
    "uvit": {p["embed_dim"]: p["num_heads"] for p in uvit.PRESETS.values()},
}


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint holds.

    Attributes:
        kind: "dit", "uvit", or "diffusers" for what only diffusers' own code can run (its DiT is kind "dit").
        model: such as "DiT-XL/2", or "DiT, depth 12, width 64, patch 2" for a size without a name.
        input_size: H = W of the network's input (of the latent, for a latent network).
        learn_sigma: the variance is learned.
        num_classes: labels, the null label not counted; 0 for none.
        source: "ema" or "model" of a training state, "weights" of a file without that choice.
        args: constructor arguments; without `num_heads` if only the user can know them.
        metadata: text that the writer of a safetensors file added.
    """

    kind: str
    model: str
    input_size: int
    learn_sigma: bool
    num_classes: int
    source: str
    args: dict[str, Any]
    metadata: dict[str, str] = field(default_factory=dict)


# -- looking ---------------------------------------------------------------------------------------


def inspect_checkpoint(path: str | os.PathLike[str]) -> CheckpointInfo:
    """What a checkpoint holds, from its metadata or the shapes of its tensors. `path` may be `shipped:NAME`.

    Raises:
        CheckpointError: unreadable, or not a network that asesearch knows.
    """
    return _inspect(read_checkpoint(resolve(path)))


def _inspect(contents: Contents) -> CheckpointInfo:
    extra = {k: v for k, v in contents.metadata.items() if k not in RESERVED}
    if contents.config is not None:
        return _describe(*_from_diffusers(contents.config), contents.source, {})
    if contents.metadata.get("format") == FORMAT:
        return _describe(*_own_config(contents), contents.source, extra)
    return _describe(*_from_shapes(contents), contents.source, extra)


def _describe(kind: str, args: dict[str, Any], source: str, metadata: dict[str, str]) -> CheckpointInfo:
    name = _model_name(kind, args)
    if kind == "dit":
        size, sigma, labels = args["input_size"], args["learn_sigma"], args["num_classes"]
    elif kind == "uvit":
        size, sigma, labels = args["img_size"], False, max(0, args["num_classes"] - args["has_null_label"])
    else:
        config = args["transformer"]
        size, channels = config.get("sample_size"), config.get("in_channels")
        if type(size) is not int or type(channels) is not int:
            raise CheckpointError(f"{name}'s config must give sample_size and in_channels; got {size!r}, {channels!r}; mend it")
        sigma = config.get("out_channels") == 2 * channels
        labels = config.get("num_embeds_ada_norm", 0) if name == "DiTTransformer2DModel" else 0
    return CheckpointInfo(kind, name, size, sigma, labels, source, args, metadata)


def _from_diffusers(config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Kind and constructor arguments of what a diffusers folder holds: its DiT is ours too."""
    name = config.get("_class_name")
    if name == "Transformer2DModel":  # the class released folders were first made with
        name = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}.get(
            str(config.get("norm_type"))
        )
    if name not in SPECS:
        got = config.get("_class_name")
        raise CheckpointError(f"config.json must be of {', '.join(SPECS)}; got {got!r}, whose blocks asesearch can't drop")
    if name == "DiTTransformer2DModel":
        return "dit", diffusers_dit_args(config)
    return "diffusers", {"transformer": {**config, "_class_name": name}}


def _own_config(contents: Contents) -> tuple[str, dict[str, Any]]:
    meta = contents.metadata
    if meta.get("version") != VERSION:
        raise CheckpointError(
            f"this release reads version {VERSION} of {FORMAT}; got {meta.get('version')!r} in {contents.path}; "
            "install the asesearch release that wrote it"
        )
    try:
        kind, given = meta["kind"], json.loads(meta["config"])
        if kind == "diffusers":
            return kind, {"transformer": dict(given["transformer"])}
        cls = BACKBONES[kind]
        check_args(cls, given)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the metadata of {contents.path} is damaged: {error}; write it with save_backbone") from error
    return kind, {**{k: p.default for k, p in inspect.signature(cls).parameters.items()}, **given}


def _from_shapes(contents: Contents) -> tuple[str, dict[str, Any]]:
    shapes = {k: tuple(v.shape) for k, v in contents.state.items()}
    readers: dict[str, Callable[[Mapping[str, tuple[int, ...]]], dict[str, Any]]] = {"dit": _dit_args, "uvit": _uvit_args}
    kind = "dit" if "x_embedder.proj.weight" in shapes else "uvit" if "patch_embed.proj.weight" in shapes else None
    if any(k.startswith("transformer_blocks.") for k in shapes):
        raise CheckpointError(f"{contents.path} is the weight file of a diffusers folder; give the folder, with config.json")
    if "context_embed.weight" in shapes:
        raise CheckpointError(f"{contents.path} is a U-ViT for text; asesearch runs unconditional and class-conditional ones")
    try:
        if kind is None:
            raise KeyError("x_embedder.proj.weight (a DiT) or patch_embed.proj.weight (a U-ViT)")
        return kind, readers[kind](shapes)
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{contents.path} must be an official DiT or U-ViT; got {', '.join(list(shapes)[:5])} …, where an entry is missing "
            f"or misshapen: {error}; convert it to the official names"
        ) from error


def _count(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> int:
    return len({k.split(".")[1] for k in shapes if k.startswith(prefix)})


def _dit_args(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    width, channels, patch, _ = shapes["x_embedder.proj.weight"]
    out_channels = shapes["final_layer.linear.weight"][0] // patch**2
    args = {
        "input_size": math.isqrt(shapes["pos_embed"][1]) * patch,
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": width,
        "depth": _count(shapes, "blocks."),
        "mlp_ratio": shapes["blocks.0.mlp.fc1.weight"][0] / width,
        "num_classes": shapes["y_embedder.embedding_table.weight"][0] - 1,
        "learn_sigma": out_channels == 2 * channels,
    }
    return args | _heads("dit", width)


def _uvit_args(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    width, channels, patch, _ = shapes["patch_embed.proj.weight"]
    rows = shapes.get("label_emb.weight", (-1,))[0]
    args: dict[str, Any] = {
        "img_size": math.isqrt(shapes["pos_embed"][1] - (2 if rows > 0 else 1)) * patch,
        "patch_size": patch,
        "in_chans": channels,
        "embed_dim": width,
        "depth": 2 * _count(shapes, "out_blocks."),
        "mlp_ratio": shapes["mid_block.mlp.fc1.weight"][0] / width,
        "qkv_bias": "mid_block.attn.qkv.bias" in shapes,
        "mlp_time_embed": "time_embed.0.weight" in shapes,
        "num_classes": rows,
        "conv": "final_layer.weight" in shapes,
        "skip": "out_blocks.0.skip_linear.weight" in shapes,
    } | _heads("uvit", width)
    preset = _uvit_preset(args)
    return args | {"has_null_label": preset is None or uvit.PRESETS[preset].get("has_null_label", True)}


def _heads(kind: str, width: int) -> dict[str, int]:
    return {"num_heads": _HEADS[kind][width]} if width in _HEADS[kind] else {}


def _uvit_preset(args: Mapping[str, Any]) -> str | None:
    same = (n for n, p in uvit.PRESETS.items() if all(args.get(k) == v for k, v in p.items() if k != "has_null_label"))
    return next(same, None)


def _model_name(kind: str, args: Mapping[str, Any]) -> str:
    if kind == "diffusers":
        return str(args["transformer"].get("_class_name"))
    if kind == "uvit":
        text = f"U-ViT, depth {args['depth']}, width {args['embed_dim']}, patch {args['patch_size']}"
        return _uvit_preset(args) or text
    size = (args["depth"], args["hidden_size"], args.get("num_heads"))
    named = [n for n, s in dit.PRESETS.items() if s == size and args["patch_size"] in dit.PATCH_SIZES]
    if named:
        return f"{named[0]}/{args['patch_size']}"
    return f"DiT, depth {size[0]}, width {size[1]}, patch {args['patch_size']}"


# -- loading and saving ----------------------------------------------------------------------------


def check_args(cls: type[Backbone], args: Mapping[str, Any]) -> None:
    """Refuse constructor arguments that the network does not have, or of another type.

    Raises:
        ConfigError: naming the argument.
    """
    known = inspect.signature(cls).parameters
    for name, value in args.items():
        if name not in known:
            raise ConfigError(f"{cls.__name__} has no argument {name!r}; choose from {', '.join(known)}")
        default = known[name].default
        types = (bool,) if isinstance(default, bool) else (int,) if isinstance(default, int) else (int, float)
        fits = type(value) in types or (value is None and default is None)
        if not fits or (type(default) is int and default > 0 and value < 1):
            rule = "true or false" if types == (bool,) else "a positive integer" if types == (int,) else "a number"
            raise ConfigError(f"{cls.__name__}'s {name} must be {rule}; got {value!r}; correct the study file")


def load_backbone(config: BackboneConfig, seed: int = 0, null_condition: Mapping[str, Tensor] | None = None) -> Backbone:
    """The network of a study file: with the checkpoint's weights, or random ones, drawn from `seed`, if it names none.

    The architecture is the checkpoint's own; `preset` and then `args` override it. Weights become float32; those that
    were float32 are mapped from the file, not copied, so don't overwrite the file in place while the network lives.
    `null_condition` is for a network that takes prompts; by default it has that of a file of `save_backbone`.

    Raises:
        ConfigError: an unknown preset or argument, or heads that can't be known from the weights.
        CheckpointError: unreadable, of another kind, or entries that do not fit the network.
    """
    if config.kind == "diffusers":
        return _load_diffusers(config, null_condition)
    cls = BACKBONES[config.kind]
    args = {**(cls.preset_args(config.preset) if config.preset else {}), **config.args}
    check_args(cls, args)
    if config.checkpoint is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(**args)
    contents, info = _open(config, config.checkpoint)
    state = contents.state
    if contents.config is not None:
        state, _ = diffusers_to_dit(state, contents.config)
    args = {**info.args, **args}
    if "num_heads" not in args:
        raise ConfigError(
            f"the weights of {info.model} in {contents.path} don't tell the number of attention heads; "
            "set args.num_heads in [backbone]"
        )
    with torch.device("meta"):
        net = cls(**args)
    _fill(net, state, f"{contents.path} ({info.model})")
    return net


def _open(config: BackboneConfig, checkpoint: str) -> tuple[Contents, CheckpointInfo]:
    contents = read_checkpoint(resolve(checkpoint))
    info = _inspect(contents)
    if info.kind != config.kind:
        raise CheckpointError(
            f"{contents.path} holds {info.model}, kind {info.kind!r}; got kind = {config.kind!r} in [backbone]; change it"
        )
    return contents, info


def _load_diffusers(config: BackboneConfig, null_condition: Mapping[str, Tensor] | None) -> Backbone:
    """From a diffusers folder, or from a file that `save_backbone` wrote."""
    if config.checkpoint is None or config.preset is not None or config.args:
        raise ConfigError("kind = 'diffusers' needs a checkpoint folder, and takes neither preset nor args; correct [backbone]")
    from asesearch.backbones.diffusers_adapter import DiffusersBackbone, load_diffusers  # slow to import

    path = resolve(config.checkpoint)
    if path.is_dir():
        return load_diffusers(path, null_condition)
    contents, info = _open(config, config.checkpoint)
    own = {k.removeprefix(NULL): v for k, v in contents.state.items() if k.startswith(NULL)}
    net = DiffusersBackbone(**info.args, null_condition=null_condition or own)
    _fill(net, {k: v for k, v in contents.state.items() if not k.startswith(NULL)}, f"{path} ({info.model})")
    return net


def _fill(net: Backbone, state: dict[str, Tensor], where: str) -> None:
    """Give a network without storage its weights, after checking every name and shape."""
    needed = net.state_dict()
    misshapen = [
        f"{k} {tuple(state[k].shape)} instead of {tuple(v.shape)}"
        for k, v in needed.items()
        if k in state and state[k].shape != v.shape
    ]
    missing, surplus = [k for k in needed if k not in state], [k for k in state if k not in needed]
    refuse_mismatch(where, missing, surplus, misshapen, "check preset and args in [backbone]")
    net.load_state_dict({k: v.float() for k, v in state.items()}, assign=True)


def save_backbone(backbone: Backbone, path: str | os.PathLike[str], extra: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file that `load_backbone` needs no preset or args for.

    Args:
        backbone: a DiT, U-ViT or diffusers network; its null condition goes into the file too.
        path: written atomically; folders are made.
        extra: text to keep with the weights; `inspect_checkpoint` gives it back.

    Raises:
        ConfigError: another network, or a reserved key in `extra`.
    """
    kind = next((k for k, cls in BACKBONES.items() if type(backbone) is cls), None)
    if kind is None and backbone.config.keys() == {"transformer"}:  # as `DiffusersBackbone`, without importing diffusers
        kind = "diffusers"
    if kind is None:
        raise ConfigError(f"only DiT, U-ViT and diffusers networks can be saved; got {type(backbone).__name__}; use one")
    taken = set(RESERVED) & (extra or {}).keys()
    if taken:
        raise ConfigError(f"extra must not use the keys {', '.join(RESERVED)}; got {', '.join(sorted(taken))}; rename it")
    own = {"format": FORMAT, "version": VERSION, "kind": kind, "config": json.dumps(backbone.config)}
    tensors = backbone.state_dict() | {f"{NULL}{k}": v for k, v in (backbone.null_condition or {}).items()}
    with replacing(path) as part:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, part, {**own, **(extra or {})})
