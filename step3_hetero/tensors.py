"""Weights in host memory, whole or in shards, and where they come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from step3_hetero.errors import CheckpointError

HostArray = npt.NDArray[Any]

FP8_BLOCK = 128
"""Rows and columns of one scale block in a block-FP8 checkpoint."""


@dataclass(frozen=True, slots=True)
class Cut:
    """The run of one axis that a shard holds; axes count from the last: -1 columns, -2 rows."""

    axis: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class HostTensor:
    """A weight in host memory, as the checkpoint stores it.

    Shapes: data (..., rows, columns); scale_inv, for float8_e4m3fn data only,
    (..., ceil(rows / 128), ceil(columns / 128)) float32, with weight = data * scale_inv.
    """

    name: str
    data: HostArray
    scale_inv: HostArray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the weight itself."""
        return self.data.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return the stored dtype."""
        return self.data.dtype

    def cut(self, cuts: Sequence[Cut]) -> HostTensor:
        """Return the part that a shard holds, as views; its block scales go along.

        Raises:
            CheckpointError: a cut parts rows or columns that share a scale.
        """
        tensor = self
        for cut in cuts:
            tensor = tensor._cut(cut)
        return tensor

    def _cut(self, cut: Cut) -> HostTensor:
        axis, start, stop = cut.axis, cut.start, cut.stop
        after: tuple[Any, ...] = (slice(None),) * (-1 - axis)
        name = f"{self.name}[..., {start}:{stop}{', :' * len(after)}]"
        data = self.data[..., slice(start, stop), *after]
        if self.scale_inv is None:
            return HostTensor(name, data)
        block = FP8_BLOCK if axis >= -2 else 1
        if start % block or (stop % block and stop != self.shape[axis]):
            raise CheckpointError(f"{name}: block-FP8 scales; allowed: multiples of {block}")
        held = slice(start // block, -(-stop // block))
        return HostTensor(name, data, self.scale_inv[..., held, *after])


class TensorSource(Protocol):
    """Where weights come from: a checkpoint, or one with a part zeroed."""

    def tensor(self, name: str, cuts: Sequence[Cut] = ()) -> HostTensor:
        """Return one weight, or what ``cuts`` leave of it; its values are checked to be finite."""
