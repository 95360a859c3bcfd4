"""Where in a training state the network's weights are, and under which prefix their names.

Training programs wrap weights (`model`, `state_dict`, `ema` …) and modules (`module.` by data
parallelism, `_orig_mod.` by torch.compile, `model.` or `net.` by Lightning).
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from asesearch.files import some

#: What wrappers put into parameter names, at their beginning or in between.
_SEGMENTS = {
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_forward_module",
}
#: A name that tells where a network's own names begin: after group 1.
_ANCHOR = re.compile(
    r"^((?:[^.]+\.)*?)(?:x_embedder\.proj\.weight|patch_embed\.proj\.weight"
    r"|(?:transformer_blocks|joint_blocks|double_blocks)\.0\..+)$"
)
_USUAL = ("model", "state_dict", "model_state_dict", "net", "network", "nnet", "module", "weights")
#: Where a word begins in a name such as modelEma or EMAModel.
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_EMA = re.compile(
    r"(?<![a-z])(?:ema|swa)(?![a-z]|_?sched)|shadow|averag|polyak"
    r"|(?<![a-z])(?:ema|swa)(?:model|net|params|weights|state)"
    r"|(?<![a-z])(?:model|net|params|weights)(?:ema|swa)(?![a-z])",
    re.IGNORECASE,
)
#: A network's or its weights' name around `avg`, which else may be of a loss or a pooling.
_NETWORK = (
    r"(?:model|net(?:work)?|nnet|g|gen(?:erator)?|dit|u_?vit|params?|parameters|weights?|state"
    r"|dict|sd|ckpt|checkpoint|[\d.])"
)
_AVG = re.compile(rf"(?:{_NETWORK}_?)+avg(?:_?{_NETWORK})*|avg(?:_?{_NETWORK})+", re.IGNORECASE)
#: Weights that are not averaged, beside those that are: of ema-pytorch, and of Lightning, which
#: saves the averaged ones in their place.
_RAW = ("online_model", "current_model_state")
#: The number of networks that PyTorch's AveragedModel took the mean of; the weights stand beside
#: it, under `module.`.
_COUNTER = "n_averaged"
_NO_WEIGHTS = re.compile(r"^(opt|sched|lr_|scaler|grad|exp_avg|momentum)", re.IGNORECASE)
_MAX_NESTING = 5
#: What may be or hold weights.
_HOLDERS = (Mapping, list, tuple, Tensor)
#: Training options whose text names what the network predicts.
PREDICTIONS = ("prediction", "prediction_type", "parameterization", "pred")
#: Those whose text may name it, and much else.
HINTS = (
    *("objective", "parametrization", "pred_type", "pred_mode", "mean_type", "model_mean_type"),
    *("target", "target_type", "loss", "loss_type"),
)
#: Those that say, if true, that it is the flow from data to noise.
FLOWS = ("flow_matching", "use_flow_matching", "rectified_flow", "use_rectified_flow")
#: Those that say, if true, that it is something else than noise.
FLAGS = (
    *("predict_xstart", "predict_x0", "pred_xstart", "pred_x0"),
    *("v_prediction", "v_pred", "predict_v", "pred_v", "predict_velocity"),
    *FLOWS,
)
#: Those that say so if they are false.
NOISE_FLAGS = ("predict_epsilon", "predict_eps", "predict_noise")
#: That of SiT, which names what lies between data and noise.
PATH = "path_type"
#: Those that tell of the diffusion process.
NOISE_SCHEDULE = "noise_schedule"
TIMESTEPS = ("diffusion_steps", "num_train_timesteps", "num_diffusion_timesteps")
#: What training options may tell of the network that shapes don't.
_OPTIONS: dict[str, tuple[type, ...]] = {
    "num_classes": (int,),
    "num_heads": (int,),
    "class_dropout_prob": (int, float),
    **dict.fromkeys((*PREDICTIONS, *HINTS, PATH, NOISE_SCHEDULE), (str,)),
    **dict.fromkeys((*FLAGS, *NOISE_FLAGS), (bool,)),
    **dict.fromkeys(TIMESTEPS, (int,)),
}
_COUNTS = ("num_classes", "num_heads", "class_dropout_prob")
_MAX_SECTIONS = 3
#: Words that make up the names of sections of options that are the network's or the training's.
_OWN_SECTION = re.compile(
    "args|arguments|flags|hyper|hparams|(?:hyper)?param(?:eter)?s|init|kwargs|opt|options|settings"
    "|cfg|conf|configs?|configuration|train(?:er|ing)?|experiment|data(?:set)?|state"
    "|model|module|net(?:work)?|nnet|backbone|transformer|denoiser|diffusion|dit|unet|u|vit|uvit|ema"
)
#: In the name of a section that is certainly another network's.
_OTHER_SECTION = re.compile(
    "(?<![a-z])(?:(?:text|image|vision)_?encoder|vae|autoencoder|discriminator|critic|teacher|lpips"
    "|classifier(?!_?free))",
    re.IGNORECASE,
)
#: In the name of a section that tells of something else than how the network was trained.
_NO_TRAINING = re.compile(
    "(?<![a-z])(?:sampl|eval|test|infer|data|(?:first|cond)_?stage|lr(?![a-z])|optim)",
    re.IGNORECASE,
)
#: That of a learning rate, or of a diffusion process which has no path from data to noise.
_SCHEDULER = re.compile("scheduler", re.IGNORECASE)


class NoWeightsError(ValueError):
    """The message says what there is instead of weights, and what to do."""


@dataclass(frozen=True)
class Weights:
    """The weights of one network.

    Attributes:
        state: under the network's own names, as far as they can be told.
        source: where they were, such as "ema" or "state_dict.model"; "weights" for the top.
        notes: what was decided that the user may want to know, a sentence each.
    """

    state: dict[str, Tensor]
    source: str = "weights"
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Candidate:
    path: tuple[str, ...]
    state: dict[str, Tensor]
    anchored: bool  # it has names of a kind of network that is known
    averaged: bool | None = None  # whether anything was yet, by a counter beside it
    numbered: bool = False  # it stands in a list or under a number

    @property
    def is_ema(self) -> bool:
        called = any(_says_average(part) or part.lower() == "avg" for part in self.path)
        return (called and not self.is_raw) or self.averaged is not None

    @property
    def is_raw(self) -> bool:
        return any(part in _RAW for part in self.path)

    def is_like(self, state: Mapping[str, Tensor]) -> bool:
        """Whether it might have been taken for these weights, and nothing says that it is raw."""
        needed = {k: v.shape for k, v in state.items() if k != "pos_embed"}
        fits = all(k in self.state and self.state[k].shape == s for k, s in needed.items())
        return self.anchored and fits and not self.is_raw

    @property
    def is_usual(self) -> bool:
        return all(part.lower() in _USUAL for part in self.path)

    @property
    def source(self) -> str:
        return ".".join(self.path) or "weights"


def find_weights(data: object) -> Weights:
    """The weights in what a checkpoint file holds: the EMA's where it has them all, else the
    model's.

    Raises:
        NoWeightsError: none, several that might be meant, or some without names.
    """
    found = list(_candidates(data, ()))
    found = [c for c in found if c.anchored] or found
    idle = [c for c in found if c.averaged is False]
    found = [c for c in found if c.averaged is not False] or idle
    averaged = _named_first([c for c in found if c.is_ema])
    plain = _named_first([c for c in found if not c.is_ema])
    if not averaged and (where := _nameless(data, ())) is not None:
        raise NoWeightsError(
            f"keeps averaged weights as a list without names ({where}), which can't be told apart; "
            "copy them into the network, as ema.copy_to(net.parameters()) does, and save "
            "net.state_dict()"
        )
    if not found:
        raise NoWeightsError(
            f"must hold a state dict of tensors; it holds {contents(data)}; save net.state_dict()"
        )
    ema = _one(averaged, found) if averaged else None
    model = _one(plain, found) if plain else None
    if ema is None:
        assert model is not None
        weights = _unaveraged(model, idle, _empty_averages(data))
    elif model is None or model.anchored != ema.anchored:
        began = f"nothing was averaged yet ({_COUNTER} is 0): the weights are those it began with"
        weights = Weights(ema.state, ema.source, (began,) if ema.averaged is False else ())
    else:
        weights = _complete(ema, model)
    others = [c for c in found if c is not ema and c is not model and c.is_like(weights.state)]
    if not others:
        if ema is not None and ema.numbered and model is not None and weights.source == ema.source:
            note = f"the weights are those of {ema.source}, averaged, not those of {model.source}"
            return replace(weights, notes=(*weights.notes, note))
        return weights
    names = ", ".join(c.source for c in others[:6])
    note = (
        f"the weights are those of {weights.source}, and there are such weights in {names} too; if "
        "others are meant, save them by themselves"
    )
    return replace(weights, notes=(*weights.notes, note))


def _named_first(found: list[_Candidate]) -> list[_Candidate]:
    """Those that have a name of their own, else all: lists and numbers are of what was before."""
    return [c for c in found if not c.numbered] or found


def _complete(ema: _Candidate, model: _Candidate) -> Weights:
    """The averaged weights, if they are all there."""
    missing = model.state.keys() - ema.state.keys()
    if missing == {"pos_embed"}:  # fixed, so not among the parameters that are averaged
        state = {**ema.state, "pos_embed": model.state["pos_embed"]}
        note = f"{ema.source} lacks pos_embed, which is that of {model.source}"
        return Weights(state, ema.source, (note,))
    if missing:
        note = (
            f"{ema.source} lacks {len(missing)} of the {len(model.state)} tensors of "
            f"{model.source}, such as {min(missing)}, so the weights are those of {model.source}"
        )
        return Weights(model.state, model.source, (note,))
    return Weights(ema.state, ema.source)


def _unaveraged(chosen: _Candidate, idle: list[_Candidate], empty: list[str]) -> Weights:
    """The model's weights, and why not those of averages that are there."""
    notes = []
    if idle:
        names = ", ".join(c.source for c in idle)
        notes.append(
            f"{names} has averaged nothing yet ({_COUNTER} is 0), so the weights are those of "
            f"{chosen.source}"
        )
    elif empty:
        notes.append(
            f"{', '.join(empty)} holds no weights under the network's names, so they are those of "
            f"{chosen.source}"
        )
    return Weights(chosen.state, chosen.source, tuple(notes))


