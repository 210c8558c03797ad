"""A model's weights on disk: checked when opened, mapped when read, never copied.

::

    folder --> find_tensors --> check_tensors --> Checkpoint --> HostTensor
               (shards.py)      (headers only)    (views)        (data, scale_inv)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import numpy.typing as npt

from step3_hetero.errors import CheckpointError
from step3_hetero.model.checkpoint_checks import check_tensors
from step3_hetero.model.config import ModelConfig
from step3_hetero.model.layout import SCALE_SUFFIX, Shapes, canonical
from step3_hetero.model.shards import Place, find_tensors
from step3_hetero.model.summary import Summary, TensorFacts, summarise
from step3_hetero.specs import Cut, HostArray, HostTensor

_CHUNK = 1 << 22
_EXPONENT = {"float8_e4m3fn": 0x7F, "bfloat16": 0x7F80, "float32": 0x7F800000}
"""Bits that are all set in NaN and infinity, and in no number (e4m3fn has no infinity)."""


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one model, by the published names; the transformers class's are understood.

    ``config`` is the one it was opened with, ``projector_bias`` decided: build the graph from it.
    """

    folder: Path
    config: ModelConfig
    shapes: Shapes
    places: Mapping[str, Place]

    @classmethod
    def open(cls, folder: Path, config: ModelConfig) -> Checkpoint:
        """Read every header and check names, shapes, dtypes and scales; no weight is read.

        Raises:
            CheckpointError: files are missing or damaged, or are not those of ``config``.
        """
        places = find_tensors(folder)
        config, shapes = check_tensors(folder, places, config)
        return cls(folder, config, shapes, places)

    def names(self) -> list[str]:
        """Return every tensor's name in the layout's order; scales belong to their tensors."""
        return list(self.shapes)

    def __contains__(self, name: str) -> bool:
        """Tell whether there is such a tensor."""
        return canonical(name) in self.shapes

    def tensor(self, name: str, cuts: Sequence[Cut] = (), *, check: bool = True) -> HostTensor:
        """Return one tensor, or what ``cuts`` leave of it, as read-only views of the mapped file.

        ``check`` reads it once to see that it is finite; without it no page is touched. What is
        cut away is never read.

        Raises:
            CheckpointError: there is no such tensor, or it is not finite.
        """
        name = self._known(name)
        scale = self.places.get(name + SCALE_SUFFIX)
        view = self.places[name].view()
        tensor = HostTensor(name, view, None if scale is None else scale.view()).cut(cuts)
        if check:
            check_finite(tensor)
        return tensor

    def nbytes(self, names: Iterable[str]) -> int:
        """Return the stored bytes of some tensors, their scales included."""
        return sum(place.entry.nbytes for n in names for place in self._places(n))

    def digest(self, name: str) -> str:
        """Return the sha256 of a tensor's bytes, followed by those of its scales."""
        seen = sha256()
        for place in self._places(name):
            seen.update(_flat(place.view()).view(np.uint8).data)
        return seen.hexdigest()

    def summary(self) -> Summary:
        """Return what is stored, part by part."""
        return summarise(
            TensorFacts(name, shape, self.places[name].entry.stored, self.nbytes([name]))
            for name, shape in self.shapes.items()
        )

    def _places(self, name: str) -> list[Place]:
        name = self._known(name)
        stored = (name, name + SCALE_SUFFIX)
        return [self.places[n] for n in stored if n in self.places]

    def _known(self, name: str) -> str:
        if name not in self:
            raise CheckpointError(f"{self.folder}: no tensor {name!r} in {self.config.name}")
        return canonical(name)


def check_finite(tensor: HostTensor) -> None:
    """Read a tensor in chunks and refuse NaN, infinity, and scales that are not above 0.

    Raises:
        CheckpointError: names the tensor, the first place and the value found there.
    """
    _refuse_at(tensor.name, tensor.data, _first_not_finite(tensor.data))
    if tensor.scale_inv is not None:
        scale = tensor.scale_inv
        wrong = np.flatnonzero(~((scale > 0) & np.isfinite(scale)))
        _refuse_at(tensor.name + SCALE_SUFFIX, scale, int(wrong[0]) if wrong.size else None)


def _refuse_at(name: str, data: HostArray, at: int | None) -> None:
    if at is None:
        return
    index = tuple(int(i) for i in np.unravel_index(at, data.shape))
    raise CheckpointError(
        f"{name}{list(index)} is {float(data[index])}: not a usable number; the file is damaged, "
        "or the training run was: get the weights again"
    )


def _first_not_finite(data: HostArray) -> int | None:
    """Return the flat index of the first NaN or infinity.

    Bits are compared: NumPy's isfinite is slow on the small types and makes large temporaries.
    """
    size = data.dtype.itemsize
    bits: npt.NDArray[np.unsignedinteger] = _flat(data).view(f"u{size}")
    exponent = bits.dtype.type(_EXPONENT[data.dtype.name])
    room = np.empty(min(_CHUNK, bits.size), bits.dtype)
    for start in range(0, bits.size, _CHUNK):
        chunk = bits[start : start + _CHUNK]
        masked = np.bitwise_and(chunk, exponent, out=room[: chunk.size])
        if masked.max() == exponent:
            return start + int(np.argmax(masked == exponent))
    return None


def _flat(data: HostArray) -> HostArray:
    return np.ascontiguousarray(data).reshape(-1)
