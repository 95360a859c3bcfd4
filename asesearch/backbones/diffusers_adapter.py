"""diffusers' transformers under the backbone contract, and their checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn

from asesearch.backbones.base import Backbone, ExitDepth, check_labels
from asesearch.backbones.block_exits import SPECS, BlockExits
from asesearch.backbones.conditioning import MASK, TOKENS, Conditioning, prompt_of, repeat
from asesearch.backbones.conversion import check_eps
from asesearch.backbones.files import read_checkpoint
from asesearch.backbones.finite import as_float32, refuse_not_finite, refuse_zero
from asesearch.backbones.folders import (
    CONFIG,
    class_name,
    find_folder,
    load_pretrained,
    read_config,
    weight_files,
)
from asesearch.backbones.scheduler import refuse_prediction
from asesearch.errors import CheckpointError, ConfigError, in_one_line


def _build(config: Mapping[str, Any]) -> nn.Module:
    """A network with random weights from `_class_name` and the constructor's arguments."""
    name = config.get("_class_name")
    if name not in SPECS or not hasattr(diffusers, name):
        raise ConfigError(
            f"_class_name must be a supported diffusers class; got {name!r}; supported are "
            f"{', '.join(SPECS)}"
        )
    arguments = {k: v for k, v in config.items() if not k.startswith("_")}
    try:
        model = getattr(diffusers, name)(**arguments)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ConfigError(
            f"{name} must accept its constructor arguments; got {arguments}: {error}; correct them"
        ) from error
    assert isinstance(model, nn.Module)
    return model