def _candidates(data: object, path: tuple[str, ...], idle: bool = False) -> Iterator[_Candidate]:
    """Every set of tensors that may be a network's; `idle` ones are averages of nothing yet. Of
    what is numbered, as in a list, where much else stands, it must be of a kind that is known."""
    if not isinstance(data, Mapping | list | tuple) or len(path) > _MAX_NESTING:
        return
    if not isinstance(data, Mapping) or not all(isinstance(key, str) for key in data):
        for key, value in _entries(data):
            if not _NO_WEIGHTS.match(key):
                found = _candidates(value, (*path, key), idle)
                yield from (replace(c, numbered=True) for c in found if c.anchored)
        return
    tensors = {k: v for k, v in data.items() if isinstance(v, Tensor)}
    counters = _counters(tensors)
    tensors = {k: v for k, v in tensors.items() if k not in counters}
    whole = len(tensors) + len(counters) == len(data)
    plain = {".".join(p for p in k.split(".") if p not in _SEGMENTS): k for k in tensors}
    if len(plain) < len(tensors):
        twice = min(tensors.keys() - set(plain.values()))
        raise NoWeightsError(
            f"holds {twice} twice, with and without a prefix; save net.state_dict()"
        )
    roots = {m[1] for name in plain if (m := _ANCHOR.match(name))}
    for root in sorted(roots):
        inside = tuple(other for other in roots if other != root and other.startswith(root))
        names = {n.removeprefix(root): k for n, k in plain.items() if n.startswith(root)}
        names = {n: k for n, k in names.items() if not (root + n).startswith(inside)}
        inner = tuple(root.rstrip(".").split(".")) if root else ()
        averaged = not idle and _averaged(names.values(), counters)
        yield _Candidate((*path, *inner), {n: tensors[k] for n, k in names.items()}, True, averaged)
    if tensors and not roots and whole:
        names = _unprefixed(plain)
        averaged = not idle and _averaged(names.values(), counters)
        yield _Candidate(path, {n: tensors[k] for n, k in names.items()}, False, averaged)
    waits = type(data.get(_COUNTER)) is int and data[_COUNTER] == 0  # as Lightning's callback
    for key, value in data.items():
        if not _NO_WEIGHTS.match(key):
            inner_idle = idle or (waits and _says_average(key))
            yield from _candidates(value, (*path, key), inner_idle)


