"""The weights of their own that early exits have, in a diffusers transformer.

The transformer keeps the weights that make the calls at full depth, which are the pretrained ones.
For a call that leaves blocks out, others are put in the place of those that differ, and taken out
again when it ends; nothing is copied where both lie on one device in one precision.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from asesearch.backbones.base import Backbone
from asesearch.backbones.conversion import dit_to_diffusers
from asesearch.backbones.diffusers_adapter import DiffusersBackbone
from asesearch.backbones.dit import DiT
from asesearch.backbones.exit_weights import ExitWeights, weight_sets
from asesearch.deployment.manifest import check_file
from asesearch.errors import CheckpointError, ConfigError
from asesearch.schedule import ExitSchedule

#: In an exported folder: the weights that early exits have of their own, by their names in the
#: transformer.
EXITS_FILE = "exits.safetensors"
_GROUPS = "group_offloading"


def state_of(net: Backbone) -> dict[str, Tensor]:
    """A network's tensors by their names in a diffusers transformer.

    Raises:
        ConfigError: a network that diffusers does not have.
    """
    if isinstance(net, DiffusersBackbone):
        return dict(net.transformer.state_dict())
    if isinstance(net, DiT):
        return dit_to_diffusers(net.state_dict(), net.config)[0]
    raise ConfigError(
        f"a diffusers pipeline runs a DiT or a network of diffusers; got a {type(net).__name__}; "
        "sample its bundle with asesearch"
    )


def exits_of(net: Backbone, schedule: ExitSchedule) -> dict[str, Tensor]:
    """What the early exits of a schedule have of their own, by names in a diffusers transformer;
    empty for a network of one set of weights.

    Raises:
        ConfigError: see `state_of`.
    """
    if not isinstance(net, ExitWeights):
        return {}
    full = state_of(net.full)
    unread = tuple(f"transformer_blocks.{i}." for i in range(schedule.deepest_exit, schedule.depth))
    return {
        name: value.contiguous().clone()
        for name, value in state_of(net.exits).items()
        if not name.startswith(unread) and not torch.equal(value, full[name].to(value))
    }


def recorded_exits(folder: Path, data: Mapping[str, Any]) -> dict[str, Tensor]:
    """What the early exits of an exported folder of the format diffusers have of their own; empty
    for nothing.

    Args:
        folder: exported.
        data: of its manifest.

    Raises:
        CheckpointError: a file that is missing or damaged.
    """
    if EXITS_FILE not in data["files"]:
        return {}
    check_file(folder, EXITS_FILE, data["files"][EXITS_FILE])
    try:
        return load_file(folder / EXITS_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"can't read {folder / EXITS_FILE}: {error}; export it again"
        ) from error


def other_weights(transformer: nn.Module, net: Backbone) -> list[str]:
    """Names of a transformer's parameters that differ from a network's by more than precision;
    those on no device, quantised or wrapped by an adapter are left out."""
    found = dict(transformer.named_parameters())
    odd = []
    for name, value in state_of(weight_sets(net)[0]).items():
        own = found.get(name)
        if own is None or own.is_meta or own.shape != value.shape or not own.is_floating_point():
            continue
        # eight bits, as layerwise casting stores, can't be compared
        want = value.to(own.device, own.dtype).float()
        near = 4 * max(torch.finfo(own.dtype).eps, torch.finfo(value.dtype).eps)
        if not torch.allclose(own.float(), want, rtol=near, atol=near * float(want.abs().max())):
            odd.append(name)
    return odd


class _Lock:
    """A lock that a copy of what it guards gets anew."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder: int | None = None

    @property
    def is_mine(self) -> bool:
        return self._holder == threading.get_ident()

    def acquire(self) -> None:
        self._lock.acquire()
        self._holder = threading.get_ident()

    def release(self) -> None:
        self._holder = None
        self._lock.release()

    def __reduce__(self) -> tuple[type[_Lock], tuple[()]]:
        return _Lock, ()


