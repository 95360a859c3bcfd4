"""A network from the arguments of a study file."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

from asesearch.backbones.base import Backbone
from asesearch.backbones.device import check_memory
from asesearch.errors import AseSearchError, ConfigError, first_line

MOST = 1000.0  # of a number among a constructor's arguments
Net = TypeVar("Net", bound=Backbone)


def check_args(cls: type[Backbone], args: Mapping[str, Any]) -> None:
    """Refuse constructor arguments that the network does not have, or of another type.

    Raises:
        ConfigError: naming the argument.
    """
    known = inspect.signature(cls).parameters
    for name, value in args.items():
        if name not in known:
            raise ConfigError(
                f"{cls.__name__} has no argument {name!r}; choose from {', '.join(known)}"
            )
        default = known[name].default
        types = (
            (bool,)
            if isinstance(default, bool)
            else (int,)
            if isinstance(default, int)
            else (int, float)
        )
        fits = type(value) in types or (value is None and default is None)
        most = 1 if "prob" in name else MOST
        if fits and type(default) is float:
            fits = 0 <= value <= most  # not so for NaN
        if not fits or (type(default) is int and default > 0 and value < 1):
            rule = (
                "true or false"
                if types == (bool,)
                else "a positive integer"
                if types == (int,)
                else "a number"
                if default is None
                else f"a number from 0 to {most:g}"
            )
            raise ConfigError(
                f"{cls.__name__}'s {name} must be {rule}; got {value!r}; correct the study file"
            )


def made(cls: type[Net], args: Mapping[str, Any]) -> Net:
    """A network.

    Raises:
        ConfigError: arguments that it can't be made with, such as one too large for memory.
    """
    sizes = {k: p.default for k, p in inspect.signature(cls).parameters.items()} | dict(args)
    width = sizes["hidden_size" if "hidden_size" in sizes else "embed_dim"]
    # of its attention alone, in float32
    check_memory(sizes["depth"], 16 * width**2, "the blocks of [backbone]", "correct args")
    try:
        return cls(**args)
    except (MemoryError, OverflowError, RuntimeError, TypeError) as error:
        if isinstance(error, AseSearchError):
            raise
        reason = first_line(error)
        raise ConfigError(
            f"the network of [backbone] can't be made with {dict(args)} ({reason}); correct args"
        ) from error