def _entries(data: Mapping[Any, Any] | Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """What a dict, list or tuple holds that may be or hold tensors, by name or number; what a list
    has in a pair with its name, as Composer saves its algorithms, by that."""
    items = data.items() if isinstance(data, Mapping) else enumerate(data)
    for key, value in items:
        if not isinstance(value, _HOLDERS):  # there may be millions, such as losses
            continue
        pair = isinstance(value, list | tuple) and len(value) == 2 and isinstance(value[0], str)
        if not pair or isinstance(data, Mapping):
            yield str(key), value
        elif isinstance(value[1], _HOLDERS):
            yield str(value[0]), value[1]


def _says_average(name: str) -> bool:
    """Whether a name tells of averaged weights."""
    words = _CAMEL.sub("_", name)
    return bool(_EMA.search(words) or _AVG.fullmatch(words))


def _counters(tensors: Mapping[str, Tensor]) -> dict[str, bool]:
    """The counters of PyTorch's AveragedModel among tensors: whether each has begun to count."""
    return {
        name: bool(value)
        for name, value in tensors.items()
        if name.split(".")[-1] == _COUNTER
        and value.numel() == 1
        and not value.is_meta
        and any(k.startswith(_counted(name)) for k in tensors)
    }


def _counted(counter: str) -> str:
    """What the names of the weights of an AveragedModel begin with."""
    return f"{counter.removesuffix(_COUNTER)}module."


def _averaged(names: Collection[str], counters: Mapping[str, bool]) -> bool | None:
    """What a counter says of the tensors of these names; None where none counts them."""
    counted = (n for c, n in counters.items() if all(k.startswith(_counted(c)) for k in names))
    return next(counted, None)


def _unprefixed(names: dict[str, str]) -> dict[str, str]:
    """Names of an unknown network without what all have in front and only wrappers put there."""
    heads = {n.split(".")[0] for n in names}
    while len(heads) == 1 and (head := heads.pop()) in _USUAL and all("." in n for n in names):
        names = {n.removeprefix(f"{head}."): k for n, k in names.items()}
        heads = {n.split(".")[0] for n in names}
    return names


def _one(found: list[_Candidate], there: list[_Candidate]) -> _Candidate:
    """The candidate that is meant; `there` are all, to be named where it can't be told.

    Raises:
        NoWeightsError: it can't be told.
    """
    usual = [c for c in found if c.is_usual]
    chosen = found if len(found) == 1 else usual
    if len(chosen) == 1:
        return chosen[0]
    names = ", ".join(c.source for c in there[:6])
    raise NoWeightsError(
        f"holds several sets of weights: {names}; save the one that is meant by itself"
    )


def _empty_averages(data: object, depth: int = 0, deepest: int = _MAX_NESTING) -> list[str]:
    """What should be averaged weights; to be asked for where none were found. Down below, where
    settings stand too, it must hold tensors."""
    if not isinstance(data, Mapping | list | tuple) or depth > deepest:
        return []
    inner = depth + isinstance(data, Mapping)
    found: dict[str, None] = {}
    for key, value in _entries(data):
        first = key.split(".")[0]
        if _seems_averaged(first, value) and (depth < 2 or _has_tensors(value)):
            found[first] = None
        else:
            lowest = 1 if _NO_WEIGHTS.match(first) else deepest
            found |= dict.fromkeys(_empty_averages(value, inner, lowest))
    return list(found)


def _has_tensors(data: object) -> bool:
    """Whether a tensor is, or stands in, what was loaded."""
    if isinstance(data, Mapping):
        return any(map(_has_tensors, data.values()))
    return isinstance(data, Tensor) or (
        isinstance(data, list | tuple) and any(map(_has_tensors, data))
    )


def _seems_averaged(name: str, value: object) -> bool:
    """Whether something should be averaged weights, by its name or by a counter in it; a counter
    alone is none."""
    if name == _COUNTER or (isinstance(value, Mapping) and set(value) == {_COUNTER}):
        return False
    named = _says_average(name) and isinstance(value, Mapping | list | tuple | Tensor)
    return named or (isinstance(value, Mapping) and _COUNTER in value)


def _nameless(data: object, path: tuple[str, ...]) -> str | None:
    """Where averaged weights are kept as a list of tensors."""
    if isinstance(data, list | tuple) and data and all(isinstance(v, Tensor) for v in data):
        return ".".join(path) if any(_says_average(p) for p in path) else None
    if len(path) > _MAX_NESTING or not isinstance(data, Mapping | list | tuple):
        return None
    items = data.items() if isinstance(data, Mapping) else enumerate(data)
    inner = (_nameless(v, (*path, str(k))) for k, v in items if isinstance(v, _HOLDERS))
    return next((where for where in inner if where), None)


def contents(data: object) -> str:
    """What something that was loaded holds, in a few words."""
    if not isinstance(data, Mapping):
        return _kind(data)
    return some([f"{k} ({_kind(v)})" for k, v in data.items()], 8) or "an empty dict"


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, Mapping):
        inner = ", ".join(str(k) for k in list(value)[:3])
        return (
            f"dict of {len(value)}: {inner}{', …' if len(value) > 3 else ''}"
            if value
            else "empty dict"
        )
    if isinstance(value, list | tuple):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__


