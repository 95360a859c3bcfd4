"""The architecture of a network that is told by its weights alone: what their shapes say, and the
rest.

Not in the shapes, and taken as the official code has it: activation, norm eps, spacing of the
timestep frequencies, scale of the attention, and that the network predicts noise. Heads are known
where the whole shape is that of an official network. Whether the last label is the null label is
asked of the study file and of the training's options beside the weights; else labels are taken as
the official training makes them, which `Architecture.assumed` says.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from asesearch.backbones import dit, uvit
from asesearch.backbones.files import Contents
from asesearch.backbones.wrappers import FLAGS, FLOWS, HINTS, NOISE_FLAGS, PATH, PREDICTIONS
from asesearch.errors import CheckpointError, ConfigError

Shapes = Mapping[str, tuple[int, ...]]
OFFICIAL_DROPOUT = 0.1  # of labels, in DiT's training
IMAGENET_ROWS = 1001  # of label embeddings: 1,000 classes and the null label

#: Names by which the original weights of other networks are known: what they are, and their
#: diffusers version.
_OTHERS = {
    "csize_embedder.": ("PixArt", None),  # of 1024 pixels, which has the keys of the next too
    "t_block.": ("PixArt", "PixArt-alpha/PixArt-XL-2-256x256"),
    "joint_blocks.": ("Stable Diffusion 3", "stabilityai/stable-diffusion-3-medium-diffusers"),
    "double_blocks.": ("FLUX", None),
}
#: Last parts of the names of FSDP's flattened parameters.
_FLAT = ("_flat_param", "flat_param")
#: Words that say that a network predicts noise, and those that may stand beside them.
_NOISE = {"noise", "epsilon", "eps"}
_FILLING = {"pred", "predict", "prediction", "theta"}
_TIMES = {"time_offset"}
#: What a network predicts that is no noise, written together and without what stands around it.
_OTHERWISE = re.compile(
    r"(?:modelmeantype)?(?:pred(?:ict(?:ion|s)?)?)?"
    r"(?:v(?:el(?:ocity)?)?|x0|xstart|startx|previousx|sample|rf|cfm|flow|(?:conditional)?flowmatching"
    r"|rectifiedflow)"
    r"(?:pred(?:iction)?|param(?:eteri[sz]ation)?|objective|target|loss)?"
)
#: Of SiT's paths from data to noise, those that no diffusion process of ours has.
_PATHS = ("linear", "gvp")


@dataclass(frozen=True)
class Architecture:
    """What network a checkpoint holds.

    Attributes:
        kind: as in `BackboneConfig`.
        args: constructor arguments; without `num_heads` if only the user can know them.
        assumed: what could not be read off and was taken to be usual, a sentence each.
        doubtful: those of `assumed` that a user should hear of.
    """

    kind: str
    args: dict[str, Any]
    assumed: tuple[str, ...] = ()
    doubtful: tuple[str, ...] = ()


def from_shapes(contents: Contents, given: Mapping[str, Any]) -> Architecture:
    """The network of weights under official names.

    Args:
        contents: of the checkpoint.
        given: constructor arguments of the study file.

    Raises:
        CheckpointError: not a network that asesearch runs.
        ConfigError: labels in `given` that do not fit the weights.
    """
    shapes = {k: tuple(v.shape) for k, v in contents.state.items()}
    _refuse_others(contents, shapes)
    kind = _kind(shapes)
    readers: dict[str, Callable[[Shapes], dict[str, Any]]] = {"dit": _dit_args, "uvit": _uvit_args}
    try:
        if kind is None:
            raise KeyError("x_embedder.proj.weight (a DiT) or patch_embed.proj.weight (a U-ViT)")
        args = readers[kind]({"pos_embed": (1, 4, 1), **shapes})
        rows = _label_rows(kind, shapes)
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{contents.path} must be an official DiT or U-ViT; got {', '.join(list(shapes)[:5])} "
            f"…, where an entry is missing or misshapen: {error}; convert it to the official names"
        ) from error
    _check_positions(contents, shapes)
    heads, said, unsure_heads = _heads(kind, args, rows, given, contents.options)
    args |= heads
    if kind == "dit":
        labels, unsure = _dit_labels(rows, given, contents)
    else:
        labels, unsure = _uvit_labels(rows, given, args)
    times, counted = _times(kind, args, given)
    doubtful = tuple(filter(None, (unsure_heads, unsure)))
    notes = tuple(filter(None, (*said, counted, *doubtful)))
    return Architecture(kind, args | labels | times, notes, doubtful)


def _kind(shapes: Shapes) -> str | None:
    if "x_embedder.proj.weight" in shapes:
        return "dit"
    return "uvit" if "patch_embed.proj.weight" in shapes else None


def _check_positions(contents: Contents, shapes: Shapes) -> None:
    """Refuse weights whose positions don't tell the input size."""
    if "pos_embed" not in shapes:
        raise CheckpointError(
            f"{contents.path} lacks pos_embed, which tells the input size; save net.state_dict() "
            "as it is: a DiT's positions are in it, though they are not trained"
        )
    if len(shapes["pos_embed"]) != 3:
        raise CheckpointError(
            f"pos_embed in {contents.path} must be of shape (1, tokens, width); got "
            f"{shapes['pos_embed']}; save it as the network has it"
        )


