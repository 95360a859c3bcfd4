"""What makes a network's calls cheaper beside an exit schedule: one contract for all of it.

A network knows nothing of it: while one is attached, calls of some of its modules are led
elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from importlib import import_module
from io import StringIO
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from asesearch.backbones.base import Backbone, ExitDepth
from asesearch.errors import ConfigError

#: Begins a network call, by its number in the sampling of one batch, from 0.
Begin = Callable[[int], None]
#: (calls,) or (calls, blocks): whether something is done there.
Flags = npt.NDArray[np.bool_]
#: Parts of one call's cost: the fraction of it, an exit depth, and whether the call is changed.
Mix = tuple[tuple[float, int, bool], ...]


class Acceleration(Protocol):
    """What makes calls of a sampler cheaper."""

    @property
    def num_calls(self) -> int | None:
        """Network calls of the sampling that it was made for; None for any number."""
        ...

    def attached(self, net: Backbone) -> AbstractContextManager[Begin]:
        """Inside, calls of the network are cheaper. Each is announced by its number: number 0
        begins a batch, which has the same images in all its calls."""
        ...

    def most(self, net: Backbone) -> Acceleration:
        """The same at its most: call 1 is changed in full. For measuring what that costs."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        ...

    def mix(self, net: Backbone, exit_depths: Sequence[int], apart: bool = False) -> list[Mix]:
        """What each call of a sampling costs, as parts of unchanged calls and of calls changed in
        full, for these exit depths of the calls; `apart` where early exits have weights of their
        own, so that calls at full depth and others keep nothing for each other."""
        ...


class Looking:
    """Base of what is attached to measure: an acceleration in form, which makes nothing cheaper.

    Args:
        num_calls: of the sampling.

    Attributes:
        num_calls: of the sampling.
    """

    def __init__(self, num_calls: int) -> None:
        self.num_calls = num_calls

    def most(self, net: Backbone) -> Self:
        return self

    def to_dict(self) -> dict[str, Any]:
        return {"kind": type(self).__name__}

    def mix(self, net: Backbone, exit_depths: Sequence[int], apart: bool = False) -> list[Mix]:
        return [((1.0, depth, False),) for depth in exit_depths]


@contextmanager
def led(calls: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Inside, a call of each of these modules goes to a function, which may call the module's own
    `forward`."""
    try:
        for module, function in calls.items():
            if "forward" in vars(module):
                raise ConfigError(
                    f"a {type(module).__name__} of the network is led elsewhere already; attach "
                    "one acceleration at a time"
                )
            module.forward = function
        yield
    finally:
        for module, function in calls.items():
            if vars(module).get("forward") is function:
                del module.forward


def plain_blocks(net: Backbone) -> list[nn.Module]:
    """The transformer blocks of a network whose blocks have an attention `attn`, a perceptron `mlp`
    and tokens (N, L, D) as first argument and only output.

    Raises:
        ConfigError: another kind of block.
    """
    blocks = net.transformer_blocks()
    if not all(isinstance(getattr(b, part, None), nn.Module) for b in blocks for part in PARTS[:2]):
        raise ConfigError(
            "caching, merging and uncertainty need the blocks of a DiT or U-ViT; got "
            f"{type(net).__name__} with blocks of {type(blocks[0]).__name__}; leave the "
            "acceleration out, or read a diffusers folder of a DiT with backbone.kind = 'dit'"
        )
    return blocks


def check_width(net: Backbone, width: int) -> None:
    """Refuse channels of another network than of one with `plain_blocks`.

    Raises:
        ConfigError: as said.
    """
    own = plain_blocks(net)[0].get_submodule("attn.proj").out_features
    if width != own:
        raise ConfigError(
            f"this acceleration was calibrated for {width} channels; got a network of {own}; "
            "calibrate it for this one"
        )


def written(flags: Flags) -> str:
    """(calls,) flags as a row of 0 and 1."""
    return "".join(map(str, flags.astype(int)))


def read_flags(row: object) -> Flags | None:
    """Inverse of `written`; None for what is not a row of 0 and 1, or an empty one."""
    if not isinstance(row, str) or not row or not set(row) <= {"0", "1"}:
        return None
    return np.array([c == "1" for c in row], dtype=np.bool_)


PARTS = ("attn", "mlp", "block")


def run_at(net: Backbone, exit_depth: int) -> Flags:
    """Which of the transformer blocks of one set of weights run at an exit depth."""
    return np.arange(net.fixed_blocks + net.depth) < net.fixed_blocks + exit_depth


def as_tokens(value: Any) -> Tensor:
    """A block's tokens (N, L, D)."""
    assert isinstance(value, Tensor)
    return value


def one_depth(what: str, exit_depth: ExitDepth) -> int | None:
    """The exit depth of a call.

    Raises:
        ConfigError: one for each image.
    """
    if isinstance(exit_depth, Tensor):
        raise ConfigError(
            f"{what} one exit depth for the batch; got one for each image; pass an integer"
        )
    return exit_depth


# -- those of other packages -----------------------------------------------------------------------

#: diffusers' transformers that predict noise, as sampling here needs.
_TRANSFORMERS = ("DiTTransformer2DModel", "PixArtTransformer2DModel")


def library(module: str, package: str, kind: str) -> Any:
    """A package that an acceleration is, imported; what it prints meanwhile is dropped.

    Raises:
        ConfigError: it is not installed, or can't be imported.
    """
    try:
        with redirect_stdout(StringIO()):
            return import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"the acceleration {kind} needs the package {package}; got {error}; "
            "pip install 'asesearch[rivals]'"
        ) from error


def diffusers_transformer(net: Backbone, kind: str) -> Any:
    """The diffusers transformer of a network.

    Raises:
        ConfigError: another network.
    """
    transformer = getattr(net, "transformer", None)
    names = [cls.__name__ for cls in type(transformer).__mro__]
    if not set(_TRANSFORMERS) & set(names):
        got = type(net).__name__ if transformer is None else names[0]
        raise ConfigError(
            f"{kind} acts on networks of kind 'diffusers': {' or '.join(_TRANSFORMERS)}; got "
            f"{got}; leave the acceleration out, or take cache-block or cache-attn"
        )
    return transformer
