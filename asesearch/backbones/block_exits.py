"""Early exit in a diffusers transformer, driven from outside: none of diffusers' forward code is
repeated here.

While a network is attached, the class of each of its blocks is a subclass that looks up the exit
plan of the running call before the block is called (as `torch.nn.utils.parametrize` does). A
skipped block computes nothing, not even its norms; names, weights, hooks and compiled forms of the
blocks stay as they are, and detaching restores the class.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from asesearch.errors import ConfigError


@dataclass(frozen=True)
class TransformerSpec:
    """What the adapter must know of a diffusers class.

    Attributes:
        required, optional: conditioning arguments of its forward, tensors with leading dimension N.
        added: conditioning that the forward takes inside `added_cond_kwargs`.
        block_outputs: what a block returns, in order; each is also an argument of the block, of the
            same shape.
        refused: forward arguments that act between the blocks, so that dropping blocks would change
            their meaning.
        prediction_type: `epsilon` (noise), or `flow` (velocity of rectified flow).
        lists: where the blocks are, first to run first.
        time_scale: times the transformer's timestep gives that of the scheduler; see
            `BlockExits.time_scale`.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    block_outputs: tuple[str, ...] = ("hidden_states",)
    refused: tuple[str, ...] = ()
    prediction_type: str = "epsilon"
    lists: tuple[str, ...] = ("transformer_blocks",)
    time_scale: float = 1.0


SPECS = {
    "DiTTransformer2DModel": TransformerSpec(("class_labels",)),
    "PixArtTransformer2DModel": TransformerSpec(
        ("encoder_hidden_states",), ("encoder_attention_mask",), ("resolution", "aspect_ratio")
    ),
    "SanaTransformer2DModel": TransformerSpec(
        ("encoder_hidden_states",),
        ("encoder_attention_mask", "guidance"),
        refused=("controlnet_block_samples",),
        prediction_type="flow",
    ),
    "SD3Transformer2DModel": TransformerSpec(
        ("encoder_hidden_states", "pooled_projections"),
        block_outputs=("encoder_hidden_states", "hidden_states"),
        refused=("block_controlnet_hidden_states", "skip_layers"),
        prediction_type="flow",
    ),
}
#: Also those that are driven from outside only, for their input is no image (N, C, H, W).
PIPELINE_SPECS = SPECS | {
    "FluxTransformer2DModel": TransformerSpec(
        ("encoder_hidden_states", "pooled_projections"),
        ("guidance",),
        block_outputs=("encoder_hidden_states", "hidden_states"),
        refused=("controlnet_block_samples", "controlnet_single_block_samples"),
        prediction_type="flow",
        lists=("transformer_blocks", "single_transformer_blocks"),
        time_scale=1000.0,
    ),
}


def argument_names(cls: type[nn.Module]) -> tuple[str, ...]:
    """Names of the arguments of a module class's forward, `self` left out."""
    return tuple(inspect.signature(cls.forward).parameters)[1:]


