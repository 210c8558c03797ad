"""A checkpoint with one part zeroed, to see what the part is worth."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np

from step3_hetero.errors import ConfigError
from step3_hetero.specs import Cut, HostTensor, TensorSource

PARTS = {
    "attention": r"self_attn\.o_proj\.weight",
    "experts": r"(moe|share_expert)\.down_proj\.weight",
    "vision": r"vit_large_projector\.(weight|bias)",
}
"""The last matrix of each part: zeroed, the part adds nothing. Experts: routed and shared."""


class Ablated:
    """Gives zeros for the output matrices of one part, the checkpoint's own for all else."""

    def __init__(self, source: TensorSource, names: Iterable[str], part: str) -> None:
        if part not in PARTS:
            raise ConfigError(f"cannot ablate {part!r}; parts: {', '.join(PARTS)}")
        self._source = source
        self._zeroed = re.compile(rf"(^|\.){PARTS[part]}$")
        if not any(map(self._zeroed.search, names)):
            raise ConfigError(f"cannot ablate {part!r}: the model has none")

    def tensor(self, name: str, cuts: Sequence[Cut] = ()) -> HostTensor:
        """Return one weight, or zeros of its shape."""
        tensor = self._source.tensor(name, cuts)
        if not self._zeroed.search(name):
            return tensor
        return HostTensor(name, np.zeros(tensor.shape, np.float32))
