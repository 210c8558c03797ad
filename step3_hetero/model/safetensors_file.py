"""Safetensors files: read as views of a memory map, written tensor by tensor.

A file is eight bytes of header length, a JSON header and the tensors' bytes. The safetensors
library checks it; the views are made here, because the library's NumPy side knows no FP8 and its
writer wants every tensor of a file in memory at once.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from step3_hetero.errors import CheckpointError
from step3_hetero.model.json_file import no_duplicates
from step3_hetero.specs import HostArray

DTYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {
        "F32": np.dtype(np.float32),
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    }
)
"""The formats a weight or a scale may be stored in, by their name in the file."""

STORED_AS = MappingProxyType({dtype.name: stored for stored, dtype in DTYPES.items()})
"""The same the other way round: the file's name by NumPy's."""

_PREFIX = 8


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor lies in its file; ``stored`` is the file's name for its dtype."""

    stored: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int


class Shard:
    """One file. Opening reads the header; the data are mapped when a view is first asked for."""

    def __init__(self, path: Path) -> None:
        """Check the file and read its header.

        Raises:
            CheckpointError: the file cannot be read, is cut short or is damaged.
        """
        self.path = path
        self.entries = _read_header(path)
        self._map: mmap.mmap | None = None

    def view(self, name: str) -> HostArray:
        """Return a tensor without copying it. The view is read-only.

        Only a tensor that lies on an address its dtype cannot have is copied; the safetensors
        library never writes one.
        """
        entry = self.entries[name]
        if self._map is None:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        dtype = DTYPES[entry.stored]
        flat = np.frombuffer(self._map, dtype, math.prod(entry.shape), entry.begin)
        return (flat if flat.flags.aligned else flat.copy()).reshape(entry.shape)


def _read_header(path: Path) -> dict[str, Entry]:
    try:
        with safe_open(path, framework="np"):  # checks header, sizes and that nothing is missing
            pass
        with path.open("rb") as file:
            start = _PREFIX + int.from_bytes(file.read(_PREFIX), "little")
            header = json.loads(file.read(start - _PREFIX), object_pairs_hook=no_duplicates)
    except OSError as cause:
        raise CheckpointError(f"{path}: cannot be read: {cause}") from cause
    except (SafetensorError, ValueError) as cause:
        size = path.stat().st_size
        raise CheckpointError(
            f"{path}: damaged or cut short ({size} bytes): {cause}; copy it again"
        ) from cause
    header.pop("__metadata__", None)
    return {name: _entry(stated, start) for name, stated in header.items()}


def _entry(stated: Mapping[str, Any], start: int) -> Entry:
    begin, end = stated["data_offsets"]
    return Entry(stated["dtype"], tuple(stated["shape"]), start + begin, end - begin)


class Writer:
    """Writes one file whose tensors are known by dtype and shape before their numbers are.

    The library's order is kept, larger items first, so that every tensor lies on an address that
    its dtype allows.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]):
        """Create the file and write its header."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._begin: dict[str, int] = {}
        end = 0
        for name in sorted(tensors, key=lambda n: (-tensors[n][0].itemsize, n)):
            dtype, shape = tensors[name]
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            stored = STORED_AS[dtype.name]
            header[name] = {"dtype": stored, "shape": shape, "data_offsets": [begin, end]}
            self._begin[name] = begin
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _PREFIX)
        self._data = _PREFIX + len(text)
        self._file: BinaryIO = path.open("wb")
        self._file.write(len(text).to_bytes(_PREFIX, "little") + text)

    def put(self, name: str, part: HostArray, at: int = 0) -> None:
        """Write a tensor, or a contiguous part of it that starts ``at`` bytes into it."""
        self._file.seek(self._data + self._begin[name] + at)
        self._file.write(np.ascontiguousarray(part).view(np.uint8).data)

    def __enter__(self) -> Writer:
        """Return the writer."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""
        self._file.close()
