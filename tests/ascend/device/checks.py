"""How the stand-in refuses: as an op on the device would, naming op, limit and value."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

REAL = (torch.float32, torch.float16, torch.bfloat16)

CODES = {1: torch.int8, 3: torch.int32, 5: torch.float16, 6: torch.float32, 15: torch.bfloat16}
"""torch's dtypes by the number that a schema's ``int`` carries."""


def require(op: str, holds: Any, said: str) -> None:
    """Refuse a call whose condition does not hold."""
    if not holds:
        raise RuntimeError(f"{op}: {said}")


def require_dtype(op: str, name: str, x: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """Refuse an array of a dtype that the documents do not list."""
    require(op, x.dtype in allowed, f"{name} is {x.dtype}; documented: {allowed}")


def require_contiguous(op: str, **arrays: Tensor) -> None:
    """Refuse arrays that are not contiguous, where the documents do."""
    for name, x in arrays.items():
        require(op, x.is_contiguous(), f"{name} is not contiguous")


def require_some(op: str, **arrays: Tensor) -> None:
    """Refuse empty arrays: the documents are silent on them."""
    for name, x in arrays.items():
        require(op, x.numel() > 0, f"{name} is empty, on which the documents are silent")


def require_default(op: str, given: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Refuse a parameter that the stand-in has no implementation of."""
    for name, value in given.items():
        default = defaults.get(name)
        require(op, value == default, f"{name}={value!r} has no implementation in the stand-in")
