"""Step-3's vision tower, downsampler and projector for one picture, in float64.

Source: arXiv 2507.19427 and the published modelling code.
"""

import math

import numpy as np

from oracle import resample
from oracle.checkpoint import Array, Config, Weights, below

CLASS_ROWS = 4  # the class row stands four times in front of the patches


def vision_forward(config: Config, weights: Weights, pixels: Array) -> Array:
    """Return the rows that stand for one view or crop in the language model's input.

    Shapes: pixels (channels, side, side) -> (rows, text hidden).
    """
    vision = config["vision_config"]
    if vision.get("hidden_act", "quick_gelu") != "quick_gelu":
        raise ValueError(f"hidden_act is {vision['hidden_act']!r}; only quick_gelu is defined")
    tower = below(weights, "vision_model.")
    x = embed(vision, below(tower, "embeddings."), np.asarray(pixels, dtype=np.float64))
    for n in range(vision["num_hidden_layers"]):
        x = block(vision, below(tower, f"transformer.layers.{n}."), x)
    return project(config, weights, x[CLASS_ROWS:])


def embed(vision: Config, w: Weights, pixels: Array) -> Array:
    """Cut into patches, add positions, repeat the class row.

    Shapes: pixels (channels, side, side) -> (4 + grid * grid, width).
    """
    patch = vision["patch_size"]
    maps = conv(pixels, w["patch_embedding.weight"], w["patch_embedding.bias"], stride=patch)
    patches = rows_of(maps)
    positions = position_rows(w["position_embedding.weight"], maps.shape[1])
    class_row = w["class_embedding"].reshape(1, -1) + positions[:1]
    return np.concatenate([class_row] * CLASS_ROWS + [patches + positions[1:]])


def position_rows(table: Array, grid: int) -> Array:
    """Resize the part of the table that belongs to patches, bicubic with antialiasing.

    Shapes: table (1 + n * n, width) -> (1 + grid * grid, width). Row 0 belongs to the class.
    """
    n = math.isqrt(len(table) - 1)
    if n == grid:
        return table
    planes = table[1:].T.reshape(-1, n, n)
    resized = resample.resize(planes, grid, grid, resample.cubic)
    return np.concatenate([table[:1], rows_of(resized)])


def block(vision: Config, w: Weights, x: Array) -> Array:
    """One layer, which normalises what each part gives and not what it takes.

    Shapes: x (rows, width) -> (rows, width).
    """
    eps = vision.get("layer_norm_eps", 1e-6)
    out = attention(below(w, "self_attn."), x, vision["num_attention_heads"])
    x = x + layer_norm(out, w["layer_norm1.weight"], w["layer_norm1.bias"], eps)
    hidden = x @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]
    out = quick_gelu(hidden) @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]
    return x + layer_norm(out, w["layer_norm2.weight"], w["layer_norm2.bias"], eps)


def attention(w: Weights, x: Array, heads: int) -> Array:
    """Every row attends to every row. Shapes: x (rows, width) -> (rows, width)."""
    rows, width = x.shape
    qkv = x @ w["qkv_proj.weight"].T + w["qkv_proj.bias"]
    q, k, v = qkv.reshape(rows, 3, heads, width // heads).transpose(1, 2, 0, 3)
    scores = q @ k.swapaxes(1, 2) * (width // heads) ** -0.5  # (heads, rows, rows)
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    out = e / e.sum(axis=-1, keepdims=True) @ v  # (heads, rows, head_dim)
    return out.swapaxes(0, 1).reshape(rows, width) @ w["out_proj.weight"].T + w["out_proj.bias"]


def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    """Over the last axis, with the variance of the whole population."""
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + eps) * weight + bias


def quick_gelu(x: Array) -> Array:
    """Return x * sigmoid(1.702 x)."""
    return x * np.exp(-np.logaddexp(0, -1.702 * x))


def project(config: Config, weights: Weights, patches: Array) -> Array:
    """Two convolutions over the grid with nothing between them, then one linear map.

    Shapes: patches (grid * grid, width) -> (rows, text hidden). The map has a bias where the
    checkpoint has one.
    """
    grid = math.isqrt(len(patches))
    maps = patches.T.reshape(-1, grid, grid)
    stride = config.get("understand_projector_stride", 2)
    maps = conv(maps, weights["vit_downsampler.weight"], weights["vit_downsampler.bias"], stride)
    maps = np.pad(maps, ((0, 0), (1, 1), (1, 1)))
    maps = conv(maps, weights["vit_downsampler2.weight"], weights["vit_downsampler2.bias"], 2)
    bias = weights.get("vit_large_projector.bias", np.zeros(1))
    return rows_of(maps) @ weights["vit_large_projector.weight"].T + bias


def conv(x: Array, weight: Array, bias: Array, stride: int) -> Array:
    """Convolution without padding.

    Shapes: x (c, h, w), weight (out, c, k, k), bias (out,) -> (out, (h - k) // stride + 1, ...).
    """
    windows = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2:], axis=(1, 2))
    windows = windows[:, ::stride, ::stride]  # (c, h', w', k, k)
    return np.tensordot(weight, windows, axes=((1, 2, 3), (0, 3, 4))) + bias[:, None, None]


def rows_of(maps: Array) -> Array:
    """Flatten row by row. Shapes: maps (c, h, w) -> (h * w, c)."""
    return maps.reshape(len(maps), -1).T
