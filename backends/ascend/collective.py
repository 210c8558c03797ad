"""HCCL, for TP and EP within a node: what torch_npu adds to torch.distributed.

Written for cards and never run on one.
"""

from __future__ import annotations

import os
from datetime import timedelta
from importlib import import_module
from typing import Any

BLOCKING = "TORCH_HCCL_BLOCKING_WAIT"
"""With it a wait holds the host and ends at the deadline; without it only the device's queue waits,
and a rank that is gone is found by a watchdog that ends the process."""


def hccl(store: Any, place: int, size: int, host: str, deadline: timedelta) -> Any:
    """Return HCCL's process group, made as torch_npu itself makes one. See ``collective.Make``."""
    os.environ.setdefault(BLOCKING, "1")
    library = import_module("torch_npu")._C._distributed_c10d.ProcessGroupHCCL
    options = library.Options()
    options.is_high_priority_stream = False
    options._timeout = deadline
    options.global_ranks_in_group = list(range(size))
    options.group_id = f"step3-hetero of {size} at {host}"
    return library(store, place, size, options)
