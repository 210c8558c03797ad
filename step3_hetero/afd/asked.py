"""What a stage may be asked to run on, and may answer: its own tensors, as they are.

A caller of another build, or one that is broken, costs itself the call and nobody else anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from step3_hetero.afd.wire import SCALED, Wire
from step3_hetero.backend import BatchMeta
from step3_hetero.errors import EdgeMismatch
from step3_hetero.graph import GraphStage
from step3_hetero.specs import (
    FP8_BLOCK,
    LOGICAL_BLOCK,
    FfnSpec,
    HostArray,
    Limits,
    TensorSpec,
    VisionSpec,
)


def taken(node: GraphStage) -> dict[str, TensorSpec]:
    """Return what a stage takes, by name; pixels come from outside the graph."""
    if node.kind == "vision":
        dims = ("images", "size", "size", "channels")
        return {"pixels": TensorSpec("pixels", dims, node.spec.dtype)}
    return {t.name: t for t in node.takes}


def rows_asked(
    node: GraphStage, arrays: Mapping[str, HostArray], wire: Wire, most_rows: int
) -> int:
    """Return for how many rows (tokens, or images) a stage is asked.

    Shapes: u (tokens, hidden); weights, ids (tokens, top_k); pixels (images, size, size, channels).
    A scale (tokens, ceil(hidden / 128)) stands beside codes, as op quantise gives it.

    Raises:
        EdgeMismatch: the stage takes other tensors, or others of that name.
    """
    takes = taken(node)
    codes = [n for n in takes if n in arrays and arrays[n].dtype.name in SCALED]
    if set(arrays) != {*takes, *(f"{n}.scale" for n in codes)}:
        scaled = f" with {', '.join(f'{n}.scale' for n in codes)}" if codes else ""
        raise EdgeMismatch(
            f"{node.name}: {', '.join(arrays) or 'no tensor'} refused; it takes "
            f"{', '.join(takes)}{scaled}"
        )
    if isinstance(node.spec, VisionSpec):
        return _images(node.name, node.spec, arrays["pixels"])
    assert isinstance(node.spec, FfnSpec), f"a worker has no {node.kind} stage"
    widths = {"hidden": node.spec.hidden, "top_k": node.spec.top_k}
    for name, spec in takes.items():
        width, dtypes = widths[spec.dims[1]], [spec.dtype]
        if wire.casts(name) and wire.dtype != spec.dtype:
            dtypes.append(wire.dtype)
        _check(node.name, name, arrays[name], dtypes, width)
        if name in codes:
            scale, runs = f"{name}.scale", -(-width // FP8_BLOCK)
            _check(node.name, scale, arrays[scale], ["float32"], runs)
    lengths = {name: len(x) for name, x in arrays.items()}
    rows = lengths["u"]
    if rows > most_rows or set(lengths.values()) != {rows}:
        raise EdgeMismatch(f"{node.name}: rows {lengths} refused; allowed: alike, to {most_rows}")
    return rows


def check_answer(
    node: GraphStage, tokens: int | None, arrays: Mapping[str, HostArray], wire: Wire
) -> None:
    """Hold what a worker answered against what its stage gives.

    Shapes: y (tokens, hidden), or rows (image_rows, hidden) with ``tokens`` None; a scale beside
    codes as in ``rows_asked``.

    Raises:
        EdgeMismatch: a tensor is missing, or another one.
    """
    assert isinstance(node.spec, FfnSpec | VisionSpec), f"a worker has no {node.kind} stage"
    for spec in node.gives:
        if (x := arrays.get(spec.name)) is None:
            raise EdgeMismatch(
                f"{node.name}: {', '.join(arrays) or 'no tensor'} answered; it gives {spec.name}"
            )
        dtypes = [spec.dtype]
        if wire.casts(spec.name) and wire.dtype != spec.dtype:
            dtypes.append(wire.dtype)
        _check(node.name, spec.name, x, dtypes, node.spec.hidden)
        if x.dtype.name in SCALED:
            name, runs = f"{spec.name}.scale", -(-node.spec.hidden // FP8_BLOCK)
            if name not in arrays:
                raise EdgeMismatch(f"{node.name}: {spec.name} of codes answered without {name}")
            _check(node.name, name, arrays[name], ["float32"], runs)
        elif f"{spec.name}.scale" in arrays:
            raise EdgeMismatch(f"{node.name}: {spec.name} {x.dtype.name} answered with a scale")
        ours = (spec.name, f"{spec.name}.scale")
        lengths = {name: len(arrays[name]) for name in ours if name in arrays}
        if set(lengths.values()) != {len(x) if tokens is None else tokens}:
            raise EdgeMismatch(f"{node.name}: rows {lengths} answered; asked for {tokens}")


def check_meta(meta: BatchMeta, limits: Limits, blocks: int) -> None:
    """Hold where a micro-batch's tokens are said to stand against a cache of ``blocks`` blocks.

    Stages write to, and read from, these places without looking again.

    Raises:
        EdgeMismatch: an array has another shape or dtype than `BatchMeta` says, or a number that
            is no place.
    """
    seqs, tables = meta.context_lens.size, meta.block_tables
    width = tables.shape[1] if tables.ndim == 2 else 0
    longest = limits.blocks_per_seq * LOGICAL_BLOCK
    _check_indices("positions", meta.positions, (None,), 0, longest - 1)
    _check_indices("slots", meta.slots, meta.positions.shape, -1, blocks * LOGICAL_BLOCK - 1)
    _check_indices("query_starts", meta.query_starts, (seqs + 1,), 0, meta.tokens)
    _check_indices("block_tables", tables, (seqs, None), 0, blocks - 1)
    _check_indices("context_lens", meta.context_lens, (None,), 0, width * LOGICAL_BLOCK)
    starts = meta.query_starts
    if starts[0] != 0 or (np.diff(starts) < 0).any():
        raise EdgeMismatch(f"query_starts {starts} refused; allowed: from 0, none below the last")
    most = (limits.tokens, limits.seqs, limits.blocks_per_seq)
    if any(n > allowed for n, allowed in zip((meta.tokens, seqs, width), most, strict=True)):
        raise EdgeMismatch(
            f"{meta.tokens} tokens of {seqs} sequences of {width} blocks refused; allowed: to "
            f"{most[0]}, {most[1]} and {most[2]}"
        )


def _check_indices(
    name: str, x: HostArray, shape: tuple[int | None, ...], least: int, most: int
) -> None:
    """Refuse what is no int32 array of ``shape`` (None: any length) from ``least`` to ``most``."""
    fits = x.ndim == len(shape) and all(w in (None, n) for n, w in zip(x.shape, shape, strict=True))
    if not fits or x.dtype != np.int32:
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise EdgeMismatch(f"{name} {x.dtype} {x.shape} refused; allowed: int32 ({wanted})")
    if x.size and not least <= int(x.min()) <= int(x.max()) <= most:
        raise EdgeMismatch(
            f"{name} from {x.min()} to {x.max()} refused; allowed: from {least} to {most}"
        )


def _check(stage: str, name: str, x: HostArray, dtypes: Sequence[str], width: int) -> None:
    if x.ndim != 2 or x.shape[1] != width or x.dtype.name not in dtypes:
        raise EdgeMismatch(
            f"{stage}: {name} {x.dtype.name} {x.shape} refused; allowed: "
            f"{' or '.join(dtypes)} (tokens, {width})"
        )


def _images(stage: str, spec: VisionSpec, pixels: HostArray) -> int:
    """Return the number of images; the downsampler needs two patches a side."""
    least = 2 * spec.patch
    _, height, width, channels = pixels.shape if pixels.ndim == 4 else (0, 0, 0, 0)
    fits = height == width >= least and channels == spec.channels
    if not fits or pixels.dtype.name != spec.dtype:
        raise EdgeMismatch(
            f"{stage}: pixels {pixels.dtype.name} {pixels.shape} refused; allowed: {spec.dtype} "
            f"(images, size, size, {spec.channels}), size from {least}"
        )
    return len(pixels)
