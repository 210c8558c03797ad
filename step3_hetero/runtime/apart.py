"""What crosses between roles in processes of their own: over which transport, in which dtype."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from step3_hetero.config import Config
from step3_hetero.specs import FP8_BLOCK, SCALED, TensorSpec, itemsize

WIRE_KEY = {"A2F": "a2f_dtype", "F2A": "f2a_dtype"}
"""The key of ``transport`` that says in which dtype an edge of this kind travels."""

WIRE_DTYPE = {
    "auto": "", "fp32": "float32", "bf16": "bfloat16", "fp8": "float8_e4m3fn", "int8": "int8"
}  # fmt: skip
"""NumPy's names of the config's wire dtypes; ``auto`` sends what there is."""

CAST = ("u", "y")
"""Hidden states, which alone are cast; routing weights and ids are a thousandth of them."""


@dataclass(frozen=True, slots=True)
class Apart:
    """How roles in processes of their own reach each other.

    ``wires`` has, by kind of edge, NumPy's name of the dtype in which hidden states travel; empty:
    as they are.
    """

    transport: str
    wires: Mapping[str, str]

    @classmethod
    def of(cls, config: Config) -> Apart | None:
        """Return how a config's roles do; None where they share a process."""
        if config.runtime.processes == "one":
            return None
        said = {kind: getattr(config.transport, key) for kind, key in WIRE_KEY.items()}
        return cls(config.transport.kind, {kind: WIRE_DTYPE[dtype] for kind, dtype in said.items()})


def token_bytes(tensors: Iterable[TensorSpec], sizes: Mapping[str, int], wire: str) -> int:
    """Return the bytes of one token's row of each tensor, hidden states cast to ``wire``.

    Codes have a float32 scale for each run of 128 columns beside them.
    """
    total = 0
    for tensor in tensors:
        columns = math.prod(sizes[d] for d in tensor.dims[1:])
        dtype = wire if wire and tensor.name in CAST else tensor.dtype
        total += columns * itemsize(dtype)
        if dtype in SCALED:
            total += -(-columns // FP8_BLOCK) * itemsize("float32")
    return total