class ExitsInPlace:
    """Puts weights in the place of a transformer's own for single calls. Threads that call the
    transformer wait for each other, also at full depth: all calls read the same parameters.

    Args:
        transformer: whose weights make the calls at full depth.
        values: those of early exits, by name.

    Raises:
        ConfigError: names or shapes that the transformer does not have.
    """

    def __init__(self, transformer: nn.Module, values: Mapping[str, Tensor]) -> None:
        self.transformer = transformer
        self._first_block: nn.Module = transformer.get_submodule("transformer_blocks.0")
        own = dict(transformer.named_parameters())
        unknown = [name for name in values if name not in own]
        odd = [n for n, v in values.items() if n in own and own[n].shape != v.shape]
        if unknown or odd:
            raise ConfigError(
                "the early exits have weights of their own for parameters that the transformer "
                f"lacks or has in another shape, {(unknown + odd)[0]} for example; apply them to "
                "the transformer they were fine-tuned from, before adapters and quantisation"
            )
        # modules stay what they are where an adapter wraps them, names do not
        self._places: list[tuple[dict[str, Any], str]] = []
        self._others: list[nn.Parameter] = []
        self._layers: dict[str, tuple[nn.Module, str, nn.Module]] = {}  # with what holds them
        for name, value in values.items():
            path, _, last = name.rpartition(".")
            module: nn.Module = transformer.get_submodule(path)
            self._places.append((module._parameters, last))
            holder, _, key = path.rpartition(".")
            self._layers[path] = (transformer.get_submodule(holder), key, module)
            self._others.append(nn.Parameter(value, requires_grad=False))
        self._attentions = [m for m in transformer.modules() if hasattr(m, "processor")]
        self._in = self._closed = False
        self._lock = _Lock()

    def begin(self, early: bool) -> None:
        """Let this thread's next call run with them, or with the transformer's own; waits for the
        calls of other threads. `end` must follow.

        Args:
            early: whether the call leaves blocks out.

        Raises:
            ConfigError: weights that are elsewhere between calls, or that something else was made
                of or put into.
        """
        self.end()  # of a call that was interrupted
        self._lock.acquire()
        try:
            if self._closed:  # while this thread waited
                self._lock.release()
            elif early:
                self._put()
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        """Make the transformer what it was, and let other threads call it; does nothing where this
        thread has begun no call."""
        if self._lock.is_mine:
            try:
                self._take()
            finally:
                self._lock.release()

    def close(self) -> None:
        """Let no later call run with them; waits for those of other threads."""
        self.end()
        self._lock.acquire()
        self._closed = True
        self._lock.release()

    def _put(self) -> None:
        self._refuse_offloaded()
        self._refuse_fused()
        for i, (held, name) in enumerate(self._places):
            own, other = held[name], self._others[i]
            if own.dtype is not other.dtype or own.device != other.device:
                self._others[i] = nn.Parameter(other.to(own), requires_grad=False)
        self._swap()
        self._in = True

    def _take(self) -> None:
        """Take them out, if they are in place.

        Offloading moves to the GPU what is in place, so the transformer's own weights follow: else
        each early call would move all of them back and forth.
        """
        if self._in:
            self._swap()
            self._in = False
            for (held, name), other in zip(self._places, self._others, strict=True):
                if held[name].device != other.device:
                    held[name].data = held[name].data.to(other.device)

    def _swap(self) -> None:
        for i, (held, name) in enumerate(self._places):
            held[name], self._others[i] = self._others[i], held[name]

    def _refuse_offloaded(self) -> None:
        held, name = self._places[0]
        hooks = {
            hook
            for module in (self.transformer, *self._first_block.modules())
            for hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", ())
        }
        if held[name].is_meta or _GROUPS in hooks:
            raise ConfigError(
                "early exits with weights of their own can't be combined with offloading in parts; "
                f"got {'group' if _GROUPS in hooks else 'sequential'} offloading; use "
                "pipeline.enable_model_cpu_offload()"
            )

    def _refuse_fused(self) -> None:
        """Refuse what was made of the transformer's own weights, or put into them, and what the
        exits' therefore lack."""
        # unfusing leaves the modules' own flag
        if any(type(m.processor).__name__.startswith("Fused") for m in self._attentions):
            raise ConfigError(
                "early exits with weights of their own can't run with projections that were fused "
                "from the transformer's; got fused ones; call "
                "transformer.unfuse_qkv_projections()"
            )
        for name, (holder, key, module) in self._layers.items():
            wrapper = holder._modules.get(key)
            merged = [] if wrapper is module else getattr(wrapper, "merged_adapters", [])
            if merged:
                raise ConfigError(
                    "early exits with weights of their own can't run with an adapter that was "
                    f"merged into the transformer's; got {merged[0]} in {name}; call "
                    "pipeline.unfuse_lora()"
                )
