"""Reads a checkpoint folder into float64 arrays.

Safetensors files are parsed here by hand: eight bytes of header length (little endian), a JSON
header, then the bytes of the tensors. The NumPy side of the library knows no FP8 in every version.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Config = Mapping[str, Any]
Weights = Mapping[str, Array]

BLOCK = 128  # one FP8 scale covers BLOCK x BLOCK weights
SCALE_SUFFIX = "_scale_inv"
DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
}
RENAMED = {  # as the published transformers class spells it -> as published checkpoints do
    "model.language_model.": "model.",
    "model.vision_model.": "vision_model.",
    "model.vit_": "vit_",
}


def load(folder: str | Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """Read the configuration and every tensor, under the names of published checkpoints.

    FP8 tensors are multiplied by their block scales; the scales themselves are left out.
    """
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stored = read_tensors(folder)
    scales = {n.removesuffix(SCALE_SUFFIX): stored[n] for n in stored if n.endswith(SCALE_SUFFIX)}
    weights = {}
    for name, tensor in stored.items():
        if name in scales:
            weights[published_name(name)] = dequantise(tensor, scales[name])
        elif not name.endswith(SCALE_SUFFIX):
            weights[published_name(name)] = tensor
    return config, weights


def read_tensors(folder: Path) -> dict[str, Array]:
    """Read all shards that the index names, or ``model.safetensors`` where there is no index."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return read_file(folder / "model.safetensors")
    places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    shards = {shard: read_file(folder / shard) for shard in sorted(set(places.values()))}
    return {name: shards[shard][name] for name, shard in places.items()}


def read_file(path: Path) -> dict[str, Array]:
    """Parse one safetensors file."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    return {name: decode(name, entry, raw[start:]) for name, entry in header.items()}


def decode(name: str, entry: Mapping[str, Any], data: bytes) -> Array:
    """Turn the bytes of one tensor into float64; ``data`` starts where the header ends."""
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{name} is stored as {entry['dtype']}; known: {', '.join(DTYPES)}")
    begin, end = entry["data_offsets"]
    flat = np.frombuffer(data[begin:end], dtype=DTYPES[entry["dtype"]])
    return flat.reshape(entry["shape"]).astype(np.float64)


def dequantise(tensor: Array, scale: Array) -> Array:
    """Multiply each block of the last two axes by its scale.

    Shapes: tensor (..., m, n), scale (..., ceil(m / 128), ceil(n / 128)) -> (..., m, n).
    """
    *lead, m, n = tensor.shape
    expected = (*lead, -(-m // BLOCK), -(-n // BLOCK))
    if scale.shape != expected:
        raise ValueError(f"scale {scale.shape} for weights {tensor.shape}, expected {expected}")
    rows = np.repeat(scale, BLOCK, axis=-2)[..., :m, :]
    return tensor * np.repeat(rows, BLOCK, axis=-1)[..., :n]


def published_name(name: str) -> str:
    """Undo the renaming of the published transformers class; other names pass unchanged."""
    for renamed, published in RENAMED.items():
        if name.startswith(renamed):
            return published + name.removeprefix(renamed)
    return name


def below(weights: Weights, prefix: str) -> dict[str, Array]:
    """Return the tensors whose names start with ``prefix``, with the prefix taken off."""
    return {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
