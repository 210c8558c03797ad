"""A case as data: one call of one op. Its id says all of it, and seeds its inputs."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from step3_hetero.backend import BatchMeta
from step3_hetero.ops import OPS
from step3_hetero.specs import HostArray, HostTensor, OpSpec, Scalar

DTYPES = ("float32", "bfloat16")
"""The dtypes a case may have: those a backend may claim and the reference can judge in float64."""

Sizes = Mapping[str, int | tuple[int, ...]]


@dataclass(frozen=True)
class Case:
    """One call of one op.

    ``dims`` are sizes by name (a tuple where each sequence has its own), ``draw`` names the
    distribution of the inputs, ``stored`` the dtype in which weights lie in the checkpoint and
    ``held`` that to which they are rounded before use; ``kv`` is the dtype of a cache, empty for
    the case's own. A quick run leaves out what is ``full``.
    """

    op: str
    dtype: str
    dims: Sizes
    parameters: Mapping[str, Scalar] = field(default_factory=dict)
    draw: str = "normal"
    stored: str = ""
    held: str = ""
    full: bool = False
    kv: str = ""

    @property
    def id(self) -> str:
        """Return the case in words: no two cases share it.

        >>> Case("add", "bfloat16", {"tokens": 5, "hidden": 64}).id
        'add[tokens=5,hidden=64,bfloat16]'
        """
        said = [f"{name}={_said(size)}" for name, size in self.dims.items()]
        said += [f"{name}={value}" for name, value in self.parameters.items()]
        said += [f"stored={self.stored}"] if self.stored else []
        said += [f"held={self.held}"] if self.held else []
        said += [f"kv={self.kv}"] if self.kv else []
        said += [self.dtype] + ([self.draw] if self.draw != "normal" else [])
        return f"{self.op}[{','.join(said)}]"

    def __str__(self) -> str:
        return self.id

    def __hash__(self) -> int:
        return hash(self.id)

    def rng(self) -> np.random.Generator:
        """Return the generator of the inputs: the same numbers on every machine."""
        return seeded(self.id)

    def size(self, name: str) -> int:
        """Return one dimension."""
        size = self.dims[name]
        assert isinstance(size, int), f"{self.id}: {name} has a size for each sequence"
        return size

    def sizes(self, name: str) -> tuple[int, ...]:
        """Return a dimension that each sequence has for itself; none if it is left out."""
        sizes = self.dims.get(name, ())
        return sizes if isinstance(sizes, tuple) else (sizes,)

    def specs(self) -> tuple[OpSpec, ...]:
        """Return what a device must claim for this case to be its business."""
        largest = sum if self.op == "linear" else max  # matrices side by side; sequences
        dims = {n: size if isinstance(size, int) else largest(size or (0,))
                for n, size in self.dims.items()}  # fmt: skip
        parameters = dict(self.parameters)
        if self.op == "linear":
            parameters.setdefault("out_dtype", self.dtype)
        kv = (self.kv or self.dtype) if self.op in ("attention", "kv_cache") else None
        op = "attention" if self.op == "kv_cache" else self.op
        if self.op == "kv_cache":
            dims, parameters = {"heads": self.size("kv_heads"), **dims}, {"scale": 1.0}
        weights = (self.held or "auto") if OPS[op].prepared else None
        return (OpSpec(op, self.dtype, dims, parameters, weights, kv),)


def _said(size: int | tuple[int, ...]) -> str:
    return "+".join(map(str, size)) if isinstance(size, tuple) else str(size)


def seeded(text: str) -> np.random.Generator:
    """Return a generator seeded by the CRC-32 of ``text``."""
    return np.random.default_rng(zlib.crc32(text.encode()))


def op(
    name: str,
    dims: Sizes,
    *,
    draw: str = "normal",
    stored: str = "",
    held: str = "",
    full: bool = False,
    kv: str = "",
    dtypes: tuple[str, ...] = DTYPES,
    **parameters: Scalar,
) -> Iterator[Case]:
    """Yield one case of op ``name`` for each dtype.

    >>> [c.dtype for c in op("add", {"tokens": 1, "hidden": 8})]
    ['float32', 'bfloat16']
    """
    for dtype in dtypes:
        yield Case(name, dtype, dims, parameters, draw, stored, held, full, kv)


@dataclass(frozen=True)
class Inputs:
    """What a case is called with, on the host.

    ``arrays`` stand in the order in which the op takes them. ``history`` are the keys and values
    in the cache before the call, each (blocks, 128, kv_heads, head_dim).
    """

    arrays: Mapping[str, HostArray]
    weights: Mapping[str, HostTensor] = field(default_factory=dict)
    history: tuple[HostArray, HostArray] | None = None
    meta: BatchMeta | None = None

    def widened(self) -> Inputs:
        """Return the same values in float64, for the reference to judge by."""
        arrays = {name: widened(x) for name, x in self.arrays.items()}
        weights = {n: HostTensor(t.name, t.data if t.scale_inv is not None else widened(t.data),
                                 t.scale_inv) for n, t in self.weights.items()}  # fmt: skip
        history = None
        if self.history is not None:
            history = (widened(self.history[0]), widened(self.history[1]))
        return Inputs(arrays, weights, history, self.meta)


def widened(x: HostArray) -> HostArray:
    """Return ``x`` in float64 if it holds real numbers; codes and indices stay."""
    is_real = x.dtype.name in ("float32", "float64", "bfloat16")
    return x.astype(np.float64) if is_real else x
