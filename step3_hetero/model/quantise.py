"""Block FP8: e4m3 numbers with one float32 scale per 128 x 128 block, weight = number * scale."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from step3_hetero.errors import CheckpointError
from step3_hetero.model import config as model_config
from step3_hetero.model.checkpoint import Checkpoint
from step3_hetero.model.config import ModelConfig
from step3_hetero.model.json_file import read_json
from step3_hetero.model.layout import SCALE_SUFFIX, is_fp8_linear, scale_shape
from step3_hetero.model.safetensors_file import Writer
from step3_hetero.model.shards import INDEX, SINGLE
from step3_hetero.specs import FP8_BLOCK, HostArray, HostTensor

Float32 = npt.NDArray[np.float32]
OnProgress = Callable[[str, int, int], None]
"""Called after each tensor: its name, the source's bytes done so far, and their total."""

E4M3: np.dtype[Any] = np.dtype(ml_dtypes.float8_e4m3fn)
E4M3_MAX = 448.0
MAX_SHARD_BYTES = 5 << 30

QUANTIZATION_CONFIG: Mapping[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
}

_Stored = dict[str, tuple[np.dtype[Any], tuple[int, ...]]]
"""What one tensor becomes in the file: itself, and its scales where it is quantised."""


def quantise_blocks(array: HostArray) -> tuple[HostArray, Float32]:
    """Round each block to e4m3 after scaling its largest magnitude to 448.

    Shapes: (..., rows, columns) -> e4m3 of that shape, float32 scales
    (..., ceil(rows / 128), ceil(columns / 128)).

    A block of zeros has scale 1, and so has one so small (under 5e-36) that its scale would lose
    precision: its numbers become 0.

    Raises:
        CheckpointError: a number is NaN or infinite.

    >>> numbers, scale = quantise_blocks(np.array([[1.0, -0.5]], np.float32))
    >>> numbers.astype(np.float32), scale
    (array([[ 448., -224.]], dtype=float32), array([[0.00223214]], dtype=float32))
    """
    if array.ndim < 2:
        raise ValueError(f"blocks need rows and columns, found shape {array.shape}")
    numbers = np.empty(array.shape, E4M3)
    scale = np.empty(scale_shape(array.shape), np.float32)
    for rows, block in _strips(array.shape):
        numbers[rows], scale[block] = _quantise_strip(array[rows])
    return numbers, scale


def dequantise(tensor: HostTensor, dtype: npt.DTypeLike) -> HostArray:
    """Return the weight itself in ``dtype``, a copy; without scales the numbers are the weight.

    Shapes: (..., rows, columns) -> the same. Multiplied in promote_types(dtype, float32), rounded
    once.
    """
    target = np.dtype(dtype)
    if tensor.scale_inv is None:
        return tensor.data.astype(target)
    wide = np.promote_types(target, np.float32)
    weight = np.empty(tensor.shape, target)
    for rows, block in _strips(tensor.shape):
        scale = np.repeat(tensor.scale_inv[block], FP8_BLOCK)[: tensor.shape[-1]]
        weight[rows] = tensor.data[rows].astype(wide) * scale
    return weight


