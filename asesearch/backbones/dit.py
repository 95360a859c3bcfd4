"""DiT with early exit. Parameter names, presets and arithmetic are the official ones.

Source: Peebles & Xie, "Scalable Diffusion Models with Transformers", ICCV 2023, and its released
code (facebookresearch/DiT, `models.py`); early exit: Moon et al. 2024, section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asesearch.backbones.base import Backbone, ExitDepth, check_labels, run_blocks
from asesearch.backbones.conditioning import Conditioning
from asesearch.errors import ConfigError

#: Official presets: name -> depth, hidden_size, num_heads. The patch size is chosen apart
#: ("DiT-XL/2").
PRESETS: dict[str, tuple[int, int, int]] = {
    "DiT-XL": (28, 1152, 16),
    "DiT-L": (24, 1024, 16),
    "DiT-B": (12, 768, 12),
    "DiT-S": (12, 384, 6),
}
PATCH_SIZES = (2, 4, 8)


def timestep_embedding(t: Tensor, dim: int, frequency_shift: int = 0) -> Tensor:
    """Sinusoidal embedding of t, cosines first: (N,) -> (N, dim) float32."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    freqs = torch.exp(-math.log(10000) * steps / (half - frequency_shift))
    args = t[:, None].float() * freqs[None]  # (N, dim/2)
    emb = torch.cat([torch.cos(args), torch.sin(args)], dim=-1)  # (N, dim)
    return F.pad(emb, (0, dim % 2))


def unpatchify(x: Tensor, grid: int, patch_size: int) -> Tensor:
    """Patches to an image of `grid` × `grid` of them: (N, grid², patch²·C) -> (N, C, H, W)."""
    n = x.shape[0]
    p = patch_size
    c = x.shape[2] // p**2
    x = x.view(n, grid, grid, p, p, c).permute(0, 5, 1, 3, 2, 4)  # (N, C, grid, p, grid, p)
    return x.reshape(n, c, grid * p, grid * p)


