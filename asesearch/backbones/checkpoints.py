"""Network files: what is in one, and the network it holds.

Read: facebookresearch/DiT `.pt` (weights, or a whole training state), baofff/U-ViT `.pth`,
safetensors, diffusers folders; what training programs wrap around weights and names is taken off.
What we write ourselves: `saving`.
"""

from __future__ import annotations

import inspect
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from asesearch.backbones import dit
from asesearch.backbones.arguments import check_args, made
from asesearch.backbones.base import Backbone
from asesearch.backbones.block_exits import SPECS
from asesearch.backbones.conversion import diffusers_dit_args, diffusers_to_dit, refuse_mismatch
from asesearch.backbones.dit import DiT
from asesearch.backbones.exit_weights import EXITS, ExitWeights, share
from asesearch.backbones.files import FORMAT, Contents, read_checkpoint, resolve
from asesearch.backbones.finite import (
    as_float32,
    refuse_not_finite,
    refuse_untrained,
    refuse_zero,
)
from asesearch.backbones.folders import class_name
from asesearch.backbones.scheduler import check_betas, check_options, refuse_prediction
from asesearch.backbones.shapes import Architecture, from_shapes, uvit_preset
from asesearch.backbones.uvit import UViT, trained_under
from asesearch.config import BackboneConfig, DiffusionConfig
from asesearch.errors import CheckpointError, ConfigError
from asesearch.files import loads, warn_once

VERSION = "1"
NULL = "null_condition."  # begins the names of a null condition's tensors in the files we write
RESERVED = ("format", "version", "kind", "config")
BACKBONES: dict[str, type[DiT] | type[UViT]] = {"dit": DiT, "uvit": UViT}

#: Names of tensors that averages of weights and diffusion processes keep beside those of a network.
_BESIDE = re.compile(
    r"decay|num_updates|initted|(?:global_)?step|betas|sigmas|timesteps|loss_weights?"
    r"|(?:\w+_)?alphas?(?:_\w+)?|(?:posterior|sqrt|log|lvlb|p2)_\w+"
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint holds.

    Attributes:
        kind: "dit", "uvit", or "diffusers" for what only diffusers' own code can run (its DiT is
            kind "dit").
        model: such as "DiT-XL/2", or "DiT, depth 12, width 64, patch 2" for a size without a name.
        input_size: H = W of the network's input (of the latent, for a latent network).
        learn_sigma: the variance is learned.
        num_classes: labels, the null label not counted; 0 for none.
        source: where in the file the weights were: such as "ema" or "model" of a training state;
            "weights" for the top.
        args: constructor arguments; without `num_heads` if only the user can know them.
        metadata: text that the writer of a safetensors file added.
        notes: what the file does not tell and was taken to be usual, and how the weights were
            chosen; a sentence each.
    """

    kind: str
    model: str
    input_size: int
    learn_sigma: bool
    num_classes: int
    source: str
    args: dict[str, Any]
    metadata: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


# -- looking ---------------------------------------------------------------------------------------


def inspect_checkpoint(path: str | os.PathLike[str]) -> CheckpointInfo:
    """What a checkpoint holds, from its metadata or the shapes of its tensors. `path` may be
    `shipped:NAME`.

    Raises:
        CheckpointError: unreadable, or not a network that asesearch knows.
    """
    contents = read_checkpoint(resolve(path))
    return _describe(_architecture(contents, {}), contents)


def _architecture(contents: Contents, given: Mapping[str, Any]) -> Architecture:
    """The network of a checkpoint; `given` are constructor arguments of the study file."""
    if contents.config is not None:
        return Architecture(*_from_diffusers(contents.config))
    if contents.metadata.get("format") == FORMAT:
        return Architecture(*_own_config(contents))
    return from_shapes(contents, given)


def _describe(found: Architecture, contents: Contents) -> CheckpointInfo:
    kind = found.kind
    args = found.args
    metadata = {} if contents.config is not None else contents.metadata
    extra = {k: v for k, v in metadata.items() if k not in RESERVED}
    notes = (*contents.notes, *found.assumed)
    if any(k.startswith(EXITS) for k in contents.state):
        notes = (*notes, "early exits have weights of their own beside those for full depth")
    name = _model_name(kind, args)
    if kind == "dit":
        size = args["input_size"]
        sigma = args["learn_sigma"]
        labels = args["num_classes"]
    elif kind == "uvit":
        size = args["img_size"]
        sigma = False
        labels = max(0, args["num_classes"] - args["has_null_label"])
    else:
        config = args["transformer"]
        size = config.get("sample_size")
        channels = config.get("in_channels")
        if type(size) is not int or type(channels) is not int:
            raise CheckpointError(
                f"{name}'s config must give sample_size and in_channels; got {size!r}, "
                f"{channels!r}; fix it"
            )
        sigma = config.get("out_channels") == 2 * channels
        labels = config.get("num_embeds_ada_norm", 0) if name == "DiTTransformer2DModel" else 0
    return CheckpointInfo(kind, name, size, sigma, labels, contents.source, args, extra, notes)


def _from_diffusers(config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Kind and constructor arguments of what a diffusers folder holds: its DiT is ours too."""
    name = class_name(config)
    if name not in SPECS:
        got = config.get("_class_name")
        raise CheckpointError(
            f"config.json must be of {', '.join(SPECS)}; got {got!r}, whose blocks asesearch can't "
            "drop"
        )
    if name == "DiTTransformer2DModel":
        return "dit", diffusers_dit_args(config)
    return "diffusers", {"transformer": {**config, "_class_name": name}}


