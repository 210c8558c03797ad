"""The vision path in torch, with the module names of the released checkpoint."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny.shape import VisionShape

EXTRA_CLASS_ROWS = 3
"""Copies of the class row put in front of it; they and it are dropped again after the stack."""


class VisionAttention(nn.Module):
    """Attention of every patch to every other, q, k and v from one matrix."""

    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        self.heads = shape.num_attention_heads
        self.qkv_proj = nn.Linear(shape.hidden_size, 3 * shape.hidden_size)
        self.out_proj = nn.Linear(shape.hidden_size, shape.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (images, patches, hidden) -> the same."""
        heads = [t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self._qkv(x)]
        mixed = F.scaled_dot_product_attention(*heads)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return out

    def _qkv(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.qkv_proj(x).chunk(3, dim=-1))


class VisionMlp(nn.Module):
    """Two linears with a quick GELU between them."""

    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        self.fc1 = nn.Linear(shape.hidden_size, shape.intermediate_size)
        self.fc2 = nn.Linear(shape.intermediate_size, shape.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (images, patches, hidden) -> the same."""
        up = self.fc1(x)
        out: Tensor = self.fc2(up * torch.sigmoid(1.702 * up))
        return out


class VisionBlock(nn.Module):
    """Normalises what each sub-layer gives, not what it takes."""

    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        self.self_attn, self.mlp = VisionAttention(shape), VisionMlp(shape)
        self.layer_norm1 = nn.LayerNorm(shape.hidden_size, shape.layer_norm_eps)
        self.layer_norm2 = nn.LayerNorm(shape.hidden_size, shape.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (images, patches, hidden) -> the same."""
        x = x + self.layer_norm1(self.self_attn(x))
        return x + self.layer_norm2(self.mlp(x))


class VisionEmbeddings(nn.Module):
    """Patches and the class row, with their positions; the class row then three more times."""

    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        width, patch = shape.hidden_size, shape.patch_size
        self.class_embedding = nn.Parameter(torch.randn(1, width) * 0.3)
        self.patch_embedding = nn.Conv2d(shape.num_channels, width, patch, patch)
        self.position_embedding = nn.Embedding(shape.grid**2 + 1, width)

    def forward(self, pixels: Tensor) -> Tensor:
        """Shapes: pixels (images, 3, side, side) -> (images, 4 + patches, hidden)."""
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(patches), 1, -1)
        rows = torch.cat([first, patches], 1) + self.position_embedding.weight
        return torch.cat([rows[:, :1].expand(-1, EXTRA_CLASS_ROWS, -1), rows], 1)


class VisionStack(nn.Module):
    """The blocks, one after another, with no norm before or after."""

    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionBlock(shape) for _ in range(shape.num_hidden_layers))


class VisionModel(nn.Module):
    """Pixels to patch rows."""

    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        self.grid = shape.grid
        self.embeddings = VisionEmbeddings(shape)
        self.transformer = VisionStack(shape)

    def forward(self, pixels: Tensor) -> Tensor:
        """Shapes: pixels (images, 3, side, side) -> (images, hidden, grid, grid)."""
        x: Tensor = self.embeddings(pixels)
        for block in self.transformer.layers:
            x = block(x)
        patches = x[:, 1 + EXTRA_CLASS_ROWS :].transpose(1, 2)
        return patches.unflatten(-1, (self.grid, self.grid))
