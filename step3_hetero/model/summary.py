"""What a checkpoint holds, part by part."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from step3_hetero.model.layout import GROUPS, group_of
from step3_hetero.model.safetensors_file import DTYPES


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """What a header says of a tensor; ``nbytes`` includes its scales, ``shape`` does not."""

    name: str
    shape: tuple[int, ...]
    stored: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Group:
    """One part of the model. ``dtypes`` are NumPy names, in alphabetical order."""

    name: str
    tensors: int
    params: int
    nbytes: int
    dtypes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "name": self.name,
            "tensors": self.tensors,
            "params": self.params,
            "bytes": self.nbytes,
            "dtypes": list(self.dtypes),
        }


@dataclass(frozen=True, slots=True)
class Summary:
    """The parts that a model has, in the order of ``layout.GROUPS``, and all of them together."""

    groups: tuple[Group, ...]
    total: Group

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {"groups": [g.to_json() for g in self.groups], "total": self.total.to_json()}


def summarise(tensors: Iterable[TensorFacts]) -> Summary:
    """Add up tensors by the part of the model they belong to."""
    every = list(tensors)
    parts = {g: [t for t in every if group_of(t.name) == g] for g in GROUPS}
    groups = tuple(_group(name, part) for name, part in parts.items() if part)
    return Summary(groups, _group("total", every))


def _group(name: str, tensors: list[TensorFacts]) -> Group:
    return Group(
        name=name,
        tensors=len(tensors),
        params=sum(math.prod(t.shape) for t in tensors),
        nbytes=sum(t.nbytes for t in tensors),
        dtypes=tuple(sorted({DTYPES[t.stored].name for t in tensors})),
    )