def training_options(data: object) -> dict[str, Any]:
    """What the options of the training, kept beside the weights, tell of the network.

    An option that stands there twice with different values is left out, and so is what stands in
    the section of another network, such as a discriminator, or of something else than training,
    such as a sampler; counts are believed only in sections that are the network's or the whole
    training's by name.
    """
    found: dict[str, list[Any]] = {}
    _collect(data, (), found)
    return {k: v[0] for k, v in found.items() if all(other == v[0] for other in v)}


def _collect(data: object, path: tuple[str, ...], found: dict[str, list[Any]]) -> None:
    data = vars(data) if isinstance(data, Namespace) else data
    if not isinstance(data, Mapping) or len(path) > _MAX_SECTIONS:
        return
    for key, value in data.items():
        if key in _OPTIONS and type(value) in _OPTIONS[key] and _is_told(key, path):
            found.setdefault(key, []).append(value)
        _collect(value, (*path, str(key)), found)


def _is_told(option: str, path: tuple[str, ...]) -> bool:
    """Whether an option at this path is one of the network whose weights are meant."""
    if option in _COUNTS:
        words = (word for part in path for word in re.findall("[a-z]+", part.lower()))
        return all(_OWN_SECTION.fullmatch(word) for word in words)
    # what the network predicts is told so that others are refused: believed unless surely another's
    others = [_OTHER_SECTION]
    if option not in PREDICTIONS:  # names that mean other things elsewhere
        others += [_NO_TRAINING, _SCHEDULER] if option == PATH else [_NO_TRAINING]
    return not any(other.search(part) for other in others for part in path)
