"""Where in a training state the network's weights are, and under which prefix their names.

Training programs wrap weights (`model`, `state_dict`, `ema` …) and modules (`module.` by data
parallelism, `_orig_mod.` by torch.compile, `model.` or `net.` by Lightning).
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

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
_EMA = re.compile(r"(?<![a-z])ema(?![a-z])|shadow|averag", re.IGNORECASE)
_NO_WEIGHTS = re.compile(r"^(opt|sched|lr_|scaler|grad|exp_avg|momentum)", re.IGNORECASE)
_MAX_NESTING = 5
#: What training options may tell of the network that shapes don't.
_OPTIONS = {
    "num_classes": (int,),
    "num_heads": (int,),
    "class_dropout_prob": (int, float),
    "prediction": (str,),
    "prediction_type": (str,),
    "parameterization": (str,),
    "pred": (str,),
}


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

    @property
    def is_ema(self) -> bool:
        return any(_EMA.search(part) for part in self.path) and "online_model" not in self.path

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
    averaged = [c for c in found if c.is_ema]
    plain = [c for c in found if not c.is_ema]
    if not averaged and (where := _nameless(data, ())) is not None:
        raise NoWeightsError(
            f"keeps averaged weights as a list without names ({where}), which can't be told apart; "
            "copy them into the network (ema.copy_to(net.parameters())) and save net.state_dict()"
        )
    if not found:
        raise NoWeightsError(
            f"must hold a state dict of tensors; it holds {contents(data)}; save net.state_dict()"
        )
    ema = _one(averaged) if averaged else None
    if ema is None:
        return _with_notes(_one(plain), _empty_averages(data))
    if not plain or (model := _one(plain)).anchored != ema.anchored:
        return Weights(ema.state, ema.source)
    return _complete(ema, model)


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


def _with_notes(chosen: _Candidate, empty: list[str]) -> Weights:
    if not empty:
        return Weights(chosen.state, chosen.source)
    note = (
        f"{', '.join(empty)} holds no weights under the network's names, so they are those of "
        f"{chosen.source}"
    )
    return Weights(chosen.state, chosen.source, (note,))


def _candidates(data: object, path: tuple[str, ...]) -> Iterator[_Candidate]:
    """Every set of tensors that may be a network's."""
    if not isinstance(data, Mapping) or len(path) > _MAX_NESTING:
        return
    if not all(isinstance(key, str) for key in data):
        return
    tensors = {k: v for k, v in data.items() if isinstance(v, Tensor)}
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
        yield _Candidate((*path, *inner), {n: tensors[k] for n, k in names.items()}, True)
    if tensors and not roots and len(tensors) == len(data):
        names = _unprefixed(plain)
        yield _Candidate(path, {n: tensors[k] for n, k in names.items()}, False)
    for key, value in data.items():
        if not _NO_WEIGHTS.match(key):
            yield from _candidates(value, (*path, key))


def _unprefixed(names: dict[str, str]) -> dict[str, str]:
    """Names of an unknown network without what all have in front and only wrappers put there."""
    heads = {n.split(".")[0] for n in names}
    while len(heads) == 1 and (head := heads.pop()) in _USUAL and all("." in n for n in names):
        names = {n.removeprefix(f"{head}."): k for n, k in names.items()}
        heads = {n.split(".")[0] for n in names}
    return names


def _one(found: list[_Candidate]) -> _Candidate:
    """The candidate that is meant.

    Raises:
        NoWeightsError: it can't be told.
    """
    usual = [c for c in found if c.is_usual]
    chosen = found if len(found) == 1 else usual
    if len(chosen) == 1:
        return chosen[0]
    names = ", ".join(c.source for c in found[:6])
    raise NoWeightsError(
        f"holds several sets of weights: {names}; save the one that is meant by itself"
    )


def _empty_averages(data: object, nesting: int = 1) -> list[str]:
    """What is named as averaged weights; to be asked for where none were found."""
    if not isinstance(data, Mapping) or nesting < 0:
        return []
    found: dict[str, None] = {}
    for key, value in data.items():
        first = str(key).split(".")[0]
        if _EMA.search(first) and isinstance(value, Mapping | list | tuple | Tensor):
            found[first] = None
        else:
            found |= dict.fromkeys(_empty_averages(value, nesting - 1))
    return list(found)


def _nameless(data: object, path: tuple[str, ...]) -> str | None:
    """Where averaged weights are kept as a list of tensors."""
    if isinstance(data, Mapping) and len(path) <= _MAX_NESTING:
        inner = (_nameless(v, (*path, str(k))) for k, v in data.items())
        return next((where for where in inner if where), None)
    is_list = (
        isinstance(data, list | tuple)
        and len(data) > 0
        and all(isinstance(v, Tensor) for v in data)
    )
    return ".".join(path) if is_list and any(_EMA.search(p) for p in path) else None


def contents(data: object) -> str:
    """What something that was loaded holds, in a few words."""
    if not isinstance(data, Mapping):
        return _kind(data)
    shown = ", ".join(f"{k} ({_kind(v)})" for k, v in list(data.items())[:8])
    more = f" and {len(data) - 8} more" if len(data) > 8 else ""
    return f"{shown}{more}" if shown else "an empty dict"


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

    An option that stands there twice with different values is left out.
    """
    found: dict[str, list[Any]] = {}
    if isinstance(data, Mapping):
        for value in data.values():
            _collect(vars(value) if isinstance(value, Namespace) else value, found, 2)
    return {k: v[0] for k, v in found.items() if all(other == v[0] for other in v)}


def _collect(data: object, found: dict[str, list[Any]], nesting: int) -> None:
    if not isinstance(data, Mapping) or nesting < 0:
        return
    for key, value in data.items():
        if key in _OPTIONS and type(value) in _OPTIONS[key]:
            found.setdefault(key, []).append(value)
        _collect(vars(value) if isinstance(value, Namespace) else value, found, nesting - 1)