def quantise_checkpoint(
    source: Path,
    out: Path,
    on_progress: OnProgress | None = None,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write a block-FP8 copy of a checkpoint to a new folder, and return the folder.

    The linear maps of the language model become FP8, other tensors are copied as they are, and so
    are the files beside them. The folder appears when it is complete, or not at all. Memory needed
    is that of one expert, besides pages of the mapped source that the system may drop.

    Raises:
        ConfigError: the source's config.json is wrong.
        CheckpointError: the source is damaged or FP8 already; ``out`` exists or cannot be written.
    """
    config = ModelConfig.read(source)
    if config.fp8_blocks:
        raise CheckpointError(f"{source}: block FP8 already; quantise the original")
    checkpoint = Checkpoint.open(source, config)
    _check_absent(out)
    if not out.absolute().parent.is_dir():
        raise CheckpointError(
            f"{out}: cannot be written: no folder {str(out.parent)!r}; make it first"
        )
    work = out.parent / f".{out.name}.{os.getpid()}.partial"
    try:
        work.mkdir()
        _write_weights(checkpoint, work, on_progress, max_shard_bytes)
        _write_rest(source, work)
        Checkpoint.open(work, ModelConfig.read(work))
        _check_absent(out)
        work.rename(out)
    except OSError as cause:
        raise CheckpointError(f"{out}: cannot be written: {cause.strerror}") from cause
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return out


def _check_absent(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise CheckpointError(f"{out}: exists already; name a new folder or remove it")


def _strips(shape: tuple[int, ...]) -> Iterator[tuple[tuple[Any, ...], tuple[int, ...]]]:
    """Yield, for every 128 rows of every matrix, the index of the rows and of their scales."""
    for lead in np.ndindex(shape[:-2]):
        for i in range(-(-shape[-2] // FP8_BLOCK)):
            yield (*lead, slice(i * FP8_BLOCK, (i + 1) * FP8_BLOCK)), (*lead, i)


def _quantise_strip(strip: HostArray) -> tuple[HostArray, Float32]:
    """Quantise up to 128 rows. Shapes: (rows, columns) -> the same, (ceil(columns / 128),)."""
    rows, columns = strip.shape
    runs = -(-columns // FP8_BLOCK)
    padded = np.zeros((rows, runs * FP8_BLOCK), np.float32)
    padded[:, :columns] = strip
    blocks = padded.reshape(rows, runs, FP8_BLOCK)
    largest: Float32 = np.abs(blocks).max(axis=(0, 2))
    if not np.isfinite(largest).all():
        found = float(padded[~np.isfinite(padded)][0])
        raise CheckpointError(f"{found} cannot be quantised: expected finite numbers")
    scale = largest / np.float32(E4M3_MAX)
    scale[scale < np.finfo(np.float32).tiny] = 1
    numbers = (blocks / scale[:, None]).reshape(rows, -1)[:, :columns]
    return numbers.astype(E4M3), scale


def _write_weights(
    checkpoint: Checkpoint, folder: Path, on_progress: OnProgress | None, max_shard_bytes: int
) -> None:
    """Write the shards, and the index if there are several."""
    plan = {name: _stored(checkpoint, name) for name in checkpoint.names()}
    shards = _split({name: _nbytes(stored) for name, stored in plan.items()}, max_shard_bytes)
    total, done = checkpoint.nbytes(plan), 0
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = SINGLE if len(shards) == 1 else file
        stored = {n: s for name in names for n, s in plan[name].items()}
        weight_map |= dict.fromkeys(stored, file)
        with Writer(folder / file, stored) as writer:
            for name in names:
                _copy(checkpoint.tensor(name), writer, quantised=len(plan[name]) > 1)
                done += checkpoint.nbytes([name])
                if on_progress is not None:
                    on_progress(name, done, total)
    if len(shards) > 1:
        _write_index(folder, weight_map, sum(_nbytes(stored) for stored in plan.values()))


def _write_index(folder: Path, weight_map: Mapping[str, str], total: int) -> None:
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _stored(checkpoint: Checkpoint, name: str) -> _Stored:
    shape = checkpoint.shapes[name]
    if not is_fp8_linear(name):
        return {name: (np.dtype(checkpoint.config.dtype), shape)}
    scales = (np.dtype(np.float32), scale_shape(shape))
    return {name: (E4M3, shape), name + SCALE_SUFFIX: scales}


def _nbytes(stored: _Stored) -> int:
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in stored.values())


def _split(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Fill one file after the other; a tensor larger than the limit has a file of its own."""
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def _copy(tensor: HostTensor, writer: Writer, *, quantised: bool) -> None:
    """Write a tensor; a stack of experts is quantised one expert at a time."""
    if not quantised:
        writer.put(tensor.name, tensor.data)
        return
    at = scale_at = 0
    for lead in np.ndindex(tensor.shape[:-2]):
        numbers, scale = quantise_blocks(tensor.data[lead])
        writer.put(tensor.name, numbers, at)
        writer.put(tensor.name + SCALE_SUFFIX, scale, scale_at)
        at, scale_at = at + numbers.nbytes, scale_at + scale.nbytes


def _write_rest(source: Path, folder: Path) -> None:
    """Write config.json with its quantization_config, and copy what lies beside the weights."""
    config = read_json(source / model_config.FILE)
    config["quantization_config"] = dict(QUANTIZATION_CONFIG)
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / model_config.FILE).write_text(text, encoding="utf-8")
    for path in sorted(source.iterdir()):
        written = path.suffix == ".safetensors" or path.name in (INDEX, model_config.FILE)
        if path.is_file() and not written:
            shutil.copyfile(path, folder / path.name)
    if (source / "eval").is_dir():
        shutil.copytree(source / "eval", folder / "eval")
