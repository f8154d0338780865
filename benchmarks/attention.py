"""Blocks that compute attention in a function: their products quantized too, or their layers alone.

In a block without operations the products of queries, keys and values stay float, in torch's fused kernel.
With ``operations="products"`` they are computed one by one, as ONNX Runtime and TensorRT will, so that the
scores and the probabilities are kept for the backward pass: the last row of each model says what that takes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quantpatch as qp
from benchmarks.models import compared

__all__ = ["rows"]


class _Attention(nn.Module):
    """As in vision transformers: one layer for queries, keys and values, and torch's fused function."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)
        y: Tensor = self.proj(x.transpose(1, 2).reshape(batch, tokens, width))
        return y


class _VisionBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = _Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class VisionTransformer(nn.Module):
    """The sizes of ViT-tiny: 12 blocks of width 192, patches of 16 x 16."""

    def __init__(self, width: int = 192, heads: int = 3, blocks: int = 12) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.blocks = nn.Sequential(*[_VisionBlock(width, heads) for _ in range(blocks)])
        self.head = nn.Linear(width, 100)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.blocks(self.patches(x).flatten(2).transpose(1, 2)).mean(1))
        return y


class LlamaBlock(nn.Module):
    """A block of a small Llama: RMS norm, rotary positions, grouped keys and values, a gated MLP; causal."""

    def __init__(self, width: int = 512, heads: int = 8, groups: int = 2, inner: int = 1408) -> None:
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, width // heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q_proj = nn.Linear(width, heads * self.size, bias=False)
        self.k_proj = nn.Linear(width, groups * self.size, bias=False)
        self.v_proj = nn.Linear(width, groups * self.size, bias=False)
        self.o_proj = nn.Linear(heads * self.size, width, bias=False)
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def _turned(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[-2], dtype=x.dtype)[:, None]
        angles = positions / 1e4 ** (torch.arange(0, self.size, 2, dtype=x.dtype) / self.size)
        cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
        left, right = x.chunk(2, -1)
        return x * cos + torch.cat((-right, left), -1) * sin

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        y = self.norm1(x)
        q = self.q_proj(y).view(batch, tokens, self.heads, self.size).transpose(1, 2)
        k = self.k_proj(y).view(batch, tokens, self.groups, self.size).transpose(1, 2)
        v = self.v_proj(y).view(batch, tokens, self.groups, self.size).transpose(1, 2)
        y = F.scaled_dot_product_attention(
            self._turned(q), self._turned(k), v, is_causal=True, enable_gqa=True
        )
        x = x + self.o_proj(y.transpose(1, 2).reshape(batch, tokens, -1))
        y = self.norm2(x)
        z: Tensor = x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))
        return z


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ViT-tiny, 4 images": (VisionTransformer, (4, 3, 224, 224)),
    "a Llama block of width 512, 4 x 128 tokens": (LlamaBlock, (4, 128, 512)),
}


def quantized(model: nn.Module, x: Tensor, operations: Any) -> nn.Module:
    """A calibrated twin."""
    twin = copy.deepcopy(model)
    qp.convert(twin, operations=operations)
    qp.calibrate(twin, [x], progress=False)
    return twin


def kept(model: nn.Module, x: Tensor) -> float:
    """MiB that a training step keeps for its backward pass, besides parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.train()(x)
    del output
    return sum(found.values()) / 2**20


def rows() -> list[dict[str, Any]]:
    """Rows for each model; ratios to the float model."""
    torch.set_num_threads(1)
    found = []
    for name, (build, shape) in CASES.items():
        torch.manual_seed(0)
        model, x = build(), torch.randn(shape)
        ours = {
            "ours": quantized(model, x, "products"),
            "its layers alone": quantized(model, x, ()),
        }
        found += compared(name, model, ours, x)
        memory = {run: kept(twin, x) for run, twin in {"float": model, **ours}.items()}
        found.append(
            {
                "name": f"{name}: MiB kept for backward",
                "ours_ms": memory["ours"],
                "baseline_ms": memory["float"],
                "ratio": memory["ours"] / memory["float"],
                "aim": None,
                "peers": {"its layers alone": memory["its layers alone"] / memory["float"]},
            }
        )
    return found


if __name__ == "__main__":
    for row in rows():
        print(f"{row['name']:56} {row['ours_ms']:9.2f}  ratio {row['ratio']:.2f}", row["peers"])