def _own_config(contents: Contents) -> tuple[str, dict[str, Any]]:
    meta = contents.metadata
    if meta.get("version") != VERSION:
        raise CheckpointError(
            f"this release reads version {VERSION} of {FORMAT}; got {meta.get('version')!r} in "
            f"{contents.path}; install the asesearch release that wrote it"
        )
    try:
        kind = meta["kind"]
        given = loads(meta["config"])
        if kind == "diffusers":
            return kind, {"transformer": dict(given["transformer"])}
        cls = BACKBONES[kind]
        check_args(cls, given)
        args = {**{k: p.default for k, p in inspect.signature(cls).parameters.items()}, **given}
        _check_sizes(kind, args, contents.state)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"the metadata of {contents.path} is damaged: {error}; write it with save_backbone"
        ) from error
    return kind, args


def _check_sizes(kind: str, args: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Refuse sizes that are not those of the weights, before a network of them is made.

    Raises:
        ValueError: naming what differs.
    """
    size = args["input_size" if kind == "dit" else "img_size"]
    width = args["hidden_size" if kind == "dit" else "embed_dim"]
    extras = 0 if kind == "dit" else 1 + (args["num_classes"] > 0)  # tokens before the patches
    tokens = extras + (size // args["patch_size"]) ** 2
    positions = state.get("pos_embed", torch.empty(0)).shape
    if positions != (1, tokens, width) or args["depth"] > len(state):
        raise ValueError(
            f"it tells of {args['depth']} blocks and {tokens} tokens of width {width}, and the "
            f"weights are {len(state)} tensors with positions of shape {tuple(positions)}"
        )


def _model_name(kind: str, args: Mapping[str, Any]) -> str:
    if kind == "diffusers":
        return str(args["transformer"].get("_class_name"))
    if kind == "uvit":
        text = (
            f"U-ViT, depth {args['depth']}, width {args['embed_dim']}, patch {args['patch_size']}"
        )
        return uvit_preset(args) or text
    size = (args["depth"], args["hidden_size"], args.get("num_heads"))
    named = [
        n for n, s in dit.PRESETS.items() if s == size and args["patch_size"] in dit.PATCH_SIZES
    ]
    if named:
        return f"{named[0]}/{args['patch_size']}"
    return f"DiT, depth {size[0]}, width {size[1]}, patch {args['patch_size']}"


# -- loading and saving ----------------------------------------------------------------------------


def load_backbone(
    config: BackboneConfig, seed: int = 0, null_condition: Mapping[str, Tensor] | None = None
) -> Backbone:
    """The network of a study file: with the checkpoint's weights, or random ones, drawn from
    `seed`, if it names none.

    The architecture is the checkpoint's own; `preset` and then `args` override it, but for heads
    that it tells of itself. Of weights under official names the shapes tell most of it;
    `CheckpointInfo.notes` says what was taken to be usual, and a log line what may well not be.
    Weights become float32; those that were float32 are mapped from the file, not copied, so don't
    overwrite the file in place while the network lives. `null_condition` is for a network that
    takes prompts; by default it has that of a file of `save_backbone`.

    Raises:
        ConfigError: an unknown preset or argument, one that does not fit the weights, or heads that
            they don't tell, or tell otherwise.
        CheckpointError: unreadable, of another kind, entries that do not fit the network,
            numbers that are not finite, zeros where no training leaves them, or a diffusers
            pipeline that takes the output for something else than noise.
    """
    return _loaded(config, seed, null_condition)[0]


def _loaded(
    config: BackboneConfig, seed: int, null_condition: Mapping[str, Tensor] | None
) -> tuple[Backbone, Mapping[str, Any]]:
    """As `load_backbone`; and the options of the training, where the checkpoint has them."""
    if config.kind == "diffusers":
        return _load_diffusers(config, null_condition), {}
    cls = BACKBONES[config.kind]
    args = {**(cls.preset_args(config.preset) if config.preset else {}), **config.args}
    check_args(cls, args)
    if config.checkpoint is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return made(cls, args), {}
    contents, info, notes = _open(config, args)
    state = contents.state
    if contents.config is not None:
        refuse_prediction(contents.path)
        state, _ = diffusers_to_dit(state, contents.config)
    told = info.args.get("num_heads")
    args = info.args | args
    if told is not None and args["num_heads"] != told:
        raise ConfigError(
            f"{contents.path} says that its network has num_heads = {told}; got num_heads = "
            f"{args['num_heads']} in [backbone], by preset or args; leave it out, or give the "
            "weights alone where the file tells of another network"
        )
    if "num_heads" not in args:
        raise ConfigError(
            f"the weights of {info.model} in {contents.path} don't tell the number of attention "
            "heads; set args.num_heads in [backbone] to that of their training"
        )

    def empty() -> Backbone:
        with torch.device("meta"), _NothingDrawn():
            return made(cls, args)

    net = _filled(empty, state, f"{contents.path} ({info.model})")
    for note in notes:
        warn_once(_log, note)
    return net, contents.options


def load_saved(
    path: str | os.PathLike[str],
    kind: Literal["dit", "uvit", "diffusers"],
    device: torch.device | str = "cpu",
) -> Backbone:
    """The network that `save_backbone` wrote to a file, in eval mode.

    Args:
        path: the file.
        kind: of the network.
        device: where to put it.

    Raises:
        ConfigError, CheckpointError: see `load_backbone`.
    """
    config = BackboneConfig(kind=kind, checkpoint=str(path))
    return load_backbone(config).to(device).eval()


def load_trained(
    config: BackboneConfig,
    diffusion: DiffusionConfig,
    seed: int = 0,
    null_condition: Mapping[str, Tensor] | None = None,
    *,
    untrained: bool = False,
) -> Backbone:
    """As `load_backbone`, and what is known of the training must be as `diffusion` has it; a log
    line where the shapes are those of a network released under another process.

    Args:
        untrained: the checkpoint may be from before any training, since that is what follows.

    Raises:
        ConfigError, CheckpointError: as said there, or by `scheduler.check_betas`; options in the
            checkpoint that contradict `diffusion`, or weights of which nothing was trained.
    """
    check_betas(config, diffusion)
    net, options = _loaded(config, seed, null_condition)
    if config.checkpoint is not None:
        check_options(config.checkpoint, options, diffusion)
        if not untrained:
            refuse_untrained(net.state_dict(), config.checkpoint)
    name = uvit_preset(net.config) if config.kind == "uvit" else None
    if name is not None and config.checkpoint is not None:
        right = trained_under(name)
        given = {key: value for key, value in diffusion.model_dump().items() if key in right}
        if given != right:
            warn_once(
                _log,
                f"{config.checkpoint} has the shapes of {name}, which was released trained under "
                f"{_in_toml(right)}; [diffusion] has {_in_toml(given)}; "
                "change it, unless these weights were trained so",
            )
    return net


def _in_toml(values: Mapping[str, Any]) -> str:
    return ", ".join(f'{k} = "{v}"' for k, v in values.items())


class _NothingDrawn(TorchFunctionMode):
    """Inside, random weights are not drawn: on the device "meta", where there are none, drawing
    them loads torch's compiler, which takes seconds."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init" and "tensor" in given:
            return given["tensor"]
        return func(*args, **given)


def _open(
    config: BackboneConfig, given: Mapping[str, Any]
) -> tuple[Contents, CheckpointInfo, list[str]]:
    """What a checkpoint holds, and what to say if it loads."""
    assert config.checkpoint is not None
    contents = read_checkpoint(resolve(config.checkpoint))
    found = _architecture(contents, given)
    info = _describe(found, contents)
    if info.kind != config.kind:
        raise CheckpointError(
            f"{contents.path} holds {info.model}, kind {info.kind!r}; got kind = {config.kind!r} "
            "in [backbone]; change it"
        )
    return (
        contents,
        info,
        [f"{contents.path}: {note}" for note in (*contents.notes, *found.doubtful)],
    )


def _load_diffusers(
    config: BackboneConfig, null_condition: Mapping[str, Tensor] | None
) -> Backbone:
    """From a diffusers folder, or from a file that `save_backbone` wrote."""
    if config.checkpoint is None or config.preset is not None or config.args:
        raise ConfigError(
            "kind = 'diffusers' needs a checkpoint folder, and takes neither preset nor args; "
            "correct [backbone]"
        )
    # slow to import
    from asesearch.backbones.diffusers_adapter import DiffusersBackbone, load_diffusers

    path = resolve(config.checkpoint)
    if path.is_dir():
        return load_diffusers(path, null_condition)
    contents, info, _ = _open(config, {})
    own = {k.removeprefix(NULL): v for k, v in contents.state.items() if k.startswith(NULL)}

    def empty() -> Backbone:
        return DiffusersBackbone(**info.args, null_condition=null_condition or own)

    state = {k: v for k, v in contents.state.items() if not k.startswith(NULL)}
    return _filled(empty, state, f"{path} ({info.model})")


def _filled(empty: Callable[[], Backbone], state: dict[str, Tensor], where: str) -> Backbone:
    """A network with its weights; where the file has second ones for early exits, with both."""
    first = {k: v for k, v in state.items() if not k.startswith(EXITS)}
    second = {k.removeprefix(EXITS): v for k, v in state.items() if k.startswith(EXITS)}
    net = empty()
    _fill(net, first, where)
    if not second:
        return net
    exits = empty()
    _fill(exits, {**first, **second}, f"{where}, early exits")
    share(exits, net, {k for k, _ in exits.named_parameters() if k not in second})
    return ExitWeights(net, exits)


def _fill(net: Backbone, state: dict[str, Tensor], where: str) -> None:
    """Give a network without storage its weights, after checking every name and shape."""
    needed = net.state_dict()
    misshapen = [
        f"{k} {tuple(state[k].shape)} instead of {tuple(v.shape)}"
        for k, v in needed.items()
        if k in state and state[k].shape != v.shape
    ]
    missing = [k for k in needed if k not in state]
    unexpected = [k for k in state if k not in needed]
    fix = "check preset and args in [backbone]"
    if not (missing or misshapen) and all(map(_BESIDE.fullmatch, unexpected)):
        fix = "they are of the averaging or the diffusion process: save the weights without them"
    refuse_mismatch(where, missing, unexpected, misshapen, fix)
    converted = {k: as_float32(k, v, where) for k, v in state.items()}
    refuse_not_finite(converted, where)
    refuse_zero(converted, where)
    net.load_state_dict(converted, assign=True)
