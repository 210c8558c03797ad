"""torch_npu's stand-in: an ``npu`` device on host memory, with the vendor's op signatures.

``load`` registers it with torch, once per process: the device (device.cpp), the vendor's signatures
as its wheel has them (schemas.json), and for each op that the backend calls a host implementation
of what the vendor documents (attention.py, moe.py, dense.py). It refuses what the documents refuse.
No Ascend code runs here: what passes on it fits our reading of the documents, no more.
"""

from __future__ import annotations

import functools
import json
import types
from pathlib import Path
from typing import Any

DESCRIPTION = "torch_npu's signatures over host memory; no Ascend hardware"
MEMORY_BYTES = 64 * 10**9
SCHEMAS = json.loads(Path(__file__).with_name("schemas.json").read_text(encoding="utf-8"))

_kept: list[Any] = []
"""The torch.library objects: what they registered goes with them."""


@functools.cache
def load() -> str:
    """Register the device and its ops; return what it is, for ``DeviceInfo.description``."""
    import torch

    from .build import library

    torch.utils.rename_privateuse1_backend("npu")
    torch.ops.load_library(str(library()))
    torch._register_device_module("npu", _device_module())
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    _register_ops()
    torch.ops.npu_stand_in.allow(SCHEMAS["native"])
    return DESCRIPTION


def _register_ops() -> None:
    import torch

    from . import attention, dense, formats, moe

    vendor = torch.library.Library("npu", "DEF")
    for signature in SCHEMAS["ops"].values():
        vendor.define(signature)
    for module in (attention, dense, moe):
        for name, function in module.OPS.items():
            vendor.impl(name, _on_host(name, function), "PrivateUse1")
    for name, function in formats.OPS.items():
        vendor.impl(name, function, "PrivateUse1")
    own = torch.library.Library("aten", "IMPL")
    own.impl(
        "convolution_overrideable",
        _on_host("convolution", dense.convolution),
        "PrivateUse1",
    )
    _kept.extend((vendor, own))


def _on_host(name: str, function: Any) -> Any:
    """Return ``function`` over host views of device arrays; what it returns goes to the device."""
    import torch

    view, to_device = torch.ops.npu_stand_in.host_view, torch.ops.npu_stand_in.to_device

    def host(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            if x.device.type != "npu":
                raise RuntimeError(
                    f"{name}: expected all tensors on npu:0, found one on {x.device}"
                )
            return view(x)
        return [host(i) for i in x] if isinstance(x, list | tuple) else x

    def device(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return to_device(x)
        return type(x)(device(i) for i in x) if isinstance(x, list | tuple) else x

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return device(function(*map(host, args), **{k: host(v) for k, v in kwargs.items()}))

    return call


class _Event:
    """An event of a device that runs at once."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """Take and ignore the flags of the vendor's event."""

    def record(self, stream: Any = None) -> None:
        """Nothing is ever pending."""

    def query(self) -> bool:
        """Say that it has happened."""
        return True

    def synchronize(self) -> None:
        """Return at once."""


def _device_module() -> types.ModuleType:
    """Return what becomes ``torch.npu``."""
    import torch

    from . import formats, graphs

    module = types.ModuleType("torch.npu")

    def mem_get_info(_: Any = None) -> tuple[int, int]:
        used = int(torch.ops.npu_stand_in.allocated_bytes())
        return MEMORY_BYTES - used, MEMORY_BYTES

    members: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "synchronize": lambda _=None: None,
        "get_device_name": lambda _=0: "Ascend910B3",
        "mem_get_info": mem_get_info,
        "Event": _Event,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "_is_in_bad_fork": lambda: False,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda _=0: torch.get_rng_state(),
        "set_rng_state": lambda state, _=0: torch.set_rng_state(state),
        "get_amp_supported_dtype": lambda: [torch.float16, torch.bfloat16],
        **graphs.MEMBERS,
        "config": formats.CONFIG,
        # The vendor's defaults: products in float32, convolutions in HF32 (npu_config.py).
        "matmul": types.SimpleNamespace(allow_hf32=False),
        "conv": types.SimpleNamespace(allow_hf32=True),
    }
    module.__dict__.update(members)
    return module