class DiffusersBackbone(Backbone):
    """A diffusers transformer under the backbone contract. Its parameters are found under
    `transformer.`.

    `y` is (N,) class labels for DiT. The other networks take a prompt's conditioning: a dict of
    tensors with leading dimension N in any floating type, keys as in `SPECS` (PixArt's
    micro-conditions `resolution` (N, 2) and `aspect_ratio` (N, 1) stand beside the rest);
    `num_classes` is 0, and guidance needs `null_condition`. `prediction_type` is `flow` where the
    network gives a velocity rather than noise: such a network can be trained and sampled by a
    flow-matching method only.

    Args:
        transformer: the network, which stays attached until `detach()`; or its diffusers config
            (`_class_name` and the constructor's arguments), for one with random weights.
        null_condition: what stands for "no prompt", as a rule the embedding of an empty one:
            tensors with leading dimension 1, in any floating type. It is in neither state dict nor
            config, but in the files of `save_backbone`.

    Raises:
        ConfigError: as `BlockExits`; a config that makes no network; a null condition of other
            names or shapes.
    """

    def __init__(
        self,
        transformer: nn.Module | Mapping[str, Any],
        null_condition: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        model: Any = transformer if isinstance(transformer, nn.Module) else _build(transformer)
        self.exits = BlockExits(model)
        self.transformer = model
        config = dict(model.config)
        arguments = {k: v for k, v in config.items() if not k.startswith("_")}
        self.config = {"transformer": {"_class_name": type(model).__name__, **arguments}}
        self.prediction_type = self.exits.spec.prediction_type
        self.depth = len(self.exits.blocks)
        self.input_size = config["sample_size"]
        # the pipelines guide every channel
        self.in_channels = self.guided_channels = config["in_channels"]
        self.num_classes = (
            config["num_embeds_ada_norm"] if "class_labels" in self.exits.spec.required else 0
        )
        self.takes_prompt = not self.num_classes
        self.has_null_label = bool(self.num_classes or null_condition)
        self._width = (
            config.get("caption_channels")
            or config.get("joint_attention_dim")
            or config.get("cross_attention_dim")
        )
        channels = config["out_channels"] or self.in_channels
        if channels not in (self.in_channels, 2 * self.in_channels):
            raise ConfigError(
                f"out_channels must be in_channels = {self.in_channels}, or twice as many; got "
                f"{channels}; such a network predicts neither noise nor noise and variance"
            )
        self.learn_sigma = channels == 2 * self.in_channels
        self._check_null(null_condition or {})
        if null_condition:
            null_condition = self._cast(null_condition)
            self.null_condition = {k: v.cpu() for k, v in null_condition.items()}
        for name, value in (null_condition or {}).items():
            self.register_buffer(f"null_{name}", value, persistent=False)
        self.train(model.training)
        self.exits.attach()

    @property
    def _keys(self) -> tuple[str, ...]:
        spec = self.exits.spec
        return spec.required + spec.optional + spec.added

    def _check_null(self, null_condition: Mapping[str, Tensor]) -> None:
        got = {k: tuple(v.shape) for k, v in null_condition.items()}
        allowed = () if self.num_classes else self._keys
        if not got.keys() <= set(allowed) or any(shape[:1] != (1,) for shape in got.values()):
            raise ConfigError(
                "null_condition takes tensors with leading dimension 1 under the names "
                f"{', '.join(allowed) or '(none)'}; got {got}; class labels have a null label of "
                "their own"
            )
        self._check_shapes(null_condition)

    def _check_shapes(self, prompt: Mapping[str, Tensor]) -> None:
        """Refuse an embedding, its mask or its width, that the transformer would fail on."""
        cls = type(self.transformer).__name__
        tokens = prompt.get(TOKENS)
        if tokens is None:
            return
        if tokens.ndim != 3:
            raise ConfigError(
                f"{TOKENS} of {cls} must have shape (N, L, {self._width}), L tokens a prompt; got "
                f"{tuple(tokens.shape)}; give all of the text encoder's output"
            )
        if tokens.shape[-1] != self._width:
            raise ConfigError(
                f"{cls} takes prompt embeddings {self._width} wide; got {tokens.shape[-1]}; use "
                "the text encoder it was trained with"
            )
        mask = prompt.get(MASK)
        shapes = (tokens.shape[:2], (tokens.shape[0], 1, tokens.shape[1]))  # a bias is diffusers'
        if mask is not None and tuple(mask.shape) not in shapes:
            raise ConfigError(
                f"{MASK} must be {tuple(tokens.shape[:2])}, one entry for each token; got "
                f"{tuple(mask.shape)}; give the text encoder's own"
            )

    def _cast(self, prompt: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Floating tensors in the network's type, which text encoders may not have."""
        dtype = next(self.transformer.parameters()).dtype
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in prompt.items()}

    def train(self, mode: bool = True) -> DiffusersBackbone:
        """As usual, but diffusers' own label dropout, one draw a block, stays off: the training
        loop drops labels."""
        super().train(mode)
        for module in self.transformer.modules():
            if isinstance(module, LabelEmbedding):
                module.training = False
        return self

    def forward(
        self, x_t: Tensor, t: Tensor, y: Conditioning | None = None, *, exit_depth: ExitDepth = None
    ) -> Tensor:
        exit_depths = self.check_exit_depth(exit_depth, x_t.shape[0])
        conditioning = self._arguments(y, x_t.shape[0])
        self.exits.begin(exit_depths)
        return self._call(x_t, t, conditioning)

    def all_exits(self, x_t: Tensor, t: Tensor, y: Conditioning | None = None) -> Iterator[Tensor]:
        conditioning = self._arguments(y, x_t.shape[0])
        latest: list[Any] = []
        for exit_depth in range(1, self.depth + 1):
            self.exits.begin(exit_depth, latest)
            yield self._call(x_t, t, conditioning)

    def _call(self, x_t: Tensor, t: Tensor, conditioning: dict[str, Any]) -> Tensor:
        """The transformer's output (N, C or 2·C, H, W) under the plan that was begun."""
        try:
            out: Tensor = self.transformer(x_t, timestep=t, return_dict=False, **conditioning)[0]
        finally:
            self.exits.end()
        return out

    def check_conditioning(self, y: Conditioning | None, batch: int) -> None:
        self._arguments(y, batch)
        self._check_shapes(prompt_of(y) or {})

    def _arguments(self, y: Conditioning | None, batch: int) -> dict[str, Any]:
        """`y` as arguments of the transformer's forward.

        Raises:
            ConfigError: labels for prompts or the reverse, missing or unknown names, another
                leading dimension.
        """
        spec = self.exits.spec
        prompt = prompt_of(y)
        if self.num_classes and prompt is None:
            check_labels(self, y, batch)
            return {"class_labels": y}
        required = spec.required + (
            spec.added if getattr(self.transformer, "use_additional_conditions", False) else ()
        )
        got = {k: tuple(v.shape) for k, v in (prompt or {}).items()}
        fits = set(required) <= got.keys() <= set(self._keys) and all(
            shape[:1] == (batch,) for shape in got.values()
        )
        if self.num_classes or prompt is None or not fits:
            wanted = (
                "(N,) class labels" if self.num_classes else f"a dict with {', '.join(required)}"
            )
            raise ConfigError(
                f"y of {type(self.transformer).__name__} must be {wanted}, N = {batch}; got "
                f"{got or type(y).__name__}; it may hold {', '.join(self._keys)} and no more"
            )
        prompt = self._cast(prompt)
        added = {name: prompt[name] for name in spec.added if name in prompt}
        rest = {name: value for name, value in prompt.items() if name not in added}
        return {**rest, "added_cond_kwargs": added} if added else rest

    def null_labels(self, y: Conditioning) -> Conditioning:
        prompt = prompt_of(y)
        if prompt is None:
            return super().null_labels(y)
        if self.null_condition is None:
            raise ConfigError(
                "guidance needs a null condition; got none for this network; "
                "pass null_condition, the embedding of an empty prompt, to DiffusersBackbone"
            )
        batch, device = next((len(value), value.device) for value in prompt.values())
        null = {name: self.get_buffer(f"null_{name}") for name in self.null_condition}
        # training drops prompts on the CPU
        if any(value.device != device for value in null.values()):
            null = {name: value.to(device) for name, value in self.null_condition.items()}
        # micro-conditions are the prompt's, its mask is not
        rest = {name: value for name, value in prompt.items() if name != MASK}
        return rest | (prompt_of(repeat(null, batch)) or {})

    def time_embedder(self) -> nn.Module:
        """The timestep embedders: one, or one per block in DiT."""
        found = [
            m for name, m in self.transformer.named_modules() if name.endswith("timestep_embedder")
        ]
        return nn.ModuleList(found)

    def block_at(self, index: int) -> nn.Module:
        return self.exits.blocks[index]

    def detach(self) -> nn.Module:
        """Give the diffusers transformer back as it was (the weights as they are now); this object
        is then spent."""
        self.exits.detach()
        self.transformer.train(self.training)
        transformer: nn.Module = self.transformer
        return transformer


def load_diffusers(
    path: Path, null_condition: Mapping[str, Tensor] | None = None
) -> DiffusersBackbone:
    """Read a diffusers transformer in float32 from a local folder; nothing is downloaded, and of a
    pickle nothing but tensors is read.

    Args:
        path: folder with `config.json` and safetensors (sharded or not) or a `.bin` file, or a
            pipeline's with these in `transformer/`.
        null_condition: as in `DiffusersBackbone`.

    Raises:
        CheckpointError: a file is missing or unreadable, an unsupported class, weights that do
            not fit the config, or a pipeline whose scheduler takes the output for something else
            than noise.
    """
    folder = find_folder(path, "transformer")
    name = _supported_class(folder)
    check_eps(read_config(folder))
    refuse_prediction(folder)
    if weight_files(folder)[0].endswith(".bin"):
        model = _without_weights(folder, name)
        bad = {"weights": ["of other names or shapes"]}
    else:
        model, unfit = load_pretrained(
            getattr(diffusers, name), folder, name, torch_dtype=torch.float32
        )
        bad = {key: names[:3] for key, names in unfit.items()}
    if bad and not _unwrap(model, folder):
        raise CheckpointError(
            f"the weights in {folder} must fit its config; got {bad}; save it again with diffusers"
        )
    refuse_not_finite(model.state_dict(), f"{folder} ({name})")
    refuse_zero(model.state_dict(), f"{folder} ({name})")
    return DiffusersBackbone(model, null_condition)


def _without_weights(folder: Path, name: str) -> nn.Module:
    """The network of a folder's config, whose weights are still to come."""
    try:
        made: nn.Module = getattr(diffusers, name).from_config(read_config(folder))
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        reason = in_one_line(error)
        raise CheckpointError(
            f"{folder / CONFIG} must describe a {name}; got {reason}; fetch it again"
        ) from error
    return made.eval()


def _unwrap(model: nn.Module, folder: Path) -> bool:
    """Give a network the weights of a folder whose names have what training programs put in front;
    whether they fit."""
    state = read_checkpoint(folder).state
    own = model.state_dict()
    if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in own.items()}:
        return False
    single = {k: as_float32(k, v, str(folder)) for k, v in state.items()}
    model.load_state_dict(single, assign=True)
    return True


def _supported_class(folder: Path) -> str:
    """The class that a folder's config names."""
    name = class_name(read_config(folder))
    if name not in SPECS or not hasattr(diffusers, str(name)):
        raise CheckpointError(
            f"_class_name in {folder / CONFIG} must be a supported class of the installed "
            f"diffusers; got {name!r}; supported are {', '.join(SPECS)}"
        )
    return str(name)