class ExitPlan:
    """Which blocks run for which samples during one call of a network; used once.

    Args:
        blocks: all that may be dropped, first to run first.
        outputs: names of what a block returns.
        exit_depth: one count for the batch, or one per sample.
        earlier: where calls of one batch at exit depths 1, 2, … leave what their last block gave,
            so that the next call runs one new block only; with one count for the batch.

    Attributes:
        block_calls: blocks really run so far (a block that runs on part of the batch counts as
            one).
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        outputs: tuple[str, ...],
        exit_depth: int | list[int],
        earlier: list[Any] | None = None,
    ) -> None:
        self.position = {block: i for i, block in enumerate(blocks)}
        self.outputs = outputs
        self.exit_depth = exit_depth
        self.block_calls = 0
        self._earlier = earlier
        self._done: list[Tensor] = []  # hidden states of the samples that left, shallowest first
        self._in_order: dict[int, tuple[Tensor, Tensor]] = {}
        if isinstance(exit_depth, list):
            self._order = torch.tensor(sorted(range(len(exit_depth)), key=lambda i: -exit_depth[i]))

    def call(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the block, on the samples that are still active; or hand its input on."""
        index = self.position[block]
        if isinstance(self.exit_depth, int) and index < self.exit_depth:
            return self._run(block, index, args, kwargs)
        values = {**dict(zip(block.argument_names, args, strict=False)), **kwargs}
        if isinstance(self.exit_depth, int):
            return self._pack(values)
        return self._call_active(block, index, self.exit_depth, values)

    def _run(self, block: Any, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The block's output; the latest one where an earlier call of the same batch ran it."""
        if self._earlier and index < len(self._earlier):
            return self._earlier[-1]
        self.block_calls += 1
        result = block.run(*args, **kwargs)
        if self._earlier is not None:
            # only the latest is read again
            self._earlier[:] = [None] * len(self._earlier) + [result]
        return result

    def _call_active(
        self, block: Any, index: int, exit_depth: list[int], values: dict[str, Any]
    ) -> Any:
        """As `run_blocks`: sorted at the first block, deepest first; shrunk as samples leave;
        restored at the last."""
        if index == 0:
            values |= {
                name: values[name][self._order.to(values[name].device)] for name in self.outputs
            }
        active = sum(d > index for d in exit_depth)
        if active < values["hidden_states"].shape[0]:
            self._done.append(values["hidden_states"][active:])
            # (N', L, D), N' the samples that go on
            values |= {name: values[name][:active] for name in self.outputs}
        if active:
            self.block_calls += 1
            rest = {
                k: self._rows(v, active, len(exit_depth))
                for k, v in values.items()
                if k not in self.outputs
            }
            result = block.run(**{**values, **rest})
            values |= dict(
                zip(self.outputs, result if len(self.outputs) > 1 else (result,), strict=True)
            )
        if index == len(self.position) - 1:  # nothing after the last block reads the other outputs
            # (N, L, D), deepest first
            x = torch.cat([values["hidden_states"], *reversed(self._done)])
            values["hidden_states"] = x[torch.argsort(self._order).to(x.device)]
        return self._pack(values)

    def _pack(self, values: dict[str, Any]) -> Any:
        packed = tuple(values[name] for name in self.outputs)
        return packed if len(packed) > 1 else packed[0]

    def _sorted(self, tensor: Tensor) -> Tensor:
        """Rows in the plan's order; every block gets the same conditioning, so it is sorted
        once."""
        if id(tensor) not in self._in_order:
            self._in_order[id(tensor)] = (tensor, tensor[self._order.to(tensor.device)])
        return self._in_order[id(tensor)][1]

    def _rows(self, value: Any, active: int, batch: int) -> Any:
        if isinstance(value, dict):
            return {k: self._rows(v, active, batch) for k, v in value.items()}
        if isinstance(value, Tensor) and value.ndim and value.shape[0] == batch:
            return self._sorted(value)[:active]
        return value


#: Plan of the call that runs in this thread.
_plan: ContextVar[ExitPlan | None] = ContextVar("exit_plan", default=None)


class _ExitBlock(nn.Module):
    """Mixed into the class of each block while its network is attached."""

    plain_class: Any
    argument_names: tuple[str, ...]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        plan = _plan.get()
        if plan is None or self not in plan.position:
            return self.run(*args, **kwargs)
        return plan.call(self, args, kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


@functools.cache
def _exit_class(cls: type[Any]) -> type[nn.Module]:
    members = {
        "__module__": cls.__module__,
        "plain_class": cls,
        "argument_names": argument_names(cls),
    }
    return type(cls.__name__, (_ExitBlock, cls), members)


class BlockExits:
    """Early exit in one diffusers transformer, from `attach()` to `detach()`.

    Raises:
        ConfigError: an unsupported class, a network compiled as a whole, or one that is attached
            already.
    """

    def __init__(self, model: nn.Module, specs: Mapping[str, TransformerSpec] = SPECS) -> None:
        if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
            raise ConfigError(
                "early exit must be attached before a network is compiled as a whole; got a "
                f"compiled {type(getattr(model, '_orig_mod', model)).__name__}; compile "
                "afterwards, or its blocks one by one: for block in "
                "transformer.transformer_blocks: block.compile()"
            )
        self.model = model
        self.spec = spec_of(model, specs)
        if any(isinstance(block, _ExitBlock) for block in self.blocks):
            raise ConfigError(
                f"a network takes one early exit at a time; got a {type(model).__name__} that a "
                "DiffusersBackbone or a schedule is attached to; call detach() of the backbone, or "
                "remove() of the schedule's handle, first"
            )

    def attach(self) -> None:
        """Let the blocks look up their plan; without one they run as before."""
        for block in self.blocks:
            plain_class: Any = type(block)
            block.__class__ = _exit_class(plain_class)

    @property
    def time_scale(self) -> float:
        """Times the transformer's timestep gives that of its pipeline's scheduler.

        SanaPipeline multiplies by `timestep_scale` of the network's config; SanaSprintPipeline,
        whose networks alone embed the guidance, gives rectified flow's time from 0 to 1.
        """
        config: Mapping[str, Any] = getattr(self.model, "config", {})
        if self.spec is SPECS["SanaTransformer2DModel"]:
            scale = config.get("timestep_scale", 1.0)
            return 1000.0 if config.get("guidance_embeds") else 1.0 / scale
        return self.spec.time_scale

    @property
    def blocks(self) -> list[nn.Module]:
        """The droppable blocks, first to run first."""
        found: list[nn.Module] = []
        for name in self.spec.lists:
            blocks = self.model.get_submodule(name)
            assert isinstance(blocks, nn.ModuleList)
            found += blocks
        return found

    def begin(self, exit_depth: int | list[int], earlier: list[Any] | None = None) -> None:
        """Apply `exit_depth` (one count for the batch, or one per sample) to the network's next
        call; `end` must follow. `earlier` as in `ExitPlan`.

        Raises:
            ConfigError: gradient checkpointing, which runs blocks again when the plan is gone.
        """
        if (
            exit_depth != len(self.blocks)
            and getattr(self.model, "gradient_checkpointing", False)
            and torch.is_grad_enabled()
        ):
            raise ConfigError(
                "early exit can't be combined with gradient checkpointing, which runs dropped "
                "blocks again; got a network with checkpointing on; call "
                "transformer.disable_gradient_checkpointing()"
            )
        _plan.set(ExitPlan(self.blocks, self.spec.block_outputs, exit_depth, earlier))

    def end(self) -> int:
        """Forget the plan; the number of blocks that ran under it."""
        plan = _plan.get()
        _plan.set(None)
        return 0 if plan is None else plan.block_calls

    def detach(self) -> None:
        """Make the blocks what they were; does nothing the second time."""
        for block in self.blocks:
            if isinstance(block, _ExitBlock):
                block.__class__ = block.plain_class


def spec_of(model: nn.Module, specs: Mapping[str, TransformerSpec] = SPECS) -> TransformerSpec:
    """The entry of a table for a network.

    Raises:
        ConfigError: a class that is not in the table.
    """
    for cls in type(model).__mro__:
        if cls.__name__ in specs:
            return specs[cls.__name__]
    raise ConfigError(
        "early exit needs a transformer whose blocks form one sequence, with no later code reading "
        f"a block's side output; got {type(model).__name__}; supported are {', '.join(specs)}"
    )