def _refuse_others(contents: Contents, shapes: Shapes) -> None:
    """Refuse weights of networks that asesearch reads elsewhere, or not at all."""
    path = contents.path
    if flat := [k for k in shapes if k.split(".")[-1] in _FLAT]:
        raise CheckpointError(
            f"{path} must hold the weights by name; got {flat[0]}, in which FSDP keeps those of "
            "several layers, or a part of them, together; save a full state dict where it was "
            "trained, and give that file"
        )
    if any(k.startswith("transformer_blocks.") for k in shapes):
        raise CheckpointError(
            f"{path} is the weight file of a diffusers folder; give the folder, with config.json"
        )
    if "context_embed.weight" in shapes:
        raise CheckpointError(
            f"{path} is a U-ViT for text; asesearch runs unconditional and class-conditional ones"
        )
    for begin, (name, folder) in _OTHERS.items():
        if any(k.startswith(begin) for k in shapes):
            fix = "asesearch can't run it"
            if name == "PixArt":
                fix = "a study has no data with its sizes and aspect ratios: take one of 256 or 512"
            if folder is not None:
                fix = (
                    f"give the folder of its diffusers version, such as {folder}, with kind = "
                    "'diffusers'"
                )
            raise CheckpointError(
                f"{path} holds {name}'s weights as its authors released them; {fix}"
            )
    options = contents.options
    for key, is_other in _IS_OTHER.items():
        value = options.get(key)
        if value is not None and is_other(value) and not (key == PATH and _says_eps(options)):
            raise CheckpointError(
                f"{path} was trained with {key} = {value!r}, as its options say; asesearch's DiT "
                "and U-ViT predict noise; give a network that does, or the weights alone where "
                "these options are not theirs"
            )


def _is_not_noise(value: str) -> bool:
    """Whether an option's value, unlike "EPSILON" or "eps_theta", names not noise alone."""
    words = set(re.findall(r"[^\W_]+", value.lower()))
    return not words & _NOISE or not words <= _NOISE | _FILLING


def _says_eps(options: Mapping[str, Any]) -> bool:
    """Whether options say that there is no flow, or that the network predicts what all but SiT,
    which says noise, call eps: then `path_type` is no path of SiT's."""
    predicted = (str(options.get(key, "")) for key in PREDICTIONS)
    eps = any(not _is_not_noise(value) and "eps" in value.lower() for value in predicted)
    return eps or any(options.get(key) is False for key in FLOWS)


def _names_another(value: str) -> bool:
    """Whether an option's value, such as "pred_v" or "START_X", names something else than noise
    that a network may predict; "mse" or "models.DiT" does not."""
    return _OTHERWISE.fullmatch("".join(re.findall(r"[^\W_]+", value.lower()))) is not None


#: By training option: whether its value says that the network predicts something else than noise.
_IS_OTHER: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(PREDICTIONS, _is_not_noise),
    **dict.fromkeys(HINTS, _names_another),
    **dict.fromkeys(FLAGS, bool),
    **dict.fromkeys(NOISE_FLAGS, operator.not_),
    PATH: lambda value: value.lower() in _PATHS,
}


def _count(shapes: Shapes, prefix: str) -> int:
    return len({k.split(".")[1] for k in shapes if k.startswith(prefix)})


