"""U-ViT with early exit. Parameter names, presets and arithmetic are the official ones.

Source: Bao et al., "All are Worth Words: A ViT Backbone for Diffusion Models", CVPR 2023, and its
released code (baofff/U-ViT, `libs/uvit.py` and `configs/`); early exit: Moon et al. 2024, section
3.2 and Figure 8.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from asesearch.backbones.base import Backbone, ExitDepth, check_labels
from asesearch.backbones.conditioning import Conditioning, labels_of
from asesearch.backbones.dit import Attention, Mlp, PatchEmbed, timestep_embedding, unpatchify
from asesearch.errors import ConfigError

_S: dict[str, Any] = {
    "in_chans": 3,
    "embed_dim": 512,
    "depth": 12,
    "num_heads": 8,
    "num_classes": -1,
    "conv": True,
}
_M: dict[str, Any] = {"in_chans": 3, "embed_dim": 768, "depth": 16, "num_heads": 12, "conv": True}
_L: dict[str, Any] = {"embed_dim": 1024, "depth": 20, "num_heads": 16, "conv": True}
_H: dict[str, Any] = {"embed_dim": 1152, "depth": 28, "num_heads": 16, "conv": False}
_PIXELS: dict[str, Any] = {"in_chans": 3, "num_classes": 1000, "has_null_label": False}
_LATENTS: dict[str, Any] = {"in_chans": 4, "num_classes": 1001}
#: Of those trained in discrete time, whose steps their code counts from 1.
_FROM_ONE: dict[str, Any] = {"time_offset": 1.0}

#: The released networks of this class: name -> constructor arguments. The two ImageNet-64 ones have
#: no null label, so no classifier-free guidance. (The two for text, `libs/uvit_t2i.py`, are another
#: class.)
PRESETS: dict[str, dict[str, Any]] = {
    "U-ViT-S/2-CIFAR10": {"img_size": 32, "patch_size": 2, **_S},
    "U-ViT-S/4-CelebA64": {"img_size": 64, "patch_size": 4, **_S},
    "U-ViT-M/4-ImageNet64": {"img_size": 64, "patch_size": 4, **_M, **_PIXELS},
    "U-ViT-L/4-ImageNet64": {"img_size": 64, "patch_size": 4, **_L, **_PIXELS},
    "U-ViT-L/2-ImageNet256": {"img_size": 32, "patch_size": 2, **_L, **_LATENTS},
    "U-ViT-H/2-ImageNet256": {"img_size": 32, "patch_size": 2, **_H, **_LATENTS, **_FROM_ONE},
    "U-ViT-L/4-ImageNet512": {"img_size": 64, "patch_size": 4, **_L, **_LATENTS},
    "U-ViT-H/4-ImageNet512": {"img_size": 64, "patch_size": 4, **_H, **_LATENTS, **_FROM_ONE},
}


def trained_under(name: str) -> dict[str, str]:
    """The forward process of a released network, as `[diffusion]` gives it.

    Source: baofff/U-ViT, the training commands of its README: `train.py` and `train_ldm.py` are in
    continuous time, `train_ldm_discrete.py` has Stable Diffusion's betas.
    """
    if "time_offset" in PRESETS[name]:
        return {"process": "discrete", "beta_schedule": "scaled_linear"}
    return {"process": "vp-sde"}


class UViTBlock(nn.Module):
    """Pre-norm transformer block: (N, L, D) -> (N, L, D). A decoder block also owns the merging of
    its long skip."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        qk_scale: float | None,
        skip: bool,
        use_checkpoint: bool,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, qkv_bias, qk_scale)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), approximate="none")
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None
        self.use_checkpoint = use_checkpoint

    def merge(self, x: Tensor, skip: Tensor) -> Tensor:
        """Take the long skip in, which a dropped block still does: (N, L, D), (N, L, D) -> (N, L,
        D)."""
        if self.skip_linear is None:
            return x
        merged: Tensor = self.skip_linear(torch.cat([x, skip], dim=-1))
        return merged

    def _attend(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out

    def forward(self, x: Tensor) -> Tensor:
        """What a dropped block leaves out."""
        if self.use_checkpoint and torch.is_grad_enabled():
            out: Tensor = checkpoint(self._attend, x, use_reentrant=False)
            return out
        return self._attend(x)


def _check_sizes(
    img_size: int, patch_size: int, embed_dim: int, num_heads: int, depth: int
) -> None:
    if img_size % patch_size:
        raise ConfigError(
            f"patch_size must divide img_size; got {patch_size} and {img_size}; pad or choose "
            "another"
        )
    if embed_dim % num_heads:
        raise ConfigError(
            f"embed_dim must be a multiple of num_heads; got {embed_dim} and {num_heads}"
        )
    if depth < 2 or depth % 2:
        raise ConfigError(
            f"depth must be even, half encoder, half decoder; got {depth}; the middle block is "
            "not counted"
        )


def _check_classes(num_classes: int, has_null_label: bool) -> None:
    if num_classes == 1 and has_null_label:
        raise ConfigError(
            "num_classes counts the null label and some label; got 1; set has_null_label to "
            "false, or add one"
        )


def _time_mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))


