"""Private formats: noted of each array, without effect on what is computed from it.

Assumed: a private format changes the order in memory and no value. As users report, the cast
returns an array in the plain format while ``torch.npu.config.allow_internal_format`` is off.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .checks import require

ND, NZ = 2, 29
CONFIG = types.SimpleNamespace(allow_internal_format=False)

_formats: dict[int, int] = {}
"""The format of each array that is not ND, by the address of its memory."""


def format_cast(
    x: Tensor, acl_format: int, *, customize_dtype: int | None = None, input_dtype: Any = None
) -> Tensor:
    """Return a copy in another format."""
    require("npu_format_cast", acl_format in (ND, NZ), f"format {acl_format}: 2 (ND) or 29 (NZ)")
    out = x.clone()
    if acl_format == NZ and CONFIG.allow_internal_format:
        place = out.untyped_storage().data_ptr()
        _formats[place] = NZ
        weakref.finalize(out, _formats.pop, place, None)
    return out


def get_format(x: Tensor) -> int:
    """Return an array's format."""
    return _formats.get(x.untyped_storage().data_ptr(), ND)


OPS: Mapping[str, Any] = {"get_npu_format": get_format, "npu_format_cast": format_cast}