def _ratio(hidden: int, width: int) -> float:
    """The `mlp_ratio` that gives so many hidden units: int(width * ratio)."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _dit_args(shapes: Shapes) -> dict[str, Any]:
    width, channels, patch, _ = shapes["x_embedder.proj.weight"]
    out_channels = shapes["final_layer.linear.weight"][0] // patch**2
    return {
        "input_size": math.isqrt(shapes["pos_embed"][1]) * patch,
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": width,
        "depth": _count(shapes, "blocks."),
        "mlp_ratio": _ratio(shapes["blocks.0.mlp.fc1.weight"][0], width),
        "learn_sigma": out_channels == 2 * channels,
    }


def _uvit_args(shapes: Shapes) -> dict[str, Any]:
    width, channels, patch, _ = shapes["patch_embed.proj.weight"]
    rows = _label_rows("uvit", shapes)
    return {
        "img_size": math.isqrt(shapes["pos_embed"][1] - (2 if rows > 0 else 1)) * patch,
        "patch_size": patch,
        "in_chans": channels,
        "embed_dim": width,
        "depth": 2 * _count(shapes, "out_blocks."),
        "mlp_ratio": _ratio(shapes["mid_block.mlp.fc1.weight"][0], width),
        "qkv_bias": "mid_block.attn.qkv.bias" in shapes,
        "mlp_time_embed": "time_embed.0.weight" in shapes,
        "num_classes": rows,
        "conv": "final_layer.weight" in shapes,
        "skip": "out_blocks.0.skip_linear.weight" in shapes,
    }


def _label_rows(kind: str, shapes: Shapes) -> int:
    """Rows of the label embedding; -1 for a network without."""
    if kind == "dit":
        rows = shapes["y_embedder.embedding_table.weight"][0]
        if rows == 0:
            raise ValueError("y_embedder.embedding_table.weight has no rows")
        return rows
    return shapes.get("label_emb.weight", (-1,))[0]


# -- heads -----------------------------------------------------------------------------------------


def _heads(
    kind: str,
    args: Mapping[str, Any],
    rows: int,
    given: Mapping[str, Any],
    options: Mapping[str, Any],
) -> tuple[dict[str, int], tuple[str, ...], str]:
    """The number of heads, if it can be known; what was assumed; and what was where the network is
    not a released one by what it was trained on."""
    told = options.get("num_heads")
    width = args["hidden_size" if kind == "dit" else "embed_dim"]
    if told is not None and told > 0 and width % told == 0:
        return {"num_heads": told}, (), ""
    if "num_heads" in given:
        return {"num_heads": given["num_heads"]}, (), ""
    official = _official(kind, args)
    if official is None:
        return {}, (), ""
    name, heads = official
    known = {"num_heads": heads}
    if kind == "dit":
        released = args["in_channels"] == 4 and args["input_size"] in (32, 64)
        released = released and rows == IMAGENET_ROWS
    else:
        released = uvit_preset({**args, **known}) is not None
    said = f"{heads} attention heads, as {name} has, whose shape this is"
    if released:
        return known, (said,), ""
    unsure = (
        f"{said}: weights don't tell the number; set args.num_heads in [backbone] to that of "
        f"their training, or to {heads} to say so"
    )
    return known, (), unsure


def _official(kind: str, args: Mapping[str, Any]) -> tuple[str, int] | None:
    """Name and heads of the official network of this architecture, whatever it was trained on."""
    if kind == "dit":
        for name, (depth, width, heads) in dit.PRESETS.items():
            same = (args["depth"], args["hidden_size"], args["mlp_ratio"]) == (depth, width, 4)
            if same and args["patch_size"] in dit.PATCH_SIZES:
                return f"{name}/{args['patch_size']}", heads
        return None
    usual = {"mlp_ratio": 4, "qkv_bias": False, "mlp_time_embed": False, "skip": True}
    for name, preset in uvit.PRESETS.items():
        data = (
            *("img_size", "in_chans", "num_classes", "num_heads"),
            *("has_null_label", "time_offset"),
        )
        wanted = usual | {k: v for k, v in preset.items() if k not in data}
        if all(args[k] == v for k, v in wanted.items()):
            return name.rpartition("-")[0], preset["num_heads"]
    return None


def uvit_preset(args: Mapping[str, Any]) -> str | None:
    """The released U-ViT of these shapes."""
    others = ("has_null_label", "time_offset")

    def same(preset: Mapping[str, Any]) -> bool:
        return all(args.get(k) == v for k, v in preset.items() if k not in others)

    return next((name for name, preset in uvit.PRESETS.items() if same(preset)), None)


def _times(
    kind: str, args: Mapping[str, Any], given: Mapping[str, Any]
) -> tuple[dict[str, Any], str]:
    """The argument about timesteps that a released network has, and what was assumed."""
    name = uvit_preset(args) if kind == "uvit" else None
    offset = {} if name is None else {k: v for k, v in uvit.PRESETS[name].items() if k in _TIMES}
    if not offset or _TIMES & given.keys():
        return {}, ""
    return offset, (
        f"the weights have the shapes of {name}, which counts timesteps from 1, and so they are "
        "counted; set args.time_offset in [backbone] to 0 for a network that counts from 0, or to "
        "1 to say so"
    )


# -- labels ----------------------------------------------------------------------------------------


def _dit_labels(
    rows: int, given: Mapping[str, Any], contents: Contents
) -> tuple[dict[str, Any], str]:
    """Arguments about labels, and what was assumed.

    DiT has a row for each class and, if labels were dropped in training, one more: the null label.
    """
    classes = given.get("num_classes")
    dropout = given.get("class_dropout_prob")
    unsure = ""
    if classes is None and dropout is not None:
        classes = rows - (dropout > 0)
        if classes < 1:
            raise ConfigError(
                f"the one label embedding in {contents.path} is that of num_classes = 1 (no null "
                f"label); got class_dropout_prob = {dropout} in [backbone], which needs a null "
                "label; leave it out"
            )
    if classes is None:
        classes, unsure = _told_classes(rows, contents.options)
    null = rows - classes
    if null not in (0, 1) or classes < 1:
        raise ConfigError(
            f"the {rows} label embeddings in {contents.path} are those of num_classes = {rows} (no "
            f"null label){f' or {rows - 1} (and the null label)' if rows > 1 else ''}; got "
            f"{classes} in [backbone]; correct args.num_classes"
        )
    if dropout is not None and (dropout > 0) != bool(null):
        raise ConfigError(
            f"{rows} label embeddings in {contents.path} and num_classes = {classes} mean a "
            f"network {'with' if null else 'without'} a null label; got class_dropout_prob = "
            f"{dropout}; leave it out"
        )
    if dropout is None:
        dropout = OFFICIAL_DROPOUT if null else 0.0
    return {"num_classes": classes, "class_dropout_prob": dropout}, unsure


def _told_classes(rows: int, options: Mapping[str, Any]) -> tuple[int, str]:
    """The number of classes by the training's options, or by what is usual; and what was
    assumed."""
    told = options.get("num_classes")
    dropout = options.get("class_dropout_prob")
    if told in (rows, rows - 1) and told > 0:
        return told, ""
    if dropout is not None and rows - (dropout > 0) > 0:
        return rows - (dropout > 0), ""
    if rows == 1:
        return 1, ""  # a null label alone makes no network
    if rows == IMAGENET_ROWS:
        return rows - 1, ""
    return rows - 1, (
        f"{rows} label embeddings are taken for {rows - 1} class{'es' * (rows > 2)} and the null "
        "label, as the "
        f"official training makes them; set args.num_classes = {rows} in [backbone] if no labels "
        f"were dropped in training, or {rows - 1} to say so"
    )


def _uvit_labels(
    rows: int, given: Mapping[str, Any], args: Mapping[str, Any]
) -> tuple[dict[str, Any], str]:
    """As `_dit_labels`; U-ViT's `num_classes` counts the null label, which `has_null_label` tells
    of."""
    if "has_null_label" in given or rows < 1:
        return {"has_null_label": given.get("has_null_label", True)}, ""
    preset = uvit_preset(args)
    if preset is not None or rows in (1, IMAGENET_ROWS):
        null = rows != 1 if preset is None else uvit.PRESETS[preset].get("has_null_label", True)
        return {"has_null_label": null}, ""
    return {"has_null_label": True}, (
        f"the last of {rows} label embeddings is taken for the null label; set args.has_null_label "
        "in [backbone] to false if no labels were dropped in training, or to true to say so"
    )