class UViT(Backbone):
    """Transformer with long skip connections whose trailing decoder blocks may be dropped.

    `depth` the argument is the official one: twice the decoder blocks, and one block in the middle
    on top. `depth` the attribute counts what may be dropped, the decoder blocks; `exit_depth` 0
    drops all of them. A dropped block keeps its `skip_linear`, so every long skip arrives.

    Arguments are the official constructor's (but `norm_layer`), and two that the official code has
    elsewhere. `has_null_label`: whether the last of the `num_classes` embeddings is the null label
    of classifier-free guidance. `time_offset`: what is added to the timestep, 1 for networks that
    count discrete timesteps from 1, as `train_ldm_discrete.py` does. `num_classes` the attribute
    does not count the null label.

    Raises:
        ConfigError: sizes that do not fit each other.
    """

    min_exit_depth = 0
    capturable = True

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        mlp_time_embed: bool = False,
        num_classes: int = -1,
        use_checkpoint: bool = False,
        conv: bool = True,
        skip: bool = True,
        has_null_label: bool = True,
        time_offset: float = 0.0,
    ) -> None:
        super().__init__()
        _check_sizes(img_size, patch_size, embed_dim, num_heads, depth)
        _check_classes(num_classes, has_null_label)
        self.config: dict[str, Any] = {
            "img_size": img_size,
            "patch_size": patch_size,
            "in_chans": in_chans,
            "embed_dim": embed_dim,
            "depth": depth,
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
            "qkv_bias": qkv_bias,
            "qk_scale": qk_scale,
            "mlp_time_embed": mlp_time_embed,
            "num_classes": num_classes,
            "use_checkpoint": use_checkpoint,
            "conv": conv,
            "skip": skip,
            "has_null_label": has_null_label,
        }
        if time_offset:
            self.config["time_offset"] = time_offset
        self.time_offset = time_offset
        labelled = num_classes > 0
        self.depth = depth // 2
        self.input_size = img_size
        self.patch_size = patch_size
        self.embed_dim = embed_dim
        self.in_channels = self.guided_channels = in_chans
        self.has_null_label = labelled and has_null_label
        self.learn_sigma = False
        self.num_classes = num_classes - self.has_null_label if labelled else 0
        self.extras = 2 if labelled else 1  # tokens before the patches: label, time

        def blocks(count: int, skip: bool) -> list[UViTBlock]:
            args = (embed_dim, num_heads, mlp_ratio, qkv_bias, qk_scale, skip, use_checkpoint)
            return [UViTBlock(*args) for _ in range(count)]

        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.time_embed: nn.Module = _time_mlp(embed_dim) if mlp_time_embed else nn.Identity()
        if labelled:
            self.label_emb = nn.Embedding(num_classes, embed_dim)
        self.pos_embed = nn.Parameter(
            torch.zeros(1, self.extras + (img_size // patch_size) ** 2, embed_dim)
        )
        self.in_blocks = nn.ModuleList(blocks(depth // 2, skip=False))
        self.mid_block = blocks(1, skip=False)[0]
        self.out_blocks = nn.ModuleList(blocks(depth // 2, skip=skip))
        self.norm = nn.LayerNorm(embed_dim)
        self.decoder_pred = nn.Linear(embed_dim, patch_size**2 * in_chans)
        self.final_layer: nn.Module = (
            nn.Conv2d(in_chans, in_chans, 3, padding=1) if conv else nn.Identity()
        )
        self.initialize_weights()

    @staticmethod
    def preset_args(name: str) -> dict[str, Any]:
        """The constructor arguments of a released network.

        Raises:
            ConfigError: unknown name.
        """
        if name not in PRESETS:
            raise ConfigError(f"unknown U-ViT preset {name!r}; choose one of {', '.join(PRESETS)}")
        return dict(PRESETS[name])

    def initialize_weights(self) -> None:
        """Initialise as the official code: N(0, 0.02) cut at ±2 for linear layers and positions."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def time_embedder(self) -> nn.Module | None:
        return None if isinstance(self.time_embed, nn.Identity) else self.time_embed

    def block_at(self, index: int) -> UViTBlock:
        block = self.out_blocks[index]
        assert isinstance(block, UViTBlock)
        return block

    @property
    def fixed_blocks(self) -> int:
        return len(self.in_blocks) + 1

    def transformer_blocks(self) -> list[nn.Module]:
        return [*self.in_blocks, self.mid_block, *self.out_blocks]

    def _embed(self, x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """Tokens, label first, then time, then patches: (N, extras + L, D)."""
        patches = self.patch_embed(x_t)  # (N, L, D)
        t = t + self.time_offset if self.time_offset else t
        freqs = timestep_embedding(t, self.embed_dim)
        time = self.time_embed(freqs.to(patches.dtype))  # (N, D)
        parts = [time[:, None], patches]
        if y is not None:
            parts.insert(0, self.label_emb(y)[:, None])
        return torch.cat(parts, dim=1) + self.pos_embed

    def forward(
        self, x_t: Tensor, t: Tensor, y: Tensor | None = None, *, exit_depth: ExitDepth = None
    ) -> Tensor:
        n = x_t.shape[0]
        depths = self.check_exit_depth(exit_depth, n)
        check_labels(self, y, n)
        x = self._embed(x_t, t, y)  # (N, extras + L, D)
        order: Tensor | None = None
        # deepest first, so that each block runs on the head of the batch
        if isinstance(depths, list):
            order = torch.tensor(sorted(range(n), key=lambda i: -depths[i]))
            order = order.to(x.device, non_blocking=True)
            active = [sum(d > i for d in depths) for i in range(self.depth)]
            x = x[order]
        else:
            active = [n if i < depths else 0 for i in range(self.depth)]
        x, skips = self._encode(x)
        for i, count in enumerate(active):
            block = self.block_at(i)
            x = block.merge(x, skips.pop())
            if count == n:
                x = block(x)
            elif count:
                x = torch.cat([block(x[:count]), x[count:]])
        if order is not None:
            x = x[torch.argsort(order)]
        return self._head(x)

    def all_exits(self, x_t: Tensor, t: Tensor, y: Conditioning | None = None) -> Iterator[Tensor]:
        check_labels(self, y, x_t.shape[0])
        x, skips = self._encode(self._embed(x_t, t, labels_of(y)))
        yield self._head(self._merge_rest(x, skips))
        for i in range(self.depth):
            block = self.block_at(i)
            x = block(block.merge(x, skips.pop()))  # (N, extras + L, D)
            yield self._head(self._merge_rest(x, skips))

    def _encode(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Tokens after the middle block, and the long skips, the first decoder block's last."""
        skips = []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        return self.mid_block(x), skips

    def _merge_rest(self, x: Tensor, skips: list[Tensor]) -> Tensor:
        """What the blocks dropped still do, one for each skip that is left."""
        for i in range(self.depth - len(skips), self.depth):
            x = self.block_at(i).merge(x, skips[self.depth - 1 - i])
        return x

    def _head(self, x: Tensor) -> Tensor:
        """(N, extras + L, D) -> (N, C, H, W)."""
        x = self.decoder_pred(self.norm(x))[:, self.extras :]  # (N, L, patch²·C)
        grid = self.input_size // self.patch_size
        out: Tensor = self.final_layer(unpatchify(x, grid, self.patch_size))
        return out