def sincos_pos_embed(dim: int, grid: int) -> Tensor:
    """Fixed 2-D sine-cosine position embedding: (grid², dim) float32, w before h as in the official
    code."""
    omega = 1.0 / 10000 ** (np.arange(dim // 4, dtype=np.float64) / (dim / 4.0))
    rows, cols = np.meshgrid(np.arange(grid), np.arange(grid), indexing="ij")
    parts = []
    for pos in (cols, rows):
        out = np.outer(pos.reshape(-1), omega)  # (grid², dim/4)
        parts += [np.sin(out), np.cos(out)]
    return torch.from_numpy(np.concatenate(parts, axis=1)).float()


class PatchEmbed(nn.Module):
    """Image to patch tokens: (N, C, H, W) -> (N, L, D)."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        # contiguous, or every block would run on transposed tokens, 3 to 6 % slower
        tokens: Tensor = self.proj(x).flatten(2).transpose(1, 2).contiguous()  # (N, L, D)
        return tokens


class TimestepEmbedder(nn.Module):
    """Timestep to vector: (N,) -> (N, D)."""

    def __init__(
        self, hidden_size: int, frequency_embedding_size: int = 256, frequency_shift: int = 0
    ) -> None:
        super().__init__()
        first = nn.Linear(frequency_embedding_size, hidden_size)
        self.mlp = nn.Sequential(first, nn.SiLU(), nn.Linear(hidden_size, hidden_size))
        self.frequency_embedding_size = frequency_embedding_size
        self.frequency_shift = frequency_shift

    def forward(self, t: Tensor) -> Tensor:
        freqs = timestep_embedding(t, self.frequency_embedding_size, self.frequency_shift)
        out: Tensor = self.mlp(freqs.to(next(self.mlp.parameters()).dtype))
        return out


class LabelEmbedder(nn.Module):
    """Class label to vector; the last row is the null label where labels were dropped in
    training."""

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        out: Tensor = self.embedding_table(y)
        return out


class Attention(nn.Module):
    """Multi-head self-attention with timm's parameter names: (N, L, D) -> (N, L, D)."""

    def __init__(
        self, dim: int, num_heads: int, qkv_bias: bool = True, qk_scale: float | None = None
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qk_scale = qk_scale
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        n, length, dim = x.shape
        q, k, v = (
            self.qkv(x)
            .view(n, length, 3, self.num_heads, dim // self.num_heads)
            .permute(2, 0, 3, 1, 4)
        )
        x = F.scaled_dot_product_attention(q, k, v, scale=self.qk_scale)  # (N, heads, L, D/heads)
        out: Tensor = self.proj(x.transpose(1, 2).reshape(n, length, dim))
        return out


class Mlp(nn.Module):
    """Two layers with a GELU ("tanh" or exact, "none"), timm's parameter names: (N, L, D) -> (N, L,
    D)."""

    def __init__(self, dim: int, hidden: int, approximate: str = "tanh") -> None:
        super().__init__()
        self.approximate = approximate
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))
        return out


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale and shift each sample's tokens: (N, L, D), (N, D), (N, D) -> (N, L, D)."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


class DiTBlock(nn.Module):
    """Transformer block with adaLN-Zero: (N, L, D), (N, D) -> (N, L, D)."""

    def __init__(
        self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0, norm_eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=norm_eps)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(
            c
        ).chunk(6, dim=1)
        x = torch.addcmul(
            x, gate_msa[:, None], self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        )
        return torch.addcmul(
            x, gate_mlp[:, None], self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        )


class FinalLayer(nn.Module):
    """Shared head: (N, L, D), (N, D) -> (N, L, patch²·out_channels)."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        out: Tensor = self.linear(modulate(self.norm_final(x), shift, scale))
        return out


class DiT(Backbone):
    """Diffusion transformer whose trailing blocks may be dropped; the last block run feeds the
    final layer.

    Arguments are the official constructor's. Differences: labels are dropped by the training loop,
    not in here, so a forward pass is deterministic; `num_classes` must be at least 1, as in the
    official code. `frequency_shift` and `norm_eps` (of each block's second norm) are ours:
    diffusers' DiT has 1 and 1e-5 there.

    Raises:
        ConfigError: sizes that do not fit each other.
    """

    capturable = True

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        frequency_shift: int = 0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if input_size % patch_size:
            raise ConfigError(
                f"patch_size must divide input_size; got {patch_size} and {input_size}; pad or "
                "choose another"
            )
        if hidden_size % num_heads or hidden_size % 4:
            raise ConfigError(
                f"hidden_size must be a multiple of num_heads and of 4; got {hidden_size} and "
                f"{num_heads}; correct num_heads"
            )
        self.config: dict[str, Any] = {
            "input_size": input_size,
            "patch_size": patch_size,
            "in_channels": in_channels,
            "hidden_size": hidden_size,
            "depth": depth,
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
            "class_dropout_prob": class_dropout_prob,
            "num_classes": num_classes,
            "learn_sigma": learn_sigma,
        }
        # official networks have the official arguments alone
        if (frequency_shift, norm_eps) != (0, 1e-6):
            self.config |= {"frequency_shift": frequency_shift, "norm_eps": norm_eps}
        self.depth = depth
        self.input_size = input_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.learn_sigma = learn_sigma
        self.num_classes = num_classes
        self.has_null_label = class_dropout_prob > 0
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        # the official code guides three channels of four
        self.guided_channels = min(3, in_channels)
        grid = input_size // patch_size
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size, frequency_shift=frequency_shift)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.pos_embed = nn.Parameter(
            sincos_pos_embed(hidden_size, grid)[None], requires_grad=False
        )
        self.blocks = nn.ModuleList(
            DiTBlock(hidden_size, num_heads, mlp_ratio, norm_eps) for _ in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self.initialize_weights()

    @staticmethod
    def preset_args(name: str) -> dict[str, Any]:
        """The constructor arguments that an official size fixes.

        Raises:
            ConfigError: unknown name.
        """
        size, _, patch = name.partition("/")
        if size not in PRESETS or patch not in map(str, PATCH_SIZES):
            known = ", ".join(f"{s}/{p}" for s in PRESETS for p in PATCH_SIZES)
            raise ConfigError(f"unknown DiT preset {name!r}; choose one of {known}")
        depth, hidden_size, num_heads = PRESETS[size]
        return {
            "depth": depth,
            "hidden_size": hidden_size,
            "num_heads": num_heads,
            "patch_size": int(patch),
        }

    def initialize_weights(self) -> None:
        """Initialise as the official code: Xavier, N(0, 0.02) embeddings, adaLN and output layer
        zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        proj = self.x_embedder.proj
        nn.init.xavier_uniform_(proj.weight.view(proj.weight.shape[0], -1))
        if proj.bias is not None:
            nn.init.zeros_(proj.bias)
        for weight in (*self.y_embedder.parameters(), *self.t_embedder.parameters()):
            if weight.ndim == 2:
                nn.init.normal_(weight, std=0.02)
        for name, param in self.named_parameters():
            if "adaLN_modulation" in name or name.startswith("final_layer.linear"):
                nn.init.zeros_(param)

    def time_embedder(self) -> nn.Module:
        return self.t_embedder

    def block_at(self, index: int) -> DiTBlock:
        block = self.blocks[index]
        assert isinstance(block, DiTBlock)
        return block

    def unpatchify(self, x: Tensor) -> Tensor:
        """(N, L, patch²·C) -> (N, C, H, W)."""
        return unpatchify(x, self.input_size // self.patch_size, self.patch_size)

    def _embed(self, x_t: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (N, L, D), and what the blocks are conditioned on (N, D)."""
        return self.x_embedder(x_t) + self.pos_embed, self.t_embedder(t) + self.y_embedder(y)

    def all_exits(self, x_t: Tensor, t: Tensor, y: Conditioning | None = None) -> Iterator[Tensor]:
        check_labels(self, y, x_t.shape[0])
        assert isinstance(y, Tensor)
        x, c = self._embed(x_t, t, y)
        for block in self.blocks:
            x = block(x, c)  # (N, L, D)
            yield self.unpatchify(self.final_layer(x, c))  # (N, C or 2·C, H, W)

    def forward(
        self, x_t: Tensor, t: Tensor, y: Tensor | None = None, *, exit_depth: ExitDepth = None
    ) -> Tensor:
        depths = self.check_exit_depth(exit_depth, x_t.shape[0])
        check_labels(self, y, x_t.shape[0])
        assert y is not None
        x, c = self._embed(x_t, t, y)
        x = run_blocks(list(self.blocks), x, c, depths)  # (N, L, D)
        return self.unpatchify(self.final_layer(x, c))  # (N, C or 2·C, H, W)
