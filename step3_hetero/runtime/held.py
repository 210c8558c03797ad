"""What a role holds of a checkpoint's weights: how many bytes, and in which other format."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from step3_hetero.backend import DeviceInfo
from step3_hetero.graph import GraphStage, Param
from step3_hetero.model.config import ModelConfig
from step3_hetero.specs import weight_bytes

METHODS = {
    "int8": "codes with a float32 scale for each output row, made at load; "
    "activations are quantised for each token"
}

BLOCK_FP8 = "block float8_e4m3fn"


@dataclass(frozen=True, slots=True)
class Requantised:
    """What a role's backend makes of the checkpoint's weights at load: it holds them otherwise.

    ``to`` is the format held: INT8 as asked, or the activations' dtype where a device stores no
    FP8. ``weights`` counts the numbers in ``tensors`` of the checkpoint; ``nbytes`` are those held,
    scales included.
    """

    stored: str
    to: str
    tensors: int
    weights: int
    nbytes: int

    def to_json(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return {
            "stored": self.stored,
            "to": self.to,
            "tensors": self.tensors,
            "weights": self.weights,
            "bytes": self.nbytes,
            "method": METHODS.get(self.to, "decoded and rounded at load"),
        }


def stage_bytes(stage: GraphStage, weight_format: str) -> int:
    """Return the bytes of a stage's weights, scales included; the router is held in float32."""
    total = 0
    for param in stage.params:
        follows = param.compressible and weight_format != "auto"
        dtype = weight_format if follows else stage.spec.dtype
        if param.name == "router" and param.spec is not None:
            dtype = str(param.spec.parameters["out_dtype"])
        total += weight_bytes(param.elements, _rows(param), dtype)
    return total


def _rows(param: Param) -> int:
    """Return the output rows of a param's matrices: each has a scale of its own."""
    return sum(math.prod(shape[:-1]) for shape in param.shapes.values())


def requantised(
    stages: Sequence[GraphStage], model: ModelConfig, info: DeviceInfo, weight_format: str
) -> Requantised | None:
    """Return what is held in another format than the checkpoint's, beyond a change of dtype."""
    params = [p for s in stages for p in s.params if p.compressible]
    decoded = model.fp8_blocks and "float8_e4m3fn" not in info.dtypes.stored
    if not params or not (weight_format == "int8" or decoded):
        return None
    held = stages[0].spec.dtype if weight_format == "auto" else weight_format
    weights = sum(p.elements for p in params)
    return Requantised(
        BLOCK_FP8 if model.fp8_blocks else model.dtype,
        held,
        sum(len(p.tensors) for p in params),
        weights,
        weight_bytes(weights, sum(map(_rows, params)), held),
    )
