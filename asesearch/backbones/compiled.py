"""A network whose blocks run as compiled code: `with compiled(net):`.

On CUDA its calls are also captured as graphs, see `_Graphs`.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from asesearch.backbones import conditioning
from asesearch.backbones.base import Backbone, ExitDepth
from asesearch.backbones.conditioning import Conditioning
from asesearch.backbones.device import tf32_state
from asesearch.errors import ConfigError, first_line

_Inputs = tuple[Tensor, Tensor, Conditioning | None]
_COMPILERS = ("torch._dynamo.exc", "torch._inductor.exc")  # where the compiler's errors are
BACKEND = "inductor"  # of `torch.compile`
#: Largest difference of outputs from eager ones, relative to the largest output, in float32.
TOLERANCE = 1e-4


@contextmanager
def compiled(backbone: Backbone, on: bool = True) -> Iterator[None]:
    """Inside, every transformer block of a network runs as compiled code.

    A block is compiled as one graph, without a break, at its first call, which takes seconds.
    Weights are inputs of that code, so all blocks of one class and size share it, and so does every
    exit depth, and every network of the same sizes in this process. So do batches of any size, but
    for those of a single image, which get code of their own; so may a block of another arithmetic,
    or whose input lies otherwise in memory, such as the first of a diffusers network. Outputs agree
    with eager ones within `TOLERANCE`. The network's other parts run as they are.

    Args:
        backbone: in eval mode, where it is to run.
        on: False leaves it as it is.

    Raises:
        ConfigError: the blocks can't be compiled here; at their first call.
    """
    changed: dict[nn.Module, Any] = {}
    try:
        for block in backbone.transformer_blocks() if on else ():
            changed[block] = block._compiled_call_impl
            cls: Any = type(block)
            code = _code(cls, tuple(next(block.parameters()).shape), BACKEND)
            block._compiled_call_impl = functools.partial(_call, code, block)
        if on and backbone.capturable and next(backbone.parameters()).is_cuda:
            changed[backbone] = backbone._compiled_call_impl
            backbone._compiled_call_impl = functools.partial(_graphs_of(backbone).call, backbone)
        yield
    finally:
        for module, before in changed.items():
            module._compiled_call_impl = before


def _block_call(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What is compiled."""
    return block._call_impl(*args, **kwargs)


@functools.cache
def _code(cls: Any, size: tuple[int, ...], backend: str) -> Callable[..., Any]:
    """The compiled call of blocks of one class and size; torch limits the variants of one function,
    so each has a function of its own."""
    code = _block_call.__code__.replace(co_name=f"{cls.__name__}_{'x'.join(map(str, size))}")
    function = types.FunctionType(code, _block_call.__globals__)
    return torch.compile(function, fullgraph=True, backend=backend)


def _call(code: Callable[..., Any], block: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            torch._dynamo.maybe_mark_dynamic(value, 0)  # the batch
    try:
        return code(block, args, kwargs)
    except Exception as error:
        if type(error).__module__ not in _COMPILERS:
            raise
        reason = first_line(error, 200)
        raise ConfigError(
            f"the blocks can't be compiled here ({reason}); leave --compile out, or set "
            "compile = false in the study file"
        ) from error


# -- CUDA ------------------------------------------------------------------------------------------


class _Graphs:
    """CUDA graphs of one network's calls: one for each exit depth, shape and arithmetic, so that a
    call is one launch.

    They hold memory for their intermediate values as long as the network lives. Calls under a
    gradient, or with one exit depth a sample, run without.

    Args:
        net: on its device, where its weights stay: a graph knows their addresses.
    """

    def __init__(self, net: Backbone) -> None:
        self.weights = _addresses(net)
        self._pool = torch.cuda.graph_pool_handle()
        self._inputs: dict[Any, _Inputs] = {}
        self._made: dict[Any, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def call(
        self,
        net: Backbone,
        x_t: Tensor,
        t: Tensor,
        y: Conditioning | None = None,
        *,
        exit_depth: ExitDepth = None,
    ) -> Any:
        """`net(x_t, t, y, exit_depth=exit_depth)`."""
        if torch.is_grad_enabled() or isinstance(exit_depth, Tensor):
            return _plain(net)(x_t, t, y, exit_depth=exit_depth)
        given = _flat((x_t, t, y))
        shapes = tuple((name, value.shape, value.dtype) for name, value in given.items())
        arithmetic = (
            torch.is_autocast_enabled("cuda"),
            torch.get_autocast_dtype("cuda"),
            tf32_state(),
        )
        if shapes not in self._inputs:
            self._inputs[shapes] = (x_t.clone(), t.clone(), conditioning.each(torch.clone, y))
        inputs = self._inputs[shapes]
        for name, place in _flat(inputs).items():
            place.copy_(given[name])
        key = (shapes, arithmetic, exit_depth)
        if key not in self._made:
            with torch.cuda.device(x_t.device):
                self._made[key] = self._capture(net, inputs, exit_depth)
        graph, out = self._made[key]
        graph.replay()
        return out.clone()

    def _capture(
        self, net: Backbone, inputs: _Inputs, exit_depth: int | None
    ) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """The graph of a call, and where its output will be."""
        keeps = torch.is_autocast_cache_enabled()
        # a graph must not read weights that were cast before it, nor keep its own for others
        torch.set_autocast_cache_enabled(False)
        try:
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):  # compiles the blocks, and lets libraries set themselves up
                    _plain(net)(*inputs, exit_depth=exit_depth)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                out = _plain(net)(*inputs, exit_depth=exit_depth)
        finally:
            torch.set_autocast_cache_enabled(keeps)
        return graph, out


def _flat(inputs: _Inputs) -> dict[str, Tensor]:
    """The tensors of a call by name."""
    x_t, t, y = inputs
    labels = conditioning.labels_of(y)
    named = {} if labels is None else {"y": labels}
    prompt = conditioning.prompt_of(y) or {}
    return {"x_t": x_t, "t": t, **named, **{f"y.{k}": v for k, v in prompt.items()}}


def _plain(net: Any) -> Callable[..., Tensor]:
    """The network's call, as it is without graphs."""
    call: Callable[..., Tensor] = net._call_impl
    return call


def _graphs_of(net: Backbone) -> _Graphs:
    """The network's graphs; new ones where its weights lie elsewhere than they did."""
    found = _GRAPHS.get(net)
    if found is None or found.weights != _addresses(net):
        found = _Graphs(net)
        _GRAPHS[net] = found
    return found


def forget_graphs(net: nn.Module) -> None:
    """Free the memory of a network's CUDA graphs; its next compiled call records them again."""
    _GRAPHS.pop(net, None)


def _addresses(net: nn.Module) -> list[int]:
    return [value.data_ptr() for value in (*net.parameters(), *net.buffers())]


_GRAPHS: WeakKeyDictionary[nn.Module, _Graphs] = WeakKeyDictionary()
