"""DiT weights between the official parameter names and those of diffusers' `DiTTransformer2DModel`.

The two hold the same tensors, but for: diffusers keeps one q, k and v, gives every block its own
copy of the timestep and label embedders, and does not store the fixed positions. They do not
compute the same: diffusers spaces the timestep frequencies over 127 steps instead of 128
(`frequency_shift`, not in its config) and has another `norm_eps` by default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from asesearch.backbones.dit import sincos_pos_embed
from asesearch.errors import CheckpointError, ConfigError
from asesearch.files import some

_PARTS = ("weight", "bias")
_NETWORK = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_BLOCK = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
_EMBEDDERS = {
    "t_embedder.mlp.0.weight": "norm1.emb.timestep_embedder.linear_1.weight",
    "t_embedder.mlp.0.bias": "norm1.emb.timestep_embedder.linear_1.bias",
    "t_embedder.mlp.2.weight": "norm1.emb.timestep_embedder.linear_2.weight",
    "t_embedder.mlp.2.bias": "norm1.emb.timestep_embedder.linear_2.bias",
    "y_embedder.embedding_table.weight": "norm1.emb.class_embedder.embedding_table.weight",
}
_SIZES = (
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "num_layers",
    "sample_size",
    "patch_size",
    "num_embeds_ada_norm",
)
#: What our DiT can reproduce of a diffusers config.
_FIXED = {
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
}


def _names(depth: int) -> dict[str, str]:
    """Official name -> diffusers name, of everything that is stored one to one."""
    pairs = {f"{a}.{p}": f"{b}.{p}" for a, b in _NETWORK.items() for p in _PARTS}
    for i in range(depth):
        pairs |= {
            f"blocks.{i}.{a}.{p}": f"transformer_blocks.{i}.{b}.{p}"
            for a, b in _BLOCK.items()
            for p in _PARTS
        }
    return pairs


def refuse_mismatch(
    where: str, missing: list[str], unexpected: list[str], misshapen: list[str], fix: str
) -> None:
    """Raise one error that names up to five entries of each kind; nothing if there are none.

    Raises:
        CheckpointError: any list is not empty.
    """
    parts = []
    for kind, names in (
        ("missing", missing),
        ("unexpected", unexpected),
        ("of another shape", misshapen),
    ):
        if names:
            parts.append(f"{len(names)} {kind}: {some(names, 5)}")
    if parts:
        raise CheckpointError(
            f"{where} does not hold what the network needs; {'; '.join(parts)}; {fix}"
        )


def dit_to_diffusers(
    state: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Official DiT to diffusers.

    Tensors are not copied: blocks share the embedders and q, k, v are views.

    Args:
        state: official parameter names.
        config: `DiT.config`.

    Returns:
        The state dict and the constructor arguments of `DiTTransformer2DModel`. A network with
        `frequency_shift` 0 (all official ones) computes the same there only once every block's
        `norm1.emb.time_proj.downscale_freq_shift` is set
        to 0: diffusers fixes it at 1 and has no argument for it.

    Raises:
        ConfigError: a network that diffusers has no configuration for.
        CheckpointError: the positions are not the fixed ones, which are all that diffusers can
            have.
    """
    if config["mlp_ratio"] != 4 or config["class_dropout_prob"] == 0:
        raise ConfigError(
            f"diffusers' DiT has mlp_ratio 4 and a null label; got mlp_ratio {config['mlp_ratio']} "
            f"and class_dropout_prob {config['class_dropout_prob']}; deploy this network as a "
            "bundle"
        )
    depth = config["depth"]
    heads = config["num_heads"]
    width = config["hidden_size"]
    fixed = sincos_pos_embed(width, config["input_size"] // config["patch_size"])[None]
    rounded = 2**-9  # by weights in bfloat16, of values up to 1
    if not torch.allclose(state["pos_embed"].float().cpu(), fixed, rtol=0, atol=rounded):
        raise CheckpointError(
            "diffusers' DiT has fixed sine-cosine positions; got others; deploy this network as a "
            "bundle"
        )
    out = {theirs: state[ours] for ours, theirs in _names(depth).items()}
    for i in range(depth):
        block = f"transformer_blocks.{i}"
        out |= {f"{block}.{theirs}": state[ours] for ours, theirs in _EMBEDDERS.items()}
        for part in _PARTS:
            qkv = state[f"blocks.{i}.attn.qkv.{part}"].chunk(3)
            out |= {f"{block}.attn1.to_{n}.{part}": x for n, x in zip("qkv", qkv, strict=True)}
    return out, {
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": config["in_channels"],
        "out_channels": config["in_channels"] * (2 if config["learn_sigma"] else 1),
        "num_layers": depth,
        "sample_size": config["input_size"],
        "patch_size": config["patch_size"],
        "num_embeds_ada_norm": config["num_classes"],
        "norm_eps": config.get("norm_eps", 1e-6),
        **_FIXED,
    }


def check_eps(config: Mapping[str, Any]) -> None:
    """Refuse a diffusers config whose norms can't be computed.

    Raises:
        CheckpointError: no number between 0 and 1.
    """
    eps = config.get("norm_eps", 1e-5)
    if type(eps) not in (int, float) or not 0 < eps < 1:
        raise CheckpointError(
            f"norm_eps must be a number between 0 and 1; got {eps!r} in config.json; fetch it again"
        )


def diffusers_dit_args(config: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments of our DiT for a diffusers `config.json`.

    Raises:
        CheckpointError: a field is missing, or a setting that our DiT does not have.
    """
    other = [f"{k} = {config[k]!r}" for k, v in _FIXED.items() if config.get(k, v) != v]
    if other:
        raise CheckpointError(
            f"a DiT of diffusers must have {', '.join(f'{k} = {v!r}' for k, v in _FIXED.items())}; "
            f"got {', '.join(other)}; load it with kind = 'diffusers'"
        )
    bad = [
        f"{k} = {config.get(k)!r}"
        for k in _SIZES
        if type(config.get(k)) is not int or config[k] < 1
    ]
    if bad:
        raise CheckpointError(
            f"config.json must give a DiT's sizes as positive integers; got {', '.join(bad)}; "
            "fetch it again"
        )
    check_eps(config)
    channels = config["in_channels"]
    out_channels = config.get("out_channels") or channels
    if out_channels not in (channels, 2 * channels):
        raise CheckpointError(
            f"out_channels must be once or twice in_channels; got {out_channels}, {channels}; "
            "fetch it again"
        )
    return {
        "input_size": config["sample_size"],
        "patch_size": config["patch_size"],
        "in_channels": channels,
        "hidden_size": config["num_attention_heads"] * config["attention_head_dim"],
        "depth": config["num_layers"],
        "num_heads": config["num_attention_heads"],
        "num_classes": config["num_embeds_ada_norm"],
        "learn_sigma": out_channels == 2 * channels,
        "frequency_shift": 1,
        "norm_eps": config.get("norm_eps", 1e-5),
    }


def diffusers_to_dit(
    state: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """diffusers to official DiT.

    Returns:
        The state dict under official names, and the constructor arguments of our DiT that make it
        compute what diffusers
        computes: `frequency_shift` 1 and the config's `norm_eps`. Override them (0 and 1e-6) for
            weights that come from
        the official code and were only converted.

    Raises:
        CheckpointError: another architecture, missing or unexpected entries, or blocks whose
            embedders have diverged, as
            training in diffusers makes them: official DiT has one embedder for all blocks.
    """
    args = diffusers_dit_args(config)
    depth, names = args["depth"], _names(args["depth"])
    blocks = [f"transformer_blocks.{i}" for i in range(depth)]
    needed = {*names.values()} | {f"{b}.{e}" for b in blocks for e in _EMBEDDERS.values()}
    needed |= {f"{b}.attn1.to_{n}.{p}" for b in blocks for n in "qkv" for p in _PARTS}
    given = state.keys() - {"pos_embed.pos_embed"}  # stored by older releases
    refuse_mismatch(
        "the diffusers DiT", sorted(needed - given), sorted(given - needed), [], "fetch it again"
    )
    for block in blocks[1:]:
        for entry in _EMBEDDERS.values():
            if not torch.equal(state[f"{block}.{entry}"], state[f"{blocks[0]}.{entry}"]):
                raise CheckpointError(
                    f"all blocks must have the same embedders; got another {entry} in {block}, as "
                    "after training in diffusers; load it with kind = 'diffusers'"
                )
    out = {ours: state[theirs] for ours, theirs in names.items()}
    out |= {ours: state[f"{blocks[0]}.{theirs}"] for ours, theirs in _EMBEDDERS.items()}
    for i, block in enumerate(blocks):
        for part in _PARTS:
            out[f"blocks.{i}.attn.qkv.{part}"] = torch.cat(
                [state[f"{block}.attn1.to_{n}.{part}"] for n in "qkv"]
            )
    out["pos_embed"] = sincos_pos_embed(
        args["hidden_size"], args["input_size"] // args["patch_size"]
    )[None]
    return out, args
