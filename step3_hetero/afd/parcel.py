"""Arrays and small facts as frames, and back. What comes in is checked before it is believed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from step3_hetero.afd.leaving import Leaving
from step3_hetero.errors import EdgeMismatch
from step3_hetero.specs import HostArray
from step3_hetero.transport.base import Buffer, Frame

DTYPES = ("float32", "float64", "bfloat16", "float8_e4m3fn", "int8", "int32", "uint8")
"""What an array on the wire may hold."""

MOST_AXES = 5


def parcel(
    kind: int, epoch: int, seq: int, said: Mapping[str, Any], arrays: Mapping[str, HostArray]
) -> Frame:
    """Return a frame that holds facts and arrays; the arrays' bytes are not copied.

    Of ``Leaving`` arrays some bytes may still be on their way to the host.
    """
    whole = {name: np.ascontiguousarray(x) for name, x in arrays.items()}
    head = {
        "said": said,
        "arrays": [[name, x.dtype.name, list(x.shape)] for name, x in whole.items()],
    }
    parts = [_bytes(x) for x in whole.values()]
    ready = arrays.ready if isinstance(arrays, Leaving) and arrays.is_pending else None
    return Frame(kind, epoch, seq, json.dumps(head).encode(), parts, ready)


def unpacked(
    frame: Frame, peer: str, *, copy: bool = True
) -> tuple[dict[str, Any], dict[str, HostArray]]:
    """Return the facts and the arrays of a frame.

    Without ``copy`` arrays lie in the channel's own buffer, read-only, and hold it up for as long
    as they live: for who hands them to a device at once.

    Raises:
        EdgeMismatch: the head is no description of the parts.
    """
    try:
        head = json.loads(bytes(frame.head))
        said, listed = dict(head["said"]), list(head["arrays"])
        if len(listed) != len(frame.parts):
            raise ValueError(f"{len(listed)} arrays in {len(frame.parts)} parts")
        arrays = {
            str(name): _array(dtype, shape, part, copy)
            for (name, dtype, shape), part in zip(listed, frame.parts, strict=True)
        }
    except (ValueError, KeyError, TypeError, RecursionError) as cause:
        raise EdgeMismatch(f"{peer} sent a frame whose head does not fit it: {cause}") from cause
    return said, arrays


def _array(dtype: Any, shape: Any, part: Buffer, copy: bool) -> HostArray:
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}; allowed: {', '.join(DTYPES)}")
    sizes = [n for n in shape if type(n) is int and n >= 0]
    if len(sizes) != len(shape) or len(sizes) > MOST_AXES:
        raise ValueError(f"shape {shape!r}")
    kind = _dtype(dtype)
    wanted, there = math.prod(sizes) * kind.itemsize, memoryview(part).nbytes
    if wanted != there:
        raise ValueError(f"{dtype} {sizes} takes {wanted} bytes, {there} came")
    raw = np.frombuffer(part, np.uint8)
    return (raw.copy() if copy else raw).view(kind).reshape(sizes)


def _dtype(name: str) -> np.dtype[Any]:
    import ml_dtypes  # noqa: F401  registers bfloat16 and float8 under their names

    return np.dtype(name)


def _bytes(x: HostArray) -> memoryview:
    """Return an array's bytes; dtypes that buffers do not know travel as bytes."""
    view: memoryview = x.reshape(-1).view(np.uint8).data
    return view
